"""
Runs untrusted Python: a fresh interpreter in a sandbox with no network, no files but its own, and limits on everything.

What shuts a program in are layers, each tried out once per run and used where the machine has it; jail.py applies them.

    rlimits     CPU time, memory, threads, size of files, descriptors; always
    namespaces  a file system of libraries and an empty scratch, no other processes, no network (Linux, where allowed)
    landlock    the kernel refuses all files but these to the program, also where namespaces are forbidden (Linux 5.13);
                on its own it leaves names and sizes of files outside in sight
    seccomp     the kernel refuses all system calls that a lone computation can do without: starting processes or
                programs, sockets, signals to others, ptrace, mounts, ... (x86_64 and aarch64)

Level "strict" is seccomp with namespaces or Landlock; "basic" is whatever there is, and on macOS that is rlimits only.
Wall time and output are limited from outside, the environment is empty, and what a program leaves behind is deleted.

A program has succeeded when it ran to its end. It proves that with a random number, the nonce, which the interpreter
lets go of on any other way out: sys.exit, os._exit, a signal or a raised exception are failures whatever the exit code.
Python code cannot reach the nonce (see jail.run). What no sandbox of this kind prevents: native code (ctypes) that
searches its own memory for the nonce, and a program that fools its own tests, with an object equal to everything, say.
"""

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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from nanochat.common import UserError, dist_env

JAIL = Path(__file__).parent / "sandbox" / "jail.py"
LEVELS = ("basic", "strict")
MAX_OUTPUT = 1 << 20  # bytes after which a program is stopped
KEPT_OUTPUT = 1 << 16  # bytes of stdout, and of stderr, that are kept
# One program per layer that only runs to its end behind it.
PROBES = {
    "namespaces": "import os; assert os.getpid() < 3",
    "landlock": "try: open('/'); assert False\nexcept PermissionError: pass",
    "seccomp": "import os\ntry: os.fork(); assert False\nexcept PermissionError: pass",
}


@dataclass(frozen=True)
class ExecutionResult:
    success: bool  # the program ran to its end
    stdout: str
    stderr: str
    error: str | None = None  # what stopped it, None on success
    timeout: bool = False
    memory_exceeded: bool = False


@functools.cache
def layers():
    """Names of the layers that work here, tried out in a process of their own on the first call."""
    working = ("rlimits",)
    for layer in PROBES if sys.platform == "linux" else ():
        try:
            if _execute(PROBES[layer], 30.0, None, (*working, layer)).success:
                working += (layer,)
        except UserError:
            pass
    return working


def sandbox_level():
    """ "strict" or "basic": what layers() amount to."""
    here = set(layers())
    return "strict" if "seccomp" in here and here & {"namespaces", "landlock"} else "basic"


def check_level(level="strict"):
    """Raises UserError if the sandbox of this machine is below `level`."""
    assert level in LEVELS, level
    if os.name != "posix":
        raise UserError("untrusted programs run on Linux and macOS only; leave the task out")
    if LEVELS.index(sandbox_level()) < LEVELS.index(level):
        raise UserError(
            f"no sandbox for untrusted programs here: it has {', '.join(layers())}; level {level} needs seccomp "
            "with namespaces or landlock (Linux); leave the task out, or run its programs all the same: --unsafe_exec"
        )


def execute_code(code, timeout=5.0, maximum_memory_bytes=256 * 1024 * 1024, level="strict"):
    """
    The ExecutionResult of running `code` as __main__ in a sandbox of its own.

    `timeout` is wall time in seconds, the interpreter's start included; memory is the address space, None = no limit.
    Only the standard library can be imported. Raises UserError if the machine's sandbox is below `level`.
    """
    check_level(level)
    return _execute(code, timeout, maximum_memory_bytes, layers())


