"""
CORE (DCLM, Li et al. 2024): 22 tasks, each scored by what a base model finds likely, each centred on guessing.

    score = evaluate_core(model, tokenizer, compute, max_per_task=500)
    score.core, score.accuracies, score.centered

multiple_choice: the option whose tokens after what all options' prompts have in common at their start have the lowest
mean loss. schema: likewise, over the tokens that all prompts have in common at their end. language_modeling: right when
every token of the continuation is the likeliest one.

What prompts share is computed once: rows that begin alike (the options of an example, the questions about one story)
share a prefix, which is prefilled into a KV cache and repeated for the rows' own few tokens, and only the tokens that
are scored go through the head. A verdict does not depend on batches, company or number of processes.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F

from nanochat.dclm.tasks import load_tasks
from nanochat.gpt import GPT
from nanochat.inference.kv_cache import KVCache
from nanochat.inference.kv_cache import common_prefix_length as shared
from nanochat.ops import chunk_rows

WINDOW = 256  # examples tokenized at a time
PASS_TOKENS = {"cpu": 1024, "mps": 4096, "cuda": 16384}  # padded tokens in one forward pass; bounds its memory
MIN_SHARE = 0.5  # of a row's tokens must be in the prefix that it shares with others


@dataclass(frozen=True)
class CoreScore:
    """What the tasks came to. `records` has a list per label with a dict for each example, in order."""

    records: dict[str, list[dict]]
    baselines: dict[str, float]

    @property
    def accuracies(self):
        """{label: share of examples that are right}."""
        return {label: sum(r["correct"] for r in records) / len(records) for label, records in self.records.items()}

    @property
    def centered(self):
        """{label: accuracy on a scale from 0 = guessing to 1}."""
        return {
            label: (a - self.baselines[label]) / (1 - self.baselines[label]) for label, a in self.accuracies.items()
        }

    @property
    def core(self):
        """The mean of `centered`: CORE, when all tasks of the bundle are there."""
        return sum(self.centered.values()) / len(self.centered)


def evaluate_core(model, tokenizer, compute, max_per_task=-1, tasks=None, progress=None, pass_tokens=None):
    """
    CoreScore of `model`, a GPT or core_hf.HFScorer; called by all ranks, and the same on all.

    Takes the first `max_per_task` examples of each of `tasks`, -1 = all; the tasks are load_tasks() unless given. A
    forward pass has at most `pass_tokens` padded tokens, or one row. `progress(label, done, total)` counts this rank's
    examples, one in world_size of all.
    """
    scorer = GPTScorer(model, compute) if isinstance(model, GPT) else model
    pass_tokens, tasks, records = pass_tokens or PASS_TOKENS[compute.device.type], tasks or load_tasks(), {}
    for task in tasks:
        mine = _evaluate(task, scorer, tokenizer, compute, max_per_task, pass_tokens, progress)
        shares = [mine]
        if compute.world_size > 1:
            shares = [None] * compute.world_size
            dist.all_gather_object(shares, mine)
        records[task.label] = sorted((r for share in shares for r in share), key=lambda r: r["index"])
    return CoreScore(records, {task.label: task.baseline for task in tasks})


@torch.inference_mode()
def _evaluate(task, scorer, tokenizer, compute, max_examples, pass_tokens, progress):
    """The records of this rank's examples of `task`, in no order."""
    examples, records = task.examples(max_examples), []
    # By text: without shots, questions about one story come together and share what they begin with.
    mine = sorted(range(compute.rank, len(examples), compute.world_size), key=lambda i: task.question(examples[i]))

    def show(before, size, share):
        if progress:
            progress(task.label, before + int(share * size), len(mine))

    for start in range(0, len(mine), WINDOW):
        prompts = {i: task.prompts(examples, i) for i in mine[start : start + WINDOW]}
        ids = iter(tokenizer.encode([t for texts in prompts.values() for t in texts], tokenizer.get_bos_token_id()))
        rows = {}
        for i, texts in prompts.items():
            for option, row in enumerate(scored_rows(task.kind, [next(ids) for _ in texts])):
                rows[i, option] = crop(*row, scorer.max_tokens)

        results = {}
        for (i, _), result in score(scorer, rows, pass_tokens, partial(show, start, len(prompts))).items():
            results.setdefault(i, []).append(result)
        for i, options in results.items():
            verdict = _continued(*rows[i, 0], options[0], tokenizer) if task.kind == "language_modeling" else None
            records.append({"index": i, **(verdict or _chosen(options, examples[i]["gold"]))})
    return records


