"""nanochat.doctor: each problem is named with its remedy."""

import importlib.metadata
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from helpers import raises_user_error

from nanochat import doctor


@pytest.fixture
def diagnose(empty_base, monkeypatch, capsys):
    """diagnose(): the lines that doctor prints; the hosts of the data are folders here."""
    for host in ("HUB", "BUCKET", "GITHUB"):
        monkeypatch.setenv(f"NANOCHAT_{host}_URL", str(empty_base))

    def diagnose(problems=0):
        if problems:
            with raises_user_error(f"{problems} problem"):
                doctor.main([])
        else:
            doctor.main([])
        lines = capsys.readouterr().out.splitlines()
        assert len([line for line in lines if line.startswith("problem")]) == problems
        return lines

    return diagnose


def test_healthy_machine(diagnose):
    lines = diagnose()
    assert any(line.startswith("ok       torch 2.") for line in lines)
    assert any(line.startswith("ok       rustbpe") for line in lines)


def no_rust(patch):
    patch.setattr(shutil, "which", lambda *_, **__: None)


def no_disk(patch):
    patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0.25e9))


def no_network(patch):
    patch.setenv("NANOCHAT_HUB_URL", "http://127.0.0.1:9")


def no_mirror(patch):
    patch.setenv("NANOCHAT_BUCKET_URL", "/nowhere")


def old_torch(patch):
    version = importlib.metadata.version
    patch.setattr(importlib.metadata, "version", lambda name: "2.4.1+cpu" if name == "torch" else version(name))


def old_gpu(patch):
    gpu = SimpleNamespace(name="Tesla T4", total_memory=15 * 2**30)
    for name, value in {
        "is_available": True,
        "device_count": 1,
        "get_device_properties": gpu,
        "get_device_capability": (7, 5),
    }.items():
        patch.setattr(torch.cuda, name, lambda *_, value=value: value)
    patch.setattr("nanochat.ops.compiler_problem", lambda _: None)


PROBLEMS = {
    no_rust: "no Rust; dev/setup.sh",
    no_disk: "disk: 0.2 GB free in .*; make room, or point NANOCHAT_BASE_DIR",
    no_network: "no data from http://127.0.0.1:9: .*; .*set NANOCHAT_HUB_URL",
    no_mirror: "no data from /nowhere: No such file or directory; .*set NANOCHAT_BUCKET_URL",
    old_torch: "torch 2.4.1.cpu; install torch 2.10 or newer: ",
    old_gpu: "GPU 0: Tesla T4, 15 GiB; without bfloat16",
}


@pytest.mark.parametrize("change", PROBLEMS, ids=lambda f: f.__name__)
def test_problem_is_named_with_its_remedy(change, diagnose, monkeypatch):
    change(monkeypatch)
    (line,) = [line for line in diagnose(problems=1) if line.startswith("problem")]
    assert re.search(PROBLEMS[change], line), line
