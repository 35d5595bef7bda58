"""What runs leave below report/, read and formatted."""

import contextlib
import json
import math
from pathlib import Path


def read_text(path):
    """Content of a text file; None if it is missing or not UTF-8."""
    with contextlib.suppress(OSError, ValueError):
        return Path(path).read_text(encoding="utf-8")
    return None


def json_dict(text):
    """The dict in a JSON text; {} if the text is None, truncated by a crash, or anything else."""
    with contextlib.suppress(TypeError, ValueError):
        value = json.loads(text)
        return value if isinstance(value, dict) else {}
    return {}


def read_run(report, stage):
    """(record, rows of the metrics file) of a stage in the folder `report`; ({}, []) if there is none."""
    lines = (read_text(report / "metrics" / f"{stage}.jsonl") or "").splitlines()
    return json_dict(read_text(report / "runs" / f"{stage}.json")), [row for line in lines if (row := json_dict(line))]


def format_value(value):
    """Floats get 4 decimals, or 4 significant digits if very small or large; integers from 10,000 on get commas."""
    if isinstance(value, float):
        plain = value == 0 or not math.isfinite(value) or 1e-3 <= abs(value) < 1e7
        return f"{value:.4f}" if plain else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and abs(value) >= 10000 else str(value)


def table(head, rows):
    """A markdown table: the names of its columns, and rows of as many texts."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])
