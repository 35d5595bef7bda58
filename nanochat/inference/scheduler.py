"""
Continuous batching: requests join a running batch, each step decodes one token per row, finished rows leave.

A prompt is prefilled once, however many samples it has, and in chunks while other rows are being decoded. A row's
tokens depend on its prompt, settings, seed and sample number, not on the batch it runs in.
"""

import random
from collections import defaultdict, deque
from dataclasses import dataclass, field

import torch

from nanochat.calculator import calculate
from nanochat.common import require
from nanochat.inference.detokenizer import Detokenizer
from nanochat.inference.sampling import Request, apply_penalties, log_probabilities, sample

PREFILL_TOKENS = 8192  # padded tokens in one prefill pass; bounds the activations' memory
PREFILL_CHUNK = 512  # padded tokens in one prefill pass while other rows are being decoded


@dataclass(eq=False)
class Row:
    """One sample of a request; in progress while `finish` is None."""

    request: Request
    sample: int  # 0 to num_samples - 1
    rng: random.Random
    limit: int  # maximum of len(tokens)
    tokens: list[int] = field(default_factory=list)  # generated so far, including the terminal token
    mask: list[int] = field(default_factory=list)  # 1 = sampled, 0 = forced by the calculator
    logprobs: list = field(default_factory=list)  # per token, if requested: see log_probabilities()
    finish: str | None = None  # "stop" (terminal token or stop string), "length" or "cancelled"
    cached: int = 0  # prompt tokens taken from the prefix cache
    forced: deque = field(default_factory=deque)  # tokens of the calculator's result still to be emitted
    call: list[int] | None = None  # tokens since <|python_start|>
    detokenizer: Detokenizer | None = None  # finds stop strings

    @property
    def completion(self):
        """The generated tokens without the terminal token."""
        stop_string = self.detokenizer and self.detokenizer.stopped
        return self.tokens[:-1] if self.finish == "stop" and not stop_string else self.tokens


def terminal_tokens(tokenizer):
    """Ids that end an answer."""
    return {tokenizer.encode_special("<|assistant_end|>"), tokenizer.get_bos_token_id()}


