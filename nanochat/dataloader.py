"""
Documents to batches of token ids. The batches do not depend on the number of processes or on restarts.

The global batch has one lane per row. A source groups its documents into blocks. Every epoch has a seeded order of the
blocks, and the n-th block belongs to lane n mod (number of lanes). A lane reads its blocks in turn and cuts them into
rows, so its position is three integers: epoch, block, and the tokens (or packed rows) used of that block. Shuffled rows
come from a buffer, and the position is then that of the buffer's start and the number of its rows used. Each rank
owns a contiguous range of lanes. Reading and tokenizing run ahead of training on a background thread.
"""

import bisect
import collections.abc
import functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from nanochat.common import print0, require
from nanochat.dataset import read_row_group

SHARD_BLOCK = 128  # documents per block
TASK_BLOCK = 128  # conversations per block; when they are packed, 1 % of the tokens are padding
SHUFFLED_TOKENS = 2**17  # of a lane's buffer: about a block, so its rows come from a hundred documents
CACHED_ROW_GROUPS = 32  # decoded row groups in memory; the lanes read blocks that are close to each other


@dataclass
class Batch:
    """One optimizer step's data on this rank."""

    # [(inputs, targets)], each (rows, T): int32 ids, and int64 ids with -1 = not trained on
    micro_batches: list
    progress: float  # in epochs, the mean over this rank's lanes: 1.5 = halfway through the second
    state: dict  # resumes the loader right after this batch; for lanes: lane -> Lane.state()


class Source:
    """Documents in blocks. `groups` is a list of lists of blocks; every epoch shuffles the groups."""

    def __init__(self, groups, seed):
        self.groups, self.seed = groups, seed
        self.blocks = [block for group in groups for block in group]  # in file order
        self.order = functools.lru_cache(maxsize=4)(self.order)

    def order(self, epoch):
        """All blocks in the order of this epoch. Blocks of one group stay together."""
        shuffled = np.random.default_rng((self.seed, epoch)).permutation(len(self.groups))
        return [block for g in shuffled for block in self.groups[g]]


class ShardSource(Source):
    """Documents of parquet shards, each tokenized with a leading bos. A group is a row group, a block a part of one."""

    def __init__(self, row_groups, tokenizer, lanes, seed=42, dropout=0.0):
        """
        `row_groups` is the result of dataset.row_groups(): [(path, index in the file, number of documents)].

        `dropout`: see Tokenizer.encode.
        """
        self.tokenizer, self.dropout = tokenizer, dropout
        self.row_group = functools.lru_cache(maxsize=CACHED_ROW_GROUPS)(read_row_group)
        num_docs = sum(rows for _, _, rows in row_groups)
        require(num_docs, "the shards contain no documents; create them again with `python -m nanochat.dataset`")
        ranges = [(path, i, _block_ranges(rows, SHARD_BLOCK, num_docs, lanes)) for path, i, rows in row_groups]
        super().__init__([[(path, i, block) for block in blocks] for path, i, blocks in ranges], seed)

    def read(self, block):
        """(ids, targets) of the documents in a block, each a list of lists; all tokens are trained on."""
        path, group, docs = block
        texts = self.row_group(path, group)[docs.start : docs.stop]
        # Only four threads, because other ranks on the machine tokenize at the same time.
        ids = self.tokenizer.encode(texts, self.tokenizer.get_bos_token_id(), num_threads=4, dropout=self.dropout)
        return ids, ids


class TaskSource(Source):
    """Rendered conversations of a Task. A group is one block. `use_mask`: train on the assistant's tokens only."""

    def __init__(self, task, tokenizer, max_tokens, lanes, seed=42, use_mask=False, dropout=0.0):
        self.task, self.tokenizer, self.max_tokens, self.use_mask = task, tokenizer, max_tokens, use_mask
        self.dropout = dropout  # see Tokenizer.render_conversation
        super().__init__([[block] for block in _block_ranges(len(task), TASK_BLOCK, len(task), lanes)], seed)

    def read(self, block):
        """(ids, targets) of the conversations in a block, each a list of sequences; target -1 = not trained on."""
        rendered = [self.tokenizer.render_conversation(self.task[i], self.max_tokens, self.dropout) for i in block]
        ids = [ids for ids, _ in rendered]
        return ids, [np.where(mask, ids, -1) for ids, mask in rendered] if self.use_mask else ids


