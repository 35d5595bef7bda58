"""
Score a chat model on tasks with right answers: choice questions by the letters' logits, all others by what it writes.

    python -m scripts.chat_eval -i sft                                    # all tasks of the world it was trained on
    python -m scripts.chat_eval -i sft -a "GSM8K|SpellingBee" -x 100 --save_samples answers.jsonl
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_eval -- -i sft

ChatCORE is the mean over the tasks of the accuracy centred on guessing. Writes the report's section.
"""

import json
import sys
import time
from functools import partial
from pathlib import Path

from nanochat.cli import add_model_flags, boolean, make_parser, parse_args, run_script
from nanochat.common import UserError, atomic_path, compute_init, print0
from nanochat.tracking import progress_printer


def build_parser():
    parser = make_parser("scripts.chat_eval", __doc__)
    add_model_flags(parser)
    add = parser.add_argument
    add("-a", "--task_name", help="tasks, e.g. 'ARC-Easy|mine.py:Mine' (default: all of the data it was trained on)")
    add("-x", "--max_problems", type=int, help="only this many problems of each task (default: all)")
    add("-n", "--num_samples", type=int, default=1, help="answers per problem; the score is pass@1 over them")
    add("-t", "--temperature", type=float, default=0.0, help="0 = always the likeliest token (default)")
    add("-k", "--top_k", type=int, default=50, help="sample from the k likeliest tokens, 0 = from all (default 50)")
    add("-m", "--max_new_tokens", type=int, default=512, help="longest answer, in tokens (default 512)")
    add("-b", "--batch_size", type=int, default=8, help="choice problems per forward pass (default 8)")
    add("--max_rows", type=int, default=64, help="answers written at once (default 64)")
    add("--seed", type=int, default=42, help="of the sampling (default 42)")
    add("--data_seed", type=int, default=0, help="of the problems that are made, not read (default 0)")
    unsafe = "run HumanEval's programs even where the kernel cannot isolate them"
    add("--unsafe_exec", type=boolean, nargs="?", const=True, default=False, help=unsafe)
    add("--save_samples", metavar="FILE", help="write every problem, answer and verdict to this .jsonl")
    return parser


def check_flags(args):
    """Raises UserError for an unknown task, a number out of range or a folder that is not there, before loading."""
    from nanochat.engine import Request
    from nanochat.execution import check_level
    from tasks.mixtures import find_task

    names = args.task_name.split("|") if args.task_name else []
    for name in names:
        find_task(name)
    if "HumanEval" in names:
        check_level(args.level)
    for name in ("max_problems", "batch_size", "max_rows"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name}={value}: expected at least 1")
    Request([0], args.max_new_tokens, args.temperature, args.top_k, args.seed, args.num_samples)
    if args.save_samples and not Path(args.save_samples).absolute().parent.is_dir():
        raise UserError(f"--save_samples={args.save_samples}: there is no such folder")


def describe(name, score, seconds):
    """One line: accuracy with its 95 % confidence interval, pass@k where there is more than one sample, speed."""
    n, samples = len(score.records), len(score.records[0]["verdicts"])
    ks = [2**i for i in range(1, samples.bit_length()) if 2**i < samples] + [samples] if samples > 1 else []
    more = "".join(f", pass@{k} {score.pass_at(k):.2%}" for k in ks)
    low, high = score.interval
    return f"{name}: {score.accuracy:.2%} [{low:.1%}, {high:.1%}]{more} ({n:,} problems, {n / seconds:.1f}/s)"


def main(argv=None):
    args = parse_args(build_parser(), argv)
    args.level = "basic" if args.unsafe_exec else "strict"
    check_flags(args)
    started = time.time()
    from nanochat.chat_eval import chat_core, evaluate_task
    from nanochat.checkpoint_manager import load_model
    from nanochat.engine import Engine
    from nanochat.execution import check_level, layers
    from nanochat.report import get_report
    from tasks.mixtures import EVAL_TASKS, find_task

    # Machine and model
    compute = compute_init(args.device_type, args.dtype, args.seed)
    model, tokenizer, meta = load_model(args.source, compute, args.model_tag, args.step, quantize=args.quantize)
    engine, corpus = Engine(model, tokenizer, compute), meta["corpus"]

    # Tasks: those asked for, or all that belong to the data
    names = [name for name, task in EVAL_TASKS.items() if task.corpus in (corpus, "both")]
    if args.task_name:
        names = list(dict.fromkeys(args.task_name.split("|")))
    if "HumanEval" in names:
        try:
            check_level(args.level)
            print0(f"HumanEval's programs run behind {', '.join(layers())}")
        except UserError as e:  # in nobody's -a: the other tasks are scored all the same
            names.remove("HumanEval")
            print0(f"warning: HumanEval is left out: {e}", file=sys.stderr)
    tasks = {name: find_task(name) for name in names}
    scores, lines, progress = {}, [], progress_printer("problems")
    for name in tasks:
        task = tasks[name].make(seed=args.data_seed, corpus=corpus, level=args.level)
        t0 = time.perf_counter()
        score = scores[name] = evaluate_task(
            task,
            engine,
            max_problems=args.max_problems,
            num_samples=args.num_samples,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_k=args.top_k,
            batch_size=args.batch_size,
            max_rows=args.max_rows,
            seed=args.seed,
            progress=partial(progress, name),
        )
        print0(("\r\x1b[K" if sys.stdout.isatty() else "") + describe(name, score, time.perf_counter() - t0))
        lines += [json.dumps({"task": name, **record}, ensure_ascii=False) + "\n" for record in score.records]

    # Results
    accuracies = {name: score.accuracy for name, score in scores.items()}
    core = {}
    if len(scores) > 1:
        core = {"ChatCORE": chat_core(accuracies, {name: task.baseline for name, task in tasks.items()})}
        print0(f"ChatCORE over these {len(scores)} tasks: {core['ChatCORE']:.4f}")
    if args.save_samples and compute.rank == 0:
        with atomic_path(args.save_samples) as draft:
            draft.write_text("".join(lines), encoding="utf-8")
    intervals = {f"{name}, 95 % interval": "{:.4f} to {:.4f}".format(*score.interval) for name, score in scores.items()}
    outcome = [accuracies, core, intervals, {"wall_clock_seconds": time.time() - started}]
    get_report().log(section=f"Chat evaluation {args.source}", data=[vars(args), *outcome])


if __name__ == "__main__":
    run_script(main)