class Prefill:
    """Prefill of prompts into the rows of an empty cache, in chunks; prefixes in the prefix cache are copied."""

    def __init__(self, backend, prompts, cache, prefix_cache=None):
        self.backend, self.cache, self.pending = backend, cache, prompts
        cache.lengths = [0] * len(prompts)
        if prefix_cache:
            self.pending = [prompt[prefix_cache.restore(prompt, cache, row) :] for row, prompt in enumerate(prompts)]

    @property
    def done(self):
        return not any(self.pending)

    def advance(self, max_tokens=PREFILL_TOKENS):
        """One forward pass over at most `max_tokens` tokens, but at least one per row."""
        n = max(1, max_tokens // len(self.pending))
        self.backend.fill([tokens[:n] for tokens in self.pending], self.cache)
        self.pending = [tokens[n:] for tokens in self.pending]


class DecodeLoop:
    """
    The running batch. submit() queues a request at any time, step() decodes one token per row.

    New prompts are admitted only when at least `gather` of the `max_rows` rows are free: prefilling several prompts
    together increases throughput and latency.
    """

    def __init__(self, backend, tokenizer, max_rows, prefix_cache, gather=1):
        self.backend, self.tokenizer, self.prefix_cache = backend, tokenizer, prefix_cache
        self.max_rows, self.gather = max_rows, gather
        self.terminals = terminal_tokens(tokenizer)
        self.python_start, self.python_end = map(tokenizer.encode_special, ("<|python_start|>", "<|python_end|>"))
        self.output_start, self.output_end = map(tokenizer.encode_special, ("<|output_start|>", "<|output_end|>"))
        self.waiting = deque()  # groups: lists of rows that share a prompt and are admitted together
        self.joining, self.prefill = [], None  # groups whose prompts are being prefilled
        self.rows = []  # rows in the batch, in the order of the cache's rows
        self.cache = backend.new_cache()

    @property
    def busy(self):
        return bool(self.rows or self.joining or self.waiting)

    def submit(self, request):
        """Queue `request` and return its rows. Raises UserError if the prompt fills the whole context."""
        context = self.backend.model.config.sequence_len
        room = context - len(request.tokens)
        message = f"the prompt has {len(request.tokens):,} tokens; the model's context of {context:,} leaves no room "
        require(room >= 1, message + "for an answer: shorten the prompt")
        limit = min(room, request.max_tokens or room)
        rows = [Row(request, i, random.Random(f"{request.seed},{i}"), limit) for i in range(request.num_samples)]
        start = max((i for i, token in enumerate(request.tokens) if token == self.python_start), default=context)
        tail = request.tokens[start:]
        for row in rows if tail and self.python_end not in tail else ():  # the prompt ends within a call
            row.call = tail[1:]
        for row in rows if request.stop else ():
            row.detokenizer = Detokenizer(self.tokenizer, request.stop)
        self.waiting.extend(rows[i : i + self.max_rows] for i in range(0, len(rows), self.max_rows))
        return rows

    def cancel(self, rows):
        """Remove `rows` before the next step, which will not return them."""
        for row in rows:
            row.finish = row.finish or "cancelled"
        self.waiting = deque(group for group in self.waiting if not all(row.finish for row in group))

    @torch.inference_mode()
    def step(self):
        """Admit prompts, decode one token per row, remove finished rows; returns the rows that got a token."""
        with self.backend.limit_threads():
            self._remove_finished()
            self._admit()
            rows = self.rows
            if not rows:
                return []
            logits = self.backend.forward([row.tokens[-1:] or row.request.tokens[-1:] for row in rows], self.cache)
            for row, token, mask in zip(rows, *self._next_tokens(logits), strict=True):
                self._append(row, token, mask)
            self._remove_finished()
            return rows

    def _append(self, row, token, sampled):
        """Add a row's next token; sets `finish` if it ends the row, and runs the calculator on <|python_end|>."""
        row.tokens.append(token)
        row.mask.append(sampled)
        is_terminal = sampled and (token in self.terminals or token in row.request.stop_tokens)
        if is_terminal or (row.detokenizer and row.detokenizer.push(token) and row.detokenizer.stopped):
            row.finish = "stop"
        elif len(row.tokens) >= row.limit:
            row.finish = "length"
        elif token == self.python_start:
            row.call = []
        elif token == self.python_end and row.call is not None:
            result = calculate(self.tokenizer.decode(row.call))
            if result is not None:
                row.forced.extend([self.output_start, *self.tokenizer.encode(result), self.output_end])
            row.call = None
        elif row.call is not None:
            row.call.append(token)

    def _remove_finished(self):
        rows = self.rows
        active = [i for i, row in enumerate(rows) if not row.finish]
        if len(active) == len(rows):
            return
        for i, row in enumerate(rows):
            if row.finish:
                self.prefix_cache.add(row.request.tokens + row.tokens, self.cache, i)
        # Fill each hole with a row from the end, so that few rows move.
        order = [i if not rows[i].finish else active.pop() for i in range(len(active))]
        self.cache.select(order)
        self.rows = [rows[i] for i in order]

    def _admit(self):
        """Start or continue the prefill of waiting groups; add the groups to the batch when it is done."""
        if not self.joining:
            self._start_prefill()
        while self.joining and not self.prefill.done:
            self.prefill.advance(PREFILL_CHUNK if self.rows else PREFILL_TOKENS)
            if self.rows:
                break
        if self.joining and self.prefill.done:
            members = [(i, row) for i, group in enumerate(self.joining) for row in group if not row.finish]
            if self.prefill.cache is self.cache:
                self.cache.select([i for i, _ in members])
            else:
                self.cache.append(self.prefill.cache, [i for i, _ in members])
            self.rows = self.rows + [row for _, row in members]
            self.joining, self.prefill = [], None

    def _start_prefill(self):
        """Choose the groups to prefill together: as many as fit the free rows and one pass."""
        free, longest = self.max_rows - len(self.rows), 0
        if self.rows and free < self.gather:
            return
        while self.waiting and len(self.waiting[0]) <= free:
            longest = max(longest, len(self.waiting[0][0].request.tokens))
            if self.joining and longest * (len(self.joining) + 1) > PREFILL_TOKENS:
                break
            free -= len(self.waiting[0])
            self.joining.append(self.waiting.popleft())
        if not self.joining:
            return
        # step() processes the last token of a prompt, once per sample.
        prompts = [group[0].request.tokens[:-1] for group in self.joining]
        # An empty batch is prefilled in place, without a copy.
        cache = self.backend.new_cache() if self.rows else self.cache
        self.prefill = Prefill(self.backend, prompts, cache, self.prefix_cache)
        for group, n in zip(self.joining, cache.lengths, strict=True):
            for row in group:
                row.cached = n

    def _next_tokens(self, logits):
        """(tokens, mask) of the next step: forced tokens where a row has them, else sampled from logits (B, V)."""
        rows = self.rows
        tokens = [row.forced.popleft() if row.forced else None for row in rows]
        mask = [int(token is None) for token in tokens]
        groups = defaultdict(list)  # settings -> rows that are sampled in one call
        for i, request in enumerate(row.request for row in rows):
            if mask[i]:
                groups[request.temperature, request.top_k, request.top_p, request.min_p].append(i)
        for (temperature, top_k, top_p, min_p), group in groups.items():
            own_logits = logits if len(group) == len(rows) else logits[group]
            if any(rows[i].request.has_penalties for i in group):
                own_logits = torch.stack([apply_penalties(logits[i], rows[i].request, rows[i].tokens) for i in group])
            drawn = sample(own_logits, temperature, top_k, [rows[i].rng for i in group], top_p, min_p)
            for i, token in zip(group, drawn, strict=True):
                tokens[i] = token
        for i, row in enumerate(rows):
            if row.request.logprobs is not None:
                row.logprobs.append(log_probabilities(logits[i], tokens[i], row.request.logprobs))
        return tokens, mask
