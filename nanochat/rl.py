"""
Reinforcement learning: rollouts, their rewards and advantages, and training batches.

REINFORCE (Williams 1992) on samples from the model itself, with the mean reward of a problem's group of samples as the
baseline. This is GRPO (Shao et al. 2024) without clipping, KL penalty and division by the standard deviation. Every
sampled token is trained on, including the terminal token; tokens forced by the calculator are not. A rollout depends on
the weights, its problem, seed and sample number, not on the batch it runs in.
"""

import math
from collections import namedtuple

import torch

from nanochat.chat_eval import generate_answers, read_problems
from nanochat.common import require, task_errors
from nanochat.dataloader import length_buckets, pad_rows
from nanochat.engine import Engine
from nanochat.gpt import GPT

# One sampled answer to a problem. `prompt`: token ids. `tokens`: those of the answer. `mask`: per token of the answer,
# 1 = sampled, 0 = forced. `cut_off`: whether it reached the maximum length.
Rollout = namedtuple("Rollout", "prompt tokens mask reward cut_off")


def make_sampler(model, tokenizer, compute):
    """
    Engine on a copy of `model` in compute.dtype, without gradients: it decodes faster than the model in training.

    sync() sets the weights of the copy.
    """
    copy = GPT(model.config)
    copy.allocate(compute.device)
    return Engine(copy.to(dtype=compute.dtype).eval().requires_grad_(False), tokenizer, compute)


def sync(sampler, model):
    """Copy the model's weights into the sampler's, in place, since its backend stores their addresses."""
    sampler.model.load_state_dict(model.state_dict())


def roll_out(sampler, task, seeds, num_samples, max_new_tokens, max_rows):
    """
    {index: [Rollout of each sample]} for the problems of `task` in `seeds`, {index: seed}.

    Sampling is at temperature 1 without top-k, because the loss assumes samples of the model's own distribution.
    """
    max_new_tokens = min(max_new_tokens, sampler.model.config.sequence_len // 2)
    settings = dict(num_samples=num_samples, temperature=1.0, top_k=None, max_rows=max_rows)
    problems, groups = read_problems(task, seeds), dict.fromkeys(seeds)
    for i, samples in generate_answers(sampler, problems, seeds, max_new_tokens=max_new_tokens, **settings):
        with task_errors(type(task).__name__):
            rewards = [float(task.reward(problems[i], text)) for _, text in samples]
            require(all(map(math.isfinite, rewards)), f"rewards must be finite, got {rewards}")
        pairs = zip((row for row, _ in samples), rewards, strict=True)
        groups[i] = [Rollout(row.request.tokens, row.tokens, row.mask, r, row.finish == "length") for row, r in pairs]
    return groups


def advantages(group):
    """Each rollout's reward minus the group's mean reward; None if all rewards are equal."""
    rewards = [rollout.reward for rollout in group]
    mean = sum(rewards) / len(rewards)
    return [reward - mean for reward in rewards] if len(set(rewards)) > 1 else None


def policy_batches(groups, max_tokens, device):
    """
    (micro_batches, skipped_tokens) for train_step(). A micro-batch is (inputs, targets, weights), each (rows, T), of at
    most `max_tokens` tokens.

    Targets that were not sampled are -1. A token's weight is its rollout's advantage. Groups with equal rewards are
    skipped, since their advantages are 0; `skipped_tokens` is the number of their sampled tokens, which the mean loss
    still counts.
    """
    weighted, skipped_tokens = [], 0
    for group in groups:
        if group_advantages := advantages(group):
            weighted += zip(group, group_advantages, strict=True)
        else:
            skipped_tokens += sum(sum(rollout.mask) for rollout in group)
    weighted.sort(key=lambda pair: len(pair[0].prompt) + len(pair[0].tokens))  # similar lengths need little padding
    batches = []
    for bucket in length_buckets([len(r.prompt) + len(r.tokens) for r, _ in weighted], max_tokens):
        rollouts, row_weights = zip(*weighted[bucket.start : bucket.stop], strict=True)
        x, y = pad_rows([(r.prompt + r.tokens, [0] * len(r.prompt) + r.mask) for r in rollouts])
        weights = torch.tensor(row_weights)[:, None].repeat(1, x.size(1))
        batches.append(tuple(t.to(device) for t in (x, y, weights)))
    return batches, skipped_tokens


def mean_over_ranks(groups, compute):
    """(mean reward, share of the answers that were cut off) of the rollouts of all ranks."""
    rows = [(rollout.reward, float(rollout.cut_off), 1.0) for group in groups for rollout in group]
    totals = compute.all_reduce(torch.tensor(rows, device=compute.device).view(-1, 3).sum(0))
    return (totals[:2] / totals[2]).tolist()
