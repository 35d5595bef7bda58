"""
Speed of evaluation by generated answers: all problems in one batch, against one problem at a time.

    python -m dev.bench.bench_chat_eval -i sft --task=PocketSums --problems=200 --num_samples=4

Every problem gets `num_samples` answers. One problem at a time is measured with our engine, whose verdicts are compared
with those of the batch; and, on a tenth of the problems, with the plain PyTorch backend and with transformers'
generate() (greedy, without a calculator). Prints milliseconds per problem.
"""

import time

import torch

from nanochat.chat_eval import evaluate_task
from nanochat.checkpoint_manager import load_model
from nanochat.cli import add_model_flags, make_parser, parse_args, run_script
from nanochat.cluster import compute_init
from nanochat.common import require
from nanochat.engine import Engine, TorchBackend, visible_text
from nanochat.hf import hf_config, hf_weights
from tasks.mixtures import find_task


def one_at_a_time(task, engine, args, problems=None):
    """Verdicts [problem][sample] on the first problems; the batch is one problem's answers."""
    verdicts = []
    for i in range(problems or args.problems):
        problem = task[i]
        prompt = engine.tokenizer.render_for_completion(problem)
        settings = {"temperature": args.temperature, "top_k": 50, "seed": 42 + i, "max_tokens": args.max_new_tokens}
        answers, _ = engine.generate_batch(prompt, args.num_samples, **settings)
        texts = [visible_text(engine.tokenizer, answer[len(prompt) :]) for answer in answers]
        verdicts.append([bool(v) for v in task.evaluate_many([(problem, text) for text in texts])])
    return verdicts


def batch(task, engine, args):
    """Verdicts [problem][sample] on all problems, answered in one batch."""
    score = evaluate_task(
        task,
        engine,
        max_problems=args.problems,
        num_samples=args.num_samples,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        max_rows=args.max_rows,
    )
    return [record["verdicts"] for record in score.records]


def transformers_seconds(model, engine, problems, num_samples, max_new_tokens):
    """Mean seconds per problem of transformers' generate(), in the precision of the model's weights."""
    from transformers import NanoChatConfig, NanoChatForCausalLM

    hf = NanoChatForCausalLM(NanoChatConfig(**hf_config(model.config))).eval().to(model.lm_head.weight.dtype)
    hf.load_state_dict(hf_weights(model))
    start = time.perf_counter()
    for problem in problems:
        ids = torch.tensor([engine.tokenizer.render_for_completion(problem)]).repeat(num_samples, 1)
        hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False,
                    eos_token_id=list(engine.terminals), pad_token_id=0)  # fmt: skip
    return (time.perf_counter() - start) / len(problems)


def main(argv=None):
    parser = make_parser("dev.bench.bench_chat_eval", __doc__)
    add_model_flags(parser, "sft")
    parser.add_argument("--task", default="PocketSums", help="task to evaluate (default PocketSums)")
    parser.add_argument("--problems", type=int, default=200, help="number of problems (default 200)")
    parser.add_argument("--num_samples", type=int, default=4, help="answers per problem (default 4)")
    parser.add_argument("--max_rows", type=int, default=64, help="answers generated at once (default 64)")
    parser.add_argument("--temperature", type=float, default=0.0, help="sampling temperature; 0 = greedy")
    parser.add_argument("--max_new_tokens", type=int, default=160, help="maximum length of an answer in tokens")
    parser.add_argument("--repeats", type=int, default=3, help="measurements, of which the fastest counts (default 3)")
    args = parse_args(parser, argv)
    for name in ("problems", "max_rows", "repeats"):
        require(getattr(args, name) >= 1, f"--{name}={getattr(args, name)}: expected at least 1")
    compute = compute_init(args.device_type, args.dtype)
    model, tokenizer, meta = load_model(args.source, compute, "eval", args.model_tag, args.step, quantize=args.quantize)
    engine = Engine(model, tokenizer, compute)
    task = find_task(args.task).make(corpus=meta["corpus"])
    seconds, verdicts = {}, {}
    for _ in range(args.repeats):
        for name, answer in {"batch": batch, "one problem at a time": one_at_a_time}.items():
            start = time.perf_counter()
            verdicts[name] = answer(task, engine, args)
            per_problem = (time.perf_counter() - start) / args.problems
            seconds[name] = min(per_problem, seconds.get(name, per_problem))
    n = max(1, args.problems // 10)
    torch_engine = Engine(model, tokenizer, compute, backend=TorchBackend(model, compute))
    start = time.perf_counter()
    one_at_a_time(task, torch_engine, args, n)
    seconds["one problem at a time, PyTorch"] = (time.perf_counter() - start) / n
    with torch.inference_mode():
        problems, settings = [task[i] for i in range(n)], (args.num_samples, args.max_new_tokens)
        seconds["one problem at a time, transformers"] = transformers_seconds(model, engine, problems, *settings)
    n_different = sum(a != b for a, b in zip(*verdicts.values(), strict=True))
    answers = f"{args.num_samples} answers at temperature {args.temperature}"
    print(f"{args.task}, {args.problems} problems of {answers}, {torch.get_num_threads()} threads\n")
    print("| variant | ms per problem | relative to batch |\n|---|---|---|")
    for name, value in seconds.items():
        print(f"| {name} | {1000 * value:.1f} | {value / seconds['batch']:.2f} |")
    print(f"\nverdicts that differ between batch and one problem at a time: {n_different}")


if __name__ == "__main__":
    run_script(main)
