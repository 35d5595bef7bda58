"""All stages on a tiny model, as a user runs them: from text to chat, killed and resumed, on one and two processes."""

import json
import math
import os
import signal
import subprocess
import threading
import time

import pytest
from helpers import (
    CPU,
    assert_equal_weights,
    environment,
    load_weights,
    logged_metrics,
    python_command,
    raises_user_error,
    read_jsonl,
    run_python,
    wait_until,
)

from nanochat import ops, tracking
from nanochat.checkpoint_manager import load_model
from nanochat.common import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.ingest.shards import write_shard
from tasks.common import user_and_assistant

SIZE = ["--max_seq_len=32", "--device_batch_size=2", "--total_batch_size=256", "--eval_tokens=512", "--device_type=cpu"]
BASE = ["--depth=1", *SIZE, "--core_metric_every=-1", "--dtype=float32"]


def train(run, *flags, **options):
    return run("scripts.base_train", *BASE, *flags, **options)


def losses(base, stage="base"):
    """{step: training loss} of a stage."""
    return {row["step"]: row["loss"] for row in logged_metrics(base, stage) if "loss" in row}


def max_difference(losses, other_losses):
    return max(abs(losses[step] - other_losses[step]) for step in losses)


def test_from_text_to_chat(base, run_main, capsys):
    """All stages, three steps each: chat_cli prints an answer, the report has the sections and scores."""
    train(run_main, "--num_iterations=3", "--sample_every=3")
    run_main("scripts.base_loss", "--device_batch_size=2", "--split_tokens=512", "--device_type=cpu")
    own, long = base / "own.jsonl", base / "long.jsonl"
    for path, question in ((own, "Hi"), (long, "word " * 500)):
        messages = user_and_assistant(question, "x")["messages"]
        path.write_text("\n".join([json.dumps(messages)] * 3), encoding="utf-8")
    for module in ("mid_train", "chat_sft"):
        source = ["--train_on=assistant", *SIZE] if module == "mid_train" else ["--source=base"]
        with raises_user_error("nothing to train on"):
            run_main(
                f"scripts.{module}", *source, f"--conversations={long}", "--conversations_only", "--num_iterations=1"
            )
    run_main("scripts.mid_train", *SIZE, "--num_iterations=3", f"--conversations={own}:2", "--conversations_only")
    sft = [f"--conversations={own}"]
    sft += ["--num_iterations=3", "--device_batch_size=2", "--target_examples_per_step=4", "--eval_steps=2"]
    run_main("scripts.chat_sft", *sft, "--eval_metrics_max_problems=4")
    for source in ("mid", "sft"):
        run_main("scripts.chat_eval", "-i", source, "-a", "PocketSums|PocketFacts", "-x", 3, "-m", 8)
    output = capsys.readouterr().out
    assert f"{own}: 3 conversations x 2 of 6" in output and f"{own}: 3 conversations x 1 of 2,123" in output
    assert "are longer than 32 tokens and are cut" in output
    run_main("scripts.chat_cli", "-p", "Hi", "-m", 8, "-t", 0)
    assert capsys.readouterr().out.startswith("x")  # as in own.jsonl
    run_main("nanochat.report", "generate")
    report = (base / "report.md").read_text(encoding="utf-8")
    assert "PocketFacts" in report.split("## Summary")[1]
    assert "## Midtraining" in report
    for name in ("mid", "sft"):
        assert list(losses(base, name)) == [0, 1, 2]
    samples = {name: read_jsonl(base / "report" / "samples" / f"{name}.jsonl") for name in ("base", "mid", "sft")}
    assert "Once upon a time" in [row["prompt"] for row in samples["base"]] and samples["base"][0]["step"] == 3
    assert samples["mid"][0]["prompt"] == "Hi" and samples["sft"][-1]["step"] == 3
    assert "samples/sft.jsonl" in (base / "report.html").read_text(encoding="utf-8")


def test_a_run_that_diverges_stops_and_describes_itself(base, run_main):
    with raises_user_error(r"the run diverged: the loss is .* in step \d+ \(.*/diverged-base_checkpoints.jsonl has"):
        train(run_main, "--num_iterations=20", "--matrix_lr=1e30", "--embedding_lr=1e30")
    facts, *norms = read_jsonl(base / "report" / "diverged-base_checkpoints.jsonl")
    assert facts["step"] == len(losses(base)) + 1
    assert len(facts["data_before_the_batch"]) == 8  # lanes
    assert [row["parameter"] for row in norms] == [
        name for name, _ in GPT(GPTConfig.from_depth(1, 32, 600)).named_parameters()
    ]
    assert not all(math.isfinite(row["gradient_norm"]) for row in norms)
    assert not (base / "base_checkpoints").exists()


