"""
Progress lines, the files that show a run, wandb, throughput, MFU and peak memory.

A stage writes below report/: runs/<stage>.json, what it is (flags, commit, difference to it, device, ...);
metrics/<stage>.jsonl, one object per step and evaluation; samples/<stage>.jsonl, {"step", "prompt", "text"}. A stage
that starts anew moves the files of the one before to report/earlier/<time>/.
"""

import collections
import json
import shutil
import statistics
import sys
import threading
import time
from dataclasses import asdict

from nanochat.common import base_dir, format_duration, no_color, print0, write_errors, write_text
from nanochat.records import json_dict
from nanochat.report import code_version, get_report

# Dense bfloat16 FLOP/s from the vendors' data sheets, by the first key that the device's name contains.
PEAK_FLOPS = {"b300": 2250e12, "b200": 2250e12, "h200": 989e12, "h100 nvl": 835e12, "h100 pcie": 756e12}
PEAK_FLOPS |= {"h100": 989e12, "a100": 312e12, "4090": 165e12, "3090": 71e12}
UNTIMED_STEPS = 10  # the first steps do not count in the throughput: compilation, cold caches
# The flags that set how long a run takes; a stage has some of them.
LENGTH_FLAGS = "depth", "num_iterations", "total_batch_size", "max_seq_len", "examples_per_step", "num_samples"


def device_name(compute):
    """Name of this rank's device, such as "NVIDIA H100 80GB HBM3" or "cpu"."""
    import torch

    return torch.cuda.get_device_name(compute.device) if compute.device.type == "cuda" else compute.device.type


def peak_flops(compute):
    """Peak FLOP/s of this rank's device: from the table, or else measured with a large matmul."""
    import torch

    name = device_name(compute).lower()
    if keys := [key for key in PEAK_FLOPS if key in name]:
        return PEAK_FLOPS[keys[0]]
    n = 1024 if name == "cpu" else 4096
    a = torch.randn(n, n, device=compute.device, dtype=compute.dtype)
    best, end = float("inf"), time.perf_counter() + 0.5  # the minimum: the loader uses the CPU meanwhile
    while (start := time.perf_counter()) < end:
        a @ a
        compute.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


