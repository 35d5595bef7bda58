"""The stages as a user runs them, tiny: from text to a chat model, killed and resumed, on one process and on two."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from safetensors.torch import load_file

from nanochat.common import UserError

SIZE = ["--max_seq_len=32", "--device_batch_size=2", "--total_batch_size=256", "--eval_tokens=512", "--device_type=cpu"]
BASE = ["--depth=1", *SIZE, "--core_metric_every=-1", "--dtype=float32"]


def train(run, *flags, **kw):
    return run("scripts.base_train", *BASE, *flags, **kw)


def losses(base, stage="base"):
    lines = (base / "report" / "metrics" / f"{stage}.jsonl").read_text(encoding="utf-8").splitlines()
    return {r["step"]: r["loss"] for r in map(json.loads, lines) if "loss" in r}


def weights(base, step, folder="base_checkpoints/d1"):
    return load_file(base / folder / f"step_{step:06d}" / "model.safetensors")


def assert_equal_weights(a, b):
    assert a.keys() == b.keys()
    assert all((a[name] == b[name]).all() for name in a)


def test_from_text_to_chat(base, run_main, capsys):
    """All stages, three steps each; chat answers something; the report has a column for each."""
    train(run_main, "--num_iterations=3", "--sample_every=3")
    run_main("scripts.base_loss", "--device_batch_size=2", "--split_tokens=512", "--device_type=cpu")
    run_main("scripts.mid_train", *SIZE, "--num_iterations=3")
    sft = ["--num_iterations=3", "--device_batch_size=2", "--target_examples_per_step=4", "--eval_steps=2"]
    run_main("scripts.chat_sft", *sft, "--eval_metrics_max_problems=4")
    for source in ("mid", "sft"):
        run_main("scripts.chat_eval", "-i", source, "-a", "PocketSums|PocketFacts", "-x", 3, "-m", 8)
    capsys.readouterr()
    run_main("scripts.chat_cli", "-p", "Who are you?", "-m", 8, "-t", 1)
    assert capsys.readouterr().out.strip()
    run_main("nanochat.report", "generate")
    report = (base / "report.md").read_text(encoding="utf-8")
    assert "PocketFacts" in report.split("## Summary")[1]
    assert "## Midtraining" in report
    for name in ("mid", "sft"):
        assert list(losses(base, name)) == [0, 1, 2]


def test_a_run_that_is_cut_short_continues_bit_for_bit(base, run_script):
    """kill -9 somewhere, resume: weights and losses are those of a run that was never killed."""
    train(run_script, "--num_iterations=12", "--model_tag=whole")
    expected_losses = losses(base)
    command = [sys.executable, "-m", "scripts.base_train", *BASE, "--num_iterations=12", "--save_every=2", "--resume"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    first = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)
    while not (base / "base_checkpoints" / "d1" / "step_000004").exists():
        assert first.poll() is None
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    resumed = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    assert "resuming from here" in resumed.stdout
    assert_equal_weights(weights(base, 12), weights(base, 12, "base_checkpoints/whole"))
    assert losses(base) == expected_losses
    again = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    assert "finished already" in again.stdout
    assert "step 0" not in again.stdout


def test_sigterm_saves_and_exits_cleanly(base):
    command = [sys.executable, "-m", "scripts.base_train", *BASE, "--num_iterations=100000", "--eval_every=-1"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step "):
            break
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    assert "stopped; saved" in process.stdout.read()
    assert len(list((base / "base_checkpoints" / "d1").glob("step_*/meta.json"))) == 1


@pytest.mark.parametrize("stage", ["mid", "sft"])
def test_other_stages_resume_bit_for_bit(base, run_main, capsys, stage):
    train(run_main, "--num_iterations=2", "--eval_every=-1", "--sample_every=-1")
    if stage == "mid":
        module, flags, folder = "scripts.mid_train", [*SIZE, "--num_iterations=6"], "mid_checkpoints/d1"
    else:
        module, folder = "scripts.chat_sft", "chatsft_checkpoints/d1"
        flags = ["--source=base", "--num_iterations=6", "--device_batch_size=2", "--target_examples_per_step=4"]
        flags += ["--eval_steps=1", "--eval_metrics_every=-1", "--device_type=cpu"]
    run_main(module, *flags, "--save_every=3")
    whole = weights(base, 6, folder)
    (base / folder / "step_000006" / "meta.json").unlink()  # as if killed before it was whole
    run_main(module, *flags, "--save_every=3", "--resume")
    assert "step_000003: resuming" in capsys.readouterr().out
    assert_equal_weights(weights(base, 6, folder), whole)
    assert list(losses(base, stage)) == list(range(6))


@pytest.mark.slow
def test_two_processes_equal_one(base, run_script):
    """20 steps: the loss of each within 1e-4; then two processes go on from what one has saved."""
    train(run_script, "--num_iterations=20", "--eval_every=10", "--warmdown_ratio=0")
    alone = losses(base)
    for device_batch_size in (1, 4):
        done = train(
            run_script,
            "--num_iterations=20",
            "--eval_every=10",
            "--warmdown_ratio=0",
            "--model_tag=two",
            f"--device_batch_size={device_batch_size}",
            ranks=2,
        )
        two = losses(base)
        assert two.keys() == alone.keys()
        assert max(abs(two[s] - alone[s]) for s in alone) < 1e-4
        assert "validation bpb" in done.stdout
    train(run_script, "--num_iterations=24", "--resume", "--warmdown_ratio=0", ranks=2)
    ours = losses(base)
    train(run_script, "--num_iterations=24", "--resume", "--warmdown_ratio=0", "--model_tag=two")
    theirs = losses(base)
    assert max(abs(ours[s] - theirs[s]) for s in range(20, 24)) < 1e-3


@pytest.mark.slow
def test_process_groups_end_quietly(base, run_script):
    """The gloo group is left in one place; it used to abort in some of many runs."""
    for _ in range(4):
        train(run_script, "--num_iterations=1", "--eval_every=-1", "--sample_every=-1", ranks=2)


MISTAKES = [
    (["--depht=4"], "--depht"),
    (["--depth=four"], "four"),
    (["--depth=0"], "--depth=0"),
    (["--total_batch_size=250"], "not a multiple of 64"),
    (["--device_batch_size=0"], "--device_batch_size=0"),
    (["--num_iterations=-1", "--target_param_data_ratio=0"], "no horizon"),
    (["--device_type=tpu"], "--device_type=tpu"),
    (["--dtype=int4"], "--dtype=int4"),
    (["--resume_from_step=7"], "no checkpoint of step 7"),
]


@pytest.mark.parametrize(("flags", "message"), MISTAKES, ids=lambda v: v[0] if isinstance(v, list) else "")
def test_mistakes_are_one_line(base, run_main, capsys, flags, message):
    with pytest.raises((UserError, SystemExit)) as caught:
        train(run_main, *flags)
    said = str(caught.value) if caught.type is UserError else capsys.readouterr().err
    assert message in said
    assert len(said.strip().splitlines()) == 1
    assert not (base / "base_checkpoints").exists()


def test_a_mistake_ends_with_exit_code_2_and_without_a_traceback(base, run_script):
    done = train(run_script, "--total_batch_size=250", check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --total_batch_size=250")
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize("missing", ["tokenizer", "base_data"])
def test_missing_artifacts_name_the_command_that_makes_them(base, run_main, missing):
    (base / missing).unlink()
    with pytest.raises(UserError, match="python -m"):
        train(run_main)


def test_dashes_and_underscores_are_the_same(base, run_main):
    flags = [f.replace("_", "-") for f in [*BASE, "--num_iterations=1"]]
    run_main("scripts.base_train", *flags)
    assert (base / "base_checkpoints" / "d1" / "step_000001").is_dir()


def test_other_settings_cannot_resume(base, run_main):
    train(run_main, "--num_iterations=2")
    with pytest.raises(UserError, match=r"n_layer=2 \(saved: 1\)"):
        train(run_main, "--num_iterations=4", "--resume", "--depth=2", "--model_tag=d1")
