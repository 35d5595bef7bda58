"""The engine against full forward passes, against itself with other batches, and on scripted models."""

import random
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    BOS,
    END,
    OUTPUT,
    OUTPUT_END,
    PYTHON,
    PYTHON_END,
    ByteTokenizer,
    ScriptedModel,
    random_model,
    transformers_model,
)

from nanochat.common import UserError
from nanochat.engine import Engine, Request, sample
from nanochat.inference.backends import TorchBackend
from nanochat.inference.cpu_backend import CPUBackend, quantize
from nanochat.inference.cuda_graphs import CUDAGraphBackend
from nanochat.inference.detokenizer import Detokenizer, visible_text
from nanochat.inference.kv_cache import KVCache
from nanochat.inference.sampling import apply_penalties, sample_on_device
from nanochat.inference.scheduler import Prefill


def answer(text, prompt_length=1):
    """A script that generates `text` (token ids or a string) after the prompt, then <|assistant_end|>."""
    ids = ([*text.encode()] if isinstance(text, str) else text) + [END]
    return lambda sequence: ids[min(len(sequence) - prompt_length, len(ids) - 1)]


@pytest.fixture(scope="module", params=[4, 2], ids=["mha", "gqa"])
def model(request):
    return random_model(sequence_len=96, n_layer=3, n_head=4, n_kv_head=request.param)


@pytest.fixture
def engine(model):
    return Engine(model, ByteTokenizer())


def prefill(engine, prompts):
    """A cache with one row per prompt."""
    prefill = Prefill(engine.backend, prompts, engine.backend.new_cache())
    while not prefill.done:
        prefill.advance()
    return prefill.cache


def random_ids(rows, length, seed=0):
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


def assert_close(a, b):
    torch.testing.assert_close(a, b, atol=2e-4, rtol=0)


# ---------------------------------------------------------------------------------------------------------------------
# The KV cache


@torch.no_grad()
def test_cached_logits_of_single_tokens_equal_a_full_forward_pass(model):
    ids, cache = random_ids(2, 90), KVCache(3, rows=2)  # more than the initial 64 columns: the cache grows
    one_by_one = [model(ids[:, t : t + 1], kv_cache=cache) for t in range(90)]
    assert_close(torch.cat(one_by_one, dim=1), model(ids))


@torch.no_grad()
def test_cached_logits_equal_a_full_forward_pass_for_all_chunk_sizes(model):
    ids = random_ids(2, 9)
    full = model(ids)
    for a in range(1, 8):
        for b in range(a + 1, 9):
            cache = KVCache(3, rows=2)
            assert_close(
                torch.cat([model(ids[:, i:j], kv_cache=cache) for i, j in ((0, a), (a, b), (b, 9))], dim=1), full
            )


@torch.no_grad()
def test_growing_the_cache_keeps_its_contents(model):
    ids, cache = random_ids(1, 300), KVCache(3, rows=1)
    full = model(ids)
    assert_close(torch.cat([model(c, kv_cache=cache) for c in ids.split([40, 23, 1, 1, 100, 135], dim=1)], dim=1), full)


@torch.no_grad()
def test_rows_of_unequal_length_share_chunks(engine, model):
    prompts = [random_ids(1, n, seed=n)[0].tolist() for n in (1, 70, 5, 12)]
    cache = prefill(engine, [p[:-1] for p in prompts])
    assert cache.lengths == [0, 69, 4, 11]
    more = random_ids(4, 6)
    logits = torch.cat([model(c, kv_cache=cache) for c in more.split([1, 3, 1, 1], dim=1)], dim=1)
    for row, prompt in enumerate(prompts):
        sequence = torch.cat([torch.tensor(prompt[:-1], dtype=torch.long), more[row]])[None]
        assert_close(logits[row], model(sequence)[0, -6:])


@torch.no_grad()
def test_rows_continue_correctly_after_append_and_select(engine, model):
    a, b, c = (random_ids(1, n, seed=n)[0].tolist() for n in (3, 80, 17))
    cache = prefill(engine, [a, b])
    cache.append(prefill(engine, [c]), [0, 0])  # a b c c
    cache.select([3, 1, 1, 0])  # c b b a
    cache.append(prefill(engine, [[], b]), [1, 0])  # c b b a b -
    cache.select([1, 5, 0])  # b - c
    assert cache.lengths == [80, 0, 17]
    more = random_ids(3, 2)
    logits = model(more, kv_cache=cache)
    for row, prompt in enumerate((b, [], c)):
        assert_close(logits[row], model(torch.tensor([prompt + more[row].tolist()]))[0, -2:])


