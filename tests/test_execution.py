"""The sandbox: hostile programs change nothing outside, only programs that run to their end succeed. HumanEval."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import pytest
from helpers import environment, needs_mirror, python_command, run_python, wait_until

from nanochat import execution
from nanochat.common import UserError
from nanochat.execution import execute_code, execute_many, layers, sandbox_level
from nanochat.sandbox import jail
from tasks.humaneval import HumanEval, leading_imports, reply_code

needs_strict = pytest.mark.skipif(sandbox_level() != "strict", reason="the kernel offers no isolation here")
SECRET = "NANOCHAT_TEST_SECRET"

# All combinations of layers that this machine supports; users get the first one.
FALLBACKS = [
    ("rlimits", "namespaces", "landlock", "seccomp"),
    ("rlimits", "landlock", "seccomp"),
    ("rlimits", "namespaces", "seccomp"),
]
FALLBACKS = [combination for combination in FALLBACKS if set(combination) <= set(layers())]


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """Targets of the hostile programs: a home with a file, a secret in the environment, a server, this process."""
    home = tmp_path_factory.mktemp("home")
    home.chmod(0o755)
    (home / "diary.txt").write_text("dear diary")
    (home / "diary.txt").chmod(0o666)
    server = socket.create_server(("127.0.0.1", 0))
    server.setblocking(False)
    bystander = subprocess.Popen(["sleep", "1000"])
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as scratches:
        os.chmod(scratches, 0o711)
        patch.setattr(tempfile, "tempdir", scratches)  # processes() finds our programs by this path
        patch.setenv("HOME", str(home))
        patch.setenv(SECRET, "xyzzy")
        yield {
            "HOME": str(home),
            "PORT": str(server.getsockname()[1]),
            "server": server,
            "PARENT": str(os.getpid()),
            "BYSTANDER": str(bystander.pid),
            "SECRET": SECRET,
            "JAIL": str(execution.JAIL),
        }
    server.close()
    bystander.kill()
    bystander.wait()


@pytest.fixture
def untouched(outside):
    """Checks that the test changes none of the targets and leaves no files, descriptors, threads or processes."""
    home = Path(outside["HOME"])
    (home / "diary.txt").chmod(0o666)
    signals = []
    handled = [signal.SIGTERM, signal.SIGUSR1, signal.SIGIO, signal.SIGHUP, signal.SIGCONT]
    before = {number: signal.signal(number, lambda n, _: signals.append(n)) for number in handled}

    def state():
        home_state = [(p.name, p.read_text(), p.stat().st_mode, p.stat().st_mtime) for p in sorted(home.iterdir())]
        temp = os.listdir(tempfile.gettempdir())
        fds = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
        environment = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"}
        here = environment, os.getcwd(), os.getpriority(os.PRIO_PROCESS, 0), hash(execution.JAIL.read_bytes())
        return home_state, temp, fds, here, threading.active_count(), processes()

    start = state()
    yield
    for _ in range(20):  # the kernel needs a moment to remove ended processes
        if state() == start:
            break
        time.sleep(0.05)
    assert state() == start
    assert not signals
    with pytest.raises(BlockingIOError):  # no program has connected
        outside["server"].accept()
    assert Path(f"/proc/{outside['BYSTANDER']}").exists() or not jail.LINUX
    for number, handler in before.items():
        signal.signal(number, handler)


def processes():
    """Ids of this process's children, including zombies, and of processes that run in one of our scratch folders."""
    pids = []
    for pid in filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc") else ()):
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
            line = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if int(stat.rpartition(")")[2].split()[1]) == os.getpid() or tempfile.gettempdir().encode() in line:
            pids.append(pid)
    return sorted(pids)


