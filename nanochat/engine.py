"""
Inference: a KV cache with rows of different lengths, sampling, and one decode loop behind everything.

    engine = Engine(model, tokenizer, compute)
    results, masks = engine.generate_batch(tokens, num_samples=4, max_tokens=64)

Requests enter the loop with their own prompt, settings and seed, share one forward pass per step, and their rows leave
when done (continuous batching). A prompt is prefilled once however many samples it has. A row's tokens depend on its
prompt, settings, seed and sample number, not on its company.
"""

import contextlib
import random
from collections import defaultdict, deque
from dataclasses import dataclass, field

import torch

from nanochat.calculator import calculate
from nanochat.common import UserError

PREFILL_TOKENS = 8192  # padded tokens in one prefill pass; bounds the activations' memory
MIN_COLUMNS = 64  # of a new cache
MIN_TEMPERATURE = 1e-5  # below it sampling is greedy: logits lie within (-15, 15)
PARTS = {"python_start": "python", "python_end": "text", "output_start": "output", "output_end": "text"}
HIDDEN = ("bos", "user_start", "user_end", "assistant_start", "assistant_end")


class KVCache:
    """
    Keys and values of all layers for rows of different lengths; row b's tokens are columns 0 to lengths[b] - 1.

    The model calls begin(T), insert(layer, k, v) for every layer, advance(T). Storage is allocated at the first insert
    in k's dtype and doubles in place when rows or columns run out. Columns beyond a row's length hold finite leftovers,
    which the mask hides.
    """

    def __init__(self, n_layer, rows=0, device="cpu"):
        self.n_layer, self.device = n_layer, device
        self.lengths = [0] * rows  # tokens held, per row
        self.data = None  # (n_layer, 2, rows, Hkv, columns, D)

    def max_position(self, T):
        """One more than the largest position of the next T tokens, over all rows."""
        return max(self.lengths) + T

    def begin(self, T):
        """Positions (B, T) of the next T tokens of every row, and what each attends to: None or a bool mask."""
        lengths = torch.tensor(self.lengths, device=self.device)
        self.positions = lengths[:, None] + torch.arange(T, device=self.device)
        self.rows = torch.arange(len(self.lengths), device=self.device)[:, None]
        self.uniform, S = len(set(self.lengths)) == 1, self.max_position(T)
        if self.uniform and (T == 1 or S == T):  # all columns, or the plain causal triangle
            return self.positions, None
        seen = self.positions[:1] if self.uniform else self.positions
        return self.positions, (torch.arange(S, device=self.device) <= seen[..., None])[:, None]  # (B or 1, 1, T, S)

    def insert(self, layer, k, v):
        """Store k, v (B, Hkv, T, D) of `layer` behind each row's tokens; returns all its columns (B, Hkv, S, D)."""
        B, H, T, D = k.shape
        assert B == len(self.lengths), f"{B} rows for a cache of {len(self.lengths)}"
        S = self.max_position(T)
        self._reserve(B, S, like=k)
        for kept, new in zip(self.data[layer], (k, v), strict=True):
            if self.uniform:
                kept[:B, :, S - T : S] = new
            else:
                kept[self.rows, :, self.positions] = new.transpose(1, 2)
        return tuple(self.data[layer, :, :B, :, :S])

    def advance(self, T):
        self.lengths = [n + T for n in self.lengths]

    def append(self, other, rows):
        """Add rows at the end: copies of `rows` of `other`, a row as often as it is named."""
        first, self.lengths = len(self.lengths), self.lengths + [other.lengths[r] for r in rows]
        S = max((other.lengths[r] for r in rows), default=0)
        if S:
            self._reserve(len(self.lengths), max(self.lengths), like=other.data)
            self.data[:, :, first : len(self.lengths), :, :S] = other.data[:, :, rows, :, :S]

    def select(self, rows):
        """Keep only `rows`, in this order; a row may be named more than once. Rows that stay in place cost nothing."""
        moved = [(to, source) for to, source in enumerate(rows) if to != source]
        lengths = [self.lengths[r] for r in rows]
        S = max((lengths[to] for to, _ in moved), default=0)
        if S:
            self._reserve(len(rows), S, like=self.data)
            to, source = zip(*moved, strict=True)
            self.data[:, :, list(to), :, :S] = self.data[:, :, list(source), :, :S]
        self.lengths = lengths

    def _reserve(self, rows, columns, like):
        """Room for `rows` and `columns`; `like` (..., Hkv, columns, D) gives heads, their size, dtype."""
        have_rows, have_columns = (0, 0) if self.data is None else (self.data.size(2), self.data.size(4))
        if rows <= have_rows and columns <= have_columns:
            return
        rows = have_rows if rows <= have_rows else max(rows, 2 * have_rows)
        columns = have_columns if columns <= have_columns else max(columns, 2 * have_columns, MIN_COLUMNS)
        shape = (self.n_layer, 2, rows, like.size(-3), columns, like.size(-1))
        grown = torch.zeros(shape, dtype=like.dtype, device=self.device)  # not empty: a masked NaN would still spread
        if self.data is not None:
            grown[:, :, :have_rows, :, :have_columns] = self.data
        self.data = grown


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt and how to go on from it. `max_tokens` counts forced tokens too; None = up to the context's end."""

    tokens: list[int]
    max_tokens: int | None = None
    temperature: float = 1.0  # 0 = greedy
    top_k: int | None = None  # 0 or None = off
    seed: int = 42
    num_samples: int = 1

    def __post_init__(self):
        if not self.tokens:
            raise UserError("the prompt is empty; give it at least one token (<|bos|>)")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise UserError(f"max_tokens={self.max_tokens}: expected at least 1, or None for the context's end")
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature={self.temperature}: expected 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 0:
            raise UserError(f"top_k={self.top_k}: expected 0 (off) or more")
        if self.num_samples < 1:
            raise UserError(f"num_samples={self.num_samples}: expected at least 1")


