"""
Evaluate a base model on CORE (DCLM): 22 in-context learning tasks, centered on guessing. GPT-2 (1.6B) scores 0.2565.

    python -m scripts.base_eval --max-per-task=16 --save_samples answers.jsonl
    python -m scripts.base_eval --hf-path openai-community/gpt2
    torchrun --standalone --nproc_per_node=8 -m scripts.base_eval

Downloads the tasks once. Writes base_eval/<model>.csv and a section of the report, unless --tasks selects some tasks.
"""

import csv
import re
import time

from nanochat.cli import add_checkpoint_flags, make_parser, parse_args, path, run_script
from nanochat.cluster import compute_init
from nanochat.common import atomic_path, base_dir, check_file, choose_device, print0, require, write_jsonl
from nanochat.tracking import erase_line, progress_printer


def build_parser():
    p = make_parser("scripts.base_eval", __doc__)
    p.add_argument("--hf_path", type=path, help="evaluate this Hugging Face model: a name on the Hub, or a folder")
    add_checkpoint_flags(p, dtype="float32; on CUDA bfloat16 where the hardware has it")
    p.add_argument("--max_per_task", type=int, default=-1, help="examples per task; -1 = all")
    p.add_argument("--tasks", help="only these tasks, e.g. 'copa|winograd' (default: all)")
    p.add_argument("--pass_tokens", type=int, help="maximum padded tokens per forward pass; limits memory")
    p.add_argument("--save_samples", type=path, metavar="FILE", help="write examples and verdicts to this .jsonl")
    return p


def main(argv=None):
    args = parse_args(build_parser(), argv)
    limit, pass_tokens, started = args.max_per_task, args.pass_tokens, time.time()
    require(limit >= 1 or limit == -1, f"--max_per_task={limit}: expected at least 1, or -1 for all")
    require(pass_tokens is None or pass_tokens >= 1, f"--pass_tokens={pass_tokens}: expected at least 1")
    conflict = args.hf_path is not None and (args.model_tag or args.step is not None or args.quantize)
    require(not conflict, "give either --hf_path or --model_tag, --step and --quantize, not both")
    check_file("--save_samples", args.save_samples)
    from nanochat import core_eval, report
    from nanochat.checkpoint_manager import load_model
    from nanochat.dclm.hf_models import load_hf
    from nanochat.dclm.tasks import load_tasks

    # Machine and model
    # float32 on a CPU, as in the reference, even if bfloat16 is faster: rounding can change which option is chosen.
    default_dtype = "" if choose_device(args.device_type) == "cuda" else "float32"
    compute = compute_init(args.device_type, args.dtype or default_dtype)
    if args.hf_path is None:
        model, tokenizer, meta = load_model("base", compute, "eval", args.model_tag, args.step, quantize=args.quantize)
        name, section = f"base_model_{meta['step']:06d}", "Base model evaluation"
    else:
        model, tokenizer = load_hf(args.hf_path, compute)
        name = re.sub(r"[^\w.-]+", "-", args.hf_path).strip("-.")
        section = f"Base model evaluation of {name}"

    # Tasks; all files are read before the first task is scored
    show_download, show_examples = progress_printer("bytes"), progress_printer("examples")
    labels = [label.strip() for label in args.tasks.split("|")] if args.tasks else None
    tasks = load_tasks(labels, lambda done, total: show_download("eval_bundle.zip", done, total))
    print0(f"{name}: {len(tasks)} tasks, {compute.device}, {str(compute.dtype).removeprefix('torch.')}")
    records, clear_line = {}, erase_line()
    for task in tasks:
        t0 = time.perf_counter()
        score = core_eval.evaluate_core(model, tokenizer, compute, limit, [task], show_examples, pass_tokens)
        seconds, n = time.perf_counter() - t0, len(score.records[task.label])
        accuracy, centered = score.accuracies[task.label], score.centered[task.label]
        results = f"accuracy {accuracy:.4f}, centered {centered:.4f} ({n:,} examples, {n / seconds:.1f}/s)"
        print0(f"{clear_line}{task.label} ({task.kind}, {task.shots} shots): {results}")
        records |= score.records
    score = core_eval.CoreScore(records, {task.label: task.baseline for task in tasks})

    # Results
    if args.save_samples and compute.writes:
        examples = [example for task in tasks for example in task.examples(limit)]
        lines = [{"task": label, **record} for label in records for record in records[label]]
        write_jsonl(args.save_samples, (a | {"example": b} for a, b in zip(lines, examples, strict=True)))
    if labels:
        return print0(f"mean centered accuracy of these {len(tasks)} tasks: {score.core:.4f} (CORE needs all tasks)")
    scope = f" on at most {limit:,} examples per task" if limit > 0 else ""
    print0(f"CORE{scope}: {score.core:.4f}")
    if compute.writes:
        csv_path = base_dir() / "base_eval" / f"{name}.csv"
        rows = [[label, f"{x:.6f}", f"{score.centered[label]:.6f}"] for label, x in score.accuracies.items()]
        table = [["Task", "Accuracy", "Centered"], *rows, ["CORE", "", f"{score.core:.6f}"]]
        with atomic_path(csv_path) as draft, open(draft, "w", encoding="utf-8", newline="") as f:
            csv.writer(f, lineterminator="\n").writerows(table)
        print0(f"written to {csv_path}")
    facts = {"Model": name, "CORE metric": score.core, **score.centered}
    # The report sums the wall clock times of a training run; scoring a Hugging Face model is not part of it.
    clock = {"wall_clock_seconds": time.time() - started} if args.hf_path is None else {}
    report.get_report().log(section, [vars(args), facts, clock], {"core": score.core, **clock})


if __name__ == "__main__":
    run_script(main)