# name: (program, expected result). "fails" is any failure, "ends" is success, "timeout" is a timeout; any other text
# must be part of the error. No program may change anything outside.
HOSTILE = {
    # processes
    "fork_bomb": ("import os\nwhile True: os.fork()", "PermissionError"),
    "fork_bomb_caught": ("import os\nwhile True:\n  try: os.fork()\n  except OSError: pass", "timeout"),
    "shell": ("import os; assert os.system('touch /tmp/owned $HOME/owned') == 0", "fails"),
    "popen": ("import subprocess; subprocess.Popen(['sleep', '999'])", "PermissionError"),
    "multiprocessing": ("import multiprocessing as m; p = m.Process(target=print); p.start(); p.join()", "fails"),
    "daemonise": ("import os\nif os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0:\n    while 1: pass", "fails"),
    "clone_by_ctypes": ("import ctypes; assert ctypes.CDLL(None).syscall(56, 17, 0, 0, 0, 0) >= 0", "AssertionError"),
    "exec": ("import os; os.execv('/bin/true', ['true'])", "fails"),
    "exec_by_fd": ("import os; os.execve(os.open(os.__file__, 0), ['x'], {})", "fails"),
    "thread_bomb": (
        "import threading, time\nthreading.stack_size(32768)\nwhile True:\n"
        "  threading.Thread(target=time.sleep, args=(99,)).start()",
        "fails",
    ),
    "thread_outlives_main": (
        "import threading, time; threading.Thread(target=time.sleep, args=(99,)).start()",
        "timeout",
    ),
    "daemon_thread": (
        "import threading, time; threading.Thread(target=time.sleep, args=(99,), daemon=True).start()",
        "ends",
    ),
    # memory, time, output, disk
    "memory_bomb": ("x = []\nwhile True: x.append(bytearray(1 << 20))", "MemoryError"),
    "memory_at_once": ("x = [0] * (1 << 40)", "MemoryError"),
    "memory_by_string": ("x = 'a'\nwhile True: x += x", "MemoryError"),
    "memory_by_mmap": ("import mmap\nx = [mmap.mmap(-1, 1 << 26) for _ in range(99)]", "fails"),
    "memory_by_memfd": ("import os; os.write(os.memfd_create('x'), b'x')", "PermissionError"),
    "memory_by_shm": (
        "from multiprocessing.shared_memory import SharedMemory; SharedMemory(create=True, size=1 << 30)",
        "fails",
    ),
    "huge_int": ("x = 9 ** 9 ** 9", "timeout"),
    "huge_int_text": (
        "import sys; sys.set_int_max_str_digits(0) if hasattr(sys, 'set_int_max_str_digits') else 0; str(10 ** 10**7)",
        "timeout",
    ),
    "regex": ("import re; re.match('(a+)+b', 'a' * 99)", "timeout"),
    "endless_loop": ("while True: pass", "timeout"),
    "sleep": ("import time; time.sleep(999)", "timeout"),
    "sleep_ignoring_signals": (
        "import signal, time\nfor n in range(1, 65):\n  try: signal.signal(n, signal.SIG_IGN)\n"
        "  except (OSError, ValueError): pass\n"
        "while True: time.sleep(9)",
        "timeout",
    ),
    "wait_for_input": ("assert input() is not None", "EOFError"),
    "raise_limits": (
        "import resource as r; r.setrlimit(r.RLIMIT_AS, (r.RLIM_INFINITY, r.RLIM_INFINITY))",
        "ValueError",
    ),
    "raise_parents_limits": ("import resource as r; r.prlimit(@PARENT, r.RLIMIT_NOFILE, (3, 3))", "fails"),
    "endless_output": ("while True: print('x' * 1000)", "output"),
    "endless_stderr": ("import sys\nwhile True: sys.stderr.write('x' * 1000)", "output"),
    "binary_output": ("import os\nfor _ in range(99): os.write(1, bytes(range(256)))", "ends"),
    "close_output_and_stay": ("import os, time; os.closerange(0, 99); time.sleep(99)", "timeout"),
    "big_file": ("f = open('x', 'wb')\nwhile True: f.write(bytes(1 << 20))", "OSError"),
    "many_files": ("for i in range(3000): open(str(i), 'w').write('x' * 999)", "ends"),
    "many_fds": ("x = [open('x', 'w') for _ in range(999)]", "OSError"),
    "deep_recursion": ("import sys; sys.setrecursionlimit(10**9)\nf = lambda x: f([x])\nf(1)", "fails"),
    "deep_parser": ("x = " + "(" * 100000, "fails"),
    "crash": ("import ctypes; ctypes.string_at(0)", "SIGSEGV"),
    "abort": ("import os; os.abort()", "SIGABRT"),
    # files
    "write_home": ("open('@HOME/diary.txt', 'w')", "fails"),
    "append_home": ("open('@HOME/diary.txt', 'a').write('x')", "fails"),
    "read_home": ("open('@HOME/diary.txt').read()", "fails"),
    "create_in_home": ("open('@HOME/new.txt', 'w')", "fails"),
    "chmod_home": ("import os; os.chmod('@HOME/diary.txt', 0)", "fails"),
    "utime_home": ("import os; os.utime('@HOME/diary.txt', (0, 0))", "fails"),
    "truncate_home": ("import os; os.truncate('@HOME/diary.txt', 0)", "fails"),
    "remove_home": ("import shutil; shutil.rmtree('@HOME')", "fails"),
    "rename_home": ("import os; os.rename('@HOME/diary.txt', 'x')", "fails"),
    "hard_link": ("import os; os.link('@HOME/diary.txt', 'x'); open('x', 'w')", "fails"),
    "symlink": ("import os; os.symlink('@HOME', 'x'); open('x/diary.txt', 'a')", "fails"),
    "symlink_for_the_cleaner": ("import os; os.symlink('@HOME', 'x'); os.symlink('/', 'y')", "ends"),
    "dots": ("open('../../../../../..@HOME/diary.txt', 'a')", "fails"),
    "tmp": ("open('/tmp/nanochat-owned', 'w')", "fails"),
    "etc": ("open('/etc/passwd').read()", "fails"),
    "root": ("import os; assert {'proc', 'sys', 'var'} & set(os.listdir('/'))", "fails"),
    "jail_file": ("open('@JAIL', 'a')", "fails"),
    "stdlib": ("import os; open(os.__file__, 'a')", "fails"),
    "device": ("import glob; open((glob.glob('/dev/[sv]da') + ['/dev/mem'])[0], 'rb')", "fails"),
    "dev_shm": ("open('/dev/shm/nanochat-owned', 'w')", "fails"),
    "delete_scratch": ("import shutil, os; shutil.rmtree(os.getcwd(), ignore_errors=True)", "ends"),
    "scratch_without_permissions": (
        "import os; os.mkdir('x'); os.mkdir('x/y'); os.umask(0o777); os.mkdir('x/z')",
        "ends",
    ),
    "scratch_a_mile_deep": ("import os\nfor _ in range(3000):\n  os.mkdir('x'); os.chdir('x')", "ends"),
    "mknod": ("import os; os.mknod('x', 0o600 | 0o60000, os.makedev(8, 0))", "fails"),
    "chroot": ("import os; os.chroot('.')", "fails"),
    "mount": ("import ctypes; assert ctypes.CDLL(None).mount(b'x', b'/tmp', b'tmpfs', 0, 0) == 0", "fails"),
    "unshare": ("import ctypes; assert ctypes.CDLL(None).unshare(0x10000000) == 0", "fails"),
    "become_root": ("import os; os.setuid(0); os.listdir('/root')", "fails"),
    # secrets and other processes
    "environment": ("import os; assert '@SECRET' in os.environ", "fails"),
    "parents_environment": ("assert b'@SECRET' in open('/proc/@PARENT/environ', 'rb').read()", "fails"),
    "all_environments": (
        "import glob; assert any(b'@SECRET' in open(p, 'rb').read() for p in glob.glob('/proc/*/environ'))",
        "fails",
    ),
    "parents_files": ("import os; assert os.listdir('/proc/@PARENT/fd')", "fails"),
    "parents_memory": ("open('/proc/@PARENT/mem', 'r+b')", "fails"),
    "ptrace": ("import ctypes; assert ctypes.CDLL(None).ptrace(16, @PARENT, 0, 0) == 0", "AssertionError"),
    "read_memory": (
        "import ctypes; assert ctypes.CDLL(None, use_errno=True).process_vm_readv(@PARENT, 0, 0, 0, 0, 0) == 0",
        "AssertionError",
    ),
    "kill_parent": ("import os, signal; os.kill(@PARENT, signal.SIGUSR1)", "fails"),
    "kill_supervisor": ("import os, signal; os.kill(os.getppid(), signal.SIGKILL)", "fails"),
    "kill_bystander": ("import os; os.kill(@BYSTANDER, 9)", "fails"),
    "kill_all": ("import os; os.kill(-1, 9)", "fails"),
    "kill_group": ("import os; os.kill(0, 9)", "fails"),
    "kill_by_pidfd": ("import os, signal; signal.pidfd_send_signal(os.pidfd_open(@BYSTANDER), 9)", "fails"),
    "kill_by_sigio": ("import fcntl, os; fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, @PARENT)", "fails"),
    "slow_parent_down": ("import os; os.setpriority(os.PRIO_PROCESS, @PARENT, 19)", "fails"),
    "leave_session": ("import os; os.setsid()", "fails"),
    # network
    "connect": ("import socket; socket.create_connection(('127.0.0.1', @PORT))", "PermissionError"),
    "listen": ("import socket; socket.create_server(('127.0.0.1', 0))", "PermissionError"),
    "udp": (
        "import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', @PORT))",
        "PermissionError",
    ),
    "dns": ("import socket; socket.getaddrinfo('example.com', 80)", "fails"),
    "unix_socket": ("import socket; socket.socket(socket.AF_UNIX).connect('/dev/log')", "PermissionError"),
    "datagram_pair": ("import socket; socket.socketpair(type=socket.SOCK_DGRAM)[0].sendto(b'x', '/dev/log')", "fails"),
    "url": ("import urllib.request; urllib.request.urlopen('http://127.0.0.1:@PORT')", "fails"),
    "io_uring": ("import ctypes; assert ctypes.CDLL(None).syscall(425, 1, bytes(120)) >= 0", "AssertionError"),
    # pretending success without running to the end
    "sys_exit": ("import sys; sys.exit(0)\nassert False", "SystemExit"),
    "os_exit": ("import os; os._exit(0)", "fails"),
    "raise_exit": ("raise SystemExit", "SystemExit"),
    "raise_interrupt": ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    "kill_self": ("import os; os.kill(os.getpid(), 9)", "SIGKILL"),
    "kill_self_softly": ("import os; os.kill(os.getpid(), 15)", "SIGTERM"),
    "exit_at_exit": ("import atexit, os; atexit.register(os._exit, 0); assert False", "AssertionError"),
    "excepthook": ("import sys, os; sys.excepthook = lambda *_: os._exit(0); assert False", "AssertionError"),
    "print_success": ("import sys; print('success', 'S', 'passed', '0' * 32); sys.exit()", "SystemExit"),
    "write_everywhere": (
        "import os\nfor fd in range(99):\n  for x in (b'S', b'success', b'0' * 32):\n    try: os.write(fd, x)\n"
        "    except OSError: pass\n"
        "os._exit(0)",
        "fails",
    ),
    "read_everywhere": (
        "import os\nfor fd in range(3, 99):\n  try: os.set_blocking(fd, False); os.lseek(fd, 0, 0)\n"
        "  except OSError: pass\n  try: os.write(2, os.read(fd, 99))\n"
        "  except OSError: pass\nassert False",
        "AssertionError",
    ),
    "close_all": ("import os; os.closerange(0, 99)", "fails"),
    "error_without_text": ("class E(Exception):\n  __str__ = lambda s: 1/0\nraise E", "E"),
    "error_text_hangs": ("class E(Exception):\n  def __str__(s):\n    while 1: pass\nraise E", "timeout"),
    "builtins": ("import builtins; builtins.AssertionError = builtins.Exception = int; assert False", "AssertionError"),
    "patched_write": ("import os; os.write = lambda *a: 0; os._exit = print; assert False", "AssertionError"),
    # Looks for the nonce in all objects that Python code can reach, writes candidates to every descriptor, then exits.
    "search_for_nonce": (
        "import gc, os, re, sys\n"
        "seen, todo, found = set(), [sys.modules, gc.get_objects()], set()\n"
        "f = sys._getframe()\n"
        "while f: todo += [f, f.f_locals, f.f_globals, f.f_code.co_consts]; f = f.f_back\n"
        "while todo:\n"
        "  x = todo.pop()\n"
        "  if id(x) in seen: continue\n"
        "  seen.add(id(x))\n"
        "  if type(x) is bytes and re.fullmatch(b'[0-9a-f]{32}', x): found.add(x)\n"
        "  todo += gc.get_referents(x)\n"
        "for x in found:\n"
        "  for fd in range(3, 99):\n"
        "    try: os.write(fd, x)\n"
        "    except OSError: pass\n"
        "assert not found, found\n"
        "os._exit(0)",
        "exit code 0",
    ),
    "trace_the_jail": (
        "import os, sys\nnames = []\n"
        "def trace(frame, event, arg):\n"
        "  names.append(repr(frame.f_locals)); frame.f_trace_opcodes = True; return trace\n"
        "f = sys._getframe(1)\nf.f_trace = trace; f.f_trace_opcodes = True\n"
        "sys.settrace(trace); sys.setprofile(trace)\n"
        "assert False",
        "AssertionError",
    ),
}


