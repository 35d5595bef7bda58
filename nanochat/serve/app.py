"""
The web server: OpenAI's API over the engine, and a page to talk to the model.

create_app(options) makes the FastAPI app; each worker owns a model in a process of its own, so that the event loop is
always free to answer. The page and its logo are the only files served.
"""

import asyncio
import base64
import contextlib
import gc
import hashlib
import hmac
import json
import re
import uuid
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import generate_latest
from starlette.exceptions import HTTPException

from nanochat.serve.schemas import ApiError, ChatRequest, CompletionRequest, ErrorBody
from nanochat.serve.service import RETRY_AFTER, Service, chat, complete, guarded
from nanochat.serve.worker import TooSlow, WorkerError

HERE = Path(__file__).parent
PUBLIC = {"/", "/logo.svg", "/health", "/health/"}
LOCAL = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"
MAX_BODY = 1 << 20  # bytes
TOO_LARGE = f"the body is larger than {MAX_BODY:,} bytes"
ERRORS = {status: {"model": ErrorBody} for status in (400, 401, 404, 405, 413, 429, 500, 503, 504)}


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
                raise HTTPException(413, TOO_LARGE)
            return message

        async def answer(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        length = headers.get("content-length", "0")
        try:
            if not self._allowed(scope, headers):
                error = ApiError(401, "a valid API key is needed: Authorization: Bearer KEY", "authentication_error")
                await error_response(error)(scope, limited, answer)
            elif length.isdecimal() and int(length) > MAX_BODY:
                await error_response(ApiError(413, TOO_LARGE))(scope, limited, answer)
            else:
                await self.app(scope, limited, answer)
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
    """
    Server-sent events from an async generator of JSON values, sent together up to a None, which is none.

    A client that goes away closes the generator.
    """

    media_type = "text/event-stream"

    def __init__(self, events):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.events = events

    async def __call__(self, scope, receive, send):
        async def stream():
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            data = ""
            async with contextlib.aclosing(self.events):
                async for event in self.events:
                    if event is not None:
                        data += f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n"
                    elif data:
                        await send({"type": "http.response.body", "body": data.encode(), "more_body": True})
                        data = ""
            await send({"type": "http.response.body", "body": data.encode()})

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


def create_app(options):
    """The app. `options` are chat_web's flags as a dict; the model loads when the app starts."""
    service = Service(options)
    html, policy = page()

    @contextlib.asynccontextmanager
    async def lifespan(app):
        for worker in service.workers:
            await worker.start()
        watching = asyncio.create_task(watch(app))
        gc.freeze()  # looking through all that is loaded would hold everybody up for tens of milliseconds
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
        if isinstance(error, TooSlow):
            return error_response(ApiError(504, str(error), "timeout_error"))
        return error_response(ApiError(503, str(error), "service_unavailable_error", RETRY_AFTER))

    @app.exception_handler(Exception)
    async def failure(request, error):
        return error_response(ApiError(500, "the server failed, see its log", "server_error"))

    async def respond(request, work):
        """The answer to a completion: `work` gives a generator of chunks, or the whole."""
        result = await while_connected(request.receive, work)
        if result is None:
            return Response(status_code=499)  # nobody reads it; for the metrics
        if isinstance(result, dict):
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
        status, n = service.status, len(service.workers)
        told = {"status": status, "ready": status == "ok", "num_gpus": n, "available_workers": service.free_workers}
        headers = {} if status == "ok" else {"Retry-After": str(RETRY_AFTER)}
        return JSONResponse(told, 200 if status == "ok" else 503, headers)

    @app.get("/stats", responses=ERRORS)
    async def stats():
        workers = service.workers
        free = service.free_workers
        listed = [
            {"gpu_id": w.index, "device": w.told.get("device"), "state": w.state, "in_flight": w.in_flight} | w.load
            for w in workers
        ]
        busy = len(workers) - free
        return {"total_workers": len(workers), "available_workers": free, "busy_workers": busy, "workers": listed}

    @app.get("/metrics", responses=ERRORS, response_class=PlainTextResponse)
    async def metrics():
        return PlainTextResponse(generate_latest(service.metrics.registry), media_type="text/plain; version=0.0.4")

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
