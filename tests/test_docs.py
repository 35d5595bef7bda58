"""README and GUIDE: commands exist and have their flags. With SPEEDRUN_DIR set, the guide's commands run as printed."""

import importlib
import importlib.util
import os
import re
import shlex
import subprocess

import pytest
from helpers import ROOT, environment

from nanochat.cli import parse_args

DOCUMENTS = ["README.md", "dev/GUIDE.md", "dev/multinode/README.md"]


def blocks(document, language="bash", text=None):
    text = text or (ROOT / document).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.S | re.M)


def commands(document):
    """[argv] of all `python -m` commands in the bash blocks of a document."""
    for block in blocks(document):
        for line in block.replace("\\\n", " ").splitlines():
            if found := re.search(r"python (?:\S+ )?-m (.*?)(?: \||;| &|$)", re.sub(r"\s+#.*", "", line)):
                yield shlex.split(found[1])


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_exist_and_have_their_flags(document):
    checked = 0
    for module, *argv in commands(document):
        if not module.startswith(("scripts.", "nanochat.", "dev.")):
            continue
        assert importlib.util.find_spec(module), module
        parser = getattr(importlib.import_module(module), "build_parser", None)
        if parser and not any("$" in arg or "<" in arg for arg in argv):
            parse_args(parser(), argv)
            checked += 1
    assert checked >= 1 or document != "README.md"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_and_pictures_exist(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (ROOT / document).parent.joinpath(target).exists(), target


def test_pictures_are_small():
    assert sum(path.stat().st_size for path in ROOT.glob("dev/*.png")) <= 500_000


def run_bash(script, folder, env):
    """Runs a script that is not on stdin, from which chat_cli would read it."""
    options = dict(cwd=folder, env=env, stdin=subprocess.DEVNULL, text=True, capture_output=True)
    return subprocess.run(["bash", "-ec", script], **options)


@pytest.mark.slow
def test_a_model_of_ones_own_as_printed(tmp_path):
    """The README's sections on text, size, persona, conversations and task, beside the files they read."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    own = text[text.index("## Your own text") : text.index("## Troubleshooting")]
    for name in ("README.md", "dev"):
        (tmp_path / name).symlink_to(ROOT / name)
    (task,) = blocks("README.md", "python", own)
    (tmp_path / "first_word.py").write_text(task)
    script, env = "\n".join(blocks("README.md", "bash", own)), environment(HOME=tmp_path)
    done = run_bash(script, tmp_path, env)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    for stage in ("base", "mid", "chatrl"):
        assert (tmp_path / "nanochat-own" / f"{stage}_checkpoints" / "own").is_dir(), done.stdout
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 16


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("SPEEDRUN_DIR"), reason="set SPEEDRUN_DIR to the base directory of a speedrun")
def test_the_guide_runs_as_printed(tmp_path):
    env = os.environ | {"HOME": str(tmp_path)}
    (share,) = [block for block in blocks("README.md") if "--import" in block]
    parts = [f"echo '== block {i}'\n{block}" for i, block in enumerate([*blocks("dev/GUIDE.md"), f"cd ~\n{share}"])]
    script = "\n".join(["set -e; trap 'kill $(jobs -p) 2>/dev/null || true' EXIT", *parts])
    done = run_bash(script, ROOT, env)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