def has_result(result, expected):
    if expected == "ends":
        return result.success
    if expected == "timeout":
        return result.timeout and not result.success
    return not result.success and (expected == "fails" or expected in (result.error or ""))


def fill_placeholders(program, outside):
    """The program with the values of @HOME, @PORT, ... from `outside`."""
    for name, value in outside.items():
        program = program.replace(f"@{name}", str(value))
    return program


def run_hostile(name, outside):
    program, expected = HOSTILE[name]
    result = execute_code(fill_placeholders(program, outside), timeout=0.5 if expected == "timeout" else 10.0)
    assert has_result(result, expected), result
    assert "xyzzy" not in result.stdout + result.stderr and "dear diary" not in result.stdout + result.stderr


@needs_strict
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n == "deep_recursion" else n for n in HOSTILE]
)
def test_hostile_program_changes_nothing_outside(name, outside, untouched):
    run_hostile(name, outside)


@pytest.mark.slow
@pytest.mark.parametrize("available", FALLBACKS[1:], ids="+".join)
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_program_changes_nothing_outside_with_fewer_layers(name, available, outside, untouched, monkeypatch):
    monkeypatch.setattr(execution, "layers", lambda: available)
    run_hostile(name, outside)


# ---------------------------------------------------------------------------------------------------------------------
# Harmless programs


