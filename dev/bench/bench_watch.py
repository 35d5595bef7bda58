"""
The watch page's figures, in Chromium: drawing time of a long run, delay of new metrics, CPU time of the watcher.

    python -m dev.bench.bench_watch --steps=10000 --seconds=30

Needs playwright and chromium. A writer appends five steps per second to a run of --steps steps while the page is open.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from nanochat.cli import make_parser, parse_args, run_script


def row(step, steps):
    """A line of metrics/base.jsonl."""
    values = {"step": step, "time": time.time(), "loss": 6 / (1 + step) ** 0.3, "grad_norm": 1 / (1 + step % 17)}
    values |= {"lr_mult": 1 - step / steps, "tokens_per_second": 20_000 + step % 100, "mfu": 0.3, "memory_mib": 1400}
    return json.dumps(values | {"dt_ms": 200, "progress": min(1, step / steps)}) + "\n"


def main(argv=None):
    parser = make_parser("dev.bench.bench_watch", __doc__)
    parser.add_argument("--steps", type=int, default=10_000, help="steps of the run at the start")
    parser.add_argument("--seconds", type=int, default=30, help="duration of the measurement of the watcher")
    args = parse_args(parser, argv)
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        report = Path(folder) / "report"
        for kind in ("runs", "metrics"):
            (report / kind).mkdir(parents=True)
        (report / "runs" / "base.json").write_text('{"vocab_size": 65536, "flags": {}}')
        metrics = open(report / "metrics" / "base.jsonl", "a", buffering=1)
        metrics.writelines(row(step, 2 * args.steps) for step in range(args.steps))
        metrics.flush()
        command = [sys.executable, "-m", "nanochat.watch", "--port=0", folder]
        watcher = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            address = watcher.stdout.readline().split()[1].rstrip(";")
            browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = browser.new_page()
            page.goto(address)
            page.wait_for_selector("figure canvas")
            frame = "await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));"  # painted
            script = f"async () => {{ const t = performance.now(); draw(true); {frame} return performance.now() - t; }}"
            times = sorted(page.evaluate(script) for _ in range(20))
            print(f"{args.steps:,} steps drawn anew in {times[10]:.0f} ms (median; slowest {times[-1]:.0f})")
            process, delays, step = psutil.Process(watcher.pid), [], args.steps
            start, cpu = time.perf_counter(), sum(process.cpu_times()[:2])
            while time.perf_counter() - start < args.seconds:
                metrics.write(row(step, 2 * args.steps))
                metrics.flush()
                if step % 10 == 0:
                    written = time.perf_counter()
                    while page.evaluate("runs.get('newest').metrics.base.at(-1).step") < step:
                        time.sleep(0.02)
                    delays.append(time.perf_counter() - written)
                step += 1
                time.sleep(0.2)
            share = (sum(process.cpu_times()[:2]) - cpu) / (time.perf_counter() - start)
            print(f"new metrics are on the page after at most {max(delays):.2f} s")
            print(f"the watcher takes {share:.2%} of a core")
        finally:
            watcher.terminate()


if __name__ == "__main__":
    run_script(main)
