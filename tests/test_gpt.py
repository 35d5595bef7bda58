"""The model against transformers' NanoChat class, its loss against plain cross entropy, its sizes against the spec."""

import functools

import pytest
import torch
import torch.nn.functional as F
from helpers import random_model, transformers_model

from nanochat import ops
from nanochat.common import Compute, UserError
from nanochat.gpt import GPT, SOFTCAP, Block, GPTConfig
from nanochat.inference.kv_cache import KVCache
from nanochat.schedule import set_schedule
from nanochat.train import train_step


def small_model(n_kv_head=4, vocab_size=100, n_layer=3):
    shape = {"sequence_len": 32, "n_layer": n_layer, "n_head": 4, "n_embd": 64}
    return random_model(vocab_size, seed=1, n_kv_head=n_kv_head, **shape)


@pytest.mark.parametrize("n_kv_head", [4, 2])
@pytest.mark.parametrize("block", [256, 8])
def test_masked_documents_of_a_row_have_the_losses_and_gradients_of_rows_of_their_own(n_kv_head, block, monkeypatch):
    monkeypatch.setattr(ops, "QUERY_BLOCK", block)
    model, start = small_model(n_kv_head), 0
    first, *others = (torch.cat((torch.tensor([start]), torch.randint(1, 100, (n,)))) for n in (5, 12, 1, 8))
    row, alone = torch.cat((first[2:], *others))[None], []  # the row begins in the middle of a document

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return [p.grad for p in model.parameters()]

    for ids in (first[2:], *others):
        alone.append(model(ids[None], ids[None].roll(-1), loss_reduction="none")[0, :-1])
    expected = torch.cat(alone)
    keep = torch.cat([torch.arange(len(ids)) < len(ids) - 1 for ids in (first[2:], *others)])
    model.document_start = start
    losses = model(row, row.roll(-1), loss_reduction="none")[0, keep]
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(gradients(losses.sum()), gradients(expected.sum()), rtol=1e-4, atol=1e-4)
    model.document_start = None
    assert (model(row, row.roll(-1), loss_reduction="none")[0, keep] - expected)[4:].abs().max() > 0.01


@pytest.mark.parametrize("n_kv_head", [4, 2])
@pytest.mark.parametrize("use_cache", [False, True])
def test_logits_equal_transformers(n_kv_head, use_cache):
    model = small_model(n_kv_head)
    c = model.config
    hf = transformers_model(model)
    ids = torch.randint(0, c.vocab_size, (2, 24))
    with torch.no_grad():
        if use_cache:
            cache, actual, past, expected = KVCache(c.n_layer, rows=2), [], None, []
            for chunk in ids.split((7, 1, 1, 10, 1, 4), dim=1):
                actual.append(model(chunk, kv_cache=cache))
                out = hf(chunk, past_key_values=past, use_cache=True)
                past = out.past_key_values
                expected.append(out.logits)
            actual, expected = torch.cat(actual, 1), torch.cat(expected, 1)
        else:
            actual, expected = model(ids), hf(ids).logits
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_chunked_loss_equals_plain_cross_entropy(reduction, monkeypatch):
    model = small_model(vocab_size=130)
    monkeypatch.setattr(ops, "CPU_LOGITS_BYTES", 130 * 5 * 4)  # chunks of 5 rows; the last one is shorter
    monkeypatch.setattr(ops, "CPU_BLOCK_ELEMENTS", 130 * 2)  # and blocks of 2
    idx, targets = torch.randint(0, 130, (2, 2, 16))
    targets[0, 3:9] = -1
    weights = torch.rand(2, 16) if reduction == "none" else torch.tensor(0.7)

    loss = model(idx, targets, loss_reduction=reduction)
    (loss * weights).sum().backward()
    grads = [p.grad for p in model.parameters()]
    model.zero_grad()
    plain = F.cross_entropy(model(idx).flatten(0, 1), targets.flatten(), ignore_index=-1, reduction=reduction)
    plain = plain.view_as(targets) if reduction == "none" else plain
    (plain * weights).sum().backward()

    assert ops.chunk_rows(torch.empty(1), 130) == 5
    torch.testing.assert_close(loss, plain)
    for actual, p in zip(grads, model.parameters(), strict=True):
        torch.testing.assert_close(actual, p.grad, atol=1e-5, rtol=1e-4)


def test_loss_without_targets_and_its_gradients_are_zero():
    model = small_model()
    idx = torch.randint(0, 100, (1, 8))
    loss = model(idx, torch.full_like(idx, -1))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad.abs().sum() == 0 for p in model.parameters())


