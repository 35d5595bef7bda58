"""Learning rate and momentum schedules: pure functions of progress (0 to 1) or of the step."""


def lr_multiplier(progress, warmup_ratio=0.0, warmdown_ratio=0.2, final_lr_frac=0.0, per_step=0.0):
    """
    Rises linearly to 1 over the first `warmup_ratio`, falls to `final_lr_frac` over the last `warmdown_ratio`.

    `per_step`: progress of one step; during the warm-up it is added, so that the first step's rate is not 0.
    """
    progress = min(max(progress, 0.0), 1.0)
    rising = min(1.0, (progress + per_step) / warmup_ratio) if progress < warmup_ratio else 1.0
    remaining = min(1.0, (1 - progress) / warmdown_ratio) if warmdown_ratio else 1.0
    return rising * (final_lr_frac + (1 - final_lr_frac) * remaining)


def muon_momentum(step, warmup_steps=300, lr_mult=1.0, final=0.95):
    """
    Momentum of Muon at `step`: rises linearly from 0.85 to 0.95, since early gradients are soon out of date.

    A learning rate below its maximum (`lr_mult` < 1) lowers it in proportion: to `final` at 0, if that is lower.
    """
    risen = 0.85 + 0.10 * min(step / warmup_steps, 1.0)
    return risen - max(0.0, risen - final) * max(0.0, 1 - lr_mult)


def muon_decay(step, num_steps, total):
    """
    Muon's weight decay at `step`: falls linearly to 0 and sums up to `total` over the run.

    A step's decay is at most 0.02, which makes the sum smaller in runs of fewer than 100 x `total` steps.
    """
    return min(0.02, total * 2 * (num_steps - step) / (num_steps * (num_steps + 1)))


def set_schedule(optimizers, lr_mult, momentum=None, decay=0.0):
    """Set the learning rates of all groups, and `momentum` and `decay` of Muon's."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lr_mult
            if momentum is not None and "momentum" in group:
                group |= {"momentum": momentum, "decay": decay}
