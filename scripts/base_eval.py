"""
CORE, the metric of DCLM, of a base model: 22 tasks that need no chat, centred on guessing; GPT-2 (1.6 B) has 0.2565.

    python -m scripts.base_eval --max-per-task=16 --save_samples answers.jsonl
    python -m scripts.base_eval --hf-path openai-community/gpt2
    torchrun --standalone --nproc_per_node=8 -m scripts.base_eval

Fetches the tasks once. Writes base_eval/<model>.csv and the report's section, for all 22 tasks only.
"""

import csv
import json
import re
import sys
import time
from pathlib import Path

from nanochat.cli import make_parser, parse_args, run_script
from nanochat.common import UserError, atomic_path, base_dir, choose_device, compute_init, print0
from nanochat.tracking import progress_printer


def build_parser():
    p = make_parser("scripts.base_eval", __doc__)
    p.add_argument("--hf_path", help="a Hugging Face model instead of ours: a name on the Hub, or a folder")
    p.add_argument("--max_per_task", type=int, default=-1, help="only this many examples of each task; -1 = all")
    p.add_argument("--model_tag", help="folder name of the checkpoint; default: the deepest")
    p.add_argument("--step", type=int, help="step of the checkpoint; default: the newest")
    p.add_argument("--tasks", help="only these, e.g. 'copa|winograd' (default: all, which is what CORE is)")
    p.add_argument("--device_type", default="", help="cuda, mps or cpu; empty = the best one here")
    p.add_argument("--dtype", default="", help="float32 or bfloat16; empty = float32 on a CPU, else what suits the GPU")
    p.add_argument("--pass_tokens", type=int, help="tokens per forward pass; less takes less memory")
    p.add_argument("--save_samples", metavar="FILE", help="write every example, answer and verdict to this .jsonl")
    return p


def check_flags(args):
    """Raises UserError for numbers out of range, flags that exclude each other, or a folder that is not there."""
    if args.max_per_task < 1 and args.max_per_task != -1:
        raise UserError(f"--max_per_task={args.max_per_task}: expected at least 1, or -1 for all")
    if args.pass_tokens is not None and args.pass_tokens < 1:
        raise UserError(f"--pass_tokens={args.pass_tokens}: expected at least 1")
    if args.hf_path is not None and (args.model_tag or args.step is not None):
        raise UserError("--hf_path names another model than --model_tag and --step; give one or the other")
    if args.save_samples and not Path(args.save_samples).absolute().parent.is_dir():
        raise UserError(f"--save_samples={args.save_samples}: there is no such folder")


def main(argv=None):
    args = parse_args(build_parser(), argv)
    check_flags(args)
    started = time.time()
    from nanochat.checkpoint_manager import load_model
    from nanochat.core_eval import CoreScore, evaluate_core
    from nanochat.dclm.hf_models import load_hf
    from nanochat.dclm.tasks import load_tasks
    from nanochat.report import get_report

    # Machine and model
    # On a CPU float32, as in the reference, even where bfloat16 is quicker: its rounding decides between close options.
    exact = "" if choose_device(args.device_type) == "cuda" else "float32"
    compute = compute_init(args.device_type, args.dtype or exact)
    if args.hf_path is not None:
        model, tokenizer = load_hf(args.hf_path, compute)
        slug = re.sub(r"[^\w.-]+", "-", args.hf_path).strip("-.")
        name, section = slug, f"Base model evaluation of {slug}"
    else:
        model, tokenizer, meta = load_model("base", compute, args.model_tag, args.step)
        name, section = f"base_model_{meta['step']:06d}", "Base model evaluation"

    # Tasks: all are read before the first is scored
    bytes_shown = progress_printer("bytes")
    labels = args.tasks.split("|") if args.tasks else None
    tasks = load_tasks(labels, lambda done, total: bytes_shown("eval_bundle.zip", done, total))
    progress, records = progress_printer("examples"), {}
    print0(f"{name}: {len(tasks)} tasks, {compute.device}, {str(compute.dtype).removeprefix('torch.')}")
    for task in tasks:
        t0 = time.perf_counter()
        score = evaluate_core(model, tokenizer, compute, args.max_per_task, [task], progress, args.pass_tokens)
        seconds, n = time.perf_counter() - t0, len(score.records[task.label])
        accuracy, centered = score.accuracies[task.label], score.centered[task.label]
        print0(
            ("\r\x1b[K" if sys.stdout.isatty() else "") + f"{task.label} ({task.kind}, {task.shots} shots): "
            f"accuracy {accuracy:.4f}, centered {centered:.4f} ({n:,} examples, {n / seconds:.1f}/s)"
        )
        records |= score.records
    score = CoreScore(records, {task.label: task.baseline for task in tasks})

    # Results
    if args.save_samples and compute.rank == 0:
        lines = [
            json.dumps({"task": t.label, **record, "example": example}, ensure_ascii=False) + "\n"
            for t in tasks
            for record, example in zip(records[t.label], t.examples(args.max_per_task), strict=True)
        ]
        with atomic_path(args.save_samples) as draft:
            draft.write_text("".join(lines), encoding="utf-8")
    if labels:
        print0(
            f"mean of the centered accuracies of these {len(tasks)} tasks: {score.core:.4f} (CORE needs all of them)"
        )
        return
    of = f" on at most {args.max_per_task:,} examples a task" if args.max_per_task > 0 else ""
    print0(f"CORE{of}: {score.core:.4f}")
    if compute.rank == 0:
        path = base_dir() / "base_eval" / f"{name}.csv"
        write_csv(path, score)
        print0(f"written to {path}")
    facts = {"Model": name, "CORE metric": score.core, **score.centered}
    outcome = {"wall_clock_seconds": time.time() - started} if args.hf_path is None else {}
    get_report().log(section=section, data=[vars(args), facts, outcome])


def write_csv(path, score):
    """Task, Accuracy, Centered; the last row is CORE."""
    with atomic_path(path) as draft, open(draft, "w", encoding="utf-8", newline="") as f:
        table = csv.writer(f, lineterminator="\n")
        table.writerow(["Task", "Accuracy", "Centered"])
        for label, accuracy in score.accuracies.items():
            table.writerow([label, f"{accuracy:.6f}", f"{score.centered[label]:.6f}"])
        table.writerow(["CORE", "", f"{score.core:.6f}"])


if __name__ == "__main__":
    run_script(main)
