"""
Midtraining: teach the base model the form of a conversation, multiple choice and the calculator.

    python -m scripts.mid_train --device_batch_size=1 --total_batch_size=2048 --num_iterations=100     # laptop
    torchrun --standalone --nproc_per_node=8 -m scripts.mid_train

Reads a base checkpoint, the tokenizer and the mixture of tasks. Writes mid_checkpoints/<tag of the base model>/.
"""

import time

from nanochat.cli import boolean, make_parser, parse_args, run_script
from nanochat.common import compute_init, print0


def build_parser():
    p = make_parser("scripts.mid_train", __doc__)
    p.add_argument("--run", default="dummy", help='wandb run name; "dummy" logs nowhere')
    p.add_argument("--device_type", default="", help="cuda, mps or cpu; empty = the best one here")
    p.add_argument(
        "--dtype", default="", help="float32 or bfloat16; empty = bfloat16 where the hardware is built for it"
    )
    p.add_argument("--compile", type=boolean, nargs="?", const=True, help="torch.compile; default: on CUDA only")
    p.add_argument(
        "--corpus", "--data", default="", choices=("", "public", "pocket"), help="mixture; empty = as the base model's"
    )
    p.add_argument("--model_tag", default=None, help="folder name of the base checkpoint; default: the deepest")
    p.add_argument("--step", type=int, default=None, help="step of the base checkpoint; default: the newest")
    p.add_argument("--num_iterations", type=int, default=-1, help="optimizer steps; -1 = one epoch of the mixture")
    p.add_argument("--max_seq_len", type=int, default=-1, help="context, tokens; -1 = the base model's")
    p.add_argument("--device_batch_size", type=int, default=32, help="rows per forward pass and device")
    p.add_argument("--total_batch_size", type=int, default=524288, help="tokens per optimizer step, over all devices")
    p.add_argument(
        "--packing", default="stream", choices=("stream", "bos"), help="cut rows anywhere, or at conversations"
    )
    p.add_argument("--train_on", default="all", choices=("all", "assistant"), help="tokens: all, or the assistant's")
    p.add_argument("--embedding_lr", type=float, default=0.2, help="AdamW, embedding")
    p.add_argument("--unembedding_lr", type=float, default=0.004, help="AdamW, head")
    p.add_argument("--matrix_lr", type=float, default=0.02, help="Muon, the blocks' matrices")
    p.add_argument("--init_lr_frac", type=float, default=1.0, help="all rates start at this multiple")
    p.add_argument("--weight_decay", type=float, default=0.0, help="AdamW, embedding and head")
    p.add_argument("--grad_checkpoint", type=boolean, nargs="?", const=True, default=False, help="less memory, slower")
    p.add_argument("--seed", type=int, default=42, help="of the order of the data")
    p.add_argument(
        "--resume", type=boolean, nargs="?", const=True, default=False, help="from the newest good checkpoint"
    )
    p.add_argument("--resume_from_step", type=int, default=-1, help="from this checkpoint; -1 = start anew")
    p.add_argument("--eval_every", type=int, default=150, help="steps between validations; -1 = never")
    p.add_argument("--eval_tokens", type=int, default=20 * 524288, help="tokens per validation")
    p.add_argument("--save_every", type=int, default=-1, help="steps between checkpoints; -1 = only at the end")
    p.add_argument("--keep", type=int, default=0, help="keep the newest checkpoints only; 0 = all")
    p.add_argument(
        "--dry_run", type=boolean, nargs="?", const=True, default=False, help="train, but write no checkpoint"
    )
    return p


