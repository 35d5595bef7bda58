"""
Pretrain the base model on raw documents.

    python -m scripts.base_train --depth=4 --max_seq_len=512 --device_batch_size=4 --total_batch_size=8192     # laptop
    torchrun --standalone --nproc_per_node=8 -m scripts.base_train -- --depth=20

Reads tokenizer/ and base_data/. Writes base_checkpoints/d<depth>/ and report/metrics/base.jsonl.
"""

from functools import cache

from nanochat.cli import FLAG, add_run_flags, decay_rate, make_parser, non_negative, parse_args, path, run_script, share
from nanochat.cluster import compute_init
from nanochat.common import UserError, base_dir, print0


def build_parser():
    parser = make_parser("scripts.base_train", __doc__)
    add_run_flags(parser, device_batch_size=32, recipe="tuned")
    add = parser.add_argument
    add("--depth", type=int, default=20, help="number of layers; the width is 64 times this")
    add("--induction", **FLAG, help="start with heads that copy what followed the last occurrence of a token")
    add("--max_seq_len", type=int, default=2048, help="context length in tokens")
    add("--num_iterations", type=int, default=-1, help="optimizer steps; -1 = from a --target_* flag")
    add("--target_flops", type=float, default=-1.0, help="total training FLOPs; -1 = from --target_param_data_ratio")
    add("--target_param_data_ratio", type=float, default=20, help="training tokens per parameter (Chinchilla: 20)")
    add("--total_batch_size", type=int, default=524288, help="tokens per optimizer step, over all devices")
    add("--packing", choices=("stream", "shuffle", "bos"), help="order of rows; bos = each row starts with a document")
    add("--grad_clip", type=non_negative, default=1.0, help="maximum global gradient norm; 0 = off")
    add("--warmup_ratio", type=share, help="learning rate warmup, as a share of the steps")
    add("--warmdown_ratio", type=share, help="learning rate decay, as a share of the steps")
    add("--final_lr_frac", type=non_negative, help="final learning rates, as a multiple of the initial ones")
    add("--matrix_decay", type=non_negative, help="weight decay of the matrices, summed over the run; 0 = off")
    add("--final_momentum", type=decay_rate, help="Muon's momentum at learning rate 0, if below 0.95")
    add("--adam_beta1", type=decay_rate, help="decay rate of AdamW's first moment")
    add("--adam_half_life", type=non_negative, help="half-life of AdamW's second moment in tokens; 0 = beta2 0.95")
    add("--grad_checkpoint", **FLAG, help="save memory, a third slower")
    add("--eval_every", type=int, default=250, help="steps between validations; -1 = never")
    add("--eval_tokens", type=int, default=20 * 524288, help="tokens per validation")
    add("--core_metric_every", type=int, default=2000, help="steps between CORE evaluations; -1 = never")
    add("--core_metric_max_per_task", type=int, default=500, help="examples per CORE task")
    add("--sample_every", type=int, default=2000, help="steps between samples; -1 = never")
    add("--bpe_dropout", type=share, default=0.0, help="share of the tokenizer's merges left out in training documents")
    add("--data_dir", type=path, help="folder of the shards (default: base_data in NANOCHAT_BASE_DIR)")
    add("--model_tag", default="", help="folder name of the checkpoints; empty = d<depth>")
    return parser


