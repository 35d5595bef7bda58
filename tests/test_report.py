"""The report: sections and summary of logged values; it works without git, torch and some of its sections."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import CPU, ROOT, raises_user_error

from nanochat import report, tracking
from nanochat.gpt import GPTConfig
from nanochat.report import Report, get_report
from nanochat.train import StepResult

CONFIG = GPTConfig()


def table_row(text, metric):
    """Cells of the row of a metric, without its name."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {metric} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def log_all_stages():
    log = get_report().log
    log("Tokenizer training", [{"vocab_size": 4096, "train_time": 1.5}], {"wall_clock_seconds": 10.0})
    log("Base model training", [{"depth": 4}, {"Minimum validation bpb": 0.8}], {"val_bpb": 0.9})
    log(
        "Base model loss",
        [{"train bpb": 0.81, "val bpb": 0.91}, "Sample: `hello`", None],
        {"train_bpb": 0.81, "val_bpb": 0.91, "wall_clock_seconds": 5.0},
    )
    log("Base model evaluation", [{"CORE metric": 0.2219}], {"core": 0.2219, "wall_clock_seconds": 65.4})
    log("Chat evaluation base", [{"source": "base", "PocketSums": 0.0}], {"task_scores": {"PocketSums": 0.0}})
    log("Midtraining", [{"val_bpb": 0.75}], {"val_bpb": 0.7})
    settings = {"temperature": 0.0, "max_problems": 1, "Uppercase": 1.0}
    log("Chat evaluation mid", [settings], {"task_scores": {"ARC-Easy": 0.3561, "PocketSums": 0.5}})
    log("Chat SFT", {"Training loss": 1.25})
    scores = {"ARC-Easy": 0.3876, "SpellingBee": 0.975, "NewTask": 1.0, "mine.py:Mine": 0.25}
    log("Chat evaluation sft", [{"ARC-Easy": 0.5}], {"task_scores": scores, "chat_core": 0.0884})
    log("Chat evaluation rl", None, {"task_scores": {"GSM8K": 0.0758}, "chat_core": None})


def test_summary_has_every_metric_in_its_column(empty_base):
    Report(empty_base / "report").reset()
    log_all_stages()
    report.main([])
    text = Path("report.md").read_text(encoding="utf-8")
    assert text == (empty_base / "report" / "report.md").read_text(encoding="utf-8")
    assert table_row(text, "CORE") == ["0.2219", "-", "-", "-"]
    assert table_row(text, "Validation bpb") == ["0.9100", "0.7000", "-", "-"]
    assert table_row(text, "ARC-Easy") == ["-", "0.3561", "0.3876", "-"]
    assert table_row(text, "PocketSums") == ["0.0000", "0.5000", "-", "-"]
    assert table_row(text, "SpellingBee") == ["-", "-", "0.9750", "-"]
    assert table_row(text, "NewTask") == ["-", "-", "1.0000", "-"]
    assert table_row(text, "mine.py:Mine") == ["-", "-", "0.2500", "-"]
    assert table_row(text, "GSM8K") == ["-", "-", "-", "0.0758"]
    assert table_row(text, "ChatCORE") == ["-", "-", "0.0884", "-"]
    rows = text[text.index("| Metric") :].split("\n\n")[0].splitlines()
    assert rows[0] == "| Metric | BASE | MID | SFT | RL |"
    metrics = ["CORE", "Validation bpb", "ARC-Easy", "GSM8K", "SpellingBee", "PocketSums", "NewTask", "mine.py:Mine"]
    assert [row.split(" | ")[0] for row in rows[2:]] == [f"| {metric}" for metric in [*metrics, "ChatCORE"]]
    assert "| temperature" not in text and "| MMLU" not in text and "| Uppercase" not in text
    assert table_row(text, "Base model evaluation") == ["1m05s"] and table_row(text, "Sum") == ["1m20s"]
    assert "Total wall clock time" in text
    assert "Not run, or not logged: Tokenizer evaluation.\n" in text


def test_sections_are_in_the_order_of_the_stages(empty_base):
    get_report().log("Midtraining", [])
    get_report().log("A stage of my own", [])
    get_report().log("Tokenizer training", [])
    text = Report(empty_base / "report").generate()[0].read_text(encoding="utf-8")
    heads = [line[3:] for line in text.splitlines() if line.startswith("## ")]
    assert heads == ["Tokenizer training", "Midtraining", "A stage of my own", "Summary"]


