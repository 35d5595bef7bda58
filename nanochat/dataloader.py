"""
Documents -> batches of tokens, the same batches on any number of processes and after any number of restarts.

The global batch has one lane per row. A source numbers its documents in blocks; every epoch puts the blocks in a
seeded order, and block u of that order belongs to lane u mod lanes. A lane reads its blocks one after the other and
cuts them into rows, so its whole position is three integers: epoch, block, and tokens (or packed rows) used of it.
Ranks own equal runs of lanes. Reading and tokenizing run ahead of training on a background thread.
"""

import bisect
import functools
import queue
import threading
from dataclasses import dataclass

import numpy as np
import torch

from nanochat.common import UserError
from nanochat.dataset import read_row_group

BLOCK_DOCS = 128  # documents per block, fewer when the data is small, so that every lane has some
CACHED_ROW_GROUPS = 32  # decoded and kept: lanes advance together, so their blocks lie close to each other
PACKINGS = ("stream", "bos")


@dataclass
class Batch:
    """What one optimizer step trains on, on this rank."""

    micro_batches: (
        list  # of (inputs, targets), each (rows, T) on the device; int32 ids and int64 ids, -1 = not trained on
    )
    progress: float  # epochs' worth of blocks begun by this rank's lanes, 0 at the start
    state: dict  # lane -> [epoch, block, used]; resumes this rank's lanes right after this batch


