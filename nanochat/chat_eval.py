"""
Scoring a chat model on tasks: by the logits of the letters (categorical) or by what it writes (generative).

A problem's verdict does not depend on batch size, company or number of processes (on a GPU, but for rounding): rank r
takes problems r, r + W, ..., and every process ends up with the records of all.
"""

import math
from dataclasses import dataclass

import torch.distributed as dist

from nanochat.common import UserError
from nanochat.engine import MIN_TEMPERATURE, Request
from nanochat.inference.detokenizer import visible_text


@dataclass(frozen=True)
class Score:
    """What a task's problems came to; `records` has one dict per problem: index, messages, answers, verdicts."""

    records: list[dict]

    @property
    def accuracy(self):
        """Share of answers that are right, 0 to 1: pass@1, estimated from all samples."""
        return self.pass_at(1)

    @property
    def stderr(self):
        """Standard error of `accuracy` over the choice of problems."""
        shares = [sum(r["verdicts"]) / len(r["verdicts"]) for r in self.records]
        variance = sum((s - self.accuracy) ** 2 for s in shares) / max(1, len(shares) - 1)
        return math.sqrt(variance / len(shares))

    @property
    def interval(self):
        """(low, high): where the accuracy on such problems lies with 95 % confidence (Wilson 1927)."""
        p, z, n = self.accuracy, 1.96, len(self.records)
        if self.stderr:
            n = p * (1 - p) / self.stderr**2  # several samples of a problem tell more than one, and less than as many
        centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
        return max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))

    def pass_at(self, k):
        """Chance that one of k samples is right, unbiased (Chen et al. 2021, section 2.1), averaged over problems."""
        return sum(pass_at_k(len(r["verdicts"]), sum(r["verdicts"]), k) for r in self.records) / len(self.records)


def pass_at_k(n, correct, k):
    """Chance that k of n samples, drawn without replacement, hold at least one of the `correct` ones."""
    assert 1 <= k <= n, f"pass@{k} of {n} samples"
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def chat_core(accuracies, baselines):
    """Mean over tasks of the accuracy centred on guessing: 0 = chance, 1 = all right. Both are {task: 0 to 1}."""
    centred = [(accuracy - baselines[task]) / (1 - baselines[task]) for task, accuracy in accuracies.items()]
    return sum(centred) / len(centred)


def evaluate_task(
    task,
    engine,
    max_problems=None,
    num_samples=1,
    max_new_tokens=512,
    temperature=0.0,
    top_k=50,
    batch_size=8,
    max_rows=64,
    seed=42,
    progress=None,
):
    """
    Score of `engine`'s model on `task`; called by all ranks, and the same on all.

    Categorical problems are scored `batch_size` per forward pass; generative ones are answered `num_samples` times
    each, `max_rows` answers at once; at temperature 0 all answers are the same, and written once. `progress(done,
    total)` counts this rank's problems.
    """
    total = len(task) if max_problems is None else min(max_problems, len(task))
    if total < 1:
        raise UserError(f"{type(task).__name__}: no problems to score ({len(task)} there, max_problems={max_problems})")
    rank, world_size = (engine.compute.rank, engine.compute.world_size) if engine.compute else (0, 1)
    problems = {i: task[i] for i in range(rank, total, world_size)}
    if task.eval_type == "categorical":
        answered = _choose(problems, engine, batch_size)
    else:
        answered = _write(problems, engine, num_samples, max_new_tokens, temperature, top_k, max_rows, seed)
    records = []
    for index, answers in answered:
        records.append({"index": index, "messages": problems[index]["messages"], "answers": answers})
        if progress:
            progress(len(records), len(problems))
    pairs = [(problems[record["index"]], answer) for record in records for answer in record["answers"]]
    verdicts = iter(task.evaluate_many(pairs))
    for record in records:
        record["verdicts"] = [bool(next(verdicts)) for _ in record["answers"]]
    if world_size > 1:
        shares = [None] * world_size
        dist.all_gather_object(shares, records)
        records = [record for share in shares for record in share]
    return Score(sorted(records, key=lambda record: record["index"]))


def _choose(problems, engine, batch_size):
    """Yield (index, [letter]): the problem's letter with the highest logit where the answer would begin."""
    tokenizer, context = engine.tokenizer, engine.model.config.sequence_len
    prompts = {i: tokenizer.render_for_completion(p, max_tokens=context) for i, p in problems.items()}
    order = sorted(prompts, key=lambda i: len(prompts[i]))  # similar lengths together: little padding
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        logits = engine.next_logits([prompts[i] for i in batch]).cpu()
        for row, i in enumerate(batch):
            letters = [tokenizer.encode(letter) for letter in problems[i]["letters"]]
            assert all(len(ids) == 1 for ids in letters), f"letters {problems[i]['letters']} are not single tokens"
            best = logits[row, [ids[0] for ids in letters]].argmax().item()
            yield i, [problems[i]["letters"][best]]


def _write(problems, engine, num_samples, max_new_tokens, temperature, top_k, max_rows, seed):
    """Yield (index, [text of each sample]) as a problem's last sample is done."""
    tokenizer, context = engine.tokenizer, engine.model.config.sequence_len
    room = min(max_new_tokens, context // 2)  # a prompt that leaves less is cut from the left
    copies = 1
    if temperature < MIN_TEMPERATURE and num_samples > 1:
        copies, num_samples = num_samples, 1
    requests = {}
    for i, problem in problems.items():
        prompt = tokenizer.render_for_completion(problem, max_tokens=context - room)
        requests[Request(prompt, max_new_tokens, temperature, top_k, seed + i, num_samples)] = i
    answers = {i: {} for i in problems}
    for row in engine.generate_many(requests, max_rows):
        i = requests[row.request]
        answers[i][row.sample] = visible_text(tokenizer, row.completion)
        if len(answers[i]) == num_samples:
            yield i, [answers[i][sample] for sample in range(num_samples)] * copies
