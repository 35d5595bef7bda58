"""
The sandboxed process: isolates itself with the given layers, then runs one untrusted program. execution.py starts it.

    python -I -S -B jail.py <result fd> <scratch folder> <layers, comma-separated> <seconds> <bytes, 0 = no limit>

stdin holds a nonce of 32 bytes, followed by the program. The process writes "S" to the result descriptor when all
layers are in place. After that it writes the nonce if the program ran to its end, or else the exception that ended the
program (nothing if the program exited in another way).

    supervisor   kills and reaps its child; execution.py knows its process id
      init       process 1 of the PID namespace, if there is one; when it dies, all processes of the namespace die
        program  cannot start processes, so it has no children

This file imports few modules, because their import time delays every program.
"""

import ctypes
import os
import resource
import signal
import struct
import sys
import types

LINUX, MACHINE = sys.platform == "linux", os.uname().machine
NONCE_BYTES = 32

# Resource limits that are the same for all programs (bytes, threads, descriptors); the caller sets time and memory.
RLIMITS = {"FSIZE": 16 << 20, "STACK": 8 << 20, "NPROC": 64, "NOFILE": 64, "CORE": 0, "MEMLOCK": 0, "MSGQUEUE": 0}

# Besides its scratch folder, a program sees the standard library and the shared libraries that it loads.
LIBRARIES = ["/usr/lib", "/usr/lib64", "/usr/local/lib", "/lib", "/lib64", "/nix/store", "/usr/share/zoneinfo"]
DEVICES = ["/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"]

# Constants of the kernel, from linux/audit.h and asm/unistd.h.
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
PIVOT_ROOT, CLONE3 = {"x86_64": 155, "aarch64": 41}, 435
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38  # linux/prctl.h


def call(name, *args):
    """Call libc's function `name`; ints are passed as long, strings as bytes. Raises OSError on failure."""
    values = [ctypes.c_long(a) if type(a) is int else a.encode() if type(a) is str else a for a in args]
    result = getattr(ctypes.CDLL(None, use_errno=True), name)(*values)
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{name}{args}: {os.strerror(ctypes.get_errno())}")
    return result


def main():
    result_fd, scratch, layers = int(sys.argv[1]), sys.argv[2], sys.argv[3].split(",")
    seconds, memory = float(sys.argv[4]), int(sys.argv[5])
    with open(0, "rb", buffering=0, closefd=False) as stdin:
        secret, program = [stdin.read(NONCE_BYTES)], stdin.read().decode()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    own_root = "namespaces" in layers  # the program sees a file system of its own
    visible = [p for p in [*sys.path, f"{sys.base_prefix}/lib", *LIBRARIES, "/etc/ld.so.cache"] if os.path.exists(p)]
    syscalls = read_syscalls(own_root) if "seccomp" in layers else {}  # before namespaces hide the file
    uid = choose_uid(scratch, own_root)
    if own_root:
        enter_namespaces()
    if LINUX:  # must follow enter_namespaces(), which resets it
        call("prctl", PR_SET_PDEATHSIG, signal.SIGTERM.value)
    supervise(seconds + 10, result_fd)
    if own_root:
        build_root(scratch, visible, uid)
        supervise(seconds + 10, result_fd)
    set_rlimits(seconds, memory, uid, own_root)
    os.chdir(scratch)
    if LINUX:
        drop_privileges(uid)
    if "landlock" in layers:
        restrict_files(scratch, visible)
    if "seccomp" in layers:
        restrict_syscalls(syscalls)
    run_program(program, secret, result_fd)


# ---------------------------------------------------------------------------------------------------------------------
# Processes

STOP_SIGNALS = (signal.SIGTERM, signal.SIGALRM)


