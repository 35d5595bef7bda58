"""
The inference API: prompts in, tokens out. nanochat/inference/ implements it.

    engine = Engine(model, tokenizer, compute)
    results, masks = engine.generate_batch(tokens, num_samples=4, max_tokens=64)

generate() streams tokens, generate_batch() returns complete answers, generate_many() batches many requests.
"""

import torch

from nanochat.gpt import GPT
from nanochat.inference.backends import TorchBackend
from nanochat.inference.cpu_backend import CPUBackend
from nanochat.inference.cuda_graphs import CUDAGraphBackend
from nanochat.inference.detokenizer import Detokenizer, visible_text
from nanochat.inference.kv_cache import KVCache, PrefixCache, common_prefix_length
from nanochat.inference.sampling import MIN_TEMPERATURE, Request, log_probabilities, sample
from nanochat.inference.scheduler import DecodeLoop, Prefill, Row, terminal_tokens


def default_backend(model, compute=None):
    """The fastest backend for `model` on its device. Kernels and graphs need a GPT whose weights are not trained."""
    frozen = isinstance(model, GPT) and not model.lm_head.weight.requires_grad
    by_device = {"cpu": CPUBackend, "cuda": CUDAGraphBackend} if frozen else {}
    return by_device.get(model.get_device().type, TorchBackend)(model, compute)


class Engine:
    """
    Generates with `model`; `compute` (nanochat.common.Compute) sets the precision, None = the dtype of the weights.

    `backend`: a TorchBackend, CPUBackend or CUDAGraphBackend; None = default_backend(). The prefix cache stores keys
    and values of up to `prefix_tokens` tokens of finished rows, for later prompts; 0 = no prefix cache.
    """

    def __init__(self, model, tokenizer, compute=None, prefix_tokens=0, backend=None):
        self.model, self.tokenizer, self.compute = model, tokenizer, compute
        self.backend = backend or default_backend(model, compute)
        self.assistant_end, self.terminals = tokenizer.encode_special("<|assistant_end|>"), terminal_tokens(tokenizer)
        self.prefix_cache = PrefixCache(prefix_tokens)

    def decode_loop(self, max_rows, gather=1):
        """A DecodeLoop on this engine's backend and prefix cache."""
        return DecodeLoop(self.backend, self.tokenizer, max_rows, self.prefix_cache, gather)

    def generate(self, tokens, num_samples=1, max_tokens=None, temperature=1.0, top_k=None, seed=42):
        """
        Yield (tokens, masks) per step, two lists with one entry per sample; mask 1 = sampled, 0 = forced.

        A row's last token is <|assistant_end|> or <|bos|>, unless it reached `max_tokens`. Finished rows yield
        <|assistant_end|> and mask 0 until all rows are done.
        """
        loop, step = self.decode_loop(num_samples), 0
        rows = loop.submit(Request(tokens, max_tokens, temperature, top_k, seed, num_samples))
        while loop.busy:
            loop.step()
            tokens = [row.tokens[step] if step < len(row.tokens) else self.assistant_end for row in rows]
            yield tokens, [row.mask[step] if step < len(row.mask) else 0 for row in rows]
            step += 1

    def generate_batch(self, tokens, num_samples=1, **settings):
        """(sequences, masks) of all samples, prompt included, terminal token excluded; mask 1 = sampled."""
        request = Request(tokens, num_samples=num_samples, **settings)
        rows = sorted(self.generate_many([request], max_rows=num_samples), key=lambda row: row.sample)
        results = [tokens + row.completion for row in rows]
        return results, [[0] * len(tokens) + row.mask[: len(row.completion)] for row in rows]

    def generate_many(self, requests, max_rows=64):
        """Yield the finished rows of many requests, as they finish; at most `max_rows` are decoded at once."""
        loop = self.decode_loop(max_rows, gather=max_rows // 8)
        for request in requests:
            loop.submit(request)
        while loop.busy:
            yield from (row for row in loop.step() if row.finish)

    @torch.inference_mode()
    def next_logits(self, prompts):
        """Logits (B, V) after each of `prompts`, lists of at least one token."""
        prefill = Prefill(self.backend, [prompt[:-1] for prompt in prompts], self.backend.new_cache())
        while not prefill.done:
            prefill.advance()
        return self.backend.forward([prompt[-1:] for prompt in prompts], prefill.cache)

    @torch.inference_mode()
    def score(self, tokens, top):
        """log_probabilities() of each token given the tokens before it; None for the first."""
        with TorchBackend(self.model, self.compute).precision():
            logits = self.model(torch.tensor([tokens], device=self.model.get_device()))[0, :-1]
        return [None, *(log_probabilities(x, token, top) for x, token in zip(logits, tokens[1:], strict=True))]
