"""
Pretrain the base model on raw documents.

    python -m scripts.base_train --depth=4 --max_seq_len=512 --device_batch_size=4 --total_batch_size=8192     # laptop
    torchrun --standalone --nproc_per_node=8 -m scripts.base_train -- --depth=20

Reads tokenizer/ and base_data/. Writes base_checkpoints/d<depth>/ and report/metrics/base.jsonl.
"""

import time

from nanochat.cli import boolean, make_parser, parse_args, run_script
from nanochat.common import UserError, compute_init, print0


def build_parser():
    p = make_parser("scripts.base_train", __doc__)
    p.add_argument("--run", default="dummy", help='wandb run name; "dummy" logs nowhere')
    p.add_argument("--device_type", default="", help="cuda, mps or cpu; empty = the best one here")
    p.add_argument(
        "--dtype", default="", help="float32 or bfloat16; empty = bfloat16 where the hardware is built for it"
    )
    p.add_argument("--compile", type=boolean, nargs="?", const=True, help="torch.compile; default: on CUDA only")
    p.add_argument("--depth", type=int, default=20, help="layers; the width is 64 times this")
    p.add_argument("--max_seq_len", type=int, default=2048, help="context, tokens")
    p.add_argument("--num_iterations", type=int, default=-1, help="optimizer steps; -1 = from the next two flags")
    p.add_argument("--target_flops", type=float, default=-1.0, help="train for this many FLOPs; -1 = from the ratio")
    p.add_argument("--target_param_data_ratio", type=float, default=20, help="tokens per parameter (Chinchilla: 20)")
    p.add_argument("--device_batch_size", type=int, default=32, help="rows per forward pass and device")
    p.add_argument("--total_batch_size", type=int, default=524288, help="tokens per optimizer step, over all devices")
    p.add_argument("--packing", default="stream", choices=("stream", "bos"), help="cut rows anywhere, or at documents")
    p.add_argument("--embedding_lr", type=float, default=0.2, help="AdamW, embedding")
    p.add_argument("--unembedding_lr", type=float, default=0.004, help="AdamW, head")
    p.add_argument("--weight_decay", type=float, default=0.0, help="AdamW, embedding and head")
    p.add_argument("--matrix_lr", type=float, default=0.02, help="Muon, the blocks' matrices")
    p.add_argument("--grad_clip", type=float, default=1.0, help="global gradient norm; 0 = off")
    p.add_argument("--warmup_ratio", type=float, default=0.0, help="share of the steps in which the rates rise")
    p.add_argument("--warmdown_ratio", type=float, default=0.2, help="share of the steps in which the rates fall")
    p.add_argument("--final_lr_frac", type=float, default=0.0, help="the rates end at this multiple")
    p.add_argument("--grad_checkpoint", type=boolean, nargs="?", const=True, default=False, help="less memory, slower")
    p.add_argument("--seed", type=int, default=42, help="of the weights and the order of the data")
    p.add_argument(
        "--resume", type=boolean, nargs="?", const=True, default=False, help="from the newest good checkpoint"
    )
    p.add_argument("--resume_from_step", type=int, default=-1, help="from this checkpoint; -1 = start anew")
    p.add_argument("--eval_every", type=int, default=250, help="steps between validations; -1 = never")
    p.add_argument("--eval_tokens", type=int, default=20 * 524288, help="tokens per validation")
    p.add_argument("--core_metric_every", type=int, default=2000, help="steps between CORE evaluations; -1 = never")
    p.add_argument("--core_metric_max_per_task", type=int, default=500, help="examples per CORE task")
    p.add_argument("--sample_every", type=int, default=2000, help="steps between samples; -1 = never")
    p.add_argument("--save_every", type=int, default=-1, help="steps between checkpoints; -1 = only at the end")
    p.add_argument("--keep", type=int, default=0, help="keep the newest checkpoints only; 0 = all")
    p.add_argument("--model_tag", default="", help="folder name of the checkpoints; empty = d<depth>")
    return p


