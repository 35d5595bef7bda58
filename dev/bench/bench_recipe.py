"""
Compare recipes: final validation bits per byte (bpb) of base models, and the steps saved.

    python -m dev.bench.bench_recipe --hub=<URL or folder> --base=<folder>                 # two depths and budgets
    python -m dev.bench.bench_recipe --hub=<URL or folder> --base=<folder> --shapes=4x200 --seeds=1

A shape is depth x steps, of 4,096 tokens with a context of 256. Every recipe is trained with each seed; "80 %" is the
tuned recipe with four fifths of the steps, and saves at least a fifth if it ends no higher than the reference;
"induction" is the tuned recipe with --induction. All outputs go to --base; the same command continues there after an
interruption.
"""

import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

from nanochat.checkpoint_manager import find_checkpoint
from nanochat.cli import make_parser, parse_args, path, run_script
from nanochat.common import require

FLAGS = (
    "--max_seq_len=256 --device_batch_size=16 --total_batch_size=4096 --eval_every=1000000 --eval_tokens=131072 "
    "--core_metric_every=-1 --sample_every=-1 --resume --keep=1 --save_every=100"
).split()


def main(argv=None):
    parser = make_parser("dev.bench.bench_recipe", __doc__)
    add = parser.add_argument
    add("--hub", type=path, required=True, help="URL or folder of the shards")
    add("--base", type=path, required=True, help="folder of all outputs")
    add("--shapes", default="4x200,4x1000,8x1000", help="depth x steps, separated by commas")
    add("--seeds", type=int, default=3, help="runs of each kind")
    add("--dtype", default="", help="float32 or bfloat16; empty = base_train chooses")
    args = parse_args(parser, argv)
    require(args.seeds >= 1, f"--seeds={args.seeds}: expected at least 1")
    shapes = []
    for shape in args.shapes.split(","):
        require(re.fullmatch(r"[1-9]\d*x[1-9]\d*", shape), f"--shapes={shape}: expected depth x steps, like 4x200")
        shapes.append(tuple(map(int, shape.split("x"))))
    env = os.environ | {"NANOCHAT_BASE_DIR": args.base, "NANOCHAT_HUB_URL": args.hub}

    def run(*command):
        if code := subprocess.run([sys.executable, "-m", *command], env=env).returncode:
            sys.exit(code)  # the command has said why

    def final_bpb(depth, seed, recipe, steps, *flags):
        tag = f"{recipe}{''.join(flags)}_d{depth}_{steps}_{seed}"
        size = f"--depth={depth}", f"--num_iterations={steps}", f"--seed={seed}", f"--model_tag={tag}"
        run("scripts.base_train", *FLAGS, *size, f"--recipe={recipe}", f"--dtype={args.dtype}", *flags)
        return find_checkpoint(Path(args.base) / "base_checkpoints" / tag)[1]["val_bpb"]

    run("nanochat.dataset", "-n", "4")
    if not (Path(args.base) / "tokenizer").exists():
        run("scripts.tok_train", "--vocab_size=8192")
    rows = []
    for depth, steps in shapes:
        kinds = {"reference": ("reference", steps), "tuned": ("tuned", steps), "80 %": ("tuned", steps * 4 // 5)}
        kinds["induction"] = "tuned", steps, "--induction=1"
        seeds = range(args.seeds)
        bpb = {name: [final_bpb(depth, seed, *kind) for seed in seeds] for name, kind in kinds.items()}
        reference = statistics.mean(bpb["reference"])
        for name, values in bpb.items():
            mean, spread = statistics.mean(values), max(values) - min(values)
            rows.append(f"| {depth} | {steps:,} | {name} | {mean:.4f} | {spread:.4f} | {mean - reference:+.4f} |")
    print("\n| depth | steps | recipe | bpb, mean | max - min | against the reference |\n|---|---|---|---|---|---|")
    print(*rows, sep="\n")


if __name__ == "__main__":
    run_script(main)
