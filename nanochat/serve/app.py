"""
The HTTP app: OpenAI's API over the workers, and a page to chat with the model.

create_app(options) builds the FastAPI app. This process never imports torch: each worker has a model in a process of
its own. The page and its logo are the only files served.
"""

import asyncio
import contextlib
import gc
import hmac
import json
import re
import uuid

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import generate_latest
from starlette.exceptions import HTTPException

from nanochat.common import UserError
from nanochat.pages import HERE, html_page, page_headers
from nanochat.serve.completions import ChatCompletion, TextCompletion, inspection
from nanochat.serve.schemas import RETRY, ApiError, ChatRequest, CompletionRequest, ErrorBody, InspectRequest
from nanochat.serve.service import Service
from nanochat.serve.worker import RequestTimeout, WorkerError
from nanochat.share import tokenizer_data

PUBLIC_PATHS = {"/", "/logo.svg", "/health"}  # need no API key
WITHOUT_VERSION = {"/chat/completions", "/completions", "/models"}  # these routes work without /v1 too
LOCAL_ORIGINS = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"
MAX_BODY = 1 << 20  # bytes
TOO_LARGE = f"the body is larger than {MAX_BODY:,} bytes"
# Messages for pydantic's error types whose own message speaks of Python.
CLEARER = dict.fromkeys(("model_attributes_type", "dict_type"), "expected a JSON object")
CLEARER |= {"list_type": "expected a list", "too_short": "expected at least one element"}
ERRORS = {statuses: {"model": ErrorBody} for statuses in ("4XX", "5XX")}


class Gate:
    """ASGI middleware around the whole app: assigns request ids, checks API keys and body sizes, counts requests."""

    def __init__(self, app, api_key, metrics):
        self.app, self.api_key, self.metrics = app, api_key, metrics

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        method, path = scope["method"], scope["path"].rstrip("/") or "/"
        path = f"/v1{path}" if path in WITHOUT_VERSION else path
        # The server leaves the body of an answer to HEAD out. No redirects: they would not know a proxy's prefix.
        scope = scope | {"method": "GET" if method == "HEAD" else method, "path": path}
        headers = Request(scope).headers
        sent_id = headers.get("x-request-id", "")
        request_id = sent_id if re.fullmatch(r"[\w.:-]{1,128}", sent_id) else uuid.uuid4().hex
        size, status = 0, "aborted"

        async def receive_limited():
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > MAX_BODY:
                raise HTTPException(413, TOO_LARGE)
            return message

        async def send_with_id(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            error = self._refusal(scope, headers)
            await (error_response(error) if error else self.app)(scope, receive_limited, send_with_id)
        finally:
            route = scope.get("route")
            self.metrics.requests.labels(route.path if route else "other", status).inc()

    def _refusal(self, scope, headers):
        """The ApiError for a request that the app should not see, else None."""
        if self.api_key is not None and scope["path"] not in PUBLIC_PATHS:
            scheme, _, key = headers.get("authorization", "").partition(" ")
            # The comparison takes constant time.
            if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), self.api_key.encode()):
                return ApiError(401, "a valid API key is needed: Authorization: Bearer KEY")
        length = headers.get("content-length", "0")
        return ApiError(413, TOO_LARGE) if length.isdecimal() and int(length) > MAX_BODY else None


async def while_connected(receive, work):
    """The result of the coroutine `work`. If the client disconnects first, `work` is cancelled and this is None."""

    async def disconnected():
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(disconnected())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def error_response(error):
    return JSONResponse(error.body, error.status, error.headers)


def invalid_request(request, first):
    """The ApiError for `first`, pydantic's first error of a request."""
    message, code = CLEARER.get(first["type"], first["msg"].removeprefix("Value error, ")), None
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"][1:])[1:101]
    if first["type"] == "json_invalid":
        error = first["ctx"]["error"].removesuffix(" at")
        return ApiError(400, f"the body is not valid JSON: {error} at character {first['loc'][1]}")
    if first["type"] == "unsupported_parameter":
        code, name = first["type"], first["ctx"]["name"]
        return ApiError(400, f"{where}: {message}" if where else message, param=f"{where}.{name}".strip("."), code=code)
    if not where and "application/json" not in request.headers.get("content-type", "").lower():
        return ApiError(400, "the body is not declared as JSON; send the header Content-Type: application/json")
    if not where:
        return ApiError(400, "the body is not a JSON object")
    return ApiError(400, f"{where}: {message}", param=where)


async def handle_exception(request, error):
    """The response to a request that raised `error`, in OpenAI's format."""
    if isinstance(error, RequestValidationError):
        error = invalid_request(request, error.errors()[0])
    elif isinstance(error, HTTPException):
        message = str(error.detail)
        if error.status_code == 404:
            message = f"no {request.url.path} here; there are /v1/chat/completions, /v1/completions and /v1/models"
        elif error.status_code == 400:  # FastAPI's, for what json.loads() raises, except syntax errors
            message = f"the body cannot be read as JSON: {str(error.__cause__).partition(';')[0]}"
        error = ApiError(error.status_code, message, error.headers)
    elif isinstance(error, WorkerError):
        error = ApiError(504 if isinstance(error, RequestTimeout) else 503, str(error))
    elif isinstance(error, UserError):
        error = ApiError(400, str(error))
    elif isinstance(error, RecursionError):  # while the body is validated
        error = ApiError(400, "the body has too many levels of lists and objects")
    elif not isinstance(error, ApiError):
        error = ApiError(500, "the server failed, see its log")
    return error_response(error)


