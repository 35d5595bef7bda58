"""
Runs untrusted Python programs, each in a fresh interpreter inside a sandbox.

The sandbox consists of independent layers. Each is tested once per process and used if it works on this machine;
sandbox/jail.py applies them.

    rlimits     limits on CPU time, memory, threads, file sizes and descriptors; always in use
    namespaces  a file system of read-only libraries and an empty scratch folder, no other processes, no network
                (Linux, if the system allows it)
    landlock    the kernel denies access to all other files, also where namespaces are forbidden (Linux 5.13); without
                namespaces, names and sizes of files outside stay visible
    seccomp     the kernel refuses the system calls that a pure computation does not need: starting processes and
                programs, sockets, signals to other processes, ptrace, mounts, ... (x86_64 and aarch64)

Level "strict" means seccomp plus namespaces or Landlock. Level "basic" means whatever works; on macOS only rlimits.
The parent process limits wall time and output, passes an empty environment, and deletes the scratch folder.

A program succeeds if it runs to its end. The proof is a random nonce, which jail.py writes only then: sys.exit,
os._exit, a signal and an exception are failures, whatever the exit code. Python code cannot reach the nonce (see
jail.run_program). Two attacks remain possible: native code (ctypes) that searches its own memory for the nonce, and
a program that fools its tests, for example with an object that equals everything.
"""

import contextlib
import functools
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nanochat.common import UserError, dist_env, require

JAIL = Path(__file__).parent / "sandbox" / "jail.py"
MAX_OUTPUT = 1 << 20  # bytes per stream; a program that writes more is stopped
KEPT_OUTPUT = 1 << 16  # bytes of each stream that are returned
# A test program for each layer; it runs to its end only if the layer works.
PROBES = {
    "namespaces": "import os; assert os.getpid() < 3",
    "landlock": "try: open('/'); assert False\nexcept PermissionError: pass",
    "seccomp": "import os\ntry: os.fork(); assert False\nexcept PermissionError: pass",
}


# `success`: whether the program ran to its end. `error`: why it failed, None on success.
ExecutionResult = namedtuple("ExecutionResult", "success stdout stderr error timeout memory_exceeded")


@functools.cache
def layers():
    """Names of the layers that work on this machine. The first call tests them by running PROBES."""
    working = ("rlimits",)
    for layer in PROBES if sys.platform == "linux" else ():
        with contextlib.suppress(UserError):
            if _execute(PROBES[layer], 30.0, None, (*working, layer)).success:
                working += (layer,)
    return working


def sandbox_level():
    """Highest level that this machine supports: "strict" or "basic"."""
    working = set(layers())
    return "strict" if "seccomp" in working and working & {"namespaces", "landlock"} else "basic"


def check_level(level="strict"):
    """Raises UserError if the sandbox of this machine is below `level`."""
    require(os.name == "posix", "untrusted programs run on Linux and macOS only; leave the task out")
    message = f"this machine's sandbox has only {', '.join(layers())}; level {level} needs seccomp with namespaces or "
    message += "landlock (Linux); leave the task out, or run untrusted programs without isolation: --unsafe_exec"
    require(sandbox_level() in ("strict", level), message)


def execute_code(code, timeout=5.0, maximum_memory_bytes=256 * 1024 * 1024, level="strict"):
    """
    Run `code` as __main__ in a new sandbox. Returns an ExecutionResult.

    `timeout` is wall time in seconds, including the start of the interpreter. `maximum_memory_bytes` limits the
    address space, None = no limit. Only the standard library can be imported. Raises UserError if the sandbox of this
    machine is below `level`.
    """
    check_level(level)
    return _execute(code, timeout, maximum_memory_bytes, layers())


