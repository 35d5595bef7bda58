"""
Bits per byte of a base model on training and validation text, and a few samples.

    python -m scripts.base_loss --device_batch_size=1 --split_tokens=16384
    torchrun --standalone --nproc_per_node=8 -m scripts.base_loss

Reads the newest base checkpoint, tokenizer/ and base_data/. Writes the report's section.
"""

from nanochat.cli import make_parser, parse_args, run_script
from nanochat.common import UserError, compute_init, print0


def build_parser():
    p = make_parser("scripts.base_loss", __doc__)
    p.add_argument("--device_type", default="", help="cuda, mps or cpu; empty = the best one here")
    p.add_argument(
        "--dtype", default="", help="float32 or bfloat16; empty = bfloat16 where the hardware is built for it"
    )
    p.add_argument("--device_batch_size", type=int, default=32, help="rows per forward pass and device")
    p.add_argument("--split_tokens", type=int, default=20 * 524288, help="tokens of each split to evaluate")
    p.add_argument("--model_tag", default=None, help="folder name of the checkpoint; default: the deepest")
    p.add_argument("--model_step", type=int, default=None, help="step of the checkpoint; default: the newest")
    p.add_argument("--quantize", choices=["int8"], help="judge the weights that a CPU decodes with then")
    return p


def main(argv=None):
    args = parse_args(build_parser(), argv)
    from nanochat.checkpoint_manager import load_model
    from nanochat.dataloader import ShardSource, eval_batches
    from nanochat.dataset import row_groups
    from nanochat.engine import Engine
    from nanochat.loss_eval import evaluate_bpb, greedy_samples
    from nanochat.report import get_report
    from nanochat.tokenizer import get_token_bytes

    compute = compute_init(args.device_type, args.dtype)
    model, tokenizer, meta = load_model("base", compute, args.model_tag, args.model_step, quantize=args.quantize)
    engine = Engine(model, tokenizer, compute)
    rows, T = args.device_batch_size * compute.world_size, model.config.sequence_len
    if args.split_tokens < 1 or args.split_tokens % (rows * T):
        raise UserError(
            f"--split_tokens={args.split_tokens:,} is not a multiple of {rows * T:,} ({rows} rows x {T} tokens)"
        )
    steps, token_bytes = args.split_tokens // (rows * T), get_token_bytes()

    bpb = {}
    for split in ("train", "val"):
        batches = eval_batches(ShardSource(row_groups(split), tokenizer, rows), rows, T, steps, compute)
        bpb[f"{split} bpb"] = evaluate_bpb(model, batches, token_bytes, compute)
        print0(f"{split} bpb {bpb[f'{split} bpb']:.4f}")
    samples = {}
    if compute.rank == 0:
        samples = greedy_samples(engine, meta["corpus"])
        for prompt, text in samples.items():
            print0(f"{prompt} >{text}")
    facts = {"step": meta["step"], **bpb}
    get_report().log(
        section="Base model loss", data=[vars(args), facts, {f"sample: {k}": v for k, v in samples.items()}]
    )


if __name__ == "__main__":
    run_script(main)
