"""
Worker processes. Each one owns an engine, so the event loop of the HTTP server never computes.

Server and worker exchange messages over a pipe of multiprocessing:

    to the worker     ("submit", key, fields of an engine's Request), ("cancel", key), ("score", key, tokens, top),
                      ("inspect", key, arguments of nanochat.inspection.inspect)
    to the server     first a ModelInfo, or a WorkerError if loading failed; then ({key: reply}, Load), where a reply
                      is a list of events, the result of a score or an inspection, a WorkerError or a UserError

An event is a generated token, a tuple (sample, token, logprobs, finish, cached). `sample`: 0 to num_samples - 1 of the
request. `logprobs`: see log_probabilities() in nanochat/inference/sampling.py, or None. `finish`: "stop" or "length" if
this is the sample's last token, else None. `cached`: prompt tokens taken from the prefix cache.

`key` identifies a request. run_worker() is the process, Worker is its handle in the server. `options` are the parsed
flags of scripts/chat_web.py.
"""

import asyncio
import contextlib
import gc
import multiprocessing
import os
import pickle
import queue
import signal
import threading
import time
import traceback
from collections import namedtuple
from types import SimpleNamespace

from nanochat.cluster import compute_init
from nanochat.common import UserError

# The shortest time between two messages about one request, per row in the batch. Events that arrive sooner are
# coalesced: the server has to write every message to a client, and would otherwise fall behind the engine.
SEND_INTERVAL = 0.001  # seconds
# The model that a worker has loaded. `context`: tokens of prompt and answer together.
ModelInfo = namedtuple("ModelInfo", "name context device")
# The load on a worker's engine: rows in the batch, groups of rows that wait for a place, tokens in the prefix cache.
Load = namedtuple("Load", "rows waiting cached_tokens", defaults=(0, 0, 0))


class WorkerError(Exception):
    """The worker cannot answer: its engine failed, or its process has ended."""


class RequestTimeout(WorkerError):
    """The answer took longer than --request_timeout."""


# ---------------------------------------------------------------------------------------------------------------------
# The worker process


