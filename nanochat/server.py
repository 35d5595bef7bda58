"""
The web server: OpenAI's API over the engine, and a page to talk to the model.

create_app(options) makes the FastAPI app; each worker owns a model in a process of its own, so that the event loop is
always free to answer. The page and its logo are the only files served.
"""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import random
import re
import time
import uuid
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException

from nanochat.api import (
    MAX_CHARS,
    Answer,
    ApiError,
    ChatRequest,
    CompletionRequest,
    ErrorBody,
    chat_logprobs,
    envelope,
    text_logprobs,
    usage,
)
from nanochat.common import UserError
from nanochat.tokenizer import get_tokenizer
from nanochat.worker import Worker, WorkerError

HERE = Path(__file__).parent
PUBLIC = {"/", "/logo.svg", "/health", "/health/"}
LOCAL = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"
MAX_BODY = 1 << 20  # bytes
RETRY_AFTER = 1  # seconds
ERRORS = {status: {"model": ErrorBody} for status in (400, 401, 404, 405, 413, 429, 500, 503, 504)}


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
        name, what = "nanochat_inter_token_seconds", "From one token of an answer to its next."
        self.next = Histogram(name, what, buckets=(0.001, 0.002, *bins), registry=r)
        rows = Gauge("nanochat_running_rows", "Answers in the batches.", registry=r)
        rows.set_function(lambda: sum(w.load["rows"] for w in workers))
        waiting = Gauge("nanochat_waiting_requests", "Answers that wait for a place in a batch.", registry=r)
        waiting.set_function(lambda: sum(max(0, w.in_flight - w.load["rows"]) for w in workers))
        held = Gauge("nanochat_prefix_cache_tokens", "Tokens kept for prompts that begin alike.", registry=r)
        held.set_function(lambda: sum(w.load["cached_tokens"] for w in workers))


