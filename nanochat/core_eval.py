"""
CORE (DCLM, Li et al. 2024): the accuracy of a base model on 22 in-context learning tasks, centered on guessing.

    score = evaluate_core(model, tokenizer, compute, max_per_task=500)
    score.core, score.accuracies, score.centered

A multiple_choice or schema example has one prompt per option, and the model chooses the option whose scored tokens have
the lowest mean loss. In multiple_choice the scored tokens follow the prefix that all prompts share; in schema they are
the suffix that all prompts share. A language_modeling example is correct if the model predicts every token of the
continuation greedily.

A shared prefix is computed once: the options of an example, and questions about the same story, form a group. The
group's prefix is prefilled into a KV cache row, which is repeated for the suffixes. Only scored tokens need logits. A
verdict does not depend on how examples are batched, nor on the number of processes.
"""

import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from nanochat.engine import TorchBackend, common_prefix_length
from nanochat.gpt import GPT
from nanochat.ops import chunk_rows

WINDOW = 256  # examples tokenized at a time
PASS_TOKENS = {"cpu": 1024, "mps": 4096, "cuda": 16384}  # padded tokens in one forward pass; bounds its memory
MIN_SHARED = 0.5  # a group's prefix must cover at least this share of each of its sequences


@dataclass(frozen=True)
class CoreScore:
    """Results by task. `records` has one dict per example, in the order of evaluation."""

    records: dict[str, list[dict]]  # {label: records}
    baselines: dict[str, float]  # {label: accuracy of guessing, 0 to 1}

    @property
    def accuracies(self):
        """{label: share of examples that are correct}."""
        return {label: sum(r["correct"] for r in records) / len(records) for label, records in self.records.items()}

    @property
    def centered(self):
        """{label: accuracy rescaled so that guessing scores 0 and a perfect model 1}."""
        return {task: (x - self.baselines[task]) / (1 - self.baselines[task]) for task, x in self.accuracies.items()}

    @property
    def core(self):
        """Mean of the centered accuracies; with all tasks of the bundle this is CORE. Rounded, as 0 may be 3e-17."""
        return round(sum(self.centered.values()) / len(self.centered), 12)


def evaluate_core(model, tokenizer, compute, max_per_task=-1, tasks=None, progress=lambda *_: None, pass_tokens=None):
    """
    CoreScore of `model`, a GPT or a dclm.hf_models.HFScorer. All ranks call it and get the same result.

    Scores the first `max_per_task` examples (-1 = all) of each of `tasks`, by default load_tasks(). A forward pass has
    at most `pass_tokens` padded tokens, but at least one row. `progress(label, done, total)` counts this rank's
    examples.
    """
    from nanochat.dclm.tasks import load_tasks

    scorer = GPTScorer(model, compute) if isinstance(model, GPT) else model
    pass_tokens, tasks, records = pass_tokens or PASS_TOKENS[compute.device.type], tasks or load_tasks(), {}
    for task in tasks:
        own = _evaluate(task, scorer, tokenizer, compute, max_per_task, pass_tokens, progress)
        records[task.label] = sorted(sum(compute.all_gather(own), []), key=lambda record: record["index"])
    return CoreScore(records, {task.label: task.baseline for task in tasks})


@torch.inference_mode()
def _evaluate(task, scorer, tokenizer, compute, max_examples, pass_tokens, progress):
    """Records of this rank's examples of `task`, in the order of evaluation."""
    examples, records = task.examples(max_examples), []
    # Sorted by question: without few-shot examples, questions about the same story then share a prefix.
    own = sorted(range(compute.rank, len(examples), compute.world_size), key=lambda i: task.question(examples[i]))
    for start in range(0, len(own), WINDOW):
        prompts = {i: task.prompts(examples, i) for i in own[start : start + WINDOW]}
        ids = iter(tokenizer.encode(list(itertools.chain(*prompts.values())), tokenizer.get_bos_token_id()))
        rows = {}  # (example index, option) -> (tokens, start of the scored tokens)
        for i, texts in prompts.items():
            for option, row in enumerate(scored_rows(task.kind, [next(ids) for _ in texts])):
                rows[i, option] = crop(*row, scorer.max_tokens)
        results = score(scorer, rows, pass_tokens)
        for i, keys in itertools.groupby(rows, key=lambda key: key[0]):
            options = [results[key] for key in keys]
            if task.kind == "language_modeling":
                verdict = _judge_continuation(*rows[i, 0], options[0], tokenizer)
            else:
                verdict = _judge_choice(options, examples[i]["gold"])
            records.append({"index": i, **verdict})
        progress(task.label, len(records), len(own))
    return records


def scored_rows(kind, prompts):
    """[(tokens, start)] for an example's tokenized prompts; the tokens from `start` to the end are scored."""
    if kind == "schema":
        suffix = min(common_prefix_length(prompts[0][::-1], row[::-1]) for row in prompts)
        return [(row, max(1, len(row) - suffix)) for row in prompts]  # the first token is never predicted
    prefix = min(common_prefix_length(prompts[0], row) for row in prompts)
    # The first prompt of a language_modeling example lacks the continuation.
    return [(row, prefix) for row in (prompts[1:] if kind == "language_modeling" else prompts)]


def crop(tokens, start, max_tokens):
    """(tokens, start) of the last `max_tokens` tokens of a row; None = no limit."""
    cut = max(0, len(tokens) - max_tokens) if max_tokens else 0
    return tokens[cut:], max(1, start - cut)


def _judge_choice(options, gold):
    # Ties go to the first option. If an option's prompt is a prefix of the others', none of its tokens is scored and
    # its mean loss is NaN. NaN compares false, so min() then keeps the option before it, as the reference does.
    losses = [loss for loss, _ in options]
    chosen = min(range(len(losses)), key=losses.__getitem__)
    json_losses = [None if math.isnan(loss) else loss for loss in losses]
    return {"losses": json_losses, "chosen": chosen, "gold": gold, "correct": chosen == gold}


