"""The page of nanochat.watch in a real Chromium, live and as report.html; what its server sends."""

import json
import threading
import time

import pytest
import uvicorn
from helpers import raises_user_error

from nanochat import watch
from nanochat.cli import listen
from nanochat.pages import html_page

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (uv pip install playwright)")
expect = playwright.expect
STAGES = {"base": "Base model training", "rl": "Chat RL"}


def add_rows(base, stage, steps, num_steps, **values):
    """Append rows of `steps` to the metrics of a stage, and on the first call its record."""
    record = base / "report" / "runs" / f"{stage}.json"
    path = base / "report" / "metrics" / f"{stage}.jsonl"
    if not record.exists():
        for file in (record, path):
            file.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps({"started": time.time(), "vocab_size": 512, "flags": {"depth": 4}}))
    now = time.time() - 60
    with open(path, "a") as f:
        for step in steps:
            row = {"step": step, "time": now + step / 1000, "loss": 6 / (1 + step) ** 0.3, "lr_mult": 1.0}
            row |= {"grad_norm": 1.0, "dt_ms": 1.0, "progress": (step + 1) / num_steps} | values
            f.write(json.dumps(row) + "\n")


def add_samples(base, stage, samples):
    path = base / "report" / "samples" / f"{stage}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as f:
        for step, text in samples.items():
            f.write(json.dumps({"step": step, "prompt": "Once", "text": text}) + "\n")


def test_only_changes_are_sent(tmp_path):
    add_rows(tmp_path, "base", range(3), 10)
    known = {}

    def poll():
        changed = watch.changes([tmp_path], known)
        known.update({file["key"]: (file["size"], file["version"]) for file in changed})
        return {file["file"]: (file["start"], file["text"]) for file in changed}

    first = poll()
    assert set(first) == {"runs/base.json", "metrics/base.jsonl"} and poll() == {}
    path = tmp_path / "report" / "metrics" / "base.jsonl"
    size = path.stat().st_size
    with open(path, "a") as f:
        f.write('{"step": 3}\n{"st')
    assert poll() == {"metrics/base.jsonl": (size, '{"step": 3}\n')}
    with open(path, "a") as f:
        f.write('ep": 4}\n')
    assert poll()["metrics/base.jsonl"][1] == '{"step": 4}\n'
    path.write_text('{"step": 0}\n')  # by a resumed run
    assert poll()["metrics/base.jsonl"] == (0, '{"step": 0}\n')


def test_runs_have_names_that_tell_them_apart(tmp_path):
    folders = ["a/report", "a/report/earlier/2026-01-01-101010", "a/sweeps/lr/depth=2/report", "b/report"]
    for folder in folders:
        (tmp_path / folder / "runs").mkdir(parents=True)
    assert list(watch.runs([tmp_path / "a"])) == ["newest", "earlier 2026-01-01-101010", "lr/depth=2"]
    assert list(watch.runs([tmp_path / "a", tmp_path / "b"])) == [
        *("a", "a earlier 2026-01-01-101010", "a lr/depth=2", "b")
    ]


def test_a_missing_folder_is_one_line():
    with raises_user_error("no folder /nowhere"):
        watch.main(["/nowhere"])


