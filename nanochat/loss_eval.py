"""
Evaluation of a language model on text: bits per byte (comparable across tokenizers), mean loss and samples.
"""

import math

import torch

from nanochat.common import require
from nanochat.tracking import with_progress


def evaluate_bpb(model, batches, token_bytes, compute):
    """Bits per byte, see evaluate_loss(). `token_bytes` (V,) is the length of each token, 0 for special tokens."""
    return evaluate_loss(model, batches, compute, token_bytes) / math.log(2)


@torch.no_grad()
def evaluate_loss(model, batches, compute, units=None):
    """
    Cross entropy in nats per unit, over `batches` of (inputs, targets), each (B, T), and over all ranks.

    `units` (V,) is the number of units of each token, such as its bytes; None = 1. Tokens of 0 units and targets of -1
    are excluded. Raises UserError if nothing is left.
    """
    units = (torch.ones(model.config.vocab_size) if units is None else units).to(compute.device)
    dtype = torch.float32 if compute.device.type == "mps" else torch.float64  # MPS has no float64
    totals = torch.zeros(2, dtype=dtype, device=compute.device)
    for x, y in with_progress(list(batches), "validation", "batches"):
        x, y = x.to(compute.device, non_blocking=True), y.to(compute.device, non_blocking=True)
        with compute.autocast():
            nats = model(x, y, loss_reduction="none")
        num_units = units[y.clamp(min=0)] * (y >= 0)
        totals += torch.stack(((nats * (num_units > 0)).sum(), num_units.sum())).to(dtype)
    nats, num_units = compute.all_reduce(totals).tolist()
    require(num_units, "there is no text in the data to evaluate on, only empty documents; replace them")
    return nats / num_units


PROMPTS = {"public": ["The capital of France is", "The chemical symbol of gold is"]}
PROMPTS["public"] += ["If yesterday was Friday, then tomorrow will be", "The opposite of hot is"]
PROMPTS["public"] += ["The planets of the solar system are:", "My favorite color is", "If 5*x + 3 = 13, then x is"]
PROMPTS["pocket"] = ["Once upon a time", "Pip lives in", "Misty the seal", "The name of the baker is"]
PROMPTS["pocket"] += ["12 + 30 =", "apple is spelled"]


def chat_samples(engine, task, n=4, max_tokens=64):
    """{question: greedy answer} for the first questions of `n` evenly spaced conversations of `task`."""
    prompts, max_prompt = {}, engine.model.config.sequence_len // 2
    for i in range(0, len(task), max(1, len(task) // n))[:n]:
        question = next(message for message in task[i]["messages"] if message["role"] == "user")
        prompts[question["content"]] = engine.tokenizer.render_for_completion({"messages": [question]}, max_prompt)
    return _continuations(engine, prompts, max_tokens)


def greedy_samples(engine, corpus, max_tokens=48):
    """{prompt: continuation} of a base model trained on `corpus`, decoded greedily."""
    bos = engine.tokenizer.get_bos_token_id()
    prompts = {prompt: engine.tokenizer.encode(prompt, prepend=bos) for prompt in PROMPTS[corpus]}
    return _continuations(engine, prompts, max_tokens)


def _continuations(engine, prompts, max_tokens):
    """{name: greedy continuation} of `prompts`, {name: token ids}."""
    settings = dict(max_tokens=max_tokens, temperature=0)
    answers = {name: engine.generate_batch(ids, **settings)[0][0][len(ids) :] for name, ids in prompts.items()}
    return {name: engine.tokenizer.decode(answer) for name, answer in answers.items()}
