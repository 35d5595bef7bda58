"""
What every module shares: base directory, device and dtype, process group, rank-0 printing, atomic files, downloads.

Only this module reads environment variables; the README lists them.
"""

import contextlib
import ctypes
import errno
import hashlib
import itertools
import json
import math
import netrc
import os
import shutil
import socket
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

writes_files = None  # whether this rank writes files, once cluster.compute_init() has found out

# Of the checkpoints of each stage
FOLDERS = dict(base="base_checkpoints", mid="mid_checkpoints", sft="chatsft_checkpoints", rl="chatrl_checkpoints")

# Public hosts, each replaceable by a mirror: another URL, or a folder on this machine.
HOSTS = {"hub": "https://huggingface.co/datasets"}  # <base>/<organisation>/<dataset>/resolve/main/<file>
HOSTS |= {"bucket": "https://karpathy-public.s3.us-west-2.amazonaws.com"}  # <base>/<file>
HOSTS |= {"github": "https://raw.githubusercontent.com"}  # <base>/<owner>/<repository>/refs/heads/<branch>/<file>
ENVIRONMENT_HINT = "`bash -c '. dev/setup.sh; set_up'` makes or updates .venv, `source .venv/bin/activate` uses it"


class UserError(ValueError):
    """A mistake the user can correct (flag, file, environment). The message is one line that says what to do."""


def require(condition, message):
    """Raises UserError(message) unless `condition` holds."""
    if not condition:
        raise UserError(message)


@contextlib.contextmanager
def task_errors(name):
    """Context manager that raises any error of a task as a UserError with the task's name."""
    try:
        yield
    except (Exception, SystemExit) as e:
        kind = "" if isinstance(e, UserError) else f"{type(e).__name__}: "
        raise UserError(f"task {name}: {kind}{' '.join(str(e).split())}") from e


@contextlib.contextmanager
def read_errors(path, problem, hint=""):
    """Context manager that raises errors of reading `path` as UserError "<path> <problem> (<error>)[; <hint>]"."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError) as e:  # pyarrow's errors are ValueErrors
        raise UserError(f"{path} {problem} ({str(e).splitlines()[0].rstrip('.')}){hint and '; ' + hint}") from e


def base_dir():
    """Folder of all outputs: NANOCHAT_BASE_DIR, by default ~/.cache/nanochat. Created if missing."""
    path = Path(os.environ.get("NANOCHAT_BASE_DIR") or Path.home() / ".cache" / "nanochat").expanduser()
    with read_errors(path, "cannot be created", "point NANOCHAT_BASE_DIR at a folder you can write to"):
        path.mkdir(parents=True, exist_ok=True)
    return path


get_base_dir = base_dir  # the reference's name


def mirror_url(host):
    """The base URL (or folder) of `host`, a key of HOSTS; NANOCHAT_<HOST>_URL replaces it."""
    return os.path.expanduser(os.environ.get(f"NANOCHAT_{host.upper()}_URL") or HOSTS[host]).rstrip("/")


def server_api_key():
    """Default of chat_web --api_key; None = no authentication."""
    return os.environ.get("NANOCHAT_API_KEY") or None


def has_wandb_login():
    """Whether wandb has an API key."""
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        return bool(os.environ.get("WANDB_API_KEY") or netrc.netrc().authenticators("api.wandb.ai"))
    return False


def no_color():
    """Whether terminal output should have no colors and other control sequences (no-color.org)."""
    return bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"


def load_extension():
    """The module rustbpe. Raises UserError if it is not built; Python may then import the folder of its sources."""
    try:
        import rustbpe

        rustbpe.Tokenizer  # noqa: B018
    except (ImportError, AttributeError) as e:
        raise UserError(f"the extension rustbpe is not built ({e}); {ENVIRONMENT_HINT}") from None
    return rustbpe


# ---------------------------------------------------------------------------------------------------------------------
# Device, dtype, process group


@dataclass(frozen=True)
class Compute:
    """Device, precision and rank: decided once per process and passed down."""

    # torch is imported inside functions, so that --help is instant.
    device: "torch.device"  # noqa: F821
    # Dtype of activations and matmuls; master weights are float32.
    dtype: "torch.dtype"  # noqa: F821
    rank: int = 0
    world_size: int = 1
    group: object = None  # process group of the collectives; None = the default one
    writers: object = None  # process group of the writers (see cluster.py) if there are several, else None
    writes: bool = field(default_factory=lambda: is_writer())  # whether this rank is a writer

    def autocast(self):
        """Autocast context for `dtype`; a no-op for float32."""
        import torch

        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def all_gather(self, value):
        """List of all ranks' `value`s in rank order, on every rank; `value` is any picklable object."""
        import torch.distributed as dist

        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value, group=self.group)
        return values

    def all_reduce(self, tensor):
        """Sum `tensor` over all ranks, in place, and return it."""
        import torch.distributed as dist

        if self.world_size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def synchronize(self):
        """Wait for the device to finish, so that timings are correct."""
        import torch

        if self.device.type != "cpu":
            torch.accelerator.synchronize()


