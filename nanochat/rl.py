"""
Reinforcement learning: what a model writes, what that is worth, and batches to learn from it.

REINFORCE (Williams 1992) on the model's own samples, with the mean reward of a problem's group of samples as baseline
(as GRPO, Shao et al. 2024, without its division by the deviation, without clipping, and without a penalty for leaving
the first model). Every token that was sampled is trained, the one that ends the answer too; what the calculator wrote
is not. A rollout depends on the weights, its problem, the step and its number in the group, not on its company.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from nanochat.engine import Engine, Request
from nanochat.gpt import GPT
from nanochat.inference.detokenizer import visible_text


@dataclass(frozen=True, eq=False)
class Rollout:
    """One sample: the prompt's ids and the answer's, with its mask (1 = sampled), and what it earned."""

    prompt: list[int]
    tokens: list[int]
    mask: list[int]
    reward: float
    cut_off: bool  # it was longer than allowed


def make_sampler(model, tokenizer, compute):
    """An engine with a copy of `model` in compute.dtype: it decodes as quickly as a model that is not trained."""
    copy = GPT(model.config)
    copy.allocate(compute.device)
    return Engine(copy.to(dtype=compute.dtype).eval().requires_grad_(False), tokenizer, compute)


@torch.no_grad()
def sync(sampler, model):
    """Give the sampler the model's weights, in place, since its decoder knows where they lie."""
    for to, p in zip(sampler.model.parameters(), model.parameters(), strict=True):
        to.copy_(p)


def roll_out(sampler, task, problems, num_samples, max_new_tokens, max_rows):
    """
    {index: [Rollout]}: `num_samples` answers to each of the problems, which are {index of `task`: seed}.

    They are drawn from the model's own distribution, whole and at temperature 1, which is what the loss scores.
    """
    tokenizer, context = sampler.tokenizer, sampler.model.config.sequence_len
    room = min(max_new_tokens, context // 2)
    conversations, requests = {i: task[i] for i in problems}, {}
    for i, seed in problems.items():
        prompt = tokenizer.render_for_completion(conversations[i], max_tokens=context - room)
        requests[Request(prompt, room, temperature=1.0, seed=seed, num_samples=num_samples)] = i
    groups = {i: {} for i in problems}
    for row in sampler.generate_many(requests, max_rows):
        i, text = requests[row.request], visible_text(tokenizer, row.completion)
        reward, cut_off = task.reward(conversations[i], text), row.finish == "length"
        groups[i][row.sample] = Rollout(row.request.tokens, row.tokens, row.mask, reward, cut_off)
    return {i: [group[sample] for sample in range(num_samples)] for i, group in groups.items()}


def advantages(group):
    """How much better than its group each rollout is; None if all are alike, and there is nothing to learn."""
    rewards = [rollout.reward for rollout in group]
    mean = sum(rewards) / len(rewards)
    return [reward - mean for reward in rewards] if len(set(rewards)) > 1 else None


def policy_batches(groups, rows, device):
    """
    (micro-batches, left_out) for train_step: `rows` rollouts at a time, as (inputs, targets, weights), (rows, T) each.

    Targets that were not sampled are -1, a token's weight is its rollout's advantage. Groups with nothing to learn are
    left out; `left_out` is the number of their sampled tokens, which the mean over the whole batch counts all the same.
    """
    learnt, left_out = [], 0
    for group in groups:
        found = advantages(group)
        if found is None:
            left_out += sum(sum(rollout.mask) for rollout in group)
        else:
            learnt += zip(group, found, strict=True)
    learnt.sort(key=lambda pair: len(pair[0].prompt) + len(pair[0].tokens))  # similar lengths: little padding
    batches = []
    for start in range(0, len(learnt), rows):
        part = learnt[start : start + rows]
        T = max(len(rollout.prompt) + len(rollout.tokens) for rollout, _ in part) - 1
        x, y = torch.zeros(len(part), T, dtype=torch.long), torch.full((len(part), T), -1)
        weights = torch.zeros(len(part), T)
        for b, (rollout, advantage) in enumerate(part):
            ids, first = torch.tensor(rollout.prompt + rollout.tokens), len(rollout.prompt) - 1
            sampled = torch.tensor(rollout.mask, dtype=torch.bool)
            x[b, : len(ids) - 1] = ids[:-1]
            y[b, first : len(ids) - 1] = torch.where(sampled, ids[first + 1 :], -1)
            weights[b] = advantage
        batches.append(tuple(t.to(device) for t in (x, y, weights)))
    return batches, left_out


def mean_over_ranks(values, compute):
    """The mean of all ranks' numbers."""
    totals = torch.tensor([sum(values), len(values)], dtype=torch.float32, device=compute.device)
    if compute.world_size > 1:
        dist.all_reduce(totals)
    return (totals[0] / totals[1]).item()
