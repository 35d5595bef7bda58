"""
Benchmark training steps: ours against plain PyTorch and transformers.

    python -m dev.bench.bench_train                                               # all shapes and systems
    python -m dev.bench.bench_train --shapes=vocab65k,pocket --systems=ours,twin-bfloat16-compiled --seconds=10

The twin is the same model in plain PyTorch: nn.Linear, scaled_dot_product_attention, F.cross_entropy over all logits,
torch.optim.AdamW(fused=True) and torch.optim.Muon. Every system runs in a process of its own, all get the same batches
and threads. MFU is relative to the fastest 2,048-cubed matrix product of a process of its own. Memory is the peak
resident set minus the one after `import torch`. The last columns are the milliseconds of a step's parts; a compiled
twin has no parts, because splitting it would change what is fused.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat.cli import make_parser, parse_args, run_script
from nanochat.cluster import compute_init
from nanochat.common import Compute, choose_dtype, require
from nanochat.gpt import GPT, NORM_EPS, SOFTCAP, GPTConfig, rotate
from nanochat.muon import orthogonalize
from nanochat.recipe import TUNED
from nanochat.schedule import set_schedule
from nanochat.train import train_step

# name: (depth, vocabulary, context, rows of a micro-batch, micro-batches)
SHAPES = {
    "vocab65k": (4, 65536, 1024, 4, 1),  # the default vocabulary
    "d8": (8, 8192, 512, 8, 1),
    "pocket": (4, 1024, 512, 8, 2),  # the base stage of speedrun.sh's pocket tier
    "d12": (12, 32768, 2048, 1, 1),
}
TWINS = tuple(f"twin-{dtype}{mode}" for dtype in ("float32", "bfloat16") for mode in ("", "-compiled"))
SYSTEMS = ("ours", "ours-float32", "ours-float32-eager", *TWINS, "transformers-float32", "transformers-bfloat16")
PARTS = ("blocks", "loss", "backward", "optimizers")
RESIDENT_AFTER_IMPORT = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# ---------------------------------------------------------------------------------------------------------------------
# The twin: what one would write by hand, without a line for speed


class TwinBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, kv = config.n_embd, config.n_kv_head * config.head_dim
        self.config = config
        self.c_q, self.c_k, self.c_v = (nn.Linear(C, n, bias=False) for n in (C, kv, kv))
        self.c_proj, self.c_fc = nn.Linear(C, C, bias=False), nn.Linear(C, 4 * C, bias=False)
        self.mlp_proj = nn.Linear(4 * C, C, bias=False)

    def forward(self, x, cos, sin):
        (B, T, C), D = x.shape, self.config.head_dim
        h = twin_norm(x)
        q, k, v = (linear(h).view(B, T, -1, D) for linear in (self.c_q, self.c_k, self.c_v))
        q, k = (twin_norm(rotate(t, cos, sin)).transpose(1, 2) for t in (q, k))
        y = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), is_causal=True, enable_gqa=True)
        x = x + self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return x + self.mlp_proj(F.relu(self.c_fc(twin_norm(x))).square())


class Twin(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.h = nn.ModuleList(TwinBlock(config) for _ in range(config.n_layer))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        inv_freq = 1.0 / 10000 ** (torch.arange(0, config.head_dim, 2) / config.head_dim)
        angles = torch.outer(torch.arange(config.sequence_len), inv_freq)[None, :, None]
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def hidden(self, idx):
        x = twin_norm(self.wte(idx))
        for block in self.h:
            x = block(x, self.cos, self.sin)
        return twin_norm(x)

    def loss(self, x, targets):
        logits = SOFTCAP * torch.tanh(self.lm_head(x).float() / SOFTCAP)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def forward(self, idx, targets):
        return self.loss(self.hidden(idx), targets)


def twin_norm(x):
    return F.rms_norm(x, (x.size(-1),), eps=NORM_EPS)


class Transformers(nn.Module):
    """transformers' NanoChat class with the interface of Twin."""

    def __init__(self, config):
        from transformers import NanoChatConfig, NanoChatForCausalLM

        from nanochat.hf import hf_config

        super().__init__()
        self.model = NanoChatForCausalLM(NanoChatConfig(**hf_config(config)))
        self.lm_head, self.wte = self.model.lm_head, self.model.get_input_embeddings()
        self.h = self.model.model.layers

    def hidden(self, idx):
        return self.model.model(input_ids=idx, use_cache=False).last_hidden_state

    loss, forward = Twin.loss, Twin.forward


