"""
Training text as parquet shards: download the public ones, build them from own files, or write the pocket world.

    python -m nanochat.dataset -n 8                     # 8 public shards (about 100 MB each) and the validation shard
    python -m nanochat.dataset --pocket                 # the embedded world; no network
    python -m nanochat.dataset --from-files books/      # own txt, md, jsonl ("text") and parquet (`text`)
    python -m nanochat.dataset --verify                 # compare every shard with its sha256

Writes base_data/: shards with one column `text`, the last one is validation, and manifest.json. A set counts as a
whole: the manifest is written when all shards are there, and readers see the shards it lists. So a set may grow while
it is read. In a folder without a manifest every parquet file counts. The same command again repairs or goes on.
"""

import bisect
import contextlib
import hashlib
import itertools
import json
import random
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from nanochat.cli import boolean, make_parser, parse_args, run_script
from nanochat.common import UserError, atomic_path, base_dir, fetch, file_fingerprint, mirror_url, print0
from nanochat.ingest.documents import read_documents, source_files

PUBLIC = "karpathy/fineweb-edu-100b-shuffle"
LAST_SHARD = 1822  # of the public set: its pinned validation shard
SHARD_CHARS = 250_000_000  # a shard closes here
ROW_GROUP = 1024  # documents; what a reader decodes at once
MIN_VAL_DOCS = 8  # of a small set of own files, whatever its share
COMMAND = "python -m nanochat.dataset"
AGAIN = f"run `{COMMAND}` with the same flags again"

# ---------------------------------------------------------------------------------------------------------------------
# Reading


def data_folder(data_dir=None):
    return Path(data_dir).expanduser() if data_dir else base_dir() / "base_data"


def list_parquet_files(data_dir=None):
    """All shards in order, the last one is validation. Raises UserError when there are none, or one is cut or gone."""
    folder = data_folder(data_dir)
    manifest = _read_manifest(folder)
    files = [folder / name for name in manifest["shards"]] if manifest else sorted(folder.glob("*.parquet"))
    if not files:
        raise UserError(
            f"no {'finished ' if manifest else ''}shards in {folder}; run `{COMMAND} -n 8` (public text), "
            f"`{COMMAND} --pocket` (no network) or `{COMMAND} --from_files PATH`"
        )
    if manifest and (bad := [path.name for path in files if not _is_whole(path, manifest["shards"])]):
        raise UserError(f"damaged or missing in {folder}: {', '.join(bad)}; {AGAIN}")
    return files


def shard_files(split, data_dir=None):
    """Shards of "train" (all but the last) or "val" (the last). Raises UserError when one is missing or damaged."""
    assert split in ("train", "val"), split
    files = list_parquet_files(data_dir)
    if len(files) < 2:
        raise UserError(f"{files[0].parent} has one shard only; the last one is validation, so training needs another")
    files = files[:-1] if split == "train" else files[-1:]
    for path in files:
        _open(path)
    return files


def corpus_name(data_dir=None):
    """ "pocket" for the pocket world, "public" for any other text; chooses the tasks of the later stages."""
    manifest = _read_manifest(data_folder(data_dir))
    return "pocket" if manifest and manifest["kind"] == "pocket" else "public"


def row_groups(split, data_dir=None):
    """All row groups of a split in order: a list of (path, index in the file, number of documents)."""
    metadata = [(path, _open(path).metadata) for path in shard_files(split, data_dir)]
    return [(path, i, m.row_group(i).num_rows) for path, m in metadata for i in range(m.num_row_groups)]


def read_column(path, index):
    """The documents of one row group: a pyarrow.ChunkedArray of strings. Raises UserError on a damaged file."""
    with _damage_named(path):
        return _open(path).read_row_group(index, columns=["text"]).column(0)


def read_row_group(path, index):
    """The same as a list of str, "" where the text is null."""
    column = read_column(path, index)
    with _damage_named(path):
        return [text or "" for text in column.to_pylist()]


def parquets_iter_batched(split, start=0, step=1, data_dir=None):
    """Yield the documents of row groups start, start + step, ... of a split, a list of str each."""
    for path, index, _ in row_groups(split, data_dir)[start::step]:
        yield read_row_group(path, index)


def _open(path):
    """The ParquetFile at `path`. Its footer stands at the end, so a file that was cut short does not open."""
    import pyarrow.parquet as pq

    with _damage_named(path):
        file = pq.ParquetFile(path)
    if "text" not in file.schema_arrow.names:
        raise UserError(f"{path} has no column `text`, only {', '.join(file.schema_arrow.names)}")
    return file


