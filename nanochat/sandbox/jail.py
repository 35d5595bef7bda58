"""
The inside of the sandbox: shuts one door after the other, then runs a program behind them. execution.py starts it.

    python -I -S -B jail.py <result fd> <scratch folder> <layers, with commas> <seconds> <bytes, 0 = any>

stdin holds a nonce of 32 bytes and the program. What comes out of the result descriptor is "S" once all doors are shut,
then the nonce if the program ran to its end, else the exception that ended it (nothing if it left in another way).

    supervisor   kills and reaps; what execution.py knows the id of
      init       of the new pid namespace, where there is one: its end is the end of everything inside
        program  cannot start processes, so it is the only one

Standard library only, and little of it: thousands of programs each wait for this file's imports.
"""

import ctypes
import os
import resource
import signal
import struct
import sys
import types

LINUX = sys.platform == "linux"
MACHINE = os.uname().machine
NONCE_BYTES = 32
FIRST_UID = 1 << 20  # root runs programs as this plus a process id: a user that owns nothing and runs nothing else

# Limits that are the same for all programs; time and memory are the caller's.
MAX_FILE = 16 << 20  # bytes of a file
MAX_SCRATCH = "size=32m,nr_inodes=4k,mode=700"  # of the scratch folder, where it is a tmpfs
MAX_TASKS = 64  # threads
MAX_FDS = 64
MAX_STACK = 8 << 20  # bytes

# What a program can see, besides its scratch: the standard library and the shared libraries that it loads.
LIBRARIES = ["/usr/lib", "/usr/lib64", "/usr/local/lib", "/lib", "/lib64", "/nix/store", "/usr/share/zoneinfo"]
DEVICES = ["/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"]

# System calls that a program may make: name, number on x86_64, number on aarch64 (- where it does not exist).
# Everything else fails: new processes and programs, sockets, mounts, namespaces, ptrace, keys, bpf, io_uring, ...
SYSCALLS = """
read 0 63, write 1 64, open 2 -, close 3 57, stat 4 -, fstat 5 80, lstat 6 -, poll 7 -, lseek 8 62, mmap 9 222,
mprotect 10 226, munmap 11 215, brk 12 214, rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139,
pread64 17 67, pwrite64 18 68, readv 19 65, writev 20 66, access 21 -, pipe 22 -, select 23 -, sched_yield 24 124,
mremap 25 216, msync 26 227, madvise 28 233, dup 32 23, dup2 33 -, pause 34 -, nanosleep 35 101, getitimer 36 102,
alarm 37 -, setitimer 38 103, getpid 39 172, sendfile 40 71, sendto 44 206, recvfrom 45 207, sendmsg 46 211,
recvmsg 47 212, shutdown 48 210, getsockname 51 204, getpeername 52 205, socketpair 53 199, setsockopt 54 208,
getsockopt 55 209, clone 56 220, exit 60 93, wait4 61 260, kill 62 129, uname 63 160, fcntl 72 25, flock 73 32,
fsync 74 82, fdatasync 75 83, truncate 76 45, ftruncate 77 46, getdents 78 -, getcwd 79 17, chdir 80 49, fchdir 81 50,
rename 82 -, mkdir 83 -, rmdir 84 -, creat 85 -, link 86 -, unlink 87 -, symlink 88 -, readlink 89 -, chmod 90 -,
fchmod 91 52, umask 95 166, gettimeofday 96 169, getrlimit 97 163, getrusage 98 165, sysinfo 99 179, times 100 153,
getuid 102 174, getgid 104 176, geteuid 107 175, getegid 108 177, getppid 110 173, getpgrp 111 -, getgroups 115 158,
getresuid 118 148, getresgid 120 150, getpgid 121 155, getsid 124 156, rt_sigpending 127 136, rt_sigtimedwait 128 137,
rt_sigsuspend 130 133, sigaltstack 131 132, statfs 137 43, fstatfs 138 44, getpriority 140 141,
sched_getparam 143 121, sched_getscheduler 145 120, sched_get_priority_max 146 125, sched_get_priority_min 147 126,
gettid 186 178, time 201 -, futex 202 98, sched_getaffinity 204 123, epoll_create 213 -, getdents64 217 61,
set_tid_address 218 96, restart_syscall 219 128, fadvise64 221 223, clock_gettime 228 113, clock_getres 229 114,
clock_nanosleep 230 115, exit_group 231 94, epoll_wait 232 -, epoll_ctl 233 21, tgkill 234 131, waitid 247 95,
openat 257 56, mkdirat 258 34, newfstatat 262 79, unlinkat 263 35, renameat 264 38, linkat 265 37, symlinkat 266 36,
readlinkat 267 78, fchmodat 268 53, faccessat 269 48, pselect6 270 72, ppoll 271 73, set_robust_list 273 99,
get_robust_list 274 100, utimensat 280 88, epoll_pwait 281 22, eventfd 284 -, fallocate 285 47, eventfd2 290 19,
epoll_create1 291 20, dup3 292 24, pipe2 293 59, preadv 295 69, pwritev 296 70, prlimit64 302 261, getcpu 309 168,
renameat2 316 276, getrandom 318 278, membarrier 324 283, copy_file_range 326 285, statx 332 291, rseq 334 293,
close_range 436 436, faccessat2 439 439, epoll_pwait2 441 441, fchmodat2 452 452
"""
# Landlock does not rule over these, so without a file system of one's own they would change the host's files.
METADATA = {"chmod", "fchmod", "fchmodat", "fchmodat2", "utimensat", "truncate"}
LAST_SYSCALL = 452  # libc knows what to do without later ones, if it is told that they do not exist
NUMBERS = {"x86_64": {"audit": 0xC000003E, "pivot_root": 155, "ioctl": 16, "clone3": 435}}
NUMBERS["aarch64"] = {"audit": 0xC00000B7, "pivot_root": 41, "ioctl": 29, "clone3": 435}


