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

# Memory in GiB, link to the other devices of a host in GB/s per direction, dollars per hour (rented, 2026).
DEVICES = {"b300": (288, 900, 7.0), "b200": (180, 900, 5.5), "h200": (141, 450, 3.5), "h100": (80, 450, 3.0)}
DEVICES |= {"a100": (80, 300, 1.8), "4090": (24, 25, 0.5), "3090": (24, 25, 0.3)}
HOST_DEVICES = 8
NETWORKS = {"InfiniBand, 400 Gbit/s per device": 50.0, "Ethernet, 100 Gbit/s per host": 12.5 / HOST_DEVICES}
LINK_EFFICIENCY = 0.7  # of collectives
MFU = 0.45  # assumed of other devices; an H100 reached 0.47 at depth 12, an H200 0.52 at depth 20
SHARDING_LIMIT = 0.3  # share of a step for communication

# Values per token, layer and unit of width that a forward pass keeps for the backward pass; measured, see dev/LOG.md.
SAVED_VALUES = {("cpu", "eager"): 40, ("cpu", "blocks"): 32, ("cuda", "blocks"): 19, ("cuda", "whole"): 28}
PROCESS_BYTES = {"cpu": 0.75 * 2**30, "cuda": 2**30}  # without a model

# Name of an evaluation in the log -> (flag of its period, flag of its size, tokens per unit of that size, roughly).
EVALUATIONS = {"val_bpb": ("eval_every", "eval_tokens", 1), "val_loss": ("eval_every", "eval_steps", 1000)}
EVALUATIONS |= {"core": ("core_metric_every", "core_metric_max_per_task", 50_000)}
EVALUATIONS |= {"greedy": ("eval_every", "eval_examples", 20_000)}  # of RL: generated token by token
INLINE_TASK = ("eval_metrics_every", "eval_metrics_max_problems", 1000)  # of SFT; its name is the task's

CHARACTERS_PER_SHARD, BYTES_PER_SHARD, CHARACTERS_PER_TOKEN = 250e6, 1e8, 4.8  # of the public corpus


def sizes(config, device_type):
    """(bytes of the weights and of their gradients, parameters of embedding and head, of the blocks' matrices)."""
    tables = 2 * config.padded_vocab_size * config.n_embd
    matrices = GPT(config).num_params() - tables
    return 4 * matrices + (4 + ops.embedding_dtype(device_type).itemsize) * tables // 2, tables, matrices


def memory(config, tokens, compute, mode="eager", grad_checkpoint=False):
    """
    {what for: bytes} of a rank at the peak of a training step, with micro-batches of `tokens` tokens.

    mode: what is compiled, "eager", "blocks" or "whole". Weights, gradients and optimizer are exact, the rest a guess.
    """
    device, size = compute.device.type, compute.dtype.itemsize
    weights, tables, matrices = sizes(config, device)
    values = SAVED_VALUES.get((device, mode), SAVED_VALUES["cpu", "eager"]) * config.n_embd
    if device == "cpu":  # attention keeps its probabilities
        values += config.n_head * (config.sequence_len + ops.QUERY_BLOCK) // 2
    values = values + config.n_layer * config.n_embd if grad_checkpoint else values * config.n_layer
    chunk = ops.CUDA_LOGITS_BYTES if device == "cuda" else ops.CPU_LOGITS_BYTES
    return {
        "weights": weights + (2 * matrices + tables if size == 2 else 0),  # and their copies in bfloat16
        "gradients": weights + 4 * matrices,  # Muon stacks copies of its own
        "optimizer": (8 * tables + 4 * matrices) / compute.world_size,
        "activations": tokens * values * size,
        "loss head": min(chunk, tokens * config.vocab_size * size) + 6 * tables,
        "process": PROCESS_BYTES.get(device, 0),
    }


def fits(args, config, compute, mode="whole"):
    """Whether memory() of a run in `mode` is below the device's."""
    tokens = args.device_batch_size * config.sequence_len
    return sum(memory(config, tokens, compute, mode, args.grad_checkpoint).values()) <= capacity(compute)


def capacity(compute):
    """Bytes of memory that this process can have."""
    import psutil

    if compute.device.type == "cuda":
        return torch.cuda.get_device_properties(compute.device).total_memory
    return psutil.virtual_memory().available / common.dist_env()[3]


def largest_batch(args, need, available, world_size):
    """The largest --device_batch_size that fits, in words. `need`: memory() of the flag's value."""
    rows_per_step = getattr(args, "target_examples_per_step", 0)  # 0: any number divides it
    if hasattr(args, "total_batch_size"):
        rows_per_step = args.total_batch_size // args.max_seq_len
    free = available - sum(need.values()) + need["activations"]
    most = min(1024, int(free / need["activations"] * args.device_batch_size))
    rows = next((n for n in range(most, 0, -1) if rows_per_step % (n * world_size) == 0), None)
    return f"--device_batch_size={rows} is the largest that fits" if rows else "not even one row fits"