def decoder_model(dtype, n_kv_head=4, n_embd=64):
    shape = dict(sequence_len=512, n_layer=3, n_head=4, n_kv_head=n_kv_head, n_embd=n_embd)
    model = random_model(std=0.1, seed=3, **shape)
    return model.to(dtype).requires_grad_(False)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 5e-5), (torch.bfloat16, 0.15)])
@pytest.mark.parametrize("n_kv_head, n_embd", [(4, 64), (2, 64), (1, 96), (4, 416)])  # heads of 16, 24 and 104
def test_cpu_decoder_gives_the_models_logits(n_kv_head, n_embd, dtype, tolerance):
    model = decoder_model(dtype, n_kv_head, n_embd)
    addresses = {n: p.data_ptr() for n, p in model.named_parameters()}
    prompts = [random_ids(1, n)[0].tolist() for n in (9, 20, 14)]
    expected = [model(torch.tensor([prompt]), last_only=True)[0, -1] for prompt in prompts]
    engine = Engine(model, ByteTokenizer())
    for rows in ([0], [0, 1, 2], [1, 1]):  # one row, rows of unequal lengths, rows of equal length
        cache = prefill(engine, [prompts[i][:-1] for i in rows])
        logits = engine.backend.forward([prompts[i][-1:] for i in rows], cache)
        torch.testing.assert_close(logits, torch.stack([expected[i] for i in rows]), atol=tolerance, rtol=0)
    cache = prefill(engine, [prompt[:-3] for prompt in prompts])
    engine.backend.fill([prompt[-3:-1] for prompt in prompts], cache)  # a chunk after rows of unequal lengths
    logits = engine.backend.forward([prompt[-1:] for prompt in prompts], cache)
    torch.testing.assert_close(logits, torch.stack(expected), atol=tolerance, rtol=0)
    again = model(torch.tensor([prompts[0]]), last_only=True)[0, -1]
    torch.testing.assert_close(again, expected[0], atol=0, rtol=0)
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == addresses  # the engine changed nothing in it


@pytest.mark.parametrize("int8", [False, True])
def test_logits_of_a_row_are_bit_identical_in_every_batch(int8):
    model = decoder_model(torch.bfloat16)
    if int8:
        quantize(model)
    backend = CPUBackend(model)
    prompts = [random_ids(1, n, seed=n)[0].tolist() for n in range(3, 14)]

    def logits(prompts, chunk=512):
        cache = KVCache(3, rows=len(prompts))
        for i in range(0, max(map(len, prompts)) - 1, chunk):
            backend.fill([prompt[:-1][i : i + chunk] for prompt in prompts], cache)
        return backend.forward([prompt[-1:] for prompt in prompts], cache)

    batched = logits(prompts)
    for prompt, row in zip(prompts, batched, strict=True):
        assert torch.equal(logits([prompt])[0], row)
    assert torch.equal(logits(prompts, chunk=2), batched)


def test_int8_logits_are_close_and_equal_those_of_the_quantized_model():
    full, model = decoder_model(torch.float32, n_embd=128), decoder_model(torch.float32, n_embd=128)
    quantize(model)
    ids, backend, cache = random_ids(1, 40), CPUBackend(model), KVCache(3, rows=1)
    backend.fill(ids[:, :-1].tolist(), cache)
    logits = backend.forward(ids[:, -1:].tolist(), cache)[0]
    torch.testing.assert_close(logits, model(ids)[0, -1], atol=0.03, rtol=0)  # score() runs the PyTorch model
    error = (logits - full(ids)[0, -1]).abs().max()
    assert 0 < error < 0.5, error


class NoSpecialTokens(ByteTokenizer):
    """No token ends an answer or calls the calculator."""

    def encode_special(self, name):
        return -1

    def get_bos_token_id(self):
        return -1


