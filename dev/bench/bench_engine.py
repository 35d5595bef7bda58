"""
Speed of our engine, against transformers' NanoChat class with the same weights, and as a share of the memory bandwidth.

    python -m dev.bench.bench_engine                    # depth 12, vocabulary 32,768
    python -m dev.bench.bench_engine --depth=4 --vocab_size=1024 --repeats=5

Prints a table of medians for float32, bfloat16 and int8 weights. The measurements alternate, so that a change in the
machine's load affects all of them.

    1, 8, 16 rows   decoding after a short prompt, in tokens/s of all rows together; transformers with its dynamic and
                    its static cache. One row also as a share of the memory bandwidth, since a token reads all weights.
    prefill 512     tokens/s of a prompt of 512 tokens, up to its first sampled token
    second turn     milliseconds to the first token of a prompt of 1,000 tokens whose first 980 were the previous
                    prompt, with and without the prefix cache
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
NEW_TOKENS = 64  # generated per row when decoding is measured


class NullTokenizer:
    """Stub tokenizer. The engine only asks for the ids of special tokens; -1 never occurs, so no answer ends early."""

    def encode_special(self, name):
        return -1

    def get_bos_token_id(self):
        return -1


def random_model(depth, vocab_size):
    """A frozen float32 GPT with random weights."""
    torch.manual_seed(1)
    model = GPT(GPTConfig.from_depth(depth, 2048, vocab_size))
    model.init_weights("cpu")
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02)
    return model.eval().requires_grad_(False)


def memory_bandwidth():
    """Memory bandwidth in GB/s: the fastest of five sums over 1 GiB."""
    x = torch.zeros(2**28)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        x.sum()
        seconds.append(time.perf_counter() - start)
    return x.numel() * 4 / min(seconds) / 1e9


def decode_speed(engine, rows):
    """Tokens per second of decoding, all rows together."""
    loop = engine.decode_loop(rows)
    loop.submit(Request(list(range(1, 17)), max_tokens=NEW_TOKENS + 1, temperature=0, num_samples=rows))
    loop.step()  # prefills the prompt
    start = time.perf_counter()
    while loop.busy:
        loop.step()
    return rows * NEW_TOKENS / (time.perf_counter() - start)


def seconds_to_first_token(loop, prompt):
    """Seconds from the submission of `prompt` to its first sampled token."""
    start = time.perf_counter()
    loop.submit(Request(prompt, max_tokens=1, temperature=0))
    while loop.busy:
        loop.step()
    return time.perf_counter() - start


def prefill_speed(engine, n):
    """Prompt tokens per second, for a prompt of `n` tokens."""
    return n / seconds_to_first_token(engine.decode_loop(1), list(range(1, n + 1)))


def second_turn_ms(model, prefix_tokens):
    """Milliseconds to the first token of a prompt of 1,000 tokens, 980 of which were the previous prompt."""
    loop = Engine(model, NullTokenizer(), prefix_tokens=prefix_tokens).decode_loop(1)
    seconds_to_first_token(loop, list(range(1, 981)))
    return 1000 * seconds_to_first_token(loop, list(range(1, 1001)))


def hf_decode_speed(hf, rows, cache):
    """decode_speed() of transformers; `cache` is its cache_implementation, None = dynamic."""
    settings = dict(do_sample=False, cache_implementation=cache, eos_token_id=None, pad_token_id=0)
    ids = torch.arange(1, 17).repeat(rows, 1)

    def seconds(n):
        start = time.perf_counter()
        hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n, **settings)
        return time.perf_counter() - start

    prefill = seconds(1)
    return rows * NEW_TOKENS / (seconds(NEW_TOKENS + 1) - prefill)


def hf_prefill_speed(hf, n):
    """prefill_speed() of transformers."""
    start = time.perf_counter()
    hf.generate(torch.arange(1, n + 1)[None], max_new_tokens=1, do_sample=False, eos_token_id=None, pad_token_id=0)
    return n / (time.perf_counter() - start)


def main():
    parser = make_parser("dev.bench.bench_engine", __doc__)
    parser.add_argument("--depth", type=int, default=12, help="depth of the model (default 12)")
    parser.add_argument(
        "--vocab_size", type=int, default=32_768, help="vocabulary size, at least 1,001 (default 32,768)"
    )
    parser.add_argument("--repeats", type=int, default=3, help="measurements per median (default 3)")
    parser.add_argument("--skip_transformers", action="store_true", help="measure our engine only")
    args = parse_args(parser)
    torch.set_grad_enabled(False)
    benches, results, bandwidths = {}, {}, []
    for precision, dtype in DTYPES.items():
        model = random_model(args.depth, args.vocab_size).to(dtype)
        weights_read = sum(p.numel() for name, p in model.named_parameters() if "wte" not in name)
        engine = Engine(model, NullTokenizer())
        benches[precision, "1 row", "ours"] = lambda e=engine: decode_speed(e, 1)
        benches[precision, "8 rows", "ours"] = lambda e=engine: decode_speed(e, 8)
        benches[precision, "16 rows", "ours"] = lambda e=engine: decode_speed(e, 16)
        benches[precision, "prefill 512", "ours"] = lambda e=engine: prefill_speed(e, 512)
        benches[precision, "second turn", "ours"] = lambda m=model: second_turn_ms(m, 4096)
        benches[precision, "second turn", "without prefix cache"] = lambda m=model: second_turn_ms(m, 0)
        if args.skip_transformers:
            continue
        from transformers import NanoChatConfig, NanoChatForCausalLM

        hf = NanoChatForCausalLM(NanoChatConfig(**hf_config(model.config))).eval().to(dtype)
        hf.load_state_dict(hf_weights(model))
        benches[precision, "1 row", "dynamic cache"] = lambda m=hf: hf_decode_speed(m, 1, None)
        benches[precision, "1 row", "static cache"] = lambda m=hf: hf_decode_speed(m, 1, "static")
        benches[precision, "8 rows", "dynamic cache"] = lambda m=hf: hf_decode_speed(m, 8, None)
        benches[precision, "prefill 512", "transformers"] = lambda m=hf: hf_prefill_speed(m, 512)
    int8_model = random_model(args.depth, args.vocab_size).bfloat16()
    quantize(int8_model)
    int8_engine = Engine(int8_model, NullTokenizer())
    benches["int8", "1 row", "ours"] = lambda: decode_speed(int8_engine, 1)
    benches["int8", "8 rows", "ours"] = lambda: decode_speed(int8_engine, 8)
    for bench in benches.values():
        bench()  # warm-up, not measured
    for _ in range(args.repeats):
        bandwidths.append(memory_bandwidth())
        for key, bench in benches.items():
            results.setdefault(key, []).append(bench())
    bandwidth = statistics.median(bandwidths)
    medians = {key: statistics.median(values) for key, values in results.items()}
    print(f"depth {args.depth}, vocabulary {args.vocab_size:,}: a token reads {weights_read / 1e6:.0f} M weights")
    print(f"memory bandwidth {bandwidth:.1f} GB/s, {torch.get_num_threads()} threads\n")
    print("| precision | bench | program | tokens/s, or ms | ours is faster by | of the bandwidth |")
    print("|---|---|---|---|---|---|")
    for (precision, bench, program), value in medians.items():
        speedup = medians[precision, bench, "ours"] / value
        speedup = 1 / speedup if bench == "second turn" else speedup
        share = f"{value * weights_read * BYTES[precision] / bandwidth / 1e9:.0%}" if bench == "1 row" else ""
        print(f"| {precision} | {bench} | {program} | {value:.1f} | {speedup:.2f} | {share} |")


if __name__ == "__main__":
    run_script(main)
