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
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def normalize_neurons(updates, second_moment, beta2):
    """
    NorMuon (Li et al. 2025, arXiv 2510.05491): `updates` (K, r, c) with neurons of similar size, and the same norms.

    `second_moment` (K, r, 1): moving average of each row's mean square, changed in place; (K, 1, c): each column's.
    """
    updates = updates.float()
    second_moment.lerp_(updates.square().mean(-1 if second_moment.size(-1) == 1 else -2, keepdim=True), 1 - beta2)
    normalized = updates / (second_moment.sqrt() + 1e-8)
    old_norms, new_norms = (x.norm(dim=(-2, -1), keepdim=True) for x in (updates, normalized))
    return normalized * (old_norms / (new_norms + 1e-8))


class Muon(ShardedOptimizer):
    """
    Muon for 2-D weight matrices. Equals torch.optim.Muon with weight_decay=0 and adjust_lr_fn="original".

    `beta2`: decay rate of the second moment in normalize_neurons(), 0 = plain Muon. In a wide matrix, where all rows
    already have the same norm, columns are normalized.
    `decay`: share by which a step shrinks each weight that its update shrinks too (cautious weight decay, Chen et al.
    2025, arXiv 2510.12402). Unlike torch's weight_decay, it is not multiplied by the learning rate.
    """

    def __init__(self, params, lr=0.02, momentum=0.95, beta2=0.0, decay=0.0, ns_dtype=torch.bfloat16):
        super().__init__(params, {"lr": lr, "momentum": momentum, "beta2": beta2, "decay": decay})
        self.ns_dtype = ns_dtype
        for group in self.param_groups:
            for rows, cols in dict.fromkeys(p.shape for p in group["params"]):
                unit = Unit([p for p in group["params"] if p.shape == (rows, cols)], group, (rows, cols))
                own, zeros = self.own_rows(unit), unit.params[0].new_zeros
                unit.state = {"momentum_buffer": zeros(own, rows, cols)}
                if group["beta2"]:
                    unit.state["second_moment"] = zeros(own, *((1, cols) if rows < cols else (rows, 1)))
                self.units.append(unit)

    def update(self, unit, params, grad_scale):
        group, buffer, g = unit.group, unit.state["momentum_buffer"], unit.grad
        g.mul_(grad_scale)
        buffer.lerp_(g, 1 - group["momentum"])
        g = g.lerp_(buffer, group["momentum"])  # Nesterov
        rows, cols = unit.row_shape
        for p, update in zip(params, self._updates(unit, g), strict=False):  # without padding
            if group["decay"]:
                p.sub_(p * (p * update > 0), alpha=group["decay"])
            p.add_(update, alpha=-group["lr"] * max(1, rows / cols) ** 0.5)

    def _updates(self, unit, g):
        """Generates the updates (r, c) of `g` (K, r, c), before the learning rate."""
        beta2, size = unit.group["beta2"], max(1, STACK_ELEMENTS // g[0].numel())
        for i in range(0, len(g), size):
            stack = orthogonalize(g[i : i + size], dtype=self.ns_dtype)
            yield from normalize_neurons(stack, unit.state["second_moment"][i : i + size], beta2) if beta2 else stack
