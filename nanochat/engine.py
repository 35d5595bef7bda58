"""
Inference: a KV cache with rows of different lengths, sampling, and one decode loop behind everything.

    engine = Engine(model, tokenizer, compute)
    results, masks = engine.generate_batch(tokens, num_samples=4, max_tokens=64)

Requests enter the loop with their own prompt, settings and seed, share one forward pass per step, and their rows leave
when done (continuous batching). A prompt is prefilled once however many samples it has, in chunks so that those who
are being answered do not wait for it, and from where it begins to differ from what was prefilled before, if the loop
keeps that. A row's tokens depend on its prompt, settings, seed and sample number, not on its company.
"""

import contextlib
import random
from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field

import torch

from nanochat.calculator import calculate
from nanochat.common import UserError
from nanochat.cpu_decode import CPUDecoder, torch_threads
from nanochat.cuda_decode import CUDADecoder
from nanochat.gpt import GPT
from nanochat.kv_cache import KVCache, PrefixCache
from nanochat.text_stream import TextStream

PREFILL_TOKENS = 8192  # padded tokens in one prefill pass; bounds the activations' memory
PREFILL_CHUNK = 512  # the same while other rows wait for their next token
MIN_TEMPERATURE = 1e-5  # below it sampling is greedy: logits lie within (-15, 15)


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt and how to go on from it. `max_tokens` counts forced tokens too; None = up to the context's end."""

    tokens: list[int]
    max_tokens: int | None = None
    temperature: float = 1.0  # 0 = greedy
    top_k: int | None = None  # 0 or None = off
    seed: int = 42
    num_samples: int = 1
    top_p: float = 1.0  # the likeliest tokens that together have this probability (Holtzman et al. 2020)
    min_p: float = 0.0  # tokens at least this likely, as a share of the likeliest (Nguyen et al. 2024)
    repetition_penalty: float = 1.0  # divides the logits of tokens in the prompt or answer (Keskar et al. 2019)
    frequency_penalty: float = 0.0  # taken off a token's logit for each time that the answer has it
    presence_penalty: float = 0.0  # taken off once
    logit_bias: dict[int, float] | None = None  # added to tokens' logits
    stop: tuple[str, ...] = ()  # text that ends the answer, and is no part of it
    stop_tokens: frozenset[int] = frozenset()
    logprobs: int | None = None  # log-probabilities of each sampled token and of so many of the likeliest; None = off

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
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p}: expected more than 0, at most 1 (off)")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p={self.min_p}: expected 0 (off) to 1")
        if not 0 < self.repetition_penalty < float("inf"):
            raise UserError(f"repetition_penalty={self.repetition_penalty}: expected more than 0 (1 = off)")
        if "" in self.stop:
            raise UserError("a stop text is empty")

    @property
    def sampler(self):
        """What rows must have in common to be sampled in one go."""
        return self.temperature, self.top_k, self.top_p, self.min_p

    @property
    def adjusts(self):
        """Whether logits are changed before sampling."""
        penalties = self.repetition_penalty != 1, self.frequency_penalty, self.presence_penalty
        return any(penalties) or bool(self.logit_bias)


@dataclass(eq=False)
class Row:
    """One sample of a request: on its way while `finish` is None."""

    request: Request
    sample: int  # 0 to num_samples - 1
    limit: int  # of len(tokens)
    tokens: list[int] = field(default_factory=list)  # generated so far, with the terminal token if there is one
    mask: list[int] = field(default_factory=list)  # 1 = sampled, 0 = forced by the tool
    logprobs: list = field(default_factory=list)  # if wanted, per token (its own, [(token, its) of the likeliest])
    finish: str | None = None  # "stop": a terminal or a stop; "length": max_tokens or the context's end; "cancelled"
    cached: int = 0  # tokens of the prompt that were not computed again
    forced: deque = field(default_factory=deque)  # tokens of the tool's result still to come
    call: list[int] | None = None  # tokens since <|python_start|>
    stream: TextStream | None = None  # looks for stop texts

    def __post_init__(self):
        self.rng = random.Random(f"{self.request.seed},{self.sample}")

    @property
    def completion(self):
        """What was generated, without the terminal token."""
        by_text = self.stream and self.stream.stopped
        return self.tokens[:-1] if self.finish == "stop" and not by_text else self.tokens

    def adjust(self, logits):
        """Logits (V,) with the request's penalties and biases, for this row's next token."""
        r, logits = self.request, logits.clone()
        if r.repetition_penalty != 1:
            seen = torch.tensor(sorted({*r.tokens, *self.tokens}), device=logits.device)
            some = logits[seen]
            some = torch.where(some > 0, some / r.repetition_penalty, some * r.repetition_penalty)
            logits[seen] = some.clamp(-1e4, 1e4)  # an infinite one would leave no probabilities
        for token, n in Counter(self.tokens).items():
            logits[token] -= n * r.frequency_penalty + r.presence_penalty
        for token, bias in (r.logit_bias or {}).items():
            logits[token] += bias
        return logits


