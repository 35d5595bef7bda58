"""
Base class of both optimizers: gradient averaging and sharded optimizer state (ZeRO-2, Rajbhandari et al. 2020).

Parameters are grouped into units. A unit is a stack of rows: single numbers for AdamW, whole matrices for Muon. Each
rank owns an equal, contiguous range of a unit's rows, zero-padded to a multiple of the world size. A rank receives the
averaged gradient of its rows (reduce-scatter) and computes their update; all ranks apply all updates (all-gather).
Therefore rank r's state is the r-th slice of a tensor that does not depend on the world size.
"""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist


@dataclass
class Unit:
    """Parameters that are updated together; `group` is their entry in param_groups."""

    params: list
    group: dict
    row_shape: tuple = ()
    state: dict = field(default_factory=dict)
    grad: torch.Tensor = None  # this rank's rows of the averaged gradient, between reduce_grads() and step()
    work: object = None  # handle of the reduce-scatter in progress

    @property
    def num_rows(self):
        return sum(p.numel() for p in self.params) // max(1, torch.Size(self.row_shape).numel())


class ShardedOptimizer(torch.optim.Optimizer):
    """Base class of AdamW and Muon. A subclass fills `self.units` and implements update() and apply()."""

    def __init__(self, params, defaults):
        super().__init__(params, defaults)
        distributed = dist.is_available() and dist.is_initialized()
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
        self.steps = 0
        self.units = []

    def update(self, unit):
        """This rank's update rows (own_rows, *row_shape), from `unit.grad` and `unit.state`."""
        raise NotImplementedError

    def apply(self, p, update, group):
        """Apply `update`, of p's shape, to parameter `p` in place."""
        raise NotImplementedError

    def own_rows(self, unit):
        """Rows of a unit per rank, including padding."""
        return -(-unit.num_rows // self.world_size)

    @torch.no_grad()
    def reduce_grads(self):
        """Start averaging the gradients over the ranks. p.grad may be freed after step()."""
        for unit in self.units:
            rows = [
                (torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1, *unit.row_shape) for p in unit.params
            ]
            padding = self.own_rows(unit) * self.world_size - unit.num_rows
            if padding:
                rows.append(rows[0].new_zeros(padding, *unit.row_shape))
            packed = torch.cat(rows) if len(rows) > 1 else rows[0].contiguous()
            if self.world_size == 1:
                unit.grad = packed
                continue
            unit.grad = packed.new_empty(self.own_rows(unit), *unit.row_shape)
            unit.work = dist.reduce_scatter_tensor(unit.grad, packed, async_op=True)

    def _wait(self, unit):
        if unit.work is not None:
            unit.work.wait()
            unit.work = None
            unit.grad.div_(self.world_size)  # gloo cannot average

    @torch.no_grad()
    def grad_sq_norm(self):
        """Sum of squares of this rank's averaged gradient rows, 0-d float32; sum over ranks for the global norm."""
        for unit in self.units:
            self._wait(unit)
        return torch.stack([unit.grad.float().pow(2).sum() for unit in self.units]).sum()

    @torch.no_grad()
    def step(self, grad_scale=None):
        """One update; `grad_scale` (number or 0-d tensor, for clipping) multiplies the averaged gradients first."""
        if self.units[0].grad is None:
            self.reduce_grads()
        self.steps += 1
        gathers = []
        for unit in self.units:
            self._wait(unit)
            if grad_scale is not None:
                unit.grad = unit.grad * grad_scale
            update, unit.grad = self.update(unit), None
            if self.world_size == 1:
                self._apply_all(unit, update)
            else:
                gathered = update.new_empty(self.own_rows(unit) * self.world_size, *unit.row_shape)
                gathers.append((unit, gathered, dist.all_gather_into_tensor(gathered, update, async_op=True)))
        for unit, gathered, work in gathers:
            work.wait()
            self._apply_all(unit, gathered)

    def _apply_all(self, unit, rows):
        sizes = [p.numel() // max(1, torch.Size(unit.row_shape).numel()) for p in unit.params]
        for p, update in zip(unit.params, rows[: unit.num_rows].split(sizes), strict=True):
            self.apply(p, update.view_as(p), unit.group)

    # -----------------------------------------------------------------------------------------------------------------
    # State, independent of the world size

    def state_shard(self):
        """This rank's shard of the state, for load_shards(): {"steps": int, "<unit>.<name>": rows}."""
        tensors = {f"{i}.{name}": t for i, unit in enumerate(self.units) for name, t in unit.state.items()}
        return {"steps": self.steps, **tensors}

    def load_shards(self, shards):
        """Load state_shard()s saved by any number of ranks, in rank order."""
        self.steps = shards[0]["steps"]
        for i, unit in enumerate(self.units):
            own = self.own_rows(unit)
            for name, state in unit.state.items():
                rows = torch.cat([shard[f"{i}.{name}"] for shard in shards])[: unit.num_rows]
                rows = rows[self.rank * own : (self.rank + 1) * own]
                state.zero_()
                state[: rows.size(0)].copy_(rows)
