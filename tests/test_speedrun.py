"""What a second `bash speedrun.sh` runs again: dev/stages.sh with cheap commands instead of the real stages."""

import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, environment

from dev import stamp
from nanochat.cli import parse_args

# Stages whose outputs have the layout of the real ones. A blank in world.txt does not change the corpus.
STAGES = r"""
set -euo pipefail
. dev/setup.sh
. dev/stages.sh
set_base_dir /nonexistent
corpus() { mkdir -p corpus; tr -d ' ' <world.txt >corpus/text.txt; }
tokenizer() {
    mkdir -p tokenizer
    sort corpus/text.txt >tokenizer/ranks.tiktoken
    echo "{\"sha256\": {\"ranks.tiktoken\": \"$(hash tokenizer/ranks.tiktoken)\"}}" >tokenizer/tokenizer.json
}
hash() { sha256sum "$1" | cut -d' ' -f1; }
checkpoint() { # <folder> <step> <finished> <content>
    local path=$1/step_00000$2
    mkdir -p "$path"
    echo "$4" >"$path/model.safetensors"
    echo "{\"finished\": $3, \"model_config\": {\"n_layer\": 1}, \"seconds\": $RANDOM,
        \"files\": {\"model.safetensors\": {\"bytes\": 1, \"sha256\": \"$(hash "$path/model.safetensors")\"}}}" \
        >"$path/meta.json"
}
train() { # <folder> <inputs> <flags...>
    [[ ! -e $1/step_000001 ]] || echo "resumes $1"
    checkpoint "$1" 1 false half
    [[ ${KILLED:-} != "$1" ]] || return ${CODE:-130}
    checkpoint "$1" 2 true "$(cat $2 2>/dev/null) ${FLAGS:-}"
}
in_base() { (cd "$NANOCHAT_BASE_DIR" && "$@"); }
stage corpus 1 corpus world.txt in_base corpus
stage tokenizer 1 tokenizer corpus in_base tokenizer
stage base 1 base_checkpoints/d1 "tokenizer corpus" in_base train base_checkpoints/d1 "tokenizer/ranks.tiktoken" \
    --resume=1 --run="$RANDOM" ${FLAGS:-}
weights=base_checkpoints/d1/step_000002/model.safetensors
stage evaluation 1 evaluation.md base_checkpoints/d1 in_base cp $weights evaluation.md
stage mid 1 mid_checkpoints/d1 "base_checkpoints/d1 identity.jsonl" in_base train mid_checkpoints/d1 \
    "$weights identity.jsonl" --resume=1
run_stages
"""
ALL = ["corpus", "tokenizer", "base", "evaluation", "mid"]


