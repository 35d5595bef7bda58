"""
Benchmark a training step and decoding on a GPU: the figures of dev/gpu_check.sh.

    python -m dev.bench.bench_gpu step                      # d12, as --plan estimates it; --rows=16 for less memory
    python -m dev.bench.bench_gpu decode                    # d12 by CUDA graphs, against eager steps

Both run on a CPU too (--depth=2 --context=256), without graphs. Exit code 1 if tokens differ.
"""

import statistics
import sys
import time
from argparse import Namespace

import torch

from nanochat import plan
from nanochat.cli import make_parser, parse_args, run_script
from nanochat.cluster import compute_init
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.inference.backends import TorchBackend
from nanochat.recipe import TUNED
from nanochat.schedule import set_schedule
from nanochat.tracking import peak_flops, peak_memory_mib
from nanochat.train import train_step

NEW_TOKENS = 200


class NoSpecialTokens:
    """A tokenizer without special tokens, so that every row runs to its maximum length."""

    def encode_special(self, name):
        return -1

    def get_bos_token_id(self):
        return -1


def measure_step(config, rows, compute, steps):
    """Prints tokens per second, MFU and memory of training steps, compiled by blocks and as a whole."""
    ids = torch.randint(config.vocab_size, (rows, config.sequence_len + 1), device=compute.device)
    batch = [(ids[:, :-1].int().contiguous(), ids[:, 1:].long().contiguous())]
    for whole in (False, True)[: 2 if compute.device.type == "cuda" else 1]:
        model = GPT(config)
        model.init_weights(compute.device)
        optimizers = model.setup_optimizers(ns_dtype=compute.dtype, muon_beta2=TUNED["muon_beta2"])
        set_schedule(optimizers, 1.0, 0.95, decay=0.001)
        if whole:  # raises an error at a graph break
            forward = torch.compile(model, dynamic=False, fullgraph=True)
        else:
            model.compile()
            forward = model
        if compute.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(2 + steps):
            start = time.perf_counter()
            train_step(forward, optimizers, batch, compute, grad_clip=1.0)
            compute.synchronize()
            seconds.append(time.perf_counter() - start)
        speed = rows * config.sequence_len / statistics.median(seconds[2:])
        need = plan.memory(Namespace(device_batch_size=rows), config, compute, whole=whole)
        estimate = sum(need.values()) - (need["process"] if compute.device.type == "cuda" else 0)
        print(
            f"  {'whole model' if whole else 'by blocks'}: {speed:,.0f} tokens/s,",
            f"MFU {speed * model.estimate_flops() / peak_flops(compute):.1%} (planned {plan.MFU:.0%}),",
            f"{peak_memory_mib(compute) / 2**10:.1f} GiB (planned {estimate / 2**30:.1f}),",
            f"first step {seconds[0]:.0f} s",
        )
        del model, optimizers, forward


def memory_bandwidth(compute):
    """Bytes per second of copying, reads and writes."""
    n = 2**28 if compute.device.type == "cuda" else 2**25
    source, best = torch.zeros(n, device=compute.device), float("inf")
    for _ in range(10):
        compute.synchronize()
        start = time.perf_counter()
        source.clone()
        compute.synchronize()
        best = min(best, time.perf_counter() - start)
    return 8 * n / best


def measure_decoding(config, compute):
    """Prints tokens per second of one row, by CUDA graphs and eagerly. Returns whether the tokens are equal."""
    model = GPT(config)
    model.init_weights(compute.device)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02)
    model.to(compute.dtype).eval().requires_grad_(False)
    size = sum(p.numel() * p.element_size() for name, p in model.named_parameters() if "wte" not in name)
    bandwidth, answers = memory_bandwidth(compute), []
    for name, backend in (("graphs", None), ("eager", TorchBackend(model))):
        engine = Engine(model, NoSpecialTokens(), backend=backend)
        for _ in range(2):  # the first run records the graphs
            start = time.perf_counter()
            tokens = engine.generate_batch(list(range(1, 17)), max_tokens=NEW_TOKENS, temperature=0)[0][0]
            speed = NEW_TOKENS / (time.perf_counter() - start)
        answers.append(tokens)
        print(f"  {name}: {speed:,.0f} tokens/s, {speed * size / bandwidth:.0%} of {bandwidth / 1e9:,.0f} GB/s")
    print(f"  {'the same' if answers[0] == answers[1] else 'DIFFERENT'} {len(answers[0])} tokens")
    return answers[0] == answers[1]


def main():
    parser = make_parser("dev.bench.bench_gpu", __doc__)
    parser.add_argument("what", choices=("step", "decode"))
    parser.add_argument("--depth", type=int, default=12, help="layers (default 12)")
    parser.add_argument("--context", type=int, default=2048, help="tokens per row (default 2,048)")
    parser.add_argument("--vocab_size", type=int, default=65536, help="tokens in the vocabulary (default 65,536)")
    parser.add_argument("--rows", type=int, default=16, help="rows of a micro-batch (default 16)")
    parser.add_argument("--steps", type=int, default=10, help="measured steps (default 10)")
    args = parse_args(parser)
    compute, config = compute_init(), GPTConfig.from_depth(args.depth, args.context, args.vocab_size)
    if args.what == "step":
        measure_step(config, args.rows, compute, args.steps)
    elif not measure_decoding(config, compute):
        sys.exit(1)


if __name__ == "__main__":
    run_script(main)