def test_result_of_a_successful_program():
    result = execute_code("import sys; print('hé', __name__); print('oops', file=sys.stderr)")
    assert result == execution.ExecutionResult(True, "hé __main__\n", "oops\n", None, False, False)


def test_results_of_failing_programs():
    result = execute_code("print(1)\n\n1 / 0")
    assert (result.success, result.stdout, result.error) == (False, "1\n", "ZeroDivisionError: division by zero")
    assert result.stderr.splitlines()[:2] == [
        "Traceback (most recent call last):",
        '  File "program.py", line 3, in <module>',
    ]
    assert "SyntaxError" in execute_code("x = (").error
    assert "null bytes" in execute_code("x = '\0'").error
    result = execute_code("x = [0] * (1 << 40)")
    assert result.memory_exceeded and result.error == "MemoryError" and not result.timeout
    result = execute_code("print('x' * 100, flush=True)\nwhile True: pass", timeout=0.7)
    assert result.timeout and result.error == "timeout" and not result.memory_exceeded and not result.success
    assert "\ufffd" in execute_code("import os; os.write(1, b'\\xff')").stdout
    assert "SIGKILL" in execute_code("import os; os.kill(os.getpid(), 9)").error


HARMLESS = {
    "main": "import sys\nif __name__ == '__main__': print(sys.argv)\nelse: raise Exception",
    "coding_cookie": "# -*- coding: latin-1 -*-\nassert len('é') == 1",
    "dataclass": "from dataclasses import dataclass\n@dataclass\nclass A:\n  x: 'int' = 3\nassert A() == A(3)",
    "pickle": "import pickle\nclass A: pass\nassert type(pickle.loads(pickle.dumps(A()))) is A",
    "typing": "from typing import get_type_hints, List\ndef f(x: List[int]): pass\nassert get_type_hints(f)",
    "asyncio": "import asyncio\nasync def f(): return 3\nassert asyncio.run(f()) == 3",
    "threads": "from concurrent.futures import ThreadPoolExecutor as T\nassert sum(T(8).map(int, '12345')) == 15",
    "late_thread": "import threading, time\nthreading.Thread(target=lambda: (time.sleep(.2), print('late'))).start()",
    "files": "import os, tempfile, shutil\nwith tempfile.TemporaryDirectory() as d:\n  open(d + '/x', 'w').write('y')\n"
    "  os.rename(d + '/x', d + '/z'); assert open(d + '/z').read() == 'y'\nassert os.listdir() == []",
    "scratch_home": "import os; assert os.getcwd() == os.environ['HOME']; open(os.path.expanduser('~/x'), 'w')",
    "null": "import os; open(os.devnull, 'w').write('x'); assert open(os.devnull).read() == ''",
    "libraries": "import bz2, csv, ctypes, decimal, hashlib, json, math, random, re, ssl, unittest, zlib, zoneinfo",
    "signals": "import signal as s\nx = []\ns.signal(s.SIGALRM, lambda *a: x.append(1)); s.setitimer(0, .01)\n"
    "s.pause(); assert x\ns.signal(s.SIGUSR1, lambda *a: x.append(1)); s.raise_signal(s.SIGUSR1)\n"
    "assert len(x) == 2",
    "memory": "x = [0] * 10_000_000; assert len(bytearray(100 << 20))",
    "recursion": "import sys\nsys.setrecursionlimit(5000)\ndef f(n): return n and 1 + f(n - 1)\nassert f(3000) == 3000",
    "caught_exit": "try: exit\nexcept NameError: pass\ntry: raise SystemExit\nexcept SystemExit: pass",
}


