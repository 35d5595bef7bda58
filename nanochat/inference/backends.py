"""
Backends run a model's forward pass for inference. There are three, with one interface:

    TorchBackend        any device, any model; also a model that is being trained
    CPUBackend          the extension's CPU kernels (cpu_backend.py)
    CUDAGraphBackend    decode steps replayed as CUDA graphs (cuda_graphs.py)
"""

import contextlib

import torch

from nanochat.inference.kv_cache import KVCache


class TorchBackend:
    """The model's own forward pass, under `compute`'s autocast (None = in the dtype of the weights)."""

    def __init__(self, model, compute=None):
        self.model, self.compute = model, compute

    def new_cache(self, rows=0):
        return KVCache(self.model.config.n_layer, rows, self.model.get_device())

    def precision(self):
        return self.compute.autocast() if self.compute else contextlib.nullcontext()

    def limit_threads(self):
        """Context manager for the small torch operations around a forward pass; some backends limit torch's threads."""
        return contextlib.nullcontext()

    def fill(self, tokens, cache):
        """Prefill: append `tokens`, one list of any length per row, to `cache`; computes no logits."""
        if any(tokens):
            self.hidden(tokens, cache, fill_only=True)

    def hidden(self, tokens, cache, fill_only=False):
        """
        Append `tokens`, one list of any length per row, to `cache`; returns the model's final activations (B, T, C).

        T is the length of the longest list; activations after the end of a shorter one are meaningless. With
        `fill_only` the result is None.
        """
        lengths = [n + len(new) for n, new in zip(cache.lengths, tokens, strict=True)]
        with self.precision():
            x = self.model.hidden(pad(tokens, self.model.get_device()), cache, fill_only=fill_only)
        cache.lengths = lengths  # without the padding
        return x

    def forward(self, tokens, cache):
        """Append `tokens`, a list of one token per row, to `cache`; returns the logits (B, V) after them."""
        with self.precision():
            return self.model(torch.tensor(tokens, device=self.model.get_device()), kv_cache=cache)[:, -1]


def pad(rows, device):
    """Token ids (B, T) of rows of any lengths. Padding is on the right, where causal attention ignores it."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
