"""
The forward pass on a CPU: a step of decoding, or prompts.

A step reads every weight once, and the memory sets its pace; the hundreds of small operations of the model's own
forward pass would take as long again. So the extension does all of it in one call (rustbpe/src/decoder.rs), from the
weights as they lie in torch's tensors, with activations in float32. Prompts take the same way: a row's logits are the
same to the bit whatever rows are beside it, and in whatever pieces its prompt came.
"""

import contextlib

import torch

from nanochat.gpt import NORM_EPS, SOFTCAP


class CPUDecoder:
    """
    Forward passes of `model`, a GPT on a CPU that is not trained any more: its weights are from here on views of ours.

    With `quantize` the blocks' matrices and the head are held in int8 too, with a scale for each row, and the model's
    own weights become what these stand for.
    """

    def __init__(self, model, quantize=False):
        import rustbpe

        c = self.config = model.config
        self.threads = torch.get_num_threads()
        self.model, self.kept = model, []  # tensors that the extension has the addresses of
        layers = []
        for block in model.transformer.h:
            attn = block.attn
            parts = [attn.c_q, attn.c_k, attn.c_v]
            qkv = torch.cat([part.weight.data for part in parts])
            for part, view in zip(parts, qkv.split([part.out_features for part in parts]), strict=True):
                part.weight.data = view  # so that nothing is held twice
            weights = [qkv, attn.c_proj.weight, block.mlp.c_fc.weight, block.mlp.c_proj.weight]
            layers.append([self._place(weight, quantize) for weight in weights])
        self.inner = rustbpe.Decoder(
            self._place(model.transformer.wte.weight),
            layers,
            self._place(model.lm_head.weight[: c.vocab_size], quantize),
            (c.n_head, c.n_kv_head, c.head_dim),
            NORM_EPS,
            SOFTCAP,
        )

    def _place(self, weight, quantize=False):
        """Where the extension finds a matrix."""
        weight, scales = weight.data, None
        if quantize:
            whole, scales = to_int8(weight)
            weight.copy_(whole * scales)
            weight = whole
        self.kept += [weight, scales]
        return name(weight.dtype), weight.data_ptr(), *weight.shape, 0 if scales is None else scales.data_ptr()

    def __call__(self, tokens, cache, logits=True):
        """
        Logits (B, V) in float32 after `tokens`, a list of one id for each row, which join `cache`.

        Without `logits` the lists may be of any lengths, and nothing is returned.
        """
        c, dtype = self.config, self.model.lm_head.weight.dtype
        counts = [len(ids) for ids in tokens]
        lengths = [n + new for n, new in zip(cache.lengths, counts, strict=True)]
        cache.reserve(len(tokens), max(lengths), c.n_kv_head, c.head_dim, dtype)
        cos, sin = self.model.rotary(max(lengths))
        out = torch.empty(sum(counts), c.vocab_size) if logits else None
        self.inner.forward(
            tokens,
            cache.lengths,
            (name(cache.data.dtype), cache.data.data_ptr(), cache.data.size(2), cache.data.size(4)),
            (cos.data_ptr(), sin.data_ptr()),
            out.data_ptr() if logits else None,
            self.threads,
        )
        cache.lengths = lengths
        return out


def name(dtype):
    return str(dtype).removeprefix("torch.")


def to_int8(weight):
    """(int8, scales): `weight` (n_out, n_in) in whole numbers, of which each row has a unit of its own (n_out, 1)."""
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