def test_greedy_tokens_equal_those_of_transformers_generate():
    model = decoder_model(torch.float32, n_kv_head=2, n_embd=128)
    hf = transformers_model(model)
    prompts = [random_ids(1, n, seed=n)[0].tolist() for n in range(1, 21)]
    engine = Engine(model, NoSpecialTokens())
    requests = [Request(prompt, max_tokens=64, temperature=0) for prompt in prompts]
    rows = {row.request: row.tokens for row in engine.generate_many(requests)}
    for prompt, request in zip(prompts, requests, strict=True):
        ids = torch.tensor([prompt])
        settings = dict(max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0)
        expected = hf.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :]
        assert rows[request] == expected.tolist()


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
def test_200_requests_get_the_same_tokens_alone_and_in_batches(dtype):
    rng = random.Random(5)
    engine = Engine(decoder_model(dtype), NoSpecialTokens(), prefix_tokens=2000)
    requests = [
        Request(random_ids(1, rng.randint(1, 240), seed=i)[0].tolist(), 24, rng.choice([0, 0.8]), top_k=20, seed=i)
        for i in range(200)
    ]
    batched = {row.request: row.tokens for row in engine.generate_many(requests, max_rows=24)}
    single = {
        request: next(Engine(engine.model, NoSpecialTokens()).generate_many([request])).tokens for request in requests
    }
    assert batched == single


def many_requests():
    rng = random.Random(7)
    settings = [(random_ids(1, rng.randint(1, 90), seed=i)[0].tolist(), rng.randint(1, 160)) for i in range(40)]
    return [Request(prompt, n, rng.choice([0, 1.0]), seed=i) for i, (prompt, n) in enumerate(settings)]


@pytest.mark.parametrize("n_kv_head", [pytest.param(4, marks=pytest.mark.slow), 2])
def test_decode_steps_of_fixed_shape_give_the_same_tokens(n_kv_head):
    """The CUDA graph backend with uncaptured steps: each runs on all rows and a power of two of columns."""
    model, requests, recorded = decoder_model(torch.float32, n_kv_head), many_requests(), []
    plain = Engine(model, NoSpecialTokens(), backend=TorchBackend(model))
    static = Engine(model, NoSpecialTokens(), backend=CUDAGraphBackend(model))
    expected = {row.request: row.tokens for row in plain.generate_many(requests, max_rows=6)}

    def record(step):  # replaces the capture of a graph
        recorded.append(step.columns)
        step.run()  # as the warm-up before a capture does
        return step.run

    static.backend.record = record
    assert {row.request: row.tokens for row in static.generate_many(requests, max_rows=6)} == expected
    assert len(set(recorded)) > 1


@pytest.mark.gpu
def test_cuda_graphs_give_the_same_tokens(capsys):
    model, requests = decoder_model(torch.float32).cuda(), many_requests()
    plain, graphs = Engine(model, NoSpecialTokens(), backend=TorchBackend(model)), Engine(model, NoSpecialTokens())
    expected = {row.request: row.tokens for row in plain.generate_many(requests, max_rows=6)}
    actual = {row.request: row.tokens for row in graphs.generate_many(requests, max_rows=6)}
    assert graphs.backend.graphs and not capsys.readouterr().err
    differing = sum(actual[request] != expected[request] for request in requests)
    assert differing <= 1  # two logits may be equal up to rounding


def test_row_does_not_depend_on_earlier_rows_of_its_slot(engine):
    prompts = [random_ids(1, n, seed=n)[0].tolist() for n in (50, 3)]
    single = list(engine.generate_many([Request(prompts[1], max_tokens=20, temperature=0)]))[0].tokens
    rows = list(engine.generate_many([Request(p, max_tokens=20, temperature=0) for p in prompts], max_rows=1))
    assert rows[1].tokens == single


# ---------------------------------------------------------------------------------------------------------------------
# Generation


def naive_greedy(model, tokens, max_tokens):
    """The prompt and its greedy answer by full forward passes."""
    generated = []
    for token in model.generate(tokens, max_tokens, temperature=0):
        if token in (BOS, END):
            break
        generated.append(token)
    return tokens + generated


def test_greedy_answers_equal_those_of_full_forward_passes(engine, model):
    for n in (1, 2, 30):
        prompt = random_ids(1, n, seed=n)[0].tolist()
        results, masks = engine.generate_batch(prompt, num_samples=2, max_tokens=40, temperature=0)
        assert results == [naive_greedy(model, prompt, 40)] * 2
        assert masks == [[0] * n + [1] * (len(results[0]) - n)] * 2


def test_next_logits_of_unequal_prompts_equal_full_forward_passes(engine, model):
    prompts = [random_ids(1, n, seed=n)[0].tolist() for n in (1, 40, 7)]
    with torch.no_grad():
        expected = torch.cat([model(torch.tensor([p]))[:, -1] for p in prompts])
    assert_close(engine.next_logits(prompts), expected)


