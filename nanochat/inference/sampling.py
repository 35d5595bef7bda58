"""Requests with their sampling settings, and sampling of the next token from the model's logits."""

import math
from collections import Counter
from dataclasses import dataclass

import torch

from nanochat.common import require

MIN_TEMPERATURE = 1e-5  # lower temperatures mean greedy decoding; logits lie within (-15, 15)


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt and its sampling settings. `max_tokens` includes forced tokens; None = up to the end of the context."""

    tokens: list[int]
    max_tokens: int | None = None
    temperature: float = 1.0  # 0 = greedy
    top_k: int | None = None  # 0 or None = off
    seed: int = 42
    num_samples: int = 1
    top_p: float = 1.0  # nucleus sampling (Holtzman et al. 2020); 1 = off
    min_p: float = 0.0  # minimum probability relative to the likeliest token's (Nguyen et al. 2024); 0 = off
    repetition_penalty: float = 1.0  # divides the logits of tokens in the prompt or answer (Keskar et al. 2019)
    frequency_penalty: float = 0.0  # subtracted from a token's logit once per occurrence in the answer
    presence_penalty: float = 0.0  # subtracted once if the token occurs in the answer
    logit_bias: dict[int, float] | None = None  # added to the logits of these tokens
    stop: tuple[str, ...] = ()  # strings that end the answer; not part of it
    stop_tokens: frozenset[int] = frozenset()
    logprobs: int | None = None  # log-probabilities of each sampled token and of this many alternatives; None = off

    def __post_init__(self):
        for name, valid, expected in (
            ("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "at least 1, or None = up to the context"),
            ("temperature", 0 <= self.temperature < math.inf, "0 (greedy) or more"),
            ("top_k", self.top_k is None or self.top_k >= 0, "0 (off) or more"),
            ("num_samples", self.num_samples >= 1, "at least 1"),
            ("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1 (off)"),
            ("min_p", 0 <= self.min_p <= 1, "0 (off) to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "more than 0 (1 = off)"),
        ):
            require(valid, f"{name}={getattr(self, name)}: expected {expected}")
        require(self.tokens, "the prompt is empty; give it at least one token (<|bos|>)")
        require("" not in self.stop, "a stop string is empty")

    @property
    def has_penalties(self):
        return any((self.repetition_penalty != 1, self.frequency_penalty, self.presence_penalty, self.logit_bias))


def apply_penalties(logits, request, generated):
    """A copy of `logits` (V,) with the request's penalties and biases; `generated` are the answer's tokens so far."""
    logits = logits.clone()
    if request.repetition_penalty != 1:
        ids = torch.tensor(sorted({*request.tokens, *generated}), device=logits.device)
        penalty, values = request.repetition_penalty, logits[ids]
        # An infinite logit would make every probability NaN.
        logits[ids] = torch.where(values > 0, values / penalty, values * penalty).clamp(-1e4, 1e4)
    for token, count in Counter(generated).items():
        logits[token] -= count * request.frequency_penalty + request.presence_penalty
    for token, bias in (request.logit_bias or {}).items():
        logits[token] += bias
    return logits


def sample(logits, temperature, top_k, rngs, top_p=1.0, min_p=0.0):
    """Token ids, a list of B, drawn from logits (B, V); row b uses one random number from rngs[b]."""
    temperature = 0 if temperature < MIN_TEMPERATURE else temperature
    # 24 random bits are exact in float32 and stay below 1, so the draw never falls past the last token.
    uniforms = [rng.getrandbits(24) / 2**24 for rng in rngs] if temperature else [0.0] * len(rngs)
    if logits.device.type == "cpu":
        import rustbpe

        return rustbpe.sample(logits.float().contiguous(), uniforms, temperature, top_k or 0, top_p, min_p)
    return sample_on_device(logits, uniforms, temperature, top_k, top_p, min_p).tolist()


def sample_on_device(logits, uniforms, temperature, top_k, top_p, min_p):
    """sample() in PyTorch, for logits on a GPU; returns a tensor (B,)."""
    if not temperature:
        return logits.argmax(-1)
    ids = None
    if top_k and top_k < logits.size(-1):
        logits, ids = logits.topk(top_k)
    elif top_p < 1:
        logits, ids = logits.sort(descending=True)
    probs = (logits / temperature).softmax(-1)
    if top_p < 1:
        outside = probs.cumsum(-1) - probs >= top_p
        outside[:, 0] = False  # always keep the likeliest token, whatever the rounding error
        probs = probs.masked_fill(outside, 0)
    if min_p > 0:
        probs = probs.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), 0)
    cdf, uniforms = probs.cumsum(-1), torch.tensor(uniforms, device=logits.device)[:, None]
    index = torch.searchsorted(cdf, uniforms * cdf[:, -1:], right=True)
    return (index if ids is None else ids.gather(1, index))[:, 0]


def log_probabilities(logits, token, top):
    """(log-probability of `token`, [(token, log-probability) of the `top` likeliest]) under the raw logits (V,)."""
    logits = logits.log_softmax(-1)
    values, ids = logits.topk(top)
    return logits[token].item(), list(zip(ids.tolist(), values.tolist(), strict=True))