@contextlib.contextmanager
def _damage_named(path):
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError) as e:
        raise UserError(f"{path} is damaged ({str(e).splitlines()[0].rstrip('.')}); delete it and {AGAIN}") from e


# ---------------------------------------------------------------------------------------------------------------------
# The manifest: {"kind", "settings", "shards": {name: {"bytes", "sha256"}}}; without shards, a set that is being made


def _read_manifest(folder):
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        return {key: manifest[key] for key in ("kind", "settings", "shards")}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path} is damaged ({e!r}); delete it to read the parquet files beside it as they are") from e


def _write_manifest(folder, kind, settings, shards):
    with atomic_path(folder / "manifest.json") as draft:
        manifest = {"kind": kind, "settings": settings, "shards": dict(sorted(shards.items()))}
        draft.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _is_whole(path, shards):
    """Whether the shard is listed and has its listed size; sha256 is left to --verify."""
    return path.name in shards and path.exists() and path.stat().st_size == shards[path.name]["bytes"]


def _claim(folder, kind, settings, overwrite):
    """Take `folder` for one set; returns the shards listed so far. Raises UserError when it holds something else."""
    manifest = None if overwrite else _read_manifest(folder)
    if manifest and (manifest["kind"], manifest["settings"]) == (kind, settings):
        return manifest["shards"]
    present = list(folder.glob("*.parquet"))
    if present and not overwrite and (manifest is None or manifest["shards"]):
        found = f"{manifest['kind']} {manifest['settings']}" if manifest else "parquet files of unknown origin"
        raise UserError(
            f"{folder} holds {found}, not {kind} {settings}; choose another --data_dir, or replace it with --overwrite"
        )
    _write_manifest(folder, kind, settings, {})  # first: killed from here on, nothing looks complete
    for path in [*present, *folder.glob("*.part"), *folder.glob("*.tmp")]:
        path.unlink()
    return {}


def verify(folder):
    """Compare every shard with the manifest; returns how many there are. Raises UserError naming the damaged ones."""
    files, manifest = list_parquet_files(folder), _read_manifest(folder)
    if manifest is None:
        raise UserError(f"{folder} has no manifest.json to compare with")
    if bad := [path.name for path in files if file_fingerprint(path) != manifest["shards"][path.name]]:
        raise UserError(f"damaged in {folder}: {', '.join(bad)}; delete them and {AGAIN}")
    return len(files)


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def cut_shards(documents, shard_chars=SHARD_CHARS):
    """Yield lists of documents: at least `shard_chars` characters in whole row groups; the last list has the rest."""
    shard, chars = [], 0
    for text in documents:
        shard.append(text)
        chars += len(text)
        if chars >= shard_chars and len(shard) % ROW_GROUP == 0:
            yield shard
            shard, chars = [], 0
    if shard:
        yield shard