async def respond(request, completion):
    """The response to a chat or text completion. If a worker fails before the first chunk, raises WorkerError."""
    chunks = completion.chunks() if completion.body.stream else None
    answer = await while_connected(request.receive, anext(chunks) if chunks else completion.answer())
    if answer is None:
        return Response(status_code=499)  # nobody reads it, but the metrics count it
    if not chunks:
        return JSONResponse(answer)
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(server_sent_events(answer, chunks), media_type="text/event-stream", headers=headers)


async def server_sent_events(first, rest):
    """Yield the text of server-sent events: lists of chunks, `first` and those of `rest`, then [DONE]."""
    try:
        async with contextlib.aclosing(rest):
            yield events(first)
            async for chunks in rest:
                yield events(chunks)
    except WorkerError as e:
        yield events([ApiError(500, str(e)).body])
    yield "data: [DONE]\n\n"


def events(chunks):
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks)


@contextlib.asynccontextmanager
async def lifespan(app):
    """Start the workers before the app serves requests, and stop them at the end."""
    service = app.state.service

    async def announce():
        """Wait until all workers have loaded. If all have failed, stop the server."""
        await asyncio.gather(*(worker.loaded.wait() for worker in service.workers))
        if service.status == "ok":
            print(f"{service.model.name} is ready", flush=True)
        else:
            app.state.stop()

    for worker in service.workers:
        worker.start()
    announcement = asyncio.create_task(announce())
    gc.freeze()  # collecting all that is loaded by now would block the event loop for tens of milliseconds
    yield
    announcement.cancel()
    for worker in service.workers:
        worker.stop()


def create_app(options):
    """The FastAPI app. Its workers load the model when the app starts. `options`: the flags of chat_web."""
    app = FastAPI(title="nanochat", version="0.2.0", docs_url=None, redoc_url=None, lifespan=lifespan)
    for kind in (ApiError, RequestValidationError, HTTPException, WorkerError, UserError, RecursionError, Exception):
        app.add_exception_handler(kind, handle_exception)
    app.state.service = service = Service(options)
    origins = {"allow_origins": options.cors} if options.cors else {"allow_origin_regex": LOCAL_ORIGINS}
    app.add_middleware(Gate, api_key=options.api_key, metrics=service.metrics)
    app.add_middleware(CORSMiddleware, allow_methods=["GET", "POST"], allow_headers=["*"], **origins)  # the outermost
    add_api(app, service)
    add_page(app)
    return app


def add_api(app, service):
    responses = ERRORS | {200: {"content": {"text/event-stream": {}}}}

    @app.post("/v1/chat/completions", responses=responses)
    async def chat_completions(body: ChatRequest, request: Request):
        return await respond(request, ChatCompletion(service, body))

    @app.post("/v1/completions", responses=responses)
    async def completions(body: CompletionRequest, request: Request):
        return await respond(request, TextCompletion(service, body))

    @app.post("/v1/inspect", responses=ERRORS)
    async def inspect(body: InspectRequest, request: Request):
        found = await while_connected(request.receive, inspection(service, body))
        return Response(status_code=499) if found is None else JSONResponse(found)

    @app.get("/v1/tokenizer", responses=ERRORS)
    def tokenizer():  # in another thread: it takes a third of a second
        return JSONResponse(tokenizer_data(service.tokenizer))

    def entry(model):
        entry = {"id": model.name, "object": "model", "created": service.created, "owned_by": "nanochat"}
        return entry | {"context_length": model.context}

    @app.get("/v1/models", responses=ERRORS)
    async def list_models():
        return {"object": "list", "data": [entry(service.model)] if service.model else []}

    @app.get("/v1/models/{name}", responses=ERRORS)
    async def get_model(name: str):
        if service.model and service.model.name == name:
            return entry(service.model)
        raise ApiError(404, f"no model {name[:100]!r} here", param="model", code="model_not_found")

    @app.get("/health", responses=ERRORS)
    async def health():
        ready, n, free = service.status == "ok", len(service.workers), service.free_workers
        body = {"status": service.status, "ready": ready, "num_gpus": n, "available_workers": free}
        return JSONResponse(body, 200 if ready else 503, None if ready else RETRY)

    @app.get("/stats", responses=ERRORS)
    async def stats():
        total, free = len(service.workers), service.free_workers
        counts = {"total_workers": total, "available_workers": free, "busy_workers": total - free}
        return counts | {"workers": [worker.stats() for worker in service.workers]}

    @app.get("/metrics", responses=ERRORS, response_class=PlainTextResponse)
    async def metrics():
        return PlainTextResponse(generate_latest(service.metrics.registry), media_type="text/plain; version=0.0.4")


def add_page(app):
    """Only the page's own script and style may run, and only call this server."""
    html = html_page("ui.html")

    @app.get("/", include_in_schema=False)
    async def page():
        return Response(html, media_type="text/html; charset=utf-8", headers=page_headers(html))

    @app.get("/logo.svg", include_in_schema=False)
    async def logo():
        return Response((HERE / "logo.svg").read_bytes(), media_type="image/svg+xml")
