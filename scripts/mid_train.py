"""
Midtraining: teach the base model conversations, multiple choice and the calculator.

    python -m scripts.mid_train --device_batch_size=1 --total_batch_size=2048 --num_iterations=100     # laptop
    torchrun --standalone --nproc_per_node=8 -m scripts.mid_train

Reads a base checkpoint, the tokenizer and a task mixture. Writes mid_checkpoints/<tag of the base model>/.
"""

from dataclasses import replace
from functools import cache

from nanochat.cli import FLAG, add_run_flags, add_source_flags, make_parser, non_negative, parse_args, run_script, share
from nanochat.cluster import compute_init
from nanochat.common import print0


def build_parser():
    parser = make_parser("scripts.mid_train", __doc__)
    add_run_flags(parser, device_batch_size=32)
    add_source_flags(parser, "the base checkpoint")
    add = parser.add_argument
    add("--num_iterations", type=int, default=-1, help="optimizer steps; -1 = one epoch of the mixture")
    add("--max_seq_len", type=int, default=-1, help="context in tokens; -1 = the base model's; more extends it")
    add("--total_batch_size", type=int, default=524288, help="tokens per step, over all devices")
    add("--packing", default="stream", choices=("stream", "bos"), help="bos = rows start at conversations")
    add("--document_mask", **FLAG, help="no attention from one conversation of a row to another")
    add("--train_on", default="all", choices=("all", "assistant"), help="tokens to train on")
    add("--init_lr_frac", type=non_negative, default=1.0, help="initial learning rates, as a multiple of the flags")
    add("--warmdown_ratio", type=share, help="learning rate decay, as a share of the steps")
    add("--eval_every", type=int, default=150, help="steps between validations; -1 = never")
    add("--eval_tokens", type=int, default=20 * 524288, help="tokens per validation")
    add("--grad_checkpoint", **FLAG, help="save memory, a third slower")
    add("--dry_run", **FLAG, help="train, but write no checkpoint and no report")
    return parser


def main(argv=None):
    args = parse_args(build_parser(), argv)
    from nanochat import engine, loss_eval, schedule, tracking, train
    from nanochat.checkpoint_manager import load_model, made_from
    from nanochat.dataloader import TaskSource, check_lengths
    from nanochat.tokenizer import get_token_bytes
    from tasks.mixtures import training_tasks

    # Machine, tokenizer and model; --corpus and --max_seq_len default to those of the base run
    compute = compute_init(args.device_type, args.dtype, args.seed, args.dist_timeout)
    model, tokenizer, base_meta = load_model("base", compute, "train", args.model_tag, args.step)
    args.corpus = args.corpus or base_meta["corpus"]
    base_context = model.config.sequence_len
    args.max_seq_len = args.max_seq_len if args.max_seq_len > 0 else base_context
    if args.max_seq_len > base_context:  # rotary embeddings have no weights, so the model can learn longer contexts
        model.config = replace(model.config, sequence_len=args.max_seq_len)
        print0(f"the context grows from {base_context:,} to {args.max_seq_len:,} tokens, --max_seq_len")
    rows = train.rows_per_step(args, compute.world_size)
    train_task, val_task = training_tasks("mid", args.corpus, args.conversations, args.conversations_only)
    origins = made_from(base_meta, tokenizer, train_task)
    stage = train.Stage("mid", base_meta["model_tag"], args, compute, model.config, args.num_iterations, origins)
    if stage.finished:
        return
    model.grad_checkpoint = args.grad_checkpoint
    model.document_start = tokenizer.get_bos_token_id() if args.document_mask else None
    base_batch_size = base_meta["user_config"].get("device_batch_size", args.device_batch_size)
    if args.device_batch_size > base_batch_size:
        print0(f"warning: --device_batch_size={args.device_batch_size}, in pretraining it was {base_batch_size}")

    # Optimizers; restores weights and optimizer state when resuming
    optimizers, num_steps = stage.setup_optimizers(model), max(0, args.num_iterations)
    tokens = num_steps * args.total_batch_size or len(train_task) * train.TOKENS_PER_CONVERSATION
    compiled = stage.compile(model, tokens, fixed_shape=True)

    # Data; validation batches are read at the first validation
    rendering = dict(max_tokens=args.max_seq_len, use_mask=args.train_on == "assistant")
    check_lengths("training", train_task, tokenizer, **rendering)
    check_lengths("validation", val_task, tokenizer, **rendering)
    source = TaskSource(train_task, tokenizer, seed=args.seed, lanes=rows, dropout=args.bpe_dropout, **rendering)
    loader = stage.training_loader(source, rows)
    val_batches = cache(lambda: stage.validation_batches(TaskSource(val_task, tokenizer, lanes=rows, **rendering)))
    token_bytes = get_token_bytes()

    # Horizon: one epoch, unless --num_iterations is given
    print0(f"{len(train_task):,} conversations for training, {len(val_task):,} for validation")
    log = tracking.StageLog("mid", args, compute, num_steps, model, stage.meta.get("log_state"))
    results = {name: stage.meta.get(name) for name in ("val_bpb", "min_val_bpb")}

    # Loop: the last iteration only saves and evaluates
    step, progress = stage.first_step, stage.meta.get("progress", 0.0)
    while True:
        last = step >= num_steps if num_steps else progress >= 1
        stage.checkpoint(step, last, model, optimizers, loader, log, corpus=args.corpus, progress=progress, **results)
        if train.due(step, args.eval_every, last):
            log.validation(step, loss_eval.evaluate_bpb(compiled, val_batches(), token_bytes, compute), results)
            if compute.rank == 0:
                log.samples(step, loss_eval.chat_samples(engine.Engine(model, tokenizer, compute), val_task))
        if last:
            break
        batch = log.next_batch(loader)
        lr_mult = args.init_lr_frac * schedule.lr_multiplier(progress, warmdown_ratio=args.warmdown_ratio)
        schedule.set_schedule(optimizers, lr_mult, schedule.muon_momentum(step))
        result = stage.train_step(compiled, optimizers, batch.micro_batches, progress=batch.progress)
        step += 1
        progress = step / num_steps if num_steps else result.progress
        log.end_step(step - 1, result, args.total_batch_size, lr_mult, min(progress, 1.0))
    stage.close(loader, log, **results)

    # Report
    facts = {"Conversations": len(train_task), "Iterations": step}
    facts |= {"Minimum validation bpb": results["min_val_bpb"], "Final validation bpb": results["val_bpb"]}
    if not args.dry_run:
        log.report("Midtraining", args, facts, val_bpb=results["val_bpb"])


if __name__ == "__main__":
    run_script(main)