def call(name, *args):
    """Result of libc's function `name` (ints are passed as long); raises OSError where it fails."""
    result = getattr(ctypes.CDLL(None, use_errno=True), name)(
        *(ctypes.c_long(a) if type(a) is int else a for a in args)
    )
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{name}{args}: {os.strerror(ctypes.get_errno())}")
    return result


def main():
    result, scratch, layers = int(sys.argv[1]), sys.argv[2], sys.argv[3].split(",")
    seconds, memory = float(sys.argv[4]), int(sys.argv[5])
    with open(0, "rb", buffering=0, closefd=False) as f:
        data = f.read()
    secret, program = [data[:NONCE_BYTES]], data[NONCE_BYTES:].decode()
    del data
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    visible = [p for p in [*sys.path, f"{sys.base_prefix}/lib", *LIBRARIES, "/etc/ld.so.cache"] if os.path.exists(p)]
    own_root = "namespaces" in layers
    uid = choose_uid(scratch, own_root)
    if own_root:
        unshare()
    supervise_until(seconds + 10)  # only now, changes of user and namespace make the kernel forget it
    supervise(result)
    if own_root:
        build_root(scratch, visible, uid)
        supervise(result)
    limit(seconds, memory, uid, own_root)
    os.chdir(scratch)
    if LINUX:
        drop_privileges(uid)
    if "landlock" in layers:
        landlock(scratch, visible)
    if "seccomp" in layers:
        seccomp(own_root)
    run(program, secret, result)


# ---------------------------------------------------------------------------------------------------------------------
# Processes

children = []  # of this process; the handler below must find them whatever moment it is called at


def supervise_until(seconds):
    """End with all children at SIGTERM, when the parent dies, or after `seconds` in case neither happens."""
    for number in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, lambda *_: kill_children() if children else os._exit(1))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    if LINUX:
        call("prctl", 1, signal.SIGTERM.value)  # PR_SET_PDEATHSIG


def kill_children():
    for child in children:
        try:
            os.killpg(child, signal.SIGKILL)
        except ProcessLookupError:
            pass


