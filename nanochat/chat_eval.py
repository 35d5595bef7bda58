"""
Evaluation of a chat model on tasks: multiple choice by the logits of the letters, all others by generated answers.

Rank r of W takes problems r, r + W, ..., and all ranks get the records of all problems. Verdicts do not depend on batch
size or number of processes, up to rounding on a GPU.
"""

import math
import re
import statistics
from dataclasses import dataclass

from nanochat.common import Compute, print0, require, task_errors
from nanochat.engine import MIN_TEMPERATURE, Request, visible_text
from nanochat.tokenizer import check_conversation


@dataclass(frozen=True)
class Score:
    """Results on one task. `records` has one dict per problem: index, kind (or None), messages, answers, verdicts."""

    records: list[dict]

    @property
    def accuracy(self):
        """Share of correct answers, 0 to 1: pass@1, estimated from all samples."""
        return self.pass_at(1)

    @property
    def stderr(self):
        """Standard error of `accuracy`, with the problem as the sampling unit."""
        shares = [sum(r["verdicts"]) / len(r["verdicts"]) for r in self.records]
        return math.sqrt((statistics.variance(shares) if len(shares) > 1 else 0.0) / len(shares))

    @property
    def interval(self):
        """(low, high): 95 % confidence interval of `accuracy` (Wilson 1927)."""
        p, z = self.accuracy, 1.96
        # Effective sample size: samples of one problem are correlated.
        n = p * (1 - p) / self.stderr**2 if self.stderr else len(self.records)
        center, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
        return max(0.0, (center - half) / (1 + z * z / n)), min(1.0, (center + half) / (1 + z * z / n))

    @property
    def by_kind(self):
        """{kind: accuracy}, empty if the task has no kinds."""
        kinds = dict.fromkeys(r["kind"] for r in self.records if r["kind"])
        return {kind: Score([r for r in self.records if r["kind"] == kind]).accuracy for kind in kinds}

    @property
    def repetition(self):
        """Share of long answers (more than five sentences) with a repeated sentence; None without long answers."""
        answers = (re.findall(r"\b[^.!?\n]{9,}[.!?]", answer) for r in self.records for answer in r["answers"])
        long = [sentences for sentences in answers if len(sentences) > 5]
        return statistics.fmean(len(set(sentences)) < len(sentences) for sentences in long) if long else None

    def pass_at(self, k):
        """pass@k, unbiased (Chen et al. 2021, section 2.1), averaged over problems."""
        return sum(pass_at_k(len(r["verdicts"]), sum(r["verdicts"]), k) for r in self.records) / len(self.records)


def pass_at_k(n, correct, k):
    """Probability that k of n samples, drawn without replacement, include one of the `correct` samples."""
    assert 1 <= k <= n, f"pass@{k} of {n} samples"
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def chat_core(accuracies, baselines):
    """Mean centered accuracy, 0 = guessing, 1 = all correct. Both arguments are {task: accuracy, 0 to 1}."""
    centered = [(accuracy - baselines[task]) / (1 - baselines[task]) for task, accuracy in accuracies.items()]
    return sum(centered) / len(centered)


def evaluate_task(task, engine, max_problems=None, batch_size=8, seed=42, progress=lambda *_: None, **settings):
    """
    Score of `engine`'s model on `task`. All ranks call it and get the same result.

    Categorical problems are scored `batch_size` per forward pass. Generative ones are answered with the `settings` of
    generate_answers(). `progress(done, total)` counts this rank's problems.
    """
    compute, name = engine.compute or Compute(device=None, dtype=None), type(task).__name__
    with task_errors(name):
        total = len(task) if max_problems is None else min(max_problems, len(task))
        require(total > 0, f"no problems to score; it has {len(task)}, max_problems={max_problems}")
        kinds = ("categorical", "generative")
        require(task.eval_type in kinds, f"eval_type is {task.eval_type!r}, expected one of {', '.join(kinds)}")
    problems = read_problems(task, range(compute.rank, total, compute.world_size))
    answer_tokens = 0 if task.eval_type == "categorical" else settings.get("max_new_tokens", 512)
    limit, render = max_prompt_tokens(engine, answer_tokens), engine.tokenizer.render_for_completion
    if n_cut := sum(len(render(problem)) > limit for problem in problems.values()):
        print0(f"warning: {name}: {n_cut / len(problems):.1%} of the prompts have more than {limit} tokens and are cut")
    if task.eval_type == "categorical":
        for i, problem in problems.items():
            with task_errors(f"{name}, problem {i}"):
                check_letters(problem, engine.tokenizer)
        results = choose_letters(engine, problems, batch_size)
    else:
        samples = generate_answers(engine, problems, {i: seed + i for i in problems}, **settings)
        results = ((i, [text for _, text in answers]) for i, answers in samples)
    records = []
    for index, answers in results:
        problem = {"index": index, "kind": problems[index].get("kind"), "messages": problems[index]["messages"]}
        records.append({**problem, "answers": answers, "verdicts": []})
        progress(len(records), len(problems))
    answered = [(record, answer) for record in records for answer in record["answers"]]
    with task_errors(name):
        verdicts = list(task.evaluate_many([(problems[r["index"]], answer) for r, answer in answered]))
        n, expected = len(verdicts), len(answered)
        require(n == expected, f"evaluate_many() returned {n} verdicts, expected {expected}")
        for (record, _), verdict in zip(answered, verdicts, strict=True):
            require(verdict in (0, 1), f"evaluate() returned {verdict!r}, expected True or False")
            record["verdicts"].append(bool(verdict))
    return Score(sorted(sum(compute.all_gather(records), []), key=lambda record: record["index"]))


