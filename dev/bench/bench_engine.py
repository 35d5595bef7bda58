"""
Our engine against transformers' NanoChat class with the same weights, and against the speed of the memory.

    python -m dev.bench.bench_engine                    # depth 12, vocabulary 32,768
    python -m dev.bench.bench_engine --depth=4 --vocab_size=1024 --repeats=5

Decoding: tokens per second after a short prompt, one row and eight, in float32 and bfloat16, against `generate` with
its dynamic and its static cache; and as a share of (memory bandwidth, as a large sum measures it, divided by the bytes
of the weights that each token reads). Prefill: tokens per second of a prompt of 512 up to its first token. The
programs take turns; prints medians.
"""

import argparse
import statistics
import time

import torch

from nanochat.engine import DecodeLoop, Engine, Request
from nanochat.gpt import GPT, GPTConfig
from nanochat.hf import hf_config, hf_weights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NEW = 64  # tokens generated in a measurement


class NoText:
    """The engine asks a tokenizer only for special tokens; these do not occur."""

    def encode_special(self, name):
        return -1

    def get_bos_token_id(self):
        return -1


def random_model(depth, vocab_size):
    torch.manual_seed(1)
    model = GPT(GPTConfig.from_depth(depth, 1024, vocab_size))
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


def ours(model, rows):
    """Tokens per second of decoding, by all rows together."""
    loop = DecodeLoop(Engine(model, NoText()), rows)
    loop.submit(Request(list(range(1, 17)), max_tokens=NEW + 1, temperature=0, num_samples=rows))
    loop.step()  # with the prompt
    start = time.perf_counter()
    while loop.busy:
        loop.step()
    return rows * NEW / (time.perf_counter() - start)


def ours_prefill(model, n):
    loop = DecodeLoop(Engine(model, NoText()), 1)
    start = time.perf_counter()
    loop.submit(Request(list(range(1, n + 1)), max_tokens=1, temperature=0))
    loop.step()
    return n / (time.perf_counter() - start)


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--vocab_size", type=int, default=32_768)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--skip_transformers", action="store_true")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    model = random_model(args.depth, args.vocab_size)
    read = sum(p.numel() for name, p in model.named_parameters() if "wte" not in name)
    runs, taken, limits = {}, {}, []
    for name, dtype in DTYPES.items():
        mine = random_model(args.depth, args.vocab_size).to(dtype)
        runs[name, "1 row", "ours"] = lambda m=mine: ours(m, 1)
        runs[name, "8 rows", "ours"] = lambda m=mine: ours(m, 8)
        runs[name, "prefill 512", "ours"] = lambda m=mine: ours_prefill(m, 512)
        if args.skip_transformers:
            continue
        from transformers import NanoChatConfig, NanoChatForCausalLM

        hf = NanoChatForCausalLM(NanoChatConfig(**hf_config(model.config))).eval().to(dtype)
        hf.load_state_dict(hf_weights(mine))
        runs[name, "1 row", "dynamic cache"] = lambda m=hf: theirs(m, 1, None)
        runs[name, "1 row", "static cache"] = lambda m=hf: theirs(m, 1, "static")
        runs[name, "8 rows", "dynamic cache"] = lambda m=hf: theirs(m, 8, None)
        runs[name, "prefill 512", "transformers"] = lambda m=hf: theirs_prefill(m, 512)
    for run in runs.values():
        run()  # once before, so that memory and kernels are there
    for _ in range(args.repeats):
        limits.append(bandwidth())
        for key, run in runs.items():
            taken.setdefault(key, []).append(run())
    limit = statistics.median(limits)
    median = {key: statistics.median(values) for key, values in taken.items()}
    print(f"depth {args.depth}, vocabulary {args.vocab_size:,}: a token reads {read / 1e6:.0f} M weights")
    print(f"memory bandwidth {limit:.1f} GB/s, {torch.get_num_threads()} threads\n")
    print("| precision | what | who | tokens/s | ours is faster by | of the bandwidth |\n|---|---|---|---|---|---|")
    for (name, what, who), speed in median.items():
        ratio = median[name, what, "ours"] / speed
        share = speed * read * DTYPES[name].itemsize / limit / 1e9
        share = f"{share:.0%}" if what == "1 row" else ""
        print(f"| {name} | {what} | {who} | {speed:.1f} | {ratio:.2f} | {share} |")


if __name__ == "__main__":
    main()