@pytest.mark.parametrize("max_rows", [1, 3, 64])
def test_row_is_independent_of_its_batch(engine, max_rows):
    settings = [dict(temperature=0), dict(temperature=1.0, top_k=5), dict(temperature=0.7), dict(temperature=1.3)]
    requests = [
        Request(random_ids(1, 1 + 3 * i, seed=i)[0].tolist(), max_tokens=5 + 2 * i, seed=i % 3, **settings[i % 4])
        for i in range(12)
    ]
    requests[5] = Request(requests[5].tokens, max_tokens=9, num_samples=5, seed=1)
    single = {}
    for request in requests:
        single |= {(request, row.sample): row.tokens for row in engine.generate_many([request])}
    batched = {(row.request, row.sample): row.tokens for row in engine.generate_many(requests, max_rows)}
    assert batched == single and len(single) == 16


def test_samples_differ_and_are_reproducible_from_the_seed(engine):
    prompt = random_ids(1, 5)[0].tolist()
    batch = dict(num_samples=8, max_tokens=12, temperature=1.0)
    first = engine.generate_batch(prompt, seed=1, **batch)[0]
    assert len({tuple(r) for r in first}) == 8
    assert engine.generate_batch(prompt, seed=1, **batch)[0] == first
    assert engine.generate_batch(prompt, seed=2, **batch)[0] != first
    assert engine.generate_batch(prompt, seed=1, **(batch | {"num_samples": 3}))[0] == first[:3]


def test_first_tokens_follow_the_distribution():
    model = ScriptedModel(lambda sequence: [65, 66, 67, 68])  # four equally likely tokens
    firsts = [row.tokens[0] for row in Engine(model, ByteTokenizer()).generate_many(
        [Request([BOS], max_tokens=1, num_samples=2000)])]  # fmt: skip
    counts = [firsts.count(t) for t in (65, 66, 67, 68)]
    chi2 = sum((c - 500) ** 2 / 500 for c in counts)
    assert sum(counts) == 2000 and chi2 < 16.3  # 3 degrees of freedom, p = 0.001


def test_sampling_draws_from_softmax_with_temperature_and_top_k():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0, float("-inf")]])
    rngs = [row.rng for row in Engine(ScriptedModel(None), ByteTokenizer()).decode_loop(1).submit(
        Request([1], num_samples=20000))]  # fmt: skip
    for temperature, top_k, n_kept in ((1.0, None, 5), (0.5, 0, 5), (2.0, 2, 2), (1.0, 100, 5), (1.0, 1, 1)):
        drawn = sample(logits.expand(len(rngs), -1), temperature, top_k, rngs)
        frequencies = torch.bincount(torch.tensor(drawn), minlength=5) / len(rngs)
        truncated = logits.masked_fill(logits < logits.sort(descending=True).values[:, n_kept - 1], float("-inf"))
        torch.testing.assert_close(frequencies, (truncated / temperature).softmax(-1)[0], atol=0.015, rtol=0)
    assert sample(logits, 0, 3, rngs[:1]) == [2]
    assert sample(logits, 1e-300, None, rngs[:1]) == [2]


@pytest.mark.parametrize("size", [7, 1024, 5000])
@pytest.mark.parametrize("temperature, top_k", [(0, None), (1.0, None), (0.7, 50), (1.5, 3), (1.0, 1), (0.2, 4999)])
@pytest.mark.parametrize("top_p, min_p", [(1.0, 0.0), (0.9, 0.0), (0.3, 0.05), (1.0, 0.1), (1e-6, 0.0)])
def test_cpu_kernel_samples_the_same_tokens_as_sample_on_device(size, temperature, top_k, top_p, min_p):
    logits = 3 * torch.randn(500, size, generator=torch.Generator().manual_seed(size))
    uniforms = [random.Random(i).getrandbits(24) / 2**24 for i in range(500)]
    expected = sample_on_device(logits, uniforms, temperature, top_k, top_p, min_p)
    drawn = sample(logits, temperature, top_k, [random.Random(i) for i in range(500)], top_p, min_p)
    # A random number may lie on a boundary between two tokens, up to rounding.
    differing = (torch.tensor(drawn) != expected).sum()
    assert differing <= (0 if temperature == 0 else 2)


def test_ties_between_logits_go_to_the_lower_token_id():
    assert sample(torch.tensor([[1.0, 2.0, 2.0, 2.0, -0.0, 0.0]]), 0, None, [None]) == [1]
    drawn = {sample(torch.ones(1, 100), 1.0, 3, [random.Random(i)])[0] for i in range(99)}
    assert drawn == {0, 1, 2}


