"""Building blocks of every training stage: batch geometry, one optimizer step, checkpoints of a run."""

import copy
import functools
import math
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections import namedtuple
from dataclasses import asdict, replace

import torch
import torch.distributed as dist

from nanochat import checkpoint_manager as checkpoints
from nanochat import cluster, ops
from nanochat.common import UserError, base_dir, print0, print_error, require, set_aside, torchrun_job, write_jsonl
from nanochat.dataloader import Prefetch, eval_batches, lane_batches
from nanochat.plan import Plan, capacity, check_memory, memory
from nanochat.tokenizer import check_tokenizer
from nanochat.tracking import with_progress


def rows_per_step(args, world_size):
    """Number of rows of the global batch. Raises UserError unless every rank gets whole micro-batches."""
    for name in ("total_batch_size", "device_batch_size", "max_seq_len"):
        require(getattr(args, name) >= 1, f"--{name}={getattr(args, name)}: expected at least 1")
    rank_rows, T, total = args.device_batch_size, args.max_seq_len, args.total_batch_size
    per_pass = rank_rows * T * world_size  # tokens in one forward pass over all ranks
    size = f"{per_pass:,} tokens ({rank_rows} rows x {T} tokens x {world_size} ranks)"
    require(total % per_pass == 0, f"--total_batch_size={total:,} is not a multiple of {size}")
    return total // T


def epoch_steps(args, task, per_step):
    """Number of optimizer steps: --num_iterations, else --num_epochs passes over `task`. Raises UserError if 0."""
    steps = args.num_iterations if args.num_iterations > 0 else args.num_epochs * len(task) // per_step
    require(steps >= 1, f"nothing to train: {len(task)} examples, {per_step} per step; set --num_iterations")
    return steps


def due(step, every, last=False):
    """Whether a periodic action is due: every `every` steps and at the last step. `every` -1 or 0 = never."""
    return every > 0 and (last or step % every == 0)


# ---------------------------------------------------------------------------------------------------------------------
# One optimizer step


# Result of train_step(). `loss`: nats per trained token of the global batch. `grad_norm`: of the averaged gradients,
# before clipping. `tokens`: trained tokens (targets other than -1) of the global batch. `progress`: mean over ranks of
# the argument. `stop`: some rank received a signal to stop.
StepResult = namedtuple("StepResult", "loss grad_norm tokens progress stop")


class DivergenceError(UserError):
    """The loss or the gradient is not finite."""


def train_step(
    model, optimizers, micro_batches, compute, *, grad_clip=0.0, progress=0.0, skipped_tokens=0, stop=False, lock=None
):
    """
    One optimizer step. `micro_batches`: this rank's (inputs, targets) or (inputs, targets, token weights).

    The loss is the mean over all trained tokens of the global batch, so it does not depend on how they are split into
    micro-batches and ranks. Without any trained token it is 0 and no weight changes. `skipped_tokens`: number of
    trained tokens of weight 0 that this rank omitted from its micro-batches; the mean includes them. Gradients are
    averaged, then clipped by their global norm (`grad_clip` 0 = off). Raises DivergenceError, before any change, if
    loss or gradient is not finite. `lock` is acquired before the first change of weights or optimizer state.
    """
    totals = torch.tensor([0.0, progress, float(stop)]).to(compute.device, non_blocking=True)
    totals[0] = skipped_tokens + sum((y >= 0).sum() for _, y, *_ in micro_batches)
    compute.all_reduce(totals)
    scale = compute.world_size / totals[0].clamp(min=1)  # the optimizers average over ranks
    loss = torch.zeros((), device=compute.device)
    for x, y, *weights in with_progress(micro_batches, "step", "micro-batches"):
        with compute.autocast():
            micro_loss = model(x, y, loss_reduction="sum", weights=weights[0] if weights else None) * scale
        micro_loss.backward()
        loss += micro_loss.detach()
    for optimizer in optimizers:
        optimizer.reduce_grads()
    sums = torch.stack((loss / compute.world_size, sum(optimizer.grad_sq_norm() for optimizer in optimizers)))
    # The only place of a step that waits for the device.
    loss, sq_norm, tokens, progress, stops = torch.cat((compute.all_reduce(sums), totals)).tolist()
    grad_norm = math.sqrt(max(sq_norm, 0.0)) if math.isfinite(sq_norm) else math.nan
    if not math.isfinite(loss + grad_norm):
        raise DivergenceError(f"the run diverged: the loss is {loss} and the gradient norm {grad_norm}")
    if lock:
        lock.acquire()
    clip = grad_clip / (grad_norm + 1e-6) if grad_clip else 1.0
    for optimizer in optimizers:
        if grad_norm:  # with a zero gradient, momentum alone would still move the weights
            optimizer.step(clip if clip < 1 else None)
        optimizer.zero_grad(set_to_none=True)
    return StepResult(loss, grad_norm, int(tokens), progress / compute.world_size, stops > 0)