@pytest.fixture
def served(tmp_path):
    """URL of a watcher of tmp_path."""
    sock = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(watch.create_app([tmp_path]), log_level="warning", ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    yield f"http://127.0.0.1:{sock.getsockname()[1]}/"
    server.should_exit = True
    thread.join()


@pytest.mark.slow
def test_stages_appear_while_they_run(tmp_path, served, open_page):
    page = open_page(served)
    expect(page.locator("#status")).to_contain_text("no runs yet")
    add_rows(tmp_path, "base", [], 40)
    expect(page.locator("#stages")).to_contain_text("Base model trainingbeginning")
    add_rows(tmp_path, "base", range(20), 40, val_bpb=1.5)
    add_samples(tmp_path, "base", {0: "xqz", 10: "upon a time"})
    expect(page.locator("#stages")).to_contain_text("step 20, 50 %")
    expect(page.locator("#stages progress")).to_have_attribute("value", "0.5")
    expect(page.locator("figure").first).to_have_attribute("aria-label", f"Loss, nats per token: now {6 / 20**0.3:.4g}")
    expect(page.locator("#samples")).to_contain_text("upon a time")
    page.locator("#sample-step").press("ArrowLeft")
    expect(page.locator("#samples")).to_contain_text("xqz")
    add_rows(tmp_path, "rl", range(5), 10, reward=0.5, **{"pass@1": 0.25})
    expect(page.locator("#stages")).to_contain_text("Chat RL")
    expect(page.get_by_role("button", name="Chat RL")).to_have_attribute("aria-pressed", "true")
    assert {"Reward", "Scores"} <= set(
        page.locator("figcaption").evaluate_all("all => all.map(c => c.firstChild.data)")
    )
    page.get_by_role("button", name="Base model training").click()
    expect(page.locator("#stage-name")).to_have_text("Base model training")
    figure = page.locator("figure").first
    figure.focus()
    page.keyboard.press("ArrowRight")
    expect(figure.locator("figcaption span")).to_contain_text("at step 0")
    page.get_by_role("button", name="Minutes").click()
    expect(figure).to_be_visible()


@pytest.mark.slow
def test_many_steps_of_several_runs_are_thinned(tmp_path, served, open_page):
    add_rows(tmp_path, "base", range(10_000), 10_000)
    add_rows(tmp_path / "sweeps" / "lr" / "a", "base", range(10_000), 10_000)
    page = open_page(served)
    expect(page.locator("#runs label")).to_have_count(2)
    expect(page.locator("figure canvas").first).to_be_visible()
    points = page.evaluate("Math.max(...[...view.charts.values()].map(chart => chart.plot.data[0].length))")
    assert 200 < points <= 2 * 600
    page.get_by_label("lr/a").uncheck()
    expect(page.locator("figure").first).to_have_attribute(
        "aria-label", f"Loss, nats per token: now {6 / 10_000**0.3:.4g}"
    )


def finished_report(base):
    add_rows(base, "base", range(50), 50)
    add_samples(base, "base", {50: "<img src=x onerror=alert(1)>"})
    section = {"section": "Chat evaluation sft", "time": 1.0, "values": {"A, 95 % interval": "0.4000 to 0.6000"}}
    section |= {"metrics": {"task_scores": {"A": 0.5}, "wall_clock_seconds": 90}}
    (base / "report" / "chat-evaluation-sft.json").write_text(json.dumps(section))
    (base / "report" / "chat-evaluation-sft.md").write_text("## Chat evaluation sft\nConversations")
    file = base / "report.html"
    file.write_text(html_page("watch.html", watch.changes([base], {})), encoding="utf-8")
    return file.as_uri()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_report_is_complete_and_accessible(scheme, tmp_path, open_page, axe):
    page = open_page(finished_report(tmp_path), color_scheme=scheme)
    expect(page.locator("#scores")).to_contain_text("50.0 % 40.0 to 60.0")
    expect(page.locator("#stages")).to_contain_text("done, 1 min 30 s")
    expect(page.locator("#samples")).to_contain_text("<img src=x")
    page.locator("summary", has_text="Chat evaluation sft").click()
    expect(page.locator("#report pre").filter(has_text="Conversations")).to_be_visible()
    page.evaluate(axe)
    violations = page.evaluate("axe.run().then(result => result.violations)")
    assert [v["id"] for v in violations if v["impact"] in ("serious", "critical", "moderate")] == []


@pytest.mark.slow
def test_report_fits_a_phone(tmp_path, open_page):
    phone = {"viewport": {"width": 375, "height": 667}, "is_mobile": True, "has_touch": True}
    page = open_page(finished_report(tmp_path), **phone)
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
