"""
Speed of CORE on a random model: evaluate_core() against a plain reference, which runs one forward pass per example over
the full prompts of all options. Both score the same examples, and the verdicts are compared.

    python -m dev.bench.bench_core                                      # depth 4, vocabulary 8,192, all tasks
    python -m dev.bench.bench_core --depth=8 --max_per_task=8 --tasks="hellaswag|squad"

Reads tokenizer and tasks from NANOCHAT_BASE_DIR. Prints the seconds of both and their ratio for each task.
"""

import random
import time

import torch
import torch.nn.functional as F

from nanochat.cli import make_parser, parse_args, run_script
from nanochat.cluster import compute_init
from nanochat.core_eval import evaluate_core
from nanochat.dclm.tasks import load_tasks
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import get_tokenizer


@torch.inference_mode()
def plain(forward, tokenizer, task, examples, index):
    """
    (decision, verdict) on one example, by a plain forward pass. tests/test_core_eval.py uses it as the reference, too.

    `forward(ids)` returns logits (B, T, V). The decision is the options' mean losses, or the greedy predictions.
    """
    rng, others = random.Random(1234 + index), [i for i in range(len(examples)) if i != index]
    shots = [examples[i] for i in rng.sample(others, min(task.shots, len(others)))]
    item, d = examples[index], task.delimiter
    if task.kind == "multiple_choice":
        before = "".join(f"{s['query']}{d}{s['choices'][s['gold']]}\n\n" for s in shots)
        texts = [f"{before}{item['query']}{d}{choice}" for choice in item["choices"]]
    elif task.kind == "schema":
        before = "".join(f"{s['context_options'][s['gold']]}{d}{s['continuation']}\n\n" for s in shots)
        texts = [f"{before}{context}{d}{item['continuation']}" for context in item["context_options"]]
    else:
        before = "".join(f"{s['context'].strip()}{d}{s['continuation']}\n\n" for s in shots)
        texts = [f"{before}{item['context'].strip()}{d}"]
        texts = [texts[0].strip(), texts[0] + item["continuation"]]
    bos = tokenizer.get_bos_token_id()
    rows = [[bos, *tokenizer.encode(text)] for text in texts]
    shared = 0
    if task.kind == "schema":
        while all(len(row) > shared + 1 and row[-1 - shared] == rows[0][-1 - shared] for row in rows):
            shared += 1
        starts = [len(row) - shared for row in rows]
    else:
        while all(len(row) > shared and row[shared] == rows[0][shared] for row in rows):
            shared += 1
        starts = [shared] * len(rows)
    if task.kind == "language_modeling":
        rows, starts = rows[1:], starts[1:]
    longest = max(map(len, rows))
    logits = forward(torch.tensor([row + [bos] * (longest - len(row)) for row in rows]))
    losses = []
    for row, start, scores in zip(rows, starts, logits, strict=True):
        targets, scores = torch.tensor(row[start:], dtype=torch.long), scores[start - 1 : len(row) - 1]
        if task.kind == "language_modeling":
            predicted = scores.argmax(-1).tolist()
            return predicted, predicted == targets.tolist()
        losses.append(F.cross_entropy(scores, targets).item())
    return losses, losses.index(min(losses)) == item["gold"]


def print_row(label, n, plain_seconds, seconds):
    print(f"| {label} | {n} | {plain_seconds:.2f} | {seconds:.2f} | {plain_seconds / seconds:.2f} |", flush=True)


def main(argv=None):
    parser = make_parser("dev.bench.bench_core", __doc__)
    parser.add_argument("--depth", type=int, default=4, help="depth of the model (default 4)")
    parser.add_argument("--vocab_size", type=int, help="vocabulary size of the model (default: the tokenizer's)")
    parser.add_argument("--max_per_task", type=int, default=16, help="examples per task (default 16)")
    parser.add_argument("--tasks", help="e.g. 'hellaswag|squad'; default: all")
    parser.add_argument("--pass_tokens", type=int, help="padded tokens per forward pass of evaluate_core()")
    parser.add_argument("--dtype", default="float32", help="float32 or bfloat16 (default float32)")
    args = parse_args(parser, argv)
    compute, tokenizer = compute_init("cpu", args.dtype), get_tokenizer()
    torch.manual_seed(1)
    model = GPT(GPTConfig.from_depth(args.depth, 2048, args.vocab_size or tokenizer.get_vocab_size()))
    model.init_weights("cpu")
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02)
    model.to(compute.dtype).eval().requires_grad_(False)

    def forward(ids):
        with compute.autocast():
            return model(ids)

    sums, different, n = [0.0, 0.0], 0, 0
    threads = torch.get_num_threads()
    print(f"depth {args.depth}, vocabulary {model.config.vocab_size:,}, {threads} threads, {args.dtype}")
    print("| task | examples | plain, s | evaluate_core, s | ratio |\n|---|---|---|---|---|")
    for task in load_tasks(args.tasks.split("|") if args.tasks else None):
        examples = task.examples(args.max_per_task)
        t0 = time.perf_counter()
        verdicts = [plain(forward, tokenizer, task, examples, i)[1] for i in range(len(examples))]
        t1 = time.perf_counter()
        score = evaluate_core(model, tokenizer, compute, args.max_per_task, [task], pass_tokens=args.pass_tokens)
        seconds = t1 - t0, time.perf_counter() - t1
        sums, n = [a + b for a, b in zip(sums, seconds, strict=True)], n + len(examples)
        records = score.records[task.label]
        different += sum(v != record["correct"] for v, record in zip(verdicts, records, strict=True))
        print_row(task.label, len(examples), *seconds)
    print_row("all", n, *sums)
    print(f"{different} of {n} verdicts differ")


if __name__ == "__main__":
    run_script(main)
