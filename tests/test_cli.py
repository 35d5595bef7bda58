"""Running scripts: errors as one line, once over all ranks, exit codes, output encodings, the login to wandb."""

import errno
import io
import json
import os
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from helpers import environment, raises_user_error, run_python

from nanochat import cli
from nanochat.common import UserError, load_extension, print_error
from nanochat.tracking import erase_line


@pytest.fixture
def run(monkeypatch, capsys):
    """run(error) raises it in a script -> (exit code, standard error)."""

    def run(error):
        def main():
            raise error

        monkeypatch.setattr(os, "_exit", sys.exit)  # run_script() ends the process without cleanup
        with pytest.raises(SystemExit) as stop:
            cli.run_script(main)
        return stop.value.code, capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    "error, code, message",
    [
        (UserError("no tokenizer"), 2, "error: no tokenizer\n"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 2, "error: the Python package torch is not"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/nowhere/x"), 2, "error: /nowhere/x: No such"),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried"), 2, "error: out of memory; lower --device_batch_size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you"), 2, "error: out of memory"),
        (MemoryError(), 2, "error: out of memory"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "error: cannot write the output: No space left"),
        (KeyboardInterrupt(), 130, "\ninterrupted\n"),
        (SystemExit(0), 0, ""),
    ],
)
def test_exit_codes_and_messages(run, error, code, message):
    exit_code, err = run(error)
    assert exit_code == code and err.startswith(message) and err.strip().count("\n") == 0


def test_other_errors_keep_their_traceback():
    def main():
        raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")

    with pytest.raises(ConnectionResetError):
        cli.run_script(main)


def test_ranks_print_the_same_error_once_and_tell_torchrun(tmp_path, monkeypatch, capsys):
    for rank, message in enumerate(["too large", "too large", "the disk of rank 2 is full"]):
        (tmp_path / str(rank)).mkdir()
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / str(rank) / "error.json"))
        print_error(message)
        report = json.loads((tmp_path / str(rank) / "error.json").read_text())["message"]
        assert report["message"] == message and report["extraInfo"]["py_callstack"] == f"error: {message}"
    assert capsys.readouterr().err == "error: too large\nerror: the disk of rank 2 is full\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_narrow_output_replaces_characters(monkeypatch, encoding):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    cli.run_script(lambda: print("½ → 漢"))
    assert raw.getvalue().decode(encoding).strip() in ("? ? ?", "½ ? ?")


def test_closed_streams_become_devnull(monkeypatch):
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    cli.run_script(lambda: print(sys.stdin.read(), file=sys.stderr))
    for name in ("stdin", "stdout", "stderr"):
        getattr(sys, name).close()


def test_extension_that_is_not_built(monkeypatch):
    """From the repository's root, Python imports the folder of sources as an empty package."""
    for module in (ModuleType("rustbpe"), None):
        monkeypatch.setitem(sys.modules, "rustbpe", module)
        with raises_user_error("the extension rustbpe is not built .*dev/setup.sh"):
            load_extension()


def test_separator_of_torchrun_is_dropped():
    parser = cli.make_parser("x", "")
    parser.add_argument("--total_batch_size", type=int)
    assert cli.parse_args(parser, ["--", "--total-batch-size=3"]).total_batch_size == 3


def test_wandb_without_a_login_is_found_before_any_work(monkeypatch, capsys):
    class Error(Exception):
        pass

    def login(verify):
        assert verify and not sys.stdin.isatty()
        raise Error("No API key configured.\nSee the manual.")

    wandb = SimpleNamespace(login=login)
    parser = cli.make_parser("scripts.base_train", "")
    cli.add_run_flags(parser, 1)
    for module, message in (
        (wandb, "No API key configured; or set WANDB_MODE=offline"),
        (None, "import of wandb"),
    ):
        monkeypatch.setitem(sys.modules, "wandb", module)
        with pytest.raises(SystemExit) as stop:
            cli.parse_args(parser, ["--run=mine"])
        err = capsys.readouterr().err
        assert stop.value.code == 2 and message in err and err.count("\n") == 1
    monkeypatch.setenv("RANK", "1")  # only rank 0 uses wandb
    assert cli.parse_args(parser, ["--run=mine"]).run == "mine"


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_wandb_without_a_network_needs_no_login(tmp_path, mode):
    program = "from nanochat.cli import wandb_run; print(wandb_run('mine'))"
    done = run_python("-c", program, env=environment(HOME=str(tmp_path), WANDB_MODE=mode))
    assert done.stdout.split()[-1] == "mine"


def test_only_capable_terminals_get_control_sequences(monkeypatch):
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda: True))
    for term, expected in (("xterm", "\r\x1b[K"), ("dumb", "")):
        monkeypatch.setenv("TERM", term)
        assert erase_line() == expected


@pytest.mark.slow
def test_error_on_several_ranks_is_one_line_with_exit_code_2(tmp_path):
    env = environment(NANOCHAT_BASE_DIR=str(tmp_path), WANDB_MODE="offline")
    launch = ["dev.launch", "--standalone", "--nproc_per_node=2", "-m", "scripts.base_train", "--"]
    done = run_python("-m", *launch, "--run=mine", "--depht=3", check=False, env=env)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
