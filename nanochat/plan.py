"""
What a run needs: memory, time, cost, disk and communication.

Every run compares its memory with the device's before it starts. --plan measures the first steps of a run, saves
nothing, and extrapolates; --plan_for computes the same for other devices, such as 8xH100.
"""

import argparse
import math
import re
import statistics
import time

import torch

from nanochat import common, ops, tracking
from nanochat.common import Compute, format_duration, print0, require
from nanochat.gpt import GPT

STEPS = 4  # measured steps; evaluations are measured before the first and the third of them
SECONDS = 20.0  # a step or an evaluation that takes longer is measured in part

# Memory in GiB, links to the other devices of a host in GB/s per direction, dollars per hour (rented, 2026).
DEVICES = {"b300": (288, 900, 7.0), "b200": (180, 900, 5.5), "h200": (141, 450, 3.5), "h100": (80, 450, 3.0)}
DEVICES |= {"a100": (80, 300, 1.8), "4090": (24, 25, 0.5), "3090": (24, 25, 0.3)}
HOST_DEVICES = 8
NETWORKS = {"InfiniBand (400 Gbit/s per device)": 50, "Ethernet (100 Gbit/s per host)": 12.5 / HOST_DEVICES}
LINK_EFFICIENCY = 0.7  # of collectives
MFU = 0.45  # assumed of other devices; an H100 reached 0.47 at depth 12, an H200 0.52 at depth 20

# Values per token, layer and unit of width that a forward pass keeps for the backward pass; measured, see dev/LOG.md.
SAVED_VALUES = {"cpu": 40, "cuda": 19, "whole model compiled": 28}  # CPU: eager; 32 if compiled

# Name of an evaluation in the log -> (flag of its period, flag of its size, tokens per unit of that size, roughly).
EVALUATIONS = {"val_bpb": ("eval_every", "eval_tokens", 1), "val_loss": ("eval_every", "eval_steps", 1000)}
EVALUATIONS |= {"core": ("core_metric_every", "core_metric_max_per_task", 50_000)}
EVALUATIONS |= {"greedy": ("eval_every", "eval_examples", 20_000)}  # of RL: generated token by token
INLINE_TASK = "eval_metrics_every", "eval_metrics_max_problems", 1000  # of SFT; its name is the task's

CHARACTERS_PER_SHARD, BYTES_PER_SHARD, CHARACTERS_PER_TOKEN = 250e6, 1e8, 4.8  # of the public corpus


def sizes(config, device_type):
    """(bytes of the weights and of their gradients, parameters of embedding and head, of the blocks' matrices)."""
    tables = 2 * config.padded_vocab_size * config.n_embd
    matrices = GPT(config).num_params() - tables
    return 4 * matrices + (4 + ops.embedding_dtype(device_type).itemsize) * tables // 2, tables, matrices


def memory(args, config, compute, tokens=None, whole=False):
    """
    {what for: bytes} of a rank at the peak of a training step. Weights, gradients and optimizer state are exact.

    `tokens`: of a micro-batch, by default the largest possible number. `whole`: the model is compiled as a whole.
    """
    device, size = compute.device.type, compute.dtype.itemsize
    tokens = tokens or args.device_batch_size * config.sequence_len
    weights, tables, matrices = sizes(config, device)
    values = SAVED_VALUES.get("whole model compiled" if whole else device, SAVED_VALUES["cpu"]) * config.n_embd
    if device == "cpu":  # attention keeps its probabilities
        values += config.n_head * (config.sequence_len + ops.QUERY_BLOCK) // 2
    recomputes = getattr(args, "grad_checkpoint", False)  # all but the inputs of a block
    values = values + config.n_layer * config.n_embd if recomputes else values * config.n_layer
    chunk = ops.CUDA_LOGITS_BYTES if device == "cuda" else ops.CPU_LOGITS_BYTES
    return {
        "weights": weights + (2 * matrices + tables if size == 2 else 0),  # and their copies in bfloat16
        "gradients": weights + 4 * matrices,  # Muon stacks copies of its own
        "optimizer": (8 * tables + 4 * matrices) / compute.world_size,
        "activations": tokens * values * size,
        "loss head": min(chunk, tokens * config.vocab_size * size) + 6 * tables,
        "process": 0.75 * 2**30 if device == "cpu" else 2**30,  # without a model
    }


def capacity(compute):
    """Bytes of memory available to this process."""
    import psutil

    if compute.device.type == "cuda":
        return torch.cuda.get_device_properties(compute.device).total_memory
    return psutil.virtual_memory().available / common.dist_env()[3]


