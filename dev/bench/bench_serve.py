"""
Load on a running server: speed for growing numbers of clients, or a soak with clients that misbehave.

    python -m dev.bench.bench_serve --url=http://127.0.0.1:8000 --clients 1 4 16 64 --requests=64 --pid=<of chat_web>
    python -m dev.bench.bench_serve --soak=30 --pid=<of chat_web>

Every request is a streamed chat with a question about the pocket world, answered with ten tokens mostly, or with
--prompt; one that is told 429 waits as long as it is told and asks again. Times are in ms: of the first token the
median and the 95th percentile, between pieces of a stream the 95th percentile, and the worst of /health, which is
asked for every 20 ms meanwhile. With --pid, also the microseconds of a core that a token takes, of the server and of
this program, and how many cores were busy: once all are, more clients cannot be faster. Exit code 1 if a well-formed
request was not answered, or if rows are still taken when everybody has gone.
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
RUBBISH = (
    b"",
    b"[]",
    b"{",
    b"\xff",
    b'{"messages": 3}',
    b'{"messages": []}',
    b'{"messages": [{}], "n": 1e99}',
    b"[" * 9999,
)
PROBE = 0.02  # seconds between requests for /health
SAMPLE = 10  # seconds between looks at the memory
SOAKERS = 12  # clients of a soak


class Load:
    """What clients do and how it went."""

    def __init__(self, http, args, seed=0):
        self.http, self.url, self.max_tokens, self.prompt = http, URL(args.url), args.max_tokens, args.prompt
        self.rng, self.world = Random(seed), load_world()
        self.tokens, self.first, self.gaps, self.health = 0, [], [], []  # the last three in seconds
        self.outcomes = Counter()

    def body(self, **settings):
        question = self.prompt or fact(self.rng, "train", self.world).question
        settings = {"stream": True, "max_tokens": self.max_tokens} | settings
        return {"messages": [{"role": "user", "content": question}]} | settings

    async def ask(self, pause=0.0):
        """One request, until it is answered; `pause` seconds after each piece make a slow reader."""
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

    async def probe(self):
        """Ask for /health every now and then, for ever."""
        while True:
            start = time.perf_counter()
            async with self.http.get("/health") as response:
                await response.read()
            self.health.append(time.perf_counter() - start)
            await asyncio.sleep(PROBE)

    # -----------------------------------------------------------------------------------------------------------------
    # Clients one would rather not have

    async def leave(self):
        """Go away at some point of an answer, streamed or not."""
        body = self.body(stream=self.rng.random() < 0.5, n=self.rng.randint(1, 4))
        with suppress(TimeoutError):
            async with self.http.post(
                PATH, json=body, timeout=aiohttp.ClientTimeout(self.rng.uniform(0, 2))
            ) as response:
                await response.read()

    async def send_rubbish(self):
        headers = {"Content-Type": "application/json"}
        async with self.http.post(PATH, data=self.rng.choice(RUBBISH), headers=headers) as response:
            self.outcomes["rubbish refused" if 400 <= response.status < 500 else "rubbish not refused"] += 1

    async def stall(self):
        """Send half of a request and wait."""
        _, writer = await asyncio.open_connection(self.url.host, self.url.port)
        writer.write(b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{" % PATH.encode())
        await asyncio.sleep(self.rng.uniform(0, 5))
        writer.close()

    async def misbehave_until(self, deadline):
        while time.monotonic() < deadline:
            kind = self.rng.choices(["ask", "slow", "leave", "rubbish", "stall"], [4, 1, 4, 2, 1])[0]
            self.outcomes[f"sent: {kind}"] += 1
            if kind in ("ask", "slow"):
                await self.ask(pause=0.2 if kind == "slow" else 0.0)
            else:
                with suppress(OSError, aiohttp.ClientError):
                    await {"leave": self.leave, "rubbish": self.send_rubbish, "stall": self.stall}[kind]()


async def rows_left(http):
    """Rows and requests that the server still has after all clients have gone, 10 seconds later at most."""
    for _ in range(100):
        async with http.get("/metrics") as response:
            families = text_string_to_metric_families(await response.text())
        gauges = {s.name: s.value for family in families for s in family.samples}
        left = gauges["nanochat_running_rows"] + gauges["nanochat_waiting_requests"]
        if not left:
            break
        await asyncio.sleep(0.1)
    return int(left)


def processor_seconds(pid):
    """(of a process and its descendants, of this one)."""
    times = [process.cpu_times() for process in family(pid)] if pid else []
    own = psutil.Process().cpu_times()
    return sum(t.user + t.system for t in times), own.user + own.system


def family(pid):
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]


def ms(seconds, share=0.5):
    """A quantile in milliseconds, as text."""
    return f"{1000 * sorted(seconds)[int(share * (len(seconds) - 1))]:.1f}" if seconds else "-"


async def speed(http, args):
    """Print the table; returns how many requests were not answered."""
    await Load(http, args).ask()  # the first one warms the engine
    columns = ["clients", "tokens/s", "of one client", "first token, ms", "p95", "inter-token", "worst /health"]
    columns += ["core us/token: server", "client", "cores"] if args.pid else []
    columns += ["429", "errors"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    missing, alone = 0, None
    for clients in args.clients:
        load = Load(http, args, seed=clients)
        left, probe = iter(range(args.requests)), asyncio.create_task(load.probe())

        async def client(load=load, left=left):
            for _ in left:
                await load.ask()

        start, before = time.perf_counter(), processor_seconds(args.pid)
        await asyncio.gather(*(client() for _ in range(clients)))
        wall = time.perf_counter() - start
        busy = [after - was for after, was in zip(processor_seconds(args.pid), before, strict=True)]
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
    """MiB of a process and its descendants."""
    total = 0
    for process in family(pid):
        with suppress(psutil.NoSuchProcess):
            total += process.memory_info().rss
    return total / 2**20


async def soak(http, args):
    """Misbehave for --soak minutes and print how that went; returns how many requests were not answered."""
    load, start, memory = Load(http, args), time.monotonic(), []

    async def watch():
        while True:
            memory.append(resident(args.pid))
            await asyncio.sleep(SAMPLE)

    tasks = [asyncio.create_task(work) for work in ([load.probe(), watch()] if args.pid else [load.probe()])]
    await asyncio.gather(*(load.misbehave_until(start + 60 * args.soak) for _ in range(SOAKERS)))
    for task in tasks:
        task.cancel()
    for what, n in sorted(load.outcomes.items(), key=str):
        print(f"{what}: {n}")
    print(f"worst /health: {ms(load.health, 1)} ms")
    if len(memory) > 1:
        sixth = max(1, len(memory) // 6)  # the first one is for warming up
        early, late = statistics.median(memory[sixth : 2 * sixth] or memory), statistics.median(memory[-sixth:])
        print(f"memory: {early:.0f} MiB after the first sixth, {late:.0f} MiB in the last ({late / early - 1:+.1%})")
    missing = load.outcomes["sent: ask"] + load.outcomes["sent: slow"] - load.outcomes["answered"]
    return missing + load.outcomes["rubbish not refused"]


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
        stuck = await rows_left(http)
    print(f"not answered: {missing}, rows stuck: {stuck}")
    return missing or stuck


def main(argv=None):
    parser = make_parser("dev.bench.bench_serve", __doc__)
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:8000")
    add("--clients", type=int, nargs="+", default=[1, 4, 16, 64], help="a line of the table for each number")
    add("--requests", type=int, default=64, help="of all clients together, per line (default 64)")
    add("--max_tokens", type=int, default=64, help="longest answer (default 64)")
    add("--prompt", default="", help='asked every time, e.g. "Tell me a story." (default: questions about the world)')
    add("--api_key", default="", help="if the server wants one")
    add("--timeout", type=float, default=60, help="seconds without a byte after which an answer counts as none")
    add("--soak", type=float, default=0, help="minutes to misbehave instead")
    add("--pid", type=int, help="the server's process, to watch its memory (soak) or time")
    args = parse_args(parser, argv)
    if asyncio.run(drive(args)):
        sys.exit(1)


if __name__ == "__main__":
    run_script(main)
