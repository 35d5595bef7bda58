"""
The tasks of CORE (DCLM, Li et al. 2024) from the files of its bundle, and their prompts as text.

    <base dir>/eval_bundle/core.yaml            tasks: label, type, file, shots, delimiter
                           eval_meta_data.csv   what guessing scores, in percent
                           eval_data/...jsonl   one example a line

The bundle is fetched once. A task's examples come in one fixed order, and each has its own fixed few-shot examples.
"""

import csv
import io
import json
import random
import shutil
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from nanochat.common import UserError, base_dir, fetch, mirror_url

FIELDS = {  # of a line of each type of task
    "multiple_choice": {"query": str, "choices": list, "gold": int},
    "schema": {"context_options": list, "continuation": str, "gold": int},
    "language_modeling": {"context": str, "continuation": str},
}
OPTIONS = {"multiple_choice": "choices", "schema": "context_options"}


@dataclass(frozen=True)
class CoreTask:
    label: str
    kind: str  # multiple_choice, schema or language_modeling
    shots: int  # solved examples before the one in question
    delimiter: str  # between the question and its answer
    baseline: float  # accuracy of guessing, 0 to 1
    rows: list[dict]  # as the file has them

    def examples(self, max_examples=-1):
        """The rows in the order of evaluation, the first `max_examples` of them; -1 = all."""
        rows = list(self.rows)
        random.Random(1337).shuffle(rows)
        return rows if max_examples < 0 else rows[:max_examples]

    def question(self, example):
        """What an example begins with (the first option of a schema)."""
        text = example[next(iter(FIELDS[self.kind]))]
        return text if isinstance(text, str) else text[0]

    def prompts(self, examples, index):
        """
        Texts for `examples[index]`, after its shots: one per option, or [without, with] the continuation to predict.

        The shots are drawn from all other examples, fewer where there are not enough.
        """
        others = [i for i in range(len(examples)) if i != index]
        shots = random.Random(1234 + index).sample(others, min(self.shots, len(others)))
        head = "".join(self._solved(examples[i]) + "\n\n" for i in shots)
        example = examples[index]
        if self.kind == "language_modeling":
            solved = head + self._solved(example)
            # The space before an answer belongs to its first token, so the question must end without one.
            return [solved[: len(solved) - len(example["continuation"])].strip(), solved]
        return [head + self._solved(example, i) for i in range(len(example[OPTIONS[self.kind]]))]

    def _solved(self, example, option=None):
        """Question, delimiter and answer: the right one, or `option`."""
        option = example.get("gold") if option is None else option
        if self.kind == "multiple_choice":
            question, answer = example["query"], example["choices"][option]
        elif self.kind == "schema":
            question, answer = example["context_options"][option], example["continuation"]
        else:
            question, answer = example["context"].strip(), example["continuation"]
        return question + self.delimiter + answer


# ---------------------------------------------------------------------------------------------------------------------
# Files


def load_tasks(labels=None, progress=None):
    """
    [CoreTask] of the bundle, all of them or those of `labels`; all ranks call it, the first one there fetches.

    `progress(bytes_so_far, bytes_total)` is called while the bundle arrives. Raises UserError for an unknown label, and
    for anything missing or damaged in the tasks that were asked for.
    """
    folder = bundle_dir(progress)
    entries = _entries(folder / "core.yaml")
    for label in labels or ():
        if label not in entries:
            raise UserError(f"no task {label!r} in {folder / 'core.yaml'}; there are {', '.join(entries)}")
    baselines = _baselines(folder / "eval_meta_data.csv")
    return [_task(folder, label, entry, baselines) for label, entry in entries.items() if not labels or label in labels]