@dataclass(eq=False)
class Row:
    """One sample of a request: on its way while `finish` is None."""

    request: Request
    sample: int  # 0 to num_samples - 1
    limit: int  # of len(tokens)
    tokens: list[int] = field(default_factory=list)  # generated so far, with the terminal token if there is one
    mask: list[int] = field(default_factory=list)  # 1 = sampled, 0 = forced by the tool
    finish: str | None = None  # "stop": a terminal token, "length": max_tokens or the context's end
    forced: deque = field(default_factory=deque)  # tokens of the tool's result still to come
    call: list[int] | None = None  # tokens since <|python_start|>

    def __post_init__(self):
        self.rng = random.Random(f"{self.request.seed},{self.sample}")

    @property
    def completion(self):
        """What was generated, without the terminal token."""
        return self.tokens[:-1] if self.finish == "stop" else self.tokens


def sample(logits, temperature, top_k, rngs):
    """Token ids (B,) drawn from logits (B, V), one random number per row, from that row's own generator."""
    if temperature < MIN_TEMPERATURE:
        return logits.argmax(-1)
    ids = None
    if top_k and top_k < logits.size(-1):
        logits, ids = logits.topk(top_k)
    cdf = (logits / temperature).softmax(-1).cumsum(-1)
    # 24 random bits are exact in float32 and stay below 1, so that the last token's share is never overrun.
    uniform = torch.tensor([rng.getrandbits(24) / 2**24 for rng in rngs], device=logits.device)
    picked = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True)
    return (picked if ids is None else ids.gather(1, picked))[:, 0]