@pytest.mark.parametrize("available", FALLBACKS + [("rlimits",)], ids="+".join)
def test_harmless_programs_succeed(available, untouched, monkeypatch):
    import torch  # noqa: F401  programs must not inherit the gigabytes of address space that torch reserves

    monkeypatch.setattr(execution, "layers", lambda: available)
    results = dict(zip(HARMLESS, execute_many(HARMLESS.values(), timeout=20, level="basic"), strict=True))
    assert {name: r for name, r in results.items() if not r.success} == {}
    assert results["main"].stdout == "['program.py']\n" and results["late_thread"].stdout == "late\n"


def test_memory_limit_can_be_changed():
    program = "x = bytearray(400 << 20)"
    assert execute_code(program).memory_exceeded
    assert execute_code(program, maximum_memory_bytes=1 << 30).success
    assert execute_code(program, maximum_memory_bytes=None).success


def test_output_is_truncated():
    result = execute_code("print('x' * 500_000)")
    assert result.success and len(result.stdout) == execution.KEPT_OUTPUT


def test_execute_many_returns_results_in_order(untouched):
    programs = [f"print({i})" if i % 10 else "import time; time.sleep(99)" for i in range(20)]
    results = execute_many(programs, workers=4, timeout=2)
    assert [r.stdout for r in results] == [f"{i}\n" if i % 10 else "" for i in range(20)]