# ---------------------------------------------------------------------------------------------------------------------
# One system in one process


def orthogonalize_in_float32(grad, *_):
    return orthogonalize(grad[None], dtype=torch.float32)[0]


class Plain:
    """A training step of a Twin or of Transformers."""

    def __init__(self, kind, config, compute, compiled):
        self.model, self.compute = kind(config).to(compute.device), compute
        tables = [self.model.lm_head.weight, self.model.wte.weight]
        self.optimizers = [
            torch.optim.AdamW(tables, lr=0.004, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0, fused=True),
            torch.optim.Muon(self.model.h.parameters(), lr=0.02, momentum=0.95, weight_decay=0.0),
        ]
        if choose_dtype(compute.device.type) == torch.float32:  # torch's bfloat16 iteration would take minutes
            torch.optim._muon._zeropower_via_newtonschulz = orthogonalize_in_float32
        self.forward = torch.compile(self.model, dynamic=False) if compiled else self.model

    def step(self, micro_batches):
        for x, y in micro_batches:
            with self.compute.autocast():
                loss = self.forward(x, y)
            (loss / len(micro_batches)).backward()
        self.update()

    def update(self):
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def parts(self, x, y, timer):
        with self.compute.autocast():
            with timer("blocks"):
                hidden = self.model.hidden(x)
            with timer("loss"):
                loss = self.model.loss(hidden, y)
        with timer("backward"):
            loss.backward()
        with timer("optimizers"):
            self.update()


class Ours:
    """A training step of this repository, as scripts/base_train.py does it."""

    def __init__(self, config, compute, compiled):
        self.model, self.compute = GPT(config), compute
        self.model.init_weights(compute.device)
        if compiled:
            self.model.compile()
        self.optimizers = self.model.setup_optimizers(ns_dtype=compute.dtype, muon_beta2=TUNED["muon_beta2"])
        set_schedule(self.optimizers, 1.0, 0.95, decay=0.001)

    def step(self, micro_batches):
        train_step(self.model, self.optimizers, micro_batches, self.compute, grad_clip=1.0)

    def parts(self, x, y, timer):
        from nanochat import ops

        with self.compute.autocast():
            with timer("blocks"):
                hidden = self.model.hidden(x)
            with timer("loss"):  # computes the head's gradients too
                head, size = self.model.lm_head.weight, self.model.config.vocab_size
                rows = hidden.flatten(0, 1), head, y.flatten(), None
                loss = ops.cross_entropy_sum(*rows, size, SOFTCAP, self.model.chunk_loss)
        with timer("backward"):
            loss.backward()
        with timer("optimizers"):
            for optimizer in self.optimizers:
                optimizer.reduce_grads()
            norm = sum(float(optimizer.grad_sq_norm()) for optimizer in self.optimizers) ** 0.5
            for optimizer in self.optimizers:
                optimizer.step(1 / (norm + 1e-6))
                optimizer.zero_grad(set_to_none=True)


def make_system(name, config, device_type):
    kind, dtype, mode = (*name.split("-"), "", "")[:3]
    compute = compute_init(device_type, dtype)
    if kind == "ours":
        return Ours(config, compute, mode != "eager")
    return Plain({"twin": Twin, "transformers": Transformers}[kind], config, compute, mode == "compiled")