def dist_env():
    """(rank, local rank, number of ranks, of local ranks) from torchrun's environment; (0, 0, 1, 1) without it."""
    defaults = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}
    return tuple(int(os.environ.get(name, default)) for name, default in defaults.items())


def torchrun_job():
    """(id of torchrun's job, which its restarts of ranks do not change; number of restarts of this rank)."""
    job = os.environ.get("TORCHELASTIC_RUN_ID", "none")  # --rdzv_id
    job = f"process {os.getppid()} of {socket.gethostname()}" if job == "none" else job
    return job, int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def store_address():
    """((host, port) of torchrun's store, whether this rank has to start it)."""
    is_master = is_rank0() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    return (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), is_master


def choose_interface():
    """Let gloo use the network interface towards rank 0's host; by default it takes that of this host's name."""
    import psutil

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s, contextlib.suppress(OSError):
        s.connect(store_address()[0])  # sends nothing
        own = s.getsockname()[0]  # a host's name often has a loopback address
        for name, addresses in psutil.net_if_addrs().items():
            if own in (address.address for address in addresses):
                os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def is_rank0():
    return dist_env()[0] == 0


def is_writer():
    """Whether this rank writes the files of its base directory: the first rank of those that share it."""
    return is_rank0() if writes_files is None else writes_files


def print_error(message):
    """Print "error: <message>" on standard error; if several ranks of a host have the same message, only once."""
    # torchrun stops the other ranks when one has failed, so it need not be rank 0 that prints.
    if not record_error(message, f"error: {message}"):
        print(f"error: {message}", file=sys.stderr, flush=True)


def record_error(message, text):
    """Let torchrun's report end with `text`. Returns whether another rank of this host has done so."""
    if error_file := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # <folder of this run>/<local rank>/error.json
        report = {"message": message, "extraInfo": {"py_callstack": text, "timestamp": int(time.time())}}
        digest = hashlib.sha256(message.encode("utf-8", "replace")).hexdigest()
        with contextlib.suppress(OSError):  # the disk is full, for example
            Path(error_file).write_text(json.dumps({"message": report}), encoding="utf-8")
            try:
                (Path(error_file).parents[1] / digest).touch(exist_ok=False)
            except FileExistsError:
                return True
    return False


def print0(*args, **kwargs):
    """print() on rank 0 only, flushed."""
    if is_rank0():
        print(*args, **kwargs, flush=True)


def choose_device(device_type=""):
    """`device_type`, or if empty the first available of cuda, mps, cpu. Raises UserError if it is not available."""
    import torch

    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    given = f"--device_type={device_type}"
    require(device_type in ("", *available), f"{given}: choose one of {', '.join(available)}")
    require(available.get(device_type, True), f"{given}: not available here; leave the flag out to detect a device")
    return device_type or next(d for d, usable in available.items() if usable)


