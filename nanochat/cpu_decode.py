"""
The forward pass on a CPU: decoding, or prefilling prompts.

Decoding is memory-bandwidth-bound, and the hundreds of small operations of the model's own forward pass would take as
long again. So the extension runs the whole pass in one call (rustbpe/kernels), on the weights in torch's tensors, with
float32 activations. A row's logits are the same to the bit whatever other rows are in the batch, and however its prompt
is split into chunks.
"""

import contextlib

import torch

from nanochat.gpt import NORM_EPS, SOFTCAP


class CPUDecoder:
    """
    Forward passes of `model`, a GPT on a CPU that is not being trained.

    With `quantize` the blocks' matrices and the head are also held in int8 with a scale per row, and the model's own
    weights become the dequantized ones.
    """

    def __init__(self, model, quantize=False):
        import rustbpe

        c = self.config = model.config
        self.threads = torch.get_num_threads()
        self.model = model

        def weights(parameter):
            return quantize_in_place(parameter.data) if quantize else parameter.data

        layers = []
        for block in model.transformer.h:
            attn, mlp = block.attn, block.mlp
            modules = (attn.c_q, attn.c_k, attn.c_v, attn.c_proj, mlp.c_fc, mlp.c_proj)
            layers.append(tuple(weights(module.weight) for module in modules))
        self.inner = rustbpe.Decoder(
            model.transformer.wte.weight.data,
            layers,
            weights(model.lm_head.weight[: c.vocab_size]),
            c.n_head,
            c.n_kv_head,
            c.head_dim,
            NORM_EPS,
            SOFTCAP,
        )

    def __call__(self, tokens, cache, logits=True):
        """
        Append `tokens`, a list of ids for each row, to `cache`; returns float32 logits (sum of tokens, V).

        With `logits=False` only the cache is filled, and the result is None.
        """
        c, dtype = self.config, self.model.lm_head.weight.dtype
        counts = [len(ids) for ids in tokens]
        lengths = [n + new for n, new in zip(cache.lengths, counts, strict=True)]
        cache.reserve(len(tokens), max(lengths), c.n_kv_head, c.head_dim, dtype)
        cos, sin = self.model.rotary(max(lengths))
        out = torch.empty(sum(counts), c.vocab_size) if logits else None
        self.inner.forward(tokens, cache.lengths, cache.data, cos, sin, out, self.threads)
        cache.lengths = lengths
        return out


def quantize_in_place(weight):
    """(int8, scales) of `weight` (n_out, n_in), which becomes what these stand for."""
    values, scales = to_int8(weight)
    weight.copy_(values * scales)
    return values, scales


def to_int8(weight):
    """(int8 (n_out, n_in), float32 scales (n_out, 1)) of `weight`, rounded to 127 steps of each row's largest value."""
    scales = weight.float().abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
    return (weight.float() / scales).round().to(torch.int8), scales


@contextlib.contextmanager
def torch_threads(n):
    """Let torch use `n` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)
