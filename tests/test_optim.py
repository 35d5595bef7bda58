"""Muon and AdamW against torch.optim, one process against two, and schedules by hand."""

import pytest
import torch
from helpers import run_on_ranks

from nanochat.adamw import AdamW
from nanochat.muon import Muon, normalize_neurons, orthogonalize
from nanochat.schedule import lr_multiplier, muon_decay, muon_momentum, set_schedule


def two_copies(*shapes):
    """Two equal lists of random parameters."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s)) for s in shapes]
    return params, [torch.nn.Parameter(p.detach().clone()) for p in params]


def assert_same_steps(params, copies, make_optimizer, make_reference, steps=6):
    a, b = make_optimizer(params), make_reference(copies)
    for step in range(steps):
        for p, q in zip(params, copies, strict=True):
            p.grad = torch.randn_like(p) * 10.0 ** (step - 3)
            q.grad = p.grad.clone()
        for optimizer in (a, b):
            optimizer.param_groups[0]["lr"] *= 0.9  # as a schedule does
            optimizer.step()
        for p, q in zip(params, copies, strict=True):
            torch.testing.assert_close(p, q, atol=1e-5, rtol=0)


def test_adamw_equals_torch():
    params, copies = two_copies((7, 5), (33,), (4, 3, 2))
    settings = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-10, "weight_decay": 0.1}
    assert_same_steps(params, copies, lambda p: AdamW(p, **settings), lambda p: torch.optim.AdamW(p, **settings))


def test_muon_equals_torch():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    params, copies = two_copies((64, 64), (64, 64), (128, 32), (32, 128))
    settings = {"lr": 0.02, "momentum": 0.95}
    assert_same_steps(
        params,
        copies,
        lambda p: Muon(p, **settings),
        lambda p: torch.optim.Muon(p, weight_decay=0.0, adjust_lr_fn="original", **settings),
    )


def test_muon_decays_the_weights_that_the_update_shrinks():
    """By hand: the first update of a gradient with a single entry is its sign; other entries do not move."""
    p = torch.nn.Parameter(torch.tensor([[2.0, -3.0], [4.0, 5.0]]))
    muon = Muon([p], lr=0.0, decay=0.25, ns_dtype=torch.float32)
    p.grad = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    muon.step()
    assert p.tolist() == [[1.5, -3.0], [4.0, 5.0]]
    p.grad = torch.tensor([[-100.0, 0.0], [0.0, 0.0]])
    muon.step()  # the update would let it grow
    assert p.tolist() == [[1.5, -3.0], [4.0, 5.0]]


def test_normuon_by_hand():
    """Two steps. The norm stays; with beta2 0.5, the second moments are 1/2 m1, then 1/4 m1 + 1/2 m2."""
    first, second = torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    rows = torch.zeros(1, 2, 1)
    moments = torch.tensor([[25 / 4], [1 / 4]]), torch.tensor([[25 / 8 + 1 / 4], [1 / 8 + 1.0]])
    for update, moment in zip((first, second), moments, strict=True):
        normalized = update / moment.sqrt()
        expected = normalized * (update.norm() / normalized.norm())
        torch.testing.assert_close(normalize_neurons(update[None], rows, beta2=0.5), expected[None])
        torch.testing.assert_close(rows, moment[None])
    columns = torch.zeros(1, 1, 3)
    update = normalize_neurons(torch.tensor([[[1.0, 2.0, 0.0], [1.0, 2.0, 0.0]]]), columns, beta2=0.5)
    torch.testing.assert_close(columns, torch.tensor([[[0.5, 2.0, 0.0]]]))
    torch.testing.assert_close(update, torch.tensor([[[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]]]) * 2.5**0.5)
    assert normalize_neurons(torch.zeros(1, 2, 3), columns, beta2=0.5).abs().sum() == 0


def test_normuon_keeps_one_moment_per_neuron():
    params, _ = two_copies((4, 4), (8, 4), (4, 8))
    muon = Muon(params, beta2=0.95)
    for p in params:
        p.grad = torch.randn_like(p)
    muon.step()
    shapes = {name: tuple(t.shape) for name, t in muon.state_shard().items() if name.endswith("second_moment")}
    assert list(shapes.values()) == [(1, 4, 1), (1, 8, 1), (1, 1, 8)]


def test_orthogonalize_brings_singular_values_close_to_1():
    g = torch.randn(3, 48, 20, dtype=torch.float32)
    values = torch.linalg.svdvals(orthogonalize(g, dtype=torch.float32))
    assert values.min() > 0.6
    assert values.max() < 1.3
    assert orthogonalize(torch.zeros(1, 4, 4)).abs().sum() == 0


def test_load_shards_combines_the_state_of_two_ranks():
    """The shards are cut by hand from the state of one process."""
    params, copies = two_copies((8, 4), (8, 4), (8, 4))
    a = Muon(params)
    for p in params:
        p.grad = torch.randn_like(p)
    a.step()
    whole = a.state_shard()
    buffer = whole["0.momentum_buffer"]
    padded = torch.cat([buffer, torch.zeros(1, 8, 4)])  # 3 matrices over 2 ranks
    b = Muon(copies)
    b.load_shards([{"steps": 1, "0.momentum_buffer": half} for half in padded.split(2)])
    assert torch.equal(b.state_shard()["0.momentum_buffer"], buffer)
    assert b.steps == 1


TRAINING = """
import sys, torch, torch.distributed as dist
from nanochat.adamw import AdamW
from nanochat.muon import Muon
from nanochat.cluster import compute_cleanup, compute_init
compute = compute_init("cpu", "float32")
torch.manual_seed(3)
params = [torch.nn.Parameter(torch.randn(s)) for s in ((6, 4), (6, 4), (6, 4), (5, 3), (7,))]
optimizers = [AdamW(params[3:], lr=0.01), Muon(params[:3], beta2=0.9, decay=0.01, ns_dtype=torch.float32)]
grads = torch.Generator().manual_seed(5)
for step in range(4):
    for p in params:
        both = [torch.randn(p.shape, generator=grads) for _ in range(2)]
        p.grad = sum(both) / 2 if compute.world_size == 1 else both[compute.rank]
    norm = sum(o.reduce_grads() or o.grad_sq_norm() for o in optimizers)
    if compute.world_size > 1:
        dist.all_reduce(norm)
    for o in optimizers:
        o.step(0.5)