autodetect_device_type = choose_device  # the reference's name


def choose_dtype(device_type, dtype=""):
    """torch dtype for `dtype` ("float32" or "bfloat16"); if empty, bfloat16 where the hardware supports it natively."""
    import torch

    dtype = dtype or os.environ.get("NANOCHAT_DTYPE", "")
    require(dtype in ("", "float32", "bfloat16"), f"--dtype={dtype}: choose float32 or bfloat16")
    if dtype:
        return getattr(torch, dtype)
    native = device_type == "cuda" and torch.cuda.get_device_capability() >= (8, 0)
    # Zen 5 (AVX512-BF16), 2026-11: bfloat16 matmuls are 4 times as fast as float32
    features = torch.cpu.get_capabilities() if device_type == "cpu" else {}
    return torch.bfloat16 if native or features.get("avx512_bf16") or features.get("amx_bf16") else torch.float32


def set_library_defaults():
    """Set environment variables that libraries read when they are loaded, unless the user has set them."""
    # OpenMP threads that wait for others sleep after a short spin. By default they spin for milliseconds, and with
    # another busy process on the machine they keep the core from the thread that they wait for.
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # stack traces about lost connections; we print one line
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # less fragmentation of a GPU's memory


def keep_freed_memory():
    """Let glibc reuse freed blocks of up to 8 MiB. Otherwise the system takes them back, and zeroes each new one."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 8 << 20)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


# ---------------------------------------------------------------------------------------------------------------------
# Files


# A full disk, a quota, missing permissions, too many open files: causes of a failed write that the user can remove.
DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}
WRITE_ERRNOS = DENIED | {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EMFILE, errno.ENFILE}


@contextlib.contextmanager
def write_errors(path, hint="or set NANOCHAT_BASE_DIR to another folder"):
    """Context manager that raises a failed write to `path` as a UserError; `hint` ends its message."""
    try:
        yield
    except Exception as e:
        number = getattr(e, "errno", None)
        # torch.save (inline_container.cc) and safetensors report a full disk without an error number.
        if number not in WRITE_ERRNOS and "inline_container" not in str(e) and "I/O error" not in str(e):
            raise
        folder = next(p for p in Path(path).absolute().parents if p.is_dir())
        room = f"make room in {folder} ({shutil.disk_usage(folder).free / 1e6:,.1f} MB free)"
        remedy = "make it writable" if number in DENIED else room
        reason = getattr(e, "strerror", None) or "the disk is full or failing"
        raise UserError(f"cannot write {path}: {reason}; {remedy}, {hint}") from e


def sync(path):
    """Wait until a file or folder is on disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def atomic_path(path):
    """
    Context manager of a temporary path. If the block succeeds, the file is synced to disk and renamed to `path`.

    Otherwise it is deleted. Raises UserError if the disk is full or not writable.
    """
    path = Path(path)
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield draft
            sync(draft)
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)


def set_aside(path, content):
    """Rename a folder that holds `content` to <path>.old1, .old2, ..., and say so."""
    n = next(n for n in itertools.count(1) if not path.with_name(f"{path.name}.old{n}").exists())
    path.rename(path.with_name(f"{path.name}.old{n}"))
    print0(f"{path} held {content}, renamed to {path.name}.old{n}")


def check_file(flag, path):
    """Raises UserError if `path`, the value of `flag` or None, is a folder or a device, or if its folder is missing."""
    if path:
        require(Path(path).absolute().parent.is_dir(), f"{flag}={path}: no such folder")
        require(Path(path).is_file() or not Path(path).exists(), f"{flag}={path} is not an ordinary file")


def write_text(path, text):
    """Write a UTF-8 file atomically; returns its path."""
    with atomic_path(path) as draft:
        draft.write_text(text, encoding="utf-8")
    return path


