"""
The report card of a whole run: what it ran on, a section per stage, and how the model got better from stage to stage.

    python -m nanochat.report reset       # before a run: forget the sections, note machine and time
    python -m nanochat.report generate    # after it: report/report.md, copied to ./report.md

Every stage calls get_report().log(section, data), which writes report/<slug>.md and, for machines, <slug>.json.
"""

import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from nanochat.cli import make_parser, parse_args, run_script
from nanochat.common import base_dir, format_duration, is_rank0, print0

ROOT = Path(__file__).resolve().parents[1]
OPTIONAL = ("Chat evaluation base", "Chat RL", "Chat evaluation rl")
SECTIONS = (
    *("Tokenizer training", "Tokenizer evaluation", "Base model training", "Base model loss", "Base model evaluation"),
    *("Chat evaluation base", "Midtraining", "Chat evaluation mid", "Chat SFT", "Chat evaluation sft"),
    *("Chat RL", "Chat evaluation rl"),
)
TASKS = ("ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval", "SpellingBee", "PocketSums", "PocketFacts")
CURVES = {
    "Base model training": "base",
    "Midtraining": "mid",
    "Chat SFT": "sft",
    "Chat RL": "rl",
}  # metrics/<name>.jsonl
HOURLY_RATE = {"H100": 3.00, "A100": 1.79, "V100": 0.55}  # dollars per GPU; 2.00 for any other


def get_report():
    """The report on rank 0, a silent one elsewhere."""
    return Report(base_dir() / "report") if is_rank0() else Silent()


class Silent:
    def log(self, section, data, metrics=None):
        pass


def slug(section):
    return section.lower().replace(" ", "-")


class Report:
    def __init__(self, folder):
        self.folder = Path(folder)

    def log(self, section, data, metrics=None):
        """
        Write one section. `data` is a list of dicts (listed), strings (markdown, taken as it is) and None (left out).

        The summary reads "wall_clock_seconds" of any stage, CORE, "... validation bpb", and the accuracies (0 to 1) of
        "Chat evaluation <source>" under the tasks' names.
        """
        now = time.time()
        items = [item for item in (data if isinstance(data, (list, tuple)) else [data]) if item]
        values = {key: value for item in items if isinstance(item, dict) for key, value in item.items()}
        blocks = [item if isinstance(item, str) else _listing(item) for item in items]
        text = "\n\n".join([f"## {section}\ntimestamp: {_clock(now)}", *blocks]) + "\n"
        self._write(f"{slug(section)}.md", text)
        structured = {"section": section, "time": now, "metrics": values | (metrics or {})}
        self._write(f"{slug(section)}.json", json.dumps(structured, indent=1, default=str) + "\n")

    def reset(self):
        """Delete all sections, keep metrics/, and note the machine and the time."""
        for pattern in ("*.md", "*.json", "*.svg"):
            for path in self.folder.glob(pattern):
                path.unlink()
        started, gpus = time.time(), gpu_list()
        self._write("header.md", header(gpus, f"Run started: {_clock(started)}"))
        self._write("header.json", json.dumps({"started": started, "hourly": hourly_rate(gpus)}) + "\n")

    def generate(self):
        """Put report.md together from what has been logged, saying what has not; returns its path."""
        logged = {path.stem: self._read(path) for path in sorted(self.folder.glob("*.json")) if path.stem != "header"}
        logged = {found["section"]: found for found in sorted(logged.values(), key=lambda s: s.get("time", 0)) if found}
        names = [*(s for s in SECTIONS if s in logged), *(s for s in logged if s not in SECTIONS)]
        parts = [self._text("header.md") or header(gpu_list(), "Run started: unknown, there was no `report reset`")]
        for name in names:
            parts.append(self._text(f"{slug(name)}.md"))
            if curve := self._curve(name):
                parts.append(f"![loss curve]({curve})\n")
        parts.append(summary(logged, names, self._read(self.folder / "header.json")))
        if missing := [name for name in SECTIONS if name not in logged and name not in OPTIONAL]:
            parts.append(f"Not run, or not logged: {', '.join(missing)}.\n")
        return self._write("report.md", "\n".join(parts))

    def _write(self, name, text):
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_text(text, encoding="utf-8")
        return self.folder / name

    def _text(self, name):
        path = self.folder / name
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def _read(self, path):
        """The dict in a JSON file; {} when it is absent or was cut off by a crash."""
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}

    def _curve(self, section):
        """Draw the section's metrics as an SVG beside the report; its path, or None when there are none."""
        path = self.folder / "metrics" / f"{CURVES.get(section)}.jsonl"
        if not path.exists():
            return None
        lines = path.read_text(encoding="utf-8").splitlines()
        svg = curve_svg([json.loads(line) for line in lines if line.endswith("}")])
        return self._write(f"{path.stem}.svg", svg) if svg else None


