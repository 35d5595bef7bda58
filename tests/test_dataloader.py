"""Batches: their contents, the same batches for every world size, and exact resume."""

import dataclasses
import itertools
import math
import threading

import numpy as np
import pytest
import torch
from helpers import CPU, raises_user_error

from nanochat import dataloader
from nanochat.common import UserError
from nanochat.dataloader import (
    Prefetch,
    ShardSource,
    TaskSource,
    check_lengths,
    conversation_batches,
    eval_batches,
    lane_batches,
    length_buckets,
    pack_best_fit,
)
from nanochat.dataset import read_row_group, row_groups
from nanochat.tokenizer import get_tokenizer
from tasks.common import Task, user_and_assistant

T, ROWS = 32, 6
PACKINGS = ["stream", "shuffle", "bos"]


@pytest.fixture(autouse=True)
def few_shuffled_rows(monkeypatch):
    monkeypatch.setattr(dataloader, "SHUFFLED_TOKENS", 10 * T + 5)


def cpu(rank, world_size):
    return dataclasses.replace(CPU, rank=rank, world_size=world_size)


def take_batches(n, packing="stream", rank=0, world_size=1, device_batch_size=1, states=None, source=None):
    source = source or ShardSource(row_groups("train"), get_tokenizer(), ROWS)
    batches = lane_batches(source, ROWS, T, device_batch_size, cpu(rank, world_size), packing, states)
    return list(itertools.islice(batches, n))


def rows_of(batch):
    """Inputs and targets of all micro-batches: (rows, 2, T)."""
    x, y = (torch.cat(half) for half in zip(*batch.micro_batches, strict=True))
    return torch.stack((x.long(), y), 1)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_batches_are_the_same_for_every_world_size(base, packing, world_size):
    single = take_batches(12, packing)
    ranks = [
        take_batches(12, packing, r, world_size, device_batch_size=2 if world_size == 3 else 3)
        for r in range(world_size)
    ]
    for step, batch in enumerate(single):
        together = torch.cat([rows_of(rank[step]) for rank in ranks])
        assert torch.equal(rows_of(batch), together)


@pytest.mark.parametrize("packing", PACKINGS)
def test_resume_is_exact_with_another_world_size(base, packing):
    uninterrupted = take_batches(60, packing)  # some lanes pass the end of an epoch
    states = {lane: p for r in range(2) for lane, p in take_batches(35, packing, r, 2)[-1].state.items()}
    resumed = take_batches(25, packing, states=states)
    for a, b in zip(uninterrupted[35:], resumed, strict=True):
        assert torch.equal(rows_of(a), rows_of(b))
        assert a.state == b.state