def num_steps(args, num_params, flops_per_token):
    """Optimizer steps: --num_iterations, else from --target_flops, else from --target_param_data_ratio."""
    if args.num_iterations > 0:
        return args.num_iterations
    if args.target_flops > 0:
        return max(1, round(args.target_flops / (flops_per_token * args.total_batch_size)))
    if args.target_param_data_ratio > 0:
        return max(1, int(args.target_param_data_ratio * num_params) // args.total_batch_size)
    raise UserError("no horizon: give --num_iterations, --target_flops or --target_param_data_ratio above 0")


def main(argv=None):
    args = parse_args(build_parser(), argv)
    started = time.time()
    import torch

    from nanochat.checkpoint_manager import checkpoint_dir, update_meta
    from nanochat.core_eval import evaluate_core
    from nanochat.dataloader import Prefetch, ShardSource, eval_batches, lane_batches
    from nanochat.dataset import corpus_name, row_groups
    from nanochat.dclm.tasks import load_tasks
    from nanochat.engine import Engine
    from nanochat.gpt import GPT, GPTConfig
    from nanochat.loss_eval import evaluate_bpb, greedy_samples
    from nanochat.report import get_report
    from nanochat.schedule import lr_multiplier, muon_momentum, set_schedule
    from nanochat.tokenizer import get_token_bytes, get_tokenizer
    from nanochat.tracking import RunLog, peak_memory_mib
    from nanochat.train import Run, due, rows_per_step, train_step

    # Machine
    compute = compute_init(args.device_type, args.dtype, args.seed)
    rows = rows_per_step(args.total_batch_size, args.device_batch_size, args.max_seq_len, compute.world_size)

    # Tokenizer and model
    tokenizer = get_tokenizer()
    token_bytes = get_token_bytes()
    config = GPTConfig.from_depth(args.depth, args.max_seq_len, tokenizer.get_vocab_size())
    model = GPT(config)
    flops_per_token, num_params = model.estimate_flops(), model.num_params()
    num_iterations = num_steps(args, num_params, flops_per_token)
    folder = checkpoint_dir("base", args.model_tag or f"d{args.depth}")
    training = Run(folder, args, compute, config, num_iterations)
    if training.finished:
        return
    model.init_weights(compute.device)
    model.grad_checkpoint = args.grad_checkpoint
    print0(f"{config}: {num_params:,} parameters, {flops_per_token:.4e} FLOPs per token")
    print0(f"device {compute.device}, {str(compute.dtype).removeprefix('torch.')}, {compute.world_size} process(es)")

    # Optimizers, and where an earlier run left them
    rates = (args.unembedding_lr, args.embedding_lr, args.matrix_lr)
    optimizers = model.setup_optimizers(*rates, args.weight_decay, compute.dtype)
    meta = training.restore(model, optimizers)
    compiled = model
    if args.compile if args.compile is not None else compute.device.type == "cuda":
        compiled = torch.compile(model, dynamic=False)

    # Data
    corpus = corpus_name()
    source = ShardSource(row_groups("train"), tokenizer, rows, args.seed)
    batches = lane_batches(
        source, rows, args.max_seq_len, args.device_batch_size, compute, args.packing, meta.get("loader_state")
    )
    loader = Prefetch(batches, compute.device)
    eval_rows = args.device_batch_size * compute.world_size
    eval_steps = max(1, args.eval_tokens // (eval_rows * args.max_seq_len))
    val_batches = None  # made at the first validation

    # Horizon
    total_tokens = num_iterations * args.total_batch_size
    print0(
        f"{num_iterations:,} steps of {args.total_batch_size:,} tokens ({rows} rows, "
        f"{rows // eval_rows} micro-batches): {total_tokens:,} tokens, {total_tokens / num_params:.1f} per parameter, "
        f"{total_tokens * flops_per_token:.2e} FLOPs"
    )
    core_tasks, core = None, meta.get("core")
    if args.core_metric_every > 0 and corpus == "public":  # what is missing shows now, not at step 2,000
        try:
            core_tasks = load_tasks()
        except UserError as e:
            raise UserError(f"{e}; or leave CORE out with --core_metric_every=-1") from e
    log = RunLog("base", "nanochat", args, compute, num_iterations, flops_per_token, meta.get("log_state"))
    val_bpb, min_val_bpb = meta.get("val_bpb"), meta.get("min_val_bpb")

    def save(step):
        state = {
            "corpus": corpus,
            "val_bpb": val_bpb,
            "min_val_bpb": min_val_bpb,
            "core": core,
            "log_state": log.state(),
        }
        return training.save(step, model, optimizers, state, loader_state, finished=step == num_iterations)

    # Loop: one more turn than there are steps, to save and judge what was trained
    loader_state = {}
    for step in range(training.first_step, num_iterations + 1):
        last = step == num_iterations
        if step > training.first_step and (last or due(step, args.save_every) or training.stopping):
            path = save(step)  # before anything that could fail, such as an evaluation
            if training.stopping:
                training.exit(log)
        if due(step, args.eval_every, last):
            val_batches = val_batches or eval_batches(
                ShardSource(row_groups("val"), tokenizer, rows), eval_rows, args.max_seq_len, eval_steps, compute
            )
            val_bpb = evaluate_bpb(compiled, val_batches, token_bytes, compute)
            min_val_bpb = min(val_bpb, min_val_bpb or val_bpb)
            log.metrics(step, val_bpb=val_bpb)
            print0(f"step {step:05d} | validation bpb {val_bpb:.4f}")
        if step and core_tasks and due(step, args.core_metric_every, last):
            core = evaluate_core(model, tokenizer, compute, args.core_metric_max_per_task, core_tasks).core
            log.metrics(step, core=core)
            print0(f"step {step:05d} | CORE {core:.4f}")
        if step and due(step, args.sample_every, last) and compute.rank == 0:
            for prompt, text in greedy_samples(Engine(model, tokenizer, compute), corpus).items():
                print0(f"{prompt} >{text}")
        if last:
            break
        compute.synchronize()
        t0 = time.perf_counter()
        batch = next(loader)
        lr_mult = lr_multiplier(step / num_iterations, args.warmup_ratio, args.warmdown_ratio, args.final_lr_frac)
        set_schedule(optimizers, lr_mult, muon_momentum(step))
        result = train_step(
            compiled, optimizers, batch.micro_batches, compute, args.grad_clip, stop=training.stop_requested
        )
        compute.synchronize()
        loader_state, training.stopping = batch.state, result.stop
        log.step(step, result, args.total_batch_size, time.perf_counter() - t0, lr_mult)
    loader.close()
    log.close()
    update_meta(path, compute, val_bpb=val_bpb, min_val_bpb=min_val_bpb, core=core)

    # Report
    facts = {
        "Parameters": num_params,
        "FLOPs per token": flops_per_token,
        "Iterations": num_iterations,
        "Training tokens": total_tokens,
        "Tokens per parameter": total_tokens / num_params,
        "World size": compute.world_size,
        "Precision": str(compute.dtype).removeprefix("torch."),
    }
    outcome = {
        "Minimum validation bpb": min_val_bpb,
        "Final validation bpb": val_bpb,
        **({"CORE estimate": core} if core is not None else {}),
        "Training loss": log.loss,
        "MFU": f"{log.mfu:.2%}",
        "Tokens per second": log.tokens_per_second,
        "Total training FLOPs": f"{total_tokens * flops_per_token:.4e}",
        "Training time": f"{log.train_seconds / 60:.2f} minutes",
        "Peak memory": f"{peak_memory_mib(compute):,.0f} MiB",
        "wall_clock_seconds": time.time() - started,
    }
    get_report().log(section="Base model training", data=[vars(args), facts, outcome])


if __name__ == "__main__":
    run_script(main)
