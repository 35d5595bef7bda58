"""What a run prints and logs: the progress line, report/metrics/<stage>.jsonl, wandb, and the MFU."""

import json
import os
import sys
import threading
import time

from nanochat.common import base_dir, format_duration, print0

# Dense bfloat16 FLOP/s of the device (vendors' data sheets); the first name that occurs in the device's name counts.
PEAK_FLOPS = {
    "b300": 2250e12,
    "b200": 2250e12,
    "h200": 989e12,
    "h100 nvl": 835e12,
    "h100 pcie": 756e12,
    "h100": 989e12,
    "l40s": 362e12,
    "l4": 121e12,
    "a100": 312e12,
    "a6000": 155e12,
    "a10": 125e12,
    "v100": 125e12,
    "5090": 210e12,
    "4090": 165e12,
    "4080": 97e12,
    "4070": 58e12,
    "4060": 44e12,
    "3090": 71e12,
    "mi300": 1307e12,
}
UNTIMED_STEPS = 10  # at the start of a run: compilation, caches, clocks
PRINT_SECONDS = 2.0  # at most one progress line in this time


def peak_flops(compute):
    """FLOP/s this rank's device can reach: from the table, or measured with a large matmul where it has no entry."""
    import torch

    name = torch.cuda.get_device_name(compute.device).lower() if compute.device.type == "cuda" else ""
    for key, flops in PEAK_FLOPS.items():
        if key in name:
            return flops
    n = 4096 if name else 1024
    a = torch.randn(n, n, device=compute.device, dtype=compute.dtype)
    best, end = float("inf"), time.perf_counter() + 0.5  # the best time, since loading goes on at the same time
    while (start := time.perf_counter()) < end:
        a @ a
        compute.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


class RunLog:
    """
    The record of one stage's run; only rank 0 writes.

    `num_steps` steps of `tokens_per_step` tokens (0: not known in advance) at `flops_per_token`. state() goes into
    the checkpoint, and RunLog(..., state=...) continues the record after a resume, dropping what was logged later.
    """

    def __init__(self, stage, project, args, compute, num_steps, flops_per_token, state=None):
        self.num_steps, self.flops_per_token, self.compute = num_steps, flops_per_token, compute
        state = state or {"smooth_loss": 0.0, "step_count": 0, "train_seconds": 0.0}
        self.smooth_loss, self.train_seconds = state["smooth_loss"], state["train_seconds"]
        self.first_step = self.step_count = state["step_count"]
        self.timed_tokens, self.timed_seconds = 0, 0.0
        self.last_printed = 0.0
        self.peak = peak_flops(compute) * compute.world_size
        self.file = self.wandb = None
        if compute.rank == 0:
            path = base_dir() / "report" / "metrics" / f"{stage}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            self._open(path)
            if args.run != "dummy":
                import wandb

                self.wandb = wandb.init(project=project, name=args.run, config=vars(args))

    def _open(self, path):
        kept = []
        if self.step_count and path.exists():
            lines = path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= self.step_count]
        path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        self.file = open(path, "a", encoding="utf-8")

    def state(self):
        """What RunLog(state=...) takes."""
        return {k: getattr(self, k) for k in ("smooth_loss", "step_count", "train_seconds")}

    def metrics(self, step, **values):
        """Log named numbers of this step (bpb, accuracies, ...)."""
        if self.file:
            self.file.write(json.dumps({"step": step, **values}) + "\n")
            self.file.flush()
        if self.wandb:
            self.wandb.log({"step": step, **values})

    @property
    def tokens_per_second(self):
        return self.timed_tokens / self.timed_seconds if self.timed_seconds else 0.0

    @property
    def mfu(self):
        """Share of the devices' peak FLOP/s that went into the model, 0 to 1."""
        return self.tokens_per_second * self.flops_per_token / self.peak

    @property
    def loss(self):
        """Training loss, smoothed over about ten steps and debiased."""
        return self.smooth_loss / (1 - 0.9**self.step_count) if self.step_count else float("nan")

    def step(self, step, result, tokens, seconds, lr_mult, progress=None, **more):
        """
        Record optimizer step `step` (from 0) on `tokens` positions, which took `seconds`; print now and then, `more`
        numbers by their names too.
        """
        self.step_count = step + 1
        self.smooth_loss = 0.9 * self.smooth_loss + 0.1 * result.loss
        self.train_seconds += seconds
        if step == self.first_step + UNTIMED_STEPS:
            self.timed_tokens, self.timed_seconds = 0, 0.0  # forget the first, slow ones
        self.timed_tokens += tokens
        self.timed_seconds += seconds
        speed = tokens / seconds
        self.metrics(
            step,
            loss=result.loss,
            grad_norm=result.grad_norm,
            lr_mult=lr_mult,
            dt_ms=seconds * 1e3,
            tokens_per_second=speed,
            **more,
        )
        progress = (step + 1) / self.num_steps if progress is None else progress
        if time.time() - self.last_printed < PRINT_SECONDS and progress < 1:
            return
        self.last_printed = time.time()
        left = self.train_seconds / max(progress, 1e-9) * (1 - progress)
        of = f"/{self.num_steps:05d}" if self.num_steps else ""
        print0(
            f"step {step + 1:05d}{of} ({min(progress, 1):6.1%})",
            f"loss {self.loss:.4f}",
            *(f"{name.replace('_', ' ')} {value:.3f}" for name, value in more.items()),
            f"grad norm {result.grad_norm:.3f}",
            f"lr x{lr_mult:.2f}",
            f"{seconds * 1e3:,.0f} ms",
            f"{speed:,.0f} tok/s",
            f"mfu {self.mfu:.1%}",
            f"{format_duration(self.train_seconds)}, {format_duration(max(0, left))} left",
            sep=" | ",
        )

    def close(self):
        if self.file:
            self.file.close()
        if self.wandb:
            self.wandb.finish()


def progress_printer(unit, every=10.0):
    """
    A function show(label, done, total, note="") that prints progress and the time left, on rank 0 only.

    In a terminal it redraws one line; elsewhere it prints a line every `every` seconds. `total` None: unknown. Threads
    may share it.
    """
    label = start = last = None
    lock = threading.Lock()

    def show(name, done, total, note=""):
        nonlocal label, start, last
        with lock:
            now, terminal = time.perf_counter(), sys.stdout.isatty()
            if name != label:
                label, start, last = name, now, now
            if now - last < (min(0.3, every) if terminal else every) or not done:
                return
            last, speed = now, done / (now - start)
            of, left = (f"{total:,}", format_duration((total - done) / speed)) if total else ("?", "?")
            text = f"{label}: {done:,}/{of} {unit}, {speed:,.1f}/s, {left} left{note and ', ' + note}"
            print0(f"\r{text}\x1b[K" if terminal else text, end="" if terminal else "\n")

    return show


def peak_memory_mib(compute):
    """Most memory this process has had: of the GPU where there is one, else resident."""
    if compute.device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if os.uname().sysname == "Darwin" else 2**10)
