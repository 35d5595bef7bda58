"""
Benchmark our BPE trainer and encoder against published ones on the same text.

    python -m dev.bench.bench_tokenizer                        # 100 million characters of the training shards
    python -m dev.bench.bench_tokenizer --text=my.parquet --vocab_size=32768 --repeats=5
    python -m dev.bench.bench_tokenizer --text=my.parquet --bytes=1000000000 --repeats=1 --skip encoding

Prints three tables: training on texts in memory; training end to end, from parquet files to a tokenizer on disk; and
encoding. End to end, ours is tok_train, and the peers follow the examples in their READMEs, one row group at a time.
The peers are `rustbpe` from PyPI and Hugging Face `tokenizers` for training, and tiktoken for encoding. They are
installed in a separate environment (--env, created if missing), because rustbpe on PyPI has the name of our extension.
Every measurement runs in a new process, and the programs alternate, so that noise affects all of them equally. Prints
medians and checks that merges and ids agree.
"""

import argparse
import base64
import bisect
import functools
import hashlib
import itertools
import json
import os
import resource
import runpy
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


# ---------------------------------------------------------------------------------------------------------------------
# One measurement, in a separate process. A trainer returns a function; calling it gives the tokens (bytes) by rank.


def train_ours(texts, vocab_size, pattern):
    import rustbpe

    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(iter(texts), vocab_size, pattern=pattern)
    return lambda: [token for token, _ in tokenizer.get_mergeable_ranks()]


def train_ours_arrow(column, vocab_size, pattern):
    import rustbpe

    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_arrow([column], vocab_size, pattern=pattern)
    return lambda: [token for token, _ in tokenizer.get_mergeable_ranks()]


def train_hf(texts, vocab_size, pattern):
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(iter(texts), trainer)
    return lambda: None  # not compared, since it breaks ties between pairs differently


TRAINERS = {"ours": train_ours, "ours, from Arrow": train_ours_arrow, "rustbpe": train_ours, "tokenizers": train_hf}


def train_end_to_end(name, base, vocab_size, ranks, pattern, n_special):
    """Train from parquet files and write the file `ranks`, with tok_train or with a peer's documented API."""
    if name == "ours":
        shard_size = (base / "base_data" / "0.parquet").stat().st_size
        sys.argv[1:] = [f"--vocab_size={vocab_size + n_special}", f"--doc_cap={100 * shard_size}"]
        sys.path[0] = str(ROOT)
        runpy.run_module("scripts.tok_train", run_name="__main__")
        return
    import pyarrow.parquet as pq

    file = pq.ParquetFile(base / "base_data" / "0.parquet")
    groups = (file.read_row_group(i, columns=["text"]) for i in range(file.num_row_groups))
    texts = (text for group in groups for text in group.column("text").to_pylist())
    tokens = TRAINERS[name](texts, vocab_size, pattern)()
    lines = [b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens or ())]
    ranks.write_bytes(b"".join(lines))


def encode_ours(texts, tokens, threads, pattern):
    import rustbpe

    tokenizer = rustbpe.Tokenizer.from_tokens(tokens, pattern)
    return lambda: tokenizer.encode_batch(texts, num_threads=threads)