# ---------------------------------------------------------------------------------------------------------------------
# A stage's run: checkpoints, resume, stop on SIGTERM or Ctrl-C

STOP_SIGNALS = signal.SIGINT, signal.SIGTERM

TOKENS_PER_CONVERSATION = 256  # a rough mean, to estimate the length of a run

# A run can be resumed only with the same values of these flags.
RESUME_INVARIANTS = "total_batch_size max_seq_len packing seed corpus recipe target_examples_per_step".split()
RESUME_INVARIANTS += "task examples_per_step num_samples max_new_tokens muon_beta2".split()

# What a checkpoint is made from besides the tokenizer -> (how it differs, how to get the old one back).
ORIGINS = {
    "model": ("another checkpoint of the previous stage", "select that one with --step, or rename its folder back"),
    "shards": ("other shards, or another number of them", "put those back"),
    "mixture": ("other conversations or tasks", "put those back"),
}


class Stage:
    """
    One run of a training stage, and its checkpoint folder.

    --resume continues from the newest intact checkpoint if there is one, --resume_from_step from the given one. When a
    fresh run first saves, it renames the folder of an earlier run. `num_steps` is -1 if the run is one epoch long.
    `made_from`: {"tokenizer" or a name of ORIGINS: fingerprint}; a run resumes only a checkpoint with equal ones.
    """

    def __init__(self, source, model_tag, args, compute, config, num_steps, made_from):
        self.folder, self.args, self.compute = checkpoints.checkpoint_dir(source, model_tag), args, compute
        self.made_from, self.path, self.meta = made_from, None, {}
        self._check_hosts()
        self.plan = Plan(args, compute, config, num_steps) if args.plan or args.plan_for else None
        if not self.plan:
            self.folder_lock = checkpoints.lock(self.folder) if compute.writes else None
            self._find_checkpoint()
            check_memory(args, config, compute)
        self.first_step = self.meta.get("step", 0)
        self.finished = bool(self.meta.get("finished")) and self.first_step >= num_steps
        if self.path:
            if origins := self.meta.get("made_from"):  # before the config, which has the vocabulary's size
                check_tokenizer(made_from["tokenizer"], origins["tokenizer"], self.path)
            self._check_invariants(config)
            self._check_origins(origins)
            is_beyond = not self.finished and 0 < num_steps < self.first_step
            require(not is_beyond, f"{self.path} is beyond the {num_steps} steps of this run; raise --num_iterations")
            print0(f"{self.path}: " + ("finished already" if self.finished else "resuming from here"))
        self.saved_step, self.step, self.save, self.log, self.positions = self.first_step, 0, None, None, {}
        self.first_signal = None  # time of arrival
        # Held by the main thread while the weights differ from what self.save would save: from a step's update to the
        # next call of checkpoint(). A thread that stops the run holds it while it saves.
        self.lock = threading.Lock()
        if not (self.finished or self.plan):
            self._catch_signals()

    def _check_hosts(self):
        """Raises UserError unless all hosts have the same tokenizer, data and source model."""
        hosts = self.compute.all_gather((socket.gethostname(), self.made_from))
        first, expected = hosts[0]
        for host, origins in hosts:
            names = ", ".join(name for name in expected if origins[name] != expected[name])
            require(not names, f"{host} has another {names} than {first}; copy {base_dir()} from one to the other")

    def _find_checkpoint(self):
        """Set path and meta of the checkpoint that this run resumes, if any, and the ids of run and torchrun's job."""
        step = self.args.resume_from_step if self.args.resume_from_step >= 0 else None
        exists = any(self.compute.all_gather(bool(checkpoints.step_dirs(self.folder))))
        self.job = self.compute.all_gather(torchrun_job()[0])[0]
        if any(self.compute.all_gather(cluster.has_restarted())) and exists:
            path, meta = checkpoints.find_checkpoint(self.folder, compute=self.compute)
            if meta.get("job") == self.job:  # else this run has not saved yet
                self.path, self.meta = path, meta
        if not self.path and (step is not None or self.args.resume and exists):
            self.path, self.meta = checkpoints.find_checkpoint(self.folder, step, self.compute)
        self.run = self.compute.all_gather(self.meta.get("run") or uuid.uuid4().hex)[0]

    def _check_invariants(self, config):
        """Raises UserError if the checkpoint has another model config or other values of RESUME_INVARIANTS."""
        saved = {"recipe": "reference", "muon_beta2": 0.0} | self.meta["user_config"]  # as in older versions
        pairs = [(name, value, self.meta["model_config"].get(name)) for name, value in asdict(config).items()]
        pairs += [(name, getattr(self.args, name, None), saved.get(name)) for name in RESUME_INVARIANTS]
        differences = ", ".join(f"{name}={new} (saved: {old})" for name, new, old in pairs if new != old)
        problem = f"cannot resume {self.path}, it was made with other settings: {differences}"
        require(not differences, f"{problem}; set the saved values, --recipe first, or start anew without --resume")

    def _check_origins(self, saved):
        """Raises UserError if the checkpoint was made from something else, or does not say from what."""
        hint = "add --resume_unverified if they are the same, else run without --resume to start anew"
        require(saved or self.args.resume_unverified, f"{self.path} does not record its tokenizer and data; {hint}")
        for name, (difference, remedy) in ORIGINS.items() if saved else ():
            old, new = saved.get(name), self.made_from.get(name)
            cause = f"it was made from {difference} ({str(old)[:12]}, now {str(new)[:12]})"
            require(old == new, f"cannot resume {self.path}, {cause}; run without --resume to start anew, or {remedy}")

    def setup_optimizers(self, model):
        """Optimizers with the learning rates of the flags. When resuming, also loads weights and optimizer state."""
        args = self.args
        rates = args.unembedding_lr, args.embedding_lr, args.matrix_lr, args.weight_decay
        half_life, beta1 = getattr(args, "adam_half_life", 0), getattr(args, "adam_beta1", 0.8)
        beta2 = min(max(0.95, 0.5 ** (args.total_batch_size / half_life)), 0.9999) if half_life else 0.95
        optimizers = model.setup_optimizers(*rates, self.compute.dtype, (beta1, beta2), args.muon_beta2)
        if self.path:
            checkpoints.load_weights(model, self.path)
            checkpoints.load_optimizers(self.path, self.meta, optimizers)
        return optimizers

    def compile(self, model, tokens, fixed_shape=False):
        """
        The model to train: compiled if --compile is set, by default in all but short runs.

        tokens: rough number of training tokens. fixed_shape: all batches have the same shape.
        """
        device, enabled = self.compute.device.type, self.args.compile
        if enabled is None:
            enabled = device != "mps" and tokens * model.estimate_flops() >= 1e13  # about a minute on two CPU cores
        if not enabled or self.args.plan_for:  # which runs nothing
            return model
        whole = sum(memory(self.args, model.config, self.compute, whole=True).values())
        if device == "cuda" and fixed_shape and whole <= capacity(self.compute):
            return torch.compile(model, dynamic=False, fullgraph=True)  # a fifth faster than block by block
        if problem := ops.compiler_problem(device):
            print0(f"warning: training without torch.compile(), which is slower: {problem}")
            return model
        print0("compiling the model, which takes up to a minute, or seconds if it is cached (--compile=0: not at all)")
        model.compile()
        return model

    def training_loader(self, source, rows):
        """Prefetch of training Batches from `source`; when resuming, from the checkpoint's position."""
        T, rank_rows, states = self.args.max_seq_len, self.args.device_batch_size, self.meta.get("loader_state")
        batches = lane_batches(source, rows, T, rank_rows, self.compute, self.args.packing, states)
        return Prefetch(batches, self.compute.device)

    def validation_batches(self, source):
        """This rank's list of (inputs, targets): --eval_tokens tokens of `source`, over all ranks."""
        rows, T = self.args.device_batch_size * self.compute.world_size, self.args.max_seq_len
        return eval_batches(source, rows, T, max(1, self.args.eval_tokens // (rows * T)), self.compute)

    def train_step(self, model, optimizers, micro_batches, **settings):
        """Call train_step(). A stop signal that any rank has received stops all ranks."""
        if self.plan:
            micro_batches = self.plan.shorten(micro_batches, settings.get("progress", 0.0))
        else:
            settings |= dict(stop=self.first_signal is not None, lock=self.lock)
        try:
            result = train_step(model, optimizers, micro_batches, self.compute, **settings)
        except DivergenceError as e:
            path = self._describe_divergence(model, optimizers, str(e))
            remedy = "lower the learning rates; --resume continues from the newest checkpoint, if there is one"
            raise UserError(f"{e} in step {self.step + 1} ({path} has the details); {remedy}") from None
        if result.stop and self.first_signal is None:  # only another rank has received a signal
            self.wakeup.send(bytes([signal.SIGTERM]))
        return result

    def _describe_divergence(self, model, optimizers, problem):
        """Write the step, the batch's position in the data and all norms to a file. Collective; returns its path."""
        sq_norms = {p: norm for optimizer in optimizers for p, norm in optimizer.grad_sq_norms().items()}
        totals = self.compute.all_reduce(torch.stack(list(sq_norms.values()))).sqrt().tolist()
        grad_norms = dict(zip(sq_norms, totals, strict=True))
        positions = {lane: at for part in self.compute.all_gather(self.positions) for lane, at in part.items()}
        lines = [{"problem": problem, "step": self.step + 1, "data_before_the_batch": positions}]
        for name, p in model.named_parameters():
            norms = {"weight_norm": float(p.detach().norm()), "gradient_norm": grad_norms[p]}
            lines.append({"parameter": name.removeprefix("_orig_mod."), **norms})
        path = base_dir() / "report" / f"diverged-{self.folder.parent.name}.jsonl"
        if self.compute.writes:
            write_jsonl(path, lines)
        return path

    def checkpoint(self, step, last, model, optimizers, loader, log, **state):
        """
        Save a checkpoint if one is due after `step` steps, and remember how to, in case a signal stops the next step.

        All ranks call it, once per step. `state` (JSON-serializable) and the positions of `loader` (a Prefetch, or
        None) are added to meta.json.
        """
        if self.plan:
            return self.plan.check(step, last, log, loader)
        if step == self.first_step:  # later, train_step() has acquired it
            self.lock.acquire()
        state = copy.deepcopy({"finished": last, **state, "log_state": log.state()})
        self.step, self.log, self.positions = step, log, loader.state if loader else {}  # of this rank's lanes
        self.save = functools.partial(self._save, step, model, optimizers, self.positions, state)
        if last or due(step, self.args.save_every):
            self.save(self.compute)
        self.lock.release()

    def _save(self, step, model, optimizers, positions, state, compute):
        """Write a checkpoint, unless there is nothing new since the last one."""
        if step == self.saved_step or getattr(self.args, "dry_run", False):
            return
        gathered = compute.all_gather((positions, state))
        if self.path is None and compute.writes and checkpoints.step_dirs(self.folder):
            set_aside(self.folder, "an earlier run")
        meta = {"user_config": vars(self.args), "made_from": self.made_from, "run": self.run, "job": self.job}
        meta |= gathered[0][1] | {"loader_state": {lane: at for part, _ in gathered for lane, at in part.items()}}
        self.path = checkpoints.save_checkpoint(self.folder, step, model, optimizers, meta, compute, self.args.keep)
        self.saved_step = step

    def close(self, loader, log, **values):
        """Close loader and log, and add `values`, which are known only after the last save, to meta.json."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self.wakeup.close()
        if loader:
            loader.close()
        log.close()
        if self.folder_lock:
            self.folder_lock.release()
        if self.path:
            checkpoints.update_meta(self.path, self.compute, **values)

    # -----------------------------------------------------------------------------------------------------------------
    # Stop by a signal. A handler in Python would run only after the present call into C++, such as a backward pass.
    # Therefore the signal wakes a thread, which saves while the main thread goes on, up to its next update of weights.

    def _catch_signals(self):
        """From now on, SIGINT and SIGTERM stop the run."""
        # The main thread may be in a collective, so the threads of the ranks need a process group of their own.
        compute = replace(self.compute, group=dist.new_group(backend="gloo") if self.compute.world_size > 1 else None)
        receiver, self.wakeup = socket.socketpair()
        self.wakeup.setblocking(False)
        signal.set_wakeup_fd(self.wakeup.fileno())
        for signum in STOP_SIGNALS:
            signal.signal(signum, lambda *_: None)  # the number of the signal goes to the socket
        threading.Thread(target=self._watch, args=(receiver, compute), daemon=True, name="signals").start()

    def _watch(self, receiver, compute):
        """Thread: stop the run at the first signal; at a second one, exit at once."""
        while data := receiver.recv(1):
            if data[0] not in STOP_SIGNALS:
                continue
            if self.first_signal is None:
                self.first_signal = time.monotonic()
                threading.Thread(target=self._stop, args=(data[0], compute), daemon=True, name="stop").start()
            elif time.monotonic() > self.first_signal + 1:  # torchrun may pass on what a terminal has sent already
                os._exit(130)

    def _stop(self, signum, compute):
        """Thread: save the state before the present step, on all ranks alike, and end the process."""
        sys.excepthook = lambda *_: time.sleep(60)  # the main thread's collectives fail as soon as another rank ends
        code = 1
        try:
            if cluster.has_failed():  # torchrun stops this rank too
                return
            try:
                print0(f"\n{signal.Signals(signum).name}: saving the last complete step; a second signal exits at once")
            except OSError:  # Ctrl-C has ended the reader of the pipe too, such as tee
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            signum = min(compute.all_gather(signum))
            # A rank may be one step ahead. The lock keeps this one's step while all ranks compare theirs.
            while set(compute.all_gather((locked := self.lock.acquire(timeout=0.1), self.step))) != {(True, self.step)}:
                if locked:
                    self.lock.release()
                time.sleep(0.05)
            if self.save:
                self.save(compute)
                self.log.close()
            result = f"saved {self.path}. Continue with the same command and --resume"
            print0(f"stopped; {result if self.path else 'nothing to save'}")
            code = 130 if signum == signal.SIGINT else 0  # 130 stops a calling shell script too
            compute.all_gather(None)  # a rank that ends earlier would make torchrun kill the others
        except UserError as e:
            print_error(str(e))
            code = 2
        except RuntimeError:
            if not cluster.has_failed():
                print_error("not saved, because another process has ended")
        finally:
            os._exit(code)
