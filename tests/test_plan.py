"""--plan and --plan_for against the runs that they describe; memory before the start of a run."""

import json
import re
from dataclasses import replace

import pytest
import torch
from helpers import CPU, logged_metrics, raises_user_error, run_python

from nanochat import plan
from nanochat.checkpoint_manager import SCRIPTS
from nanochat.cli import parse_args
from nanochat.gpt import GPT, GPTConfig
from nanochat.muon import Muon
from scripts import base_train

SIZE = ["--max_seq_len=64", "--device_batch_size=4", "--device_type=cpu", "--dtype=float32", "--compile=0"]
BASE = ["--depth=2", *SIZE, "--total_batch_size=512", "--eval_tokens=1024", "--core_metric_every=-1"]


def read_plan(output):
    """{label: text} of the printed plan."""
    lines = output[output.index("\nmodel ") :].splitlines() if "\nmodel " in output else output.splitlines()
    return dict(re.fullmatch(r"(\w+(?: \d)?) +(.*)", line).groups() for line in lines if line)


def number(pattern, text):
    return float(re.search(pattern.replace("N", r"([\d,.]+)"), text)[1].replace(",", ""))


def files(base):
    return sorted(path.relative_to(base) for path in base.rglob("*") if "base_data" not in path.parts)


@pytest.mark.slow
def test_plans_agree_with_the_runs_they_describe(base, tmp_path, run_main, capsys):
    """Steps, tokens and parameters are exact, memory within 20 %; nothing is written."""
    conversation = {"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "Very well."}
    (tmp_path / "own.jsonl").write_text(f"{json.dumps(conversation)}\n" * 300)
    own = ["--conversations=own.jsonl", "--conversations_only"]
    stages = {
        "base": [*BASE, "--num_iterations=6"],
        "mid": [*SIZE, *own, "--total_batch_size=1024", "--eval_tokens=1024"],
        "sft": ["--num_epochs=1", "--eval_steps=2", "--eval_every=5", "--device_type=cpu", *own],
    }
    for source, flags in stages.items():
        before, script = files(base), f"scripts.{SCRIPTS[source]}"
        if source == "base":  # memory can be compared only between processes
            planned = read_plan(run_python("-m", script, *flags, "--plan").stdout)
            assert files(base) == before
            done = run_python("-m", script, *flags).stdout
            assert re.search(r"[\d,]+ parameters", planned["model"])[0] in done
        else:
            with pytest.raises(SystemExit):
                run_main(script, *flags, "--plan")
            planned = read_plan(capsys.readouterr().out)
            assert files(base) == before
            run_main(script, *flags)
        rows = [row for row in logged_metrics(base, source) if "loss" in row]
        assert number("N steps", planned["training"]) == len(rows)
        tokens = sum(row["tokens_per_second"] * row["dt_ms"] / 1e3 for row in rows)
        assert number("N tokens", planned["training"]) == pytest.approx(tokens, abs=0.5)
        memory = number("N of", planned["memory"]) * 2**10
        assert memory == pytest.approx(max(row["memory_mib"] for row in rows), rel=0.2)
        assert re.fullmatch(r"\S+: training \S+, evaluations \S+, start \S+", planned["time"])


@pytest.mark.slow
def test_expensive_steps_are_measured_in_part(base, monkeypatch, capsys):
    """Passes of one row, two, one, two stand for a step of 32 micro-batches of four rows."""
    monkeypatch.setattr(plan, "SECONDS", 1e-4)
    rows = []
    forward = GPT.forward
    monkeypatch.setattr(
        GPT, "forward", lambda self, x, *args, **kw: rows.append(len(x)) or forward(self, x, *args, **kw)
    )
    flags = [*BASE, "--total_batch_size=8192", "--num_iterations=1000", "--eval_every=-1", "--plan"]
    with pytest.raises(SystemExit):
        base_train.main(flags)
    assert rows == [1, 1, 1, 1, 1, 1]
    planned = read_plan(capsys.readouterr().out)
    assert number("N tokens", planned["training"]) == 8_192_000


def test_plan_for_other_devices_needs_no_data(empty_base, capsys):
    base_train.main(["--plan_for=8xH100"])
    planned = read_plan(capsys.readouterr().out)
    assert "560,988,160 parameters" in planned["model"]  # of nanochat's d20
    assert planned["training"].startswith("21,400 steps, 11,219,763,200 tokens, 3.91")
    assert 60 < number("N of", planned["memory"]) < 80
    assert planned["batch"].startswith("--device_batch_size=32 ")
    assert "216 shards" in planned["disk"]
    # The reference's speedrun takes about three hours of pretraining and costs about 100 dollars in all.
    assert planned["time"].startswith("3h") and 60 <= number(r"\$N ", planned["cost"]) <= 100
    base_train.main(["--plan_for=128xH100"])
    networks = read_plan(capsys.readouterr().out)
    assert "InfiniBand" in networks["exchange"] and "Ethernet" in networks["exchange"]
    assert "sharding the optimizer is not enough" in networks["exchange"]
    with raises_user_error("--plan_for=8xH10: .* known: b300, "):
        base_train.main(["--plan_for=8xH10"])


def test_exact_parts_of_memory():
    """Weights, gradients and optimizer state have the bytes of a real model's and its optimizers'."""
    args, config = parse_args(base_train.build_parser(), []), GPTConfig.from_depth(2, 64, 600)
    need = plan.memory(args, config, CPU)
    model = GPT(config)
    model.init_weights("cpu")
    adamw, muon = model.setup_optimizers()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    assert need["weights"] == weights
    state = [t for optimizer in (adamw, muon) for unit in optimizer.units for t in unit.state.values()]
    assert need["optimizer"] == sum(t.numel() * t.element_size() for t in state)
    assert isinstance(muon, Muon) and need["gradients"] == weights + sum(
        4 * p.numel() for p in model.transformer.h.parameters()
    )
    assert plan.memory(args, config, replace(CPU, world_size=8))["optimizer"] == need["optimizer"] / 8


@pytest.mark.parametrize("gib", [3.0, 0.5, 0.01])
def test_memory_is_compared_before_the_start(gib, monkeypatch, capsys):
    """A warning names the largest batch that fits; without any activations it must fit, else the run is refused."""
    monkeypatch.setattr(plan, "capacity", lambda _: gib * 2**30)
    flags = ["--max_seq_len=1024", "--device_batch_size=64", "--total_batch_size=65536"]
    args, config = parse_args(base_train.build_parser(), flags), GPTConfig.from_depth(4, 1024, 8192)
    if gib == 0.01:
        with raises_user_error("weights, gradients and optimizer state need 0.1 GiB of memory, 0.0 are free; train a"):
            plan.check_memory(args, config, CPU)
        return
    plan.check_memory(args, config, CPU)
    warning = capsys.readouterr().out
    if gib == 0.5:
        assert "not even one row fits" in warning
        return
    fitting = int(re.search("--device_batch_size=(\\d+) is the largest", warning)[1])
    memory = {
        rows: sum(plan.memory(args, config, CPU, rows * 1024).values()) / 2**30 for rows in (fitting, 2 * fitting)
    }
    assert memory[fitting] <= gib < memory[2 * fitting]


@pytest.mark.gpu
def test_memory_estimate_of_a_gpu():
    """Depth 12 on a GPU, block by block: within 20 % of the peak."""
    from nanochat.cluster import compute_init
    from nanochat.train import train_step

    compute, config = compute_init("cuda"), GPTConfig.from_depth(12, 2048, 65536)
    model = GPT(config)
    model.init_weights(compute.device)
    optimizers = model.setup_optimizers()
    model.compile()
    ids = torch.randint(65536, (16, 2049), device=compute.device)
    for _ in range(2):
        train_step(model, optimizers, [(ids[:, :-1].int(), ids[:, 1:])], compute)
    need = plan.memory(None, config, compute, 16 * 2048)
    expected = sum(need.values()) - need["process"]
    assert torch.cuda.max_memory_allocated() == pytest.approx(expected, rel=0.2)