class StageLog:
    """
    Progress lines, files below report/ and wandb for one training stage.

    `num_steps` is 0 if it is not known in advance. `state` is the state() saved with a checkpoint: the log continues
    from there and drops lines of later steps.
    """

    def __init__(self, source, args, compute, num_steps, model, state=None):
        self.num_steps, self.flops_per_token, self.compute = num_steps, model.estimate_flops(), compute
        self.length_flags = [f"--{name}" for name in LENGTH_FLAGS if hasattr(args, name)]
        state = state or {"smooth_loss": 0.0, "step_count": 0, "train_seconds": 0.0}
        self.earlier_seconds = state.get("wall_clock_seconds", 0.0)  # of the runs that this one resumes
        self.smooth_loss, self.train_seconds = state["smooth_loss"], state["train_seconds"]
        self.first_step = self.step_count = state["step_count"]
        self.timed = collections.Counter()  # number, tokens and seconds of the steps that count in the throughput
        self.last_printed, self.data_seconds, self.step_started = 0.0, 0.0, None
        self.durations, self.closed = collections.deque(maxlen=100), threading.Event()
        self.last_event, self.evaluation_seconds = 0.0, {}  # of each kind of evaluation, the last one
        threading.Thread(target=self._watch, daemon=True, name="watchdog").start()
        self.peak = peak_flops(compute) * compute.world_size
        self.files, self.wandb = {}, None
        if compute.writes and not args.plan:
            run = {"stage": source, "started": time.time() - self.earlier_seconds, "flags": vars(args)}
            run |= {"num_steps": num_steps, "flops_per_token": self.flops_per_token, **asdict(model.config)}
            run |= {"device": device_name(compute), "world_size": compute.world_size, **code_version()}
            self._open(base_dir() / "report", source, run)
        if compute.rank == 0 and args.run != "dummy":
            import wandb

            project = "nanochat" if source == "base" else f"nanochat-{source}"
            self.wandb = wandb.init(project=project, name=args.run, config=vars(args))

    def _open(self, report, stage, run):
        """Open metrics and samples for appending, without the lines of steps after the resumed one."""
        paths = {kind: report / kind / f"{stage}.jsonl" for kind in ("metrics", "samples")}
        record = report / "runs" / f"{stage}.json"
        with write_errors(report):
            earlier = report / "earlier" / time.strftime("%Y-%m-%d-%H%M%S")
            for path in (record, *paths.values()) if not self.step_count else ():
                if path.exists():
                    (earlier / path.relative_to(report)).parent.mkdir(parents=True, exist_ok=True)
                    path.rename(earlier / path.relative_to(report))
            write_text(record, json.dumps(run, indent=1, default=str) + "\n")
            for kind, path in paths.items():
                lines = path.read_text("utf-8", "replace").splitlines() if path.exists() else []
                # A killed process or a full disk leaves half lines.
                lines = [line for line in lines if json_dict(line).get("step", 1e99) < self.step_count]
                # A new file, so that the watch page reads it all.
                write_text(path, "".join(f"{line}\n" for line in lines))
                self.files[kind] = open(path, "ab", buffering=0)  # unbuffered: close() must not fail on a full disk

    def _write(self, kind, **record):
        """Append a record to a file. A file that cannot be written is dropped."""
        if kind in self.files:
            try:
                self.files[kind].write(json.dumps(record).encode() + b"\n")
            except OSError as e:  # not an error: a checkpoint may still fit
                file = self.files.pop(kind)
                print0(f"warning: no more {kind} in {file.name}: {e.strerror}", file=sys.stderr)

    def state(self):
        """JSON-serializable state for StageLog(state=...)."""
        return {k: getattr(self, k) for k in ("smooth_loss", "step_count", "train_seconds", "wall_clock_seconds")}

    @property
    def wall_clock_seconds(self):
        """Duration of the stage: of this process, and of the runs it resumes up to their last checkpoint."""
        import psutil

        return self.earlier_seconds + time.time() - psutil.Process().create_time()

    def metrics(self, step, **values):
        """Log named numbers of this step to the metrics file and to wandb."""
        self._write("metrics", step=step, time=round(time.time(), 3), **values)
        if self.wandb:
            self.wandb.log({"step": step, **values})

    def samples(self, step, texts):
        """Log and print {prompt: generated text}."""
        for prompt, text in texts.items():
            self._write("samples", step=step, prompt=prompt, text=text)
            print0(f"{prompt} > {text}")

    def evaluation(self, step, text, **results):
        """Log the results of an evaluation, and print them as `text`."""
        self.metrics(step, **results)
        print0(f"step {step:05d} | {text}")
        now = time.perf_counter()
        self.evaluation_seconds[next(iter(results))], self.last_event = now - self.last_event, now

    def validation(self, step, bpb, results):
        """Log and print the validation loss in bits per byte; updates val_bpb and min_val_bpb in the dict `results`."""
        results.update(val_bpb=bpb, min_val_bpb=min(bpb, results["min_val_bpb"] or bpb))
        self.evaluation(step, f"validation bpb {bpb:.4f}", val_bpb=bpb)

    @property
    def tokens_per_second(self):
        return self.timed["tokens"] / self.timed["seconds"] if self.timed["seconds"] else 0.0

    @property
    def mfu(self):
        """Model FLOPs utilization: share of the devices' peak FLOP/s, 0 to 1."""
        return self.tokens_per_second * self.flops_per_token / self.peak

    @property
    def loss(self):
        """Training loss: bias-corrected exponential moving average over about ten steps."""
        return self.smooth_loss / (1 - 0.9**self.step_count) if self.step_count else float("nan")

    def start_step(self):
        self.compute.synchronize()
        self.step_started, self.data_seconds = time.perf_counter(), 0.0

    def next_batch(self, loader):
        """Start a step with the next batch of `loader`, and note how long that takes."""
        self.start_step()
        batch = next(loader)
        self.data_seconds = time.perf_counter() - self.step_started
        return batch

    def _watch(self):
        """Thread: say so when a step takes ten times the median, and more than 10 s."""
        warned = None
        while not self.closed.wait(1.0):
            started = self.step_started
            limit = 10 * statistics.median(self.durations or [float("inf")])
            if started and started != warned and time.perf_counter() - started > max(limit, 10.0):
                warned, ranks = started, "a rank may hang" if self.compute.world_size > 1 else "the machine may be busy"
                print0(f"step {self.step_count + 1} takes ten times the median step, {limit / 10:,.1f} s: {ranks}")

    def end_step(self, step, result, tokens, lr_mult, progress=None, **extra):
        """
        Log optimizer step `step`, counted from 0, on `tokens` tokens; prints at most every two seconds.

        The step is timed since start_step(). `progress` is the completed share of the stage, needed if num_steps is
        unknown. `extra` numbers are logged and printed too.
        """
        self.compute.synchronize()
        seconds = time.perf_counter() - self.step_started
        self.step_count, self.step_started = step + 1, None
        self.durations.append(seconds)
        self.smooth_loss = 0.9 * self.smooth_loss + 0.1 * result.loss
        self.train_seconds += seconds
        own_steps = step - self.first_step  # before this one, in this process
        if own_steps in (1, UNTIMED_STEPS):
            self.timed.clear()
        self.timed.update(steps=1, tokens=tokens, seconds=seconds)
        dt_ms, data_ms = seconds * 1e3, self.data_seconds * 1e3
        values = {"loss": result.loss, "grad_norm": result.grad_norm, "lr_mult": lr_mult, "dt_ms": dt_ms}
        values |= {"data_ms": data_ms, "memory_mib": peak_memory_mib(self.compute)}
        progress = (step + 1) / self.num_steps if progress is None else progress
        speed = {"tokens_per_second": tokens / seconds, "mfu": tokens / seconds * self.flops_per_token / self.peak}
        self.metrics(step, **values, **speed, tokens=tokens, progress=progress, **extra)
        steps_left = (step + 1) * max(0, 1 / max(progress, 1e-9) - 1)
        seconds_left = steps_left * self.timed["seconds"] / self.timed["steps"]
        on_cpu = self.compute.device.type == "cpu"
        if own_steps == (1 if on_cpu else UNTIMED_STEPS - 1) and steps_left >= 0.5:  # the first one compiles
            long = on_cpu and seconds_left > 12 * 3600  # probably a mistake
            hint = f"; to shorten it, lower {', '.join(self.length_flags)}" if long else ""
            print0(f"about {format_duration(seconds_left)} for {steps_left:,.0f} more steps, plus evaluations{hint}")
        if time.time() - self.last_printed < 2.0 and progress < 1:
            return
        self.last_printed = time.time()
        total = f"/{self.num_steps:05d}" if self.num_steps else ""
        line = f"step {step + 1:05d}{total} ({min(progress, 1):6.1%}) | loss {self.loss:.4f}"
        line += "".join(f" | {name.replace('_', ' ')} {value:.3f}" for name, value in extra.items())
        line += f" | grad norm {result.grad_norm:.3f} | lr x{lr_mult:.2f} | {dt_ms:,.0f} ms ({data_ms:,.0f} for data)"
        line += f" | {tokens / seconds:,.0f} tok/s | mfu {self.mfu:.1%} | {values['memory_mib']:,.0f} MiB"
        print0(f"{line} | {format_duration(self.train_seconds)}, {format_duration(seconds_left)} left")

    def report(self, section, args, facts, **metrics):
        """Write the stage's section of the report: flags, `facts`, speed and memory. `metrics`: see Report.log()."""
        memory, wall_clock = peak_memory_mib(self.compute), {"wall_clock_seconds": self.wall_clock_seconds}
        facts |= {"World size": self.compute.world_size, "Precision": str(self.compute.dtype).removeprefix("torch.")}
        facts |= {"Training loss": self.loss, "MFU": f"{self.mfu:.2%}", "Tokens per second": self.tokens_per_second}
        facts |= {"Training time": f"{self.train_seconds / 60:.2f} minutes", "Peak memory": f"{memory:,.0f} MiB"}
        get_report().log(section, [vars(args), facts | wall_clock], metrics | wall_clock)

    def close(self):
        self.closed.set()
        for file in self.files.values():
            file.close()
        if self.wandb:
            self.wandb.finish()