def scored_rows(kind, prompts):
    """[(tokens, where the scored ones begin; they go on to the end)] of an example's tokenized prompts."""
    if kind == "language_modeling":
        without, row = prompts
        return [(row, shared(without, row))]
    if kind == "schema":
        n = min(shared(prompts[0][::-1], row[::-1]) for row in prompts)
        return [(row, max(1, len(row) - n)) for row in prompts]
    n = min(shared(prompts[0], row) for row in prompts)
    return [(row, n) for row in prompts]


def crop(tokens, start, max_tokens):
    """(tokens, start) without the beginning of a row longer than `max_tokens`; None = any length will do."""
    cut = max(0, len(tokens) - max_tokens) if max_tokens else 0
    return tokens[cut:], max(1, start - cut)


def _chosen(options, gold):
    # Of equals the first. An option with nothing of its own (the others begin with all of it) has a mean of NaN, which
    # is neither more nor less: min() keeps what came before it, as the reference does.
    losses = [loss for loss, _ in options]
    chosen = min(range(len(losses)), key=losses.__getitem__)
    shown = [None if math.isnan(loss) else loss for loss in losses]
    return {"losses": shown, "chosen": chosen, "gold": gold, "correct": chosen == gold}


def _continued(tokens, start, result, tokenizer):
    expected, predicted = tokens[start:], result[1]
    texts = {"expected": tokenizer.decode(expected), "predicted": tokenizer.decode(predicted)}
    return {**texts, "correct": predicted == expected}


# ---------------------------------------------------------------------------------------------------------------------
# Rows of tokens


def score(scorer, rows, pass_tokens, progress=None):
    """
    {key: (mean loss in nats, likeliest tokens)} over the scored tokens of `rows`, {key: (tokens, start)}.

    The keys keep their order. `progress(share)` is called after each pass.
    """
    runs = {}  # tokens to run, which is all but the last -> rows: options of one token, and equal ones, share a run
    for key, (tokens, start) in rows.items():
        if start < len(tokens):
            runs.setdefault(tuple(tokens[:-1]), []).append(key)
    first = {run: min(rows[key][1] for key in keys) - 1 for run, keys in runs.items()}  # position that predicts first
    groups = prefix_groups(first) if scorer.shares_prefixes else [(0, [run]) for run in runs]
    groups.sort(key=lambda group: group[0], reverse=True)
    results, done = {}, 0
    for batch in _batches(groups, lambda group: group[0], pass_tokens, scorer.equal_prefixes):
        cache = scorer.prefill([members[0][:prefix] for prefix, members in batch])
        rests = [(row, run, prefix) for row, (prefix, members) in enumerate(batch) for run in members]
        rests.sort(key=lambda rest: len(rest[1]) - rest[2], reverse=True)
        # The cache's rows are repeated for these, so their prefixes count too.
        for part in _batches(rests, lambda rest, n=batch[0][0]: n + len(rest[1]) - rest[2], 2 * pass_tokens):
            wanted = [(key, i) for i, (_, run, _) in enumerate(part) for key in runs[run]]
            results |= _score_part(scorer, cache, part, {key: (i, *rows[key]) for key, i in wanted})
            done += len(part)
            if progress:
                progress(done / len(runs))
    return {key: results.get(key, (math.nan, [])) for key in rows}