class Gate:
    """Around the whole app: request ids, authentication, the size of bodies, and the count of answers."""

    def __init__(self, app, api_key, metrics):
        self.app, self.api_key, self.metrics = app, api_key, metrics

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get("x-request-id", "")
        request_id = given if re.fullmatch(r"[\w.:-]{1,128}", given) else uuid.uuid4().hex
        size, status = 0, None

        async def limited():
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > MAX_BODY:
                raise HTTPException(413, f"the body is larger than {MAX_BODY:,} bytes")
            return message

        async def answer(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            if self._allowed(scope, headers):
                await self.app(scope, limited, answer)
            else:
                error = ApiError(401, "a valid API key is needed: Authorization: Bearer KEY", "authentication_error")
                await error_response(error)(scope, limited, answer)
        finally:
            route = scope.get("route")
            self.metrics.requests.labels(route.path if route else "other", status or "aborted").inc()

    def _allowed(self, scope, headers):
        preflight = scope["method"] == "OPTIONS" and "origin" in headers and "access-control-request-method" in headers
        if self.api_key is None or preflight or scope["path"] in PUBLIC:
            return True
        scheme, _, key = headers.get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(key.strip().encode(), self.api_key.encode())


class EventStream(Response):
    """Server-sent events from an async generator of JSON values; a client that goes away closes the generator."""

    media_type = "text/event-stream"

    def __init__(self, events):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.events = events

    async def __call__(self, scope, receive, send):
        async def stream():
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async with contextlib.aclosing(self.events):
                async for event in self.events:
                    data = f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n"
                    await send({"type": "http.response.body", "body": data.encode(), "more_body": True})
            await send({"type": "http.response.body", "body": b""})

        with contextlib.suppress(OSError):  # the client went away
            await while_connected(receive, stream())


async def while_connected(receive, work):
    """The result of the coroutine `work`, which is cancelled when the client goes away; None then."""

    async def gone():
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def error_response(error):
    headers = {"Retry-After": str(error.retry_after)} if error.retry_after is not None else {}
    return JSONResponse(error.body, error.status, headers)


def page():
    """(html, Content-Security-Policy): only the page's own script and style run, and only this server is talked to."""
    html = (HERE / "ui.html").read_text(encoding="utf-8")

    def digest(tag):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    return html, (
        f"default-src 'none'; script-src {digest('script')}; style-src {digest('style')}; img-src 'self' data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


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
                "content": m.text.encode("utf-8", "replace").decode(),
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
        prompts = prompt if isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list)) else [prompt]
        found, size = [], self.tokenizer.get_vocab_size()
        for one in prompts:
            if isinstance(one, str):
                one = self.tokenizer.encode(one.encode("utf-8", "replace").decode(), prepend="<|bos|>")
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
                raise ApiError(400, f"token {token[:20]} is not in the vocabulary of {size:,}", param="logit_bias")
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
        answers = [Answer(self.tokenizer, i, settings["stop"]) for i in range(settings["num_samples"])]
        seen, start = {}, time.perf_counter()
        self.metrics.prompt.inc(len(tokens))
        async with contextlib.aclosing(worker.generate(key, tokens=tokens, **settings)) as batches:
            async for batch in batches:
                now, deltas = time.perf_counter(), []
                for sample, token, _, logprobs, finish, cached in batch:
                    if not seen:
                        self.metrics.first.observe(now - start)
                        self.metrics.cached.inc(cached)
                    if sample in seen:
                        self.metrics.next.observe(now - seen[sample])
                    seen[sample] = now
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
    """Chunks of a stream, then [DONE]; a failure becomes an error chunk."""
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
    answers = {}
    async with contextlib.aclosing(deltas):
        async for batch in deltas:
            answers |= {answer.index: answer for answer, _ in batch}
    choices = [
        {
            "index": i,
            "message": answer.message(),
            "finish_reason": answer.finish,
            "logprobs": chat_logprobs(service.tokenizer, answer.logprobs) if body.logprobs else None,
        }
        for i, answer in sorted(answers.items())
    ]
    n = sum(answer.n_tokens for answer in answers.values())
    return envelope("chat.completion", key, model) | {
        "choices": choices,
        "usage": usage(len(tokens), n, answers[0].cached),
    }


async def chat_chunks(service, deltas, key, model, n_prompt, body):
    with_usage = bool(body.stream_options and body.stream_options.include_usage)
    head = envelope("chat.completion.chunk", key, model) | ({"usage": None} if with_usage else {})
    answers, told = {}, {}  # told: log-probabilities given out, by index

    def chunk(answer, delta, finish=None):
        logprobs = None
        if body.logprobs and (new := answer.logprobs[told.get(answer.index, 0) :]):
            told[answer.index] = len(answer.logprobs)
            logprobs = chat_logprobs(service.tokenizer, new)
        choice = {"index": answer.index, "delta": delta, "finish_reason": finish, "logprobs": logprobs}
        return head | {"choices": [choice]}

    async with contextlib.aclosing(deltas):
        async for batch in deltas:
            for answer, _ in batch:
                if answer.index not in answers:
                    answers[answer.index] = answer
                    first = {"delta": {"role": "assistant", "content": ""}, "finish_reason": None, "logprobs": None}
                    yield head | {"choices": [{"index": answer.index} | first]}
            for answer, delta in merged(batch):
                if delta:
                    yield chunk(answer, delta)
            for answer in dict.fromkeys(answer for answer, _ in batch):
                if answer.finish:
                    yield chunk(answer, {}, answer.finish)
    if with_usage:
        n = sum(answer.n_tokens for answer in answers.values())
        yield head | {"choices": [], "usage": usage(n_prompt, n, answers[0].cached)}


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


def check_stream(body):
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options needs stream=true", param="stream_options")


