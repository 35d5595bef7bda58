"""
Base class of both optimizers: gradient averaging and sharded optimizer state (ZeRO-2, Rajbhandari et al. 2020).

Parameters are grouped into units. A unit is a stack of rows: single numbers for AdamW, whole matrices for Muon. Each
rank owns an equal, contiguous range of a unit's rows, zero-padded to a multiple of the world size. A rank receives the
averaged gradient of its rows (reduce-scatter) and updates them in place; then all ranks exchange their rows
(all-gather). Therefore rank r's state is the r-th slice of a tensor that does not depend on the world size.
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
    buffer: torch.Tensor = None  # for the gradients of several parameters; used again in each step
    grad: torch.Tensor = None  # this rank's rows of the averaged gradient, between reduce_grads() and step()
    work: object = None  # handle of the reduce-scatter in progress

    @property
    def sizes(self):
        """Number of rows of each parameter."""
        return [p.numel() // torch.Size(self.row_shape).numel() for p in self.params]


class ShardedOptimizer(torch.optim.Optimizer):
    """Base class of AdamW and Muon. A subclass fills `self.units` and implements update()."""

    def __init__(self, params, defaults):
        super().__init__(params, defaults)
        distributed = dist.is_available() and dist.is_initialized()
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
        self.steps, self.units = 0, []

    def update(self, unit, params, grad_scale):
        """Update `params` in place: tensors of rows (n, *row_shape), in total at most the rows of `unit.grad`."""
        raise NotImplementedError

    def own_rows(self, unit):
        """Rows of a unit per rank, including padding."""
        return -(-sum(unit.sizes) // self.world_size)

    def own_params(self, unit):
        """Views of this rank's rows of a unit, one tensor (n, *row_shape) for each parameter that has some."""
        first, n = self.rank * self.own_rows(unit), self.own_rows(unit)
        views = []
        for p in unit.params:
            rows = p.detach().view(-1, *unit.row_shape)
            views.append(rows[max(0, first) : max(0, first + n)])
            first -= len(rows)
        return [view for view in views if len(view)]

    def pack(self, unit, tensors, num_rows, out=None):
        """One tensor (num_rows, *row_shape) of `tensors`, zero-padded; `tensors` itself if it is one of this size."""
        rows = [t.reshape(-1, *unit.row_shape) for t in tensors]
        padding = num_rows - sum(map(len, rows))
        if padding:
            rows.append(unit.params[0].new_zeros(padding, *unit.row_shape))
        return torch.cat(rows, out=out) if len(rows) > 1 else rows[0].contiguous()

    @torch.no_grad()
    def reduce_grads(self):
        """Start averaging the gradients over the ranks. Frees those that are copied (units of several parameters)."""
        for unit in self.units:
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in unit.params]
            own = self.own_rows(unit)
            packed = self.pack(unit, grads, own * self.world_size, out=unit.buffer)
            if len(grads) > 1:  # copied; otherwise `packed` is the gradient itself
                unit.buffer = packed
                for p in unit.params:
                    p.grad = None
            unit.grad = packed
            if self.world_size > 1:
                unit.grad = packed.new_empty(own, *unit.row_shape)
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
        norms = [torch.linalg.vector_norm(unit.grad, dtype=torch.float32) for unit in self.units]
        return torch.stack(norms).square().sum()

    def grad_sq_norms(self):
        """{parameter: sum of squares of this rank's rows of its averaged gradient}; valid after grad_sq_norm()."""
        norms = {}
        for unit in self.units:
            first = -self.rank * self.own_rows(unit)  # of the parameter's rows, counted from this rank's first one
            for p, rows in zip(unit.params, unit.sizes, strict=True):
                norms[p] = unit.grad[max(0, first) : max(0, first + rows)].float().square().sum()
                first += rows
        return norms

    @torch.no_grad()
    def step(self, grad_scale=None):
        """One update; `grad_scale` (number or 0-d tensor, for clipping) multiplies the averaged gradients first."""
        if self.units[0].grad is None:
            self.reduce_grads()
        self.steps += 1
        gathers = []
        for unit in self.units:
            self._wait(unit)
            params = self.own_params(unit)
            self.update(unit, params, 1.0 if grad_scale is None else grad_scale)
            unit.grad = None
            if self.world_size > 1:
                rows = self.pack(unit, params, self.own_rows(unit))
                gathered = rows.new_empty(len(rows) * self.world_size, *unit.row_shape)
                gathers.append((unit, gathered, dist.all_gather_into_tensor(gathered, rows, async_op=True)))
        for unit, gathered, work in gathers:
            work.wait()
            for p, rows in zip(unit.params, gathered[: sum(unit.sizes)].split(unit.sizes), strict=True):
                p.copy_(rows.view_as(p))

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
                rows = torch.cat([shard[f"{i}.{name}"] for shard in shards])[: sum(unit.sizes)]
                rows = rows[self.rank * own : (self.rank + 1) * own]
                state.zero_()
                state[: rows.size(0)].copy_(rows)