def prefix_groups(first):
    """
    [(length of the shared prefix, [run, ...])] of runs, {tokens: the first position whose prediction is scored}.

    A run joins its neighbour in sorted order where that leaves fewer tokens to run; what is scored stays in the rest.
    """
    groups = []
    for run in sorted(first):
        if groups:
            prefix, members = groups[-1]
            n = min(shared(members[0][:prefix], run), first[run])
            if n >= MIN_SHARE * max(len(members[0]), len(run)) and n * len(members) > prefix * (len(members) - 1):
                groups[-1] = n, [*members, run]
                continue
        groups.append((first[run], [run]))
    return groups


def _batches(items, width, limit, equal=False):
    """Lists of neighbours among `items`, widest first, each padded to at most `limit`, but at least one a list."""
    batch = []
    for item in items:
        if batch and (width(batch[0]) * (len(batch) + 1) > limit or equal and width(item) != width(batch[0])):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def _score_part(scorer, cache, part, wanted):
    """score() of the rows `wanted`, {key: (index in `part`, tokens, start)}; part: [(row of cache, run, prefix)]."""
    spans = [(i, s - 1 - part[i][2], tokens[s:]) for i, tokens, s in wanted.values()]
    at_row = [i for i, _, targets in spans for _ in targets]
    at_column = [column + n for _, column, targets in spans for n in range(len(targets))]
    rests = [list(run[prefix:]) for _, run, prefix in part]
    targets = torch.tensor([t for _, _, targets in spans for t in targets], device=scorer.device)
    losses, likeliest, at = [], [], 0
    for logits in scorer.logits(cache, [row for row, _, _ in part], rests, at_row, at_column):
        losses.append(F.cross_entropy(logits, targets[at : at + len(logits)], reduction="none"))
        likeliest.append(logits.argmax(-1))
        at += len(logits)
    sizes = [len(targets) for _, _, targets in spans]
    losses, likeliest = (torch.cat(x).cpu().split(sizes) for x in (losses, likeliest))
    return {k: (loss.mean().item(), ids.tolist()) for k, loss, ids in zip(wanted, losses, likeliest, strict=True)}


def padded(rows, device):
    """Ids (B, T) of rows of any lengths; causal attention: what is padded on the right changes nothing before it."""
    n = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (n - len(row))] for row in rows], device=device)


class GPTScorer:
    """Runs a GPT: prefixes into a cache, then the rows that begin with them."""

    max_tokens = None  # the rotary table grows with the prompts
    shares_prefixes, equal_prefixes = True, False

    def __init__(self, model, compute):
        self.model, self.compute, self.device = model, compute, model.get_device()

    def prefill(self, prefixes):
        """A cache with a row for each of `prefixes`, of any lengths."""
        cache = KVCache(self.model.config.n_layer, len(prefixes), self.device)
        if any(prefixes):
            with self.compute.autocast():
                self.model.hidden(padded(prefixes, self.device), cache, fill_only=True)
        cache.lengths = [len(prefix) for prefix in prefixes]
        return cache

    def logits(self, cache, owners, rests, rows, columns):
        """Yield logits (n, V) in float32 after rests[row][column], where rests[i] follows row owners[i] of `cache`."""
        repeated = KVCache(self.model.config.n_layer, device=self.device)
        if cache.data is not None:  # room at once for what is to come
            longest = max(cache.lengths[owner] for owner in owners) + max(map(len, rests))
            heads, _, head_dim = cache.data.shape[-3:]
            repeated.reserve(len(owners), longest, heads, head_dim, cache.data.dtype)
        repeated.append(cache, owners)
        with self.compute.autocast():
            x = self.model.hidden(padded(rests, self.device), repeated)[rows, columns]
        for chunk in x.split(chunk_rows(x, self.model.config.vocab_size)):
            with self.compute.autocast():
                yield self.model.logits(chunk)
