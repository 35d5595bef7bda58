"""What every stage's loop calls: the geometry of a batch, one optimizer step, when something is due, and
a run's start, saves and end."""

import math
import signal
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist

from nanochat.checkpoint_manager import (
    find_checkpoint,
    has_checkpoints,
    load_optimizers,
    load_weights,
    save_checkpoint,
    set_aside,
)
from nanochat.common import UserError, print0


def rows_per_step(total_batch_size, device_batch_size, max_seq_len, world_size):
    """Rows of the global batch; raises UserError unless every rank gets whole micro-batches."""
    for name, value in (("total_batch_size", total_batch_size), ("device_batch_size", device_batch_size)):
        if value < 1:
            raise UserError(f"--{name}={value}: expected at least 1")
    per_pass = device_batch_size * max_seq_len * world_size  # tokens in one forward pass over all ranks
    if total_batch_size % per_pass:
        raise UserError(
            f"--total_batch_size={total_batch_size:,} is not a multiple of {per_pass:,} tokens "
            f"({device_batch_size} rows x {max_seq_len} tokens x {world_size} ranks)"
        )
    return total_batch_size // max_seq_len


def due(step, every, last=False):
    """Whether something done every `every` steps (and on the last one) is due; -1 or 0 switches it off, also then."""
    return every > 0 and (last or step % every == 0)


@dataclass(frozen=True)
class StepResult:
    loss: float  # nats per trained token of the global batch
    grad_norm: float  # of the averaged gradients, before clipping
    tokens: int  # trained tokens (targets other than -1) of the global batch
    progress: float  # mean over ranks of the progress handed in
    stop: bool  # some rank was asked to stop


class Diverged(UserError):
    """The loss or the gradient is not finite; nothing was changed by the step."""


def train_step(model, optimizers, micro_batches, compute, grad_clip=0.0, progress=0.0, stop=False, left_out=0):
    """
    One optimizer step on all ranks' micro-batches of (inputs, targets) or (inputs, targets, tokens' weights).

    The loss is the mean over the trained tokens of the whole global batch, however these are spread over micro-batches
    and ranks; without any it is 0 and no weight changes. `left_out` are this rank's tokens of weight 0 that the batches
    lack, since they would cost time and teach nothing. Gradients are clipped by their global norm after averaging
    (`grad_clip` 0 = off). Raises Diverged instead of stepping when loss or gradient is not finite.
    """
    totals = torch.tensor([0.0, progress, float(stop)], device=compute.device)
    totals[0] = left_out + sum((y >= 0).sum() for _, y, *_ in micro_batches)
    if compute.world_size > 1:
        dist.all_reduce(totals)
    scale = compute.world_size / totals[0].clamp(min=1)  # the optimizers average over ranks
    loss = torch.zeros((), device=compute.device)
    for x, y, *weights in micro_batches:
        with compute.autocast():
            micro_loss = model(x, y, loss_reduction="sum", weights=weights[0] if weights else None) * scale
        micro_loss.backward()
        loss += micro_loss.detach()
    for optimizer in optimizers:
        optimizer.reduce_grads()
    sums = torch.stack((loss / compute.world_size, sum(optimizer.grad_sq_norm() for optimizer in optimizers)))
    if compute.world_size > 1:
        dist.all_reduce(sums)
    loss, grad_norm = sums[0].item(), math.sqrt(max(sums[1].item(), 0.0)) if sums[1].isfinite() else math.nan
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise Diverged(
            f"the loss is {loss} and the gradient norm {grad_norm}: the run diverged; lower the learning rates"
        )
    clip = grad_clip / (grad_norm + 1e-6) if grad_clip else 1.0
    for optimizer in optimizers:
        if grad_norm:  # else momentum alone would go on moving them
            optimizer.step(clip if clip < 1 else None)
        optimizer.zero_grad(set_to_none=True)
    tokens, progress, stops = totals.tolist()
    return StepResult(loss, grad_norm, int(tokens), progress / compute.world_size, stops > 0)