def run_worker(connection, index, options):
    """Load the model, then decode until the server closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the server stops us
    os.environ |= {"LOCAL_RANK": str(index), "RANK": str(index)}  # select the GPU; only worker 0 prints warnings
    inbox = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, inbox), daemon=True).start()
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the server has ended
        try:
            engine, model_info = _load(options)
        except UserError as e:
            return connection.send(WorkerError(str(e)))
        connection.send(model_info)
        gc.freeze()  # keeps the garbage collector from traversing the loaded model again and again
        EngineLoop(connection, inbox, engine, options.max_rows).run()


def _receive(connection, inbox):
    """Move messages from the pipe to `inbox`, which the engine polls without a system call; None marks the end."""
    with contextlib.suppress(OSError, EOFError):  # the server has ended, possibly in the middle of a message
        while True:
            inbox.put(connection.recv())
    inbox.put(None)


def _load(options):
    """(Engine, ModelInfo)."""
    import torch

    from nanochat.checkpoint_manager import load_model
    from nanochat.engine import Engine

    compute = compute_init(options.device_type, options.dtype)
    if compute.device.type == "cpu" and options.num_workers > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // options.num_workers))
    source, tag = options.source, options.model_tag
    model, tokenizer, meta = load_model(source, compute, "eval", tag, options.step, quantize=options.quantize)
    engine = Engine(model, tokenizer, compute, options.prefix_tokens)
    return engine, ModelInfo(f"nanochat-{meta['model_tag']}-{source}", model.config.sequence_len, str(compute.device))


class EngineLoop:
    """Steps the engine, handles the messages in `inbox` between steps, and sends the new tokens to the server."""

    def __init__(self, connection, inbox, engine, max_rows):
        self.connection, self.inbox, self.engine, self.max_rows = connection, inbox, engine, max_rows
        self._reset()

    def _reset(self):
        self.loop = self.engine.decode_loop(self.max_rows)
        self.requests = {}  # unfinished row -> its request: key, events that are not sent yet, time of its last message

    def run(self):
        """Decode until the server has ended."""
        while self._handle_messages():
            try:
                rows = self.loop.step()
            except Exception:  # out of memory, for example: fail the requests in the batch, later ones may fit
                traceback.print_exc()
                error = WorkerError("the engine failed, see the server's log")
                self._send({request.key: error for request in self.requests.values()})
                self._reset()
                rows = []
            self._send_events(rows)

    def _handle_messages(self):
        """Handle all messages in the inbox, or wait for one if the engine is idle. False if the server has ended."""
        while not (self.loop.busy and self.inbox.empty()):
            message = self.inbox.get()
            if message is None:
                return False
            kind, key, *arguments = message
            try:
                getattr(self, kind)(key, *arguments)
            except Exception as e:  # out of memory, for example
                error = e if isinstance(e, UserError) else WorkerError(f"the engine failed: {type(e).__name__}")
                self._send({key: error})
        return True

    def submit(self, key, fields):
        from nanochat.engine import Request

        request = SimpleNamespace(key=key, events=[], sent_at=0.0)
        self.requests |= dict.fromkeys(self.loop.submit(Request(**fields)), request)

    def cancel(self, key):
        self.loop.cancel([row for row, request in self.requests.items() if request.key == key])
        self.requests = {row: request for row, request in self.requests.items() if request.key != key}
        self._send({})  # the load

    def score(self, key, tokens, top):
        self._send({key: self.engine.score(tokens, top)})

    def inspect(self, key, fields):
        from nanochat.inspection import inspect

        self._send({key: inspect(self.engine, **fields)})

    def _send_events(self, rows):
        """Queue the newest token of each of `rows`; send what is due, and everything of requests with finished rows."""
        requests, now, due, interval = self.requests, time.perf_counter(), {}, SEND_INTERVAL * len(rows)
        for row in rows:
            request = requests.pop(row) if row.finish else requests[row]
            logprobs = row.logprobs[-1] if row.logprobs else None
            request.events.append((row.sample, row.tokens[-1], logprobs, row.finish, row.cached))
            if row.finish or now - request.sent_at >= interval:
                due[request.key] = request
        if not due and self.loop.busy:
            return
        # Requests that are half due are sent too: then they become due together, and share their next message.
        due |= {r.key: r for r in requests.values() if r.events and now - r.sent_at >= interval / 2}
        self._send({key: request.events for key, request in due.items()})
        for request in due.values():
            request.events, request.sent_at = [], now

    def _send(self, replies):
        load = Load(len(self.loop.rows), len(self.loop.waiting), self.engine.prefix_cache.num_tokens)
        # As send() does, but with the faster of Python's picklers: there are thousands of these messages a second.
        self.connection.send_bytes(pickle.dumps((replies, load)))


# ---------------------------------------------------------------------------------------------------------------------
# The server's side


class Worker:
    """The server's handle on a worker process: start() it in the event loop, then generate() and ask()."""

    def __init__(self, index, options):
        self.index, self.options = index, options
        self.state = "loading"  # then "ready" or "dead"
        self.error, self.model = None, None  # why it is dead; its ModelInfo
        self.load, self.unfinished = Load(), {}  # key -> number of unfinished answers
        self.queues = {}  # key -> queue of the replies
        self.loaded = asyncio.Event()  # set when the state is no longer "loading"

    @property
    def in_flight(self):
        """Number of unfinished answers. One that a client does not read is finished when it has been generated."""
        return sum(self.unfinished.values())

    def start(self):
        context = multiprocessing.get_context("spawn")  # a forked child would share the server's sockets
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=run_worker, args=(theirs, self.index, self.options), daemon=True)
        self.process.start()
        theirs.close()
        asyncio.get_running_loop().add_reader(self.connection.fileno(), self._read)
        os.set_blocking(self.connection.fileno(), True)  # uvloop has changed it; recv() of a long message would fail

    def stop(self):
        asyncio.get_running_loop().remove_reader(self.connection.fileno())
        self.process.kill()
        self.process.join()

    def stats(self):
        """The worker's entry in GET /stats."""
        stats = {"gpu_id": self.index, "device": self.model and self.model.device, "state": self.state}
        return stats | {"in_flight": self.in_flight} | self.load._asdict()

    def _read(self):
        """Give each reply in the next message to the request that waits for it."""
        try:
            message = checked(self.connection.recv())
            if self.state == "loading":
                self.model, self.state = message, "ready"
                return self.loaded.set()
            replies, self.load = message
            for key in replies.keys() & self.queues.keys():
                reply = replies[key]
                if key in self.unfinished and isinstance(reply, list):
                    self.unfinished[key] -= sum(finish is not None for *_, finish, _ in reply)
                self.queues[key].put_nowait(reply)
        except (WorkerError, EOFError, OSError) as e:
            asyncio.get_running_loop().remove_reader(self.connection.fileno())
            self.error = str(e) if isinstance(e, WorkerError) else "the engine's process has ended"
            self.state, self.load = "dead", Load()
            self.loaded.set()
            for replies in self.queues.values():
                replies.put_nowait(WorkerError(self.error))

    async def generate(self, key, **fields):
        """
        Yield lists of events as they arrive, until all samples are finished. Raises WorkerError.

        `fields` are those of an engine's Request. Closing the generator early cancels the request.
        """
        replies = self.queues[key] = asyncio.Queue()
        self.unfinished[key] = fields["num_samples"]
        timer = asyncio.get_running_loop().call_later(self.options.request_timeout, self._time_out, key)
        try:
            self._send("submit", key, fields)
            while self.unfinished.get(key) or not replies.empty():
                yield checked(await replies.get())
        finally:
            timer.cancel()
            del self.queues[key]
            self._cancel(key)

    def _time_out(self, key):
        """Free the places of a request, also if its client does not read."""
        if self.unfinished[key]:
            self._cancel(key)
            self.queues[key].put_nowait(RequestTimeout("the answer took too long"))

    def _cancel(self, key):
        if self.unfinished.pop(key, 0) and self.state == "ready":
            self._send("cancel", key)

    async def ask(self, kind, key, *arguments):
        """The reply to a message of the kind "score" or "inspect", see EngineLoop. Raises WorkerError."""
        replies = self.queues[key] = asyncio.Queue()
        try:
            self._send(kind, key, *arguments)
            return checked(await replies.get())
        finally:
            del self.queues[key]

    def _send(self, *message):
        if self.state != "ready":
            raise WorkerError(self.error or "the model is loading")
        with contextlib.suppress(OSError):  # the process has ended; _read() says so to all requests
            self.connection.send(message)


def checked(reply):
    """`reply`, unless it is an error, which is raised."""
    if isinstance(reply, (WorkerError, UserError)):
        raise reply
    return reply
