"""Comparison of runs: the flags that differ, final metrics, and the compute multiplier."""

import math
from pathlib import Path

from nanochat.common import require
from nanochat.records import format_value, read_run, table

STAGES = {"base": "Base model training", "mid": "Midtraining", "sft": "Chat SFT", "rl": "Chat RL"}
NOT_COMPARED = ("step", "time", "progress", "lr_mult", "dt_ms", "data_ms", "tokens")  # keys of metrics
NOTE = "Compute multiplier: FLOPs at which the first run reached this run's final bpb, divided by this run's FLOPs."
NOTE += " A commit with * had uncommitted changes."


def bpb_curve(record, rows):
    """[(training FLOPs, validation bpb)] of a run, one per validation; [] for stages without."""
    flops = record["flops_per_token"] * record["flags"].get("total_batch_size", 0)  # of a step
    return [(row["step"] * flops, row["val_bpb"]) for row in rows if "val_bpb" in row]


def compute_multiplier(baseline, variant):
    """
    FLOPs of the baseline / FLOPs of the variant at the variant's final bpb, from their bpb_curve().

    The baseline's curve is linear between validations. Infinity if it never reaches that bpb.
    """
    flops, target = variant[-1]
    for (x0, y0), (x, y) in zip([baseline[0], *baseline], baseline, strict=False):
        if y <= target:
            return (x0 + (x - x0) * ((y0 - target) / (y0 - y) if y0 > y else 1)) / flops
    return math.inf


def stage_rows(runs):
    """Rows of the table of one stage. `runs`: a list of read_run()."""
    records = [record for record, _ in runs]
    flags = sorted({flag for record in records for flag in record["flags"]})
    values = {f"--{flag}": [str(record["flags"].get(flag, "-")) for record in records] for flag in flags}
    values["commit"] = [record["commit"][:9] + ("*" if record["diff"] else "") for record in records]
    rows = [[name, *texts] for name, texts in values.items() if len(set(texts)) > 1]
    finals = [{key: value for row in metrics for key, value in row.items()} for _, metrics in runs]
    keys = [key for key in dict.fromkeys(key for final in finals for key in final) if key not in NOT_COMPARED]
    rows += [[f"final {key}", *(format_value(final.get(key, "-")) for final in finals)] for key in keys]
    curves = [bpb_curve(*run) for run in runs]
    if all(curves) and all(curve[-1][0] for curve in curves):
        rows.append(["training FLOPs", *(f"{curve[-1][0]:.3e}" for curve in curves)])
        multipliers = [compute_multiplier(curves[0], curve) for curve in curves]
        least = [curves[0][-1][0] / curve[-1][0] for curve in curves]  # if the baseline never gets there
        texts = [f"{m:.2f}" if m < math.inf else f"> {low:.2f}" for m, low in zip(multipliers, least, strict=True)]
        rows.append(["compute multiplier", *texts])
    return rows


def compare(folders):
    """Markdown that compares the runs in base directories, stage by stage; the first is the baseline."""
    parts = []
    for stage, section in STAGES.items():
        runs = {str(folder): run for folder in folders if all(run := read_run(Path(folder) / "report", stage))}
        if len(runs) > 1:
            parts.append(f"## {section}\n\n{table(['', *runs], stage_rows([*runs.values()]))}")
    require(parts, f"no stage has run in two of {', '.join(map(str, folders))}; give base directories, at least two")
    return "\n\n".join([*parts, NOTE]) + "\n"
