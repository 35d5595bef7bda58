"""
What is inside a text, for the chat page and shared pages: probabilities, layers' guesses, attention.

inspect() runs the model's forward pass in PyTorch. Its result is JSON; serve/model.js computes the same in a browser:

    tokens       one dict per token: id, token (text), bytes, special, logprob (given those before; None for the first)
    position     the position that the following are about
    next         the 20 likeliest tokens after it, as such dicts, likeliest first
    logprobs     log-probabilities of the whole vocabulary there, largest first, to 5 decimals
    layers       for the embedding and each layer: the 5 tokens that the head finds likeliest in its output
    attention    of the chosen head: row i has the weights of tokens 0 to i; None for more than 128 tokens
    n_layer, n_head
"""

import torch

from nanochat.common import require
from nanochat.gpt import norm, rotate

MAX_ATTENTION, NEXT, GUESSES = 128, 20, 5


@torch.inference_mode()
def inspect(engine, ids, position=None, layer=0, head=0):
    """The inspection of the token ids `ids`; `position` None = the last. UserError if an index is out of range."""
    model, tokenizer, c = engine.model, engine.tokenizer, engine.model.config
    position = len(ids) - 1 if position is None else position
    for name, value, size in (("position", position, len(ids)), ("layer", layer, c.n_layer), ("head", head, c.n_head)):
        require(0 <= value < size, f"{name}={value}: expected 0 to {size - 1}")

    def token(i, logprob):
        text = {"id": i, "token": tokenizer.decode([i]), "bytes": [*tokenizer.decode_bytes([i])]}
        return text | {"special": i in tokenizer.special_tokens.values(), "logprob": logprob}

    def likeliest(logprobs, n):
        values, indices = logprobs.topk(min(n, len(logprobs)))
        return [token(i, value) for i, value in zip(indices.tolist(), values.tolist(), strict=True)]

    with engine.backend.precision():
        states, attention = trace(model, ids, layer, head)
        losses = model.token_losses(states[-1][:-1], torch.tensor(ids[1:], device=model.get_device()))
        guesses = model.logits(torch.stack([state[position] for state in states])).log_softmax(-1)
    found, logprobs = [None, *(-losses).tolist()], guesses[-1]
    found = {"tokens": [token(i, logprob) for i, logprob in zip(ids, found, strict=True)], "position": position}
    found |= {"next": likeliest(logprobs, NEXT), "logprobs": [round(x, 5) for x in sorted(logprobs.tolist())[::-1]]}
    found |= {"layers": [likeliest(row, GUESSES) for row in guesses], "n_layer": c.n_layer, "n_head": c.n_head}
    rows = enumerate(attention.tolist())
    return found | {"attention": [row[: i + 1] for i, row in rows] if len(ids) <= MAX_ATTENTION else None}


def trace(model, ids, layer, head):
    """([normed activations (T, C) of the embedding and of each block], attention weights (T, T) of a head)."""
    T, attn, size = len(ids), model.transformer.h[layer].attn, model.config.head_dim
    cos, sin = (t[:T, None] for t in model.rotary(T))
    states = [norm(model.transformer.wte(torch.tensor([ids], device=model.get_device())))]
    for block in model.transformer.h:
        states.append(block(states[-1], cos, sin, None, None))
    x = norm(states[layer])
    q = norm(rotate(attn.c_q(x).unflatten(-1, (-1, size)), cos, sin))[0, :, head]
    k = attn.keys_and_values(x, cos, sin)[0][0, head * attn.n_kv_head // attn.n_head]
    scores = q.float() @ k.float().T * size**-0.5 + torch.full((T, T), -torch.inf, device=q.device).triu(1)
    return [norm(state)[0] for state in states], scores.softmax(-1)
