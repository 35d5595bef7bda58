"""
Completions of chats and of plain text: requests to tokens for the workers, and their tokens to OpenAI's answers.
"""

import asyncio
import collections
import contextlib
import random
import re
import time
import uuid

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from nanochat.common import UserError, well_formed
from nanochat.inference.answer import Answer
from nanochat.serve.schemas import (
    MAX_CHARS,
    ApiError,
    chat_logprobs,
    envelope,
    text_logprobs,
    token_counts,
    usage,
)
from nanochat.serve.worker import Worker, WorkerError
from nanochat.tokenizer import get_tokenizer

RETRY_AFTER = 1  # seconds


class Metrics:
    def __init__(self, workers):
        self.registry = r = CollectorRegistry()
        self.requests = Counter("nanochat_requests", "Requests answered.", ["endpoint", "status"], registry=r)
        self.prompt = Counter("nanochat_prompt_tokens", "Tokens of prompts.", registry=r)
        self.completion = Counter("nanochat_completion_tokens", "Tokens generated.", registry=r)
        self.cached = Counter("nanochat_cached_tokens", "Tokens of prompts that were not computed again.", registry=r)
        bins = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
        name, what = "nanochat_time_to_first_token_seconds", "From a request to its first token."
        self.first = Histogram(name, what, buckets=bins, registry=r)
        name, what = (
            "nanochat_inter_token_seconds",
            "From one token of an answer to its next, on average of those sent together.",
        )
        self.next = Histogram(name, what, buckets=(0.001, 0.002, *bins), registry=r)
        rows = Gauge("nanochat_running_rows", "Answers in the batches.", registry=r)
        rows.set_function(lambda: sum(w.load["rows"] for w in workers))
        waiting = Gauge("nanochat_waiting_requests", "Answers that wait for a place in a batch.", registry=r)
        waiting.set_function(lambda: sum(max(0, w.in_flight - w.load["rows"]) for w in workers))
        held = Gauge("nanochat_prefix_cache_tokens", "Tokens kept for prompts that begin alike.", registry=r)
        held.set_function(lambda: sum(w.load["cached_tokens"] for w in workers))