def supervise(result):
    """Go on in a child with a session of its own; this process waits for it and ends as it ended, leaving nothing."""
    parent_knows, child_knows = os.pipe()
    child = os.fork()
    if child == 0:
        children.clear()
        for number in (signal.SIGTERM, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        if LINUX:
            call("prctl", 1, signal.SIGKILL.value)
        os.setsid()
        os.close(parent_knows)
        os.close(child_knows)
        return
    os.close(child_knows)
    os.read(parent_knows, 1)  # until the child has its group
    children.append(child)
    for fd in (1, 2, result):  # the program's end is the end of these
        os.close(fd)
    if LINUX:
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # its number stays taken while its group is killed
        kill_children()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os._exit(code if code >= 0 else 128 - code)


# ---------------------------------------------------------------------------------------------------------------------
# Doors


def choose_uid(scratch, own_root):
    """The user to run as: for root one of its own if it can read the library, so that root's powers are gone."""
    if os.getuid() != 0:
        return os.getuid()
    os.setgroups([])
    for uid in (FIRST_UID + os.getpid(), 65534):
        try:
            os.chown(scratch, uid, uid)
            os.setegid(uid)
            os.seteuid(uid)
        except OSError:  # a container that has no such user
            continue
        reads = all(os.access(p, os.R_OK, effective_ids=True) for p in (os.__file__, scratch))
        os.seteuid(0)
        os.setegid(0)
        if own_root or reads:
            return uid
    os.chown(scratch, 0, 0)
    return 0


def limit(seconds, memory, uid, own_root):
    """rlimits: CPU a little over the wall time, the address space of the one process, and everything countable."""
    tasks = MAX_TASKS
    if LINUX and not own_root:  # the kernel counts all of the user's, inside or out
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                info = os.stat(f"/proc/{pid}/task")
                tasks += info.st_nlink - 2 if info.st_uid == uid else 0
            except OSError:  # gone
                pass
    limits = {"CPU": int(seconds) + 2, "NPROC": tasks, "FSIZE": MAX_FILE, "NOFILE": MAX_FDS, "STACK": MAX_STACK}
    limits |= {"CORE": 0, "MEMLOCK": 0, "MSGQUEUE": 0} | ({"AS": memory} if memory else {})
    for name, value in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}", None)
        if kind is None:
            continue
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(kind, (value, value))
        except (ValueError, OSError):  # macOS has no limit on memory
            if LINUX:
                raise


def drop_privileges(uid):
    if os.getuid() == 0 and uid != 0:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    no_capabilities = (ctypes.c_uint32 * 6)()
    call("capset", (ctypes.c_uint32 * 2)(0x20080522, 0), no_capabilities)
    call("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    call("prctl", 1, signal.SIGKILL.value)  # again, a change of user forgets it


def unshare():
    """Namespaces of one's own: mounts, uts, ipc, network, pids (of children); and users, which root can do without."""
    uid, gid = os.getuid(), os.getgid()
    flags = 0x00020000 | 0x04000000 | 0x08000000 | 0x40000000 | 0x20000000
    call("unshare", flags if uid == 0 else flags | 0x10000000)
    if uid != 0:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as f:
                f.write(text)


def mount(source, target, kind=None, flags=0, options=None):
    call("mount", *(s and s.encode() for s in (source, target, kind)), flags, options and options.encode())


def build_root(scratch, visible, uid):
    """A file system of the `visible` paths, all read-only, and an empty tmpfs at `scratch`. No /proc, no /sys."""
    private, bind, recursive, nosuid, nodev, noexec = 1 << 18, 1 << 12, 1 << 14, 2, 4, 8
    sources = {path: "/old" + os.path.realpath(path) for path in [*visible, *DEVICES]}
    mount(None, "/", None, private | recursive)
    mount("tmpfs", scratch, "tmpfs", nosuid | nodev, "size=1m,mode=755")
    os.mkdir(f"{scratch}/old")
    call("syscall", NUMBERS[MACHINE]["pivot_root"], scratch.encode(), f"{scratch}/old".encode())
    os.chdir("/")
    for path, source in sources.items():
        if os.path.exists(path):  # in a folder that is there already
            continue
        if os.path.isdir(source):
            os.makedirs(path)
        else:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            os.close(os.open(path, os.O_CREAT))
        mount(source, path, None, bind | recursive)
    call("umount2", b"/old", 2)  # MNT_DETACH
    os.rmdir("/old")
    os.makedirs(scratch)
    attributes = struct.pack("QQQQ", 1 | nosuid, 0, 0, 0)  # MOUNT_ATTR_RDONLY
    call("syscall", 442, -1, b"/", 0x8000, attributes, len(attributes))  # mount_setattr, AT_RECURSIVE
    mount("tmpfs", scratch, "tmpfs", nosuid | nodev | noexec, f"{MAX_SCRATCH},uid={uid}")


def landlock(scratch, visible):
    """Files: read the `visible`, write to `scratch`, nothing else. Also no TCP and no signals where the kernel can."""
    create, add_rule, restrict = 444, 445, 446
    abi = call("syscall", create, None, 0, 1)
    everything = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)) - 1
    execute, write, read, read_dir, special = 1, 2, 4, 8, 1 << 6 | 1 << 9 | 1 << 11 | 1 << 15  # devices, sockets, ioctl
    truncate = everything & 1 << 14
    rules = {path: execute | read | read_dir for path in visible}
    rules |= {path: read | write | truncate for path in DEVICES if os.path.exists(path)}
    rules[scratch] = everything & ~(execute | special)
    attributes = struct.pack("QQQ", everything, 3, 3)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    ruleset = call("syscall", create, attributes, len(attributes), 0)
    for path, access in rules.items():
        fd = os.open(path, os.O_PATH)
        access &= everything if os.path.isdir(path) else ~read_dir
        call("syscall", add_rule, ruleset, 1, struct.pack("=Qi", access, fd), 0)
        os.close(fd)
    call("syscall", restrict, ruleset, 0)
    os.close(ruleset)


