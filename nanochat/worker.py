"""
An engine in a process of its own, so that the server's event loop never computes, and the server's handle on it.

The two talk over a pipe. To the worker: ("submit", id, settings of a Request), ("cancel", id), ("score", id, tokens,
top). Back: ("ready", what it runs), ("failed", why), ("step", events, load), ("scored", id, result) and ("error", id,
why); an event is (id, sample, token, log-probabilities or None, finish or None, cached tokens).
"""

import asyncio
import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
import traceback

from nanochat.common import UserError, compute_init

PIECE_SECONDS = 0.001  # of an answer, each: more pieces than these would keep the server from its own work


def run_worker(connection, index, options):
    """The worker's process: loads the model, then decodes until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the server decides when to end
    os.environ["LOCAL_RANK"] = str(index)  # which GPU
    try:
        loop, told = _load(options)
    except UserError as e:
        connection.send(("failed", str(e)))
        return
    connection.send(("ready", told))
    try:
        _serve(connection, loop)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the server is gone


def _load(options):
    import torch

    from nanochat.checkpoint_manager import load_model
    from nanochat.engine import DecodeLoop, Engine

    compute = compute_init(options["device_type"], options["dtype"])
    if compute.device.type == "cpu" and options["num_workers"] > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // options["num_workers"]))
    model, tokenizer, meta = load_model(options["source"], compute, options["model_tag"], options["step"])
    engine = Engine(model, tokenizer, compute, options["prefix_tokens"], options["quantize"])
    loop = DecodeLoop(engine, options["max_rows"])
    name = f"nanochat-{meta['model_tag']}-{options['source']}"
    return loop, {"name": name, "context": model.config.sequence_len, "device": str(compute.device)}


def _serve(connection, loop):
    from nanochat.engine import DecodeLoop, Request

    jobs = {}  # id -> rows
    events, told = [], 0.0  # not sent yet, and when some were
    while True:
        while connection.poll(0 if loop.busy else None):
            kind, key, *rest = connection.recv()
            try:
                if kind == "submit":
                    jobs[key] = loop.submit(Request(**rest[0]))
                elif kind == "cancel":
                    loop.cancel(jobs.pop(key, []))
                elif kind == "score":
                    connection.send(("scored", key, loop.engine.score(*rest)))
            except UserError as e:
                connection.send(("error", key, str(e)))
        try:
            stepped = loop.step()
        except Exception:  # out of memory, say: those in the batch fail, the next ones may fit
            traceback.print_exc(file=sys.stderr)
            for key in jobs:
                connection.send(("error", key, "the engine failed, see the server's log"))
            jobs = {}
            loop, stepped = DecodeLoop(loop.engine, loop.max_rows), []
        keys = {row: key for key, rows in jobs.items() for row in rows}
        for row in stepped:
            logprobs = row.logprobs[-1] if row.logprobs else None
            events.append((keys[row], row.sample, row.tokens[-1], logprobs, row.finish, row.cached))
        jobs = {key: rows for key, rows in jobs.items() if not all(row.finish for row in rows)}
        first = any(len(row.tokens) == 1 for row in stepped)
        if loop.busy and not first and time.perf_counter() - told < PIECE_SECONDS * len(loop.rows):
            continue
        held = loop.engine.prefixes.held if loop.engine.prefixes else 0
        connection.send(("step", events, {"rows": len(loop.rows), "waiting": len(loop.waiting), "cached_tokens": held}))
        events, told = [], time.perf_counter()


class WorkerError(Exception):
    """The worker cannot answer: its engine failed, or it is dead."""


class TooSlow(WorkerError):
    """The answer took longer than a request may take."""


class Worker:
    """The server's handle: start() it in the event loop, then generate() and score() as often as wanted."""

    def __init__(self, index, options):
        self.index, self.options = index, options
        self.state, self.error, self.told = "loading", None, {}
        self.load = {"rows": 0, "waiting": 0, "cached_tokens": 0}
        self.in_flight = 0  # answers asked for and not ended
        self.inboxes = {}  # id -> queue of what came for it
        self.changed = asyncio.Event()  # no longer loading

    def start(self):
        self.loop = asyncio.get_running_loop()
        context = multiprocessing.get_context("spawn")  # a forked child would share the server's sockets
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=run_worker, args=(theirs, self.index, self.options), daemon=True)
        self.process.start()
        theirs.close()
        self.outbox = queue.SimpleQueue()  # a full pipe must not block the event loop
        threading.Thread(target=self._read, daemon=True).start()
        threading.Thread(target=self._write, daemon=True).start()

    def stop(self):
        self.process.kill()
        self.process.join()

    def _write(self):
        try:
            while True:
                self.connection.send(self.outbox.get())
        except OSError:
            pass  # the reader tells

    def _read(self):
        try:
            while True:
                self.loop.call_soon_threadsafe(self._dispatch, self.connection.recv())
        except (EOFError, OSError):
            try:
                self.loop.call_soon_threadsafe(self._dispatch, ("failed", "the engine's process has ended"))
            except RuntimeError:
                pass  # the server is ending, too

    def _dispatch(self, message):
        kind, *rest = message
        if kind == "step":
            events, self.load = rest
            for key, *event in events:
                if key in self.inboxes:
                    self.inboxes[key].put_nowait(event)
        elif kind in ("scored", "error"):
            key, what = rest
            if key in self.inboxes:
                self.inboxes[key].put_nowait(WorkerError(what) if kind == "error" else what)
        elif kind == "ready":
            self.state, self.told = "ready", rest[0]
            self.changed.set()
        elif self.state != "dead":
            self.state, self.error = "dead", rest[0]
            self.load = {"rows": 0, "waiting": 0, "cached_tokens": 0}
            for inbox in self.inboxes.values():
                inbox.put_nowait(WorkerError(self.error))
            self.changed.set()

    async def generate(self, key, **request):
        """Yield lists of events (sample, token, ...) as they come; leaving early cancels. Raises WorkerError."""
        n, ended = request.get("num_samples", 1), 0
        inbox = self.inboxes[key] = asyncio.Queue()
        self.in_flight += n
        late = TooSlow("the answer took too long")
        timer = self.loop.call_later(self.options["request_timeout"], inbox.put_nowait, late)
        try:
            self._send("submit", key, request)
            while ended < n:
                events = [await inbox.get()]
                while not inbox.empty():
                    events.append(inbox.get_nowait())
                for event in events:
                    if isinstance(event, WorkerError):
                        raise event
                ended += sum(event[3] is not None for event in events)
                yield events
        finally:
            timer.cancel()
            self.in_flight -= n
            del self.inboxes[key]
            if ended < n:
                self.outbox.put(("cancel", key))

    async def score(self, key, tokens, top):
        """Log-probabilities of a prompt's own tokens, see Engine.score. Raises WorkerError."""
        inbox = self.inboxes[key] = asyncio.Queue()
        try:
            self._send("score", key, tokens, top)
            result = await inbox.get()
        finally:
            del self.inboxes[key]
        if isinstance(result, WorkerError):
            raise result
        return result

    def _send(self, *message):
        if self.state != "ready":
            raise WorkerError(self.error or "the model is loading")
        self.outbox.put(message)