def test_section_is_written_as_markdown_and_json(empty_base):
    data = [
        {"lr": 0.02, "eps": 1e-10, "tokens": 11_200_000_000, "steps": 9999, "flops": 4.5e20},
        "| a |",
        {"done": True},
    ]
    get_report().log("Chat SFT", data, {"val_bpb": 0.5, "wall_clock_seconds": 3.0})
    text = (empty_base / "report" / "chat-sft.md").read_text(encoding="utf-8")
    assert text.startswith("## Chat SFT\ntimestamp: 20")
    lines = ["- lr: 0.0200", "- eps: 1e-10", "- tokens: 11,200,000,000", "- steps: 9999", "- flops: 4.5e+20"]
    assert "\n".join(lines) + "\n\n| a |\n\n- done: True\n" in text
    record = json.loads((empty_base / "report" / "chat-sft.json").read_text(encoding="utf-8"))
    assert record["section"] == "Chat SFT" and record["values"] == {**data[0], **data[2]}
    assert record["metrics"] == {"val_bpb": 0.5, "wall_clock_seconds": 3.0}
    assert record.keys() == {"section", "time", "values", "metrics"} and abs(record["time"] - time.time()) < 60


def test_unknown_metric_is_an_error(empty_base):
    with pytest.raises(AssertionError, match="validation_bpb"):
        get_report().log("Chat SFT", [], {"validation_bpb": 0.5})


def test_summary_has_metrics_but_no_other_values(empty_base):
    get_report().log("Chat evaluation sft", [{"ARC-Easy": 0.5, "wall_clock_seconds": 9.0}])
    get_report().log("Base model evaluation", [{"CORE metric": 0.5, "core": 0.5}], {"core": None})
    text = Report(empty_base / "report").generate()[0].read_text(encoding="utf-8")
    assert "No metrics yet." in text and "| Stage |" not in text
    assert "- ARC-Easy: 0.5000\n- wall_clock_seconds: 9.0000\n" in text


def test_reset_deletes_sections_and_keeps_metrics(empty_base):
    log_all_stages()
    metrics = empty_base / "report" / "metrics" / "base.jsonl"
    metrics.parent.mkdir()
    metrics.write_text("{}\n")
    report.main(["reset"])
    assert sorted(path.name for path in (empty_base / "report").iterdir()) == ["header.json", "header.md", "metrics"]
    assert metrics.exists()
    report.main(["generate"])
    text = Path("report.md").read_text(encoding="utf-8")
    assert (
        "No metrics yet." in text and "Run started: 20" in text and "Tokenizer training, Tokenizer evaluation" in text
    )


def test_report_without_git_and_torch_and_with_a_truncated_section(empty_base, monkeypatch):
    def missing(*args, **kwargs):
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", missing)
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(report, "_cpu_name", lambda: "")
    report.main(["reset"])
    log_all_stages()
    (empty_base / "report" / "midtraining.json").write_text('{"section": "Midtr')  # truncated by a crash
    for name, text in (("mine", '{"a": 1}'), ("list", "[1]"), ("header", '"x"')):
        (empty_base / "report" / f"{name}.json").write_text(text)
    report.main([])
    text = Path("report.md").read_text(encoding="utf-8")
    assert "- Commit: unknown" in text and "- PyTorch: unknown" in text and "unknown (not a git checkout)" in text
    assert table_row(text, "Validation bpb") == ["0.9100", "-", "-", "-"]


def test_header_describes_the_git_checkout(empty_base, tmp_path, monkeypatch):
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "init", "-q", "-b", "main", str(tmp_path)], check=True)
    (tmp_path / "ä b.txt").write_text("four\nlines\nof\ntext\n", encoding="utf-8")
    (tmp_path / "gone.txt").write_text("deleted, not committed")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    subprocess.run([*git, "add", "-A"], check=True)
    subprocess.run([*git, "commit", "-qm", "m" * 100], check=True)
    (tmp_path / "gone.txt").unlink()
    monkeypatch.setattr(report, "ROOT", tmp_path)
    text = report.header([], "Run started: now")
    assert "- Branch: main\n" in text and "(dirty)" in text and f"- Message: {'m' * 80}\n" in text
    assert "- Characters: 19\n- Lines: 4\n- Files: 1\n- Tokens (characters / 4): 4\n" in text