class ShardSource:
    """The documents of parquet shards, tokenized with a leading bos. Block: up to 128 neighbours of one row group."""

    def __init__(self, row_groups, tokenizer, lanes, seed=42, threads=4):
        """`row_groups`: (path, index in the file, number of documents), as dataset.row_groups() lists them."""
        self.tokenizer, self.seed, self.threads = tokenizer, seed, threads
        docs = sum(rows for _, _, rows in row_groups)
        if not docs:
            raise UserError("the shards hold no documents; make them anew with `python -m nanochat.dataset`")
        size = min(BLOCK_DOCS, max(1, docs // (4 * lanes)))
        self.groups = [
            [(path, i, lo, min(lo + size, rows)) for lo in range(0, rows, size)] for path, i, rows in row_groups
        ]
        self.num_blocks = sum(map(len, self.groups))
        self.order = functools.lru_cache(maxsize=4)(self.order)
        self.row_group = functools.lru_cache(maxsize=CACHED_ROW_GROUPS)(read_row_group)

    def in_file_order(self):
        return [block for group in self.groups for block in group]

    def order(self, epoch):
        """The blocks in this epoch's order: row groups shuffled, the blocks of one kept together."""
        shuffled = np.random.default_rng((self.seed, epoch)).permutation(len(self.groups))
        return [block for g in shuffled for block in self.groups[g]]

    def read(self, block):
        """Token ids of the block's documents, one list each; and the same again: every token is a target."""
        path, group, lo, hi = block
        texts = self.row_group(path, group)[lo:hi]
        bos = self.tokenizer.get_bos_token_id()
        docs = self.tokenizer.encode(texts, prepend=bos, num_threads=self.threads)
        return docs, docs


class TaskSource:
    """The conversations of a Task, rendered; with `use_mask` only what the assistant says is trained on."""

    BLOCK = 16

    def __init__(self, task, tokenizer, max_tokens, lanes, seed=42, use_mask=False):
        self.task, self.tokenizer, self.max_tokens, self.seed = task, tokenizer, max_tokens, seed
        self.use_mask = use_mask
        size = min(self.BLOCK, max(1, len(task) // (4 * lanes)))
        self.blocks = [range(lo, min(lo + size, len(task))) for lo in range(0, len(task), size)]
        self.num_blocks = len(self.blocks)
        self.order = functools.lru_cache(maxsize=4)(self.order)

    def in_file_order(self):
        return self.blocks

    def order(self, epoch):
        return [self.blocks[b] for b in np.random.default_rng((self.seed, epoch)).permutation(self.num_blocks)]

    def read(self, block):
        """Token ids of the block's conversations, one list each; and as targets, -1 = not trained on."""
        rendered = [self.tokenizer.render_conversation(self.task[i], self.max_tokens) for i in block]
        tokens = [ids for ids, _ in rendered]
        return tokens, [np.where(mask, ids, -1) for ids, mask in rendered] if self.use_mask else tokens


class Lane:
    """One endless sequence of rows of T + 1 tokens (inputs and, one to the right, targets)."""

    def __init__(self, source, lane, lanes, T, packing, state):
        self.source, self.lane, self.lanes, self.T, self.packing = source, lane, lanes, T, packing
        self.epoch, self.block, self.used = state or (0, 0, 0)
        self.data = None  # the block's tokens, or its packed rows: (tokens, targets)

    def blocks(self, epoch):
        """This lane's share of an epoch; where there are fewer blocks than lanes, lanes share them, shifted."""
        order = self.source.order(epoch)
        return order[self.lane :: self.lanes] or [order[(self.lane + epoch) % len(order)]]

    def state(self):
        return [self.epoch, self.block, self.used]

    def progress(self):
        """Epochs begun, as a fraction: 2.5 is half-way through the third."""
        return self.epoch + self.block / len(self.blocks(self.epoch))

    def _load(self):
        tokens, targets = self.source.read(self.blocks(self.epoch)[self.block])
        if self.packing == "bos":
            self.data = pack_best_fit(tokens, targets, self.T)
        else:
            self.data = _concatenate(tokens), _concatenate(targets)

    def _advance(self):
        self.block, self.used, self.data = self.block + 1, 0, None
        if self.block == len(self.blocks(self.epoch)):
            self.epoch, self.block = self.epoch + 1, 0

    def next_row(self):
        """Inputs and targets, each (T,) int32."""
        return self._next_packed() if self.packing == "bos" else self._next_streamed()

    def _next_packed(self):
        while True:
            if self.data is None:
                self._load()
            if self.used < len(self.data[0]):
                row = self.data[0][self.used, :-1], self.data[1][self.used, 1:]
                self.used += 1
                return row
            self._advance()

    def _next_streamed(self):
        """Rows follow each other in the token stream; the last target of one is the first input of the next."""
        parts, missing = [], self.T + 1
        while missing:
            if self.data is None:
                self._load()
            tokens, targets = (d[self.used : self.used + missing] for d in self.data)
            parts.append((tokens, targets))
            missing -= len(tokens)
            # the row's last token starts the next row: it stays unused, unless it is the last of its block, where
            # it would have to be read again from a block that is done with; there the next row starts one later
            self.used += len(tokens) if missing or self.used + len(tokens) == len(self.data[0]) else len(tokens) - 1
            if self.used == len(self.data[0]):
                self._advance()
        tokens, targets = (np.concatenate(p) for p in zip(*parts, strict=True))
        return tokens[:-1], targets[1:]


def _concatenate(docs):
    return np.concatenate([np.asarray(d, dtype=np.int32) for d in docs])


def pack_best_fit(docs, targets, T):
    """
    Rows (N, T + 1) of whole documents, each row starting at one: always the longest document that still fits; when
    none fits, the shortest is cropped to fill the row and its rest dropped. The last row is padded (targets -1).
    """
    waiting = sorted((len(d), i) for i, d in enumerate(docs))
    rows, row_targets = [], []
    while waiting:
        row, row_target = [], []
        while waiting and len(row) <= T:
            room = T + 1 - len(row)
            fits = bisect.bisect_right(waiting, (room, len(docs)))
            _, i = waiting.pop(fits - 1 if fits else 0)
            row.extend(docs[i][:room])
            row_target.extend(targets[i][:room])
        pad = T + 1 - len(row)
        rows.append(row + [row[0]] * pad)
        row_targets.append(row_target + [-1] * pad)
    return np.array(rows, dtype=np.int32), np.array(row_targets, dtype=np.int32)


def lane_batches(source, rows, T, device_batch_size, compute, packing="stream", states=None):
    """
    Endless Batches on CPU: this rank's share of the rows x T tokens of each step, `device_batch_size` rows at a time.

    `states`: lane -> [epoch, block, used] of all lanes, to go on exactly where a run was. Raises UserError when these
    are of another number of lanes.
    """
    own = rows // compute.world_size
    assert own * compute.world_size == rows and own % device_batch_size == 0
    if states and len(states) != rows:
        raise UserError(f"the checkpoint's data has {len(states)} lanes, this run {rows} rows a step; keep both equal")
    first = compute.rank * own
    lanes = [Lane(source, n, rows, T, packing, states and states[str(n)]) for n in range(first, first + own)]
    while True:
        x, y = (torch.from_numpy(np.stack(half)) for half in zip(*(lane.next_row() for lane in lanes), strict=True))
        micro_batches = list(zip(x.split(device_batch_size), y.long().split(device_batch_size), strict=True))
        progress = sum(lane.progress() for lane in lanes) / own
        yield Batch(micro_batches, progress, {str(lane.lane): lane.state() for lane in lanes})


def conversation_batches(task, tokenizer, rows, T, device_batch_size, compute, seed=42, states=None):
    """
    Endless Batches on CPU of one conversation per row, cut at T tokens; only what the assistant says is trained on.

    Each epoch is a seeded order of `task`. A step's rows come by length, padded to the longest of their micro-batch.
    """
    own = rows // compute.world_size
    pad = tokenizer.encode_special("<|assistant_end|>")
    taken = states["examples"] if states else 0
    while True:
        first = taken + compute.rank * own
        rendered = [
            tokenizer.render_conversation(task[_shuffled(seed, n // len(task), len(task))[n % len(task)]], T + 1)
            for n in range(first, first + own)
        ]
        rendered.sort(key=lambda row: len(row[0]))
        micro_batches = []
        for first in range(0, own, device_batch_size):
            part = rendered[first : first + device_batch_size]
            width = max(2, len(part[-1][0]))
            x = torch.full((len(part), width), pad, dtype=torch.int32)
            y = torch.full((len(part), width), -1)
            for i, (ids, mask) in enumerate(part):
                x[i, : len(ids)] = torch.tensor(ids)
                y[i, : len(ids)] = torch.tensor(ids).where(torch.tensor(mask) > 0, -1)
            micro_batches.append((x[:, :-1].contiguous(), y[:, 1:].contiguous()))
        taken += rows
        yield Batch(micro_batches, taken / len(task), {"examples": taken})


@functools.lru_cache(maxsize=2)
def _shuffled(seed, epoch, n):
    return np.random.default_rng((seed, epoch)).permutation(n).tolist()


class Prefetch:
    """Iterator over `batches` that makes the next ones on a background thread and hands them over on the device."""

    def __init__(self, batches, device, ahead=2):
        self.device, self.state = device, {}  # state: resumes after the last batch that was handed over
        self.ready, self.stopped = queue.Queue(maxsize=ahead), threading.Event()
        self.thread = threading.Thread(target=self._produce, args=(batches,), daemon=True, name="dataloader")
        self.thread.start()

    def _produce(self, batches):
        try:
            for batch in batches:
                if self.device.type == "cuda":
                    batch.micro_batches = [(x.pin_memory(), y.pin_memory()) for x, y in batch.micro_batches]
                if not self._put(batch):
                    return
        except BaseException as e:  # handed to the training thread, which raises it
            self._put(e)

    def _put(self, item):
        while not self.stopped.is_set():
            try:
                self.ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                pass
        return False

    def __iter__(self):
        return self

    def __next__(self):
        batch = self.ready.get()
        if isinstance(batch, BaseException):
            raise batch
        to = functools.partial(torch.Tensor.to, device=self.device, non_blocking=True)
        batch.micro_batches = [(to(x), to(y)) for x, y in batch.micro_batches]
        self.state = batch.state
        return batch

    def close(self):
        """Stop reading ahead."""
        self.stopped.set()
        self.thread.join()


def eval_batches(source, rows, T, steps, compute):
    """
    The first steps x rows x T tokens of a source in its natural order, as this rank's list of (inputs, targets) on CPU.

    Rows are cut from one stream, as the reference does, whatever the world size; ranks take equal runs of rows.
    """
    own = rows // compute.world_size
    tokens, targets, have = [], [], 0
    for block in source.in_file_order():
        for stream, docs in zip((tokens, targets), source.read(block), strict=True):
            stream.extend(docs)
        have = sum(map(len, tokens))
        if have > steps * rows * T:
            break
    whole = min(steps, (have - 1) // (rows * T))  # small data: as many steps as there are
    if not whole:
        raise UserError(f"the evaluation data has {have:,} tokens, one step needs {rows * T:,}; use fewer rows")
    n = whole * rows * T
    x = torch.from_numpy(_concatenate(tokens)[:n].reshape(whole, rows, T))
    y = torch.from_numpy(_concatenate(targets)[1 : n + 1].reshape(whole, rows, T)).long()
    mine = slice(compute.rank * own, (compute.rank + 1) * own)
    return list(zip(x[:, mine], y[:, mine], strict=True))