class Service:
    """Turns requests into tokens for the workers, and tokens into answers."""

    def __init__(self, options):
        self.options, self.tokenizer = options, get_tokenizer()
        self.workers = [Worker(i, options) for i in range(options["num_workers"])]
        self.metrics = Metrics(self.workers)
        self.draining, self.created = False, int(time.time())

    @property
    def status(self):
        """ "ok" while any worker answers, else "loading" or "dead"."""
        states = {worker.state for worker in self.workers}
        return "ok" if "ready" in states else "loading" if "loading" in states else "dead"

    @property
    def free_workers(self):
        """How many would answer at once."""
        return sum(worker.state == "ready" and worker.in_flight < self.options["max_rows"] for worker in self.workers)

    def told(self):
        return next(worker.told for worker in self.workers if worker.state == "ready")

    def worker(self, n):
        """The least loaded worker, if it has room for `n` more answers."""
        if self.status != "ok" or self.draining:
            what = "the server is stopping" if self.draining else "the model is loading"
            what = next((w.error for w in self.workers if w.error), what) if self.status == "dead" else what
            raise ApiError(503, f"{what}; try again later", "service_unavailable_error", RETRY_AFTER)
        worker = min((w for w in self.workers if w.state == "ready"), key=lambda w: w.in_flight)
        if worker.in_flight and worker.in_flight + n > self.options["max_rows"] + self.options["max_queue"]:
            raise ApiError(429, "too many requests are waiting; try again later", "rate_limit_error", RETRY_AFTER)
        return worker

    def check_model(self, name):
        if name is not None and self.status == "ok" and name != self.told()["name"]:
            detail = dict(param="model", code="model_not_found")
            raise ApiError(
                404, f"no model {name[:100]!r} here, only {self.told()['name']}", "not_found_error", **detail
            )

    def chat_prompt(self, body, max_tokens):
        """The prompt's tokens. Raises ApiError when the conversation is none, or too long."""
        messages = [
            {
                "role": "system" if m.role == "developer" else m.role,
                "content": well_formed(m.text),
            }
            for m in body.messages
        ]
        if sum(len(m["content"]) for m in messages) > MAX_CHARS:
            raise ApiError(400, f"the messages have more than {MAX_CHARS:,} characters", param="messages")
        context = self.told()["context"]
        room = None
        if self.options["overflow"] == "truncate":
            room = max(8, context - min(max_tokens, context // 2))
        started = messages[-1]["content"] if messages[-1]["role"] == "assistant" else ""
        try:
            tokens = self.tokenizer.render_for_completion({"messages": messages}, room)
        except UserError as e:
            raise ApiError(400, str(e), param="messages") from e
        return self.fitting(tokens + self.tokenizer.encode(started), "messages")

    def plain_prompts(self, prompt):
        """The prompts' tokens, a list for each prompt."""
        found, size = [], self.tokenizer.get_vocab_size()
        for one in list_of_prompts(prompt):
            if isinstance(one, str):
                one = self.tokenizer.encode(well_formed(one), prepend="<|bos|>")
            if not one:
                raise ApiError(400, "a prompt has no tokens", param="prompt")
            self.check_tokens(one, size, "prompt")
            found.append(self.fitting(one, "prompt"))
        return found

    def check_tokens(self, tokens, size, param):
        if wrong := [token for token in tokens if not 0 <= token < size]:
            raise ApiError(400, f"token {wrong[0]} is not in the vocabulary of {size:,}", param=param)

    def fitting(self, tokens, param):
        context = self.told()["context"]
        if len(tokens) >= context:
            what = f"the prompt has {len(tokens):,} tokens; the model's context of {context:,} must hold the answer too"
            detail = dict(param=param, code="context_length_exceeded", n_prompt_tokens=len(tokens), n_ctx=context)
            raise ApiError(400, what, "exceed_context_size_error", **detail)
        return tokens

    def settings(self, body, max_tokens, logprobs):
        """The fields of an engine's Request, but for its prompt."""
        size, bias = self.tokenizer.get_vocab_size(), {}
        for token, value in (body.logit_bias or {}).items():
            if not re.fullmatch(r"\d{1,9}", token) or int(token) >= size:
                raise ApiError(400, f"token {token[:20]!r} is not in the vocabulary of {size:,}", param="logit_bias")
            bias[int(token)] = value
        self.check_tokens(body.stop_token_ids or (), size, "stop_token_ids")
        options, stop = self.options, body.stop or ()

        def given(value, default):
            return default if value is None else value

        return dict(
            max_tokens=max_tokens,
            temperature=given(body.temperature, options["temperature"]),
            top_k=given(body.top_k, options["top_k"]),
            top_p=given(body.top_p, 1.0),
            min_p=given(body.min_p, 0.0),
            repetition_penalty=given(body.repetition_penalty, 1.0),
            frequency_penalty=given(body.frequency_penalty, 0.0),
            presence_penalty=given(body.presence_penalty, 0.0),
            logit_bias=bias or None,
            seed=given(body.seed, random.getrandbits(31)),
            num_samples=given(body.n, 1),
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            stop_tokens=frozenset(body.stop_token_ids or ()),
            logprobs=logprobs,
        )

    async def answers(self, worker, key, tokens, settings):
        """Yield [(answer, delta)] while the tokens of a prompt's answers come in; counts what it sees."""
        stops = settings["stop"], settings["stop_tokens"]
        answers = [Answer(self.tokenizer, i, *stops) for i in range(settings["num_samples"])]
        seen, start = {}, time.perf_counter()
        self.metrics.prompt.inc(len(tokens))
        async with contextlib.aclosing(worker.generate(key, tokens=tokens, **settings)) as batches:
            async for batch in batches:
                now = time.perf_counter()
                if not seen:
                    self.metrics.first.observe(now - start)
                    self.metrics.cached.inc(batch[0][-1])
                for sample, n in collections.Counter(event[0] for event in batch).items():
                    told = sample in seen
                    gap = (now - seen[sample]) / n if told else 0.0
                    for _ in range(n if told else n - 1):
                        self.metrics.next.observe(gap)
                    seen[sample] = now
                deltas = []
                for sample, token, logprobs, finish, cached in batch:
                    answers[sample].cached = cached
                    deltas.append((answers[sample], answers[sample].push(token, logprobs, finish)))
                self.metrics.completion.inc(len(batch))
                yield deltas


async def with_first(events):
    """`events` again, once its first one is there: what fails before that can still be told with a status."""
    first = await anext(events)

    async def again():
        async with contextlib.aclosing(events):
            yield first
            async for event in events:
                yield event

    return again()


async def guarded(chunks):
    """Chunks of a stream, None where the next one is not there yet, and [DONE]; a failure becomes an error chunk."""
    try:
        async with contextlib.aclosing(chunks):
            async for chunk in chunks:
                yield chunk
    except WorkerError as e:
        yield ApiError(500, str(e), "server_error").body
    yield "[DONE]"


async def chat(service, body):
    """A generator of chunks for a stream, else the whole answer."""
    check_stream(body)
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs=true", param="top_logprobs")
    worker = service.worker(body.n or 1)
    service.check_model(body.model)
    max_tokens = body.max_completion_tokens or body.max_tokens or service.options["max_tokens"]
    tokens = service.chat_prompt(body, max_tokens)
    settings = service.settings(body, max_tokens, (body.top_logprobs or 0) if body.logprobs else None)
    key, model = f"chatcmpl-{uuid.uuid4().hex}", worker.told["name"]
    deltas = await with_first(service.answers(worker, key, tokens, settings))
    if body.stream:
        return chat_chunks(service, deltas, key, model, len(tokens), body)
    answers = await collected(deltas)
    choices = [
        {
            "index": answer.index,
            "message": answer.message(),
            "finish_reason": answer.finish,
            "logprobs": chat_logprobs(service.tokenizer, answer.logprobs) if body.logprobs else None,
        }
        for answer in answers
    ]
    return envelope("chat.completion", key, model) | {"choices": choices, "usage": usage(answers, len(tokens))}


async def collected(deltas):
    """The answers, in their order, when all are complete."""
    answers = {}
    async with contextlib.aclosing(deltas):
        async for batch in deltas:
            answers |= {answer.index: answer for answer, _ in batch}
    return [answers[i] for i in sorted(answers)]


async def chat_chunks(service, deltas, key, model, n_prompt, body):
    with_usage = bool(body.stream_options and body.stream_options.include_usage)
    head = envelope("chat.completion.chunk", key, model) | ({"usage": None} if with_usage else {})
    answers = {}

    def chunk(answer, delta, finish=None):
        new = answer.new_logprobs()
        logprobs = chat_logprobs(service.tokenizer, new) if new else None
        choice = {"index": answer.index, "delta": delta, "finish_reason": finish, "logprobs": logprobs}
        return head | {"choices": [choice]}

    async with contextlib.aclosing(deltas):
        async for batch in deltas:
            for answer, _ in batch:
                if answer.index not in answers:
                    answers[answer.index] = answer
                    first = {"index": answer.index, "delta": {"role": "assistant", "content": ""}}
                    yield head | {"choices": [first | {"finish_reason": None, "logprobs": None}]}
            for answer, delta in merged(batch):
                if delta:
                    yield chunk(answer, delta)
            for answer in dict.fromkeys(answer for answer, _ in batch):
                if answer.finish:
                    yield chunk(answer, {}, answer.finish)
            if any_open(answers, body):
                yield None
    if with_usage:
        yield head | {"choices": [], "usage": usage([*answers.values()], n_prompt)}


def any_open(answers, body):
    return len(answers) < (body.n or 1) or not all(answer.finish for answer in answers.values())


def merged(batch):
    """Deltas of one answer that came together as one, text before and after a step apart."""
    found = []
    for answer, delta in batch:
        last = next((i for i in reversed(range(len(found))) if found[i][0] is answer), None)
        if last is not None and found[last][1].keys() == delta.keys() == {"content"}:
            found[last] = answer, {"content": found[last][1]["content"] + delta["content"]}
        else:
            found.append((answer, delta))
    return found


def list_of_prompts(prompt):
    """A prompt may be one text or list of ids, or a list of such."""
    return prompt if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else [prompt]


def check_stream(body):
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options needs stream=true", param="stream_options")


async def complete(service, body):
    """The same for plain text, and any number of prompts."""
    check_stream(body)
    n = body.n or 1
    worker = service.worker(n * len(list_of_prompts(body.prompt)))
    service.check_model(body.model)
    if body.max_tokens == 0 and not body.echo:
        raise ApiError(400, "max_tokens=0 needs echo=true", param="max_tokens")
    prompts = service.plain_prompts(body.prompt)
    if len(prompts) * n > 128:
        raise ApiError(400, f"{len(prompts)} prompts of {n} answers are more than 128", param="prompt")
    max_tokens = 16 if body.max_tokens is None else body.max_tokens
    settings = service.settings(body, max(1, max_tokens), body.logprobs)
    key, model = f"cmpl-{uuid.uuid4().hex}", worker.told["name"]
    head = envelope("text_completion", key, model)
    if body.stream:
        if len(prompts) > 1 or max_tokens == 0:
            raise ApiError(400, "a stream is for the answer to one prompt", param="stream")
        deltas = await with_first(service.answers(worker, key, prompts[0], settings))
        return text_chunks(service, deltas, head, prompts[0], body)
    jobs = (
        complete_one(service, worker, f"{key}-{i}", tokens, settings, body, max_tokens)
        for i, tokens in enumerate(prompts)
    )
    results = await asyncio.gather(*jobs)
    choices = [choice for choices, _ in results for choice in choices]
    for i, choice in enumerate(choices):
        choice["index"] = i
    totals = [sum(numbers) for numbers in zip(*(counts for _, counts in results), strict=True)]
    return head | {"choices": choices, "usage": token_counts(*totals)}


async def complete_one(service, worker, key, tokens, settings, body, max_tokens):
    """([choice], (prompt's, generated, cached tokens)) of one prompt."""
    tokenizer = service.tokenizer
    scored = []
    if body.echo and body.logprobs is not None:
        found = await worker.score(key + "s", tokens, body.logprobs)
        scored = list(zip(tokens, found, strict=True))
    prompt = tokenizer.decode(strip_bos(tokenizer, tokens)) if body.echo else ""
    if max_tokens == 0:
        service.metrics.prompt.inc(len(tokens))
        logprobs = text_logprobs(tokenizer, scored) if body.logprobs is not None else None
        return [text_choice(prompt, "length", logprobs)], (len(tokens), 0, 0)
    answers = await collected(service.answers(worker, key, tokens, settings))
    choices = []
    for answer in answers:
        entries = scored + answer.logprobs
        logprobs = text_logprobs(tokenizer, entries) if body.logprobs is not None else None
        choices.append(text_choice(prompt + answer.text, answer.finish, logprobs))
    return choices, (len(tokens), sum(answer.n_tokens for answer in answers), answers[0].cached)


async def text_chunks(service, deltas, head, tokens, body):
    with_usage = bool(body.stream_options and body.stream_options.include_usage)
    head |= {"usage": None} if with_usage else {}
    answers = {}
    prompt = service.tokenizer.decode(strip_bos(service.tokenizer, tokens)) if body.echo else ""
    async with contextlib.aclosing(deltas):
        async for batch in deltas:
            for answer in dict.fromkeys(answer for answer, _ in batch):
                text = "".join(delta.get("content", "") for owner, delta in batch if owner is answer)
                if answer.index not in answers:
                    answers[answer.index] = answer
                    text = prompt + text
                new = answer.new_logprobs()
                logprobs = text_logprobs(service.tokenizer, new) if new else None
                if text or answer.finish:
                    yield head | {"choices": [text_choice(text, answer.finish, logprobs, answer.index)]}
            if any_open(answers, body):
                yield None
    if with_usage:
        yield head | {"choices": [], "usage": usage([*answers.values()], len(tokens))}


def text_choice(text, finish, logprobs, index=0):
    return {"index": index, "text": text, "finish_reason": finish, "logprobs": logprobs}


def strip_bos(tokenizer, tokens):
    return tokens[1:] if tokens[0] == tokenizer.get_bos_token_id() else tokens
