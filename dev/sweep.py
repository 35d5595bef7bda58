"""
A small grid of runs of one stage: every combination of values, each with several seeds; one table and one page.

    python -m dev.sweep lr scripts.base_train --grid matrix_lr=0.01,0.02,0.04 --grid depth=2,4 --seeds=2 \
        -- --num_iterations=200 --total_batch_size=4096 --device_batch_size=8 --max_seq_len=512 --eval_tokens=65536 \
        --core_metric_every=-1

Each run is a base directory of its own, sweeps/<name>/<what differs>/ in the base directory, which lends its corpus,
tokenizer and checkpoints of earlier stages. The same command continues after an interruption: finished runs are kept,
and an unfinished one resumes from its checkpoint. Writes table.md and curves.html there; `python -m nanochat.watch`
shows the runs while they go on.
"""

import itertools
import json
import os
import re
import statistics
import subprocess
import sys

from nanochat.cli import make_parser, parse_args, run_script
from nanochat.common import UserError, base_dir, print0, require, write_text
from nanochat.compare import bpb_curve
from nanochat.pages import html_page
from nanochat.records import read_run, table
from nanochat.watch import changes

# Script -> (name of its files in report/, metric to compare, the folders that it reads)
STAGES = {"scripts.base_train": ("base", "val_bpb", ["base_data", "tokenizer"])}
STAGES["scripts.mid_train"] = ("mid", "val_bpb", ["base_data", "tokenizer", "base_checkpoints"])
STAGES["scripts.chat_sft"] = ("sft", "val_loss", ["tokenizer", "base_checkpoints", "mid_checkpoints"])
STAGES["scripts.chat_rl"] = ("rl", "greedy", ["tokenizer", "mid_checkpoints", "chatsft_checkpoints"])


def run_stage(folder, script, flags):
    """Run a stage in its own base directory `folder`, unless it has finished there. Returns (record, metrics rows)."""
    stage, _, sources = STAGES[script]
    settings, finished = folder / "flags.json", folder / "finished"
    old = json.loads(settings.read_text(encoding="utf-8")) if settings.exists() else None
    if old != [script, *flags] and (folder / "report").exists():
        raise UserError(f"{folder} was made by {' '.join(old or [])}; take another name, or delete that folder")
    if not finished.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(settings, json.dumps([script, *flags]))
        for name in sources:
            (folder / name).unlink(missing_ok=True)  # the base directory may have moved
            if (base_dir() / name).exists():
                (folder / name).symlink_to((base_dir() / name).resolve())
        env = os.environ | {"NANOCHAT_BASE_DIR": str(folder.resolve())}
        with subprocess.Popen([sys.executable, "-m", script, *flags, "--resume"], env=env) as process:
            try:
                code = process.wait()
            except KeyboardInterrupt:  # the stage has got the signal too, and saves a checkpoint
                code = process.wait() or 1
        if code:
            sys.exit(code)  # the stage has said why
        progress = [row["progress"] for row in read_run(folder / "report", stage)[1] if "progress" in row]
        require(progress and progress[-1] >= 1, f"{folder} stopped early; the same command continues")
        finished.touch()
    return read_run(folder / "report", stage)


def result_rows(results, metric):
    """Rows of the table: {setting: [(record, rows) per seed]} -> [setting, mean, spread over seeds, FLOPs, minutes]."""
    for setting, runs in results.items():
        finals = [[row[metric] for row in rows if metric in row] for _, rows in runs]
        require(all(finals), f"no {metric!r} in the metrics of {setting}; give --metric another of its keys")
        values = [final[-1] for final in finals]
        spread = f"{statistics.stdev(values):.4f}" if len(values) > 1 else "-"
        record, rows = runs[0]
        flops = bpb_curve(record, rows)[-1][0] if any("val_bpb" in row for row in rows) else 0
        minutes = statistics.fmean(rows[-1]["time"] - record["started"] for record, rows in runs) / 60
        yield [*setting, f"{statistics.fmean(values):.4f}", spread, str(len(values)), f"{flops:.3e}", f"{minutes:.1f}"]


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    end = argv.index("--") if "--" in argv else len(argv)
    own, fixed = argv[:end], argv[end + 1 :]
    parser = make_parser("dev.sweep", __doc__)
    add = parser.add_argument
    add("name", help="name of the sweep")
    add("script", choices=list(STAGES), help="the stage")
    add("--grid", action="append", default=[], metavar="FLAG=A,B,...", help="values of a flag; may be repeated")
    add("--seeds", type=int, default=1, help="runs of each combination, with --seed=42, 43, ...")
    add("--metric", help="key of report/metrics/<stage>.jsonl to compare (default val_bpb, val_loss or greedy)")
    args = parse_args(parser, own)
    require(re.fullmatch(r"[\w.-]+", args.name), f"{args.name!r}: expected a name of letters, digits, '.', '_' and '-'")
    require(args.seeds >= 1, f"--seeds={args.seeds}: expected at least 1")
    for axis in args.grid:
        valid = re.fullmatch(r"[a-z_0-9-]+=[^=]+", axis)
        require(valid, f"--grid {axis}: expected a flag and its values, like depth=2,4")
    grid = {name.replace("-", "_"): values.split(",") for name, values in (axis.split("=") for axis in args.grid)}
    require(len(grid) == len(args.grid), "--grid: a flag is given twice; list all its values once")
    require("seed" not in grid, "--grid seed=...: use --seeds for several seeds")
    metric = args.metric or STAGES[args.script][1]
    folder, results = base_dir() / "sweeps" / args.name, {}
    for values in itertools.product(*grid.values()):
        for seed in range(42, 42 + args.seeds):
            setting = [f"{flag}={value}" for flag, value in zip(grid, values, strict=True)]
            run = "-".join([*setting, f"seed={seed}"]).replace("/", "_")
            print0(f"== {run}")
            flags = [*fixed, *(f"--{flag}" for flag in setting), f"--seed={seed}"]
            results.setdefault(values, []).append(run_stage(folder / run, args.script, flags))
    head = [*grid, f"final {metric}", "spread (sd)", "seeds", "training FLOPs", "minutes"]
    text = table(head, result_rows(results, metric)) + "\n"
    write_text(folder / "table.md", text)
    runs = sorted(report.parent for report in folder.glob("*/report"))
    write_text(folder / "curves.html", html_page("watch.html", changes(runs, {})))
    print0(f"\n{text}\n{folder / 'table.md'}, {folder / 'curves.html'}")


if __name__ == "__main__":
    run_script(main)