def test_new_model_predicts_all_tokens_with_equal_probability():
    model = GPT(GPTConfig.from_depth(2, 16, 300))
    model.init_weights("cpu")
    idx = torch.randint(0, 300, (2, 16))
    torch.testing.assert_close(model(idx, idx), torch.tensor(300.0).log())
    for name, p in model.named_parameters():
        assert p.isfinite().all(), name
    fc = model.transformer.h[0].mlp.c_fc.weight  # (512, 128): std 1 / sqrt(128)
    assert abs(fc.std().item() * 128**0.5 - 1) < 0.05


def test_induction_heads_copy_repeated_random_tokens():
    torch.manual_seed(0)
    model, plain = (GPT(GPTConfig.from_depth(4, 512, 1024)) for _ in range(2))
    for m in (model, plain):
        m.init_weights("cpu")
    model.init_induction()
    half = torch.randint(0, 1024, (8, 50))
    idx = torch.cat((half, half), dim=1)
    with torch.no_grad():
        hits = [(m(idx[:, :-1]).argmax(-1) == idx[:, 1:])[:, 50:].float().mean() for m in (model, plain)]
    assert hits[0] > 0.5 and hits[1] < 0.1, hits


def test_induction_needs_two_layers():
    model = GPT(GPTConfig.from_depth(1, 16, 300))
    model.init_weights("cpu")
    with pytest.raises(UserError, match="--depth=2"):
        model.init_induction()


@pytest.mark.parametrize(("depth", "vocab", "params"), [(20, 65536, 560_988_160), (32, 65536, 1_879_048_192)])
def test_parameter_counts_of_the_recipe(depth, vocab, params):
    model = GPT(GPTConfig.from_depth(depth, 2048, vocab))
    assert model.num_params() == params


def test_flops_of_the_recipe():
    model = GPT(GPTConfig.from_depth(4, 256, 8192))
    assert model.num_params() == 7_340_032
    assert model.estimate_flops() == pytest.approx(3.4603e7, rel=1e-4)


def test_head_size_divides_the_width_at_every_depth():
    for depth in range(1, 40):
        config = GPTConfig.from_depth(depth, 64, 256)
        assert config.n_embd == 64 * depth
        assert config.n_head * config.head_dim == config.n_embd
        assert config.head_dim % 8 == 0
    assert GPTConfig.from_depth(20, 64, 256).n_head == 10


def test_gradient_checkpointing_gives_the_same_gradients():
    model = small_model()
    idx = torch.randint(0, 100, (2, 16))
    model(idx, idx).backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.grad_checkpoint = True
    model(idx, idx).backward()
    for before, p in zip(grads, model.parameters(), strict=True):
        torch.testing.assert_close(before, p.grad)


def test_sequence_longer_than_the_training_length():
    model = small_model()
    long = torch.randint(0, 100, (1, 80))  # sequence_len is 32: the rotary table grows
    short = model(long[:, :40])
    torch.testing.assert_close(model(long)[:, :40], short, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [{"n_head": 3}, {"n_kv_head": 3}, {"n_layer": 0}, {"n_embd": 64, "n_head": 64}])
def test_invalid_shapes_raise_user_errors(shape):
    with pytest.raises(UserError):
        GPTConfig(**({"n_embd": 64, "n_head": 4, "n_kv_head": 4} | shape))


def test_generate_is_reproducible_from_its_seed():
    model = small_model()
    sample = [list(model.generate([1, 2, 3], 8, seed=s)) for s in (1, 1, 2)]
    assert sample[0] == sample[1] != sample[2]
    greedy = list(model.generate([1, 2, 3], 4, temperature=0))
    assert greedy == list(model.generate([1, 2, 3], 4, temperature=1, top_k=1))