def check_memory(args, config, compute):
    """Warns if this run may need more memory than there is. Raises UserError if it does without any activations."""
    mode, checkpointed = "blocks" if compute.device.type == "cuda" else "eager", getattr(args, "grad_checkpoint", False)
    need, available = (
        memory(config, args.device_batch_size * config.sequence_len, compute, mode, checkpointed),
        capacity(compute),
    )
    state = need["weights"] + need["gradients"] + need["optimizer"]
    remedy = "train a smaller model, or use more devices (torchrun), which share the optimizer state"
    problem = f"weights, gradients and optimizer state need {state / 2**30:,.1f} GiB of memory"
    require(state <= available, f"{problem}, {available / 2**30:,.1f} are free; {remedy}")
    if (total := sum(need.values())) > available:
        print0(
            f"warning: this run may need {total / 2**30:,.1f} GiB of memory, {available / 2**30:,.1f} are free;", end=""
        )
        print0(f" {largest_batch(args, need, available, compute.world_size)}")


class Plan:
    """The plan of one run of a training stage: how the run differs while it is measured, and what all of it needs."""

    def __init__(self, args, compute, config, num_steps):
        self.wanted, self.config, self.num_steps = argparse.Namespace(**vars(args)), config, num_steps
        self.args, self.compute, self.available = args, compute, capacity(compute)
        self.model, self.mode, self.progress, self.step_tokens, self.parts = GPT(config), "eager", 0.0, [], []
        self.largest = self.largest_measured = 0  # tokens of a micro-batch
        self.affordable_tokens = SECONDS * tracking.peak_flops(compute) / 2 / self.model.estimate_flops()
        args.run, args.sample_every = "dummy", -1
        for every, size, unit in [*EVALUATIONS.values(), INLINE_TASK]:
            if getattr(args, every, -1) > 0 and hasattr(args, size):
                setattr(args, every, 2)
                setattr(args, size, max(1, min(getattr(self.wanted, size), int(self.affordable_tokens / unit))))

    def shorten(self, micro_batches, progress):
        """The part of a step's micro-batches to train on: all of them, unless that would take too long."""
        self._count(micro_batches, progress)
        if self.step_tokens[-1] > self.affordable_tokens:
            part = [t[: max(1, int(self.affordable_tokens / 2 / t.size(1)))] for t in micro_batches[0]]
            self.parts.append(part[0].numel())
            micro_batches = [part] * (1 + len(self.parts) % 2)  # two, one, two, one: what does each of them cost?
        self.largest_measured = max([self.largest_measured, *(x.numel() for x, *_ in micro_batches)])
        return micro_batches

    def _count(self, micro_batches, progress):
        sizes = [x.numel() for x, *_ in micro_batches]
        self.step_tokens.append(sum(sizes))
        self.largest, self.progress = max([self.largest, *sizes]), progress

    def check(self, step, last, log, loader):
        """To be called before each step; prints the plan and ends the process when enough steps are measured."""
        if last or step == STEPS or self.wanted.plan_for:
            self.show(log, loader)
            raise SystemExit
        log.last_event = time.perf_counter()

    def show(self, log=None, loader=None):
        """Print the plan."""
        args, config, compute, available = self.wanted, self.config, self.compute, self.available
        steps, tokens = self._horizon(loader)
        flops = tokens * self.model.estimate_flops()
        lines = {"model": f"{config}: {self.model.num_params():,} parameters"}
        lines["training"] = f"{steps:,} steps, {tokens:,} tokens, {flops:.4e} FLOPs"
        if args.plan_for:
            n, (gib, *_), _ = devices = parse_devices(args.plan_for)
            compute, available = Compute(torch.device("cuda"), torch.bfloat16, world_size=n), gib * 2**30
            lines |= self._elsewhere(devices, steps, flops / steps)
        else:
            lines |= self._here(log, steps)
        need = self._memory(compute, available)
        parts = ", ".join(f"{name} {size / 2**30:,.2f}" for name, size in need.items())
        at = f"at --device_batch_size={args.device_batch_size}"
        lines["memory"] = f"{sum(need.values()) / 2**30:,.2f} of {available / 2**30:,.1f} GiB {at} ({parts})"
        lines["batch"] = largest_batch(args, need, available, compute.world_size)
        weights, tables, matrices = sizes(config, compute.device.type)
        saves = 1 + (steps - 1) // args.save_every if args.save_every > 0 else 1
        checkpoint = (weights + 8 * tables + 4 * matrices) / 1e9
        lines["disk"] = f"{min(saves, args.keep or saves)} checkpoints of {checkpoint:,.2f} GB"
        if hasattr(args, "data_dir"):
            shards = math.ceil(tokens * CHARACTERS_PER_TOKEN / CHARACTERS_PER_SHARD)
            lines["disk"] += f"; {shards:,} shards of the public corpus, {shards * BYTES_PER_SHARD / 1e9:,.1f} GB"
        for label, text in lines.items():
            print0(f"{label:<10}{text}")

    def _here(self, log, steps):
        """Lines on the time of the run on this machine, as measured."""
        durations, args, n = list(log.durations), self.wanted, len(log.durations)
        later = durations[1:] or durations
        step = statistics.mean(later)
        training = steps * step
        if self.parts:
            two, one = durations[-2:]
            training = steps * (one + (two - one) * (self.step_tokens[0] / self.parts[0] - 1))
        elif hasattr(args, "target_examples_per_step"):  # of different lengths
            training *= statistics.mean(self.step_tokens) / statistics.mean(self.step_tokens[1:n] or self.step_tokens)
        evaluations = 0.0
        for name, seconds in log.evaluation_seconds.items():
            every, size, _ = EVALUATIONS.get(name, INLINE_TASK)
            period, scale = getattr(args, every), getattr(args, size) / getattr(self.args, size)
            evaluations += scale * seconds * (steps // period + (steps % period > 0) + (name != "core"))
        start = log.wall_clock_seconds - n * step - 2 * sum(log.evaluation_seconds.values())
        parts = f"training {format_duration(training)}, evaluations {format_duration(evaluations)}"
        total = format_duration(training + evaluations + max(0, start))
        device = f"{self.compute.world_size} x {tracking.device_name(self.compute)}"
        return {"device": device, "time": f"{total}: {parts}, start {format_duration(max(0, start))}"}

    def _elsewhere(self, devices, steps, flops):
        """Lines on time, cost and communication on other devices; `flops`: of a step."""
        n, (_, link, price), name = devices
        step, exchanged = flops / (n * tracking.PEAK_FLOPS[name] * MFU), 2 * sizes(self.config, "cuda")[0] * (n - 1) / n
        links = {f"links of {link} GB/s": link} if n <= HOST_DEVICES else NETWORKS
        seconds = {network: exchanged / (speed * 1e9 * LINK_EFFICIENCY) for network, speed in links.items()}
        hours = steps * (step + min(seconds.values())) / 3600
        lines = {"device": f"{n} x {name.upper()}, at {MFU:.0%} of the peak"}
        lines["time"] = f"{format_duration(hours * 3600)} of training, {step * 1e3:,.0f} ms per step plus communication"
        lines["cost"] = f"${hours * n * price:,.0f} at ${price:.2f} per device and hour"
        for network, delay in seconds.items() if n > 1 else ():
            share = delay / (delay + step)
            wrong = "; sharding the optimizer is not the right tool here, see dev/multinode/README.md"
            text = f"{exchanged / 1e9:,.2f} GB per step: {delay * 1e3:,.0f} ms over {network}, {share:.0%} of the step"
            lines[f"link {len(lines) - 2}"] = text + (wrong if share > SHARDING_LIMIT else "")
        return lines

    def _horizon(self, loader):
        """(steps, tokens) of the run. Reads the rest of the loader's batches if only they tell."""
        args, steps = self.wanted, self.num_steps
        if hasattr(args, "total_batch_size") and steps > 0:
            return steps, steps * args.total_batch_size
        if not loader:  # RL: answers yet to be sampled
            return steps, steps * sum(self.step_tokens) // max(1, len(self.step_tokens))
        show = tracking.progress_printer("steps")
        while len(self.step_tokens) < steps if steps > 0 else self.progress < 1:
            batch = next(loader)
            progress = self.compute.all_reduce(torch.tensor([batch.progress], device=self.compute.device))
            self._count(batch.micro_batches, progress.item() / self.compute.world_size)
            show("reading the batches of the run", len(self.step_tokens), steps if steps > 0 else None)
        tokens = self.compute.all_reduce(torch.tensor(sum(self.step_tokens), device=self.compute.device)).item()
        return len(self.step_tokens), getattr(args, "total_batch_size", 0) * len(self.step_tokens) or tokens

    def _memory(self, compute, available):
        """memory() of the run; of this device, its total is the measured peak."""
        args, here = self.wanted, not self.wanted.plan_for
        tokens = self.largest or args.device_batch_size * self.config.sequence_len
        settings = self.config, tokens, compute
        need = memory(*settings, self.mode if here else "blocks", getattr(args, "grad_checkpoint", False))
        if here:
            measured = memory(self.config, self.largest_measured, compute, self.mode)
            peak = tracking.peak_memory_mib(compute) * 2**20 + need["activations"] - measured["activations"]
            need["process"] += peak - sum(need.values())
        return need


def parse_devices(text):
    """(number, values of DEVICES, key) of "8xH100" or "h100". Raises UserError."""
    count, _, name = text.lower().rpartition("x")
    valid = re.fullmatch(r"[1-9]\d*|", count) and name in DEVICES
    require(valid, f"--plan_for={text}: expected a number and a device, such as 8xH100; known: {', '.join(DEVICES)}")
    return int(count or 1), DEVICES[name], name