def supervise(seconds, result_fd):
    """
    Fork. Returns in the child, which has a session of its own.

    The parent waits for the child, kills the rest of its process group, and exits with its status. It kills the
    child on SIGTERM, or after `seconds` at the latest.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # until the parent has its handlers
    child = os.fork()
    if child == 0:
        if LINUX:
            call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL.value)
        os.setsid()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        return

    def kill_child(*_):
        for kill in (os.killpg, os.kill):  # right after the fork, the child has no process group yet
            try:
                kill(child, signal.SIGKILL)
            except ProcessLookupError:
                pass

    for number in STOP_SIGNALS:
        signal.signal(number, kill_child)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    os.closerange(1, result_fd + 1)  # only the program keeps its output pipes open
    if LINUX:
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # leaves a zombie, whose id stays valid for kill_child()
        kill_child()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os._exit(code if code >= 0 else 128 - code)


# ---------------------------------------------------------------------------------------------------------------------
# User and limits


def choose_uid(scratch, own_root):
    """User id for the program: the current one; for root an unprivileged one, if that user can read the libraries."""
    if os.getuid() != 0:
        return os.getuid()
    os.setgroups([])
    # Candidates: an unused id, which owns no files and processes; "nobody"; as a last resort root.
    for uid in ((1 << 20) + os.getpid(), 65534, 0):
        try:
            os.chown(scratch, uid, uid)
            os.setegid(uid)
            os.seteuid(uid)
        except OSError:  # a container without this user id
            continue
        readable = all(os.access(p, os.R_OK, effective_ids=True) for p in (os.__file__, scratch))
        os.seteuid(0)
        os.setegid(0)
        if own_root or readable:
            return uid


def set_rlimits(seconds, memory, uid, own_root):
    """Set limits on CPU time (slightly above the wall time), address space, threads, and the resources in RLIMITS."""
    limits = RLIMITS | {"CPU": int(seconds) + 2} | ({"AS": memory} if memory else {})
    if LINUX and not own_root:  # the limit counts all threads of the user, also outside the sandbox
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                info = os.stat(f"/proc/{pid}/task")
                limits["NPROC"] += info.st_nlink - 2 if info.st_uid == uid else 0
            except OSError:  # the process has ended
                pass
    for name, value in limits.items():
        try:
            kind = getattr(resource, f"RLIMIT_{name}")
            hard = resource.getrlimit(kind)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(kind, (value, value))
        except (AttributeError, ValueError, OSError):  # macOS lacks MSGQUEUE and cannot limit memory
            if LINUX:
                raise


def drop_privileges(uid):
    """Become user `uid`, without capabilities and without ways to gain any."""
    if os.getuid() == 0 and uid != 0:
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    call("capset", (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())  # no capabilities
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL.value)  # again, because changing the user resets it


# ---------------------------------------------------------------------------------------------------------------------
# Namespaces


def enter_namespaces():
    """Enter new mount, UTS, IPC, network and PID (of children) namespaces, and a user namespace unless root."""
    uid, gid = os.getuid(), os.getgid()
    flags = 0x00020000 | 0x04000000 | 0x08000000 | 0x40000000 | 0x20000000
    call("unshare", flags if uid == 0 else flags | 0x10000000)
    if uid != 0:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as f:
                f.write(text)


def build_root(scratch, visible, uid):
    """Switch to a new root: the `visible` paths and DEVICES, read-only, and an empty tmpfs at `scratch`; no /proc."""
    private, bind, recursive, nosuid, nodev, noexec = 1 << 18, 1 << 12, 1 << 14, 2, 4, 8
    sources = {path: "/old" + os.path.realpath(path) for path in [*visible, *DEVICES]}
    call("mount", None, "/", None, private | recursive, None)
    call("mount", "tmpfs", scratch, "tmpfs", nosuid | nodev, "size=1m,mode=755")
    os.mkdir(f"{scratch}/old")
    call("syscall", PIVOT_ROOT[MACHINE], scratch, f"{scratch}/old")
    os.chdir("/")
    for path, source in sources.items():
        if os.path.exists(path):  # inside a folder that is already mounted
            continue
        os.makedirs(path if os.path.isdir(source) else os.path.dirname(path), exist_ok=True)
        if not os.path.isdir(path):
            os.close(os.open(path, os.O_CREAT))
        call("mount", source, path, None, bind | recursive, None)
    call("umount2", "/old", 2)  # MNT_DETACH
    os.rmdir("/old")
    os.makedirs(scratch)
    # mount_setattr with AT_RECURSIVE and MOUNT_ATTR_RDONLY
    call("syscall", 442, -1, "/", 0x8000, struct.pack("QQQQ", 1 | nosuid, 0, 0, 0), 32)
    call("mount", "tmpfs", scratch, "tmpfs", nosuid | nodev | noexec, f"size=32m,nr_inodes=4k,mode=700,uid={uid}")


# ---------------------------------------------------------------------------------------------------------------------
# Landlock (linux/landlock.h)


def restrict_files(scratch, visible):
    """
    Allow reading the `visible` paths, using DEVICES and writing to `scratch`, but no other access to files.

    Also forbids TCP and signals to other processes, where the kernel's Landlock supports that.
    """
    create_ruleset, add_rule, restrict_self = 444, 445, 446
    abi = call("syscall", create_ruleset, None, 0, 1)
    all_rights = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)) - 1
    execute, write, read, read_dir, truncate = 1, 2, 4, 8, 1 << 14
    special = 1 << 6 | 1 << 9 | 1 << 11 | 1 << 15  # making devices and sockets, ioctl
    rules = {path: execute | read | read_dir for path in visible}
    rules |= {path: read | write | truncate for path in DEVICES if os.path.exists(path)}
    rules[scratch] = all_rights & ~(execute | special)
    attributes = struct.pack("QQQ", all_rights, 3, 3)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    ruleset = call("syscall", create_ruleset, attributes, len(attributes), 0)
    for path, rights in rules.items():
        fd = os.open(path, os.O_PATH)
        rights &= all_rights if os.path.isdir(path) else all_rights & ~read_dir
        call("syscall", add_rule, ruleset, 1, struct.pack("=Qi", rights, fd), 0)
        os.close(fd)
    call("syscall", restrict_self, ruleset, 0)
    os.close(ruleset)


# ---------------------------------------------------------------------------------------------------------------------
# Seccomp (linux/seccomp.h, linux/bpf_common.h)


def read_syscalls(own_root):
    """{name: number on this machine} of the allowed system calls; those marked "metadata" only with `own_root`."""
    column = 1 + list(AUDIT_ARCH).index(MACHINE)
    with open(f"{os.path.dirname(__file__)}/syscalls.txt", encoding="ascii") as f:
        rows = [line.split() for line in f if not line.startswith("#")]
    return {r[0]: int(r[column]) for r in rows if r[column] != "-" and (own_root or r[-1] != "metadata")}


def restrict_syscalls(syscalls):
    """
    Allow only `syscalls`, some of them only with safe arguments.

    The filter is a classic BPF program over struct seccomp_data: call number at byte 0, architecture at 4, arguments
    from 16. Each instruction is (opcode, jump if true, jump if false, constant).
    """
    load, and_, equal, greater, end = 0x20, 0x54, 0x15, 0x25, 0x06
    allow, eperm, enosys, enotty = 0x7FFF0000, 0x50001, 0x50026, 0x50019  # SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO | errno
    thread, whole, pid = 0x10000, 0xFFFFFFFF, os.getpid()  # CLONE_THREAD
    # (argument index, mask, value, equal): the masked argument must equal the value if `equal`, else differ from it.
    conditions = {
        "clone": [(0, 0x7E020080 | thread, thread, True)],  # a thread, not a process, and in no new namespace
        "kill": [(0, whole, pid, True)],
        "tgkill": [(0, whole, pid, True)],
        "prlimit64": [(0, whole, 0, True)],
        "socketpair": [(0, whole, 1, True), (1, 0xF, 1, True)],  # AF_UNIX, SOCK_STREAM: asyncio needs it
        "fcntl": [(1, whole, command, False) for command in (8, 10, 15)],  # F_SETOWN, F_SETSIG, F_SETOWN_EX
        "ioctl": [(1, whole, 0x5421, True)],  # FIONBIO
    }
    code = [(load, 0, 0, 4), (equal, 1, 0, AUDIT_ARCH[MACHINE]), (end, 0, 0, eperm), (load, 0, 0, 0)]
    for name, number in syscalls.items():
        checks = []
        for argument, mask, value, must_equal in conditions.get(name, ()):
            checks += [(load, 0, 0, 16 + 8 * argument), (and_, 0, 0, mask)]  # the lower half, little-endian
            checks += [(equal, must_equal, not must_equal, value), (end, 0, 0, enotty if name == "ioctl" else eperm)]
        code += [(equal, 0, len(checks) + 1, number), *checks, (end, 0, 0, allow)]
    # ENOSYS makes libc fall back to older calls. This is needed for clone3, whose flags are in memory where a filter
    # cannot read them, and for calls that are newer than the table.
    code += [(equal, 0, 1, CLONE3), (end, 0, 0, enosys), (greater, 0, 1, 452), (end, 0, 0, enosys), (end, 0, 0, eperm)]
    filters = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *instruction) for instruction in code))
    call("prctl", PR_SET_SECCOMP, 2, struct.pack("HxxxxxxQ", len(code), ctypes.addressof(filters)))


# ---------------------------------------------------------------------------------------------------------------------
# The program


def run_program(program, secret, result_fd):
    """
    Run `program` as __main__. Writes the nonce, secret[0], to `result_fd` if the program ends without an exception.

    While the program runs, only the value stack of this frame holds the nonce. Names, containers, frame objects, trace
    functions and the garbage collector do not lead to it, and any exit other than reaching the end discards it.
    """
    sys.argv = ["program.py"]
    sys.modules["__main__"] = main = types.ModuleType("__main__")
    write, exit_now = os.write, os._exit
    write(result_fd, b"S")
    try:
        code = compile(program, "program.py", "exec", dont_inherit=True)
        write(result_fd, (secret.pop(), exec(code, main.__dict__), join_threads())[0])
    except MemoryError as e:
        e.__traceback__ = None  # frees the objects that filled the memory
        write(result_fd, b"MemoryError")
    except BaseException as e:
        report_exception(e, write, result_fd)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BaseException:
            pass
    exit_now(0)


def join_threads():
    """Wait for the threads that are not daemons, as the interpreter does at the end of every program."""
    if "threading" in sys.modules:
        sys.modules["threading"]._shutdown()


def report_exception(e, write, result_fd):
    """Write the exception's type and message to `result_fd`, and its traceback to stderr."""
    e.__traceback__ = e.__traceback__ and e.__traceback__.tb_next  # without the frame of run_program()
    try:
        text = f"{type(e).__name__}: {e}" if str(e) else type(e).__name__
    except BaseException:
        text = type(e).__name__
    write(result_fd, text.encode("utf-8", "replace")[:1000])
    if not isinstance(e, SystemExit):
        sys.__excepthook__(type(e), e, e.__traceback__)


if __name__ == "__main__":
    main()