def write_shard(path, documents):
    """Write a list of str as one shard, which appears whole or not at all; returns its manifest entry."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    plain = dict(use_dictionary=False, write_statistics=False, compression="zstd", compression_level=3)
    with atomic_path(path) as draft:
        pq.write_table(pa.table({"text": pa.array(documents, pa.string())}), draft, row_group_size=ROW_GROUP, **plain)
    return file_fingerprint(path)


def write_set(folder, kind, settings, documents, overwrite=False, shard_chars=SHARD_CHARS):
    """
    Write a set from an iterable of (is_validation, text), unless it is there. In memory: one shard, all of validation.

    Documents are shuffled within a shard by settings["seed"]; over all shards it is the loader that shuffles.
    """
    shards = _claim(folder, kind, settings, overwrite)
    if shards and all(_is_whole(folder / name, shards) for name in shards):
        return print0(f"{folder} already holds {kind}: {len(shards)} shards")
    _write_manifest(folder, kind, settings, {})
    rng, val, shards, chars = random.Random(settings["seed"]), [], {}, 0

    def train():
        for is_val, text in documents:
            if is_val:
                val.append(text)
            else:
                yield text

    for shard in cut_shards(train(), shard_chars):
        rng.shuffle(shard)
        while len(val) < MIN_VAL_DOCS and len(val) + 1 < len(shard):  # a small set, of which the share is next to none
            val.append(shard.pop())
        name = f"shard_{len(shards):05d}.parquet"
        shards[name] = write_shard(folder / name, shard)
        chars += sum(map(len, shard))
        print0(f"{name}: {len(shard):,} documents, {chars:,} characters for training so far")
    if not shards or not val:
        raise UserError(f"too little text for {folder}: training and validation need a document each")
    name = f"shard_{len(shards):05d}.parquet"
    shards[name] = write_shard(folder / name, val)
    for path in set(folder.glob("*.parquet")) - {folder / name for name in shards}:
        path.unlink()  # left by a longer set that was never finished
    _write_manifest(folder, kind, settings, shards)
    print0(f"{name}: {len(val):,} documents, {sum(map(len, val)):,} characters for validation; all in {folder}")


def write_pocket(folder, chars, seed, overwrite=False):
    """The embedded world as shards: `chars` characters for training and 2 % as many for validation."""
    from nanochat.pocket.documents import documents

    train, val = documents("train", chars, seed), documents("val", chars // 50, seed)
    labeled_documents = itertools.chain(zip(itertools.repeat(False), train), zip(itertools.repeat(True), val))
    write_set(folder, "pocket", {"chars": chars, "seed": seed}, labeled_documents, overwrite)


def write_files(folder, paths, val_share, seed, overwrite=False):
    """Own files as shards; a document's hash decides where it goes, so that equal ones never meet as train and val."""
    if not 0 < val_share < 1:
        raise UserError(f"--val_share={val_share}: expected a share between 0 and 1, such as 0.01")
    files = source_files(paths)
    settings = {"files": len(files), "bytes": sum(path.stat().st_size for path in files)}

    def is_val(text):
        digest = hashlib.blake2b(text.encode(), digest_size=8, key=b"%d" % seed).digest()
        return int.from_bytes(digest, "big") < val_share * 2**64

    documents = ((is_val(text), text) for path in files for text in read_documents(path))
    write_set(folder, "own files", settings | {"val_share": val_share, "seed": seed}, documents, overwrite)


# ---------------------------------------------------------------------------------------------------------------------
# Downloading


def download(folder, num_files=-1, num_workers=4, overwrite=False):
    """Fetch the first `num_files` public shards (-1 = all) and the last one. Raises UserError naming what failed."""
    if num_workers < 1 or num_files == 0 or num_files < -1:
        raise UserError(f"-n {num_files} -w {num_workers}: expected -n -1 (all) or at least 1, and -w at least 1")
    count = num_files if num_files > 0 else LAST_SHARD + 1
    manifest = None if overwrite else _read_manifest(folder)
    if manifest and manifest["kind"] == PUBLIC and count <= (last := manifest["settings"]["last_shard"]) + 1:
        if all(_is_whole(folder / name, manifest["shards"]) for name in _names(count, last)):
            return print0(f"{folder} already holds these {len(_names(count, last))} shards")  # asks no host
    print0(f"asking {mirror_url('hub')} for its last shard")
    settings = {"last_shard": find_last_shard()}
    shards = _claim(folder, PUBLIC, settings, overwrite)
    names = [n for n in _names(count, settings["last_shard"]) if not _is_whole(folder / n, shards)]
    print0(f"fetching {len(names)} shards to {folder}")
    progress, failed = Progress(len(names)), []
    pool = ThreadPoolExecutor(num_workers)
    jobs = {pool.submit(_get_shard, folder / name, name in shards, progress): name for name in names}
    try:
        for job in as_completed(jobs):
            try:
                shards[jobs[job]] = job.result()
                progress.update(jobs[job], finished=True)
            except (UserError, OSError) as e:
                failed.append(f"{jobs[job]}: {e}")
            if len(failed) > 3:  # the host is gone or the disk is full; the others need not wait for the same
                break
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    if failed:
        raise UserError(
            f"{len(names) - progress.finished} of {len(names)} shards are missing ({'; '.join(failed)}); {AGAIN}"
        )
    _write_manifest(folder, PUBLIC, settings, shards)


def _names(count, last):
    """The last shard, without which the others are no use, then the first `count`."""
    return [f"shard_{index:05d}.parquet" for index in (last, *range(min(count, last)))]


def _url(name):
    return f"{mirror_url('hub')}/{PUBLIC}/resolve/main/{name}"