class Run:
    """Runs STAGES on a base directory and lists the stages that did something."""

    def __init__(self, base):
        self.base = base

    def __call__(self, returncode=0, **variables):
        path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
        env = environment(NANOCHAT_BASE_DIR=str(self.base), PATH=path, **variables)
        done = subprocess.run(["bash", "-c", STAGES], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == returncode, done.stdout + done.stderr
        self.output = done.stdout + done.stderr
        skipped = re.findall(r"\] (\w+): done before", self.output)
        started = re.findall(r"\] (\w+) \.\.\.", self.output)
        assert len(skipped + started) == len(ALL) or returncode
        return started


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A base directory, with a space and a quote in its path, in which all stages have run."""
    base = tmp_path_factory.mktemp("speedrun") / "it's here"
    base.mkdir()
    (base / "world.txt").write_text("b\na\n", encoding="utf-8")
    assert Run(base)() == ALL
    return base


@pytest.fixture
def run(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "my base")
    return Run(tmp_path / "my base")


def write(path, text):
    path.write_text(text, encoding="utf-8")


def replace_tokenizer(base):
    """Another tokenizer, with consistent files, as tok_train would write it."""
    write(base / "tokenizer" / "ranks.tiktoken", "c\n")
    write(
        base / "tokenizer" / "tokenizer.json",
        json.dumps({"sha256": {"ranks.tiktoken": stamp.sha256(base / "tokenizer" / "ranks.tiktoken")}}),
    )


def test_what_depends_on_changed_content_runs_again(run):
    write(run.base / "world.txt", "b \na\n")  # makes the same corpus
    write(run.base / "identity.jsonl", "I am nobody")
    assert run() == ["corpus", "mid"]
    replace_tokenizer(run.base)
    (run.base / "identity.jsonl").unlink()
    assert run() == ["base", "evaluation", "mid"]
    write(run.base / "base_checkpoints" / "d1" / "step_000002" / "model.safetensors", "")
    (run.base / "evaluation.md").unlink()
    assert run() == ["base", "evaluation"]  # both as before, so nothing follows
    assert "renamed to d1.old2" in run.output


@pytest.mark.slow
def test_killed_stage_resumes_only_with_the_same_inputs(run):
    other = {"FLAGS": "--depth=2", "KILLED": "base_checkpoints/d1"}
    assert run(returncode=130, **other) == ["base"]
    assert "base was stopped; the same command" in run.output and "resumes base" not in run.output
    assert run(returncode=143, CODE="0", **other) == ["base"]  # SIGTERM
    assert "resumes base_checkpoints/d1" in run.output
    assert run() == ["base"]
    assert "resumes base" not in run.output and (run.base / "base_checkpoints" / "d1.old2").exists()


# ---------------------------------------------------------------------------------------------------------------------
# dev/stamp.py


def test_content_of_shards_is_what_the_manifest_lists(tmp_path):
    names = ["a.parquet", "b.parquet", "c.parquet"]
    shards = {name: {"bytes": 1, "sha256": name} for name in names}
    write(tmp_path / "manifest.json", json.dumps({"kind": "public", "shards": shards}))
    assert stamp.content(tmp_path) == {name: name for name in names}
    assert stamp.content(tmp_path, "1") == {"a.parquet": "a.parquet"}


def test_shards_are_complete_if_all_that_are_needed_exist(tmp_path):
    folder = tmp_path / "base_data"
    folder.mkdir()
    assert stamp.state(tmp_path, "base_data:1") == "damaged"
    shards = {f"{name}.parquet": {"bytes": 1, "sha256": ""} for name in "ab"}
    write(folder / "manifest.json", json.dumps({"shards": shards}))
    write(folder / "a.parquet", "x")
    assert [stamp.state(tmp_path, name) for name in ("base_data:1", "base_data")] == ["complete", "damaged"]


def test_key_covers_the_files_that_a_command_names(tmp_path):
    file = tmp_path / "my talks.jsonl"

    def key(command):
        return stamp.key(tmp_path, "", command)

    commands = [f"mid --conversations='{file}:2'", f"mid --conversations={tmp_path / 'my'}\\ talks.jsonl"]
    missing = [key(command) for command in commands]
    write(file, "[]")
    empty = [key(command) for command in commands]
    write(file, "[1]")
    assert len({*missing, *empty, *map(key, commands)}) == 6
    assert key("mid --run=my\\ run --depth=1") == key("mid --run=b --depth=1") != key("mid --depth=2")


def test_content_of_a_folder_ignores_caches_and_hidden_files(tmp_path):
    write(tmp_path / "world.txt", "a")
    before = stamp.content(tmp_path)
    for name in (".hidden", "__pycache__/world.pyc", "draft.1.tmp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, "a")
    assert stamp.content(tmp_path) == before
    (tmp_path / "world.txt").rename(tmp_path / "other.txt")
    assert stamp.content(tmp_path) != before


# ---------------------------------------------------------------------------------------------------------------------
# The scripts, with a fake Python


FAKE_PYTHON = f"""#!/usr/bin/env bash
case $1 in
-S) exec {sys.executable} "$@" ;;
-m) printf '%s\\n' "$(printf '%q ' "$@")" >>"$FAKE_LOG" ;; # in one write, since stages run side by side
esac
"""


@pytest.fixture
def repository(tmp_path):
    """A repository whose path has a space and a quote, with a .venv that is up to date and whose python only logs."""
    root = tmp_path / "it's my repo"
    (root / "dev").mkdir(parents=True)
    for name in ("speedrun.sh", "run1000.sh", "dev/setup.sh", "dev/stages.sh", "dev/stamp.py", "dev/runcpu.sh"):
        shutil.copy(ROOT / name, root / name)
    for name in ("rustbpe", "pyproject.toml", "dev/constraints.txt"):
        (root / name).symlink_to(ROOT / name)
    python = root / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    write(python, FAKE_PYTHON)
    python.chmod(0o755)
    command = ["bash", "-c", ". dev/setup.sh; sources_hash"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    write(root / ".venv" / "installed-", done.stdout)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("script, tier", [("speedrun.sh", "pocket"), ("run1000.sh", "")])
def test_scripts_run_valid_commands_and_end_with_ones_that_can_be_pasted(repository, tmp_path, script, tier):
    """Whatever characters the paths have, and with a base directory relative to the caller's folder."""
    log = tmp_path / "log"
    env = environment(NANOCHAT_BASE_DIR="my base", TIER=tier, FAKE_LOG=str(log), CDPATH=str(tmp_path))
    command = ["bash", f"{repository.name}/{script}"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    commands = [shlex.split(line) for line in log.read_text().splitlines()]
    for words in commands:
        words = words[len(words) - 1 - words[::-1].index("-m") + 1 :]  # without dev.launch and its flags
        if words[0] != "nanochat.report":
            parse_args(importlib.import_module(words[0]).build_parser(), words[1:])
    assert (commands[-1][1] == "scripts.chat_web") == (script == "run1000.sh")
    pasted = done.stdout.split("http://localhost:8000:")[1].replace("source .venv/bin/activate", "PATH=.venv/bin:$PATH")
    log.unlink()
    subprocess.run(["bash", "-ec", pasted + 'echo "$NANOCHAT_BASE_DIR"'], env=env, check=True, capture_output=True)
    assert [line.split()[1] for line in log.read_text().splitlines()] == ["scripts.chat_cli", "scripts.chat_web"]
    assert (tmp_path / "my base" / "stamps").is_dir()


def test_arguments_are_refused(tmp_path):
    command = ["bash", str(ROOT / "run1000.sh"), "--help"]
    done = subprocess.run(command, env=environment(HOME=str(tmp_path)), capture_output=True, text=True)
    assert done.returncode == 2 and "unknown argument --help" in done.stderr and not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "value, expected", [("~/my base", "home/my base"), ("my base", "my base"), ("", "home/default")]
)
def test_base_directory_of_any_spelling(tmp_path, value, expected):
    command = f". {ROOT}/dev/setup.sh; . {ROOT}/dev/stages.sh; set_base_dir ~/default; echo $NANOCHAT_BASE_DIR"
    env = environment(HOME=str(tmp_path / "home"), NANOCHAT_BASE_DIR=value)
    done = subprocess.run(["bash", "-ec", command], cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tmp_path / expected) and (tmp_path / expected).is_dir()