@pytest.mark.parametrize("bits, expected", [(0, 1), (2**23, 2), (2**24 - 1, 2)])
def test_extreme_random_numbers_select_no_token_of_probability_zero(bits, expected):
    logits = torch.tensor([[float("-inf"), 0.0, 0.0, float("-inf")]])
    rng = SimpleNamespace(getrandbits=lambda n: bits)
    assert sample(logits, 1.0, None, [rng]) == [expected]
    assert sample_on_device(logits, [bits / 2**24], 1.0, None, 1.0, 0.0).item() == expected


def test_generate_yields_columns_until_the_last_row_is_done(engine):
    prompt = random_ids(1, 4)[0].tolist()
    steps = list(engine.generate(prompt, num_samples=3, max_tokens=30, temperature=1.0, top_k=50, seed=3))
    results, masks = engine.generate_batch(prompt, num_samples=3, max_tokens=30, temperature=1.0, top_k=50, seed=3)
    for row in range(3):
        column, mask = [tokens[row] for tokens, _ in steps], [m[row] for _, m in steps]
        n = len(results[row]) - len(prompt)
        assert column[:n] == results[row][len(prompt) :]
        assert set(column[n + 1 :]) <= {END} and not any(mask[n + 1 :])
    assert max(map(len, results)) - len(prompt) in (len(steps), len(steps) - 1)


def test_model_can_be_trained_after_generating(model):
    model._rotary = None
    Engine(model, ByteTokenizer()).generate_batch([BOS], max_tokens=2)
    ids = random_ids(1, 8)
    model(ids, ids).backward()
    model.zero_grad()


# ---------------------------------------------------------------------------------------------------------------------
# End of generation


def test_assistant_end_and_bos_end_an_answer():
    for terminal in (END, BOS):
        script = answer([72, 105, terminal, 33])
        row = next(Engine(ScriptedModel(script), ByteTokenizer()).generate_many([Request([BOS], temperature=0)]))
        assert (row.finish, row.tokens, row.completion) == ("stop", [72, 105, terminal], [72, 105])


@pytest.mark.parametrize("prompt, max_tokens, expected", [(1, 5, 5), (1, None, 15), (10, 50, 6), (15, None, 1)])
def test_max_tokens_and_the_context_length_end_a_row(prompt, max_tokens, expected):
    model = ScriptedModel(lambda sequence: 65, sequence_len=16)
    request = Request([66] * prompt, max_tokens=max_tokens, temperature=0)
    row = next(Engine(model, ByteTokenizer()).generate_many([request]))
    assert (row.finish, row.completion) == ("length", [65] * expected)


def test_waiting_rows_replace_finished_ones():
    model = ScriptedModel(lambda sequence: 65)
    requests = [Request([66], max_tokens=n, temperature=0) for n in (2, 5, 1, 3)]
    rows = list(Engine(model, ByteTokenizer()).generate_many(requests, max_rows=3))
    assert [row.request.max_tokens for row in rows] == [1, 2, 3, 5]
    assert model.batch_sizes == [3, 3, 2, 2, 1]


def test_prompt_is_prefilled_once_for_all_samples():
    model = ScriptedModel(lambda sequence: 65)
    engine = Engine(model, ByteTokenizer())
    list(engine.generate_many([Request([66, 67, 68], max_tokens=3, num_samples=4) for _ in range(3)], max_rows=8))
    assert model.prefills == [(2, 2), (1, 2)]


def test_prefill_passes_are_bounded(monkeypatch):
    monkeypatch.setattr("nanochat.inference.scheduler.PREFILL_TOKENS", 8)
    monkeypatch.setattr("nanochat.inference.scheduler.PREFILL_CHUNK", 8)
    model = ScriptedModel(lambda sequence: 65)
    engine = Engine(model, ByteTokenizer())
    rows = list(engine.generate_many([Request([66] * n, max_tokens=2) for n in (3, 3, 5, 30, 1)]))
    assert [row.tokens for row in rows] == [[65, 65]] * 5
    assert model.prefills[:2] == [(2, 2), (1, 4)] and all(B * T <= 8 for B, T in model.prefills)


def test_long_prompt_does_not_stall_other_rows(monkeypatch):
    monkeypatch.setattr("nanochat.inference.scheduler.PREFILL_CHUNK", 8)
    model = ScriptedModel(lambda sequence: 65 + len(sequence) % 7)
    loop = Engine(model, ByteTokenizer()).decode_loop(4)
    (first,) = loop.submit(Request([66], max_tokens=20))
    loop.step()
    (second,) = loop.submit(Request([67] * 33, max_tokens=2))
    lengths = []  # of both rows after each step
    while loop.busy:
        loop.step()
        lengths.append((len(first.tokens), len(second.tokens)))
    assert lengths[:6] == [(2, 0), (3, 0), (4, 0), (5, 1), (6, 2), (7, 2)]
    assert model.prefills == [(1, 8)] * 4 and second.tokens == [65 + 33 % 7, 65 + 34 % 7]