def encode_tiktoken(texts, tokens, threads, pattern):
    import tiktoken

    ranks = {token: i for i, token in enumerate(tokens)}
    encoding = tiktoken.Encoding("bench", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return lambda: encoding.encode_ordinary_batch(texts, num_threads=threads)


ENCODERS = {"ours": encode_ours, "tiktoken": encode_tiktoken}


def measure(job):
    """Run `job` and print a line of JSON: seconds, CPU seconds, peak MiB above the start, and the result."""
    pattern = job["pattern"]
    if job["what"] == "end to end":
        base, ranks = Path(job["base"]), Path(job["ranks"])
        train_end_to_end(job["name"], base, job["vocab_size"], ranks, pattern, job["n_special"])
        print(json.dumps({"mib": resources()[1]}))
        return
    import pyarrow.parquet as pq

    column = pq.read_table(job["text"], columns=["text"]).column("text").combine_chunks()
    texts = column if job["name"] == "ours, from Arrow" else column.to_pylist()
    if job["what"] == "train":
        before, start = reset_resources(), time.perf_counter()
        tokens = TRAINERS[job["name"]](texts, job["vocab_size"], pattern)
        seconds, after = time.perf_counter() - start, resources()
        result = tokens() and [token.hex() for token in tokens()]
    else:
        tokens = [bytes.fromhex(token) for token in json.loads(Path(job["tokens"]).read_text())]
        encode = ENCODERS[job["name"]](texts, tokens, job["threads"], pattern)
        encode()  # warm-up: fills caches and starts threads
        before, start = reset_resources(), time.perf_counter()
        ids = encode()
        seconds, after = time.perf_counter() - start, resources()
        result = hashlib.sha256(json.dumps(ids).encode()).hexdigest()
    cpu, memory = (b - a for a, b in zip(before, after, strict=True))
    print(json.dumps({"seconds": seconds, "cpu": cpu, "mib": memory, "result": result}))


def reset_resources():
    """Reset the peak of the resident memory to its current value (Linux); returns resources()."""
    Path("/proc/self/clear_refs").write_text("5")
    return resources()


def resources():
    """(CPU seconds so far, peak resident memory in MiB since reset_resources())."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    (peak,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return usage.ru_utime + usage.ru_stime, int(peak.split()[1]) / 2**10


# ---------------------------------------------------------------------------------------------------------------------
# The whole benchmark


def peer_python(env):
    """Path of the interpreter of the peers' environment, which is created if missing."""
    python = env / "bin" / "python"
    if not python.exists():
        print(f"setting up {env} with the published packages", flush=True)
        subprocess.run([sys.executable, "-m", "venv", env], check=True)
        packages = ["rustbpe", "tokenizers", "tiktoken", "pyarrow"]
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    return python


def run(python, job):
    """The dict that measure(job) prints, run in a new process."""
    process = subprocess.run([python, __file__, json.dumps(job)], stdout=subprocess.PIPE, text=True, cwd=Path.home())
    if process.returncode:
        sys.exit(f"{job['name']} failed, see above")
    return json.loads(process.stdout.splitlines()[-1])


def run_end_to_end(python, job):
    """Like run(), but with the wall and CPU seconds of the whole process, and as result a hash of the ranks file."""
    cpu, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    measured = run(python, job)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - cpu.ru_utime - cpu.ru_stime
    return measured | dict(seconds=seconds, cpu=cpu, result=hashlib.sha256(Path(job["ranks"]).read_bytes()).hexdigest())


def compare(title, runs, size, repeats, memory="peak MiB above start"):
    """Run the functions of {name: function} in turns and print a table; returns {name: result}."""
    measured = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run_once in runs.items():
            measured[name].append(run_once())
    print(f"\n{title}\n\n| | seconds | MB/s | CPU seconds | {memory} | ours is faster by |")
    print("|---|---|---|---|---|---|")
    keys = ("seconds", "cpu", "mib")
    median = {name: {k: statistics.median(m[k] for m in ms) for k in keys} for name, ms in measured.items()}
    base = next(iter(median.values()))["seconds"]
    for name, m in median.items():
        seconds, speed = m["seconds"], size / 1e6 / m["seconds"]
        print(f"| {name} | {seconds:.2f} | {speed:.1f} | {m['cpu']:.2f} | {m['mib']:.0f} | {seconds / base:.2f} |")
    sys.stdout.flush()
    return {name: ms[0]["result"] for name, ms in measured.items()}


def write_text(args, path):
    """
    Write the text to the parquet file `path`, and a validation shard 1.parquet next to it; returns its size in bytes.

    Holds one row group at a time, because child processes inherit the peak memory of this process.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    def texts():
        if not args.text:
            from nanochat.dataset import parquets_iter_batched

            yield from itertools.chain.from_iterable(parquets_iter_batched("train"))
        for source in args.text or ():
            if source.suffix == ".parquet":
                for batch in pq.ParquetFile(source).iter_batches(1024, columns=["text"]):
                    yield from batch.column("text").to_pylist()
            else:
                yield from source.read_text(encoding="utf-8").split("\n\n")

    path.parent.mkdir(parents=True, exist_ok=True)
    remaining, size, schema = texts(), 0, pa.schema({"text": pa.large_string()})
    with pq.ParquetWriter(path, schema) as file:
        while size < args.bytes and (group := list(itertools.islice(remaining, 1024))):
            ends = list(itertools.accumulate((len(text.encode()) for text in group), initial=size))
            group = group[: bisect.bisect_left(ends, args.bytes)]
            file.write_table(pa.table({"text": group}, schema))
            size = ends[len(group)]
    pq.write_table(pa.table({"text": group[:1]}), path.with_name("1.parquet"))
    return size


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", help="parquet files with a text column, or plain text files")
    parser.add_argument("--bytes", type=int, default=100_000_000, help="size of the text (default 100 MB)")
    parser.add_argument("--vocab_size", type=int, default=65_536, help="number of tokens (default 65,536)")
    parser.add_argument("--threads", type=int, default=2, help="threads of the encoders (default 2)")
    parser.add_argument("--repeats", type=int, default=3, help="measurements per median (default 3)")
    parser.add_argument("--skip", nargs="*", default=[], help="measurements to skip: rustbpe, tokenizers, encoding")
    parser.add_argument(
        "--env", type=Path, default=Path.home() / ".cache" / "nanochat-bench", help="folder of the peers' environment"
    )
    args = parser.parse_args()
    args.text, args.env = [path.expanduser() for path in args.text or ()], args.env.expanduser()
    for path in args.text:
        if not path.is_file():
            parser.error(f"--text={path}: no such file")
    from nanochat.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN

    python = peer_python(args.env)
    base, tokens = args.env / "base", args.env / "tokens.json"
    text = base / "base_data" / "0.parquet"
    size = write_text(args, text)

    def job(what, name):
        interpreter = sys.executable if name.startswith("ours") else python
        job = dict(what=what, name=name, text=str(text), tokens=str(tokens), pattern=SPLIT_PATTERN)
        return lambda: run(interpreter, job | dict(vocab_size=args.vocab_size, threads=args.threads))

    title = f"Training, {size / 1e6:.0f} MB, vocabulary {args.vocab_size:,}"
    names = [name for name in TRAINERS if name not in args.skip]
    merges = compare(title, {name: job("train", name) for name in names}, size, args.repeats)
    tokens.write_text(json.dumps(merges["ours"]))
    for name in {"ours, from Arrow", "rustbpe"} & {*names}:
        print(f"merges of {name} and ours: {'identical' if merges[name] == merges['ours'] else 'DIFFERENT'}")

    runs = {}
    for name in ["ours", *({"rustbpe", "tokenizers"} - {*args.skip})]:
        ranks = base / "tokenizer" / "ranks.tiktoken" if name == "ours" else args.env / f"{name}.tiktoken"
        n_special = len(SPECIAL_TOKENS)
        work = dict(what="end to end", name=name, base=str(base), ranks=str(ranks), pattern=SPLIT_PATTERN)
        work |= dict(vocab_size=args.vocab_size - n_special, n_special=n_special)
        runs[name] = functools.partial(run_end_to_end, sys.executable if name == "ours" else python, work)
    os.environ["NANOCHAT_BASE_DIR"] = str(base)
    title = f"From parquet to a tokenizer on disk, {size / 1e6:.0f} MB"
    ranks = compare(title, runs, size, args.repeats, memory="peak MiB")
    if "rustbpe" in ranks:
        print(f"ranks of rustbpe and ours: {'identical' if ranks['rustbpe'] == ranks['ours'] else 'DIFFERENT'}")

    if "encoding" not in args.skip:
        title = f"Encoding, {size / 1e6:.0f} MB, {args.threads} threads"
        ids = compare(title, {name: job("encode", name) for name in ENCODERS}, size, args.repeats)
        print(f"ids of tiktoken and ours: {'identical' if ids['tiktoken'] == ids['ours'] else 'DIFFERENT'}")


if __name__ == "__main__":
    measure(json.loads(sys.argv[1])) if sys.argv[1:] and sys.argv[1].startswith("{") else main()