@pytest.mark.slow
def test_killed_run_resumes_bit_identically(base, run_script):
    """After kill -9 and --resume, weights and losses equal those of an uninterrupted run."""
    train(run_script, "--num_iterations=12", "--model_tag=uninterrupted")
    expected_losses = losses(base)
    checkpoints = base / "base_checkpoints"
    command = ["-m", "scripts.base_train", *BASE, "--num_iterations=12", "--save_every=2", "--resume"]
    process = subprocess.Popen(python_command(*command), env=environment(), stdout=subprocess.DEVNULL)
    wait_until(lambda: (checkpoints / "d1" / "step_000004").exists() or process.poll() is not None, seconds=300)
    assert process.poll() is None
    process.kill()
    process.wait()
    resumed = run_python(*command)
    assert "resuming from here" in resumed.stdout
    assert_equal_weights(load_weights(checkpoints / "d1", 12), load_weights(checkpoints / "uninterrupted", 12))
    assert losses(base) == expected_losses
    repeated = run_python(*command)
    assert "finished already" in repeated.stdout
    assert "step 0" not in repeated.stdout


@pytest.mark.slow
def test_sigterm_saves_a_checkpoint_and_exits_with_code_0(base):
    flags = "--num_iterations=100000", "--eval_every=-1", "--compile=0"
    command = python_command("-m", "scripts.base_train", *BASE, *flags)
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step "):
            break
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    assert "stopped; saved" in process.stdout.read()
    assert len(list((base / "base_checkpoints" / "d1").glob("step_*/meta.json"))) == 1


@pytest.fixture
def send_signal(monkeypatch):
    """
    send_signal(run, signum, owner, name, call) runs run() and sends a signal at the `call`th call of owner.name().

    Returns the exit code. The process goes on: os._exit() raises Exited in the main thread instead.
    """

    class Exited(BaseException):
        pass

    def raise_exited(*_):
        raise Exited

    def send_signal(run, signum, owner, name, call):
        codes, calls, original = [], [], getattr(owner, name)

        def exit_process(code):
            codes.append(code)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGALRM)

        def signalling(*args, **options):
            calls.append(name)
            if len(calls) == call:
                os.kill(os.getpid(), signum)
                time.sleep(0.3)  # the thread that stops the run may have to wait for a core
            return original(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, "_exit", exit_process)
            patch.setattr(owner, name, signalling)
            old = signal.signal(signal.SIGALRM, raise_exited)
            with pytest.raises(Exited):
                run()
            signal.set_wakeup_fd(-1)
            for number, handler in ((signal.SIGALRM, old), (signal.SIGTERM, signal.SIG_DFL)):
                signal.signal(number, handler)
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return codes[0]

    return send_signal


# Four micro-batches of 64 tokens per step and two validation batches, each validation after two steps.
@pytest.mark.parametrize(
    ("signum", "owner", "name", "call", "step"),
    [
        (signal.SIGINT, GPT, "hidden", 2 + 8 + 2 + 4 + 2, 3),  # in the second micro-batch of step 3
        (signal.SIGTERM, ops.CausalAttention, "backward", 1, 0),
        pytest.param(signal.SIGTERM, ops.CausalAttention, "backward", 5, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, GPT, "hidden", 2 + 8 + 2, 2, marks=pytest.mark.slow),  # in a validation
    ],
    ids=["forward", "first step", "backward", "validation"],
)
def test_signal_saves_the_state_before_the_present_step(
    base, run_main, capsys, monkeypatch, send_signal, signum, owner, name, call, step
):
    """The resumed run then has the weights of an uninterrupted one."""
    monkeypatch.setattr(tracking, "peak_flops", lambda compute: 1.0)  # else each run measures for half a second
    flags = ["--num_iterations=5", "--eval_every=2", "--sample_every=-1", "--eval_tokens=128"]
    code = send_signal(lambda: train(run_main, *flags), signum, owner, name, call)
    output = capsys.readouterr().out
    assert code == (130 if signum == signal.SIGINT else 0)
    checkpoints = base / "base_checkpoints"
    if step == 0:
        assert "nothing to save" in output
        assert not checkpoints.exists()
        return
    assert f"stopped; saved {checkpoints / 'd1'}/step_{step:06d}. " in output
    assert [path.name for path in (checkpoints / "d1").iterdir()] == [f"step_{step:06d}"]
    train(run_main, *flags, "--resume")
    train(run_main, *flags, "--model_tag=uninterrupted")
    assert_equal_weights(load_weights(checkpoints / "d1", 5), load_weights(checkpoints / "uninterrupted", 5))


