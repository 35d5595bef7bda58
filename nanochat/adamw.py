"""AdamW (Loshchilov and Hutter 2019) with state sharded over the ranks."""

import torch
from torch.optim.adamw import adamw

from nanochat.sharded import ShardedOptimizer, Unit


class AdamW(ShardedOptimizer):
    """Equals torch.optim.AdamW with the same arguments, except that the moments are always float32."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        for group in self.param_groups:
            for p in group["params"]:
                unit = Unit([p], group)
                rows = self.own_rows(unit)
                unit.state = {name: p.new_zeros(rows, dtype=torch.float32) for name in ("exp_avg", "exp_avg_sq")}
                self.units.append(unit)

    def update(self, unit, params, grad_scale):
        for p in params:  # one, or none if all rows of this rank are padding
            m, v, g = (t[: len(p)] for t in (unit.state["exp_avg"], unit.state["exp_avg_sq"], unit.grad))
            p32 = p.float()  # a copy, unless p is float32
            group, steps = unit.group, torch.full((), self.steps - 1.0, device=p.device)
            options = dict(fused=True, grad_scale=torch.full((), 1.0 / grad_scale, device=p.device))
            options |= dict(amsgrad=False, maximize=False, lr=group["lr"], eps=group["eps"])
            options |= dict(beta1=group["betas"][0], beta2=group["betas"][1], weight_decay=group["weight_decay"])
            adamw([p32], [g.float()], [m], [v], [], [steps], **options)
            if p32 is not p:
                p.copy_(p32)