def steps_to_train(args, num_params, flops_per_token):
    """Number of optimizer steps, from --num_iterations, else --target_flops, else --target_param_data_ratio."""
    if args.num_iterations > 0:
        return args.num_iterations
    if args.target_flops > 0:
        return max(1, round(args.target_flops / (flops_per_token * args.total_batch_size)))
    if args.target_param_data_ratio > 0:
        return max(1, int(args.target_param_data_ratio * num_params) // args.total_batch_size)
    raise UserError("no horizon: give --num_iterations, --target_flops or --target_param_data_ratio above 0")


def main(argv=None):
    args = parse_args(build_parser(), argv)
    from nanochat import dataloader, dataset, engine, gpt, loss_eval, plan, schedule, tracking, train
    from nanochat.core_eval import evaluate_core
    from nanochat.dclm.tasks import load_tasks
    from nanochat.tokenizer import get_token_bytes, get_tokenizer

    # Machine
    compute = compute_init(args.device_type, args.dtype, args.seed, args.dist_timeout)
    rows = train.rows_per_step(args, compute.world_size)

    # Tokenizer and model
    elsewhere = args.plan_for and not (base_dir() / "tokenizer").is_dir()  # needs neither a tokenizer nor data
    tokenizer = None if elsewhere else get_tokenizer()
    vocab_size = 65536 if elsewhere else tokenizer.get_vocab_size()  # tok_train's default
    config = gpt.GPTConfig.from_depth(args.depth, args.max_seq_len, vocab_size)
    model = gpt.GPT(config)
    flops_per_token, num_params = model.estimate_flops(), model.num_params()
    num_steps = steps_to_train(args, num_params, flops_per_token)
    if args.plan_for:
        return plan.Plan(args, compute, config, num_steps).show()
    token_bytes = get_token_bytes()
    origins = {"tokenizer": tokenizer.fingerprint(), "shards": dataset.fingerprint(args.data_dir)}
    stage = train.Stage("base", args.model_tag or f"d{args.depth}", args, compute, config, num_steps, origins)
    if stage.finished:
        return
    model.init_weights(compute.device)
    if args.induction:
        model.init_induction()
    model.grad_checkpoint = args.grad_checkpoint
    print0(f"{config}: {num_params:,} parameters, {flops_per_token:.4e} FLOPs per token")
    print0(f"device {compute.device}, {str(compute.dtype).removeprefix('torch.')}, {compute.world_size} process(es)")

    # Optimizers; restores weights and optimizer state when resuming
    optimizers, total_tokens = stage.setup_optimizers(model), num_steps * args.total_batch_size
    compiled = stage.compile(model, total_tokens, fixed_shape=True)

    # Data; validation batches are read at the first validation
    corpus = dataset.corpus_name(args.data_dir)
    train_groups, val_groups = (dataset.row_groups(split, args.data_dir) for split in ("train", "val"))
    source = dataloader.ShardSource(train_groups, tokenizer, rows, args.seed, args.bpe_dropout)
    loader = stage.training_loader(source, rows)
    val_batches = cache(lambda: stage.validation_batches(dataloader.ShardSource(val_groups, tokenizer, rows)))
    try:  # before training, to report missing data early
        core_tasks = load_tasks() if args.core_metric_every > 0 and corpus == "public" else None
    except UserError as e:
        raise UserError(f"{e}; or leave CORE out with --core_metric_every=-1") from e

    # Horizon
    total_flops, tokens_per_param = total_tokens * flops_per_token, total_tokens / num_params
    print0(f"{num_steps:,} steps of {args.total_batch_size:,} tokens ({rows} rows of {args.max_seq_len:,}): ", end="")
    print0(f"{total_tokens:,} tokens, {tokens_per_param:.1f} per parameter, {total_flops:.2e} FLOPs")
    log = tracking.StageLog("base", args, compute, num_steps, model, stage.meta.get("log_state"))
    results = {name: stage.meta.get(name) for name in ("val_bpb", "min_val_bpb", "core")}

    # Loop: num_steps + 1 iterations; the last one only saves and evaluates
    for step in range(stage.first_step, num_steps + 1):
        last = step == num_steps
        stage.checkpoint(step, last, model, optimizers, loader, log, corpus=corpus, **results)
        if train.due(step, args.eval_every, last):
            log.validation(step, loss_eval.evaluate_bpb(compiled, val_batches(), token_bytes, compute), results)
        if step and core_tasks and train.due(step, args.core_metric_every, last):
            results["core"] = evaluate_core(model, tokenizer, compute, args.core_metric_max_per_task, core_tasks).core
            log.evaluation(step, f"CORE {results['core']:.4f}", core=results["core"])
        if step and train.due(step, args.sample_every, last) and compute.rank == 0:
            log.samples(step, loss_eval.greedy_samples(engine.Engine(model, tokenizer, compute), corpus))
        if last:
            break
        batch = log.next_batch(loader)
        ratios = args.warmup_ratio, args.warmdown_ratio, args.final_lr_frac
        lr_mult = schedule.lr_multiplier(step / num_steps, *ratios, per_step=1 / num_steps)
        momentum = schedule.muon_momentum(step, lr_mult=lr_mult, final=args.final_momentum)
        schedule.set_schedule(optimizers, lr_mult, momentum, schedule.muon_decay(step, num_steps, args.matrix_decay))
        result = stage.train_step(compiled, optimizers, batch.micro_batches, grad_clip=args.grad_clip)
        log.end_step(step, result, args.total_batch_size, lr_mult)
    stage.close(loader, log, **results)

    # Report
    facts = {"Parameters": num_params, "FLOPs per token": flops_per_token, "Iterations": num_steps}
    facts |= {"Training tokens": total_tokens, "Tokens per parameter": tokens_per_param}
    facts |= {"Total training FLOPs": f"{total_flops:.4e}"}
    facts |= {"Minimum validation bpb": results["min_val_bpb"], "Final validation bpb": results["val_bpb"]}
    if results["core"] is not None:
        facts["CORE estimate"] = results["core"]
    log.report("Base model training", args, facts, val_bpb=results["val_bpb"], core=results["core"])


if __name__ == "__main__":
    run_script(main)
