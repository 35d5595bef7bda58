"""
Supervised fine-tuning: one conversation per row, only what the assistant says is trained on.

    python -m scripts.chat_sft --device_batch_size=1 --target_examples_per_step=4 --num_iterations=100     # laptop
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_sft

Reads a mid (or base) checkpoint, the tokenizer and the mixture of tasks. Writes chatsft_checkpoints/<the same tag>/.
"""

import time

from nanochat.cli import boolean, make_parser, parse_args, run_script
from nanochat.common import UserError, compute_init, print0

INLINE_TASKS = {"public": ("MMLU", "ARC-Easy"), "pocket": ("PocketFacts",)}  # quick to score while training


def build_parser():
    p = make_parser("scripts.chat_sft", __doc__)
    p.add_argument("--run", default="dummy", help='wandb run name; "dummy" logs nowhere')
    p.add_argument("--source", default="mid", choices=("mid", "base"), help="stage of the checkpoint to start from")
    p.add_argument("--model_tag", default=None, help="folder name of that checkpoint; default: the deepest")
    p.add_argument("--step", type=int, default=None, help="step of that checkpoint; default: the newest")
    p.add_argument("--device_type", default="", help="cuda, mps or cpu; empty = the best one here")
    p.add_argument(
        "--dtype", default="", help="float32 or bfloat16; empty = bfloat16 where the hardware is built for it"
    )
    p.add_argument(
        "--corpus",
        "--data",
        default="",
        choices=("", "public", "pocket"),
        help="mixture; empty = the model's",
    )
    p.add_argument("--device_batch_size", type=int, default=4, help="conversations per forward pass and device")
    p.add_argument("--target_examples_per_step", type=int, default=32, help="conversations per step, over all devices")
    p.add_argument("--num_epochs", type=int, default=1, help="passes over the mixture")
    p.add_argument("--num_iterations", type=int, default=-1, help="optimizer steps; -1 = from --num_epochs")
    p.add_argument("--embedding_lr", type=float, default=0.2, help="AdamW, embedding")
    p.add_argument("--unembedding_lr", type=float, default=0.004, help="AdamW, head")
    p.add_argument("--matrix_lr", type=float, default=0.02, help="Muon, the blocks' matrices")
    p.add_argument("--weight_decay", type=float, default=0.0, help="AdamW, embedding and head")
    p.add_argument("--init_lr_frac", type=float, default=0.02, help="all rates start at this multiple and fall to 0")
    p.add_argument("--seed", type=int, default=42, help="of the order of the data")
    p.add_argument(
        "--resume", type=boolean, nargs="?", const=True, default=False, help="from the newest good checkpoint"
    )
    p.add_argument("--resume_from_step", type=int, default=-1, help="from this checkpoint; -1 = start anew")
    p.add_argument("--eval_every", type=int, default=100, help="steps between validations; -1 = never")
    p.add_argument("--eval_steps", type=int, default=100, help="batches per validation")
    p.add_argument("--eval_metrics_every", type=int, default=200, help="steps between scoring tasks; -1 = never")
    p.add_argument("--eval_metrics_max_problems", type=int, default=1024, help="problems per scored task")
    p.add_argument("--save_every", type=int, default=-1, help="steps between checkpoints; -1 = only at the end")
    p.add_argument("--keep", type=int, default=0, help="keep the newest checkpoints only; 0 = all")
    return p


def examples_per_pass(args, world_size):
    """Checks that every rank gets whole micro-batches of the step's examples; raises UserError."""
    per_pass = args.device_batch_size * world_size
    if min(args.device_batch_size, args.target_examples_per_step) < 1 or args.target_examples_per_step % per_pass:
        raise UserError(
            f"--target_examples_per_step={args.target_examples_per_step} is not a multiple of {per_pass} "
            f"({args.device_batch_size} rows x {world_size} ranks)"
        )


