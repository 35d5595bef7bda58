"""
Evaluate a chat model on tasks: multiple choice by the logits of the letters, all others by generated answers.

    python -m scripts.chat_eval -i sft                                    # all tasks of the model's corpus
    python -m scripts.chat_eval -i sft -a "GSM8K|SpellingBee" -x 100 --save_samples answers.jsonl
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_eval -- -i sft

ChatCORE is the mean centered accuracy of the tasks: 0 = guessing, 1 = all correct. Writes a section of the report.
"""

import sys
import time
from functools import partial

from nanochat.cli import FLAG, add_model_flags, choose_source, make_parser, parse_args, path, run_script
from nanochat.cluster import compute_init
from nanochat.common import UserError, check_file, print0, require, write_jsonl
from nanochat.tracking import erase_line, progress_printer


def build_parser():
    parser = make_parser("scripts.chat_eval", __doc__)
    add_model_flags(parser, source="")
    add = parser.add_argument
    add("-a", "--task_name", help="tasks, e.g. 'ARC-Easy|mine.py:Mine' (default: all tasks of the model's corpus)")
    add("-x", "--max_problems", type=int, help="problems per task (default: all)")
    add("-n", "--num_samples", type=int, default=1, help="answers per problem; the score is pass@1 over them")
    add("-t", "--temperature", type=float, default=0.0, help="sampling temperature (default 0 = greedy)")
    add("-k", "--top_k", type=int, default=50, help="sample from the k most likely tokens, 0 = off (default 50)")
    add("-m", "--max_new_tokens", type=int, default=512, help="maximum length of an answer in tokens (default 512)")
    add("-b", "--batch_size", type=int, default=8, help="multiple-choice problems per forward pass (default 8)")
    add("--max_rows", type=int, default=64, help="answers generated at once (default 64)")
    add("--seed", type=int, default=42, help="seed of the sampling (default 42)")
    add("--data_seed", type=int, default=0, help="seed of tasks that generate their problems (default 0)")
    add("--unsafe_exec", **FLAG, help="run HumanEval's programs even if this machine cannot isolate them")
    add("--save_samples", type=path, metavar="FILE", help="write every problem, answer and verdict to this .jsonl")
    return parser


def check_flags(args):
    """Raises UserError for an unknown task, a number out of range or a missing folder, before the model is loaded."""
    from nanochat.engine import Request
    from nanochat.execution import check_level
    from tasks.mixtures import find_task

    for name in args.task_name.split("|") if args.task_name else ():
        find_task(name)
        if name == "HumanEval":
            check_level(args.level)
    for name in ("max_problems", "batch_size", "max_rows"):
        value = getattr(args, name)
        require(value is None or value >= 1, f"--{name}={value}: expected at least 1")
    Request([0], args.max_new_tokens, args.temperature, args.top_k, args.seed, args.num_samples)
    check_file("--save_samples", args.save_samples)


def describe(name, score, seconds):
    """One line of results: accuracy with its 95 % confidence interval, pass@k for several samples, and speed."""
    n, samples = len(score.records), len(score.records[0]["verdicts"])
    ks = [2**i for i in range(1, samples.bit_length()) if 2**i < samples] + [samples] if samples > 1 else []
    pass_at = "".join(f", pass@{k} {score.pass_at(k):.2%}" for k in ks)
    low, high = score.interval
    return f"{name}: {score.accuracy:.2%} [{low:.1%}, {high:.1%}]{pass_at} ({n:,} problems, {n / seconds:.1f}/s)"


def transcripts(score, n=32):
    """A page of `n` evenly spaced conversations with their answers, unedited, as markdown."""
    blocks = ["### Conversations"]
    for record in score.records[:: max(1, len(score.records) // n)][:n]:
        turns = [*record["messages"][:-1], {"role": "assistant", "content": record["answers"][0]}]
        lines = [f"{'    > ' if turn['role'] == 'user' else '    '}{turn['content']}" for turn in turns]
        verdict = "right" if record["verdicts"][0] else "wrong"
        blocks.append(f"{record['kind']}, {verdict}:\n\n" + "\n".join(lines).replace("\n#", "\n    #"))
    return "\n\n".join(blocks)


def main(argv=None):
    args = parse_args(build_parser(), argv)
    args.level = "basic" if args.unsafe_exec else "strict"
    check_flags(args)
    choose_source(args, ("sft", "rl", "mid"))
    started = time.time()
    from nanochat import chat_eval, execution, report
    from nanochat.checkpoint_manager import load_model
    from nanochat.engine import Engine
    from tasks.mixtures import EVAL_TASKS, find_task

    # Machine and model
    compute = compute_init(args.device_type, args.dtype, args.seed)
    model, tokenizer, meta = load_model(args.source, compute, "eval", args.model_tag, args.step, quantize=args.quantize)
    engine, corpus = Engine(model, tokenizer, compute), meta["corpus"]

    # Tasks
    all_names = [name for name, task in EVAL_TASKS.items() if task.corpus in (corpus, "both")]
    names = args.task_name.split("|") if args.task_name else all_names
    if "HumanEval" in names:
        try:
            execution.check_level(args.level)
            print0(f"HumanEval's programs run behind {', '.join(execution.layers())}")
        except UserError as e:  # without -a (see check_flags), skip HumanEval and evaluate the other tasks
            names.remove("HumanEval")
            print0(f"warning: HumanEval is skipped: {e}", file=sys.stderr)
    tasks = {name: find_task(name).make(seed=args.data_seed, corpus=corpus, level=args.level) for name in names}
    flags = "max_problems num_samples max_new_tokens temperature top_k batch_size max_rows seed".split()
    settings = {name: getattr(args, name) for name in flags}
    scores, progress, clear_line = {}, progress_printer("problems"), erase_line()
    for name, task in tasks.items():
        t0 = time.perf_counter()
        scores[name] = chat_eval.evaluate_task(task, engine, progress=partial(progress, name), **settings)
        print0(clear_line + describe(name, scores[name], time.perf_counter() - t0))

    # Results
    accuracies = {name: score.accuracy for name, score in scores.items()}
    intervals = {f"{name}, 95 % interval": "{:.4f} to {:.4f}".format(*score.interval) for name, score in scores.items()}
    clock = {"wall_clock_seconds": time.time() - started}
    facts, metrics = dict(accuracies), {"task_scores": accuracies, **clock}
    kinds = {f"{name}, {kind}": share for name, score in scores.items() for kind, share in score.by_kind.items()}
    kinds |= {f"{name}, repetitive": s.repetition for name, s in scores.items() if s.repetition is not None}
    for name, share in kinds.items():
        print0(f"{name}: {share:.2%}")
    pages = [transcripts(score) for score in scores.values() if score.by_kind]
    if len(scores) > 1:
        baselines = {name: task.baseline for name, task in tasks.items()}
        facts["ChatCORE"] = metrics["chat_core"] = chat_eval.chat_core(accuracies, baselines)
        print0(f"ChatCORE of these {len(scores)} tasks: {metrics['chat_core']:.4f}")
    if args.save_samples and compute.writes:
        records = ({"task": name, **record} for name, score in scores.items() for record in score.records)
        write_jsonl(args.save_samples, records)
    flags = vars(args) | {"model_tag": meta["model_tag"], "step": meta["step"]}
    report.get_report().log(f"Chat evaluation {args.source}", [flags, facts, kinds, intervals, clock, *pages], metrics)


if __name__ == "__main__":
    run_script(main)