class Run:
    """
    One stage's run and its place on disk: fresh or resumed, saved, and stopped when SIGTERM or Ctrl-C asks for it.

    With --resume it goes on from the newest good checkpoint in `folder`, if there is any; with --resume_from_step from
    that one. A fresh run sets an earlier one in the same folder aside, but only when it has something to save itself.
    `num_iterations` -1: the stage ends when its data do.
    """

    SAME = (  # or it is not exact
        *("total_batch_size", "max_seq_len", "packing", "seed", "corpus", "target_examples_per_step"),
        *("task", "examples_per_step", "num_samples", "max_new_tokens"),
    )

    def __init__(self, folder, args, compute, config, num_iterations):
        self.folder, self.args, self.compute = folder, args, compute
        self.path, self.meta = None, {}
        if args.resume_from_step >= 0:
            self.path, self.meta = find_checkpoint(folder, args.resume_from_step)
        elif args.resume and has_checkpoints(folder):
            self.path, self.meta = find_checkpoint(folder)
        self.first_step = self.meta.get("step", 0)
        self.finished = bool(self.meta.get("finished")) and self.first_step >= num_iterations
        if self.path:
            self._check(config)
            print0(f"{self.path}: " + ("finished already" if self.finished else "resuming from here"))
        self.stopping = False
        self.signum = None
        if not self.finished:
            for signum in (signal.SIGTERM, signal.SIGINT):
                signal.signal(signum, self._handle)

    def _check(self, config):
        """Raises UserError when the checkpoint is of another model, or of other batches."""
        saved = self.meta["user_config"]
        saved.setdefault("corpus", saved.get("data"))  # its name before version 0.3
        differences = [
            f"{name}={new} (saved: {old})"
            for name, new, old in [
                *((n, v, self.meta["model_config"].get(n)) for n, v in asdict(config).items()),
                *((n, getattr(self.args, n, None), saved.get(n)) for n in self.SAME),
            ]
            if new != old
        ]
        if differences:
            raise UserError(
                f"cannot resume {self.path}, it was made with other settings: {', '.join(differences)}; "
                "run without --resume to start anew, or with another --model_tag"
            )

    def restore(self, model, optimizers):
        """Load weights and optimizer state, if resuming; returns the checkpoint's meta, {} for a fresh run."""
        if self.path:
            load_weights(model, self.path)
            load_optimizers(self.path, self.meta, optimizers)
        return self.meta

    def save(self, step, model, optimizers, state, loader_state, finished=False):
        """Checkpoint of `step` with the JSON-able `state` and all ranks' `loader_state`; returns its path."""
        lanes = [loader_state]
        if self.compute.world_size > 1:
            lanes = [None] * self.compute.world_size
            dist.all_gather_object(lanes, loader_state)
        if self.path is None and self.compute.rank == 0:
            set_aside(self.folder)
        meta = {
            "user_config": vars(self.args),
            "finished": finished,
            **state,
            "loader_state": {lane: position for part in lanes for lane, position in part.items()},
        }
        self.path = save_checkpoint(self.folder, step, model, optimizers, meta, self.compute, self.args.keep)
        if finished:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return self.path

    def _handle(self, signum, frame):
        print0(f"\n{signal.Signals(signum).name}: saving after this step, then exiting; once more exits at once")
        self.signum = signum
        for s in (signal.SIGTERM, signal.SIGINT):
            signal.signal(s, signal.SIG_DFL)

    @property
    def stop_requested(self):
        """Whether this rank was asked to stop; train_step() tells the others."""
        return self.signum is not None

    def exit(self, log):
        """Leave after the save: 130 after Ctrl-C, so that a calling shell script stops too, else 0."""
        log.close()
        print0(f"stopped; saved {self.path}. Go on with the same command and --resume")
        raise SystemExit(130 if self.signum == signal.SIGINT else 0)
