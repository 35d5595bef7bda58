"""
Load test of a running server: throughput and latency by number of clients, or a soak test with misbehaving clients.

    python -m dev.bench.bench_serve --url=http://127.0.0.1:8000 --clients 1 4 16 64 --requests=64 --pid=<of chat_web>
    python -m dev.bench.bench_serve --soak=30 --pid=<of chat_web>

Every request is a streamed chat: --prompt, or by default a question about the pocket world, with an answer of about
ten tokens. A client that gets status 429 retries after the time in Retry-After. The columns: median and 95th percentile
of the time to the first token, 95th percentile of the time between chunks, slowest response of /health, which is
requested every 20 ms meanwhile; all in ms. With --pid also the CPU time per token of the server and of this program in
us, and the number of busy cores: once all cores are busy, more clients cannot add throughput.

Exit code 1 if a valid request was not answered, or if rows are still in use after all clients have disconnected.
"""

import asyncio
import json
import statistics
import sys
import time
from collections import Counter
from contextlib import suppress
from random import Random

import aiohttp
import psutil
from prometheus_client.parser import text_string_to_metric_families
from yarl import URL

from nanochat.cli import make_parser, parse_args, run_script
from nanochat.common import UserError
from nanochat.pocket.problems import fact
from nanochat.pocket.world import load_world

PATH = "/v1/chat/completions"
INVALID_BODIES = [b"", b"[]", b"{", b"\xff", b'{"messages": 3}', b'{"messages": []}', b"[" * 9999]
INVALID_BODIES.append(b'{"messages": [{}], "n": 1e99}')
HEALTH_SECONDS = 0.02  # between requests for /health
MEMORY_SECONDS = 10  # between measurements of the memory
SOAK_CLIENTS = 12