def max_prompt_tokens(engine, answer_tokens):
    """Length to which prompts are cut: half of the context, or more if `answer_tokens` leave more."""
    context = engine.model.config.sequence_len
    return context - min(answer_tokens, context // 2)


def read_problems(task, indices):
    """{index: problem}. Raises UserError with the index of a problem that is no conversation."""
    problems = {}
    for i in indices:
        with task_errors(f"{type(task).__name__}, problem {i}"):
            problems[i] = task[i]
            check_conversation(problems[i])
    return problems


def check_letters(problem, tokenizer):
    """
    Raises UserError unless the problem's "letters" are single tokens.

    A problem without letters gets those of its prompt, or else A to D if one of them is the correct answer.
    """
    if not problem.get("letters"):
        prompt, answer = str(problem["messages"][-2:][0]["content"]), problem["messages"][-1]["content"]
        pairs = re.findall(r"^\W*([A-Z])[).:] |=([A-Z])$", prompt, re.MULTILINE)
        problem["letters"] = letters = list(dict.fromkeys(map("".join, pairs))) or list("ABCD")
        hint = 'add "letters" to the conversation, or set eval_type to "generative"'
        require(answer in letters, f"no letters, and the answer {answer!r} is none of {', '.join(letters)}; {hint}")
    single = all(len(tokenizer.encode(letter)) == 1 for letter in problem["letters"])
    require(single, f"the letters {problem['letters']} are not single tokens")


def choose_letters(engine, problems, batch_size):
    """Yield (index, [letter]) for `problems`, {index: problem}: the letter with the highest logit after the prompt."""
    tokenizer, context = engine.tokenizer, engine.model.config.sequence_len
    prompts = {i: tokenizer.render_for_completion(p, max_tokens=context) for i, p in problems.items()}
    order = sorted(prompts, key=lambda i: len(prompts[i]))  # batches of similar lengths need little padding
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        logits = engine.next_logits([prompts[i] for i in batch]).cpu()
        for row, i in enumerate(batch):
            ids = [tokenizer.encode(letter)[0] for letter in problems[i]["letters"]]
            yield i, [problems[i]["letters"][logits[row, ids].argmax()]]


def generate_answers(engine, problems, seeds, num_samples=1, max_new_tokens=512, temperature=0, top_k=50, max_rows=64):
    """
    Yield (index, [(row, text) of each sample]) for each problem, when its last sample is finished.

    `problems` is {index: problem} and `seeds` {index: seed}. A row is the engine's Row; the text is its answer without
    calculator calls. At most `max_rows` rows are decoded at once; a sample does not depend on the others.
    """
    tokenizer, limit = engine.tokenizer, max_prompt_tokens(engine, max_new_tokens)
    # Greedy samples are identical, so one is generated and copied.
    copies = num_samples if temperature < MIN_TEMPERATURE else 1
    indices, finished = {}, {i: [] for i in problems}
    for i, problem in problems.items():
        prompt = tokenizer.render_for_completion(problem, max_tokens=limit)
        indices[Request(prompt, max_new_tokens, temperature, top_k, seeds[i], num_samples // copies)] = i
    for row in engine.generate_many(indices, max_rows):
        rows = finished[indices[row.request]]
        rows.append((row, visible_text(tokenizer, row.completion)))
        if len(rows) == row.request.num_samples:
            yield indices[row.request], sorted(rows, key=lambda pair: pair[0].sample) * copies
