"""
The report of a whole run: machine, one section per stage, and a table of the metrics after each stage.

    python -m nanochat.report reset       # before a run: delete the old sections, record machine and time
    python -m nanochat.report generate    # after it: write report.md and report.html in report/ and here
    python -m nanochat.report compare A B # tables and curves of the runs in base directories A, B, ...

Every stage calls get_report().log(section, data, metrics). This writes report/<section>.md for people and
report/<section>.json for programs.
"""

import contextlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from nanochat.cli import make_parser, parse_args, path, run_script
from nanochat.common import base_dir, format_duration, is_writer, print0, require, write_text
from nanochat.compare import compare
from nanochat.pages import html_page
from nanochat.records import format_value, json_dict, read_text, table
from nanochat.watch import changes

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = ("Tokenizer training", "Tokenizer evaluation", "Base model training", "Base model loss")
SECTIONS += ("Base model evaluation", "Chat evaluation base", "Midtraining", "Chat evaluation mid", "Chat SFT")
SECTIONS += ("Chat evaluation sft", "Chat RL", "Chat evaluation rl")
OPTIONAL_SECTIONS = ("Chat evaluation base", "Chat RL", "Chat evaluation rl")
# The keys of log()'s `metrics`; the summary reads nothing else.
#   val_bpb, train_bpb   bits per byte on the validation and on the training split
#   core, chat_core      CORE and ChatCORE metric
#   task_scores          {task name: accuracy, 0 to 1}
#   wall_clock_seconds   duration of the stage
METRICS = ("val_bpb", "train_bpb", "core", "chat_core", "task_scores", "wall_clock_seconds")
# Order of chat tasks in the summary; other tasks follow.
TASKS = ("ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval", "SpellingBee", "PocketSums", "PocketFacts")
COLUMNS = ("BASE", "MID", "SFT", "RL")
HOURLY_RATES = {"H100": 3.00, "A100": 1.79, "V100": 0.55}  # rent in dollars per GPU; 2.00 for any other


def get_report():
    """The report in the base directory."""
    return Report(base_dir() / "report")


def slug(section):
    return section.lower().replace(" ", "-")


class Report:
    def __init__(self, folder):
        self.folder = Path(folder)

    def log(self, section, data, metrics=None):
        """
        Write one section; only writers (see cluster.py) do.

        `data`, for readers: a list of dicts (printed as bullet lists), strings (markdown) and None (ignored).
        `metrics`, for the summary: a dict with keys of METRICS; None values count as missing.
        """
        metrics = metrics or {}
        assert set(metrics) <= set(METRICS), f"unknown metrics: {sorted(set(metrics) - set(METRICS))}"
        if not is_writer():
            return
        now = time.time()
        items = [item for item in (data if isinstance(data, (list, tuple)) else [data]) if item]
        values = {key: value for item in items if isinstance(item, dict) for key, value in item.items()}
        blocks = [item if isinstance(item, str) else _listing(item) for item in items]
        title = f"## {section}\ntimestamp: {_timestamp(now)}"
        write_text(self.folder / f"{slug(section)}.md", "\n\n".join([title, *blocks]) + "\n")
        record = {"section": section, "time": now, "values": values, "metrics": metrics}
        write_text(self.folder / f"{slug(section)}.json", json.dumps(record, indent=1, default=str) + "\n")

    def reset(self):
        """Delete all sections but keep metrics/, and record the machine and the time."""
        for file in [file for kind in ("md", "json") for file in self.folder.glob(f"*.{kind}")]:
            file.unlink()
        started, gpus = time.time(), gpu_list()
        write_text(self.folder / "header.md", header(gpus, f"Run started: {_timestamp(started)}"))
        write_text(self.folder / "header.json", json.dumps({"started": started, "hourly": hourly_rate(gpus)}) + "\n")

    def generate(self):
        """
        Combine all logged sections into report.md, which also lists the missing ones, and make report.html.

        Returns both paths.
        """
        files = [f for f in map(json_dict, map(read_text, sorted(self.folder.glob("*.json")))) if "section" in f]
        logged = {file["section"]: file for file in sorted(files, key=lambda file: file.get("time", 0))}
        names = [*(s for s in SECTIONS if s in logged), *(s for s in logged if s not in SECTIONS)]
        head = read_text(self.folder / "header.md")
        parts = [head or header(gpu_list(), "Run started: unknown, there was no `report reset`")]
        parts += [read_text(self.folder / f"{slug(name)}.md") or "" for name in names]
        parts.append(summary(logged, names, json_dict(read_text(self.folder / "header.json"))))
        if missing := [name for name in SECTIONS if name not in logged and name not in OPTIONAL_SECTIONS]:
            parts.append(f"Not run, or not logged: {', '.join(missing)}.\n")
        parts.append("Curves, samples and conversations: [report.html](report.html)\n")
        page = html_page("watch.html", changes([self.folder.parent], {}))
        return [write_text(self.folder / "report.md", "\n".join(parts)), write_text(self.folder / "report.html", page)]