def test_cost_depends_on_the_gpus(empty_base, monkeypatch):
    assert report.hourly_rate([("NVIDIA H100 80GB HBM3", 80 << 30)] * 8) == 24.0
    assert report.hourly_rate([("NVIDIA A100-SXM4-80GB", 1), ("Tesla V100", 1), ("RTX 4090", 1)]) == pytest.approx(4.34)
    assert report.hourly_rate([]) is None
    monkeypatch.setattr(report, "gpu_list", lambda: [("NVIDIA H100 80GB HBM3", 80 << 30)] * 8)
    report.main(["reset"])
    head = empty_base / "report" / "header.json"
    head.write_text(json.dumps(json.loads(head.read_text()) | {"started": 1000.0}))
    record = {"section": "Chat SFT", "time": 1000.0 + 3.5 * 3600, "metrics": {}}
    (empty_base / "report" / "chat-sft.json").write_text(json.dumps(record))
    text = Report(empty_base / "report").generate()[0].read_text(encoding="utf-8")
    assert "8 x NVIDIA H100" in text and "about $24.00 an hour" in text
    assert "before RL: 3h30m\nCost: about $84.00\n" in text


def inlined(html):
    """The data inside of report.html: {file: text}."""
    text = re.search(r'<script type="application/json" id="data">(.*?)</script>', html)[1]
    return {file["file"]: file["text"] for file in json.loads(text)}


def test_report_html_holds_all_files_and_lets_none_break_out(empty_base):
    log_all_stages()
    attack = "</script><script>alert(1)</script><!--"
    path = empty_base / "report" / "samples" / "base.jsonl"
    path.parent.mkdir()
    path.write_text(json.dumps({"step": 1, "prompt": attack, "text": attack}) + "\n", encoding="utf-8")
    report.main([])
    html = Path("report.html").read_text(encoding="utf-8")
    assert html == (empty_base / "report" / "report.html").read_text(encoding="utf-8")
    files = inlined(html)
    assert attack not in html and json.loads(files["samples/base.jsonl"])["text"] == attack
    assert {path.name for path in (empty_base / "report").glob("*.json")} <= set(files)
    assert "http" not in re.search(r"Content-Security-Policy\" content=\"(.*?)\"", html)[1]
    assert "[report.html](report.html)" in Path("report.md").read_text(encoding="utf-8")


def test_a_new_run_keeps_the_earlier_one_and_records_its_code(stage_log, empty_base):
    stage_log(2, 1.0, depth=4).samples(1, {"Once": "upon"})
    log = stage_log(2, 1.0, 1.0, depth=6)
    folder = empty_base / "report"
    (earlier,) = (folder / "earlier").iterdir()
    depths = [json.loads((f / "runs" / "base.json").read_text())["flags"]["depth"] for f in (earlier, folder)]
    steps = [len((f / "metrics" / "base.jsonl").read_bytes().splitlines()) for f in (earlier, folder)]
    assert depths == [4, 6] and steps == [1, 2] and (folder / "samples" / "base.jsonl").read_bytes() == b""
    assert json.loads((earlier / "samples" / "base.jsonl").read_text()) == {"step": 1, "prompt": "Once", "text": "upon"}
    record = json.loads((folder / "runs" / "base.json").read_text())
    assert record["vocab_size"] == CONFIG.vocab_size and {"commit", "diff", "message", "device"} <= set(record)
    stage_log(2, 1.0, state=log.state(), depth=6)  # a resumed run is the same run
    assert len(list((folder / "earlier").iterdir())) == 1