def test_epoch_has_every_document_once(base):
    """With a single lane, an epoch is the concatenation of all documents in the order of that epoch."""
    tokenizer = get_tokenizer()
    source = ShardSource(row_groups("train"), tokenizer, 1)
    texts = [text for path, i, _ in row_groups("train") for text in read_row_group(path, i)]
    documents = [d for block in source.order(0) for d in source.read(block)[0]]
    expected = tokenizer.encode(texts, prepend=tokenizer.get_bos_token_id())
    assert sorted(map(tuple, documents)) == sorted(map(tuple, expected))
    assert source.order(0) != source.order(1) or len(row_groups("train")) == 1

    stream, at = np.concatenate(documents), 0
    for batch in itertools.islice(lane_batches(source, 1, T, 1, CPU), len(stream) // T - 2):
        inputs, targets = rows_of(batch)[0].numpy()
        if not np.array_equal(inputs, stream[at : at + T]):
            at += 1  # the previous row ended a block; the last token of a block is never an input
        np.testing.assert_array_equal(inputs, stream[at : at + T])
        np.testing.assert_array_equal(targets, stream[at + 1 : at + T + 1])
        at += T


def test_fewer_documents_than_lanes(base):
    source = ShardSource(row_groups("val"), get_tokenizer(), 4096)
    lanes = 4096
    batch = next(lane_batches(source, lanes, 8, lanes, CPU))
    assert batch.micro_batches[0][0].shape == (lanes, 8)


def test_state_with_another_number_of_lanes_raises_user_error(base):
    with pytest.raises(UserError, match="lanes"):
        take_batches(1, states={"0": [0, 0, 0]})


def test_shuffled_rows_are_those_of_the_stream(base):
    """In random order within a buffer; a lane's first buffer has another size than its neighbour's."""
    stream, shuffled = (torch.stack([rows_of(batch) for batch in take_batches(40, p)]) for p in ("stream", "shuffle"))
    orders = set()
    for lane in range(ROWS):
        for start in (0, *range(lane + 1, 30, 10)):
            part, expected = (x[start : start + (10 if start else lane + 1), lane] for x in (shuffled, stream))
            part, expected = part.flatten(1).tolist(), expected.flatten(1).tolist()
            assert sorted(part) == sorted(expected)
            orders.add(tuple(expected.index(row) for row in part))
    assert len(orders) > 15


def test_a_buffer_has_rows_of_one_epoch(base, monkeypatch):
    monkeypatch.setattr(dataloader, "SHUFFLED_TOKENS", 10**9)
    lane = dataloader.Lane(ShardSource(row_groups("val"), get_tokenizer(), 1), 10**6, 1, T, "shuffle", None)
    lane.next_row()
    assert (lane.epoch, lane.state()) == (1, [0, 0, 0, 1])
    rows_left = len(lane._buffer)
    for _ in range(rows_left + 1):
        lane.next_row()
    assert lane.epoch == 2 and lane.state()[0] == 1


def test_best_fit_packing_by_hand():
    docs = [[9, 1, 1], [9, 2, 2, 2, 2], [9, 3], [9, 4, 4, 4]]
    rows, targets = pack_best_fit(docs, docs, T=5)
    # A row of T + 1 = 6 tokens. Row 1: the longest document, then the shortest one cropped to 1 token. Row 2: the
    # document of 4 tokens, then the last one cropped to 2.
    assert rows.tolist() == [[9, 2, 2, 2, 2, 9], [9, 4, 4, 4, 9, 1]]
    assert targets.tolist() == rows.tolist()


def test_best_fit_packing_pads_the_last_row_with_targets_of_minus_1():
    rows, targets = pack_best_fit([[9, 1]], [[-1, 1]], T=4)
    assert rows.tolist() == [[9, 1, 9, 9, 9]]
    assert targets.tolist() == [[-1, 1, -1, -1, -1]]


def test_every_packed_row_starts_a_document(base):
    bos = get_tokenizer().get_bos_token_id()
    for batch in take_batches(20, "bos"):
        assert (rows_of(batch)[:, 0, 0] == bos).all()


class Conversations(Task):
    """23 conversations with answers of 1 to 23 words."""

    eval_type = "generative"

    def num_examples(self):
        return 23

    def get_example(self, i):
        return {
            "messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": "word " * (i + 1)}]
        }


def test_conversations_are_masked_padded_and_split_over_ranks(base):
    tokenizer, task = get_tokenizer(), Conversations()
    single = list(itertools.islice(conversation_batches(task, tokenizer, 4, 40, 4, CPU), 8))
    halves = [list(itertools.islice(conversation_batches(task, tokenizer, 4, 40, 1, cpu(r, 2)), 8)) for r in range(2)]

    def unpadded(micro_batches):
        for x, y in micro_batches:
            assert x.shape == y.shape and x.size(1) <= 40
            ends = [1 + row.ne(-1).nonzero().max().item() for row in y]  # length without padding
            assert max(ends) == y.size(1)
            yield from [(a[:end].tolist(), b[:end].tolist()) for a, b, end in zip(x, y, ends, strict=True)]

    texts = []
    for step, batch in enumerate(single):
        rows = list(unpadded(batch.micro_batches))
        shares = [list(unpadded(half[step].micro_batches)) for half in halves]
        assert sorted(rows) == sorted(shares[0] + shares[1])
        for share in (rows, *shares):
            assert [len(ids) for ids, _ in share] == sorted(len(ids) for ids, _ in share)
        texts += [tokenizer.decode(ids) for ids, _ in rows]
        assert not any(tokenizer.encode_special("<|user_start|>") in targets for _, targets in rows)
    questions = [text.split("<|user_end|>")[0] for text in texts]
    assert len(set(questions[:24])) == 23  # an epoch has every conversation once
    assert single[5].state == {"examples": 24}
    resumed = next(conversation_batches(task, tokenizer, 4, 40, 4, CPU, states={"examples": 24}))
    assert torch.equal(resumed.micro_batches[0][0], single[6].micro_batches[0][0])


