"""
The key of a stage and the state of its output, for dev/stages.sh. Needs only Python's standard library.

    python dev/stamp.py <base dir> <output> <inputs> <command>     # prints e.g. "3f8a... complete"

The key is a checksum of the command and of the content of its inputs. Inputs and output are names separated by spaces,
relative to the base directory, or to the working directory if they begin with "./"; an input may be a pattern. Files
and folders that the command itself names are inputs too. The content is

    a folder of shards     the checksums in manifest.json; `base_data:8` means only the first 8 shards
    a checkpoint folder    the checksum of the newest model in meta.json, so not the times and losses recorded there
    other files, folders   their bytes

The state of the output is `complete`, `partial` (an unfinished run's checkpoints), `damaged` or `none`.
"""

import hashlib
import json
import re
import shlex
import sys
from pathlib import Path

NOT_CONTENT = re.compile(r"\.|__pycache__$|.*\.(tmp|part)$")  # hidden files, caches, drafts


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_json(path):
    """The dict in a JSON file; {} if the file is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def step_folders(folder):
    """The checkpoints in a folder, the newest first."""
    return sorted((p for p in folder.glob("step_*") if re.fullmatch(r"step_\d+", p.name)), reverse=True)


def shards(folder, count):
    """{name: {"bytes", "sha256"}} of the first `count` shards that the manifest lists; "" = all."""
    return dict(sorted(read_json(folder / "manifest.json").get("shards", {}).items())[: int(count) if count else None])


def content(path, count=""):
    """A value that changes if and only if the content of `path` does; "missing" if there is nothing."""
    if path.is_file():
        return sha256(path)
    if not path.is_dir():
        return "missing"
    if (path / "manifest.json").is_file():
        return {name: shard.get("sha256") for name, shard in shards(path, count).items()}
    if steps := step_folders(path):
        return read_json(steps[0] / "meta.json").get("files", {}).get("model.safetensors", "damaged")
    files = sorted(p for p in path.rglob("*") if p.is_file())
    names = {p.relative_to(path): p for p in files}
    return {str(name): sha256(p) for name, p in names.items() if not any(map(NOT_CONTENT.match, name.parts))}


def key(base, inputs, command):
    """Checksum of the command and of the content of its inputs."""
    # These flags do not change what a stage computes.
    command = re.sub(r"--(run|nproc_per_node)=(\\.|\S)*", "", command)
    values = {}
    for name in inputs.split():
        path, _, count = name.partition(":")
        root = Path() if path.startswith("./") else base
        paths = sorted(root.glob(path)) or [root / path]
        values |= {f"{name} {p.name}": content(p, count) for p in paths}
    for word in shlex.split(command):
        path = Path(re.sub(r"^--?[\w-]+=|:[\d.]+$", "", word)).expanduser()
        if "/" in word or path.is_file():
            values[word] = content(path)
    return hashlib.sha256(json.dumps([shlex.split(command), values]).encode()).hexdigest()[:32]


def is_intact(folder, files):
    """Whether all `files`, a dict {name: sha256 or {"bytes", "sha256"}}, are in the folder and unchanged."""
    hashes = {name: value["sha256"] if isinstance(value, dict) else value for name, value in files.items()}
    return bool(files) and all((folder / n).is_file() and sha256(folder / n) == h for n, h in hashes.items())


def state(base, output):
    """State of a stage's output: "complete", "partial", "damaged" or "none"."""
    name, _, count = output.partition(":")
    path = base / name
    if not path.is_dir():
        return "complete" if path.exists() else "none"
    if name.startswith("base_data"):  # only the sizes: reading all shards would take minutes
        listed = shards(path, count)
        sizes = [p.stat().st_size if (p := path / shard).exists() else None for shard in listed]
        return "complete" if listed and sizes == [shard.get("bytes") for shard in listed.values()] else "damaged"
    if name == "tokenizer":
        return "complete" if is_intact(path, read_json(path / "tokenizer.json").get("sha256", {})) else "damaged"
    if "_checkpoints/" not in name:
        return "complete" if any(path.iterdir()) else "none"
    steps = step_folders(path)
    for step in steps:
        meta = read_json(step / "meta.json")
        if meta.get("model_config") and is_intact(step, meta.get("files", {})):
            return "complete" if step == steps[0] and meta.get("finished", True) else "partial"
    return "damaged" if steps else "none"


if __name__ == "__main__":
    base, output, inputs, command = sys.argv[1:]
    print(key(Path(base), inputs, command), state(Path(base), output))
