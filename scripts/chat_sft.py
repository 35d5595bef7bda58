"""
Supervised fine-tuning (SFT) on conversations, one per row; only the assistant's tokens are trained on.

    python -m scripts.chat_sft --device_batch_size=1 --target_examples_per_step=4 --num_iterations=100     # laptop
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_sft

Reads a mid (or base) checkpoint, the tokenizer and a task mixture. Writes chatsft_checkpoints/<tag of that model>/.
"""

from itertools import islice

from nanochat.cli import add_run_flags, add_source_flags, make_parser, non_negative, parse_args, run_script
from nanochat.cluster import compute_init
from nanochat.common import print0, require

INLINE_TASKS = {"public": ("MMLU", "ARC-Easy"), "pocket": ("PocketFacts",)}  # quick tasks, scored during training


def build_parser():
    parser = make_parser("scripts.chat_sft", __doc__)
    add_run_flags(parser, device_batch_size=4)
    add = parser.add_argument
    add("--source", default="mid", choices=("mid", "base"), help="stage of the checkpoint to start from")
    add_source_flags(parser, "that checkpoint")
    add("--target_examples_per_step", type=int, default=32, help="conversations per step, over all devices")
    add("--num_epochs", type=int, default=1, help="passes over the mixture")
    add("--num_iterations", type=int, default=-1, help="optimizer steps; -1 = from --num_epochs")
    add("--init_lr_frac", type=non_negative, default=0.02, help="initial multiple of the learning rates; falls to 0")
    add("--eval_every", type=int, default=100, help="steps between validations; -1 = never")
    add("--eval_steps", type=int, default=100, help="batches per validation")
    add("--eval_metrics_every", type=int, default=200, help="steps between evaluations of tasks; -1 = never")
    add("--eval_metrics_max_problems", type=int, default=1024, help="problems per evaluated task")
    return parser


def main(argv=None):
    args = parse_args(build_parser(), argv)
    from nanochat import chat_eval, dataloader, loss_eval, schedule, tracking, train
    from nanochat.checkpoint_manager import load_model, made_from
    from nanochat.engine import Engine
    from tasks.mixtures import EVAL_TASKS, training_tasks

    # Machine, tokenizer and model
    compute = compute_init(args.device_type, args.dtype, args.seed, args.dist_timeout)
    rows, rank_rows, ranks = args.target_examples_per_step, args.device_batch_size, compute.world_size
    per_pass = rank_rows * ranks  # rows in one forward pass over all ranks
    multiple = f"a multiple of {per_pass} ({rank_rows} rows x {ranks} ranks)"
    require(min(rows, rank_rows) >= 1 and rows % per_pass == 0, f"--target_examples_per_step={rows} is not {multiple}")
    model, tokenizer, source_meta = load_model(args.source, compute, "train", args.model_tag, args.step)
    corpus = args.corpus = args.corpus or source_meta["corpus"]
    train_task, val_task = training_tasks("sft", corpus, args.conversations, args.conversations_only)
    num_steps = train.epoch_steps(args, train_task, rows)
    origins = made_from(source_meta, tokenizer, train_task)
    stage = train.Stage("sft", source_meta["model_tag"], args, compute, model.config, num_steps, origins)
    if stage.finished:
        return

    # Optimizers; restores weights and optimizer state when resuming
    optimizers = stage.setup_optimizers(model)
    model = stage.compile(model, num_steps * rows * train.TOKENS_PER_CONVERSATION)

    # Data
    T = model.config.sequence_len
    dataloader.check_lengths("training", train_task, tokenizer, T)
    dataloader.check_lengths("validation", val_task, tokenizer, T)
    options = dict(seed=args.seed, states=stage.meta.get("loader_state"), dropout=args.bpe_dropout)
    batches = dataloader.conversation_batches(train_task, tokenizer, rows, T, rank_rows, compute, **options)
    loader = dataloader.Prefetch(batches, compute.device)
    val_steps = max(1, min(args.eval_steps, len(val_task) // per_pass))

    # Horizon
    print0(f"{len(train_task):,} conversations, {num_steps:,} steps of {rows}")
    log = tracking.StageLog("sft", args, compute, num_steps, model, stage.meta.get("log_state"))
    results = stage.meta.get("results", {})

    # Loop: num_steps + 1 iterations; the last one only saves and evaluates
    for step in range(stage.first_step, num_steps + 1):
        last = step == num_steps
        stage.checkpoint(step, last, model, [] if last else optimizers, loader, log, corpus=corpus, results=results)
        if train.due(step, args.eval_every, last):
            val_batches = dataloader.conversation_batches(val_task, tokenizer, per_pass, T, rank_rows, compute)
            pairs = [pair for batch in islice(val_batches, val_steps) for pair in batch.micro_batches]
            results["val_loss"] = loss_eval.evaluate_loss(model, pairs, compute)
            log.evaluation(step, f"validation loss {results['val_loss']:.4f}", val_loss=results["val_loss"])
            if compute.rank == 0:
                log.samples(step, loss_eval.chat_samples(Engine(model, tokenizer, compute), val_task))
        if train.due(step, args.eval_metrics_every, last):
            engine = Engine(model, tokenizer, compute)
            settings = dict(max_problems=args.eval_metrics_max_problems, batch_size=2 * rank_rows)
            for name in () if args.conversations_only else INLINE_TASKS[corpus]:
                results[name] = chat_eval.evaluate_task(EVAL_TASKS[name].make(), engine, **settings).accuracy
                log.evaluation(step, f"{name} {results[name]:.2%}", **{name: results[name]})
        if last:
            break
        batch = log.next_batch(loader)
        lr_mult = args.init_lr_frac * schedule.lr_multiplier(step / num_steps, warmdown_ratio=1.0)
        schedule.set_schedule(optimizers, lr_mult)
        result = stage.train_step(model, optimizers, batch.micro_batches)
        log.end_step(step, result, sum(x.numel() for x, _ in batch.micro_batches) * compute.world_size, lr_mult)
    stage.close(loader, log, results=results)

    # Report
    facts = {"Training rows": len(train_task), "Number of iterations": num_steps}
    facts |= {"Validation loss" if name == "val_loss" else name: value for name, value in results.items()}
    log.report("Chat SFT", args, facts)


if __name__ == "__main__":
    run_script(main)