def largest_batch(args, need, available, world_size):
    """The largest --device_batch_size that fits, in words. `need`: memory() of the flag's value."""
    total, T = getattr(args, "total_batch_size", 0), getattr(args, "max_seq_len", 1)
    rows_per_step = getattr(args, "target_examples_per_step", total // T)  # 0 in RL: any number divides it
    free = available - sum(need.values()) + need["activations"]
    most = min(1024, int(free / need["activations"] * args.device_batch_size))
    rows = next((n for n in range(most, 0, -1) if rows_per_step % (n * world_size) == 0), None)
    return f"--device_batch_size={rows} is the largest that fits" if rows else "not even one row fits"


def check_memory(args, config, compute):
    """Warns if this run may need more memory than there is. Raises UserError if it does without any activations."""
    need, available = memory(args, config, compute), capacity(compute)
    state, total = need["weights"] + need["gradients"] + need["optimizer"], sum(need.values())
    free = f"GiB of memory, {available / 2**30:,.1f} are free"
    problem = f"weights, gradients and optimizer state need {state / 2**30:,.1f} {free}"
    require(state <= available, f"{problem}; train a smaller model, or use more devices to share the optimizer")
    if total > available:
        hint = largest_batch(args, need, available, compute.world_size)
        print0(f"warning: this run may need {total / 2**30:,.1f} {free}; {hint}")


def parse_devices(text):
    """(number, key in DEVICES) of "8xH100" or "h100". Raises UserError."""
    count, _, name = text.lower().rpartition("x")
    valid = re.fullmatch(r"[1-9]\d*|", count) and name in DEVICES
    require(valid, f"--plan_for={text}: expected a number and a device, such as 8xH100; known: {', '.join(DEVICES)}")
    return int(count or 1), name


class Plan:
    """The plan of one run of a training stage: how the run differs while it is measured, and what all of it needs."""

    def __init__(self, args, compute, config, num_steps):
        self.wanted, self.args, self.config, self.num_steps = argparse.Namespace(**vars(args)), args, config, num_steps
        self.compute, self.available, self.model = compute, capacity(compute), GPT(config)
        # largest, largest_measured: tokens of the largest micro-batch
        self.step_tokens, self.parts, self.progress, self.largest, self.largest_measured = [], [], 0.0, 0, 0
        self.affordable_tokens = SECONDS * tracking.peak_flops(compute) / 2 / self.model.estimate_flops()
        args.run, args.sample_every, args.plan = "dummy", -1, True
        for every, size, unit in [*EVALUATIONS.values(), INLINE_TASK]:
            if getattr(args, every, -1) > 0 and hasattr(args, size):
                setattr(args, every, 2)
                setattr(args, size, max(1, min(getattr(self.wanted, size), int(self.affordable_tokens / unit))))

    def _count(self, micro_batches, progress):
        sizes = [x.numel() for x, *_ in micro_batches]
        self.step_tokens.append(sum(sizes))
        self.largest, self.progress = max([self.largest, *sizes]), progress

    def shorten(self, micro_batches, progress):
        """The part of a step's micro-batches to train on: all of them, unless that would take too long."""
        self._count(micro_batches, progress)
        if self.step_tokens[-1] > self.affordable_tokens:
            part = [t[: max(1, int(self.affordable_tokens / 2 / t.size(1)))] for t in micro_batches[0]]
            print0(f"a step of {self.step_tokens[-1]:,} tokens takes long here: measuring {part[0].numel():,} of them")
            self.parts.append(part[0].numel())
            micro_batches = [part] * (1 + len(self.parts) % 2)  # two, one, two, one: what does each of them cost?
        self.largest_measured = max([self.largest_measured, *(x.numel() for x, *_ in micro_batches)])
        return micro_batches

    def check(self, step, last, log, loader):
        """To be called before each step; prints the plan and ends the process when enough steps are measured."""
        if last or step == STEPS or self.wanted.plan_for:
            self.show(log, loader)
            raise SystemExit
        log.last_event = time.perf_counter()

    def show(self, log=None, loader=None):
        """Print the plan."""
        args, config, compute, available = self.wanted, self.config, self.compute, self.available
        steps, tokens = self._horizon(log, loader)
        flops = tokens * self.model.estimate_flops()
        lines = {"model": f"{config}: {self.model.num_params():,} parameters"}
        lines["training"] = f"{steps:,} steps, {tokens:,} tokens, {flops:.4e} FLOPs"
        if args.plan_for:
            count, name = parse_devices(args.plan_for)
            available = DEVICES[name][0] * 2**30
            compute = Compute(torch.device("cuda"), torch.bfloat16, world_size=count)
            lines |= self._elsewhere(count, name, steps, flops / steps)
        else:
            lines |= self._here(log, steps)
        need = memory(args, config, compute, self.largest)
        if not args.plan_for:  # the measured peak is exact
            measured = memory(args, config, compute, self.largest_measured)
            need["process"] += tracking.peak_memory_mib(compute) * 2**20 - sum(measured.values())
        parts = ", ".join(f"{name} {size / 2**30:,.2f}" for name, size in need.items())
        lines["memory"] = f"{sum(need.values()) / 2**30:,.2f} of {available / 2**30:,.1f} GiB ({parts})"
        lines["batch"] = largest_batch(args, need, available, compute.world_size)
        weights, tables, matrices = sizes(config, compute.device.type)
        saves = 1 + (steps - 1) // args.save_every if args.save_every > 0 else 1
        size = (weights + 8 * tables + 4 * matrices) / 1e9
        lines["disk"] = f"{min(saves, args.keep or saves)} checkpoints of {size:,.2f} GB"
        if hasattr(args, "data_dir"):
            shards = math.ceil(tokens * CHARACTERS_PER_TOKEN / CHARACTERS_PER_SHARD)
            lines["disk"] += f", {shards:,} shards of the public corpus ({shards * BYTES_PER_SHARD / 1e9:,.1f} GB)"
        for label, text in lines.items():
            print0(f"{label:<10}{text}")

    def _horizon(self, log, loader):
        """(steps, tokens) of the run. Reads the rest of the loader's batches if only they tell."""
        args, steps = self.wanted, self.num_steps
        if hasattr(args, "total_batch_size") and steps > 0:
            return steps, steps * args.total_batch_size
        if not loader:  # RL: answers yet to be sampled
            return steps, steps * log.timed["tokens"] // max(1, log.timed["steps"])
        show = tracking.progress_printer("steps")
        while len(self.step_tokens) < steps if steps > 0 else self.progress < 1:
            batch = next(loader)
            self._count(batch.micro_batches, statistics.mean(self.compute.all_gather(batch.progress)))
            show("reading the batches of the run", len(self.step_tokens), steps if steps > 0 else None)
        tokens = sum(self.compute.all_gather(sum(self.step_tokens)))
        return len(self.step_tokens), getattr(args, "total_batch_size", 0) * len(self.step_tokens) or tokens

    def _here(self, log, steps):
        """Lines on the device and the time of the run on this machine, as measured."""
        args, durations, evaluations = self.wanted, list(log.durations), 0.0
        n, step = len(durations), statistics.mean(durations[1:] or durations)
        training = steps * step
        if self.parts:
            two, one = durations[-2:]
            training = steps * (one + (two - one) * (self.step_tokens[0] / self.parts[0] - 1))
        elif hasattr(args, "target_examples_per_step"):  # of different lengths
            training *= statistics.mean(self.step_tokens) / statistics.mean(self.step_tokens[1:n] or self.step_tokens)
        for name, seconds in log.evaluation_seconds.items():
            every, size, _ = EVALUATIONS.get(name, INLINE_TASK)
            period, scale = getattr(args, every), getattr(args, size) / getattr(self.args, size)
            evaluations += scale * seconds * (steps // period + (steps % period > 0) + (name != "core"))
        start = max(0.0, log.wall_clock_seconds - n * step - 2 * sum(log.evaluation_seconds.values()))
        times = map(format_duration, (training + evaluations + start, training, evaluations, start))
        device = f"{self.compute.world_size} x {tracking.device_name(self.compute)}"
        return {"device": device, "time": "{}: training {}, evaluations {}, start {}".format(*times)}

    def _elsewhere(self, count, name, steps, flops):
        """Lines on other devices: time, cost, communication (reduce-scatter of gradients, all-gather of weights)."""
        _, link, price = DEVICES[name]
        if not flops:
            return {"time": "unknown, since it depends on the answers: run --plan on such devices"}
        step = flops / (count * tracking.PEAK_FLOPS[name] * MFU)
        exchanged = 2 * sizes(self.config, "cuda")[0] * (count - 1) / count
        links = {f"the links of a host ({link} GB/s)": link} if count <= HOST_DEVICES else NETWORKS
        delays = {network: exchanged / (speed * 1e9 * LINK_EFFICIENCY) for network, speed in links.items()}
        texts = (f"{t * 1e3:,.0f} ms over {network}, {t / (step + t):.0%} of the step" for network, t in delays.items())
        best = min(delays.values())
        hours = steps * (step + best) / 3600
        hint = "; sharding the optimizer is not enough here, see dev/multinode/README.md" if best > step / 2 else ""
        return {
            "device": f"{count} x {name.upper()}, at {MFU:.0%} of the peak",
            "time": f"{format_duration(hours * 3600)} of training, {step * 1e3:,.0f} ms per step plus communication",
            "cost": f"${hours * count * price:,.0f} at ${price:.2f} per device and hour",
            "exchange": f"{exchanged / 1e9:,.2f} GB per step and device: {', '.join(texts)}{hint}",
        }
