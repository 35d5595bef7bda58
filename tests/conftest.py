"""Fixtures: a base directory with a small pocket corpus and tokenizer, made once per session; running scripts."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Threads slow such small models down, up to 100 times on a busy machine. Must be set before torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def pocket_base(tmp_path_factory):
    """Path of a base directory with base_data/ (200,000 characters) and tokenizer/ (600 tokens). Read-only."""
    from nanochat import dataset
    from scripts import tok_train

    base = tmp_path_factory.mktemp("pocket_base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(base))
        dataset.main(["--pocket", "--chars=200000"])
        tok_train.main(["--vocab_size=600"])
    return base


@pytest.fixture
def base(pocket_base, tmp_path, monkeypatch):
    """A new base directory that links to the text and tokenizer of pocket_base; NANOCHAT_BASE_DIR points at it."""
    for name in ("base_data", "tokenizer"):
        (tmp_path / name).symlink_to(pocket_base / name)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run_script(base):
    """run_script("scripts.base_train", "--depth=2", ranks=2) runs a script in new processes -> CompletedProcess."""

    def run_script(module, *flags, ranks=1, check=True):
        command = [sys.executable, "-m"]
        if ranks > 1:
            command += ["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m"]
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        command += [module, *map(str, flags)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
        if check and done.returncode:
            raise AssertionError(f"{module} ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    return run_script


@pytest.fixture
def run_main(base):
    """run_main("scripts.base_train", "--depth=2") calls the script's main() in this process, which is faster."""

    def run_main(module, *flags):
        importlib.import_module(module).main(list(map(str, flags)))

    return run_main