def execute_many(programs, workers=None, **options):
    """ExecutionResults of `programs`, in order; `workers` run at a time (default: this rank's share of the cores)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ThreadPoolExecutor(workers or max(1, cores // dist_env()[2])) as pool:
        # After an error or Ctrl-C, map() cancels the programs that have not started.
        return list(pool.map(lambda program: execute_code(program, **options), programs))


def _execute(code, timeout, memory, layers):
    """Run one program isolated by `layers`. Raises UserError if one of them cannot be set up."""
    nonce, deadline = secrets.token_hex(16), time.monotonic() + timeout
    with contextlib.ExitStack() as cleanup:
        scratch = os.path.realpath(tempfile.mkdtemp(prefix="nanochat-"))
        cleanup.callback(_delete_folder, scratch)
        result_fd, jail_fd = os.pipe()
        result_pipe = cleanup.enter_context(open(result_fd, "rb", buffering=0))
        with open(jail_fd, "wb"), tempfile.TemporaryFile() as stdin:
            stdin.write((nonce + code).encode("utf-8", "replace"))
            stdin.seek(0)
            arguments = [jail_fd, scratch, ",".join(layers), timeout, memory or 0]
            command = [sys.executable, "-I", "-S", "-B", "-X", "utf8", str(JAIL), *map(str, arguments)]
            streams = dict(stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=[jail_fd])
            options = dict(env={"HOME": scratch, "TMPDIR": scratch, "LANG": "C.UTF-8"}, cwd="/", start_new_session=True)
            # On exit it closes its pipes.
            process = cleanup.enter_context(subprocess.Popen(command, **streams, **options))
            cleanup.callback(_stop, process)
        outputs, stop_reason = _collect(process, [result_pipe, process.stdout, process.stderr], deadline)
    result, stdout, stderr = (output[:KEPT_OUTPUT].decode("utf-8", "replace") for output in outputs)
    if not result.startswith("S") and not stop_reason:
        raise UserError(f"the sandbox ({', '.join(layers)}) did not start: {stderr.strip().splitlines()[-1:]}")
    exit_code = process.returncode
    if result == "S" + nonce and not stop_reason and exit_code == 0:
        return ExecutionResult(True, stdout, stderr, None, False, False)
    status = f"signal {signal.Signals(exit_code - 128).name}" if 128 < exit_code < 160 else f"exit code {exit_code}"
    error = stop_reason or result[1:].replace(nonce, "") or f"the program exited before its end ({status})"
    return ExecutionResult(False, stdout, stderr, error, stop_reason == "timeout", error.startswith("MemoryError"))


def _collect(process, pipes, deadline):
    """
    Read the pipes until the process ends, the deadline passes or there is too much output.

    Returns (bytes of each pipe, reason to stop the process or None if it has ended).
    """
    outputs = [bytearray() for _ in pipes]
    with contextlib.suppress(subprocess.TimeoutExpired), selectors.DefaultSelector() as selector:
        for pipe, output in zip(pipes, outputs, strict=True):
            selector.register(pipe, selectors.EVENT_READ, output)
        while selector.get_map():
            ready = selector.select(max(0, deadline - time.monotonic()))
            if not ready and time.monotonic() >= deadline:
                return outputs, "timeout"
            for key, _ in ready:
                block = os.read(key.fd, 1 << 16)
                if not block:
                    selector.unregister(key.fileobj)
                key.data.extend(block)
                if len(key.data) > MAX_OUTPUT:
                    return outputs, f"more than {MAX_OUTPUT:,} bytes of output"
        process.wait(max(0, deadline - time.monotonic()))
        return outputs, None
    return outputs, "timeout"


def _stop(process):
    """Let the supervisor (see jail.py) kill and reap the program if it still runs; Popen then reaps the supervisor."""
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)


def _delete_folder(folder):
    try:
        shutil.rmtree(folder)
    except (OSError, RecursionError):  # no permissions, or nested too deep for Python
        subprocess.run(["chmod", "-R", "u+rwX", folder], stderr=subprocess.DEVNULL)
        subprocess.run(["rm", "-rf", folder], stderr=subprocess.DEVNULL)
