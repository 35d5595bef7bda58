"""
A shared page in Chromium, against the engine with the same int8 weights: greedy answers, token ids, speed on one core.

    python -m dev.bench.bench_share -i rl                # the newest rl model of NANOCHAT_BASE_DIR

Needs playwright and chromium. Prompts are the questions of dev/people_dev.txt; strings are random, of all kinds. Where
answers differ, the gap between the two best logits is printed.
"""

import os
import random
import shutil
import tempfile
import time
from pathlib import Path

import torch

from nanochat import share
from nanochat.checkpoint_manager import load_model
from nanochat.cli import add_model_flags, make_parser, parse_args, run_script
from nanochat.cluster import compute_init
from nanochat.engine import Engine

ANSWER = """async ids => {
    const tokens = [];
    for await (const {id} of generate(model, tokenizer, ids, {temperature: 0})) tokens.push(id);
    return tokens; }"""
PLANES = [range(0x20, 0x7F), range(0x300), range(0xD800), range(0xE000, 0x110000)]


def random_string(rng):
    codes = (rng.choice(rng.choice(PLANES)) for _ in range(rng.randint(0, 60)))
    return "".join(
        rng.choice([chr(code), " ", "\n", "'s", "12"]) if rng.random() < 0.5 else chr(code) for code in codes
    )


def main(argv=None):
    parser = make_parser("dev.bench.bench_share", __doc__)
    add_model_flags(parser)
    parser.add_argument("--prompts", type=int, default=100, help="greedy answers to compare")
    parser.add_argument("--strings", type=int, default=10_000, help="strings whose ids are compared")
    args = parse_args(parser, argv)
    from playwright.sync_api import sync_playwright

    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # of this process and of the browser
    compute = compute_init("cpu", "float32")
    torch.set_num_threads(1)
    model, tokenizer, _ = load_model(args.source, compute, "eval", args.model_tag, args.step, quantize="int8")
    engine, rng = Engine(model, tokenizer, compute), random.Random(0)
    lines = (Path(__file__).parents[1] / "people_dev.txt").read_text(encoding="utf-8").splitlines()
    questions = [line[2:] for line in lines if line.startswith("? ")][: args.prompts]
    chats = ({"messages": [{"role": "user", "content": question}]} for question in questions)
    prompts = [tokenizer.render_for_completion(chat) for chat in chats]
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        file = Path(folder) / "model.html"
        file.write_text(share.page(model, tokenizer, "bench"), encoding="utf-8")
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        context = browser.new_context(offline=True)
        page = context.new_page()
        start = time.perf_counter()
        page.goto(file.as_uri())
        page.wait_for_selector("#send:enabled")
        print(f"page: {file.stat().st_size / 1e6:.1f} MB, ready after {time.perf_counter() - start:.1f} s")
        strings = [random_string(rng) for _ in range(args.strings)]
        ids = page.evaluate("strings => strings.map(text => tokenizer.encode(text))", strings)
        equal = sum(a == b for a, b in zip(ids, tokenizer.encode(strings), strict=True))
        print(f"ids: {equal:,} of {len(strings):,} strings equal")
        times, tokens, equal = {"page": 0.0, "engine": 0.0}, {"page": 0, "engine": 0}, 0
        for prompt in prompts:
            start = time.perf_counter()
            theirs = page.evaluate(ANSWER, prompt)
            middle = time.perf_counter()
            ours = [column[0] for column, _ in engine.generate(prompt, temperature=0)]
            times["page"] += middle - start
            times["engine"] += time.perf_counter() - middle
            tokens["page"] += len(theirs)
            tokens["engine"] += len(ours)
            equal += theirs == ours
            if theirs != ours:
                n = next(i for i, pair in enumerate(zip(theirs, ours, strict=False)) if pair[0] != pair[1])
                best = engine.next_logits([prompt + ours[:n]])[0].topk(2).values
                print(f"  differs at token {n}; the best logits are {best[0] - best[1]:.1e} apart")
        print(f"greedy answers: {equal} of {len(prompts)} equal, {tokens['page']:,} tokens")
        page_speed, engine_speed = (tokens[name] / times[name] for name in ("page", "engine"))
        print(f"one core, prompts included: page {page_speed:.0f} tokens/s, engine {engine_speed:.0f}")
        browser.close()


if __name__ == "__main__":
    run_script(main)