def sample(logits, temperature, top_k, rngs, top_p=1.0, min_p=0.0):
    """Token ids, a list, drawn from logits (B, V), one random number per row, from that row's own generator."""
    temperature = 0 if temperature < MIN_TEMPERATURE else temperature
    # 24 random bits are exact in float32 and stay below 1, so that the last token's share is never overrun.
    uniforms = [rng.getrandbits(24) / 2**24 for rng in rngs] if temperature else [0.0] * len(rngs)
    if logits.device.type == "cpu":
        import rustbpe

        return rustbpe.sample(logits.float().contiguous(), uniforms, temperature, top_k or 0, top_p, min_p)
    return sample_on_device(logits, uniforms, temperature, top_k, top_p, min_p).tolist()


def sample_on_device(logits, uniforms, temperature, top_k, top_p, min_p):
    """The same as ids (B,), where the logits are."""
    if not temperature:
        return logits.argmax(-1)
    ids = None
    if top_k and top_k < logits.size(-1):
        logits, ids = logits.topk(top_k)
    elif top_p < 1:
        logits, ids = logits.sort(descending=True)
    probs = (logits / temperature).softmax(-1)
    if top_p < 1:
        beyond = probs.cumsum(-1) - probs >= top_p
        beyond[:, 0] = False  # the likeliest stays, whatever rounding does
        probs = probs.masked_fill(beyond, 0)
    if min_p > 0:
        probs = probs.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), 0)
    cdf = probs.cumsum(-1)
    uniforms = torch.tensor(uniforms, device=logits.device)[:, None]
    picked = torch.searchsorted(cdf, uniforms * cdf[:, -1:], right=True)
    return (picked if ids is None else ids.gather(1, picked))[:, 0]