@pytest.mark.slow
def test_execute_many_with_1000_programs(untouched):
    results = execute_many(["import os; os.fork()", "print(1)", "1/0", "raise SystemExit"] * 250, workers=16)
    assert [r.success for r in results] == [False, True, False, False] * 250


def test_programs_end_when_the_parent_process_is_killed(tmp_path):
    """Even a program that ignores signals."""
    program = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: time.sleep(1)"
    script = f"from nanochat.execution import execute_code\nexecute_code({program!r}, timeout=60, level='basic')"
    parent = subprocess.Popen(python_command("-c", script), env=environment(TMPDIR=str(tmp_path)))
    try:

        def alive():
            """Number of processes that have the temporary folder in their command line."""
            count = 0
            for p in filter(str.isdigit, os.listdir("/proc")):
                with contextlib.suppress(OSError):  # it has ended by now
                    count += str(tmp_path).encode() in Path(f"/proc/{p}/cmdline").read_bytes()
            return count

        if not jail.LINUX:
            pytest.skip("needs /proc")
        wait_until(lambda: alive() >= (3 if "namespaces" in layers() else 2) and (time.sleep(1) or True))
        parent.kill()
        parent.wait()
        wait_until(lambda: alive() == 0)
    finally:
        parent.kill()


# ---------------------------------------------------------------------------------------------------------------------
# Levels


def test_execution_below_the_required_level_is_refused(monkeypatch):
    for available, level in (
        (("rlimits",), "basic"),
        (("rlimits", "seccomp"), "basic"),
        (("rlimits", "namespaces", "landlock"), "basic"),
        (("rlimits", "landlock", "seccomp"), "strict"),
        (("rlimits", "namespaces", "seccomp"), "strict"),
    ):
        monkeypatch.setattr(execution, "layers", lambda available=available: available)
        assert sandbox_level() == level
        if level == "basic":
            with pytest.raises(UserError, match="--unsafe_exec"):
                execute_code("print(1)")
            with pytest.raises(UserError, match="--unsafe_exec"):
                execute_many(["print(1)"])
            with pytest.raises(UserError, match="--unsafe_exec"):
                HumanEval()
    assert execute_code("print(1)", level="basic").success


