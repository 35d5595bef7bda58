"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): momentum orthogonalized by Newton-Schulz."""

import torch

from nanochat.sharded import ShardedOptimizer, Unit

# a, b, c of the Newton-Schulz polynomial a x + b x^3 + c x^5. Its steep slope at 0 makes five iterations sufficient.
COEFFICIENTS = 3.4445, -4.7750, 2.0315

STACK_ELEMENTS = 2**24  # elements orthogonalized at once; bounds temporary memory


def orthogonalize(g, steps=5, dtype=torch.bfloat16):
    """
    Approximate nearest semi-orthogonal matrices (K, r, c) to `g` (K, r, c): singular values end up near 0.7 to 1.2.

    The products are batched over the K matrices. A zero matrix stays zero.
    """
    a, b, c = COEFFICIENTS
    x = g.to(dtype)
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(ShardedOptimizer):
    """
    Muon for 2-D weight matrices. Equals torch.optim.Muon with weight_decay=0 and adjust_lr_fn="original".

    `decay`: share by which a step shrinks each weight that its update shrinks too (cautious weight decay, Chen et al.
    2025, arXiv 2510.12402). Unlike torch's weight_decay, it is not multiplied by the learning rate.
    """

    def __init__(self, params, lr=0.02, momentum=0.95, nesterov=True, ns_steps=5, decay=0.0, ns_dtype=torch.bfloat16):
        defaults = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps, "decay": decay}
        super().__init__(params, defaults)
        self.ns_dtype = ns_dtype
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                by_shape.setdefault(tuple(p.shape), []).append(p)
            for shape, members in by_shape.items():
                unit = Unit(members, group, row_shape=shape)
                unit.state = {"momentum_buffer": members[0].new_zeros(self.own_rows(unit), *shape)}
                self.units.append(unit)

    def update(self, unit, params, grad_scale):
        group, buffer, g = unit.group, unit.state["momentum_buffer"], unit.grad
        g.mul_(grad_scale)
        buffer.lerp_(g, 1 - group["momentum"])
        g = g.lerp_(buffer, group["momentum"]) if group["nesterov"] else buffer
        rows, cols = unit.row_shape
        stacks = g.split(max(1, STACK_ELEMENTS // (rows * cols)))
        updates = (update for stack in stacks for update in orthogonalize(stack, group["ns_steps"], self.ns_dtype))
        for p, update in zip(params, updates, strict=False):  # without padding
            if group["decay"]:
                p.sub_(p * (p * update > 0), alpha=group["decay"])
            p.add_(update, alpha=-group["lr"] * max(1, rows / cols) ** 0.5)