class Prefill:
    """Prompts on their way into a cache that holds nothing else, a chunk of tokens at a time."""

    def __init__(self, engine, prompts, cache, prefixes=None):
        self.engine, self.cache, self.left = engine, cache, list(prompts)
        cache.lengths = [0] * len(prompts)
        for row, prompt in enumerate(prompts):
            n, data = prefixes.find(prompt) if prefixes else (0, None)
            if n:
                self.cache.restore(row, data[..., :n, :])
                self.left[row] = prompt[n:]

    @property
    def done(self):
        return not any(self.left)

    def advance(self, max_tokens):
        """One pass over at most `max_tokens` tokens, but at least one a row."""
        n = max(1, max_tokens // len(self.left))
        self.engine.fill([tokens[:n] for tokens in self.left], self.cache)
        self.left = [tokens[n:] for tokens in self.left]


class DecodeLoop:
    """
    Continuous batching: submit() requests at any time, step() gives every row in the batch one more token.

    Prompts join once `gather` of the `max_rows` are free: a few together are quicker than one by one, but later.
    """

    def __init__(self, engine, max_rows, gather=1):
        self.engine, self.max_rows, self.gather = engine, max_rows, gather
        self.waiting = deque()  # groups of rows that share one prompt and join together
        self.joining, self.prefill = [], None  # groups whose prompts are being prefilled
        self.rows = []  # rows in the batch, in the cache's order
        self.cache = engine.new_cache()

    @property
    def busy(self):
        return bool(self.rows or self.joining or self.waiting)

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
        for row in rows if request.stop else ():
            row.stream = TextStream(self.engine.tokenizer, request.stop)
        self.waiting.extend(rows[i : i + self.max_rows] for i in range(0, len(rows), self.max_rows))
        return rows

    def cancel(self, rows):
        """Let `rows` leave before the next step; they are not returned by it."""
        for row in rows:
            row.finish = row.finish or "cancelled"
        self.waiting = deque(group for group in self.waiting if not all(row.finish for row in group))

    @torch.inference_mode()
    def step(self):
        """Admit what fits, add a token to every row in the batch, let finished rows leave; returns the stepped rows."""
        with self.engine.quiet():
            self._leave()
            self._admit()
            rows = self.rows
            if not rows:
                return []
            last = [row.tokens[-1] if row.tokens else row.request.tokens[-1] for row in rows]
            logits = self.engine.forward(last, self.cache)
            for row, token, sampled in zip(rows, *self._next_tokens(logits), strict=True):
                self.engine.take(row, token, sampled)
            self._leave()
            return rows

    def _leave(self):
        """Take finished rows out of the batch."""
        rows = self.rows
        keep = [i for i, row in enumerate(rows) if not row.finish]
        if len(keep) == len(rows):
            return
        for i, row in enumerate(rows):
            if row.finish and self.engine.prefixes:
                self.engine.prefixes.add(row.request.tokens + row.tokens, self.cache, i)
        # fill each hole with a row from the end, so that few rows move
        order = [i if not rows[i].finish else keep.pop() for i in range(len(keep))]
        self.cache.select(order)
        self.rows = [rows[i] for i in order]

    def _admit(self):
        """Prefill waiting prompts, each once, and copy them to the rows of their group."""
        if not self.joining:
            longest, free = 0, self.max_rows - len(self.rows)
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
            # All but the last token: that one enters with the step, which gives each row logits of its own.
            prompts = [group[0].request.tokens[:-1] for group in self.joining]
            cache = self.engine.new_cache() if self.rows else self.cache  # an empty batch spares the copy
            self.prefill = Prefill(self.engine, prompts, cache, self.engine.prefixes)
            for group, n in zip(self.joining, self.prefill.cache.lengths, strict=True):
                for row in group:
                    row.cached = n
        while not self.prefill.done:
            self.prefill.advance(PREFILL_CHUNK if self.rows else PREFILL_TOKENS)
            if self.rows:
                break
        if self.prefill.done:
            members = [(i, row) for i, group in enumerate(self.joining) for row in group if not row.finish]
            if self.prefill.cache is self.cache:
                self.cache.select([i for i, _ in members])
            else:
                self.cache.append(self.prefill.cache, [i for i, _ in members])
            self.rows = self.rows + [row for _, row in members]
            self.joining, self.prefill = [], None

    def _next_tokens(self, logits):
        """([token], [1 = sampled, 0 = forced]) of each row; rows of equal settings are sampled in one go."""
        rows = self.rows
        tokens = [row.forced.popleft() if row.forced else None for row in rows]
        sampled = [int(token is None) for token in tokens]
        groups = defaultdict(list)
        for i, row in enumerate(rows):
            if sampled[i]:
                groups[row.request.sampler].append(i)
        for (temperature, *cuts), members in groups.items():
            some = logits if len(members) == len(rows) else logits[members]
            if any(rows[i].request.adjusts for i in members):
                some = torch.stack([rows[i].adjust(x) for i, x in zip(members, some, strict=True)])
            top_k, top_p, min_p = cuts
            drawn = sample(some, temperature, top_k, [rows[i].rng for i in members], top_p, min_p)
            for i, token in zip(members, drawn, strict=True):
                tokens[i] = token
        for i, row in enumerate(rows):
            if row.request.logprobs is not None:
                row.logprobs.append(log_probabilities(logits[i], tokens[i], row.request.logprobs))
        return tokens, sampled


def log_probabilities(logits, token, top):
    """(that of `token`, [(token, its) for the `top` likeliest]) by the model's logits (V,), before any setting."""
    logits = logits.log_softmax(-1)
    values, ids = logits.topk(top)
    return logits[token].item(), list(zip(ids.tolist(), values.tolist(), strict=True))


class Engine:
    """
    Generates with `model`; `compute` (nanochat.common.Compute) sets the precision, None = the weights'.

    Keys and values of up to `prefix_tokens` tokens of finished rows are kept for prompts that begin with them. With
    quantize="int8" a CPU decodes from weights in 8 bits, see CPUDecoder. Raises UserError where it cannot.
    """

    def __init__(self, model, tokenizer, compute=None, prefix_tokens=0, quantize=None):
        self.model, self.tokenizer, self.compute = model, tokenizer, compute
        special = tokenizer.encode_special
        self.python_start, self.python_end = special("<|python_start|>"), special("<|python_end|>")
        self.output_start, self.output_end = special("<|output_start|>"), special("<|output_end|>")
        self.assistant_end = special("<|assistant_end|>")
        self.terminals = {self.assistant_end, tokenizer.get_bos_token_id()}
        self.prefixes = PrefixCache(prefix_tokens) if prefix_tokens else None
        self.decoder = self.graphs = None
        device = model.get_device().type
        if isinstance(model, GPT) and not model.lm_head.weight.requires_grad:  # a copy of its weights stays true
            self.decoder = CPUDecoder(model, quantize == "int8") if device == "cpu" else None
            self.graphs = CUDADecoder(model, self.precision) if device == "cuda" else None
        if quantize and not self.decoder:
            raise UserError("--quantize is for models on a CPU; leave it out here")

    def new_cache(self):
        return KVCache(self.model.config.n_layer, device=self.model.get_device())

    def quiet(self):
        """Context for small operations of torch: its threads would spin for a while where the decoder's run next."""
        return torch_threads(1) if self.decoder else contextlib.nullcontext()

    def precision(self):
        return self.compute.autocast() if self.compute else contextlib.nullcontext()

    def forward(self, tokens, cache):
        """Logits (B, V) after `tokens`, one per row, which join `cache`."""
        if self.decoder:
            return self.decoder([[token] for token in tokens], cache)
        if self.graphs and (logits := self.graphs(tokens, cache)) is not None:
            return logits
        ids = torch.tensor(tokens, device=self.model.get_device())[:, None]
        with self.precision():
            return self.model(ids, kv_cache=cache)[:, -1]

    def fill(self, tokens, cache):
        """Let `tokens`, a list of any length for each row, join `cache`."""
        if self.decoder:
            return self.decoder(tokens, cache, logits=False)
        n, lengths = max(map(len, tokens)), [have + len(new) for have, new in zip(cache.lengths, tokens, strict=True)]
        # causal attention: what is padded on the right changes nothing before it
        ids = torch.tensor([ids + [0] * (n - len(ids)) for ids in tokens], device=self.model.get_device())
        with self.precision():
            self.model.hidden(ids, cache, fill_only=True)
        cache.lengths = lengths

    def prefill(self, prompts):
        """A cache with one row per prompt (lists of ids of any lengths, also 0)."""
        prefill = Prefill(self, prompts, self.new_cache())
        while not prefill.done:
            prefill.advance(PREFILL_TOKENS)
        return prefill.cache

    @torch.inference_mode()
    def score(self, tokens, top):
        """What log_probabilities() says of each of `tokens` after those before it; None for the first."""
        ids = torch.tensor([tokens], device=self.model.get_device())
        with self.precision():
            logits = self.model(ids)[0, :-1]
        return [None, *(log_probabilities(x, token, top) for x, token in zip(logits, tokens[1:], strict=True))]

    @torch.inference_mode()
    def next_logits(self, prompts):
        """Logits (B, V) of the token after each of `prompts` (lists of ids, of any lengths from 1)."""
        cache = self.prefill([prompt[:-1] for prompt in prompts])
        return self.forward([prompt[-1] for prompt in prompts], cache)

    def take(self, row, token, sampled):
        """Give `row` its next token: ends it, or moves its calculator along."""
        row.tokens.append(token)
        row.mask.append(sampled)
        if sampled and (token in self.terminals or token in row.request.stop_tokens):
            row.finish = "stop"
        elif row.stream and row.stream.push(token) and row.stream.stopped:
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
        loop = DecodeLoop(self, max_rows, gather=max_rows // 8)
        for request in requests:
            loop.submit(request)
        while loop.busy:
            yield from (row for row in loop.step() if row.finish)
