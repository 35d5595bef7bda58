"""
Our BPE trainer and encoder against the published ones, on the same text, in one run.

    python -m dev.bench.bench_tokenizer                        # 100 million characters of the training shards
    python -m dev.bench.bench_tokenizer --text=my.parquet --vocab_size=32768 --repeats=5

Peers: `rustbpe` from the package registry and HF `tokenizers` for training, tiktoken for encoding. They live in an
environment of their own (--env, made when missing), because the registry's rustbpe has the name of ours. Every
measurement is a fresh process; the programs take turns, so that a noisy machine is as unfair to one as to another.
Prints medians, and checks that all merges and ids agree.
"""

import argparse
import hashlib
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)


# ---------------------------------------------------------------------------------------------------------------------
# One measurement, in a process of its own


def train_ours(texts, vocab_size):
    import rustbpe

    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(iter(texts), vocab_size, pattern=PATTERN)
    return lambda: [token for token, _ in tokenizer.get_mergeable_ranks()]


def train_ours_arrow(column, vocab_size):
    import rustbpe

    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_arrow([column], vocab_size, pattern=PATTERN)
    return lambda: [token for token, _ in tokenizer.get_mergeable_ranks()]


def train_hf(texts, vocab_size):
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(iter(texts), trainer)
    return lambda: None  # breaks ties in another way


TRAINERS = {"ours": train_ours, "ours, from Arrow": train_ours_arrow, "rustbpe": train_ours, "tokenizers": train_hf}


def encode_ours(texts, tokens, threads):
    import rustbpe

    tokenizer = rustbpe.Tokenizer.from_tokens(tokens, PATTERN)
    return lambda: tokenizer.encode_batch(texts, num_threads=threads)