@pytest.mark.parametrize(("max_tokens", "pass_cost"), [(100, 10), (1000, 50), (30, 0)])
def test_length_buckets_have_the_least_cost_of_all_partitions(max_tokens, pass_cost):
    lengths = sorted([7, 9, 9, 10, 30, 31, 33, 90, 200])

    def cost(ranges):
        sizes = [len(r) * lengths[r.stop - 1] for r in ranges]  # padded
        fits = all(len(r) == 1 or size <= max_tokens for r, size in zip(ranges, sizes, strict=True))
        return sum(sizes) + pass_cost * len(ranges) if fits else math.inf

    partitions = (
        [range(a, b) for a, b in itertools.pairwise([0, *cuts, len(lengths)])]
        for n in range(len(lengths))
        for cuts in itertools.combinations(range(1, len(lengths)), n)
    )
    buckets = length_buckets(lengths, max_tokens, pass_cost)
    assert [i for bucket in buckets for i in bucket] == list(range(len(lengths)))
    assert cost(buckets) == min(map(cost, partitions)) < math.inf


def test_task_source_masks_user_tokens_only_with_use_mask(base):
    tokenizer = get_tokenizer()
    user = tokenizer.encode_special("<|user_start|>")
    for use_mask in (False, True):
        source = TaskSource(Conversations(), tokenizer, 200, 2, use_mask=use_mask)
        x, y = next(lane_batches(source, 2, T, 2, CPU, "bos")).micro_batches[0]
        assert ((x == user).any(), (y == user).any()) == (True, not use_mask)


def test_evaluation_batches_are_in_file_order(base):
    tokenizer = get_tokenizer()
    source = ShardSource(row_groups("val"), tokenizer, 4)
    single = eval_batches(source, 4, T, 3, CPU)
    ranks = [eval_batches(source, 4, T, 3, cpu(r, 2)) for r in range(2)]
    path, group, _ = row_groups("val")[0]
    stream = list(itertools.chain(*tokenizer.encode(read_row_group(path, group), prepend=tokenizer.get_bos_token_id())))
    inputs = torch.cat([x.flatten() for x, _ in single]).tolist()
    targets = torch.cat([y.flatten() for _, y in single]).tolist()
    assert (inputs, targets) == (stream[: 12 * T], stream[1 : 12 * T + 1])
    for step, (x, _) in enumerate(single):
        assert torch.equal(x, torch.cat([ranks[r][step][0] for r in range(2)]))


def test_small_evaluation_data_is_padded_to_one_step(base):
    tokenizer = get_tokenizer()
    task = CustomLengths([1])
    ((x, y),) = eval_batches(TaskSource(task, tokenizer, T, 4), 4, T, 3, CPU)
    ids, _ = tokenizer.render_conversation(task[0])
    assert x.shape == y.shape == (4, T) and x.flatten()[: len(ids)].tolist() == ids
    assert y.flatten().tolist() == ids[1:] + [-1] * (4 * T + 1 - len(ids))


class CustomLengths(Task):
    """Conversations with questions of the given numbers of words, and the answer "x"."""

    def __init__(self, lengths, **fields):
        self.lengths, self.fields = lengths, fields

    def num_examples(self):
        return len(self.lengths)

    def get_example(self, i):
        return user_and_assistant("word " * self.lengths[i], "x") | self.fields


def test_share_of_cut_and_untrained_conversations_is_printed(base, capsys):
    tokenizer = get_tokenizer()
    check_lengths("training", CustomLengths([1] * 8), tokenizer, 100)
    assert capsys.readouterr().out == ""
    check_lengths("training", CustomLengths([1] * 6 + [500] * 2), tokenizer, 100)
    shares = "25.0% are longer than 100 tokens and are cut; 25.0% have no trained token left"
    assert capsys.readouterr().out == f"training conversations: {shares}\n"
    check_lengths("training", CustomLengths([1] * 500 + [500] * 500), tokenizer, 100, use_mask=False, sample=500)
    assert capsys.readouterr().out == "training conversations: about 50.0% are longer than 100 tokens and are cut\n"
    weights_0 = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x", "weight": 0}]}
    for task in (CustomLengths([500] * 3), CustomLengths([1], **weights_0)):
        with raises_user_error("100.0% have no trained token left: nothing to train on"):
            check_lengths("training", task, tokenizer, 100)


def test_prefetch_reraises_errors_of_its_thread_and_close_ends_it():
    def failing():
        yield from ()
        raise UserError("shard_00001.parquet is damaged")

    loader = Prefetch(failing(), torch.device("cpu"))
    with pytest.raises(UserError, match="damaged"):
        next(loader)
    endless = Prefetch(itertools.repeat(None), torch.device("cpu"))
    endless.close()
    loader.close()
    assert not any(thread.name.startswith("dataloader") for thread in threading.enumerate())
