"""The CPU kernels' Python API: tensors that do not fit are refused, and tensors that change are noticed."""

import pytest
import torch

from nanochat.gpt import GPT, GPTConfig
from nanochat.inference.cpu_backend import CPUBackend
from nanochat.inference.kv_cache import KVCache

VOCAB = 265


def small_model():
    torch.manual_seed(3)
    model = GPT(GPTConfig(sequence_len=512, vocab_size=VOCAB, n_layer=3, n_head=4, n_kv_head=4, n_embd=64))
    model.init_weights("cpu")
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model.requires_grad_(False)


def test_the_decoder_refuses_tokens_and_caches_that_do_not_fit():
    backend = CPUBackend(small_model())
    decoder = backend.decoder
    with pytest.raises(ValueError, match="token 100000"):
        backend.forward([[100_000]], KVCache(3, rows=1))
    cache, cos, sin = torch.zeros(3, 2, 1, 4, 7, 16), *(torch.zeros(512, 8) for _ in range(2))
    decoder.forward([[1]], [6], cache, cos, sin, None, 1)
    for lengths, arguments, message in [
        ([7], (cache, cos, sin, None), "cache of 1 rows and 7 columns is too small"),
        ([6], (cache.double(), cos, sin, None), "cache: dtype torch.float64 given, float32 or bfloat16 expected"),
        ([6], (cache.transpose(3, 4), cos, sin, None), "cache: strides .* a contiguous tensor expected"),
        ([6], (cache[:2], cos, sin, None), r"cache: shape \[2, 2, 1, 4, 7, 16\] given"),
        ([6], (cache.to("meta"), cos, sin, None), "cache: a tensor on meta given, one on the CPU expected"),
        ([6], (cache, cos[:6], sin, None), "cos: 48 elements given, 56 expected"),
        ([6], (cache, cos, sin[:, :4].contiguous(), None), r"sin: shape \[512, 4\] given"),
        ([6], (cache, cos, sin, torch.zeros(2, VOCAB)), r"logits: shape \[2, \d+\] given, \(1, \d+\) expected"),
        ([6], (cache, cos, cache.flatten()[: 7 * 8].view(7, 8), None), "share memory"),
    ]:
        with pytest.raises(ValueError, match=message):
            decoder.forward([[1]], lengths, *arguments, 1)
    with pytest.raises(TypeError, match="cache: expected a torch.Tensor"):
        decoder.forward([[1]], [6], [1.0], cos, sin, None, 1)


def test_the_decoder_notices_what_happens_to_a_tensor_between_calls():
    backend = CPUBackend(small_model())
    decoder = backend.decoder
    cos, sin = backend.model.rotary(8)
    cache = torch.zeros(3, 2, 1, 4, 7, 16)
    for _ in range(3):
        decoder.forward([[1]], [6], cache, cos, sin, None, 1)
    cache.data = torch.zeros(3, 2, 1, 4, 3, 16)
    with pytest.raises(ValueError, match="cache of 1 rows and 3 columns is too small"):
        decoder.forward([[1]], [6], cache, cos, sin, None, 1)
    before = backend.forward([[1]], KVCache(3, rows=1))
    backend.model.double()  # assigns new storages to the parameters; the decoder keeps its own
    backend.model.lm_head.weight.data = backend.model.lm_head.weight.data.float()
    assert torch.equal(backend.forward([[1]], KVCache(3, rows=1)), before)


def test_the_decoder_refuses_weights_that_do_not_fit_together():
    import rustbpe

    model = small_model()
    block = model.transformer.h[0]
    attn, mlp = block.attn, block.mlp
    layer = [attn.c_q, attn.c_k, attn.c_v, attn.c_proj, mlp.c_fc, mlp.c_proj]
    layer = [module.weight for module in layer]
    int8 = (torch.zeros(64, 64, dtype=torch.int8), torch.ones(64, 1))

    def decoder(layer, n_kv_head=4):
        wte, head = model.transformer.wte.weight, model.lm_head.weight
        return rustbpe.Decoder(wte, [tuple(layer)], head, 4, n_kv_head, 16, 1e-5, 15.0)

    decoder(layer)
    decoder([int8, *layer[1:]])
    for changed, message in [
        ([layer[0][:32], *layer[1:]], r"layer 0, q: shape \[32, 64\] given, \[64, 64\] expected"),
        ([layer[0].half(), *layer[1:]], "q: dtype torch.float16 given, float32 or bfloat16 expected"),
        ([(int8[0].float(), int8[1]), *layer[1:]], "q: dtype torch.float32 given, int8 expected"),
        ([(int8[0], int8[1][:3]), *layer[1:]], r"q: shape \[3, 1\] given, scales \(64\) or \(64, 1\) expected"),
        ([layer[0].t(), *layer[1:]], "contiguous"),
    ]:
        with pytest.raises(ValueError, match=message):
            decoder(changed)
    with pytest.raises(ValueError, match="n_kv_head=3: expected a divisor of n_head"):
        decoder(layer, n_kv_head=3)


def test_logits_that_cannot_be_sampled_are_refused():
    import rustbpe

    logits = torch.zeros(2, 5)
    assert rustbpe.sample(logits, [0.0, 0.0], 0.0, 0, 1.0, 0.0) == [0, 0]
    for logits, message in [
        (torch.zeros(3, 5), r"logits: shape \[3, 5\] given, \(2, vocab_size\) expected"),
        (torch.zeros(2, 0), "shape"),
        (torch.zeros(2, 5).double(), "float64"),
        (torch.zeros(5, 2).t(), "contiguous"),
    ]:
        with pytest.raises(ValueError, match=message):
            rustbpe.sample(logits, [0.0, 0.0], 1.0, 0, 1.0, 0.0)
