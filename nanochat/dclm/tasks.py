"""
The tasks of CORE (DCLM, Li et al. 2024): read from the evaluation bundle, and rendered as text prompts.

    <base dir>/eval_bundle/core.yaml            per task: label, type, file, number of shots, delimiter
                           eval_meta_data.csv   per task: accuracy of guessing, in percent
                           eval_data/...jsonl   one example per line

The bundle is downloaded once. The order of a task's examples and the few-shot examples of each are fixed by seeds.
"""

import csv
import json
import random
import re
import shutil
import zipfile
import zlib
from dataclasses import dataclass

from nanochat.common import UserError, base_dir, fetch, mirror_url, require, well_formed, write_errors

# Fields of an example by type of task; the first one is the question, the second one the answer.
FIELDS = {"multiple_choice": {"query": str, "choices": list, "gold": int}}
FIELDS |= {"schema": {"context_options": list, "continuation": str, "gold": int}}
FIELDS |= {"language_modeling": {"context": str, "continuation": str}}
OPTIONS = {"multiple_choice": "choices", "schema": "context_options"}  # the field with the options
# Fields of a task in core.yaml: pattern of the value as text, and what it means.
ENTRY = {"icl_task_type": ("|".join(FIELDS), f"one of {', '.join(FIELDS)}")}
ENTRY |= {"num_fewshot": (r"\[\d+\]", "a list with one number"), "dataset_uri": (r"(?!.*\.\.).+", "a file name")}


@dataclass(frozen=True)
class CoreTask:
    label: str
    kind: str  # multiple_choice, schema or language_modeling
    shots: int  # number of few-shot examples
    delimiter: str  # between question and answer
    baseline: float  # accuracy of guessing, 0 to 1
    rows: list[dict]  # the examples in file order

    def examples(self, max_examples=-1):
        """The first `max_examples` examples (-1 = all) in the order of evaluation."""
        rows = list(self.rows)
        random.Random(1337).shuffle(rows)
        return rows if max_examples < 0 else rows[:max_examples]

    def question(self, example):
        """The question of `example`; for a schema example, the first option."""
        text = example[next(iter(FIELDS[self.kind]))]
        return text if isinstance(text, str) else text[0]

    def prompts(self, examples, index):
        """
        Prompts for `examples[index]`, one per option; for language_modeling two, [without, with] the continuation.

        The few-shot examples are sampled from all other examples; there are fewer if `examples` is too short.
        """
        others = [i for i in range(len(examples)) if i != index]
        shots = random.Random(1234 + index).sample(others, min(self.shots, len(others)))
        prefix, example = "".join(self._with_answer(examples[i]) + "\n\n" for i in shots), examples[index]
        if self.kind == "language_modeling":
            full = prefix + self._with_answer(example)
            # The space before an answer belongs to its first token, so the prompt must end without one.
            return [full[: len(full) - len(example["continuation"])].strip(), full]
        return [prefix + self._with_answer(example, option) for option in range(len(example[OPTIONS[self.kind]]))]

    def _with_answer(self, example, option=None):
        """Question, delimiter and answer of `example`; `option` is the answer's index, None = the correct one."""
        option = example.get("gold") if option is None else option
        fields = [example[name] for name in list(FIELDS[self.kind])[:2]]
        question, answer = (field if isinstance(field, str) else field[option] for field in fields)
        question = question.strip() if self.kind == "language_modeling" else question
        return question + self.delimiter + answer


# ---------------------------------------------------------------------------------------------------------------------
# Files


def load_tasks(labels=None, progress=None):
    """
    [CoreTask] of the bundle, or only those in `labels`. All ranks call it; one rank of each machine downloads.

    `progress(bytes_so_far, bytes_total)` is called during the download. Raises UserError for an unknown label, and for
    missing or damaged files of the requested tasks.
    """
    folder = bundle_dir(progress)
    entries = _read_entries(folder / "core.yaml")
    for label in labels or ():
        require(label in entries, f"no task {label!r} in {folder / 'core.yaml'}; there are {', '.join(entries)}")
    baselines = _read_baselines(folder / "eval_meta_data.csv")
    return [_load_task(folder, entries[label], baselines) for label in entries if not labels or label in labels]


def bundle_dir(progress=None):
    """Folder of the unpacked bundle. If it is missing, one process downloads it while the others wait."""
    import filelock

    folder, draft = base_dir() / "eval_bundle", base_dir() / "eval_bundle.tmp"
    if not folder.is_dir():
        with filelock.FileLock(base_dir() / "eval_bundle.lock"):
            if not folder.is_dir():  # otherwise another process has just downloaded it
                url, archive = f"{mirror_url('bucket')}/eval_bundle.zip", base_dir() / "eval_bundle.zip"
                fetch(url, archive, progress=progress)
                try:
                    unpack(archive, draft)
                    (draft / "eval_bundle").rename(folder)
                finally:
                    shutil.rmtree(draft, ignore_errors=True)
                    archive.unlink()
    return folder