def write_jsonl(path, records):
    """Write `records` as JSON, one per line, atomically."""
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def fetch(url, path, attempts=5, timeout=30, progress=None, check=lambda draft: None):
    """
    Download `url` (http, https, or a local path) to `path`, atomically.

    An interrupted download is resumed (HTTP Range) after waits of 2, 4, 8, 16 seconds. Partial data stays in
    `<path>.part`, so a later call resumes too. `progress(bytes_so_far, bytes_total)` is called during the download.
    A complete file is kept only if it is no error page and `check(its temporary path)` raises no UserError.
    Raises UserError if the file does not exist, cannot be fetched or is refused.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if "://" not in str(url):
        require(Path(url).is_file(), f"no file at {url}")
        url = Path(url).absolute().as_uri()
    part = path.with_name(path.name + ".part")
    repeat(lambda: _fetch_part(url, part, timeout, progress), url, attempts)
    _check_fetched(url, part, check)
    os.replace(part, path)


def repeat(attempt, url, attempts=5):
    """The result of attempt(), a request to `url`, repeated if it fails. Raises UserError if it has failed for good."""
    import http.client

    for n in range(1, attempts + 1):
        try:
            return attempt()
        except (OSError, http.client.HTTPException) as e:  # URLError, HTTPError, timeout, reset, short body
            error, status = e, getattr(e, "code", 500)
            if status < 500 and status != 429:
                raise UserError(f"{url}: the host answered {status} {e.reason}") from e
        if n < attempts:
            time.sleep(2**n)
    raise UserError(f"cannot fetch {url} after {attempts} attempts ({error}); check the network or the mirror's URL")


def _fetch_part(url, part, timeout, progress, chunk=1 << 20):
    """One attempt of fetch(): append the missing bytes to `part`. Raises OSError if the connection ends early."""
    import urllib.request

    received = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={received}-"} if received else {})
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except OSError as e:
        if getattr(e, "code", None) != 416:
            raise
        part.unlink()  # the file on the host has changed
        raise OSError("no such range of bytes") from e
    with response:
        received = received if response.status == 206 else 0  # the host ignored the range: it sends the whole file
        length = response.headers.get("Content-Length")
        total = received + int(length) if length else None
        with write_errors(part), open(part, "ab" if received else "wb") as f:
            while block := response.read(chunk):
                f.write(block)
                received += len(block)
                if progress:
                    progress(received, total)
            f.flush()
            os.fsync(f.fileno())
    if total is not None and received < total:
        raise OSError(f"connection closed after {received:,} of {total:,} bytes")


def _check_fetched(url, draft, check):
    """Delete `draft` and raise UserError if it is an error page instead of the file at `url`, or check(draft) fails."""
    with open(draft, "rb") as f:
        head = f.read(200).lstrip().lower()
    kinds = {b"<": "a web page, perhaps a login page of your network", b"version https://git-lfs": "a Git LFS pointer"}
    kinds[b'{"error'] = "an error message: " + " ".join(head.decode(errors="replace").split())
    kind = next((kinds[start] for start in kinds if head.startswith(start)), None if head else "an empty file")
    try:
        require(not kind, f"the answer is {kind}")
        check(draft)
    except UserError as e:
        draft.unlink()
        problem = str(e).replace(str(draft), "the file")
        raise UserError(f"{url}: {problem}; nothing was kept: open the address in a browser, then try again") from e


def file_fingerprint(path):
    """{"bytes": size, "sha256": hex digest} of a file."""
    sha256 = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            sha256.update(block)
    return {"bytes": Path(path).stat().st_size, "sha256": sha256.hexdigest()}


# ---------------------------------------------------------------------------------------------------------------------
# Text


def well_formed(text):
    """`text` with lone surrogates, which cannot be encoded, replaced by "?"."""
    return text.encode("utf-8", "replace").decode()


def format_duration(seconds):
    """7 -> "7s", 65 -> "1m05s", 3700 -> "1h01m", infinite -> "?"."""
    if not math.isfinite(seconds):
        return "?"
    minutes, s = divmod(int(seconds + 0.5), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}h{m:02d}m" if hours else f"{m}m{s:02d}s" if m else f"{s}s"
