"""
Several hosts: which ranks write files, files for hosts without a shared disk, signs of life, the reason of a failure.

Hosts may share a base directory or have separate ones. Of the ranks that share one, the first is its writer.
"""

import contextlib
import datetime
import gc
import json
import os
import re
import socket
import threading
import time
import uuid

from nanochat import common

BEAT_SECONDS = 2.0  # between two signs of life of a rank

_monitor = None  # of this process, while it is in a process group


def compute_init(device_type="", dtype="", seed=42, dist_timeout=10.0):
    """
    Seed torch, choose device and dtype, and under torchrun join the process group (NCCL on CUDA, else gloo).

    `dist_timeout`: minutes after which a silent rank or a hanging collective ends all ranks.
    """
    import torch

    device_type = common.choose_device(device_type)
    rank, local_rank, world_size, requested = common.dist_env()
    on_gpu = device_type == "cuda"
    common.require(0 <= seed < 2**63, f"--seed={seed}: expected a whole number of at least 0, with at most 63 bits")
    torch.manual_seed(seed)
    if on_gpu:
        problem = f"{requested} GPUs requested, {torch.cuda.device_count()} available"
        common.require(local_rank < torch.cuda.device_count(), f"{problem}; lower --nproc_per_node or --num_gpus")
        torch.set_float32_matmul_precision("high")  # tf32
        torch.cuda.set_device(local_rank)
    else:
        common.keep_freed_memory()
    device, writers = torch.device(device_type, local_rank if on_gpu else None), None
    if world_size > 1:
        backend, gpu = ("nccl", device) if on_gpu else ("gloo", None)
        timeout = datetime.timedelta(minutes=dist_timeout)
        common.choose_interface()
        store, start = join_store(*common.store_address(), rank, world_size, timeout)
        settings = dict(store=store, rank=rank, world_size=world_size, timeout=timeout, device_id=gpu)
        torch.distributed.init_process_group(backend, **settings)
        global _monitor
        _monitor = Monitor(store, start, rank, local_rank, world_size, timeout.total_seconds())
        common.writes_files, writers = find_writers(rank)
    return common.Compute(device, common.choose_dtype(device_type, dtype), rank, world_size, writers=writers)


def compute_cleanup():
    """Leave the process group: free tensors, wait at a barrier, destroy the group. Other orders may abort."""
    if _monitor:
        import torch.distributed as dist

        gc.collect()  # gloo on torch 2.15 may abort at exit while tensors of a collective are alive
        dist.barrier()
        _monitor.stopped.set()
        dist.destroy_process_group()


def find_writers(rank):
    """
    (whether this rank is a writer, process group of all writers or None if there is only one).

    Collective.
    """
    import torch.distributed as dist

    marker = common.base_dir() / f".rank{rank}.{uuid.uuid4().hex}"
    with common.write_errors(marker):
        marker.touch()
    names, writers = ([None] * dist.get_world_size() for _ in range(2))
    dist.all_gather_object(names, marker.name)
    dist.all_gather_object(writers, next(r for r, name in enumerate(names) if (marker.parent / name).exists()))
    marker.unlink()  # all ranks have looked
    group = dist.new_group(sorted(set(writers)), backend="gloo") if len(set(writers)) > 1 else None
    return writers[rank] == rank, group


def join_store(address, is_master, rank, world_size, timeout):
    """
    (store of this start of the ranks, number of the start). Waits for all ranks.

    torchrun's store outlives the ranks that it restarts (--max-restarts), and process groups would find the addresses
    of their predecessors in it. Therefore rank 0 gives each rank that reports to it the prefix of the new keys.
    """
    import torch.distributed as dist

    store = dist.TCPStore(*address, is_master=is_master, wait_for_workers=False, timeout=timeout)
    if rank:
        ticket = uuid.uuid4().hex
        store.set(f"nanochat/waiting/{rank}", ticket)
        start = int(store.get(f"nanochat/start_of/{ticket}"))
        store.add(f"nanochat/{start}/joined", 1)
    else:
        start, end = store.add("nanochat/starts", 1), time.monotonic() + timeout.total_seconds()
        while store.add(f"nanochat/{start}/joined", 0) < world_size - 1:
            for other in range(1, world_size):
                if store.check([f"nanochat/waiting/{other}"]):  # perhaps by a predecessor, which does no harm
                    ticket = store.get(f"nanochat/waiting/{other}").decode()
                    store.set(f"nanochat/start_of/{ticket}", str(start))
            common.require(time.monotonic() < end, f"not all of {world_size} ranks have started in time")
            time.sleep(0.1)
    return dist.PrefixStore(f"nanochat/{start}", store), start


# ---------------------------------------------------------------------------------------------------------------------
# Files