def execute_many(programs, workers=None, **options):
    """ExecutionResults of many programs in their order, `workers` at a time (default: this rank's share of cores)."""
    check_level(options.get("level", "strict"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ThreadPoolExecutor(workers or max(1, cores // dist_env()[2])) as pool:
        try:
            return list(pool.map(lambda program: execute_code(program, **options), programs))
        except BaseException:  # Ctrl-C ends the programs that run, and starts no others
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _execute(code, timeout, memory, layers):
    """One program behind `layers`; raises UserError if these do not come up."""
    nonce = secrets.token_hex(16).encode()
    scratch = os.path.realpath(tempfile.mkdtemp(prefix="nanochat-"))
    result, result_end = os.pipe()
    command = [sys.executable, "-I", "-S", "-B", "-X", "utf8", JAIL, result_end, scratch, ",".join(layers), timeout]
    deadline = time.monotonic() + timeout
    try:
        with tempfile.TemporaryFile() as stdin:
            stdin.write(nonce + code.encode("utf-8", "replace"))
            stdin.seek(0)
            process = subprocess.Popen(
                [*map(str, command), str(memory or 0)],
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=[result_end],
                env={"HOME": scratch, "TMPDIR": scratch, "LANG": "C.UTF-8"},
                cwd="/",
                start_new_session=True,
            )
        os.close(result_end)
        result_end = None
        with process.stdout, process.stderr:
            try:
                outputs, stopped = _collect(
                    process, [result, process.stdout.fileno(), process.stderr.fileno()], deadline
                )
            finally:
                _end(process)
    finally:
        os.close(result)
        if result_end is not None:
            os.close(result_end)
        _delete(scratch)
    said, stdout, stderr = outputs
    stdout, stderr = stdout.decode("utf-8", "replace"), stderr.decode("utf-8", "replace")
    if not said.startswith(b"S") and not stopped:
        raise UserError(f"the sandbox ({', '.join(layers)}) did not start: {stderr.strip().splitlines()[-1:]}")
    if said == b"S" + nonce and not stopped and process.returncode == 0:
        return ExecutionResult(True, stdout, stderr)
    error = stopped or said[1:].replace(nonce, b"").decode("utf-8", "replace") or _last_words(process.returncode)
    return ExecutionResult(
        False, stdout, stderr, error, timeout=stopped == "timeout", memory_exceeded=error.startswith("MemoryError")
    )


def _collect(process, pipes, deadline):
    """([the first KEPT_OUTPUT bytes of each pipe], what it was stopped for or None), once it is done or stopped."""
    kept, sizes = [b"" for _ in pipes], [0 for _ in pipes]
    with selectors.DefaultSelector() as selector:
        for i, fd in enumerate(pipes):
            selector.register(fd, selectors.EVENT_READ, i)
        while selector.get_map():
            ready = selector.select(max(0, deadline - time.monotonic()))
            if not ready and time.monotonic() >= deadline:
                return kept, "timeout"
            for key, _ in ready:
                block, i = os.read(key.fd, 1 << 16), key.data
                if not block:
                    selector.unregister(key.fd)
                kept[i] += block[: KEPT_OUTPUT - len(kept[i])]
                sizes[i] += len(block)
                if sizes[i] > MAX_OUTPUT:
                    return kept, f"more than {MAX_OUTPUT:,} bytes of output"
    try:
        process.wait(max(0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return kept, "timeout"
    return kept, None


def _end(process):
    """Have the supervisor (see jail.py) kill and reap whatever still runs, and reap it."""
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _delete(scratch):
    try:
        shutil.rmtree(scratch)
    except (OSError, RecursionError):  # folders without permissions, or thousands deep; the tools take these
        subprocess.run(["chmod", "-R", "u+rwX", scratch], stderr=subprocess.DEVNULL)
        subprocess.run(["rm", "-rf", scratch], stderr=subprocess.DEVNULL)


def _last_words(code):
    how = f"signal {signal.Signals(code - 128).name}" if 128 < code < 160 else f"exit code {code}"
    return f"it left before its end ({how})"
