"""
An engine in a process of its own, so that the server's event loop never computes, and the server's handle on it.

The two send each other pickled messages, their sizes before them. To the worker: ("submit", id, settings of a
Request), ("cancel", id), ("score", id, tokens, top). Back: ("ready", what it runs), ("failed", why), ("step",
{id: events}, load), ("scored", id, result) and ("error", id, why); an event is (sample, token, log-probabilities or
None, finish or None, cached tokens).
"""

import asyncio
import gc
import multiprocessing
import os
import pickle
import queue
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from collections import defaultdict

from nanochat.common import UserError, compute_init

SIZE = struct.Struct("!I")
PIECE_SECONDS = 0.001  # of an answer, each: more pieces than these would keep the server from its own work


def packed(*message):
    data = pickle.dumps(message)
    return SIZE.pack(len(data)) + data


def run_worker(connection, index, options):
    """The worker's process: loads the model, then decodes until the socket is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the server decides when to end
    os.environ["LOCAL_RANK"] = str(index)  # which GPU
    inbox = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, inbox), daemon=True).start()
    try:
        try:
            engine, told = _load(options)
        except UserError as e:
            connection.sendall(packed("failed", str(e)))
            return
        connection.sendall(packed("ready", told))
        gc.freeze()  # what is there now stays: no need to look through it again and again
        _serve(connection, inbox, engine, options["max_rows"])
    except (BrokenPipeError, ConnectionResetError):
        pass  # the server is gone


def _receive(connection, inbox):
    """Put messages into `inbox`, None at the end: looking there costs the engine less than asking the system."""
    try:
        with connection.makefile("rb") as file:
            while size := file.read(SIZE.size):
                inbox.put(pickle.loads(file.read(*SIZE.unpack(size))))
    except (OSError, EOFError, pickle.UnpicklingError, struct.error):
        pass  # the server is gone, in the middle of a message
    finally:
        inbox.put(None)


def _load(options):
    import torch

    from nanochat.checkpoint_manager import load_model
    from nanochat.engine import Engine

    compute = compute_init(options["device_type"], options["dtype"])
    if compute.device.type == "cpu" and options["num_workers"] > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // options["num_workers"]))
    model, tokenizer, meta = load_model(
        options["source"], compute, options["model_tag"], options["step"], quantize=options["quantize"]
    )
    engine = Engine(model, tokenizer, compute, options["prefix_tokens"])
    name = f"nanochat-{meta['model_tag']}-{options['source']}"
    return engine, {"name": name, "context": model.config.sequence_len, "device": str(compute.device)}


def _serve(connection, inbox, engine, max_rows):
    from nanochat.engine import Request

    loop = engine.decode_loop(max_rows)
    owners = {}  # row -> id
    events, sent = defaultdict(list), {}  # by id: what is not sent yet, and when the last was
    while True:
        while not (loop.busy and inbox.empty()):
            message = inbox.get()
            if message is None:
                return
            kind, key, *rest = message
            try:
                if kind == "submit":
                    owners |= dict.fromkeys(loop.submit(Request(**rest[0])), key)
                elif kind == "cancel":
                    rows = [row for row, owner in owners.items() if owner == key]
                    loop.cancel(rows)
                    owners = {row: owner for row, owner in owners.items() if owner != key}
                    events.pop(key, None)
                    sent.pop(key, None)
                elif kind == "score":
                    connection.sendall(packed("scored", key, engine.score(*rest)))
            except UserError as e:
                connection.sendall(packed("error", key, str(e)))
        try:
            stepped = loop.step()
        except Exception:  # out of memory, say: those in the batch fail, the next ones may fit
            traceback.print_exc(file=sys.stderr)
            for key in set(owners.values()):
                connection.sendall(packed("error", key, "the engine failed, see the server's log"))
            owners, events, sent = {}, defaultdict(list), {}
            loop, stepped = engine.decode_loop(loop.max_rows), []
        now, due = time.perf_counter(), set()
        for row in stepped:
            key = owners.pop(row) if row.finish else owners[row]
            logprobs = row.logprobs[-1] if row.logprobs else None
            events[key].append((row.sample, row.tokens[-1], logprobs, row.finish, row.cached))
            if row.finish or now - sent.get(key, 0.0) >= PIECE_SECONDS * len(stepped):
                due.add(key)
            if row.finish:
                sent.pop(key, None)
        if not due and loop.busy:
            continue
        # Those that are half due go along, so that next time many go together.
        due |= {key for key in events if now - sent.get(key, 0.0) >= PIECE_SECONDS * len(stepped) / 2}
        sent |= dict.fromkeys(due & set(owners.values()), now)
        held = engine.prefix_cache.num_tokens if engine.prefix_cache else 0
        load = {"rows": len(loop.rows), "waiting": len(loop.waiting), "cached_tokens": held}
        connection.sendall(packed("step", {key: events.pop(key) for key in due}, load))


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

    async def start(self):
        self.loop = asyncio.get_running_loop()
        context = multiprocessing.get_context("spawn")  # a forked child would share the server's sockets
        ours, theirs = socket.socketpair()
        self.process = context.Process(target=run_worker, args=(theirs, self.index, self.options), daemon=True)
        self.process.start()
        theirs.close()
        reader, self.writer = await asyncio.open_connection(sock=ours)
        self.reading = asyncio.create_task(self._read(reader))

    def stop(self):
        self.reading.cancel()
        self.process.kill()
        self.process.join()

    async def _read(self, reader):
        try:
            while True:
                (size,) = SIZE.unpack(await reader.readexactly(SIZE.size))
                self._dispatch(*pickle.loads(await reader.readexactly(size)))
        except (asyncio.IncompleteReadError, OSError):
            self._dispatch("failed", "the engine's process has ended")

    def _dispatch(self, kind, *rest):
        if kind == "step":
            events, self.load = rest
            for key in events.keys() & self.inboxes.keys():
                self.inboxes[key].put_nowait(events[key])
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
                events = await inbox.get()
                if isinstance(events, WorkerError):
                    raise events
                ended += sum(event[3] is not None for event in events)
                yield events
        finally:
            timer.cancel()
            self.in_flight -= n
            del self.inboxes[key]
            if ended < n:
                self.writer.write(packed("cancel", key))

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
        self.writer.write(packed(*message))