def erase_line():
    """The characters that erase the line of a terminal; "" for files, pipes, and terminals without colors."""
    return "\r\x1b[K" if sys.stdout.isatty() and not no_color() else ""


def progress_printer(unit, every=10.0):
    """
    A thread-safe function show(label, done, total, note="") that prints progress and remaining time on rank 0.

    In a terminal it redraws one line; elsewhere it prints a line every `every` seconds. `total` is None if unknown.
    """
    label = start = last_printed = None
    lock = threading.Lock()

    def show(name, done, total, note=""):
        nonlocal label, start, last_printed
        with lock:
            now, erase = time.perf_counter(), erase_line()
            if name != label:
                label, start, last_printed = name, now, now
            if erase and total and done >= total:
                return print0(erase, end="")
            if now - last_printed < (min(0.3, every) if erase else every) or not done:
                return
            last_printed, speed = now, done / (now - start)
            total_text, time_left = (f"{total:,}", format_duration((total - done) / speed)) if total else ("?", "?")
            text = f"{label}: {done:,}/{total_text} {unit}, {speed:,.1f}/s, {time_left} left{note and ', ' + note}"
            width = shutil.get_terminal_size().columns - 1 if erase else None
            print0(erase + text[:width], end="" if erase else "\n")

    return show


def with_progress(items, label, unit):
    """Yield the elements of the list `items`; from 10 s on (in a terminal at once), progress_printer() shows them."""
    show = progress_printer(unit)
    for done, item in enumerate(items):
        show(label, done, len(items))
        yield item
    show(label, len(items), len(items))


def peak_memory_mib(compute):
    """Peak memory of this process in MiB: GPU memory if it uses a GPU, else resident memory."""
    if compute.device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**20
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