async def complete(service, body):
    """The same for plain text, and any number of prompts."""
    check_stream(body)
    n = body.n or 1
    worker = service.worker(n)
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
            raise ApiError(400, "a stream is for one prompt, and an answer", param="stream")
        deltas = await with_first(service.answers(worker, key, prompts[0], settings))
        return text_chunks(service, deltas, head, prompts[0], body)
    results = await asyncio.gather(
        *(
            complete_one(service, worker, f"{key}-{i}", tokens, settings, body, max_tokens)
            for i, tokens in enumerate(prompts)
        )
    )
    choices = [choice for choices, *_ in results for choice in choices]
    for i, choice in enumerate(choices):
        choice["index"] = i
    totals = [sum(numbers) for numbers in zip(*(counts for _, counts in results), strict=True)]
    return head | {"choices": choices, "usage": usage(*totals)}


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
    answers = {}
    async with contextlib.aclosing(service.answers(worker, key, tokens, settings)) as deltas:
        async for batch in deltas:
            answers |= {answer.index: answer for answer, _ in batch}
    choices = []
    for _, answer in sorted(answers.items()):
        entries = scored + answer.logprobs
        logprobs = text_logprobs(tokenizer, entries) if body.logprobs is not None else None
        choices.append(text_choice(prompt + answer.text, answer.finish, logprobs))
    n = sum(answer.n_tokens for answer in answers.values())
    return choices, (len(tokens), n, answers[0].cached)


async def text_chunks(service, deltas, head, tokens, body):
    with_usage = bool(body.stream_options and body.stream_options.include_usage)
    head |= {"usage": None} if with_usage else {}
    answers, told = {}, {}
    prompt = service.tokenizer.decode(strip_bos(service.tokenizer, tokens)) if body.echo else ""
    async with contextlib.aclosing(deltas):
        async for batch in deltas:
            for answer, delta in batch:
                text = delta.get("content", "")
                if answer.index not in answers:
                    answers[answer.index] = answer
                    text = prompt + text
                new, told[answer.index] = answer.logprobs[told.get(answer.index, 0) :], len(answer.logprobs)
                logprobs = text_logprobs(service.tokenizer, new) if new else None
                if text or answer.finish:
                    yield head | {"choices": [text_choice(text, answer.finish, logprobs, answer.index)]}
    if with_usage:
        n = sum(answer.n_tokens for answer in answers.values())
        yield head | {"choices": [], "usage": usage(len(tokens), n, answers[0].cached)}


def text_choice(text, finish, logprobs, index=0):
    return {"index": index, "text": text, "finish_reason": finish, "logprobs": logprobs}


def strip_bos(tokenizer, tokens):
    return tokens[1:] if tokens[0] == tokenizer.get_bos_token_id() else tokens