def bundle_dir(progress=None):
    """The unpacked bundle; fetched and unpacked when it is not there, by one process while the others wait."""
    import filelock

    folder = base_dir() / "eval_bundle"
    if folder.is_dir():
        return folder
    with filelock.FileLock(base_dir() / "eval_bundle.lock"):
        if folder.is_dir():
            return folder
        archive, draft = base_dir() / "eval_bundle.zip", base_dir() / "eval_bundle.tmp"
        fetch(f"{mirror_url('bucket')}/eval_bundle.zip", archive, progress=progress)
        shutil.rmtree(draft, ignore_errors=True)
        try:
            unpack(archive, draft)
            (draft / "eval_bundle").rename(folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
            archive.unlink(missing_ok=True)
    return folder


def unpack(archive, folder):
    """Unpack a bundle's zip into `folder`. Raises UserError when it is damaged, no bundle, or writes outside."""
    root = folder.resolve()
    try:
        with zipfile.ZipFile(archive) as z:
            names = [name for name in z.namelist() if not name.startswith("__MACOSX/")]
            for name in names:
                if "\\" in name or not (root / name).resolve().is_relative_to(root):
                    raise UserError(f"{archive}: {name!r} would be written outside of the bundle; nothing was unpacked")
            if "eval_bundle/core.yaml" not in names:
                raise UserError(f"{archive} holds no eval_bundle/core.yaml")
            z.extractall(folder, names)
    except (zipfile.BadZipFile, EOFError, zlib.error) as e:
        raise UserError(f"{archive} is no whole zip file ({e}); run again to fetch it anew") from e


def _read(path):
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"no file {path}; delete {base_dir() / 'eval_bundle'} to have it fetched again") from None
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path} cannot be read ({e})") from e


def _entries(path):
    """{label: its entry in core.yaml}."""
    import yaml

    try:
        config = yaml.safe_load(_read(path))
    except yaml.YAMLError as e:
        raise UserError(f"{path} is no YAML ({' '.join(str(e).split())})") from e
    entries = config.get("icl_tasks") if isinstance(config, dict) else None
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path}: expected a list of tasks under icl_tasks")
    for entry in entries:
        label = entry.get("label") if isinstance(entry, dict) else None
        if not isinstance(label, str):
            raise UserError(f"{path}: a task without a label: {str(entry)[:80]}")
        kind, shots = entry.get("icl_task_type"), entry.get("num_fewshot")
        if kind not in FIELDS:
            raise UserError(f"{path}: {label} has the type {kind!r}, expected one of {', '.join(FIELDS)}")
        if not isinstance(shots, list) or not shots or not isinstance(shots[0], int) or shots[0] < 0:
            raise UserError(f"{path}: {label} has num_fewshot {shots!r}, expected a list with one number")
        if not isinstance(entry.get("continuation_delimiter", ""), str):
            raise UserError(f"{path}: {label} has a continuation_delimiter that is no text")
        if not isinstance(entry.get("dataset_uri"), str) or ".." in Path(entry["dataset_uri"]).parts:
            raise UserError(f"{path}: {label} has the dataset_uri {entry.get('dataset_uri')!r}, expected a file's name")
    return {entry["label"]: entry for entry in entries}


def _baselines(path):
    """{label: percent, as text}."""
    rows = list(csv.DictReader(io.StringIO(_read(path))))
    if not rows or not {"Eval Task", "Random baseline"} <= rows[0].keys():
        raise UserError(f"{path}: expected the columns 'Eval Task' and 'Random baseline'")
    return {row["Eval Task"]: row["Random baseline"] for row in rows}


def _task(folder, label, entry, baselines):
    if label not in baselines:
        raise UserError(f"{folder / 'eval_meta_data.csv'} has no baseline for {label}")
    try:
        baseline = float(baselines[label]) / 100
    except (TypeError, ValueError):
        baseline = -1
    if not 0 <= baseline < 1:
        raise UserError(
            f"{folder / 'eval_meta_data.csv'}: the baseline {baselines[label]!r} of {label} is not a "
            "percentage from 0 to below 100"
        )
    kind, path = entry["icl_task_type"], folder / "eval_data" / entry["dataset_uri"]
    lines = enumerate(_read(path).split("\n"), 1)  # not splitlines(): a text may hold other ends of lines
    rows = [_row(line, kind, f"{path}:{number}") for number, line in lines if line.strip()]
    if not rows:
        raise UserError(f"{path} is empty: no examples of {label}")
    return CoreTask(label, kind, entry["num_fewshot"][0], entry.get("continuation_delimiter", " "), baseline, rows)


def _row(line, kind, where):
    """The checked example of one line; `where` is "file:line"."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as e:
        raise UserError(f"{where}: not JSON ({e.msg} at column {e.colno})") from None
    for name, expected in FIELDS[kind].items():
        if not isinstance(row, dict) or not isinstance(row.get(name), expected):
            raise UserError(f"{where}: a {kind} example needs {name!r}, of type {expected.__name__}")
    if kind in OPTIONS:
        options = row[OPTIONS[kind]]
        if not all(isinstance(option, str) for option in options):
            raise UserError(f"{where}: {OPTIONS[kind]!r} must hold texts")
        if not 0 <= row["gold"] < len(options):
            raise UserError(f"{where}: gold={row['gold']} is none of the {len(options)} options")
    return row