class DecodeLoop:
    """Continuous batching: submit() requests at any time, step() gives every row in the batch one more token."""

    def __init__(self, engine, max_rows):
        self.engine, self.max_rows = engine, max_rows
        self.waiting = deque()  # groups of rows that share one prompt and join together
        self.rows = []  # rows in the batch, in the cache's order
        self.cache = KVCache(engine.model.config.n_layer, device=engine.model.get_device())

    @property
    def busy(self):
        return bool(self.rows or self.waiting)

    def submit(self, request):
        """Queue `request`; returns its rows. Raises UserError when its prompt leaves no room in the context."""
        room = self.engine.model.config.sequence_len - len(request.tokens)
        if room < 1:
            raise UserError(
                f"the prompt has {len(request.tokens):,} tokens; the model's context of "
                f"{self.engine.model.config.sequence_len:,} leaves no room for an answer: shorten the prompt"
            )
        limit = min(room, request.max_tokens or room)
        rows = [Row(request, i, limit) for i in range(request.num_samples)]
        self.waiting.extend(rows[i : i + self.max_rows] for i in range(0, len(rows), self.max_rows))
        return rows

    @torch.inference_mode()
    def step(self):
        """Admit what fits, add a token to every row in the batch, let finished rows leave; returns the stepped rows."""
        self._admit()
        rows = self.rows
        if not rows:
            return []
        last = [row.tokens[-1] if row.tokens else row.request.tokens[-1] for row in rows]
        logits = self.engine.forward([[token] for token in last], self.cache)
        for row, token, sampled in zip(rows, *self._next_tokens(logits), strict=True):
            self.engine.take(row, token, sampled)
        keep = [i for i, row in enumerate(rows) if not row.finish]
        if len(keep) < len(rows):  # fill each hole with a row from the end, so that few rows move
            order = [i if not rows[i].finish else keep.pop() for i in range(len(keep))]
            self.cache.select(order)
            self.rows = [rows[i] for i in order]
        return rows

    def _admit(self):
        """Prefill waiting prompts, each once, and copy them to the rows of their group."""
        joining, longest, free = [], 0, self.max_rows - len(self.rows)
        while self.waiting and len(self.waiting[0]) <= free:
            longest = max(longest, len(self.waiting[0][0].request.tokens))
            if joining and longest * (len(joining) + 1) > PREFILL_TOKENS:
                break
            free -= len(self.waiting[0])
            joining.append(self.waiting.popleft())
        if joining:
            # All but the last token: that one enters with the step, which gives each row logits of its own.
            prompts = self.engine.prefill([group[0].request.tokens[:-1] for group in joining])
            self.cache.append(prompts, [i for i, group in enumerate(joining) for _ in group])
            self.rows = self.rows + [row for group in joining for row in group]

    def _next_tokens(self, logits):
        """([token], [1 = sampled, 0 = forced]) of each row; rows of equal settings are sampled in one go."""
        rows = self.rows
        tokens = [row.forced.popleft() if row.forced else None for row in rows]
        sampled = [int(token is None) for token in tokens]
        settings = defaultdict(list)
        for i, row in enumerate(rows):
            if sampled[i]:
                settings[row.request.temperature, row.request.top_k].append(i)
        for (temperature, top_k), members in settings.items():
            some = logits if len(members) == len(rows) else logits[members]
            drawn = sample(some, temperature, top_k, [rows[i].rng for i in members])
            for i, token in zip(members, drawn.tolist(), strict=True):
                tokens[i] = token
        return tokens, sampled