def test_basic_level_enforces_limits(monkeypatch, untouched):
    monkeypatch.setattr(execution, "layers", lambda: ("rlimits",))
    run = lambda program, **options: execute_code(program, level="basic", **options)  # noqa: E731
    assert run("import sys; sys.exit(0)").error == "SystemExit: 0" and not run("import os; os._exit(0)").success
    assert run("import time; time.sleep(99)", timeout=0.7).timeout
    assert run("x = bytearray(1 << 30)").memory_exceeded
    assert run(
        "import os; assert set(os.environ) <= {'HOME', 'TMPDIR', 'LANG', 'LC_CTYPE', '__CF_USER_TEXT_ENCODING'}"
    ).success
    assert "bytes of output" in run("while True: print('x' * 999)").error
    if jail.LINUX:
        run("import os, time\nif os.fork() == 0: time.sleep(99)")  # the child process is killed, too


@pytest.mark.skipif(not jail.LINUX, reason="layers of the Linux kernel")
def test_failing_layer_is_not_ignored(monkeypatch, tmp_path):
    """A layer that cannot be set up is not listed. If it is requested anyway, the program does not run."""
    modified = shutil.copytree(execution.JAIL.parent, tmp_path / "sandbox") / "jail.py"
    source = execution.JAIL.read_text()
    modified.write_text(source.replace('call("syscall", restrict_self', 'call("syscall", 9999'))
    assert modified.read_text() != source
    monkeypatch.setattr(execution, "JAIL", modified)
    with pytest.raises(UserError, match="did not start"):
        execution._execute("print(1)", 20, None, ("rlimits", "landlock"))
    execution.layers.cache_clear()
    assert "landlock" not in layers()
    execution.layers.cache_clear()


@needs_strict
def test_level_is_strict_where_a_container_forbids_namespaces(tmp_path):
    """Under a seccomp filter that forbids unshare, like Docker's, Landlock and seccomp still reach level strict."""
    script = """if 1:
        import sys
        from nanochat import execution
        from nanochat.sandbox import jail
        import ctypes, struct
        number = {"x86_64": 272, "aarch64": 97}[jail.MACHINE]
        code = [(0x20, 0, 0, 0), (0x15, 0, 1, number), (6, 0, 0, 0x50001), (6, 0, 0, 0x7FFF0000)]
        buffer = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *c) for c in code))
        jail.call("prctl", 38, 1, 0, 0, 0)
        jail.call("prctl", 22, 2, struct.pack("HxxxxxxQ", len(code), ctypes.addressof(buffer)))
        print(execution.layers(), execution.sandbox_level(), execution.execute_code("print(1)").success)
    """
    if "landlock" not in layers():
        pytest.skip("no Landlock here")
    done = run_python("-c", script, check=False)
    assert done.stdout == "('rlimits', 'landlock', 'seccomp') strict True\n", done.stderr


