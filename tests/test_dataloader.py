"""Batches: their content, their independence of the world size, and exact resume."""

import itertools

import numpy as np
import pytest
import torch

from nanochat.common import Compute, UserError
from nanochat.dataloader import (
    Prefetch,
    ShardSource,
    TaskSource,
    conversation_batches,
    eval_batches,
    lane_batches,
    pack_best_fit,
)
from nanochat.dataset import read_row_group, row_groups
from nanochat.tokenizer import get_tokenizer
from tasks.common import Task

T, ROWS = 32, 6


def cpu(rank=0, world_size=1):
    return Compute(torch.device("cpu"), torch.float32, rank, rank, world_size)


def take(n, packing="stream", rank=0, world_size=1, device_batch_size=1, states=None, source=None):
    source = source or ShardSource(row_groups("train"), get_tokenizer(), ROWS)
    batches = lane_batches(source, ROWS, T, device_batch_size, cpu(rank, world_size), packing, states)
    return list(itertools.islice(batches, n))


def rows_of(batch):
    x, y = (torch.cat(half) for half in zip(*batch.micro_batches, strict=True))
    return torch.stack((x.long(), y), 1)


@pytest.mark.parametrize("packing", ["stream", "bos"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_same_batches_on_any_number_of_processes(base, packing, world_size):
    alone = take(12, packing)
    ranks = [take(12, packing, r, world_size, device_batch_size=2 if world_size == 3 else 3) for r in range(world_size)]
    for step, batch in enumerate(alone):
        together = torch.cat([rows_of(rank[step]) for rank in ranks])
        assert torch.equal(rows_of(batch), together)


@pytest.mark.parametrize("packing", ["stream", "bos"])
def test_resume_is_exact_with_another_world_size(base, packing):
    whole = take(60, packing)  # more than an epoch of some lanes
    states = {lane: p for r in range(2) for lane, p in take(35, packing, r, 2)[-1].state.items()}
    rest = take(25, packing, states=states)
    for a, b in zip(whole[35:], rest, strict=True):
        assert torch.equal(rows_of(a), rows_of(b))
        assert a.state == b.state


def test_an_epoch_holds_every_document_once(base):
    """With a single lane, the tokens of an epoch are those of all documents, in the order of that epoch."""
    tokenizer = get_tokenizer()
    source = ShardSource(row_groups("train"), tokenizer, 1)
    docs = [text for path, i, _ in row_groups("train") for text in read_row_group(path, i)]
    seen = [d for block in source.order(0) for d in source.read(block)[0]]
    expected = tokenizer.encode(docs, prepend=tokenizer.get_bos_token_id())
    assert sorted(map(tuple, seen)) == sorted(map(tuple, expected))
    assert source.order(0) != source.order(1) or len(row_groups("train")) == 1

    stream, at = np.concatenate(seen), 0
    for batch in itertools.islice(lane_batches(source, 1, T, 1, cpu()), len(stream) // T - 2):
        inputs, targets = rows_of(batch)[0].numpy()
        if not np.array_equal(inputs, stream[at : at + T]):
            at += 1  # the previous row ended a block, whose last token is only a target
        np.testing.assert_array_equal(inputs, stream[at : at + T])
        np.testing.assert_array_equal(targets, stream[at + 1 : at + T + 1])
        at += T


def test_fewer_documents_than_lanes(base):
    source = ShardSource(row_groups("val"), get_tokenizer(), 4096)
    lanes = 4096
    batch = next(lane_batches(source, lanes, 8, lanes, cpu()))
    assert batch.micro_batches[0][0].shape == (lanes, 8)


def test_a_state_with_another_number_of_lanes_is_a_user_error(base):
    with pytest.raises(UserError, match="lanes"):
        take(1, states={"0": [0, 0, 0]})


def test_best_fit_packing_by_hand():
    docs = [[9, 1, 1], [9, 2, 2, 2, 2], [9, 3], [9, 4, 4, 4]]
    rows, targets = pack_best_fit(docs, docs, T=5)
    # Row 1: the longest document, then the shortest, cropped to 1 token. Row 2: 4 tokens, then the last one, cropped.
    assert rows.tolist() == [[9, 2, 2, 2, 2, 9], [9, 4, 4, 4, 9, 1]]
    assert targets.tolist() == rows.tolist()


def test_best_fit_packing_pads_the_last_row_with_untrained_targets():
    rows, targets = pack_best_fit([[9, 1]], [[-1, 1]], T=4)
    assert rows.tolist() == [[9, 1, 9, 9, 9]]
    assert targets.tolist() == [[-1, 1, -1, -1, -1]]


def test_every_packed_row_starts_a_document(base):
    bos = get_tokenizer().get_bos_token_id()
    for batch in take(20, "bos"):
        assert (rows_of(batch)[:, 0, 0] == bos).all()


class Talk(Task):
    eval_type = "generative"

    def num_examples(self):
        return 23

    def get_example(self, i):
        return {
            "messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": "word " * (i + 1)}]
        }


def test_conversations_are_masked_padded_and_split_over_ranks(base):
    tokenizer, task = get_tokenizer(), Talk()
    one = list(itertools.islice(conversation_batches(task, tokenizer, 4, 40, 4, cpu()), 8))
    halves = [list(itertools.islice(conversation_batches(task, tokenizer, 4, 40, 1, cpu(r, 2)), 8)) for r in range(2)]

    def unpadded(micro_batches):
        for x, y in micro_batches:
            assert x.shape == y.shape and x.size(1) <= 40
            ends = [1 + row.ne(-1).nonzero().max().item() for row in y]  # the last target is the assistant's
            assert max(ends) == y.size(1)
            yield from [(a[:end].tolist(), b[:end].tolist()) for a, b, end in zip(x, y, ends, strict=True)]

    seen = []
    for step, batch in enumerate(one):
        rows = list(unpadded(batch.micro_batches))
        parts = [list(unpadded(half[step].micro_batches)) for half in halves]
        assert sorted(rows) == sorted(parts[0] + parts[1])
        for own in (rows, *parts):
            assert [len(ids) for ids, _ in own] == sorted(len(ids) for ids, _ in own)
        seen += [tokenizer.decode(ids) for ids, _ in rows]
        assert not any(tokenizer.encode_special("<|user_start|>") in targets for _, targets in rows)
    prompts = [text.split("<|user_end|>")[0] for text in seen]
    assert len(set(prompts[:24])) == 23  # an epoch has every conversation once
    assert one[5].state == {"examples": 24}
    resumed = next(conversation_batches(task, tokenizer, 4, 40, 4, cpu(), states={"examples": 24}))
    assert torch.equal(resumed.micro_batches[0][0], one[6].micro_batches[0][0])


def test_task_source_masks_only_when_asked(base):
    tokenizer = get_tokenizer()
    user = tokenizer.encode_special("<|user_start|>")
    for use_mask in (False, True):
        source = TaskSource(Talk(), tokenizer, 200, 2, use_mask=use_mask)
        x, y = next(lane_batches(source, 2, T, 2, cpu(), "bos")).micro_batches[0]
        assert ((x == user).any(), (y == user).any()) == (True, not use_mask)


def test_evaluation_reads_the_text_in_file_order(base):
    tokenizer = get_tokenizer()
    source = ShardSource(row_groups("val"), tokenizer, 4)
    one = eval_batches(source, 4, T, 3, cpu())
    two = [eval_batches(source, 4, T, 3, cpu(r, 2)) for r in range(2)]
    path, group, _ = row_groups("val")[0]
    stream = list(itertools.chain(*tokenizer.encode(read_row_group(path, group), prepend=tokenizer.get_bos_token_id())))
    inputs = torch.cat([x.flatten() for x, _ in one]).tolist()
    targets = torch.cat([y.flatten() for _, y in one]).tolist()
    assert (inputs, targets) == (stream[: 12 * T], stream[1 : 12 * T + 1])
    for step, (x, _) in enumerate(one):
        assert torch.equal(x, torch.cat([two[r][step][0] for r in range(2)]))


def test_prefetch_raises_the_threads_errors_and_stops():
    def broken():
        yield from ()
        raise UserError("shard_00001.parquet is damaged")

    loader = Prefetch(broken(), torch.device("cpu"))
    with pytest.raises(UserError, match="damaged"):
        next(loader)
    endless = Prefetch(itertools.repeat(None), torch.device("cpu"))
    endless.close()
    assert not endless.thread.is_alive()
