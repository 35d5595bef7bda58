"""
Our engine against transformers' NanoChat class with the same weights, and against the speed of the memory.

    python -m dev.bench.bench_engine                    # depth 12, vocabulary 32,768
    python -m dev.bench.bench_engine --depth=4 --vocab_size=1024 --repeats=5

Decoding: tokens per second after a short prompt, with one row, eight and sixteen, in float32 and bfloat16 and with int8
weights, against `generate` with its dynamic and its static cache; and as a share of (memory bandwidth, as a large sum
measures it, divided by the bytes of the weights that each token reads). Prefill: tokens per second of a prompt of 512
up to its first token. Second turn: milliseconds to the first token after 1,000 of which 980 were there before, with and
without reuse. The programs take turns; prints medians.
"""

import statistics
import time

import torch

from nanochat.cli import make_parser, parse_args, run_script
from nanochat.engine import Engine, Request
from nanochat.gpt import GPT, GPTConfig
from nanochat.hf import hf_config, hf_weights
from nanochat.inference.cpu_backend import quantize

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
NEW = 64  # tokens generated in a measurement


class NoText:
    """The engine asks a tokenizer only for special tokens; these do not occur."""

    def encode_special(self, name):
        return -1

    def get_bos_token_id(self):
        return -1


def random_model(depth, vocab_size):
    torch.manual_seed(1)
    model = GPT(GPTConfig.from_depth(depth, 2048, vocab_size))
    model.init_weights("cpu")
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02)
    return model.eval().requires_grad_(False)


def bandwidth():
    """GB/s that a sum over 1 GiB reads: the best of five."""
    x = torch.zeros(2**28)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        x.sum()
        seconds.append(time.perf_counter() - start)
    return x.numel() * 4 / min(seconds) / 1e9


def ours(engine, rows):
    """Tokens per second of decoding, by all rows together."""
    loop = engine.decode_loop(rows)
    loop.submit(Request(list(range(1, 17)), max_tokens=NEW + 1, temperature=0, num_samples=rows))
    loop.step()  # with the prompt
    start = time.perf_counter()
    while loop.busy:
        loop.step()
    return rows * NEW / (time.perf_counter() - start)


def seconds_to_first(loop, tokens):
    start = time.perf_counter()
    loop.submit(Request(tokens, max_tokens=1, temperature=0))
    while loop.busy:
        loop.step()
    return time.perf_counter() - start


def prefill(engine, n):
    return n / seconds_to_first(engine.decode_loop(1), list(range(1, n + 1)))


def second_turn(model, prefix_tokens):
    """Milliseconds to the first token after 1,000 tokens of which all but 20 were in the turn before."""
    loop = Engine(model, NoText(), prefix_tokens=prefix_tokens).decode_loop(1)
    seconds_to_first(loop, list(range(1, 981)))
    return 1000 * seconds_to_first(loop, list(range(1, 1001)))


def theirs(hf, rows, cache):
    settings = dict(do_sample=False, cache_implementation=cache, eos_token_id=None, pad_token_id=0)
    ids = torch.arange(1, 17).repeat(rows, 1)

    def seconds(n):
        start = time.perf_counter()
        hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n, **settings)
        return time.perf_counter() - start

    first = seconds(1)
    return rows * NEW / (seconds(NEW + 1) - first)


def theirs_prefill(hf, n):
    start = time.perf_counter()
    hf.generate(torch.arange(1, n + 1)[None], max_new_tokens=1, do_sample=False, eos_token_id=None, pad_token_id=0)
    return n / (time.perf_counter() - start)


def main():
    parser = make_parser("dev.bench.bench_engine", __doc__)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--vocab_size", type=int, default=32_768)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--skip_transformers", action="store_true")
    args = parse_args(parser)
    torch.set_grad_enabled(False)
    runs, taken, limits = {}, {}, []
    for name, dtype in DTYPES.items():
        mine = random_model(args.depth, args.vocab_size).to(dtype)
        read = sum(p.numel() for name, p in mine.named_parameters() if "wte" not in name)
        engine = Engine(mine, NoText())
        runs[name, "1 row", "ours"] = lambda e=engine: ours(e, 1)
        runs[name, "8 rows", "ours"] = lambda e=engine: ours(e, 8)
        runs[name, "16 rows", "ours"] = lambda e=engine: ours(e, 16)
        runs[name, "prefill 512", "ours"] = lambda e=engine: prefill(e, 512)
        runs[name, "second turn", "ours"] = lambda m=mine: second_turn(m, 4096)
        runs[name, "second turn", "without reuse"] = lambda m=mine: second_turn(m, 0)
        if args.skip_transformers:
            continue
        from transformers import NanoChatConfig, NanoChatForCausalLM

        hf = NanoChatForCausalLM(NanoChatConfig(**hf_config(mine.config))).eval().to(dtype)
        hf.load_state_dict(hf_weights(mine))
        runs[name, "1 row", "dynamic cache"] = lambda m=hf: theirs(m, 1, None)
        runs[name, "1 row", "static cache"] = lambda m=hf: theirs(m, 1, "static")
        runs[name, "8 rows", "dynamic cache"] = lambda m=hf: theirs(m, 8, None)
        runs[name, "prefill 512", "transformers"] = lambda m=hf: theirs_prefill(m, 512)
    int8_model = random_model(args.depth, args.vocab_size).bfloat16()
    quantize(int8_model)
    engine = Engine(int8_model, NoText())
    runs["int8", "1 row", "ours"] = lambda: ours(engine, 1)
    runs["int8", "8 rows", "ours"] = lambda: ours(engine, 8)
    for measure in runs.values():
        measure()  # once before, so that memory and kernels are there
    for _ in range(args.repeats):
        limits.append(bandwidth())
        for key, measure in runs.items():
            taken.setdefault(key, []).append(measure())
    limit = statistics.median(limits)
    median = {key: statistics.median(values) for key, values in taken.items()}
    print(f"depth {args.depth}, vocabulary {args.vocab_size:,}: a token reads {read / 1e6:.0f} M weights")
    print(f"memory bandwidth {limit:.1f} GB/s, {torch.get_num_threads()} threads\n")
    print(
        "| precision | what | who | tokens/s, or ms | ours is better by | of the bandwidth |\n|---|---|---|---|---|---|"
    )
    for (name, what, who), value in median.items():
        ratio = median[name, what, "ours"] / value
        ratio = 1 / ratio if what == "second turn" else ratio
        share = f"{value * read * BYTES[name] / limit / 1e9:.0%}" if what == "1 row" else ""
        print(f"| {name} | {what} | {who} | {value:.1f} | {ratio:.2f} | {share} |")


if __name__ == "__main__":
    run_script(main)