@pytest.mark.parametrize(
    "machine, headers",
    [("x86_64", "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), ("aarch64", "/usr/include/asm-generic/unistd.h")],
)
def test_system_call_numbers_equal_the_kernel_headers(machine, headers):
    if not Path(headers).exists():
        pytest.skip("no kernel headers here (linux-libc-dev)")
    known = {name: int(n) for name, n in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", Path(headers).read_text())}
    known |= {"newfstatat": known.get("newfstatat", known.get("fstatat")), "fchmodat2": 452}  # newer than some headers
    table = [line.split() for line in execution.JAIL.with_name("syscalls.txt").read_text().splitlines()]
    rows = [row for row in table if row[0] != "#"]
    assert len(rows) > 150 and "ioctl" in [row[0] for row in rows]
    for name, *numbers in rows:
        assert numbers[list(jail.AUDIT_ARCH).index(machine)] == str(known.get(name, "-")), name
    assert jail.PIVOT_ROOT[machine] == known["pivot_root"] and jail.CLONE3 == known["clone3"]


def test_metadata_calls_are_allowed_only_with_namespaces(monkeypatch):
    """Landlock does not control these calls. Without namespaces, they could change files outside of the sandbox."""
    for machine, missing in (("x86_64", set()), ("aarch64", {"chmod"})):
        monkeypatch.setattr(jail, "MACHINE", machine)
        metadata = {"chmod", "fchmod", "fchmodat", "fchmodat2", "utimensat", "truncate"} - missing
        assert jail.read_syscalls(True).keys() - jail.read_syscalls(False).keys() == metadata


# ---------------------------------------------------------------------------------------------------------------------
# HumanEval


@pytest.fixture
def humaneval(empty_base, mirror):
    return HumanEval(level="basic" if sandbox_level() == "basic" else "strict")


def test_reply_code_is_the_first_code_block():
    assert reply_code("def f(): pass") == "def f(): pass"
    assert reply_code("Sure:\n```python\nx = 1\n```\nand\n```\ny = 2\n```") == "x = 1\n"
    assert reply_code("```\nx = 1\n```") == "x = 1\n"


def test_leading_imports_of_a_prompt():
    prompt = "# note\nimport math\nfrom typing import List\n\n\ndef f():\n    import os\nimport sys\n"
    assert leading_imports(prompt) == "import math\nfrom typing import List"


@needs_mirror
def test_humaneval_problem_and_evaluation(humaneval):
    rows = {humaneval[i]["entry_point"]: humaneval[i] for i in range(len(humaneval))}
    problem = rows["mean_absolute_deviation"]
    user, assistant = problem["messages"]
    assert user["content"].startswith("from typing import List\n\n\ndef mean_absolute_deviation(")
    assert assistant["content"].startswith(user["content"]) and humaneval.eval_type == "generative"
    body = "def mean_absolute_deviation(numbers: List[float]):\n    m = sum(numbers) / len(numbers)\n"
    good = f"Here it is:\n```python\n{body}    return sum(abs(x - m) for x in numbers) / len(numbers)\n```\nDone."
    assert humaneval.evaluate(problem, good) is True and humaneval.reward(problem, good) == 1.0
    assert humaneval.evaluate(problem, good.replace("abs", "")) is False
    for early_exit in ("import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit", "quit()", "x = ("):
        assert humaneval.evaluate(problem, early_exit) is False
        inside = f"{body}    {early_exit}\n"
        assert humaneval.evaluate(problem, f"```python\n{inside}```") is False


def problems_with_solutions(task):
    """[(conversation, prompt, canonical solution, the solution without the prompt)] of all problems."""
    problems = [task[i] for i in range(len(task))]
    texts = [[message["content"] for message in problem["messages"]] for problem in problems]
    return [(problem, *text, text[1][len(text[0]) :]) for problem, text in zip(problems, texts, strict=True)]


@needs_mirror
def test_canonical_solutions_of_humaneval_pass(humaneval):
    import torch  # noqa: F401

    verdicts = humaneval.evaluate_many(
        [(problem, solution) for problem, _, solution, _ in problems_with_solutions(humaneval)]
    )
    assert verdicts == [True] * len(humaneval) and len(humaneval) > 50


@needs_mirror
@pytest.mark.parametrize(
    "body",
    [
        "pass",
        *(
            pytest.param(body, marks=pytest.mark.slow)
            for body in ("import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit", "exit()")
        ),
    ],
)
def test_wrong_solutions_of_humaneval_fail(humaneval, body):
    pairs = [(problem, f"{prompt}    {body}\n") for problem, prompt, _, _ in problems_with_solutions(humaneval)]
    assert humaneval.evaluate_many(pairs) == [False] * len(pairs)


@needs_mirror
@pytest.mark.slow
def test_mutated_solutions_of_humaneval_fail(humaneval):
    """Every `return x` becomes `return [x, 0]`; only a problem without tests could accept that."""
    problems = problems_with_solutions(humaneval)
    pairs = [
        (problem, prompt + re.sub(r"return (.+)", r"return [(\1), 0]", body)) for problem, prompt, _, body in problems
    ]
    verdicts = humaneval.evaluate_many(pairs)
    assert [p["entry_point"] for (p, _), correct in zip(pairs, verdicts, strict=True) if correct] == []