def find_last_shard():
    """Index of the last shard that the host has: LAST_SHARD, or on a smaller mirror what bisection finds."""
    if not _is_missing(LAST_SHARD):
        return LAST_SHARD
    last = bisect.bisect_left(range(LAST_SHARD), True, key=_is_missing) - 1
    if last < 1:
        raise UserError(
            f"{last + 1} shards at {_url('')}, and training and validation need one each; is the URL right?"
        )
    return last


def _is_missing(index):
    """Whether the host has no shard of this index. Raises UserError when there is no telling."""
    import urllib.request

    url = _url(f"shard_{index:05d}.parquet")
    if "://" not in url:
        return not Path(url).is_file()
    for wait in (2, 4, 8, 16, 0):
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=30).close()
            return False
        except OSError as e:  # HTTPError is one, too
            error, code = e, getattr(e, "code", 500)
            if code == 404:
                return True
            if code < 500 and code != 429:
                break
            time.sleep(wait)
    raise UserError(f"cannot reach {url} ({error}); without a network there is `{COMMAND} --pocket`")


def _get_shard(path, resized, progress):
    """A shard's manifest entry, fetched unless it lies there whole. `resized`: its size is not the listed one."""
    if resized:
        path.unlink(missing_ok=True)
    for _ in range(2):  # what does not open is fetched anew, once: its start may be from another host
        if not path.exists():
            fetch(_url(path.name), path, progress=lambda have, total: progress.update(path.name, have))
        try:
            _open(path)
            return file_fingerprint(path)
        except UserError as e:
            error = e
            path.unlink()
    raise error


class Progress:
    """What all workers fetched so far: one line, redrawn, on a terminal; one line per finished shard elsewhere."""

    def __init__(self, count):
        self.count, self.finished, self.started = count, 0, time.time()
        self.bytes, self.lock = {}, threading.Lock()

    def update(self, name, have=None, finished=False):
        with self.lock:
            self.bytes[name] = have or self.bytes.get(name, 0)
            self.finished += finished
            mb, seconds = sum(self.bytes.values()) / 1e6, time.time() - self.started + 1e-9
            bar = f"[{'#' * (20 * self.finished // self.count):20}] {self.finished}/{self.count} shards"
            if sys.stdout.isatty():
                left = seconds / 60 / self.finished * (self.count - self.finished) if self.finished else float("nan")
                line = f"{bar}, {mb:,.0f} MB at {mb / seconds:.1f} MB/s, {left:.0f} min left"
                print(f"\r{line:78}", end="\n" if self.finished == self.count else "", flush=True)
            elif finished:
                print(f"{bar}: {name}", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def build_parser():
    parser = make_parser("nanochat.dataset", __doc__)
    add, add_mode = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    flag = dict(type=boolean, nargs="?", const=True, default=False)
    add("-n", "--num_files", type=int, default=-1, help="public shards to fetch, beside the last (-1 = all 1,823)")
    add("-w", "--num_workers", type=int, default=4, help="downloads at the same time")
    add_mode("--pocket", **flag, help="write the embedded pocket world instead")
    add("--chars", type=int, default=30_000_000, help="characters of the pocket world for training")
    add_mode("--from_files", nargs="+", metavar="PATH", help="make shards from these files and folders instead")
    add("--val_share", type=float, default=0.01, help="share of the documents of own files that are validation")
    add("--seed", type=int, default=42, help="of the pocket world, and of the order of documents")
    add("--data_dir", help="folder of the shards (default: base_data in NANOCHAT_BASE_DIR)")
    add("--overwrite", **flag, help="replace shards of another kind or with other settings")
    add_mode("--verify", **flag, help="compare the shards with their sha256, change nothing")
    return parser


def main(argv=None):
    args = parse_args(build_parser(), argv)
    folder = data_folder(args.data_dir)
    if args.verify:
        return print0(f"all {verify(folder)} shards in {folder} are as the manifest says")
    with _only_writer(folder):
        if args.pocket:
            write_pocket(folder, args.chars, args.seed, args.overwrite)
        elif args.from_files:
            write_files(folder, args.from_files, args.val_share, args.seed, args.overwrite)
        else:
            download(folder, args.num_files, args.num_workers, args.overwrite)


@contextlib.contextmanager
def _only_writer(folder):
    """Hold the folder's lock, which ends with the process: two downloads would append to the same part of a file."""
    import filelock

    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        print0(f"waiting for another `{COMMAND}` to finish with {folder}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


if __name__ == "__main__":
    run_script(main)
