"""
Check this machine: Python, packages, devices, compilers, memory, disk, hosts of the data; what is wrong, and a remedy.

    python -m nanochat.doctor
    torchrun --standalone --nproc_per_node=8 -m nanochat.doctor      # also the hosts' disks and links

Exit code 2 if there is a problem; notes are not problems.
"""

import importlib.metadata
import os
import platform
import re
import shutil
import socket
import sys
import time
import urllib.error
import urllib.request

from nanochat import cluster, common
from nanochat.cli import make_parser, parse_args, run_script

TORCH = "2.10"  # as in pyproject.toml


# The checks: each yields (finding, remedy), the latter "" if there is no problem.


def software():
    """Python, torch, the extension, Rust."""
    yield f"Python {platform.python_version()}", "" if sys.version_info >= (3, 10) else "install Python 3.10 or newer"
    version = importlib.metadata.version("torch")  # run_script() has a message for a missing package
    try:
        common.load_extension()
        yield "rustbpe, the tokenizer's extension", ""
    except common.UserError as e:
        yield str(e).partition(";")[0], common.ENVIRONMENT_HINT
    installed, needed = (tuple(map(int, re.findall(r"\d+", v)[:2])) for v in (version, TORCH))
    yield f"torch {version}", f"install torch {TORCH} or newer: {common.ENVIRONMENT_HINT}" if installed < needed else ""
    cargo = shutil.which("cargo") or shutil.which("cargo", path=os.path.expanduser("~/.cargo/bin"))
    yield "Rust" if cargo else "no Rust", "" if cargo else "dev/setup.sh installs it, to build rustbpe; or rustup.rs"


def devices():
    """GPUs, precision, the compiler."""
    import torch

    from nanochat.ops import compiler_problem

    device = common.choose_device()
    for i in range(torch.cuda.device_count() if device == "cuda" else 0):
        gpu, native = torch.cuda.get_device_properties(i), torch.cuda.get_device_capability(i) >= (8, 0)
        remedy = "without bfloat16, training is several times as slow; a GPU from 2020 on (compute capability 8) has it"
        yield f"GPU {i}: {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB", "" if native else remedy
    yield f"precision {str(common.choose_dtype(device)).removeprefix('torch.')} on {device}", ""
    problem = compiler_problem(device) if device != "mps" else None
    remedy = "training works, but slower; install a C++ compiler (apt-get install g++, xcode-select --install)"
    yield f"torch.compile: {problem or 'works'}", remedy if problem else ""


def machine():
    """Disk, memory, threads."""
    import psutil
    import torch

    base = common.base_dir()
    free, memory = shutil.disk_usage(base).free / 1e9, psutil.virtual_memory().available / 2**30
    remedy = "below 10 GB (the pocket tier needs 1, d20 70); make room, or point NANOCHAT_BASE_DIR at a larger disk"
    yield f"disk: {free:,.1f} GB free in {base}", remedy if free < 10 else ""
    yield f"memory: {memory:,.1f} GiB available", "below 4 GiB; close programs, or lower --depth" if memory < 4 else ""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = torch.get_num_threads()
    yield f"{cores} cores, {threads} threads per process", "unset OMP_NUM_THREADS" if threads > cores else ""


def network():
    """Hosts of the data, wandb."""
    for host in ("hub", "bucket", "github"):
        url, problem = common.mirror_url(host), None
        try:
            if "://" in url:
                urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=5)
            else:
                os.listdir(url)
        except OSError as e:
            if not isinstance(e, urllib.error.HTTPError):  # which is an answer
                problem = getattr(e, "reason", None) or e.strerror or e
        remedy = f"connect to the network, or set NANOCHAT_{host.upper()}_URL to a mirror; the pocket tier needs none"
        yield (f"no data from {url}: {problem}", remedy) if problem else (f"data from {url}", "")
    yield "wandb: " + ("logged in" if common.has_wandb_login() else "no login; only --run needs it (wandb login)"), ""


def links():
    """Disks of all hosts, speed of the links between the ranks. Collective; nothing without torchrun."""
    if common.dist_env()[2] == 1:
        return
    import torch

    compute = cluster.compute_init()
    hosts = dict(compute.all_gather((socket.gethostname(), shutil.disk_usage(common.base_dir()).free / 1e9)))
    for host, free in hosts.items():
        yield f"{host}: {free:,.1f} GB free", f"below 10 GB; make room on {host}" if free < 10 else ""
    probe = torch.zeros(2**24, device=compute.device)
    for _ in range(2):  # the first one connects
        compute.synchronize()
        start = time.perf_counter()
        compute.all_reduce(probe)
        compute.synchronize()
    speed = 2 * probe.nbytes * (compute.world_size - 1) / compute.world_size / (time.perf_counter() - start) / 1e9
    yield f"{compute.world_size} processes on {len(hosts)} hosts exchange {speed:,.1f} GB/s each", ""


def main(argv=None):
    parse_args(make_parser("nanochat.doctor", __doc__), argv)
    problems = 0
    for check in (software, devices, machine, network, links):
        for finding, remedy in check():
            common.print0(f"problem  {finding}; {remedy}" if remedy else f"ok       {finding}")
            problems += bool(remedy)
    common.require(not problems, f"{problems} problem{'s' * (problems > 1)}, see above")


if __name__ == "__main__":
    run_script(main)