def main(argv=None):
    args = parse_args(build_parser(), argv)
    started = time.time()
    from nanochat.chat_eval import evaluate_task
    from nanochat.checkpoint_manager import checkpoint_dir, load_model, update_meta
    from nanochat.dataloader import Prefetch, conversation_batches
    from nanochat.engine import Engine
    from nanochat.loss_eval import evaluate_loss
    from nanochat.report import get_report
    from nanochat.schedule import lr_multiplier, set_schedule
    from nanochat.tracking import RunLog
    from nanochat.train import Run, due, train_step
    from tasks.mixtures import EVAL_TASKS, sft

    # Machine, tokenizer and model
    compute = compute_init(args.device_type, args.dtype, args.seed)
    examples_per_pass(args, compute.world_size)
    model, tokenizer, source_meta = load_model(args.source, compute, args.model_tag, args.step, inference=False)
    args.corpus = args.corpus or source_meta["corpus"]
    train_task, val_task = sft(args.corpus)
    num_steps = args.num_iterations
    if num_steps <= 0:
        num_steps = args.num_epochs * len(train_task) // args.target_examples_per_step
    if num_steps < 1:
        raise UserError(f"nothing to train: {len(train_task)} conversations, {args.target_examples_per_step} per step")
    training = Run(checkpoint_dir("sft", source_meta["model_tag"]), args, compute, model.config, num_steps)
    if training.finished:
        return

    # Optimizers, and where an earlier run left them
    rates = (args.unembedding_lr, args.embedding_lr, args.matrix_lr)
    optimizers = model.setup_optimizers(*rates, args.weight_decay, compute.dtype)
    meta = training.restore(model, optimizers)

    # Data
    rows, context = args.target_examples_per_step, model.config.sequence_len
    batches = conversation_batches(
        train_task, tokenizer, rows, context, args.device_batch_size, compute, args.seed, meta.get("loader_state")
    )
    loader = Prefetch(batches, compute.device)
    val_rows = args.device_batch_size * compute.world_size

    # Horizon
    print0(f"{len(train_task):,} conversations ({args.corpus} mixture), {num_steps:,} steps of {rows}")
    log = RunLog("sft", "nanochat-sft", args, compute, num_steps, model.estimate_flops(), meta.get("log_state"))
    results = meta.get("results", {})

    # Loop: one more turn than there are steps, to save and judge what was trained
    loader_state = {}
    for step in range(training.first_step, num_steps + 1):
        last = step == num_steps
        if step > training.first_step and (last or due(step, args.save_every) or training.stopping):
            state = {"corpus": args.corpus, "results": results, "log_state": log.state()}
            path = training.save(step, model, [] if last else optimizers, state, loader_state, finished=last)
            if training.stopping:
                training.exit(log)
        if due(step, args.eval_every, last):
            val_batches = conversation_batches(val_task, tokenizer, val_rows, context, args.device_batch_size, compute)
            val_steps = max(1, min(args.eval_steps, len(val_task) // val_rows))
            results["val_loss"] = evaluate_loss(model, val_batches, val_steps, compute)
            log.metrics(step, val_loss=results["val_loss"])
            print0(f"step {step:05d} | validation loss {results['val_loss']:.4f}")
        if due(step, args.eval_metrics_every, last):
            engine = Engine(model, tokenizer, compute)
            for name in INLINE_TASKS[args.corpus]:
                task, limit = EVAL_TASKS[name].make(), args.eval_metrics_max_problems
                score = evaluate_task(task, engine, max_problems=limit, batch_size=2 * args.device_batch_size)
                results[name] = score.accuracy
                log.metrics(step, **{name: score.accuracy})
                print0(f"step {step:05d} | {name} {score.accuracy:.2%}")
        if last:
            break
        compute.synchronize()
        t0 = time.perf_counter()
        batch = next(loader)
        lr_mult = args.init_lr_frac * lr_multiplier(step / num_steps, warmdown_ratio=1.0)
        set_schedule(optimizers, lr_mult)
        result = train_step(model, optimizers, batch.micro_batches, compute, stop=training.stop_requested)
        compute.synchronize()
        loader_state, training.stopping = batch.state, result.stop
        log.step(step, result, sum(x.numel() for x, _ in batch.micro_batches), time.perf_counter() - t0, lr_mult)
    loader.close()
    log.close()
    update_meta(path, compute, results=results)

    # Report
    outcome = {
        "Training rows": len(train_task),
        "Number of iterations": num_steps,
        "Training loss": log.loss,
        "Validation loss": results.get("val_loss"),
        **{name: results[name] for name in INLINE_TASKS[args.corpus] if name in results},
        "wall_clock_seconds": time.time() - started,
    }
    get_report().log(section="Chat SFT", data=[vars(args), outcome])


if __name__ == "__main__":
    run_script(main)