def main(argv=None):
    args = parse_args(build_parser(), argv)
    started = time.time()
    import torch

    from nanochat.checkpoint_manager import checkpoint_dir, load_model, update_meta
    from nanochat.dataloader import Prefetch, TaskSource, eval_batches, lane_batches
    from nanochat.loss_eval import evaluate_bpb
    from nanochat.report import get_report
    from nanochat.schedule import lr_multiplier, muon_momentum, set_schedule
    from nanochat.tokenizer import get_token_bytes
    from nanochat.tracking import RunLog
    from nanochat.train import Run, due, rows_per_step, train_step
    from tasks.mixtures import midtraining

    # Machine, tokenizer and model
    compute = compute_init(args.device_type, args.dtype, args.seed)
    model, tokenizer, base_meta = load_model("base", compute, args.model_tag, args.step, inference=False)
    args.corpus = args.corpus or base_meta["corpus"]
    args.max_seq_len = args.max_seq_len if args.max_seq_len > 0 else model.config.sequence_len
    rows = rows_per_step(args.total_batch_size, args.device_batch_size, args.max_seq_len, compute.world_size)
    training = Run(checkpoint_dir("mid", base_meta["model_tag"]), args, compute, model.config, args.num_iterations)
    if training.finished:
        return
    model.grad_checkpoint = args.grad_checkpoint
    pretrained_rows = base_meta["user_config"].get("device_batch_size", args.device_batch_size)
    if args.device_batch_size > pretrained_rows:
        print0(f"warning: --device_batch_size={args.device_batch_size}, in pretraining it was {pretrained_rows}")

    # Optimizers, and where an earlier run left them
    rates = (args.unembedding_lr, args.embedding_lr, args.matrix_lr)
    optimizers = model.setup_optimizers(*rates, args.weight_decay, compute.dtype)
    meta = training.restore(model, optimizers)
    compiled = model
    if args.compile if args.compile is not None else compute.device.type == "cuda":
        compiled = torch.compile(model, dynamic=False)

    # Data
    train_task, val_task = midtraining(args.corpus)
    use_mask = args.train_on == "assistant"
    source = TaskSource(train_task, tokenizer, args.max_seq_len, rows, args.seed, use_mask)
    batches = lane_batches(
        source, rows, args.max_seq_len, args.device_batch_size, compute, args.packing, meta.get("loader_state")
    )
    loader = Prefetch(batches, compute.device)
    eval_rows = args.device_batch_size * compute.world_size
    eval_steps = max(1, args.eval_tokens // (eval_rows * args.max_seq_len))
    token_bytes, val_batches = get_token_bytes(), None

    # Horizon: the data, once, unless steps are given
    print0(f"{len(train_task):,} conversations for training, {len(val_task):,} for validation; {args.corpus} mixture")
    num_steps = max(0, args.num_iterations)
    log = RunLog("mid", "nanochat-mid", args, compute, num_steps, model.estimate_flops(), meta.get("log_state"))
    val_bpb, min_val_bpb = meta.get("val_bpb"), meta.get("min_val_bpb")
    progress, step, path = meta.get("progress", 0.0), training.first_step, None
    loader_state = {}

    # Loop: one more turn than there are steps, to save and judge what was trained
    while True:
        last = step >= num_steps if num_steps else progress >= 1
        wanted = last or training.stopping or due(step, args.save_every)
        if step > training.first_step and wanted and not args.dry_run:
            state = {"corpus": args.corpus, "val_bpb": val_bpb, "min_val_bpb": min_val_bpb, "progress": progress}
            path = training.save(step, model, optimizers, state | {"log_state": log.state()}, loader_state, last)
        if training.stopping:
            training.exit(log)
        if due(step, args.eval_every, last):
            val_batches = val_batches or eval_batches(
                TaskSource(val_task, tokenizer, args.max_seq_len, rows, use_mask=use_mask),
                eval_rows,
                args.max_seq_len,
                eval_steps,
                compute,
            )
            val_bpb = evaluate_bpb(compiled, val_batches, token_bytes, compute)
            min_val_bpb = min(val_bpb, min_val_bpb or val_bpb)
            log.metrics(step, val_bpb=val_bpb)
            print0(f"step {step:05d} | validation bpb {val_bpb:.4f}")
        if last:
            break
        compute.synchronize()
        t0 = time.perf_counter()
        batch = next(loader)
        lr_mult = args.init_lr_frac * lr_multiplier(progress)
        set_schedule(optimizers, lr_mult, muon_momentum(step))
        result = train_step(
            compiled, optimizers, batch.micro_batches, compute, progress=batch.progress, stop=training.stop_requested
        )
        compute.synchronize()
        step += 1
        progress = step / num_steps if num_steps else result.progress
        loader_state, training.stopping = batch.state, result.stop
        log.step(step - 1, result, args.total_batch_size, time.perf_counter() - t0, lr_mult, min(progress, 1.0))
    loader.close()
    log.close()
    if path:
        update_meta(path, compute, val_bpb=val_bpb, min_val_bpb=min_val_bpb)

    # Report
    outcome = {
        "Conversations": len(train_task),
        "Iterations": step,
        "World size": compute.world_size,
        "Training loss": log.loss,
        "Minimum validation bpb": min_val_bpb,
        "Final validation bpb": val_bpb,
        "Tokens per second": log.tokens_per_second,
        "wall_clock_seconds": time.time() - started,
    }
    if not args.dry_run:
        get_report().log(section="Midtraining", data=[vars(args), outcome])


if __name__ == "__main__":
    run_script(main)
