"""
Evaluate a base model's loss: bits per byte on training and validation text, and a few samples.

    python -m scripts.base_loss --device_batch_size=1 --split_tokens=16384
    torchrun --standalone --nproc_per_node=8 -m scripts.base_loss

Reads a base checkpoint, tokenizer/ and base_data/. Writes a section of the report.
"""

import sys

from nanochat.cli import add_checkpoint_flags, make_parser, parse_args, path, run_script
from nanochat.cluster import compute_init
from nanochat.common import print0, require


def build_parser():
    p = make_parser("scripts.base_loss", __doc__)
    add_checkpoint_flags(p)
    p.add_argument("--device_batch_size", type=int, default=32, help="rows per forward pass and device")
    p.add_argument("--split_tokens", type=int, default=20 * 524288, help="tokens per split to evaluate")
    p.add_argument("--data_dir", type=path, help="folder of the shards (default: base_data in NANOCHAT_BASE_DIR)")
    return p


def main(argv=None):
    args = parse_args(build_parser(), argv)
    from nanochat import dataloader, dataset, loss_eval
    from nanochat.checkpoint_manager import load_model
    from nanochat.engine import Engine
    from nanochat.report import get_report
    from nanochat.tokenizer import get_token_bytes

    compute = compute_init(args.device_type, args.dtype)
    model, tokenizer, meta = load_model("base", compute, "eval", args.model_tag, args.step, quantize=args.quantize)
    if meta.get("made_from", {}).get("shards", shards := dataset.fingerprint(args.data_dir)) != shards:
        print0("warning: the model was trained on other shards, which may contain these documents", file=sys.stderr)
    require(args.device_batch_size >= 1, f"--device_batch_size={args.device_batch_size}: expected at least 1")
    rows, T = args.device_batch_size * compute.world_size, model.config.sequence_len
    steps, rest = divmod(args.split_tokens, rows * T)
    size = f"{rows * T:,} ({rows} rows x {T} tokens)"
    require(steps > 0 and not rest, f"--split_tokens={args.split_tokens:,} is not a multiple of {size}")

    bpb, token_bytes = {}, get_token_bytes()
    for split in ("train", "val"):
        source = dataloader.ShardSource(dataset.row_groups(split, args.data_dir), tokenizer, rows)
        batches = dataloader.eval_batches(source, rows, T, steps, compute)
        bpb[split] = loss_eval.evaluate_bpb(model, batches, token_bytes, compute)
        print0(f"{split} bpb {bpb[split]:.4f}")
    samples = loss_eval.greedy_samples(Engine(model, tokenizer, compute), meta["corpus"]) if compute.writes else {}
    for prompt, text in samples.items():
        print0(f"{prompt} >{text}")
    facts = {"step": meta["step"], "train bpb": bpb["train"], "val bpb": bpb["val"]}
    listing = {f"sample: {prompt}": text for prompt, text in samples.items()}
    get_report().log("Base model loss", [vars(args), facts, listing], {f"{split}_bpb": x for split, x in bpb.items()})


if __name__ == "__main__":
    run_script(main)