def check_lengths(name, task, tokenizer, max_tokens, use_mask=True, sample=500):
    """
    Print the share of conversations of more than `max_tokens` tokens, and of those with no trained token left.

    Measured on `sample` evenly spaced conversations. Raises UserError if none of them has a trained token.
    """
    checked = range(0, len(task), max(1, -(-len(task) // sample)))
    masks = [tokenizer.render_conversation(task[i], max_tokens=None)[1] for i in checked]
    cut = sum(len(mask) > max_tokens for mask in masks)
    untrained = sum(use_mask and not any(mask[:max_tokens]) for mask in masks)
    problems = (cut, f"are longer than {max_tokens} tokens and are cut"), (untrained, "have no trained token left")
    shares = "; ".join(f"{n / len(masks):.1%} {problem}" for n, problem in problems if n)
    shares = f"{name} conversations: {'about ' * (len(masks) < len(task))}{shares}"
    require(untrained < len(masks), f"{shares}: nothing to train on; the context is too short, or all weights are 0")
    if cut or untrained:
        print0(shares)


def _block_ranges(n, block_size, total, lanes):
    """
    The numbers 0 to n - 1 in ranges of `block_size`, the last one shorter.

    If `total` documents give fewer than 4 such blocks per lane, the blocks are smaller.
    """
    size = min(block_size, max(1, total // (4 * lanes)))
    return [range(start, min(start + size, n)) for start in range(0, n, size)]


class Lane:
    """Endless sequence of rows of T inputs and T targets; targets are the inputs shifted by one token."""

    def __init__(self, source, index, lanes, T, packing, state):
        self.source, self.index, self.lanes, self.T, self.packing = source, index, lanes, T, packing
        # Only a partly used buffer has a fourth number.
        self.epoch, self.block, self.used, self._rows_used = [*(state or (0, 0, 0)), 0][:4]
        self._data, self._buffer = None, []

    def blocks(self, epoch):
        """This lane's blocks of an epoch. If there are fewer blocks than lanes, several lanes read the same block."""
        order = self.source.order(epoch)
        return order[self.index :: self.lanes] or [order[(self.index + epoch) % len(order)]]

    def progress(self):
        """How far documents have been read, in epochs: 2.5 = halfway through the third."""
        block = self.block + (self.used / len(self._data[0]) if self._data else 0)
        return self.epoch + block / len(self.blocks(self.epoch))

    def next_row(self):
        """(inputs, targets), each (T,) int32."""
        ids, targets = getattr(self, f"_{self.packing}_row")()
        return ids[:-1], targets[1:]

    def state(self):
        """The position: Lane() with it goes on after the last row."""
        return [*self._buffer_start, self._rows_used] if self._buffer else [self.epoch, self.block, self.used]

    def data(self):
        """(ids, targets) of the current block: two streams of tokens, or two arrays of packed rows (N, T + 1)."""
        if self._data is None:
            docs = self.source.read(self.blocks(self.epoch)[self.block])
            if self.packing == "bos":  # in random order, or else all lanes would begin with their longest documents
                rows, seed = pack_best_fit(*docs, self.T), (self.source.seed, self.index, self.epoch, self.block)
                self._data = [part[np.random.default_rng(seed).permutation(len(part))] for part in rows]
            else:
                self._data = [_concat(part) for part in docs]
        return self._data

    def _next_block(self):
        self.block, self.used, self._data = self.block + 1, 0, None
        if self.block == len(self.blocks(self.epoch)):
            self.epoch, self.block = self.epoch + 1, 0

    def _bos_row(self):
        """The next row of pack_best_fit()."""
        while self.used == len(self.data()[0]):
            self._next_block()
        self.used += 1
        return [rows[self.used - 1] for rows in self.data()]

    def _shuffle_row(self):
        """The next row of the shuffled buffer; an empty one is filled, at most to the end of the epoch."""
        if not self._buffer:
            start = self._buffer_start = [self.epoch, self.block, self.used]
            size = max(1, SHUFFLED_TOKENS // self.T)
            # The first buffers differ in size, so that later ones are not read and tokenized all in the same step.
            size = 1 + self.index % size if start == [0, 0, 0] else size
            rows = [self._stream_row() for _ in range(size) if self.epoch == start[0]]
            order = np.random.default_rng((self.source.seed, self.index, *start)).permutation(len(rows))
            self._buffer = [rows[i] for i in order[self._rows_used :]]
        self._rows_used = self._rows_used + 1 if self._buffer[1:] else 0
        return self._buffer.pop(0)

    def _stream_row(self):
        """Consecutive rows of the token stream: the last target of a row is the first input of the next."""
        parts, missing = [], self.T + 1
        while missing:
            ids, targets = (stream[self.used : self.used + missing] for stream in self.data())
            parts.append((ids, targets))
            missing -= len(ids)
            self.used += len(ids)
            if self.used == len(self.data()[0]):
                # The row ends with its block, so the next row starts with the next block and repeats no token.
                self._next_block()
            elif not missing:
                self.used -= 1  # the row's last token is the first input of the next row
        return [np.concatenate(p) for p in zip(*parts, strict=True)]


def _concat(docs):
    return np.concatenate([np.asarray(d, dtype=np.int32) for d in docs])


def pack_best_fit(docs, targets, T):
    """
    Pack documents into rows (N, T + 1): returns (ids, targets), int32.

    Every row starts with the beginning of a document and is filled with the longest document that still fits. If none
    fits, the shortest one is cropped and its rest is dropped. The last row is padded, with targets -1.
    """
    waiting, rows = sorted((len(doc), i) for i, doc in enumerate(docs)), []
    while waiting:
        row = []  # pairs of id and target
        while (room := T + 1 - len(row)) and waiting:
            fits = bisect.bisect_right(waiting, (room, len(docs)))
            _, i = waiting.pop(fits - 1 if fits else 0)
            row.extend(zip(docs[i][:room], targets[i][:room], strict=True))
        rows.append(row + [(row[0][0], -1)] * room)
    return tuple(np.moveaxis(np.array(rows, dtype=np.int32), -1, 0))


def rank_rows(rows, compute):
    """Range of this rank's rows of a global batch."""
    n = rows // compute.world_size
    return range(compute.rank * n, (compute.rank + 1) * n)


def lane_batches(source, rows, T, device_batch_size, compute, packing="stream", states=None):
    """
    Yield Batches on the CPU forever: `rows` x T tokens per step, over all ranks.

    A micro-batch has `device_batch_size` rows. packing "stream" cuts rows from a stream of tokens; "shuffle" trains
    them in random order, so that the documents of consecutive steps differ; "bos" starts every row with a document
    (pack_best_fit). `states` (lane -> Lane.state(), of all lanes) resumes a run exactly. Raises UserError for another
    number of lanes.
    """
    own = rank_rows(rows, compute)
    assert len(own) * compute.world_size == rows and len(own) % device_batch_size == 0
    same = not states or len(states) == rows
    require(same, f"the checkpoint has {len(states or ())} data lanes, this run {rows} rows per step; keep them equal")
    lanes = [Lane(source, i, rows, T, packing, states and states[str(i)]) for i in own]
    while True:
        x, y = (torch.from_numpy(np.stack(half)) for half in zip(*(lane.next_row() for lane in lanes), strict=True))
        micro_batches = list(zip(x.split(device_batch_size), y.long().split(device_batch_size), strict=True))
        progress = sum(lane.progress() for lane in lanes) / len(lanes)
        yield Batch(micro_batches, progress, {str(lane.index): lane.state() for lane in lanes})


def conversation_batches(task, tokenizer, rows, T, device_batch_size, compute, seed=42, states=None, dropout=0.0):
    """
    Yield Batches on the CPU forever, with one conversation per row, truncated to T inputs.

    Only the assistant's tokens are trained on. Each epoch is a seeded permutation of `task`. A rank sorts its rows of a
    step by length; a micro-batch has at most device_batch_size x T tokens, see length_buckets(). `states` is the
    `state` of the last Batch before the resume. `dropout`: see Tokenizer.render_conversation.
    """
    pad, order = tokenizer.encode_special("<|assistant_end|>"), Source([[i] for i in range(len(task))], seed).order
    used = states["examples"] if states else 0
    while True:
        own = (divmod(used + row, len(task)) for row in rank_rows(rows, compute))
        rendered = (tokenizer.render_conversation(task[order(epoch)[i]], T + 1, dropout) for epoch, i in own)
        rendered = sorted(rendered, key=lambda row: len(row[0]))
        buckets = length_buckets([len(ids) for ids, _ in rendered], device_batch_size * T)
        parts = (rendered[bucket.start : bucket.stop] for bucket in buckets)
        used += rows
        yield Batch([pad_rows(part, pad) for part in parts], used / len(task), {"examples": used})


def length_buckets(lengths, max_tokens, pass_cost=256):
    """
    The ranges of ascending `lengths` that are padded to their longest and trained in one pass each.

    They minimize the number of tokens, padding included, plus `pass_cost` tokens per pass. A range of more than one
    length has at most `max_tokens` tokens.
    """
    best = [(0, None)]  # per number of lengths: (cost, start of the last range)
    for stop, longest in enumerate(lengths, 1):
        starts = range(max(0, stop - max(1, max_tokens // longest)), stop)
        best.append(min((best[start][0] + (stop - start) * longest + pass_cost, start) for start in starts))
    buckets, stop = [], len(lengths)
    while stop:
        buckets.append(range(best[stop][1], stop))
        stop = best[stop][1]
    return buckets[::-1]


def pad_rows(rows, pad=0):
    """
    (inputs int32, targets int64), each (rows, T), of `rows`: a list of (ids, mask), where mask 1 = trained on.

    Shorter rows are padded to the longest with inputs of `pad` and targets of -1.
    """
    pairs = [torch.tensor(row) for row in rows]  # each (2, length)
    x = pad_sequence([ids[:-1] for ids, _ in pairs], batch_first=True, padding_value=pad)
    y = pad_sequence([ids.where(mask > 0, -1)[1:] for ids, mask in pairs], batch_first=True, padding_value=-1)
    return x.int(), y


class Prefetch(collections.abc.Iterator):
    """Iterator over `batches`, moved to `device`; a background thread computes `ahead` batches in advance."""

    def __init__(self, batches, device, ahead=2):
        self.batches, self.device, self.state = batches, device, {}  # state: of the last batch returned
        self.thread = ThreadPoolExecutor(1, "dataloader")
        self.ready = collections.deque(self.thread.submit(self._next_batch) for _ in range(ahead))

    def _next_batch(self):
        batch = next(self.batches)
        if self.device.type == "cuda":
            batch.micro_batches = [(x.pin_memory(), y.pin_memory()) for x, y in batch.micro_batches]
        return batch

    def __next__(self):
        batch = self.ready.popleft().result()  # raises the thread's errors
        self.ready.append(self.thread.submit(self._next_batch))
        batch.micro_batches = [[t.to(self.device, non_blocking=True) for t in pair] for pair in batch.micro_batches]
        self.state = batch.state
        return batch

    def close(self):
        """Stop the background thread."""
        self.thread.shutdown(cancel_futures=True)


def eval_batches(source, rows, T, steps, compute):
    """
    The first steps x rows x T tokens of a source in file order: this rank's list of (inputs, targets) on the CPU.

    The rows do not depend on the world size; each rank takes a contiguous range of them. A small source gives fewer
    steps, and if it is too small for one step, the rest of that step is padded, with targets -1.
    """
    own = rank_rows(rows, compute)
    streams, total = [], 0
    for block in source.blocks:
        streams.append([_concat(docs) for docs in source.read(block)])
        total += len(streams[-1][0])
        if total > steps * rows * T:
            break
    ids, targets = (np.concatenate(parts) for parts in zip(*streams, strict=True))
    whole_steps = max(1, min(steps, (total - 1) // (rows * T)))
    n = whole_steps * rows * T
    missing = (0, max(0, n + 1 - total))  # before and after
    x = torch.from_numpy(np.pad(ids, missing, constant_values=ids[0])[:n].reshape(whole_steps, rows, T))
    y = torch.from_numpy(np.pad(targets, missing, constant_values=-1)[1 : n + 1].reshape(whole_steps, rows, T)).long()
    return list(zip(x[:, own.start : own.stop], y[:, own.start : own.stop], strict=True))