# ---------------------------------------------------------------------------------------------------------------------
# Parts


def _clock(seconds):
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _value(value):
    """4 decimals for a float, or 4 digits where those would not show it; commas from 10,000 on."""
    if isinstance(value, float):
        plain = value == 0 or not math.isfinite(value) or 1e-3 <= abs(value) < 1e7
        return f"{value:.4f}" if plain else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and abs(value) >= 10000 else str(value)


def _listing(values):
    return "\n".join(f"- {key}: {_value(value)}" for key, value in values.items())


def _table(head, rows):
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]) + "\n"


def gpu_list():
    """(name, bytes of memory) of every CUDA GPU."""
    try:
        import torch

        found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        return [(gpu.name, gpu.total_memory) for gpu in found]
    except (ImportError, OSError, RuntimeError):
        return []


def hourly_rate(gpus):
    """Dollars per hour that such GPUs cost to rent; None without a GPU."""
    rates = [next((rate for key, rate in HOURLY_RATE.items() if key in name), 2.00) for name, _ in gpus]
    return sum(rates) if rates else None


def _git(*args):
    """Output of a git command in the repository; "" without git or outside a checkout."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, timeout=20)
        return done.stdout.decode("utf-8", "replace").strip("\n") if done.returncode == 0 else ""
    except (OSError, subprocess.TimeoutExpired):
        return ""


def bloat():
    """Size of the text files that git tracks, as a dict."""
    texts = []
    for name in filter(None, _git("ls-files", "-z").split("\0")):
        try:
            texts.append((ROOT / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # deleted here but not in git, or not text
    if not texts:
        return {"Size": "unknown (not a git checkout)"}
    characters = sum(map(len, texts))
    lines = sum(text.count("\n") for text in texts)
    return {"Characters": characters, "Lines": lines, "Files": len(texts), "Tokens (characters / 4)": characters // 4}


def header(gpus, started):
    """What the run is made of and made on, as markdown; "unknown" where this machine does not tell."""
    try:
        import psutil

        memory = f"{psutil.virtual_memory().total / 2**30:.1f} GiB"
    except (ImportError, OSError):
        memory = "unknown"
    try:
        import torch

        torch_version, cuda = torch.__version__, torch.version.cuda or "none"
    except (ImportError, OSError):
        torch_version = cuda = "unknown"
    commit = _git("rev-parse", "--short", "HEAD")
    rate = hourly_rate(gpus)
    sections = {
        "Git": {
            "Branch": _git("rev-parse", "--abbrev-ref", "HEAD") or "unknown",
            "Commit": f"{commit} ({'dirty' if _git('status', '--porcelain') else 'clean'})" if commit else "unknown",
            "Message": _git("log", "-1", "--format=%s")[:80] or "unknown",
        },
        "Hardware": {
            "Platform": platform.platform(),
            "CPU": f"{os.cpu_count()} cores, {_cpu_name()}",
            "Memory": memory,
            "GPUs": f"{len(gpus)} x {gpus[0][0]}" if gpus else "none",
            "GPU memory": f"{sum(size for _, size in gpus) / 2**30:.1f} GiB" if gpus else "none",
            "CUDA": cuda,
            "Cost": f"about ${rate:.2f} an hour" if rate else "unknown (no GPU)",
        },
        "Software": {"Python": platform.python_version(), "PyTorch": torch_version},
        "Bloat": bloat(),
    }
    text = "".join(f"### {name}\n{_listing(values)}\n\n" for name, values in sections.items())
    return f"# nanochat training report\n\nGenerated: {_clock(time.time())}\n\n{text}{started}\n\n---\n"


def _cpu_name():
    try:
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _find(section, pattern):
    """The first number in a section whose key matches; None when there is none."""
    metrics = section.get("metrics", {}) if section else {}
    return next((v for k, v in metrics.items() if _number(v) and re.fullmatch(pattern, k, re.IGNORECASE)), None)


def summary(logged, names, head):
    """The last section: the table Metric | BASE | MID | SFT | RL, and the wall clock by stage and in all."""
    bpb = r"(final )?val(idation)?[ _]bpb"
    cells = {
        "CORE": {"BASE": _find(logged.get("Base model evaluation"), r"core([ _]metric)?")},
        "Validation bpb": {
            "BASE": _find(logged.get("Base model loss"), bpb) or _find(logged.get("Base model training"), bpb),
            "MID": _find(logged.get("Midtraining"), bpb),
        },
        **{task: {} for task in TASKS},
    }
    for column in ("BASE", "MID", "SFT", "RL"):
        scores = logged.get(f"Chat evaluation {column.lower()}", {}).get("metrics", {})
        for key, value in scores.items():  # settings are in lower case, tasks are not
            if key[:1].isupper() and _number(value) and -1 <= value <= 1:
                cells.setdefault(key.removesuffix(" metric"), {})[column] = value
    if "ChatCORE" in cells:
        cells["ChatCORE"] = cells.pop("ChatCORE")
    rows = [
        [metric, *(f"{row[c]:.4f}" if row.get(c) is not None else "-" for c in ("BASE", "MID", "SFT", "RL"))]
        for metric, row in cells.items()
        if any(value is not None for value in row.values())
    ]
    times = {name: seconds for name in names if (seconds := _find(logged[name], "wall_clock_seconds")) is not None}
    clock = [[name, format_duration(seconds)] for name, seconds in times.items()]
    text = f"## Summary\n\n{_listing(bloat())}\n\n"
    text += _table(["Metric", "BASE", "MID", "SFT", "RL"], rows) if rows else "No metrics yet.\n"
    if clock:
        text += "\n" + _table(["Stage", "Wall clock"], [*clock, ["Sum", format_duration(sum(times.values()))]])
    ends = [found["time"] for name, found in logged.items() if name not in ("Chat RL", "Chat evaluation rl")]
    if head.get("started") and ends:
        seconds = max(0, max(ends) - head["started"])
        text += f"\nTotal wall clock time, from start to the last stage before RL: {format_duration(seconds)}\n"
        text += f"Cost: about ${seconds / 3600 * head['hourly']:.2f}\n" if head.get("hourly") else ""
    return text


def curve_svg(rows, width=720, height=260, points=400):
    """An SVG of loss, val_bpb and val_loss over steps, from rows of metrics.jsonl; None when it would be empty."""
    curves = {}
    for key in ("loss", "val_bpb", "val_loss"):
        found = [(row["step"], row[key]) for row in rows if _number(row.get(key)) and math.isfinite(row[key])]
        size = math.ceil(len(found) / points)  # the mean of this many neighbours is one point
        groups = [found[i : i + size] for i in range(0, len(found), size or 1)]
        if len(groups) > 1:
            curves[key] = [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]
    if not curves:
        return None
    last = max(x for curve in curves.values() for x, _ in curve)
    low, high = (pick(y for curve in curves.values() for _, y in curve) for pick in (min, max))
    left, top, right, bottom = 48, 12, width - 12, height - 28

    def at(x, y):
        return left + x / last * (right - left), bottom - (y - low) / (high - low or 1) * (bottom - top)

    def label(x, y, anchor, text, color="#000"):
        return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}" fill="{color}">{text}</text>'

    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif"']
    out += [' font-size="11"><rect width="100%" height="100%" fill="white"/>']
    for share in (0, 0.25, 0.5, 0.75, 1):
        x, y = at(share * last, low + share * (high - low))
        out += [
            f'<path d="M{left} {y:.0f}H{right}" stroke="#ddd"/>',
            label(x, height - 10, "middle", round(share * last)),
        ]
        out += [label(left - 4, y + 4, "end", f"{low + share * (high - low):.2f}")]
    for i, (key, curve) in enumerate(curves.items()):
        color, path = ("#36c", "#c33", "#393")[i], " ".join("{:.1f},{:.1f}".format(*at(x, y)) for x, y in curve)
        out += [f'<polyline points="{path}" fill="none" stroke="{color}"/>']
        out += [label(right - 4, top + 12 + 14 * i, "end", key, color)]
    return "\n".join([*out, "</svg>"]) + "\n"


def main(argv=None):
    parser = make_parser("nanochat.report", __doc__)
    parser.add_argument("command", nargs="?", default="generate", choices=("generate", "reset"))
    command = parse_args(parser, argv).command
    report = Report(base_dir() / "report")
    if command == "reset":
        report.reset()
        return print0(f"new report in {report.folder}")
    path = report.generate()
    try:
        shutil.copyfile(path, "report.md")
        print0(f"report: {path}, copied to {Path('report.md').resolve()}")
    except OSError as e:
        print(f"report: {path}; no copy here: {e}", file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