# ---------------------------------------------------------------------------------------------------------------------
# The CPU versions of operations against PyTorch's


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("T", [1, 7, 256, 600])
def test_attention_in_blocks_equals_sdpa(T, kv_heads):
    q, k, v = (torch.randn(2, heads, T, 16, requires_grad=True) for heads in (4, kv_heads, kv_heads))
    actual = ops.causal_attention(q, k, v)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn_like(expected)
    for a, b in zip(*(torch.autograd.grad((y * weights).sum(), (q, k, v)) for y in (actual, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("grad_checkpoint", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_losses_without_the_last_mlp_of_untrained_tokens(monkeypatch, reduction, grad_checkpoint):
    monkeypatch.setattr(ops, "CPU_LOSS_ROWS", 4)
    torch.manual_seed(0)
    model = GPT(GPTConfig(32, 100, 2, 2, 2, 32))
    model.init_weights()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    model.grad_checkpoint = grad_checkpoint
    ids, targets = torch.randint(100, (2, 3, 20)).unbind()
    targets[torch.rand(3, 20) < 0.6] = -1
    weights = torch.rand(3, 20) if reduction == "sum" else None
    assert len(ops.trained_rows(targets.flatten())) < 40
    actual = model(ids, targets, loss_reduction=reduction, weights=weights)
    nats = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none").view(3, 20)
    expected = (nats * weights).sum() if reduction == "sum" else nats.sum() / (targets >= 0).sum()
    torch.testing.assert_close(actual, expected)
    for a, b in zip(*(torch.autograd.grad(x, list(model.parameters())) for x in (actual, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients_equal_those_in_float64(dtype, monkeypatch):
    monkeypatch.setattr(ops, "CPU_LOGITS_BYTES", 300 * 16 * dtype.itemsize)  # three chunks
    x, head = (20 * torch.randn(40, 32)).to(dtype).requires_grad_(), torch.randn(320, 32, requires_grad=True)
    targets, weights = torch.randint(300, (40,)), torch.randn(40)
    targets[::7] = -1
    total = ops.cross_entropy_sum(x, head, targets, weights, 300, SOFTCAP)
    (3 * total).backward()
    exact_x, exact_head = (t.detach().double().requires_grad_() for t in (x, head))
    logits = SOFTCAP * torch.tanh(exact_x @ exact_head.to(dtype)[:300].double().T / SOFTCAP)
    nats = F.cross_entropy(logits, targets, ignore_index=-1, reduction="none")
    (3 * (nats * weights).sum()).backward()
    for actual, expected in ((total, (nats * weights).sum()), (x.grad, exact_x.grad), (head.grad, exact_head.grad)):
        error = (actual.double() - expected).norm() / expected.norm()
        assert error < {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]


# ---------------------------------------------------------------------------------------------------------------------
# torch.compile()


def num_graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.fixture
def fast_compiler(monkeypatch):
    """torch.compile() without generating code."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("whole", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_code_for_gpus_is_one_graph_and_compiled_once(whole, fast_compiler, monkeypatch):
    monkeypatch.setattr(ops, "on_cpu", lambda x: False)
    model = small_model(n_kv_head=2, n_layer=2)
    optimizers, compute = model.setup_optimizers(), Compute(torch.device("cpu"), torch.bfloat16)
    set_schedule(optimizers, 1.0, 0.95)
    x, y = torch.randint(100, (2, 4, 32))
    expected = torch.autograd.grad(model(x, y), list(model.parameters()))
    if whole:
        compiled = torch.compile(model, dynamic=False, fullgraph=True)
    else:
        compiled = model
        model.compile()
        model.block_forward = torch.compile(Block.forward, dynamic=True, fullgraph=True)
    actual = torch.autograd.grad(compiled(x, y), list(model.parameters()))
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-4)

    def step_and_evaluation(rows, T):
        idx = torch.randint(100, (rows, T + 1))
        batch = idx[:, :-1].contiguous(), idx[:, 1:].contiguous()
        train_step(compiled, optimizers, [batch, batch], compute, grad_clip=1.0)
        with torch.no_grad(), compute.autocast():
            compiled(*batch, loss_reduction="none")

    # The loss of a chunk has one graph for the first number of rows, and one for all others.
    shapes = [(4, 32)] * 3 if whole else [(4, 32), (3, 17), (4, 32), (6, 50)]
    for rows, T in shapes[:-2]:
        step_and_evaluation(rows, T)
    graphs = num_graphs()
    for rows, T in shapes[-2:]:
        step_and_evaluation(rows, T)
    assert num_graphs() == graphs


@pytest.mark.slow
def test_compiled_model_has_the_same_gradients():
    torch._dynamo.reset()
    model = small_model()
    idx, targets = torch.randint(0, 100, (2, 3, 40))
    targets[0, 3:9] = -1
    model(idx, targets).backward()
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    model.compile()
    for length in (33, 37):
        model(idx[:, :length], targets[:, :length]).backward()
    graphs = num_graphs()
    model.zero_grad()
    model(idx, targets).backward()
    assert num_graphs() == graphs  # this length has none of its own
    for p, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad, atol=1e-6, rtol=1e-4)