@pytest.mark.slow
def test_ctrl_c_in_a_long_step_stops_both_ranks(base):
    command = ["-m", "scripts.base_train", *BASE, "--total_batch_size=1048576", "--num_iterations=9", "--eval_every=-1"]
    process = subprocess.Popen(
        python_command(*command, ranks=2),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for line in process.stdout:
        if "steps of" in line:
            break
    process.send_signal(signal.SIGINT)
    output = process.stdout.read()
    process.wait(timeout=60)
    assert output.count("stopped; nothing to save") == 1
    assert "closing signal SIGKILL" not in output


def test_midtraining_extends_the_context(base, run_main, capsys):
    train(run_main, "--num_iterations=1", "--eval_every=-1", "--sample_every=-1")
    flags = ["--total_batch_size=128", "--device_batch_size=2", "--num_iterations=1", "--eval_every=-1"]
    run_main("scripts.mid_train", *flags, "--max_seq_len=64", "--device_type=cpu")
    assert "from 32 to 64 tokens" in capsys.readouterr().out
    assert load_model("mid", CPU)[0].config.sequence_len == 64


@pytest.mark.parametrize("stage", [pytest.param("mid", marks=pytest.mark.slow), "sft"])
def test_midtraining_and_sft_resume_bit_identically(base, run_main, capsys, stage):
    train(run_main, "--num_iterations=2", "--eval_every=-1", "--sample_every=-1")
    if stage == "mid":
        module, flags, folder = "scripts.mid_train", [*SIZE, "--num_iterations=6"], "mid_checkpoints/d1"
    else:
        module, folder = "scripts.chat_sft", "chatsft_checkpoints/d1"
        flags = ["--source=base", "--num_iterations=6", "--device_batch_size=2", "--target_examples_per_step=4"]
        flags += ["--eval_steps=1", "--eval_metrics_every=-1", "--device_type=cpu"]
    run_main(module, *flags, "--save_every=3")
    uninterrupted = load_weights(base / folder, 6)
    # As if the process had been killed before it wrote this file.
    (base / folder / "step_000006" / "meta.json").unlink()
    run_main(module, *flags, "--save_every=3", "--resume")
    assert "step_000003: resuming" in capsys.readouterr().out
    assert_equal_weights(load_weights(base / folder, 6), uninterrupted)
    assert list(losses(base, stage)) == list(range(6))


@pytest.mark.slow
def test_two_processes_equal_one(base, run_script):
    """The losses of 20 steps agree within 1e-4. Then each run is resumed with the other number of processes."""
    # AdamW's first step on a token's embedding depends on signs only, and that of an element near 0 on rounding. With
    # this seed, none of them matters.
    seed = "--seed=3", "--warmdown_ratio=0"
    train(run_script, "--num_iterations=20", "--eval_every=10", *seed)
    single = losses(base)
    for size in (1, 4):
        flags = "--num_iterations=20", "--eval_every=10", f"--device_batch_size={size}", *seed
        done = train(run_script, *flags, "--model_tag=two", ranks=2)
        two = losses(base)
        assert two.keys() == single.keys()
        assert max_difference(two, single) < 1e-4
        assert "validation bpb" in done.stdout
    train(run_script, "--num_iterations=24", "--resume", *seed, ranks=2)
    resumed_by_two = losses(base)
    train(run_script, "--num_iterations=24", "--resume", *seed, "--model_tag=two")
    resumed_by_one = losses(base)
    assert max(abs(resumed_by_two[step] - resumed_by_one[step]) for step in range(20, 24)) < 1e-3


@pytest.mark.slow
def test_process_groups_shut_down_without_errors(base, run_script):
    """A regression test, repeated because gloo aborted only in some of the runs."""
    for _ in range(4):
        train(run_script, "--num_iterations=1", "--eval_every=-1", "--sample_every=-1", ranks=2)


USER_ERRORS = [
    (["--depht=4"], "--depht"),
    (["--depth=four"], "four"),
    (["--depth=0"], "--depth=0"),
    (["--total_batch_size=250"], "not a multiple of 64"),
    (["--device_batch_size=0"], "--device_batch_size=0"),
    (["--max_seq_len=0"], "--max_seq_len=0"),
    (["--seed=-1"], "--seed=-1"),
    (["--warmdown_ratio=-1"], "--warmdown_ratio: -1: expected a share, 0 to 1"),
    (["--matrix_lr=abc"], "--matrix_lr: abc: expected at least 0"),
    (["--adam_beta1=1"], "--adam_beta1: 1: expected at least 0 and below 1"),
    (["--embedding_lr=-1"], "--embedding_lr: -1: expected at least 0"),
    (["--recipe=fast"], "--recipe: invalid choice"),
    (["--num_iterations=-1", "--target_param_data_ratio=0"], "no horizon"),
    (["--device_type=tpu"], "--device_type=tpu"),
    (["--dtype=int4"], "--dtype=int4"),
    (["--resume_from_step=7"], "no checkpoint of step 7"),
]


@pytest.mark.parametrize(("flags", "message"), USER_ERRORS, ids=lambda v: v[0] if isinstance(v, list) else "")
def test_user_errors_are_one_line(base, run_main, capsys, flags, message):
    with pytest.raises((UserError, SystemExit)) as error:
        train(run_main, *flags)
    printed = str(error.value) if error.type is UserError else capsys.readouterr().err
    assert message in printed
    assert len(printed.strip().splitlines()) == 1
    assert not (base / "base_checkpoints").exists()


def test_user_error_exits_with_code_2_and_without_a_traceback(base, run_script):
    done = train(run_script, "--total_batch_size=250", check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --total_batch_size=250")
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize("missing", ["tokenizer", "base_data"])
def test_error_of_a_missing_artifact_names_the_command_that_makes_it(base, run_main, missing):
    (base / missing).unlink()
    with pytest.raises(UserError, match="python -m"):
        train(run_main)


def test_validation_without_text_is_an_error(base, run_main, tmp_path):
    """Also in a raw folder, where nulls are documents; not bpb inf."""
    write_shard(tmp_path / "raw" / "a.parquet", ["some text"] * 64)
    write_shard(tmp_path / "raw" / "b.parquet", [None, ""])
    with raises_user_error("no text in the data to evaluate on"):
        train(run_main, "--num_iterations=1", "--eval_every=1", f"--data_dir={tmp_path / 'raw'}")


def test_data_dir_selects_the_shards_and_the_corpus(base, run_main, capsys):
    elsewhere = (base / "base_data").rename(base / "elsewhere")
    train(run_main, "--num_iterations=1", f"--data_dir={elsewhere}")
    run_main("scripts.base_loss", "--device_batch_size=2", "--split_tokens=64", f"--data_dir={elsewhere}")
    assert "val bpb" in capsys.readouterr().out
    meta = json.loads((base / "base_checkpoints" / "d1" / "step_000001" / "meta.json").read_text())
    assert meta["corpus"] == "pocket"
    with pytest.raises(UserError, match="no shards in"):
        run_main("scripts.base_loss", "--device_batch_size=2", "--split_tokens=64")


@pytest.mark.parametrize(
    ("flags", "difference"),
    [((), "recipe=tuned"), (("--recipe=reference", "--muon_beta2=0.9"), "muon_beta2=0.9")],
)
def test_run_resumes_only_with_its_recipe(base, run_main, flags, difference):
    """Also a checkpoint of a version without recipes, which had the reference's."""
    train(run_main, "--num_iterations=1", "--recipe=reference")
    path = base / "base_checkpoints" / "d1" / "step_000001" / "meta.json"
    meta = json.loads(path.read_text())
    del meta["user_config"]["recipe"], meta["user_config"]["muon_beta2"], meta["sha256"]
    path.write_text(json.dumps(meta))
    with raises_user_error(f"cannot resume .* other settings: .*{difference} "):
        train(run_main, "--num_iterations=2", "--resume", *flags)
    train(run_main, "--num_iterations=2", "--resume", "--recipe=reference")
    assert (path.parent.parent / "step_000002").is_dir()


def test_flags_accept_dashes_and_underscores(base, run_main):
    flags = [f.replace("_", "-") for f in [*BASE, "--num_iterations=1"]]
    run_main("scripts.base_train", *flags)
    assert (base / "base_checkpoints" / "d1" / "step_000001").is_dir()


def test_second_run_of_the_same_model_is_refused(base, run_main):
    lock = base / ".base_checkpoints.d1.lock"
    program = f"import filelock; lock = filelock.FileLock({str(lock)!r}); lock.acquire(); print(flush=True); input()"
    with subprocess.Popen(python_command("-c", program), stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        first.stdout.readline()
        with raises_user_error("another process is training .*d1; wait, or choose another --model_tag"):
            train(run_main, "--num_iterations=1")
        first.communicate(b"\n")
    train(run_main, "--num_iterations=1")


def test_resume_with_other_settings_is_refused(base, run_main):
    train(run_main, "--num_iterations=2", "--save_every=1")
    with pytest.raises(UserError, match=r"n_layer=2 \(saved: 1\)"):
        train(run_main, "--num_iterations=4", "--resume", "--depth=2", "--model_tag=d1")
    folder = (base / "base_checkpoints" / "d1" / "step_000001").rename(base / "base_checkpoints" / "d1" / "step_000003")
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8")) | {"step": 3}
    del meta["sha256"]
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    with pytest.raises(UserError, match="step_000003 is beyond the 2 steps of this run"):
        train(run_main, "--num_iterations=2", "--resume")
