"""
The forward pass by the extension's CPU kernels (rustbpe/kernels).

Decoding is memory-bandwidth-bound: a step reads every weight once. One call per step avoids the overhead of the
hundreds of small operations in PyTorch's forward pass. Weights are read in place, activations are float32. A row's
logits are bit-identical in any batch, however its prompt is cut into pieces.
"""

import contextlib

import torch

from nanochat.gpt import NORM_EPS, SOFTCAP
from nanochat.inference.backends import TorchBackend


class CPUBackend(TorchBackend):
    """Runs `model`, a GPT on the CPU. Layers that quantize() rounded are read as int8."""

    def __init__(self, model, compute=None):
        import rustbpe

        super().__init__(model, compute)
        c, self.threads = model.config, torch.get_num_threads()
        names = "attn.c_q attn.c_k attn.c_v attn.c_proj mlp.c_fc mlp.c_proj".split()
        layers = [[matrix(block.get_submodule(name)) for name in names] for block in model.transformer.h]
        embedding, head = model.transformer.wte.weight.data, matrix(model.lm_head, c.vocab_size)
        self.empty_keys = model.lm_head.weight.new_empty(c.n_kv_head, 0, c.head_dim)
        self.decoder = rustbpe.Decoder(embedding, layers, head, c.n_head, c.n_kv_head, c.head_dim, NORM_EPS, SOFTCAP)

    @contextlib.contextmanager
    def limit_threads(self):
        """Context in which torch runs on one thread: its idle workers would spin on the cores the kernels use next."""
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(self.threads)

    def fill(self, tokens, cache, logits=None):
        """Append `tokens`, one list of any length per row, to `cache`; writes `logits` (B, V) if given."""
        lengths = [held + len(new) for held, new in zip(cache.lengths, tokens, strict=True)]
        cache.reserve(len(tokens), max(lengths), self.empty_keys)
        self.decoder.forward(tokens, cache.lengths, cache.data, *self.model.rotary(max(lengths)), logits, self.threads)
        cache.lengths = lengths

    def forward(self, tokens, cache):
        """Append `tokens`, a list of one token per row, to `cache`; returns the logits (B, V) after them."""
        logits = torch.empty(len(tokens), self.model.config.vocab_size)
        self.fill(tokens, cache, logits)
        return logits


def matrix(linear, rows=None):
    """A layer's weight for the kernels: the tensor (n_out, n_in), or (int8 weight, float32 scales (n_out, 1))."""
    int8 = getattr(linear, "int8", None)
    return tuple(tensor[:rows] for tensor in int8) if int8 else linear.weight.data[:rows]


@torch.no_grad()
def quantize(model):
    """
    Round the embedding, the blocks' matrices and the head to int8, with one scale per row, in place.

    The weights become the dequantized values in float32, so every backend computes the same model. Layers get an
    attribute `int8`: (rounded weight, scales (rows, 1)).
    """
    model.float()  # bfloat16 cannot hold an int8 times its scale
    for layer in [module for module in model.modules() if isinstance(module, (torch.nn.Linear, torch.nn.Embedding))]:
        scales = layer.weight.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
        layer.int8 = (layer.weight / scales).round().to(torch.int8), scales
        layer.weight.copy_(layer.int8[0] * scales)
