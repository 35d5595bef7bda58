"""
A small study of scaling, illustrative only: which size of model is best for a budget of compute?

    python -m dev.scaling                            # depths 2 to 6, three budgets: about half an hour on two cores
    python -m dev.scaling --budgets=2e13,4e13 --depths=2,3,4,5

For each budget C in FLOPs it trains one model per depth, fits a parabola of the final validation bpb over log N (N:
parameters), takes its minimum, and fits N_opt ~ C^a and D_opt ~ C^b (D: training tokens) through the minima (Hoffmann
et al. 2022, approach 2). The intervals are from a bootstrap over the residuals of the parabolas. It uses the corpus and
the tokenizer of the base directory; finished runs are kept, as in dev/sweep.py.
"""

from random import Random

import numpy as np

from dev.sweep import run_stage
from nanochat.cli import make_parser, parse_args, run_script
from nanochat.common import UserError, base_dir, print0, require
from nanochat.compare import bpb_curve
from nanochat.records import table

FLAGS = "--num_iterations=-1 --total_batch_size=4096 --device_batch_size=8 --max_seq_len=512 --eval_every=1000000"
FLAGS += " --eval_tokens=65536 --core_metric_every=-1 --sample_every=-1 --save_every=-1"


def best_size(log_sizes, losses):
    """The minimum of the parabola through (log N, loss), and the fitted losses; None where it has no minimum."""
    coefficients = np.polyfit(log_sizes, losses, 2)
    minimum = -coefficients[1] / (2 * coefficients[0]) if coefficients[0] > 0 else None
    return minimum, np.polyval(coefficients, log_sizes)


def exponents(budgets, log_sizes, losses):
    """(a, b) of N_opt ~ C^a and D_opt ~ C^b; None if a parabola has no minimum. D = C / (FLOPs per token) ~ C / N."""
    minima = [best_size(sizes, values)[0] for sizes, values in zip(log_sizes, losses, strict=True)]
    if None in minima:
        return None
    a = np.polyfit(np.log(budgets), minima, 1)[0]
    return a, 1 - a


def bootstrap(budgets, log_sizes, losses, resamples):
    """exponents() of `resamples` resamples, each the fitted losses plus random residuals; those with a minimum."""
    rng, fits = Random(0), [best_size(sizes, values)[1] for sizes, values in zip(log_sizes, losses, strict=True)]
    # A parabola takes three degrees of freedom.
    scale = (len(fits[0]) / (len(fits[0]) - 3)) ** 0.5
    residuals = [scale * x for values, fit in zip(losses, fits, strict=True) for x in values - fit]
    samples = ([fit + np.array(rng.choices(residuals, k=len(fit))) for fit in fits] for _ in range(resamples))
    return [pair for sample in samples if (pair := exponents(budgets, log_sizes, sample))]


def describe_minimum(budget, sizes, values):
    """One line: the best size for a budget, and whether it lies within the sizes that were trained."""
    minimum, _ = best_size(sizes, values)
    if minimum is None:
        return f"C = {budget:.0e}: the parabola has no minimum"
    note = "" if sizes.min() < minimum < sizes.max() else ", outside of the range"
    return f"C = {budget:.0e}: N_opt = {np.exp(minimum):,.0f}{note}"


def main(argv=None):
    parser = make_parser("dev.scaling", __doc__)
    add = parser.add_argument
    add("--budgets", default="2e13,4e13,6e13", help="FLOPs of a run, separated by commas")
    add("--depths", default="2,3,4,5,6", help="depths of the models, separated by commas")
    add("--resamples", type=int, default=1000, help="number of bootstrap samples")
    args = parse_args(parser, argv)
    try:
        budgets, depths = [float(x) for x in args.budgets.split(",")], [int(x) for x in args.depths.split(",")]
    except ValueError as e:
        raise UserError(f"--budgets and --depths: expected numbers separated by commas ({e})") from None
    require(args.resamples >= 1, f"--resamples={args.resamples}: expected at least 1")
    valid = all(0 < budget < float("inf") for budget in budgets) and min(depths) >= 1
    require(valid, f"--budgets={args.budgets} --depths={args.depths}: expected numbers above 0")
    enough = len(budgets) >= 2 and len(depths) >= 4
    require(enough, "expected at least two budgets and four depths: a parabola has three coefficients")
    log_sizes, losses, rows = [], [], []
    for budget in budgets:
        points = []
        for depth in depths:
            folder = base_dir() / "sweeps" / "scaling" / f"{budget:g}-d{depth}"
            flags = [*FLAGS.split(), f"--depth={depth}", f"--target_flops={budget:g}"]
            record, metrics = run_stage(folder, "scripts.base_train", flags)
            flops, bpb = bpb_curve(record, metrics)[-1]
            size, tokens = record["flops_per_token"] / 6, flops / record["flops_per_token"]
            points.append((np.log(size), bpb))  # the size includes attention, as the FLOPs do
            rows.append([f"{budget:.0e}", str(depth), f"{size:,.0f}", f"{tokens:,.0f}", f"{bpb:.4f}"])
        log_sizes.append(np.array(points)[:, 0])
        losses.append(np.array(points)[:, 1])
    print0("\n" + table(["FLOPs", "depth", "FLOPs per token / 6", "tokens", "validation bpb"], rows))
    for budget, sizes, values in zip(budgets, log_sizes, losses, strict=True):
        print0(describe_minimum(budget, sizes, values))
    fitted, resampled = exponents(budgets, log_sizes, losses), bootstrap(budgets, log_sizes, losses, args.resamples)
    require(fitted and resampled, "a parabola has no minimum; take smaller or larger depths")
    low, high = np.percentile(resampled, [2.5, 97.5], axis=0)
    for i, name in enumerate(("N_opt ~ C^a, a", "D_opt ~ C^b, b")):
        print0(f"{name} = {fitted[i]:.2f} [{low[i]:.2f}, {high[i]:.2f}]")
    print0("Illustrative: tiny models, few tokens, one seed. Do not extrapolate.")


if __name__ == "__main__":
    run_script(main)
