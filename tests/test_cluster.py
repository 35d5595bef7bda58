"""Two hosts without a shared disk, as two base directories; lost hosts, failed ranks, restarts."""

import filecmp
import os
import shutil
import signal
import socket
import subprocess
import sys

import psutil
import pytest
from helpers import environment, logged_metrics, run_python, wait_until

from nanochat.checkpoint_manager import step_dirs

pytestmark = pytest.mark.slow

SIZE = ["--max_seq_len=32", "--device_batch_size=2", "--total_batch_size=256", "--eval_tokens=512", "--device_type=cpu"]
BASE = ["--depth=1", *SIZE, "--core_metric_every=-1", "--dtype=float32", "--save_every=2", "--resume"]


@pytest.fixture
def hosts(pocket_base, tmp_path):
    """Base directories of two hosts with the same data and tokenizer."""
    for host in ("a", "b"):
        (tmp_path / host).mkdir()
        for name in ("base_data", "tokenizer"):
            shutil.copytree(pocket_base / name, tmp_path / host / name)
    return tmp_path / "a", tmp_path / "b"


@pytest.fixture
def start():
    """start(hosts, module, *flags): one process of dev.launch per host, with one rank each; killed at the end."""
    started = []

    def start(hosts, module, *flags):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        for rank, host in enumerate(hosts):
            launch = [
                f"--nnodes={len(hosts)}",
                f"--node_rank={rank}",
                "--master_addr=127.0.0.1",
                f"--master_port={port}",
            ]
            command = [sys.executable, "-m", "dev.launch", *launch, "--nproc_per_node=1", "-m", module, "--", *flags]
            env = environment(NANOCHAT_BASE_DIR=str(host))
            started.append(
                subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            )
        return started[-len(hosts) :]

    yield start
    for process in started:
        kill(process)


def kill(process):
    """Kills a process and its descendants, as when its host loses power."""
    if process.poll() is None:
        for victim in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
            victim.kill()
        process.wait()


def run(start, hosts, *command):
    for process in start(hosts, *command):
        output = process.communicate(timeout=120)[0]
        assert process.returncode == 0, output


def losses(host):
    return [row["loss"] for row in logged_metrics(host, "base") if "loss" in row]


def test_each_host_has_the_whole_checkpoint(hosts, start, tmp_path):
    """Trained with the disk of either host lost in between, the losses equal those of one process."""
    alone = tmp_path / "alone"
    shutil.copytree(hosts[0], alone)
    constant = "--recipe=reference", "--warmdown_ratio=0"  # schedules that do not depend on the number of steps
    env = environment(NANOCHAT_BASE_DIR=str(alone))
    run_python("-m", "scripts.base_train", *BASE, *constant, "--num_iterations=4", env=env)
    folders = [host / "base_checkpoints" / "d1" for host in hosts]
    for steps, lost in ((2, folders[0]), (4, folders[1])):
        run(start, hosts, "scripts.base_train", *BASE, *constant, f"--num_iterations={steps}")
        newest = [folder / f"step_{steps:06d}" for folder in folders]
        names = sorted(path.name for path in newest[0].iterdir())
        assert names == ["meta.json", "model.safetensors", "optim_rank0.pt", "optim_rank1.pt"]
        assert filecmp.cmpfiles(*newest, names, shallow=False) == (names, [], [])
        shutil.rmtree(lost)
    assert losses(hosts[0]) == pytest.approx(losses(alone), abs=1e-4)
    run(start, hosts, "scripts.mid_train", *SIZE, "--num_iterations=1")
    assert all(step_dirs(host / "mid_checkpoints" / "d1") for host in hosts)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_host_ends_the_other_in_one_line(hosts, start, lost):
    flags = "--num_iterations=100000", "--eval_every=-1", "--compile=0", "--dist_timeout=0.2"
    processes = start(hosts, "scripts.base_train", *BASE, *flags)
    wait_until(lambda: step_dirs(hosts[0] / "base_checkpoints" / "d1"), seconds=120)
    kill(processes[lost])
    output = processes[1 - lost].communicate(timeout=60)[0]
    assert processes[1 - lost].returncode == 2
    error = output.partition("error: ")[2]
    reason = "no contact with 127.0.0.1, the host of rank 0," if lost == 0 else "no sign of life from rank 1 "
    assert error.startswith(reason) and error.count("\n") == 1, output


def test_hosts_with_other_data_are_refused(hosts, start, tmp_path):
    (hosts[1] / "base_data" / "MANIFEST").unlink(missing_ok=True)
    shutil.rmtree(hosts[1] / "base_data")
    run_python("-m", "nanochat.dataset", "--pocket", "--chars=100000", env=environment(NANOCHAT_BASE_DIR=str(hosts[1])))
    for process in start(hosts, "scripts.base_train", *BASE, "--num_iterations=2"):
        output = process.communicate(timeout=120)[0]
        assert f"error: {socket.gethostname()} has another shards than" in output and process.returncode == 2


FAILING = """
import time, torch
from nanochat.cli import run_script
from nanochat.cluster import compute_init

def main():
    compute = compute_init("cpu", "float32")
    if compute.rank == 1:
        raise ValueError("boom")
    compute.all_reduce(torch.ones(3))

run_script(main)
"""


def test_the_failed_ranks_exception_is_the_last_thing_printed(base, tmp_path):
    (tmp_path / "failing.py").write_text(FAILING)
    command = [sys.executable, "-m", "dev.launch", "--standalone", "--nproc_per_node=3", str(tmp_path / "failing.py")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("ValueError: boom")
    assert done.stderr.count("Traceback") == 1


def test_restarted_ranks_resume(hosts, start):
    """torchrun --max_restarts: after a rank was killed, all go on from the newest checkpoint, without --resume."""
    flags = [*BASE[:-1], "--num_iterations=40", "--eval_every=-1", "--compile=0"]
    command = [sys.executable, "-m", "dev.launch", "--standalone", "--nproc_per_node=2", "--max_restarts=1"]
    env = environment(NANOCHAT_BASE_DIR=str(hosts[0]))
    process = subprocess.Popen(
        [*command, "-m", "scripts.base_train", "--", *flags], env=env, stdout=subprocess.PIPE, text=True
    )
    wait_until(lambda: step_dirs(hosts[0] / "base_checkpoints" / "d1"), seconds=120)
    os.kill(psutil.Process(process.pid).children()[-1].pid, signal.SIGKILL)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and "resuming from here" in output
    assert len(losses(hosts[0])) == 40