def test_rows_can_be_cancelled_in_every_state(monkeypatch):
    monkeypatch.setattr("nanochat.inference.scheduler.PREFILL_CHUNK", 8)
    model = ScriptedModel(lambda sequence: 65)
    loop = Engine(model, ByteTokenizer()).decode_loop(2)
    decoding = loop.submit(Request([66]))
    loop.step()
    prefilling, waiting = (loop.submit(Request([66] * n)) for n in (40, 2))
    loop.step()
    assert loop.joining and len(loop.waiting) == 1
    loop.cancel([*decoding, *prefilling, *waiting])
    assert loop.step() == [] and loop.step() == [] and not loop.busy
    assert [row.finish for row in (*decoding, *prefilling, *waiting)] == ["cancelled"] * 3


def test_prompt_reuses_the_cached_prefix(model):
    engine = Engine(model, ByteTokenizer(), prefix_tokens=300)
    plain = Engine(model, ByteTokenizer())
    turns = [random_ids(1, n)[0].tolist() for n in (40, 30)]
    loop = engine.decode_loop(4)
    history, cached_tokens = [], []
    for turn in turns:
        history += turn
        (row,) = loop.submit(Request(history, max_tokens=8, temperature=0))
        while loop.busy:
            loop.step()
        (single,) = plain.generate_many([Request(history, max_tokens=8, temperature=0)])
        assert row.tokens == single.tokens
        cached_tokens.append(row.cached)
        history = history + row.tokens
    assert cached_tokens == [0, 40 + 8 - 1]
    (row,) = loop.submit(Request(history[:20] + [1, 2, 3], max_tokens=2))
    loop.step()
    assert row.cached == 20  # the common prefix with an earlier prompt


def test_prefix_cache_is_bounded_and_evicts_the_least_recently_used():
    engine = Engine(ScriptedModel(lambda sequence: 65), ByteTokenizer(), prefix_tokens=60)
    loop = engine.decode_loop(1)

    def cached(token, n=24):
        """Number of cached tokens that a prompt of `n` equal tokens reuses."""
        (row,) = loop.submit(Request([token] * n, max_tokens=1))
        while loop.busy:
            loop.step()
        return row.cached

    assert [cached(66), cached(67), cached(66), cached(68), cached(66), cached(67)] == [0, 0, 23, 0, 23, 0]
    assert engine.prefix_cache.num_tokens <= 60 and cached(69, n=63) == 0 and engine.prefix_cache.num_tokens <= 60


def test_top_p_and_min_p_drop_unlikely_tokens():
    # In order of probability, the tokens are 1, 3, 0, 2.
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log().repeat(4000, 1)[:, [2, 0, 3, 1]]
    rngs = [random.Random(i) for i in range(4000)]

    def frequencies(**settings):
        drawn = torch.tensor(sample(logits, 1.0, None, rngs, **settings))
        return [round((drawn == token).float().mean().item(), 1) for token in (1, 3, 0, 2)]

    assert frequencies(top_p=0.7) == [0.7, 0.3, 0, 0]
    assert frequencies(top_p=0.5) == [1, 0, 0, 0]
    assert frequencies(min_p=0.29) == [0.6, 0.3, 0.2, 0]
    assert frequencies(min_p=1.0) == [1, 0, 0, 0]


def test_penalties_and_biases_change_the_logits_of_one_row_only():
    logits = torch.tensor([1.0, 2.0, -1.0, 0.5])
    request = Request([0], repetition_penalty=2.0)
    assert apply_penalties(logits, request, [2, 2]).tolist() == [0.5, 2.0, -2.0, 0.5]
    request = Request([0], frequency_penalty=0.5, presence_penalty=0.25)
    assert apply_penalties(logits, request, [2, 2, 3]).tolist() == [1.0, 2.0, -2.25, -0.25]
    assert apply_penalties(logits, Request([0], logit_bias={1: -100, 3: 4.0}), []).tolist() == [1.0, -98.0, -1.0, 4.5]
    assert logits.tolist() == [1.0, 2.0, -1.0, 0.5]
    engine = Engine(ScriptedModel(lambda sequence: 65), ByteTokenizer())
    requests = [Request([66], max_tokens=2, temperature=0, logit_bias=bias) for bias in (None, {65: -200, 70: 5.0})]
    assert sorted(row.tokens for row in engine.generate_many(requests)) == [[65, 65], [70, 70]]


