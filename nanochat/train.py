"""What every stage's loop calls: the geometry of a batch, one optimizer step, when something is due, stop signals."""

import math
import signal
from dataclasses import dataclass

import torch
import torch.distributed as dist

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


def train_step(model, optimizers, micro_batches, compute, grad_clip=0.0, progress=0.0, stop=False):
    """
    One optimizer step on all ranks' micro-batches of (inputs, targets).

    The loss is the mean over the trained tokens of the whole global batch, however these are spread over micro-batches
    and ranks; without any it is 0 and nothing is learnt. Gradients are clipped by their global norm after averaging
    (`grad_clip` 0 = off). Raises Diverged instead of stepping when loss or gradient is not finite.
    """
    totals = torch.tensor([0.0, progress, float(stop)], device=compute.device)
    totals[0] = sum((y >= 0).sum() for _, y in micro_batches)
    if compute.world_size > 1:
        dist.all_reduce(totals)
    scale = compute.world_size / totals[0].clamp(min=1)  # the optimizers average over ranks
    loss = torch.zeros((), device=compute.device)
    for x, y in micro_batches:
        with compute.autocast():
            micro_loss = model(x, y, loss_reduction="sum") * scale
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
        optimizer.step(clip if clip < 1 else None)
        optimizer.zero_grad(set_to_none=True)
    tokens, progress, stops = totals.tolist()
    return StepResult(loss, grad_norm, int(tokens), progress / compute.world_size, stops > 0)


class StopSignal:
    """Turns the first SIGTERM or Ctrl-C into a request, to be looked at after every step; a second one ends at once."""

    def __init__(self):
        self.signum = None
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self._handle)

    def _handle(self, signum, frame):
        print0(f"\n{signal.Signals(signum).name}: saving after this step, then exiting; once more exits at once")
        self.signum = signum
        for s in (signal.SIGTERM, signal.SIGINT):
            signal.signal(s, signal.SIG_DFL)

    @property
    def requested(self):
        return self.signum is not None

    def exit_code(self):
        """130 after Ctrl-C, so that a calling shell script stops too; 0 after SIGTERM: all is saved."""
        return 130 if self.signum == signal.SIGINT else 0