if compute.rank == 0:
    torch.save([norm] + [p.detach() for p in params], sys.argv[1])
del params, optimizers
compute_cleanup()
"""


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path):
    for a, b in zip(*run_on_ranks(TRAINING, tmp_path), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_schedules_by_hand():
    assert [lr_multiplier(p) for p in (0, 0.5, 0.8)] == [1, 1, pytest.approx(1)]
    assert lr_multiplier(0.9) == pytest.approx(0.5)
    assert lr_multiplier(1) == 0
    assert lr_multiplier(1.7) == 0  # never negative
    assert lr_multiplier(0.05, warmup_ratio=0.1) == pytest.approx(0.5)
    warmup = [lr_multiplier(step / 10, warmup_ratio=0.3, per_step=1 / 10) for step in range(4)]
    assert warmup == pytest.approx([1 / 3, 2 / 3, 1, 1])
    assert lr_multiplier(0.5, warmup_ratio=0.8, warmdown_ratio=0.8) == pytest.approx((5 / 8) ** 2)  # both at once
    assert lr_multiplier(1, final_lr_frac=0.1) == pytest.approx(0.1)
    assert lr_multiplier(1, warmdown_ratio=0) == 1
    assert muon_momentum(0) == pytest.approx(0.85)
    assert muon_momentum(150) == pytest.approx(0.90)
    assert muon_momentum(9999) == muon_momentum(9999, lr_mult=0) == pytest.approx(0.95)
    assert muon_momentum(150, lr_mult=0) == pytest.approx(0.90)  # below the final 0.95
    assert [muon_momentum(300, lr_mult=m, final=0.85) for m in (1, 0.5, 0)] == pytest.approx([0.95, 0.9, 0.85])
    assert [muon_decay(step, 3, total=0.03) for step in range(4)] == pytest.approx([0.015, 0.01, 0.005, 0])
    assert [muon_decay(step, 3, total=0.09) for step in range(4)] == pytest.approx([0.02, 0.02, 0.015, 0])


def test_set_schedule_scales_the_initial_learning_rate():
    p = torch.nn.Parameter(torch.zeros(2, 2))
    muon = Muon([p], lr=0.02)
    muon.param_groups[0]["initial_lr"] = 0.02
    for _ in range(2):
        set_schedule([muon], 0.5, momentum=0.9)
    assert muon.param_groups[0]["lr"] == 0.01
    assert muon.param_groups[0]["momentum"] == 0.9