def write_run(base, bpbs, tokens=1000, flops=6.0, **flags):
    """A finished base run in `base`: validation bpb after 0, 10, 20, ... steps of `tokens` tokens."""
    folder = base / "report"
    for kind in ("runs", "metrics"):
        (folder / kind).mkdir(parents=True)
    record = {"flags": {"total_batch_size": tokens, **flags}, "flops_per_token": flops, "commit": "abc", "diff": ""}
    (folder / "runs" / "base.json").write_text(json.dumps(record))
    rows = ({"step": 10 * i, "val_bpb": bpb} for i, bpb in enumerate(bpbs))
    (folder / "metrics" / "base.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_compare_names_the_flags_that_differ_and_the_multiplier(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "a", [4.0, 2.0, 1.5, 1.3, 1.2], depth=4, matrix_lr=0.02, seed=1)
    write_run(tmp_path / "b", [4.0, 1.4], depth=4, matrix_lr=0.04, seed=1)  # the baseline needs 25 steps
    write_run(tmp_path / "c", [4.0, 1.1], flops=12.0, depth=6, matrix_lr=0.02, seed=1)  # never reached
    report.main(["compare", "a", "b", "c"])
    text = capsys.readouterr().out
    rows = {cells[0]: cells[1:] for line in text.splitlines() if (cells := [c.strip() for c in line.split("|")[1:-1]])}
    assert rows["compute multiplier"] == ["1.00", "2.50", "> 2.00"]
    assert rows["training FLOPs"] == ["2.400e+05", "6.000e+04", "1.200e+05"]
    assert rows["--depth"] == ["4", "4", "6"] and rows["--matrix_lr"] == ["0.02", "0.04", "0.02"]
    assert not {"--seed", "--total_batch_size", "commit"} & set(rows)
    assert re.search(r"\| a \| b \| c \|", text) and "report.html" not in text
    assert len(re.findall('"file": "metrics/base.jsonl"', Path("compare.html").read_text())) == 3
    with raises_user_error("no folder nothing/report"):
        report.main(["compare", "a", "nothing"])
    with raises_user_error("no stage has run in two of a"):
        report.main(["compare", "a"])
    with raises_user_error("reset takes no folders"):
        report.main(["reset", "a"])


@pytest.fixture
def stage_log(empty_base, monkeypatch):
    """stage_log(num_steps, *seconds, state=None, **flags): a StageLog after one step for each of `seconds`."""
    monkeypatch.setattr(tracking, "peak_flops", lambda compute: 1.0)

    def stage_log(num_steps, *seconds, state=None, **flags):
        args = SimpleNamespace(run="dummy", plan=False, **flags)
        model = SimpleNamespace(estimate_flops=lambda: 1.0, config=CONFIG)
        log = tracking.StageLog("base", args, CPU, num_steps, model, state)
        for step_seconds in seconds:
            clock = iter([0.0, step_seconds])
            with monkeypatch.context() as patch:
                patch.setattr(tracking.time, "perf_counter", lambda clock=clock: next(clock))
                log.start_step()
                log.end_step(log.step_count, StepResult(1.0, 1.0, 10, 0.0, False), 10, 1.0)
        return log

    return stage_log


def test_second_step_on_a_cpu_tells_how_long_the_run_takes(stage_log, capsys):
    """The first one compiles."""
    stage_log(5002, 60.0, 2.4, depth=4)
    assert re.search(r"^about 3h20m for 5,000 more steps, plus evaluations\n", capsys.readouterr().out, re.M)
    stage_log(102, 2000.0, 1584.0, depth=4, total_batch_size=524288)
    assert re.search(r"^about 44h00m for 100 .* lower --depth, --total_batch_size\n", capsys.readouterr().out, re.M)
    stage_log(2, 2.0, 2.0)
    assert "about" not in capsys.readouterr().out


def test_time_adds_up_over_resumes(stage_log, empty_base):
    state = stage_log(4, 100.0).state()
    state["wall_clock_seconds"] += 1000
    log = stage_log(4, 60.0, state=state)
    assert log.train_seconds == 160
    log.report("Base model training", SimpleNamespace(), {})
    record = json.loads((empty_base / "report" / "base-model-training.json").read_text())
    assert record["metrics"]["wall_clock_seconds"] > state["wall_clock_seconds"] >= 1000
    assert record["values"]["Training time"] == "2.67 minutes"


def test_damaged_lines_of_the_metrics_are_dropped_when_resuming(stage_log, empty_base):
    state = stage_log(4, 1.0).state()
    path = empty_base / "report" / "metrics" / "base.jsonl"
    first = path.read_bytes()
    path.write_bytes(first + b'{"step": 1, "lo{"step": 1, "loss": 1.0}\n\0\0\xff\n{"step": 2, "loss": 1.0}\n{"st')
    stage_log(4, 1.0, state=state)
    lines = path.read_bytes().splitlines()
    assert lines[0] + b"\n" == first and [json.loads(line)["step"] for line in lines] == [0, 1]


def test_metrics_file_that_cannot_be_written_is_dropped_with_one_warning(stage_log, capsys):
    log = stage_log(4, 1.0)
    log.files["metrics"] = open("/dev/full", "ab", buffering=0)
    log.metrics(1, loss=1.0)
    log.metrics(2, loss=1.0)
    log.close()
    assert re.fullmatch("warning: no more metrics in /dev/full: No space left on device\n", capsys.readouterr().err)


def test_other_ranks_write_nothing(empty_base, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    get_report().log("Midtraining", [{"a": 1}])
    assert not (empty_base / "report").exists()