def _judge_continuation(tokens, start, result, tokenizer):
    expected, predicted = tokens[start:], result[1]
    texts = {"expected": tokenizer.decode(expected), "predicted": tokenizer.decode(predicted)}
    return {**texts, "correct": predicted == expected}


# ---------------------------------------------------------------------------------------------------------------------
# Scoring rows of tokens


def score(scorer, rows, pass_tokens):
    """
    {key: (mean loss in nats, greedy predictions)} of the scored tokens of `rows`, {key: (tokens, start)}.

    The keys keep their order; without scored tokens the loss is NaN.
    """
    # A row's input is all but its last token. Rows with equal inputs, such as one-token options, are computed once.
    keys_by_input = {}
    for key, (tokens, start) in rows.items():
        if start < len(tokens):
            keys_by_input.setdefault(tuple(tokens[:-1]), []).append(key)
    # The token at `start` is predicted at position start - 1.
    first_scored = {ids: min(rows[key][1] for key in keys) - 1 for ids, keys in keys_by_input.items()}
    groups = prefix_groups(first_scored) if scorer.shares_prefixes else [(0, [ids]) for ids in first_scored]
    groups.sort(key=lambda group: group[0], reverse=True)
    results = {}
    for batch in _batches(groups, lambda group: group[0], pass_tokens, scorer.equal_prefixes):
        cache = scorer.prefill([members[0][:prefix] for prefix, members in batch])
        inputs = [(row, ids, prefix) for row, (prefix, members) in enumerate(batch) for ids in members]
        inputs.sort(key=lambda item: len(item[1]) - item[2], reverse=True)
        longest_prefix = batch[0][0]  # included, since every input gets a copy of its prefix's cache row
        for part in _batches(inputs, lambda item, n=longest_prefix: n + len(item[1]) - item[2], 2 * pass_tokens):
            targets = {key: (i, *rows[key]) for i, (_, ids, _) in enumerate(part) for key in keys_by_input[ids]}
            results |= _score_part(scorer, cache, part, targets)
    return {key: results.get(key, (math.nan, [])) for key in rows}


def prefix_groups(first_scored):
    """
    [(prefix length, [input, ...])]: groups of inputs that start with the same prefix.

    `first_scored` is {input (a tuple of tokens): first position whose prediction is scored}; a prefix ends before that
    position. An input joins its predecessor's group in sorted order if that leaves fewer tokens to compute.
    """
    groups = []
    for ids in sorted(first_scored):
        if groups:
            prefix, members = groups[-1]
            n = min(common_prefix_length(members[0][:prefix], ids), first_scored[ids])
            if n >= MIN_SHARED * max(len(members[0]), len(ids)) and n * len(members) > prefix * (len(members) - 1):
                groups[-1] = n, [*members, ids]
                continue
        groups.append((first_scored[ids], [ids]))
    return groups


def _batches(items, width, limit, equal=False):
    """
    Yield lists of consecutive `items`, which are sorted by width, the widest first.

    A list has at most `limit` padded tokens, or one item; `equal`: all items of a list have the same width.
    """
    batch = []
    for item in items:
        if batch and (width(batch[0]) * (len(batch) + 1) > limit or equal and width(item) != width(batch[0])):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def _score_part(scorer, cache, part, rows):
    """
    score() of `rows`, {key: (index in `part`, tokens, start)}, in one forward pass.

    `part` is [(row of `cache`, input, prefix length)].
    """
    scored = [(i, n - 1 - part[i][2], ids[n]) for i, ids, start in rows.values() for n in range(start, len(ids))]
    row_index, column_index, targets = map(list, zip(*scored, strict=True))
    targets = torch.tensor(targets, device=scorer.device)
    suffixes = [list(ids[prefix:]) for _, ids, prefix in part]
    losses, predicted, offset = [], [], 0
    for logits in scorer.logits(cache, [row for row, _, _ in part], suffixes, row_index, column_index):
        losses.append(F.cross_entropy(logits, targets[offset : offset + len(logits)], reduction="none"))
        predicted.append(logits.argmax(-1))
        offset += len(logits)
    sizes = [len(tokens) - start for _, tokens, start in rows.values()]
    losses, predicted = (torch.cat(x).cpu().split(sizes) for x in (losses, predicted))
    return {key: (loss.mean().item(), ids.tolist()) for key, loss, ids in zip(rows, losses, predicted, strict=True)}


class GPTScorer:
    """Scores a GPT: prefills prefixes into a KV cache, then computes logits of the suffixes."""

    max_tokens = None  # no limit: the rotary table grows with the prompts
    shares_prefixes, equal_prefixes = True, False

    def __init__(self, model, compute):
        self.model, self.device, self.backend = model, model.get_device(), TorchBackend(model, compute)

    def prefill(self, prefixes):
        """A KV cache with one row for each of `prefixes`."""
        cache = self.backend.new_cache(len(prefixes))
        self.backend.fill(prefixes, cache)
        return cache

    def logits(self, cache, cache_rows, suffixes, rows, columns):
        """
        Yield float32 logits (n, V), in chunks, at the positions (row, column) of `suffixes`.

        suffixes[i] continues row cache_rows[i] of `cache`.
        """
        repeated = self.backend.new_cache()
        repeated.append(cache, cache_rows, room=max(map(len, suffixes)))
        x = self.backend.hidden(suffixes, repeated)[rows, columns]
        for chunk in x.split(chunk_rows(x, self.model.config.vocab_size)):
            with self.backend.precision():
                yield self.model.logits(chunk)
