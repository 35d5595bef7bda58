"""AdamW (Loshchilov and Hutter 2019) with state sharded over the ranks."""

import math

import torch

from nanochat.sharded import ShardedOptimizer, Unit


class AdamW(ShardedOptimizer):
    """Equals torch.optim.AdamW with the same arguments, except that the moments are always float32."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        for group in self.param_groups:
            for p in group["params"]:
                unit = Unit([p], group)
                rows = self.own_rows(unit)
                unit.state = {
                    name: torch.zeros(rows, dtype=torch.float32, device=p.device) for name in ("exp_avg", "exp_avg_sq")
                }
                self.units.append(unit)

    def update(self, unit):
        beta1, beta2 = unit.group["betas"]
        m, v, g = unit.state["exp_avg"], unit.state["exp_avg_sq"], unit.grad.float()
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        correction1, correction2 = 1 - beta1**self.steps, 1 - beta2**self.steps
        denominator = v.sqrt().div_(math.sqrt(correction2)).add_(unit.group["eps"])
        return (m / denominator).div_(correction1)

    def apply(self, p, update, group):
        if group["weight_decay"]:
            p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(update.to(p.dtype), alpha=-group["lr"])