def measure(shape, name, seconds, device_type):
    """{"tokens_per_second", "flops_per_token", "memory_mib", "first_step_seconds", "parts"} of one system."""
    depth, vocab_size, T, rows, n_micro = SHAPES[shape]
    config = GPTConfig.from_depth(depth, T, vocab_size)
    system = make_system(name, config, device_type)
    device = system.compute.device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (n_micro, rows, T + 1), generator=generator).to(device)
    micro_batches = [(batch[:, :-1].contiguous(), batch[:, 1:].contiguous()) for batch in ids]
    start = time.perf_counter()
    system.step(micro_batches)
    system.compute.synchronize()
    first, times, end = time.perf_counter() - start, [], time.perf_counter() + seconds
    system.step(micro_batches)
    while time.perf_counter() < end or len(times) < 3:
        start = time.perf_counter()
        system.step(micro_batches)
        system.compute.synchronize()
        times.append(time.perf_counter() - start)
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - RESIDENT_AFTER_IMPORT) / 1024
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated() / 2**20
    parts = {part: [] for part in PARTS}

    @contextmanager
    def timer(part):
        start = time.perf_counter()
        yield
        system.compute.synchronize()
        parts[part].append(time.perf_counter() - start)

    for _ in range(0 if name.endswith("compiled") else 3):
        system.parts(*micro_batches[0], timer)
    return {
        "tokens_per_second": n_micro * rows * T / statistics.median(times),
        "flops_per_token": GPT(config).estimate_flops(),
        "memory_mib": memory,
        "first_step_seconds": first,
        "parts": {part: min(values) for part, values in parts.items() if values},
    }


def peak_flops(device_type):
    """FLOP/s of the fastest 2,048-cubed matrix product, over bfloat16 and float32."""
    device, n, best = compute_init(device_type).device, 2048, {}
    compute = Compute(device, torch.float32)
    for dtype in (torch.bfloat16, torch.float32):
        a, end = torch.randn(n, n, device=device, dtype=dtype), time.perf_counter() + 3
        while (start := time.perf_counter()) < end:
            a @ a
            compute.synchronize()
            best[dtype] = min(best.get(dtype, 1e9), time.perf_counter() - start)
    return {str(dtype).removeprefix("torch."): 2 * n**3 / seconds for dtype, seconds in best.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def run_in_process(*arguments, device_type):
    """The JSON that this module prints in a new process with these arguments."""
    command = [sys.executable, "-m", "dev.bench.bench_train", f"--device_type={device_type}", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def main(argv=None):
    parser = make_parser("dev.bench.bench_train", __doc__)
    add = parser.add_argument
    add("--shapes", default=",".join(SHAPES), help="names separated by commas")
    add("--systems", default=",".join(SYSTEMS), help="names separated by commas")
    add("--seconds", type=float, default=20, help="measuring time per system, after two steps to warm up")
    add("--device_type", default="", help="cuda, mps or cpu (default: the first that is available)")
    add("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parse_args(parser, argv)
    if args.worker:
        shape, system = args.worker
        peak = system == "peak"
        print(
            json.dumps(peak_flops(args.device_type) if peak else measure(*args.worker, args.seconds, args.device_type))
        )
        return
    shapes, systems = args.shapes.split(","), args.systems.split(",")
    for names, known in ((shapes, SHAPES), (systems, SYSTEMS)):
        require(set(names) <= set(known), f"{', '.join(names)}: choose from {', '.join(known)}")
    peaks = run_in_process("--worker", "-", "peak", device_type=args.device_type)
    peak = max(peaks.values())
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads;", end=" ")
    print("matrix product:", ", ".join(f"{dtype} {flops / 1e9:,.0f} GFLOP/s" for dtype, flops in peaks.items()))
    for shape in shapes:
        depth, vocab_size, T, rows, n_micro = SHAPES[shape]
        print(f"\n{shape}: depth {depth}, vocabulary {vocab_size:,}, {n_micro} x {rows} rows of {T:,} tokens\n")
        print("| system | tokens/s | against ours | MFU | MiB | first step | " + " | ".join(PARTS) + " |")
        print("|---" * (6 + len(PARTS)) + "|")
        ours = None
        for system in systems:
            seconds = f"--seconds={args.seconds}"
            result = run_in_process("--worker", shape, system, seconds, device_type=args.device_type)
            if result is None:
                print(f"| {system} | failed |", flush=True)
                continue
            speed = result["tokens_per_second"]
            ours = ours or speed
            parts = [f"{1e3 * result['parts'][p]:,.0f}" if p in result["parts"] else "" for p in PARTS]
            cells = [f"{speed:,.0f}", f"{speed / ours:.2f}", f"{speed * result['flops_per_token'] / peak:.1%}"]
            cells += [f"{result['memory_mib']:,.0f}", f"{result['first_step_seconds']:.1f} s", *parts]
            print(f"| {system} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    run_script(main)