def unpack(archive, folder):
    """Unpack a bundle. Raises UserError if the zip file is damaged, is not a bundle, or has a path outside `folder`."""
    try:
        with write_errors(folder), zipfile.ZipFile(archive) as z:
            for name in z.namelist():
                inside = "\\" not in name and (folder / name).resolve().is_relative_to(folder.resolve())
                require(inside, f"{archive}: the path {name!r} lies outside of the bundle; nothing was unpacked")
            require("eval_bundle/core.yaml" in z.namelist(), f"{archive} contains no eval_bundle/core.yaml")
            z.extractall(folder)
    except (zipfile.BadZipFile, EOFError, zlib.error, RuntimeError) as e:  # RuntimeError: encrypted or unknown method
        raise UserError(f"{archive} is not a complete zip file ({e}); repeat the command to download a new copy") from e


def _read(path):
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"cannot read {path} ({e}); delete {base_dir() / 'eval_bundle'} to download it again") from e


def _read_entries(path):
    """{label: the task's checked entry in core.yaml}."""
    import yaml

    try:
        entries = yaml.safe_load(_read(path))["icl_tasks"]
        labels = [entry["label"] for entry in entries]
    except (yaml.YAMLError, LookupError, TypeError) as e:
        reason = " ".join(str(e).split())
        raise UserError(f"{path} is not valid YAML with a list of labeled tasks under icl_tasks ({reason})") from e
    require(labels, f"{path}: no tasks under icl_tasks")
    for label, entry in zip(labels, entries, strict=True):
        require(labels.count(label) == 1, f"{path}: two tasks have the label {label}")
        for name, (pattern, expected) in ENTRY.items():
            valid = re.fullmatch(pattern, str(entry.get(name)))
            require(valid, f"{path}: {label} has {name}={entry.get(name)!r}, expected {expected}")
    return dict(zip(labels, entries, strict=True))


def _read_baselines(path):
    """{label: accuracy of guessing in percent, as text}."""
    rows = list(csv.DictReader(_read(path).splitlines()))
    valid = rows and {"Eval Task", "Random baseline"} <= rows[0].keys()
    require(valid, f"{path}: expected the columns 'Eval Task' and 'Random baseline'")
    return {row["Eval Task"]: row["Random baseline"] for row in rows}


def _load_task(folder, entry, baselines):
    label, kind, path = entry["label"], entry["icl_task_type"], folder / "eval_data" / entry["dataset_uri"]
    percent = baselines.get(label)
    message = f"the baseline of {label} is {percent!r}, expected a percentage from 0 to below 100"
    require(re.fullmatch(r"\d\d?(\.\d*)?", str(percent)), f"{folder / 'eval_meta_data.csv'}: {message}")
    lines = enumerate(_read(path).split("\n"), 1)  # not splitlines(), which also splits at other Unicode line breaks
    rows = [_parse_example(line, kind, f"{path}:{number}") for number, line in lines if line.strip()]
    require(rows, f"{path} is empty: no examples of {label}")
    delimiter = entry.get("continuation_delimiter", " ")
    return CoreTask(label, kind, entry["num_fewshot"][0], delimiter, float(percent) / 100, rows)


def _parse_example(line, kind, where):
    """The checked example in one line; `where` is "file:line"."""
    try:
        row = json.loads(line)
        if "\\ud" in line.lower():  # perhaps half an emoji
            row = json.loads(well_formed(json.dumps(row, ensure_ascii=False)))
    except json.JSONDecodeError as e:
        raise UserError(f"{where}: not JSON ({e.msg} at column {e.colno})") from None
    for name, expected in FIELDS[kind].items():
        valid = isinstance(row, dict) and type(row.get(name)) is expected  # true is no index
        require(valid, f"{where}: a {kind} example needs {name!r}, of type {expected.__name__}")
    if kind in OPTIONS:
        options = row[OPTIONS[kind]]
        valid = len(options) > 1 and all(isinstance(option, str) for option in options)
        require(valid, f"{where}: {OPTIONS[kind]!r} must be a list of at least two strings")
        require(0 <= row["gold"] < len(options), f"{where}: gold={row['gold']}, but there are {len(options)} options")
    # A continuation without tokens would count as predicted.
    require(row.get("continuation", "x").strip(), f"{where}: the continuation is empty")
    return row