class Load:
    """Clients of the server, and their measurements."""

    def __init__(self, http, args, seed=0):
        self.http, self.url, self.max_tokens, self.prompt = http, URL(args.url), args.max_tokens, args.prompt
        self.rng, self.world = Random(seed), load_world()
        self.tokens = 0  # in all answers
        self.first, self.gaps, self.health = [], [], []  # seconds: to first tokens, between chunks, of /health
        self.outcomes = Counter()

    def body(self, **settings):
        question = self.prompt or fact(self.rng, "train", self.world).question
        settings = {"stream": True, "max_tokens": self.max_tokens} | settings
        return {"messages": [{"role": "user", "content": question}]} | settings

    async def ask(self, pause=0.0):
        """Send one request until it is accepted and read the answer; a `pause` (s) after each line: a slow reader."""
        body = self.body(stream_options={"include_usage": True})
        while True:
            start = last = time.perf_counter()
            done = False
            try:
                async with self.http.post(PATH, json=body) as response:
                    if response.status == 429:
                        self.outcomes[429] += 1
                        await asyncio.sleep(float(response.headers["retry-after"]))
                        continue
                    if response.status != 200:
                        self.outcomes[response.status] += 1
                        return
                    async for line in response.content:
                        if not line.startswith(b"data: {"):
                            done = done or line == b"data: [DONE]\n"
                            continue
                        chunk, now = json.loads(line[6:]), time.perf_counter()
                        if "error" in chunk:
                            self.outcomes["error in stream"] += 1
                            return
                        if chunk["choices"] and chunk["choices"][0]["delta"].get("content"):
                            (self.first if last == start else self.gaps).append(now - last)
                            last = now
                        self.tokens += (chunk.get("usage") or {}).get("completion_tokens", 0)
                        await asyncio.sleep(pause)
                self.outcomes["answered" if done else "cut off"] += 1
            except (aiohttp.ClientError, TimeoutError) as e:
                self.outcomes[type(e).__name__] += 1
            return

    async def poll_health(self):
        """Request /health again and again, forever."""
        while True:
            start = time.perf_counter()
            async with self.http.get("/health") as response:
                await response.read()
            self.health.append(time.perf_counter() - start)
            await asyncio.sleep(HEALTH_SECONDS)

    # -----------------------------------------------------------------------------------------------------------------
    # Misbehaving clients

    async def disconnect(self):
        """Disconnect at a random time during an answer, streamed or whole."""
        body = self.body(stream=self.rng.random() < 0.5, n=self.rng.randint(1, 4))
        timeout = aiohttp.ClientTimeout(self.rng.uniform(0, 2))
        with suppress(TimeoutError):
            async with self.http.post(PATH, json=body, timeout=timeout) as response:
                await response.read()

    async def send_invalid(self):
        headers = {"Content-Type": "application/json"}
        async with self.http.post(PATH, data=self.rng.choice(INVALID_BODIES), headers=headers) as response:
            self.outcomes["invalid refused" if 400 <= response.status < 500 else "invalid not refused"] += 1

    async def stall(self):
        """Send an incomplete request, wait, and disconnect."""
        _, writer = await asyncio.open_connection(self.url.host, self.url.port)
        writer.write(b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{" % PATH.encode())
        await asyncio.sleep(self.rng.uniform(0, 5))
        writer.close()

    async def misbehave_until(self, deadline):
        while time.monotonic() < deadline:
            kind = self.rng.choices(["ask", "slow", "disconnect", "invalid", "stall"], [4, 1, 4, 2, 1])[0]
            self.outcomes[f"sent: {kind}"] += 1
            if kind in ("ask", "slow"):
                await self.ask(pause=0.2 if kind == "slow" else 0.0)
            else:
                actions = {"disconnect": self.disconnect, "invalid": self.send_invalid, "stall": self.stall}
                with suppress(OSError, aiohttp.ClientError):
                    await actions[kind]()


async def unfinished_rows(http):
    """The number of rows and waiting requests that the server still has 10 s after the last client disconnected."""
    for _ in range(100):
        async with http.get("/metrics") as response:
            families = text_string_to_metric_families(await response.text())
        gauges = {s.name: s.value for family in families for s in family.samples}
        left = gauges["nanochat_running_rows"] + gauges["nanochat_waiting_requests"]
        if not left:
            break
        await asyncio.sleep(0.1)
    return int(left)


def cpu_seconds(pid):
    """(CPU time of a process and its descendants, CPU time of this process)."""
    times = [process.cpu_times() for process in family(pid)] if pid else []
    own = psutil.Process().cpu_times()
    return sum(t.user + t.system for t in times), own.user + own.system


def family(pid):
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]


def ms(seconds, share=0.5):
    """The quantile `share` of `seconds` in milliseconds, as text."""
    return f"{1000 * sorted(seconds)[int(share * (len(seconds) - 1))]:.1f}" if seconds else "-"


async def speed(http, args):
    """Print the table; returns the number of unanswered requests."""
    await Load(http, args).ask()  # warms up the engine
    columns = ["clients", "tokens/s", "x one client", "first token, ms", "p95", "inter-token", "worst /health"]
    columns += ["CPU us/token: server", "client", "cores"] if args.pid else []
    columns += ["429", "errors"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    missing, alone = 0, None
    for clients in args.clients:
        load = Load(http, args, seed=clients)
        left, probe = iter(range(args.requests)), asyncio.create_task(load.poll_health())

        async def client(load=load, left=left):
            for _ in left:
                await load.ask()

        start, before = time.perf_counter(), cpu_seconds(args.pid)
        await asyncio.gather(*(client() for _ in range(clients)))
        wall = time.perf_counter() - start
        busy = [after - was for after, was in zip(cpu_seconds(args.pid), before, strict=True)]
        rate = load.tokens / wall
        probe.cancel()
        alone = alone or rate
        errors = {k: n for k, n in load.outcomes.items() if k not in ("answered", 429)}
        cells = [clients, f"{rate:.0f}", f"{rate / alone:.2f}", ms(load.first), ms(load.first, 0.95)]
        cells += [ms(load.gaps, 0.95), ms(load.health, 1)]
        if args.pid:
            cells += [f"{1e6 * s / max(1, load.tokens):.0f}" for s in busy] + [f"{sum(busy) / wall:.2f}"]
        cells.append(load.outcomes[429])
        cells.append(", ".join(f"{n} x {k}" for k, n in errors.items()) or 0)
        print(f"| {' | '.join(map(str, cells))} |", flush=True)
        missing += args.requests - load.outcomes["answered"]
    return missing


def resident(pid):
    """Resident memory of a process and its descendants in MiB."""
    total = 0
    for process in family(pid):
        with suppress(psutil.NoSuchProcess):
            total += process.memory_info().rss
    return total / 2**20


async def soak(http, args):
    """Run the clients for --soak minutes and print the outcomes; returns the number of unanswered requests."""
    load, start, memory = Load(http, args), time.monotonic(), []

    async def watch():
        while True:
            memory.append(resident(args.pid))
            await asyncio.sleep(MEMORY_SECONDS)

    background = [load.poll_health(), watch()] if args.pid else [load.poll_health()]
    tasks = [asyncio.create_task(work) for work in background]
    await asyncio.gather(*(load.misbehave_until(start + 60 * args.soak) for _ in range(SOAK_CLIENTS)))
    for task in tasks:
        task.cancel()
    for what, n in sorted(load.outcomes.items(), key=str):
        print(f"{what}: {n}")
    print(f"worst /health: {ms(load.health, 1)} ms")
    if len(memory) > 1:
        sixth = max(1, len(memory) // 6)  # the first sixth is for warming up
        early, late = statistics.median(memory[sixth : 2 * sixth] or memory), statistics.median(memory[-sixth:])
        print(f"memory: {early:.0f} MiB after the first sixth, {late:.0f} MiB in the last ({late / early - 1:+.1%})")
    missing = load.outcomes["sent: ask"] + load.outcomes["sent: slow"] - load.outcomes["answered"]
    return missing + load.outcomes["invalid not refused"]


async def drive(args):
    headers = {"Authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(sock_read=args.timeout)
    async with aiohttp.ClientSession(args.url, headers=headers, timeout=timeout, connector=connector) as http:
        try:
            async with http.get("/health", raise_for_status=True):
                pass
        except aiohttp.ClientError as e:
            raise UserError(f"no server is ready at {args.url} ({e}); start one with python -m scripts.chat_web") from e
        missing = await (soak if args.soak else speed)(http, args)
        stuck = await unfinished_rows(http)
    print(f"not answered: {missing}, rows stuck: {stuck}")
    return missing or stuck


def main(argv=None):
    parser = make_parser("dev.bench.bench_serve", __doc__)
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:8000")
    add("--clients", type=int, nargs="+", default=[1, 4, 16, 64], help="numbers of clients, one line of the table each")
    add("--requests", type=int, default=64, help="requests per line, by all clients together (default 64)")
    add("--max_tokens", type=int, default=64, help="limit per answer (default 64)")
    add("--prompt", default="", help='sent by every request, e.g. "Tell me a story." (default: random questions)')
    add("--api_key", default="", help="if the server needs one")
    add("--timeout", type=float, default=60, help="seconds without data until a request fails (default 60)")
    add("--soak", type=float, default=0, help="minutes of the soak test; 0 = measure speed (default 0)")
    add("--pid", type=int, help="process id of the server, to measure its memory (soak) or CPU time")
    args = parse_args(parser, argv)
    if asyncio.run(drive(args)):
        sys.exit(1)


if __name__ == "__main__":
    run_script(main)