def test_log_probabilities_equal_those_of_a_full_forward_pass(engine, model):
    prompt = random_ids(1, 20)[0].tolist()
    (row,) = engine.generate_many([Request(prompt, max_tokens=5, temperature=2.0, top_k=9, logprobs=3)])
    sequence = prompt + row.tokens
    expected = model(torch.tensor([sequence]))[0].log_softmax(-1)
    for i, (token, (own, top)) in enumerate(zip(row.tokens, row.logprobs, strict=True)):
        at = expected[len(prompt) + i - 1]
        assert own == pytest.approx(at[token].item(), abs=1e-4)
        assert [t for t, _ in top] == at.topk(3).indices.tolist()
    scores = engine.score(sequence, top=0)
    assert scores[0] is None and scores[-5:] == [(pytest.approx(own, abs=1e-4), []) for own, _ in row.logprobs]


@pytest.mark.parametrize(
    "stop, expected, n",
    [
        (("lo w",), "hel", 7),
        (("world!", "or"), "hello w", 9),
        (("xyz",), "hello world", 12),
        (("h",), "", 1),
        (("d", "ld"), "hello wor", 11),
    ],
)
def test_stop_strings_end_a_row_and_are_not_part_of_its_text(stop, expected, n):
    engine = Engine(ScriptedModel(answer([*b"hello world", END])), ByteTokenizer())
    (row,) = engine.generate_many([Request([BOS], temperature=0, stop=stop)])
    assert (row.finish, len(row.tokens)) == ("stop", n)
    stream = Detokenizer(engine.tokenizer, stop)
    pieces = [stream.push(token)[1] for token in row.tokens]
    assert "".join(pieces) + stream.flush()[1] == expected
    assert all(expected.startswith("".join(pieces[:i])) for i in range(len(pieces)))  # never a part of the stop string


def test_stop_tokens_end_a_row():
    engine = Engine(ScriptedModel(answer([*b"hello", END])), ByteTokenizer())
    (row,) = engine.generate_many([Request([BOS], temperature=0, stop_tokens=frozenset(b"o"))])
    assert bytes(row.completion) == b"hell" and row.finish == "stop"


@pytest.mark.parametrize(
    "request_, message",
    [
        (dict(tokens=[1] * 16), "16 tokens; the model's context of 16"),
        (dict(tokens=[1] * 40), "40 tokens"),
        (dict(tokens=[]), "empty"),
        (dict(tokens=[1], max_tokens=0), "max_tokens=0"),
        (dict(tokens=[1], temperature=-1), "temperature=-1"),
        (dict(tokens=[1], temperature=float("nan")), "temperature=nan"),
        (dict(tokens=[1], top_k=-1), "top_k=-1"),
        (dict(tokens=[1], num_samples=0), "num_samples=0"),
        (dict(tokens=[1], top_p=0), "top_p=0"),
        (dict(tokens=[1], min_p=1.5), "min_p=1.5"),
        (dict(tokens=[1], repetition_penalty=0), "repetition_penalty=0"),
        (dict(tokens=[1], stop=("",)), "stop string is empty"),
    ],
)
def test_invalid_requests_raise_user_errors(request_, message):
    engine = Engine(ScriptedModel(None, sequence_len=16), ByteTokenizer())
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        engine.generate_batch(**request_)


# ---------------------------------------------------------------------------------------------------------------------
# The calculator in the loop


def generate_scripted(parts, **settings):
    """The row of a model that generates `parts`, a list of token ids and strings."""
    ids = []
    for part in parts:
        ids += [part] if isinstance(part, int) else list(part.encode())
    engine = Engine(ScriptedModel(answer(ids)), ByteTokenizer())
    return next(engine.generate_many([Request([BOS], temperature=0, **settings)]))


def test_calculator_result_is_forced_into_the_row():
    # Forced tokens replace what the model generates, here "????".
    row = generate_scripted(["a", PYTHON, "0.2*50", PYTHON_END, "????", "b"])
    forced = [OUTPUT, *b"10", OUTPUT_END]
    assert row.completion == [*b"a", PYTHON, *b"0.2*50", PYTHON_END, *forced, *b"b"]
    assert row.mask[: len(row.completion)] == [1] * 9 + [0] * 4 + [1]