def create_app(options):
    """The app. `options` are chat_web's flags as a dict; the model loads when the app starts."""
    service = Service(options)
    html, policy = page()

    @contextlib.asynccontextmanager
    async def lifespan(app):
        for worker in service.workers:
            worker.start()
        watching = asyncio.create_task(watch(app))
        yield
        watching.cancel()
        service.draining = True
        for worker in service.workers:
            worker.stop()

    async def watch(app):
        """Say when the model is there; without any, there is nothing to serve."""
        for worker in service.workers:
            await worker.changed.wait()
        if service.status == "ok":
            print(f"{service.told()['name']} is ready", flush=True)
        else:
            app.state.stop()

    app = FastAPI(title="nanochat", version="0.2.0", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    app.add_middleware(
        CORSMiddleware,
        allow_origins=options["cors"] or (),
        allow_origin_regex=None if options["cors"] else LOCAL,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
    )
    app.add_middleware(Gate, api_key=options["api_key"], metrics=service.metrics)

    @app.exception_handler(ApiError)
    async def api_error(request, error):
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request, error):
        first = error.errors()[0]
        where = [str(part) for part in first["loc"][1:]]
        message = f"{'.'.join(where)}: {first['msg']}" if where else first["msg"]
        return error_response(ApiError(400, message, param=where[0] if where else None))

    @app.exception_handler(HTTPException)
    async def http_error(request, error):
        kind = "not_found_error" if error.status_code == 404 else "invalid_request_error"
        response = error_response(ApiError(error.status_code, str(error.detail), kind))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(WorkerError)
    async def worker_error(request, error):
        return error_response(ApiError(503, str(error), "service_unavailable_error", RETRY_AFTER))

    @app.exception_handler(Exception)
    async def failure(request, error):
        return error_response(ApiError(500, "the server failed, see its log", "server_error"))

    async def respond(request, work):
        """The answer to a completion: `work` gives a generator of chunks, or the whole."""
        try:
            result = await asyncio.wait_for(while_connected(request.receive, work), options["request_timeout"])
        except asyncio.TimeoutError:
            return error_response(ApiError(504, "the answer took too long", "timeout_error"))
        if isinstance(result, dict) or result is None:
            return JSONResponse(result)
        return EventStream(guarded(result))

    events = {"content": {"text/event-stream": {}}}
    completion = dict(responses=ERRORS | {200: events})

    @app.post("/v1/chat/completions", **completion)
    @app.post("/chat/completions", **completion, include_in_schema=False)
    async def chat_completions(body: ChatRequest, request: Request):
        return await respond(request, chat(service, body))

    @app.post("/v1/completions", **completion)
    @app.post("/completions", **completion, include_in_schema=False)
    async def completions(body: CompletionRequest, request: Request):
        return await respond(request, complete(service, body))

    def models():
        if service.status != "ok":
            return []
        told = service.told()
        model = {"id": told["name"], "object": "model", "created": service.created, "owned_by": "nanochat"}
        return [model | {"context_length": told["context"]}]

    @app.get("/v1/models", responses=ERRORS)
    @app.get("/models", include_in_schema=False)
    async def list_models():
        return {"object": "list", "data": models()}

    @app.get("/v1/models/{name}", responses=ERRORS)
    async def get_model(name: str):
        for model in models():
            if model["id"] == name:
                return model
        raise ApiError(404, f"no model {name[:100]!r} here", "not_found_error", param="model", code="model_not_found")

    @app.get("/health", responses=ERRORS)
    @app.get("/health/", include_in_schema=False)
    async def health():
        status, ready = service.status, [w for w in service.workers if w.state == "ready"]
        free = sum(w.in_flight < options["max_rows"] for w in ready)
        told = {"status": status, "ready": status == "ok", "num_gpus": len(service.workers), "available_workers": free}
        headers = {} if status == "ok" else {"Retry-After": str(RETRY_AFTER)}
        return JSONResponse(told, 200 if status == "ok" else 503, headers)

    @app.get("/stats", responses=ERRORS)
    async def stats():
        workers = service.workers
        free = sum(w.state == "ready" and w.in_flight < options["max_rows"] for w in workers)
        listed = [
            {"gpu_id": w.index, "device": w.told.get("device"), "state": w.state, "in_flight": w.in_flight} | w.load
            for w in workers
        ]
        busy = len(workers) - free
        return {"total_workers": len(workers), "available_workers": free, "busy_workers": busy, "workers": listed}

    @app.get("/metrics", responses=ERRORS)
    async def metrics():
        return Response(generate_latest(service.metrics.registry), media_type="text/plain; version=0.0.4")

    @app.get("/", include_in_schema=False)
    async def index():
        headers = {
            "Content-Security-Policy": policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
        }
        return Response(html, media_type="text/html; charset=utf-8", headers=headers)

    @app.get("/logo.svg", include_in_schema=False)
    async def logo():
        return Response((HERE / "logo.svg").read_bytes(), media_type="image/svg+xml")

    schema = app.openapi

    def openapi():
        """FastAPI's, without the 422 that it lists everywhere and this server never answers."""
        for path in (found := schema())["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        return found

    app.openapi = openapi
    return app