def exchange_files(folder, group):
    """Copy to `folder` the files that only other writers have in theirs. Collective over the writers, `group`."""
    import torch.distributed as dist

    ranks, own = dist.get_process_group_ranks(group), {path.name for path in folder.iterdir()}
    dist.all_gather_object(listings := [None] * len(ranks), own, group=group)
    errors = []
    for name in sorted(set().union(*listings)):
        owners = [rank for rank, names in zip(ranks, listings, strict=True) if name in names]
        if len(owners) < len(ranks):
            needed = name not in own or owners[0] == dist.get_rank()
            errors += _broadcast_file(folder / name if needed else os.devnull, owners[0], group)
    if errors:
        raise errors[0]


def _broadcast_file(path, source, group):
    """Rank `source` sends its file `path` in parts, the others write theirs. Returns errors: all parts are awaited."""
    import torch.distributed as dist

    errors, sends, part = [], dist.get_rank() == source, [b"-"]

    def attempt(action):
        try:
            return None if errors else action()
        except OSError as e:
            errors.append(e)

    file = attempt(lambda: open(path, "rb" if sends else "wb"))
    while part[0]:  # an empty part ends the file
        part = [sends and attempt(lambda: file.read(64 * 2**20)) or b""]
        dist.broadcast_object_list(part, source, group=group)
        if not sends:
            attempt(lambda part=part: file.write(part[0]))
    if file:
        attempt(file.close)
    return errors


# ---------------------------------------------------------------------------------------------------------------------
# Failures


class Monitor(threading.Thread):
    """
    Ends this process with one line when a rank has failed, or has given no sign of life for `timeout` seconds.

    Each rank counts up a key of the store, in a thread, even while its main thread waits in a collective. The first
    rank of each host reads the counts.
    """

    def __init__(self, store, start_number, rank, local_rank, world_size, timeout):
        super().__init__(daemon=True, name="monitor")
        self.rank, self.world_size, self.timeout, self.watches = rank, world_size, timeout, local_rank == 0
        self.start_number, self.host, self.stopped = start_number, socket.gethostname(), threading.Event()
        self.store = store.clone()  # a connection of its own: others wait in theirs
        self.store.set_timeout(datetime.timedelta(seconds=10 * BEAT_SECONDS))
        self.store.set(f"host/{rank}", self.host)
        self.start()

    def get(self, key):
        """The value of a key, None if it is not set; store.get() would wait for it."""
        return self.store.get(key).decode() if self.store.check([key]) else None

    def run(self):
        counts, changed, contact = {}, {}, time.monotonic()
        while not self.stopped.wait(BEAT_SECONDS):
            now = time.monotonic()
            try:
                self.store.add(f"count/{self.rank}", 1)
                if failure := self.get("failure"):
                    self.end(**json.loads(failure))
                for rank in range(self.world_size) if self.watches else ():
                    if counts.get(rank) != (count := self.store.add(f"count/{rank}", 0)):
                        counts[rank], changed[rank] = count, now
                contact = now
            except RuntimeError:  # the store's host is gone, or slow
                if now - contact > self.timeout:
                    (host, _), _ = common.store_address()
                    self.end(f"no contact with {host}, the host of rank 0, for {self.timeout:.0f} s")
                continue
            if silent := [rank for rank, time_of_change in changed.items() if now - time_of_change > self.timeout]:
                names = ", ".join(f"{rank} ({self.get(f'host/{rank}')})" for rank in silent)
                self.end(f"no sign of life from rank {names} for {self.timeout:.0f} s")

    def end(self, message, host=None):
        """Exit with `message`; if a rank of this host has printed it, wait for torchrun to stop this one."""
        if host == self.host:
            self.stopped.set()
            return time.sleep(60)
        common.print_error(f"{message}; the same command with --resume continues from the newest checkpoint")
        os._exit(2)


def announce(message):
    """Tell all ranks why this one is about to end; only the first of several messages counts."""
    if _monitor:
        text = {"message": f"rank {_monitor.rank} on {_monitor.host} failed: {message}", "host": _monitor.host}
        with contextlib.suppress(RuntimeError):
            _monitor.store.compare_set("failure", "", json.dumps(text))


def has_failed():
    """Whether a rank has announced its failure."""
    try:
        return bool(_monitor and _monitor.get("failure"))
    except RuntimeError:
        return True  # the store is gone


def explain(error):
    """Why a collective failed, if `error` comes from one, else None. If the monitor knows the reason, it exits."""
    pattern = "gloo|nccl|connection (closed|reset|refused)|timed out|timeout|broken pipe"
    if not _monitor or not isinstance(error, RuntimeError) or not re.search(pattern, str(error), re.IGNORECASE):
        return None
    _monitor.watches, _monitor.timeout = True, min(_monitor.timeout, 5 * BEAT_SECONDS)
    time.sleep(10 * BEAT_SECONDS)
    return f"a collective operation failed, though all ranks give signs of life ({str(error).splitlines()[0]})"


def has_restarted():
    """Whether torchrun has restarted this rank, as far as it can know: another host may have been restarted alone."""
    return bool(_monitor) and (_monitor.start_number > 1 or common.torchrun_job()[1] > 0)