def seccomp(own_root):
    """Only SYSCALLS, some of them only with harmless arguments; METADATA only with an own root."""
    thread, pid = 0x10000, os.getpid()  # CLONE_THREAD
    only_if = {  # arguments: (which, mask, value, whether it must or must not be that)
        "clone": [(0, 0x7E020080 | thread, thread, True)],  # a thread, in no new namespace
        "kill": [(0, 0xFFFFFFFF, pid, True)],
        "tgkill": [(0, 0xFFFFFFFF, pid, True)],
        "prlimit64": [(0, 0xFFFFFFFF, 0, True)],
        "socketpair": [(0, 0xFFFFFFFF, 1, True), (1, 0xF, 1, True)],  # AF_UNIX, SOCK_STREAM: a pipe, used by asyncio
        "fcntl": [(1, 0xFFFFFFFF, command, False) for command in (8, 10, 15)],  # F_SETOWN, F_SETSIG, F_SETOWN_EX
    }
    load, and_, equal, greater, end = 0x20, 0x54, 0x15, 0x25, 0x06
    allow, eperm, enosys, enotty = 0x7FFF0000, 0x50001, 0x50026, 0x50019  # SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO | ...
    machine = NUMBERS[MACHINE]
    code = [(load, 0, 0, 4), (equal, 1, 0, machine["audit"]), (end, 0, 0, eperm), (load, 0, 0, 0)]

    def when(number, *then):
        code.extend([(equal, 0, len(then), number), *then])

    for line in SYSCALLS.split(","):
        name, *numbers = line.split()
        number = numbers[list(NUMBERS).index(MACHINE)]
        if number == "-" or (name in METADATA and not own_root):
            continue
        checks = []
        for argument, mask, value, must in only_if.get(name, ()):
            checks += [(load, 0, 0, 16 + 8 * argument), (and_, 0, 0, mask)]  # the lower half, little-endian
            checks += [(equal, int(must), int(not must), value), (end, 0, 0, eperm)]
        when(int(number), *checks, (end, 0, 0, allow))
    when(machine["clone3"], (end, 0, 0, enosys))  # its flags lie in memory, out of the filter's sight
    when(machine["ioctl"], (load, 0, 0, 24), (equal, 0, 1, 0x5421), (end, 0, 0, allow), (end, 0, 0, enotty))  # FIONBIO
    code += [(greater, 0, 1, LAST_SYSCALL), (end, 0, 0, enosys), (end, 0, 0, eperm)]
    filters = b"".join(struct.pack("HBBI", *instruction) for instruction in code)
    buffer = ctypes.create_string_buffer(filters, len(filters))
    call("prctl", 22, 2, struct.pack("HxxxxxxQ", len(code), ctypes.addressof(buffer)))  # PR_SET_SECCOMP, filter


# ---------------------------------------------------------------------------------------------------------------------
# The program


def run(program, secret, result):
    """
    Run `program` as __main__ and write the nonce, secret[0], to the descriptor `result` if it ends without exception.

    While the program runs the nonce is on this frame's value stack and nowhere else: no name, container, frame, trace
    function or garbage collector leads there; leaving in any other way than by the end throws it away.
    """
    sys.argv = ["program.py"]
    sys.modules["__main__"] = main = types.ModuleType("__main__")
    write, leave = os.write, os._exit
    write(result, b"S")
    try:
        code = compile(program, "program.py", "exec", dont_inherit=True)
        write(result, (secret.pop(), exec(code, main.__dict__), join_threads())[0])
    except BaseException as e:
        report(e, write, result)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BaseException:
            pass
    leave(0)


def join_threads():
    """As at the end of every Python program, wait for the threads that are not daemons."""
    if "threading" in sys.modules:
        sys.modules["threading"]._shutdown()


def report(e, write, result):
    e.__traceback__ = e.__traceback__ and e.__traceback__.tb_next  # without this file's frame
    if isinstance(e, MemoryError):
        e.__traceback__ = None  # frees what filled the memory
        write(result, b"MemoryError")
        return
    try:
        text = f"{type(e).__name__}: {e}" if str(e) else type(e).__name__
    except BaseException:
        text = type(e).__name__
    write(result, text.encode("utf-8", "replace")[:1000])
    if not isinstance(e, SystemExit):
        sys.__excepthook__(type(e), e, e.__traceback__)


if __name__ == "__main__":
    main()