# ---------------------------------------------------------------------------------------------------------------------
# Parts of the report


def _timestamp(seconds):
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _listing(values):
    return "\n".join(f"- {key}: {format_value(value)}" for key, value in values.items())


def gpu_list():
    """[(name, bytes of memory)] of all CUDA GPUs."""
    with contextlib.suppress(ImportError, OSError, RuntimeError):
        import torch

        gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        return [(gpu.name, gpu.total_memory) for gpu in gpus]
    return []


def hourly_rate(gpus):
    """Rent of these GPUs in dollars per hour; None without a GPU."""
    return sum(next((rate for key, rate in HOURLY_RATES.items() if key in name), 2.00) for name, _ in gpus) or None


def _git(*args):
    """Output of a git command in the repository; "" without git or outside a checkout."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        result = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, timeout=20)
        return result.stdout.decode("utf-8", "replace").strip("\n") if result.returncode == 0 else ""
    return ""


def code_version():
    """{"commit", "message", "diff"}: the checkout's commit and the difference to it."""
    commands = {"commit": ("rev-parse", "HEAD"), "message": ("log", "-1", "--format=%s"), "diff": ("diff", "HEAD")}
    return {name: _git(*command)[:100_000] for name, command in commands.items()}


def bloat():
    """Size of the text files that git tracks, as a dict."""
    # read_text() returns None for deleted and binary files.
    texts = [text for name in _git("ls-files", "-z").split("\0") if (text := read_text(ROOT / name)) is not None]
    if not texts:
        return {"Size": "unknown (not a git checkout)"}
    characters, lines = sum(map(len, texts)), sum(text.count("\n") for text in texts)
    return {"Characters": characters, "Lines": lines, "Files": len(texts), "Tokens (characters / 4)": characters // 4}


def header(gpus, started):
    """Markdown about code, hardware and software; "unknown" for values that cannot be determined."""
    torch_version = cuda = "unknown"
    with contextlib.suppress(ImportError, OSError):
        import torch

        torch_version, cuda = torch.__version__, torch.version.cuda or "none"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0  # bytes
    commit, rate = _git("rev-parse", "--short", "HEAD"), hourly_rate(gpus)
    git = {"Branch": _git("rev-parse", "--abbrev-ref", "HEAD") or "unknown"}
    git["Commit"] = f"{commit} ({'dirty' if _git('status', '--porcelain') else 'clean'})" if commit else "unknown"
    git["Message"] = _git("log", "-1", "--format=%s")[:80] or "unknown"
    hardware = {"Platform": platform.platform(), "CPU": f"{os.cpu_count()} cores, {_cpu_name()}"}
    hardware["Memory"] = f"{memory / 2**30:.1f} GiB" if memory else "unknown"
    hardware["GPUs"] = f"{len(gpus)} x {gpus[0][0]}" if gpus else "none"
    hardware["GPU memory"] = f"{sum(size for _, size in gpus) / 2**30:.1f} GiB" if gpus else "none"
    hardware |= {"CUDA": cuda, "Cost": f"about ${rate:.2f} an hour" if rate else "unknown (no GPU)"}
    software = {"Python": platform.python_version(), "PyTorch": torch_version}
    sections = {"Git": git, "Hardware": hardware, "Software": software, "Bloat": bloat()}
    text = "".join(f"### {name}\n{_listing(values)}\n\n" for name, values in sections.items())
    return f"# nanochat training report\n\nGenerated: {_timestamp(time.time())}\n\n{text}{started}\n\n---\n"


def _cpu_name():
    match = re.search(r"model name\s*: (.+)", read_text("/proc/cpuinfo") or "")
    return match[1] if match else platform.processor() or platform.machine()


def summary(logged, names, start):
    """
    The last section: a table of metrics by stage, and the wall-clock time of each stage and of the run.

    `logged` is {section: content of its JSON file}; `names` lists the sections in the order of the report; `start` is
    the content of header.json.
    """

    def get(section, key):
        return logged.get(section, {}).get("metrics", {}).get(key)

    base_bpb = get("Base model loss", "val_bpb") or get("Base model training", "val_bpb")
    cells = {"CORE": {"BASE": get("Base model evaluation", "core")}}
    cells["Validation bpb"] = {"BASE": base_bpb, "MID": get("Midtraining", "val_bpb")}
    cells |= {task: {} for task in TASKS}
    evaluations = {column: f"Chat evaluation {column.lower()}" for column in COLUMNS}
    for column, section in evaluations.items():
        for task, accuracy in (get(section, "task_scores") or {}).items():
            cells.setdefault(task, {})[column] = accuracy
    cells["ChatCORE"] = {column: get(section, "chat_core") for column, section in evaluations.items()}
    known = {metric: {c: x for c, x in row.items() if x is not None} for metric, row in cells.items()}
    rows = [[name, *(f"{row[c]:.4f}" if c in row else "-" for c in COLUMNS)] for name, row in known.items() if row]
    times = {name: seconds for name in names if (seconds := get(name, "wall_clock_seconds")) is not None}
    text = f"## Summary\n\n{_listing(bloat())}\n\n"
    text += table(["Metric", *COLUMNS], rows) + "\n" if rows else "No metrics yet.\n"
    if times:
        clock = [[name, format_duration(seconds)] for name, seconds in [*times.items(), ("Sum", sum(times.values()))]]
        text += "\n" + table(["Stage", "Wall clock"], clock) + "\n"
    ends = [file["time"] for name, file in logged.items() if name not in ("Chat RL", "Chat evaluation rl")]
    if start.get("started") and ends:
        seconds = max(0, max(ends) - start["started"])
        text += f"\nTotal wall clock time, from start to the last stage before RL: {format_duration(seconds)}\n"
        text += f"Cost: about ${seconds / 3600 * start['hourly']:.2f}\n" if start.get("hourly") else ""
    return text


def main(argv=None):
    parser = make_parser("nanochat.report", __doc__)
    parser.add_argument("command", nargs="?", default="generate", choices=("generate", "reset", "compare"))
    parser.add_argument("folders", nargs="*", type=path, help="for compare: base directories, the baseline first")
    args, report = parse_args(parser, argv), get_report()
    require(args.command == "compare" or not args.folders, f"{args.command} takes no folders; set NANOCHAT_BASE_DIR")
    for folder in args.folders:
        require((Path(folder) / "report").is_dir(), f"no folder {folder}/report; give base directories")
    if args.command == "reset":
        report.reset()
        return print0(f"new report in {report.folder}")
    if args.command == "compare":
        print0(compare(args.folders))
        curves = html_page("watch.html", changes(args.folders, {}))
        return print0(f"curves: {write_text(Path('compare.html'), curves)}")
    for file in report.generate():
        try:
            shutil.copyfile(file, file.name)
            print0(f"report: {file}, copied to {Path(file.name).resolve()}")
        except OSError as e:
            print(f"report: {file}; no copy here: {e}", file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