class Engine:
    """Generates with `model`; `compute` (nanochat.common.Compute) sets the precision, None = the weights'."""

    def __init__(self, model, tokenizer, compute=None):
        self.model, self.tokenizer, self.compute = model, tokenizer, compute
        special = tokenizer.encode_special
        self.python_start, self.python_end = special("<|python_start|>"), special("<|python_end|>")
        self.output_start, self.output_end = special("<|output_start|>"), special("<|output_end|>")
        self.assistant_end = special("<|assistant_end|>")
        self.terminals = {self.assistant_end, tokenizer.get_bos_token_id()}

    def forward(self, ids, cache):
        """Logits (B, V) after the last of `ids` (B lists of one length), which join `cache`."""
        ids = torch.tensor(ids, device=self.model.get_device())
        with self.compute.autocast() if self.compute else contextlib.nullcontext():
            return self.model(ids, kv_cache=cache, last_only=True)[:, -1]

    def prefill(self, prompts):
        """A cache with one row per prompt (lists of ids of any lengths, also 0), made in one padded pass."""
        cache = KVCache(self.model.config.n_layer, len(prompts), self.model.get_device())
        longest = max(map(len, prompts))
        if longest:  # causal attention: what is padded on the right changes nothing before it
            self.forward([prompt + [0] * (longest - len(prompt)) for prompt in prompts], cache)
        cache.lengths = [len(prompt) for prompt in prompts]
        return cache

    @torch.inference_mode()
    def next_logits(self, prompts):
        """Logits (B, V) of the token after each of `prompts` (lists of ids, of any lengths from 1)."""
        cache = self.prefill([prompt[:-1] for prompt in prompts])
        return self.forward([prompt[-1:] for prompt in prompts], cache)

    def take(self, row, token, sampled):
        """Give `row` its next token: ends it, or moves its calculator along."""
        row.tokens.append(token)
        row.mask.append(sampled)
        if sampled and token in self.terminals:
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

    def generate(self, tokens, num_samples=1, max_tokens=None, temperature=1.0, top_k=None, seed=42):
        """
        Yield (token_column, token_masks) per step: lists of length num_samples; mask 0 = forced, 1 = sampled.

        A row's last token is its terminal, <|assistant_end|> or <|bos|>, unless it was cut off; from then on its
        column holds <|assistant_end|> with mask 0, until all rows are done.
        """
        loop = DecodeLoop(self, max_rows=num_samples)
        rows = loop.submit(Request(tokens, max_tokens, temperature, top_k, seed, num_samples))
        step = 0
        while loop.busy:
            loop.step()
            live = [step < len(row.tokens) for row in rows]
            column = [row.tokens[step] if here else self.assistant_end for row, here in zip(rows, live, strict=True)]
            yield column, [row.mask[step] if here else 0 for row, here in zip(rows, live, strict=True)]
            step += 1

    def generate_batch(self, tokens, num_samples=1, **settings):
        """([prompt + completion], [mask]) of each sample, without terminal tokens; mask 0 = prompt or forced."""
        loop = DecodeLoop(self, max_rows=num_samples)
        rows = loop.submit(Request(tokens, num_samples=num_samples, **settings))
        while loop.busy:
            loop.step()
        results = [tokens + row.completion for row in rows]
        return results, [[0] * len(tokens) + row.mask[: len(row.completion)] for row in rows]

    def generate_many(self, requests, max_rows=64):
        """Yield the finished rows of many requests, as they finish, from one batch of up to `max_rows` rows."""
        loop = DecodeLoop(self, max_rows)
        for request in requests:
            loop.submit(request)
        while loop.busy:
            yield from (row for row in loop.step() if row.finish)


class TextStream:
    """Tokens of an answer in, (kind, piece of text) out; kind is "text", or the calculator's "python" or "output"."""

    def __init__(self, tokenizer):
        self.tokenizer, self.kind = tokenizer, "text"
        self.parts = {tokenizer.encode_special(f"<|{name}|>"): kind for name, kind in PARTS.items()}
        self.hidden = {tokenizer.encode_special(f"<|{name}|>") for name in HIDDEN}
        self.pending, self.emitted = [], 0  # tokens since the last clean cut, characters of them already given out

    def push(self, token):
        """The text that is certain now: a character whose bytes are not all there yet waits for the next token."""
        if token in self.parts:
            piece, self.kind = self.flush(), self.parts[token]
            return piece
        if token in self.hidden:
            return self.kind, ""
        self.pending.append(token)
        text = self.tokenizer.decode(self.pending)
        if not text.endswith("\ufffd"):
            return self.flush()
        start, self.emitted = self.emitted, len(text) - 1  # an unfinished character decodes to one U+FFFD
        return self.kind, text[start:-1]

    def flush(self):
        """All that is left, also half a character (as U+FFFD)."""
        piece = self.tokenizer.decode(self.pending)[self.emitted :]
        self.pending, self.emitted = [], 0
        return self.kind, piece


def visible_text(tokenizer, tokens):
    """What a reader sees of an answer: its text without the calculator's calls and outputs."""
    stream = TextStream(tokenizer)
    pieces = [*map(stream.push, tokens), stream.flush()]
    return "".join(piece for kind, piece in pieces if kind == "text")
