"""Sweeps: every combination runs once, also after an interruption; mistakes are one line."""

import json

import pytest
from helpers import raises_user_error

from dev import scaling, sweep

FLAGS = "--depth=1 --max_seq_len=32 --device_batch_size=2 --total_batch_size=64 --eval_tokens=512 --device_type=cpu"
FLAGS += " --core_metric_every=-1 --sample_every=-1 --dtype=float32"


@pytest.mark.slow
def test_finished_runs_are_kept_and_others_run(base, capfd):
    command = ["lr", "scripts.base_train", "--grid", "matrix-lr=0.01,0.02", "--", *FLAGS.split(), "--num_iterations=2"]
    sweep.main(command)
    table = (base / "sweeps" / "lr" / "table.md").read_text()
    assert table.count("\n") == 4 and "| 0.02 |" in table
    folders = [base / "sweeps" / "lr" / f"matrix_lr={lr}-seed=42" for lr in (0.01, 0.02)]
    (folders[1] / "finished").unlink()  # as if killed
    times = [(folder / "report" / "runs" / "base.json").stat().st_mtime_ns for folder in folders]
    capfd.readouterr()
    sweep.main(command)
    assert (folders[0] / "report" / "runs" / "base.json").stat().st_mtime_ns == times[0]
    assert (base / "sweeps" / "lr" / "table.md").read_text().split("minutes")[0] == table.split("minutes")[0]
    with raises_user_error("was made by .*--num_iterations=2.*take another name"):
        sweep.main([*command[:-1], "--num_iterations=3"])
    flags = json.loads((folders[0] / "flags.json").read_text())
    assert flags[0] == "scripts.base_train" and "--matrix_lr=0.01" in flags and flags[-1] == "--seed=42"


@pytest.mark.parametrize(
    "flags, message",
    [
        (["a/b", "scripts.base_train"], "expected a name of letters"),
        (["a", "scripts.base_train", "--grid", "depth"], "expected a flag and its values"),
        (["a", "scripts.base_train", "--grid", "seed=1,2"], "use --seeds"),
        (["a", "scripts.base_train", "--grid", "depth=1", "--grid", "depth=2"], "given twice"),
        (["a", "scripts.base_train", "--seeds=0"], "expected at least 1"),
    ],
)
def test_mistakes_are_one_line(flags, message, empty_base):
    with raises_user_error(message):
        sweep.main(flags)


def test_exponents_of_known_curves():
    """bpb = (log N - log N_opt)^2 with N_opt ~ C^0.5."""
    budgets, sizes = [1e12, 4e12, 16e12], [[11.0, 12.0, 13.0, 14.0]] * 3
    losses = [[(size - 12 - 0.5 * i * 1.3862943611198906) ** 2 + 1 for size in sizes[0]] for i in range(3)]
    assert scaling.exponents(budgets, sizes, losses) == pytest.approx((0.5, 0.5))
    assert scaling.exponents(budgets, sizes, [[-value for value in row] for row in losses]) is None
    with raises_user_error("expected numbers separated by commas"):
        scaling.main(["--budgets=1e13,x"])
    with raises_user_error("expected numbers above 0"):
        scaling.main(["--budgets=0,nan"])
    with raises_user_error("at least two budgets and four depths"):
        scaling.main(["--depths=2,3,4"])
