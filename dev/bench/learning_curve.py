"""
Compare the learning curve with a recorded reference: validation bits per byte of a depth-4 model on four public shards.

    python -m dev.bench.learning_curve --hub=<URL or folder> --dtype=bfloat16

`--hub` is a URL or folder with the layout of NANOCHAT_HUB_URL. All outputs go to a temporary base dir. The exit code is
1 if the loss at any evaluated step is more than 0.02 above the reference.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from nanochat.cli import make_parser, parse_args, path, run_script

# Step -> validation bits per byte of the reference (version 1, float32, 2 CPU cores, seed 42) with FLAGS.
REFERENCE = {
    0: 3.4055,
    25: 2.4676,
    50: 2.3413,
    75: 2.2960,
    100: 2.2366,
    125: 2.2053,
    150: 2.1603,
    175: 2.1085,
    200: 2.0476,
}
TOLERANCE = 0.02  # bits per byte above the reference
FLAGS = (
    "--depth=4 --max_seq_len=256 --device_batch_size=16 --total_batch_size=4096 --num_iterations=200 --eval_every=25 "
    "--eval_tokens=131072 --core_metric_every=-1 --sample_every=-1 --packing=stream --recipe=reference"
).split()


def main(argv=None):
    parser = make_parser("dev.bench.learning_curve", __doc__)
    parser.add_argument("--hub", type=path, required=True, help="URL or folder of the shards")
    parser.add_argument("--dtype", default="", help="float32 or bfloat16; empty = base_train chooses")
    args = parse_args(parser, argv)
    with tempfile.TemporaryDirectory() as base:
        env = os.environ | {"NANOCHAT_BASE_DIR": base, "NANOCHAT_HUB_URL": args.hub}
        for command in (
            ["nanochat.dataset", "-n", "4"],
            ["scripts.tok_train", "--vocab_size=8192"],
            ["scripts.base_train", *FLAGS, f"--dtype={args.dtype}"],
        ):
            subprocess.run([sys.executable, "-m", *command], env=env, check=True)
        metrics = map(json.loads, (Path(base) / "report/metrics/base.jsonl").read_text(encoding="utf-8").splitlines())
        ours = {r["step"]: r["val_bpb"] for r in metrics if "val_bpb" in r}
    print("\n| step | reference | ours | difference |\n|---|---|---|---|")
    for step, bpb in REFERENCE.items():
        print(f"| {step} | {bpb:.4f} | {ours[step]:.4f} | {ours[step] - bpb:+.4f} |")
    if any(ours[step] > bpb + TOLERANCE for step, bpb in REFERENCE.items()):
        sys.exit(1)


if __name__ == "__main__":
    run_script(main)