def encode_tiktoken(texts, tokens, threads):
    import tiktoken

    ranks = {token: i for i, token in enumerate(tokens)}
    encoding = tiktoken.Encoding("bench", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    return lambda: encoding.encode_ordinary_batch(texts, num_threads=threads)


ENCODERS = {"ours": encode_ours, "tiktoken": encode_tiktoken}


def measure(job):
    """Does `job`, and prints a line of JSON: seconds, CPU seconds, MiB over the start, and a hash of what came out."""
    import pyarrow.parquet as pq

    column = pq.read_table(job["text"], columns=["text"]).column("text").combine_chunks()
    texts = column if job["name"] == "ours, from Arrow" else column.to_pylist()
    if job["what"] == "train":
        before, start = begin(), time.perf_counter()
        tokens = TRAINERS[job["name"]](texts, job["vocab_size"])
        seconds, after = time.perf_counter() - start, end()
        result = tokens() and [token.hex() for token in tokens()]
    else:
        tokens = [bytes.fromhex(token) for token in json.loads(Path(job["tokens"]).read_text())]
        encode = ENCODERS[job["name"]](texts, tokens, job["threads"])
        encode()  # once before, so that caches and threads are there
        before, start = begin(), time.perf_counter()
        ids = encode()
        seconds, after = time.perf_counter() - start, end()
        result = hashlib.sha256(json.dumps(ids).encode()).hexdigest()
    cpu, memory = (b - a for a, b in zip(before, after, strict=True))
    print(json.dumps({"seconds": seconds, "cpu": cpu, "mib": memory, "result": result}))


def begin():
    """CPU seconds so far, and the memory in use in MiB; what was used before is forgotten (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    return end()


def end():
    """CPU seconds so far, and the most memory in MiB since begin()."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    (peak,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return usage.ru_utime + usage.ru_stime, int(peak.split()[1]) / 2**10


# ---------------------------------------------------------------------------------------------------------------------
# All of them


def peer_python(env):
    """The interpreter of the peers' environment, which is made when it is missing."""
    python = env / "bin" / "python"
    if not python.exists():
        print(f"setting up {env} with the published packages", flush=True)
        subprocess.run([sys.executable, "-m", "venv", env], check=True)
        packages = ["rustbpe", "tokenizers", "tiktoken", "pyarrow"]
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    return python


def run(python, job):
    """What measure() prints, in a fresh process."""
    done = subprocess.run([python, __file__, json.dumps(job)], stdout=subprocess.PIPE, text=True, cwd=Path.home())
    if done.returncode:
        sys.exit(f"{job['name']} failed, see above")
    return json.loads(done.stdout.splitlines()[-1])


def compare(title, runs, size, repeats):
    """Runs {name: thunk} in turns, prints a table against the first name, and returns {name: result}."""
    taken = {name: [] for name in runs}
    for _ in range(repeats):
        for name, thunk in runs.items():
            taken[name].append(thunk())
    print(f"\n{title}\n\n| | seconds | MB/s | CPU seconds | MiB over start | ours is faster by |")
    print("|---|---|---|---|---|---|")
    median = {n: {k: statistics.median(t[k] for t in ts) for k in ("seconds", "cpu", "mib")} for n, ts in taken.items()}
    base = next(iter(median.values()))["seconds"]
    for name, m in median.items():
        seconds, speed = m["seconds"], size / 1e6 / m["seconds"]
        print(f"| {name} | {seconds:.2f} | {speed:.1f} | {m['cpu']:.2f} | {m['mib']:.0f} | {seconds / base:.2f} |")
    sys.stdout.flush()
    return {name: ts[0]["result"] for name, ts in taken.items()}


def write_text(args, path):
    """Puts the text into one parquet file; returns its size in bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def texts():
        if args.text:
            for source in args.text:
                if source.suffix == ".parquet":
                    yield from pq.read_table(source, columns=["text"]).column("text").to_pylist()
                else:
                    yield from source.read_text(encoding="utf-8").split("\n\n")
        else:
            from nanochat.dataset import parquets_iter_batched

            for batch in parquets_iter_batched("train"):
                yield from batch

    chosen, size = [], 0
    for text in texts():
        chosen.append(text)
        size += len(text.encode())
        if size >= args.bytes:
            break
    pq.write_table(pa.table({"text": pa.array(chosen, pa.large_string())}), path, row_group_size=1024)
    return size


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", help="parquet files with a text column, or plain text files")
    parser.add_argument("--bytes", type=int, default=100_000_000, help="stop reading after so many (default 100 MB)")
    parser.add_argument("--vocab_size", type=int, default=65_536)
    parser.add_argument("--threads", type=int, default=2, help="for encoding (default 2)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--skip", nargs="*", default=[], help="peers to leave out: rustbpe, tokenizers")
    parser.add_argument("--env", type=Path, default=Path.home() / ".cache" / "nanochat-bench")
    args = parser.parse_args()
    for path in args.text or ():
        if not path.is_file():
            parser.error(f"--text={path}: no such file")
    python = peer_python(args.env)
    text, tokens = args.env / "text.parquet", args.env / "tokens.json"
    size = write_text(args, text)

    def job(what, name):
        interpreter = sys.executable if name.startswith("ours") else python
        job = dict(what=what, name=name, text=str(text), tokens=str(tokens))
        return lambda: run(interpreter, job | dict(vocab_size=args.vocab_size, threads=args.threads))

    title = f"Training, {size / 1e6:.0f} MB, vocabulary {args.vocab_size:,}"
    names = [name for name in TRAINERS if name not in args.skip]
    merges = compare(title, {name: job("train", name) for name in names}, size, args.repeats)
    tokens.write_text(json.dumps(merges["ours"]))
    for name in {"ours, from Arrow", "rustbpe"} & {*names}:
        print(f"merges of {name} and ours: {'identical' if merges[name] == merges['ours'] else 'DIFFERENT'}")
    title = f"Encoding, {size / 1e6:.0f} MB, {args.threads} threads"
    ids = compare(title, {name: job("encode", name) for name in ENCODERS}, size, args.repeats)
    print(f"ids of tiktoken and ours: {'identical' if ids['tiktoken'] == ids['ours'] else 'DIFFERENT'}")


if __name__ == "__main__":
    measure(json.loads(sys.argv[1])) if sys.argv[1:] and sys.argv[1].startswith("{") else main()