@pytest.mark.parametrize("call", ["import os", "1/0", ""])
def test_invalid_expression_gives_no_output(call):
    row = generate_scripted([PYTHON, call, PYTHON_END, "b"])
    assert row.completion == [PYTHON, *call.encode(), PYTHON_END, *b"b"] and all(row.mask)


def test_a_prompt_may_end_within_a_call():
    prompt, forced = [BOS, *b"a", PYTHON, *b"12*"], [OUTPUT, *b"84", OUTPUT_END]
    script = answer([*b"7", PYTHON_END, *forced, *b"b"], prompt_length=len(prompt))
    engine = Engine(ScriptedModel(script), ByteTokenizer())
    (results, _), (masks, _) = engine.generate_batch(prompt, num_samples=2)  # each sample has a call of its own
    assert results == [*prompt, *b"7", PYTHON_END, *forced, *b"b"]
    assert masks[len(prompt) :] == [1, 1, 0, 0, 0, 0, 1]


def test_unmatched_tool_tokens_are_harmless():
    for text in ([PYTHON_END, "1+1", PYTHON_END], [OUTPUT_END, OUTPUT], [PYTHON, "1+1"], [PYTHON, PYTHON, PYTHON_END]):
        assert all(generate_scripted(text).mask)
    assert generate_scripted([PYTHON, "1+1", PYTHON_END, "???", "*3", PYTHON_END, "b"]).mask.count(0) == 3
    assert generate_scripted([PYTHON, "9", PYTHON, "1+1", PYTHON_END, "???"]).tokens[-4:] == [
        OUTPUT,
        *b"2",
        OUTPUT_END,
        END,
    ]


def test_forced_tokens_do_not_exceed_max_tokens():
    row = generate_scripted([PYTHON, "9*99", PYTHON_END, "?????"], max_tokens=8)
    assert (row.finish, row.tokens[-3:], row.mask[-3:]) == ("length", [PYTHON_END, OUTPUT, ord("8")], [1, 0, 0])


def test_rows_with_and_without_tools_share_a_batch():
    def script(sequence):  # rows that start with "t" call the calculator
        ids = [PYTHON, *b"6*7", PYTHON_END, *b"????", END] if sequence[1:2] == [ord("t")] else [*b"plain talk", END]
        return ids[len(sequence) - 2]

    requests = [Request([BOS, ord(c)], temperature=0) for c in "ttxt"]
    rows = list(Engine(ScriptedModel(script), ByteTokenizer()).generate_many(requests, max_rows=3))
    for row in rows:
        call = [PYTHON, *b"6*7", PYTHON_END, OUTPUT, *b"42", OUTPUT_END]
        assert row.completion == (call if row.request.tokens[1] == ord("t") else [*b"plain talk"])


# ---------------------------------------------------------------------------------------------------------------------
# Text


@pytest.mark.parametrize("text", ["plain", "naïve £5 – 日本語 👩‍🚀!", "a\ufffdb", "é", ""])
def test_streamed_text_never_splits_a_character(text):
    stream = Detokenizer(ByteTokenizer())
    pieces = [stream.push(byte)[1] for byte in text.encode()]
    assert "".join(pieces) + stream.flush()[1] == text
    assert all("\ufffd" not in piece or "\ufffd" in text for piece in pieces)
    whole = "".join(pieces)
    assert whole == text or text.endswith("\ufffd")  # complete characters are emitted at once


def test_streamed_text_of_invalid_utf8_equals_the_decoded_text():
    tokenizer, rng = ByteTokenizer(), torch.Generator().manual_seed(0)
    for _ in range(300):
        ids = torch.randint(100, 256, (12,), generator=rng).tolist()
        ids[3:6] = "é日".encode()[:3]
        stream = Detokenizer(tokenizer)
        assert "".join([stream.push(i)[1] for i in ids] + [stream.flush()[1]]) == tokenizer.decode(ids)


def test_detokenizer_separates_calculator_parts_from_text():
    ids = [*b"So ", PYTHON, *b"6*7", PYTHON_END, OUTPUT, *b"42", OUTPUT_END, *b"it is 42", 0xC3, PYTHON, *b"1", END]
    stream = Detokenizer(ByteTokenizer())
    parts = [*map(stream.push, ids), stream.flush()]
    joined = {kind: "".join(t for k, t in parts if k == kind) for kind in ("text", "python", "python_output")}
    assert joined == {"text": "So it is 42\ufffd", "python": "6*71", "python_output": "42"}
    assert visible_text(ByteTokenizer(), ids) == joined["text"]
