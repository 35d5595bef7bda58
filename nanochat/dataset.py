"""
Parquet shards of training text: their format, the manifest, and the command that creates them.

    python -m nanochat.dataset -n 8                     # download 8 shards (about 100 MB each) and the validation shard
    python -m nanochat.dataset --pocket                 # generate the pocket corpus; needs no network
    python -m nanochat.dataset --from-files books/      # your txt, md, jsonl and parquet, also as .gz and .zst
    python -m nanochat.dataset --verify                 # compare every shard with its sha256

Writes base_data/: a set of shards with one column `text`, the last of which is the validation split, and manifest.json.
The manifest is written after the shards, and readers open only the shards it lists, so a set can grow while a run reads
it. In a folder without a manifest, all parquet files are shards. Repeating a command resumes or repairs its set, and
makes it anew if what it was made from has changed.
"""

import hashlib
import json
import shutil
from pathlib import Path

from nanochat import cli
from nanochat.common import UserError, base_dir, file_fingerprint, print0, read_errors, require, write_text

COMMAND = "python -m nanochat.dataset"
REPEAT_HINT = f"run `{COMMAND}` with the same flags again"

# ---------------------------------------------------------------------------------------------------------------------
# Reading


def data_folder(data_dir=None):
    return Path(data_dir).expanduser() if data_dir else base_dir() / "base_data"


def list_parquet_files(data_dir=None):
    """Paths of all shards in order; the last is validation. Raises UserError if there are none or one is incomplete."""
    folder = data_folder(data_dir)
    manifest = _read_manifest(folder)
    files = [folder / name for name in manifest["shards"]] if manifest else _parquet_files(folder)
    hint = f"run `{COMMAND} -n 8` (public corpus), `{COMMAND} --pocket` (offline) or `{COMMAND} --from_files PATH`"
    require(files, f"no {'finished ' if manifest else ''}shards in {folder}; {hint}")
    bad = _incomplete(folder, manifest["shards"], manifest["shards"]) if manifest else []
    require(not bad, f"damaged or missing in {folder}: {', '.join(bad)}; {REPEAT_HINT}")
    return files


def _parquet_files(folder):
    """Paths of the parquet files in a folder, without hidden ones (macOS writes ._shard.parquet) and subfolders."""
    return sorted(p for p in folder.glob("[!.]*") if p.suffix.lower() == ".parquet" and not p.is_dir())


def fingerprint(data_dir=None):
    """sha256 (hex) of the shards' names and sha256s; without a manifest, of their names and parquet metadata."""
    files, manifest = list_parquet_files(data_dir), _read_manifest(data_folder(data_dir))
    shards = manifest["shards"] if manifest else [(p.name, _open(p).metadata.to_dict()) for p in files]
    return hashlib.sha256(json.dumps(shards, default=str).encode()).hexdigest()


def shard_files(split, data_dir=None):
    """Paths of the shards of split "train" (all but the last) or "val" (the last)."""
    assert split in ("train", "val"), split
    files = list_parquet_files(data_dir)
    problem = f"{files[0].parent} has one shard only; the last one is validation, so training needs another"
    require(len(files) > 1, problem)
    return files[:-1] if split == "train" else files[-1:]


def corpus_name(data_dir=None):
    """Name of the corpus in a folder: "pocket", or "public" for any other text. Selects the tasks of later stages."""
    manifest = _read_manifest(data_folder(data_dir))
    return "pocket" if manifest and manifest["kind"] == "pocket" else "public"


def row_groups(split, data_dir=None):
    """All row groups of a split in order: [(path, index in the file, number of documents)]. Opens every shard once."""
    metadata = [(path, _open(path).metadata) for path in shard_files(split, data_dir)]
    return [(path, i, m.row_group(i).num_rows) for path, m in metadata for i in range(m.num_row_groups)]


def read_column(path, index):
    """Documents of row group `index`: a pyarrow.ChunkedArray of strings. Raises UserError if the file is damaged."""
    from nanochat.ingest.columns import to_strings

    with _damage_as_user_error(path):
        return to_strings(_open(path).read_row_group(index, columns=["text"]).column(0), path)


def read_row_group(path, index):
    """Documents of row group `index`: a list of str, "" for null. Raises UserError if the file is damaged."""
    with _damage_as_user_error(path):
        return [text or "" for text in read_column(path, index).to_pylist()]


def parquets_iter_batched(split, start=0, step=1, data_dir=None):
    """Yield the documents of row groups start, start + step, ... of a split, one list of str per row group."""
    for path, index, _ in row_groups(split, data_dir)[start::step]:
        yield read_row_group(path, index)


def _open(path):
    """The ParquetFile at `path`. Raises UserError if the file is truncated or has no column `text` of strings."""
    from nanochat.ingest.columns import open_parquet

    with _damage_as_user_error(path):
        return open_parquet(path)


def _damage_as_user_error(path):
    return read_errors(path, "is damaged", f"delete it and {REPEAT_HINT}")


# ---------------------------------------------------------------------------------------------------------------------
# Manifest: {"kind", "settings", "sources", "shards": {name: {"bytes", "sha256"}}}. While a set is being written, shards
# is empty. Sources: {path: {"bytes", "sha256"}}; {} for the public corpus and in older manifests.


def _read_manifest(folder):
    """The manifest of `folder` as a dict, or None if there is none."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        return {key: manifest[key] for key in ("kind", "settings", "shards")} | {"sources": manifest.get("sources", {})}
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path} is unreadable ({e!r}); delete it to read all parquet files of the folder") from e


def _write_manifest(folder, kind, settings, shards, sources=None):
    manifest = {"kind": kind, "settings": settings, "sources": sources or {}, "shards": dict(sorted(shards.items()))}
    write_text(folder / "manifest.json", json.dumps(manifest, indent=1) + "\n")


def _incomplete(folder, names, shards):
    """The `names` not listed in `shards`, or whose file is missing or of another size (verify() checks the sha256)."""
    sizes = {name: entry["bytes"] for name, entry in shards.items()}
    return [name for name in names if not (path := folder / name).exists() or path.stat().st_size != sizes.get(name)]


def _existing_shards(folder, kind, settings, overwrite, sources=None):
    """
    The shards that the manifest of `folder` lists for this set; None if the set is to be written anew.

    Raises UserError if the folder holds a set that may be replaced only with `overwrite`: of another kind, with other
    settings, or from other sources. A newer version of the same sources replaces the older one.
    """
    manifest, new = None if overwrite else _read_manifest(folder), sources or {}
    if manifest and (manifest["kind"], manifest["settings"]) == (kind, settings):
        old = manifest["sources"]
        if not manifest["shards"] or list(old.values()) == list(new.values()):
            return manifest["shards"]
        # Older manifests list no sources.
        if not old or (old.keys() & new.keys() and not any(Path(name).exists() for name in old.keys() - new.keys())):
            changed = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
            return print0(f"changed: {_names(changed)}; writing the set anew")
    if _parquet_files(folder) and not overwrite and (manifest is None or manifest["shards"]):
        content = f"{manifest['kind']} {manifest['settings']}" if manifest else "parquet files of unknown origin"
        content += f" from {_names(manifest['sources'])}" if manifest and manifest["sources"] else ""
        hint = "choose another --data_dir, or replace it with --overwrite"
        raise UserError(f"{folder} holds {content}, not {kind} {settings} from {_names(new)}; {hint}")
    return None


def _names(paths):
    """The file names of at most three of `paths`."""
    names = [Path(path).name for path in paths]
    return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")


def _start_set(folder, kind, settings):
    """Mark the set in `folder` as unfinished, then delete the shards of any other set."""
    _write_manifest(folder, kind, settings, {})  # before deleting: if killed here, the set already counts as unfinished
    for path in (*_parquet_files(folder), *folder.glob("*.part"), *folder.glob("*.tmp")):
        path.unlink()


def verify(folder):
    """Compare every shard with the manifest; returns their number. Raises UserError with the names of damaged ones."""
    files, manifest = list_parquet_files(folder), _read_manifest(folder)
    require(manifest, f"{folder} has no manifest.json to compare with")
    bad = [path.name for path in files if file_fingerprint(path) != manifest["shards"][path.name]]
    require(not bad, f"damaged in {folder}: {', '.join(bad)}; delete them and {REPEAT_HINT}")
    return len(files)


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def write_set(folder, kind, settings, documents, overwrite=False, shard_chars=None, sources=None):
    """
    Write shards and manifest from an iterable of (is_validation, text), unless this set already exists.

    A set that is in `folder` stays until the new one is complete.
    """
    from nanochat.ingest.shards import SHARD_CHARS, write_shards

    shards = _existing_shards(folder, kind, settings, overwrite, sources)
    if shards and not _incomplete(folder, shards, shards):
        return print0(f"{folder} already holds {kind}: {len(shards)} shards")
    draft = folder / ".draft"  # may hold files of a killed process, which are overwritten or deleted
    try:
        shards = write_shards(draft, documents, settings["seed"], shard_chars or SHARD_CHARS)
        _start_set(folder, kind, settings)
        for name in shards:
            (draft / name).replace(folder / name)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    _write_manifest(folder, kind, settings, shards, sources)
    print0(f"all shards are in {folder}")


def write_pocket(folder, chars, seed, overwrite=False):
    """Write the pocket corpus: `chars` characters for training and 2% of that for validation."""
    from nanochat.pocket import documents

    code = sorted(path for path in Path(documents.__file__).parent.iterdir() if path.suffix in (".py", ".txt"))
    sources = {path.name: file_fingerprint(path) for path in code}
    splits = {"train": chars, "val": chars // 50}
    labeled = ((split == "val", text) for split, n in splits.items() for text in documents.documents(split, n, seed))
    write_set(folder, "pocket", {"chars": chars, "seed": seed}, labeled, overwrite, sources=sources)


def write_files(folder, paths, val_share, seed, overwrite=False, text_column="text"):
    """Write a set from the user's own files; a share `val_share` (0 to 1) of the documents is for validation."""
    from nanochat.ingest.documents import labeled_documents, source_files

    require(0 < val_share < 1, f"--val_share={val_share}: expected a share between 0 and 1, such as 0.01")
    files = source_files(paths, exclude=folder.resolve())
    settings = {"val_share": val_share, "seed": seed, "text_column": text_column}
    # Before reading: if a file changes meanwhile, the next run notices it.
    sources = {str(path): file_fingerprint(path) for path in files}
    documents = labeled_documents(files, val_share, seed, text_column)
    write_set(folder, "own files", settings, documents, overwrite, sources=sources)


def download(folder, num_files=-1, num_workers=4, overwrite=False):
    """Download the first `num_files` public shards (-1 = all) and the last. Raises UserError if some are missing."""
    from nanochat.ingest.download import LAST_SHARD, PUBLIC, fetch_shards, find_last_shard, shard_names

    valid = num_workers >= 1 and (num_files >= 1 or num_files == -1)
    require(valid, f"-n {num_files} -w {num_workers}: expected -n -1 (all) or at least 1, and -w at least 1")
    count = num_files if num_files > 0 else LAST_SHARD + 1
    manifest = None if overwrite else _read_manifest(folder)
    if manifest and manifest["kind"] == PUBLIC and count <= (last := manifest["settings"]["last_shard"]) + 1:
        names = shard_names(count, last)
        if not _incomplete(folder, names, manifest["shards"]):
            return print0(f"{folder} already holds these {len(names)} shards")  # also without a network
    settings = {"last_shard": find_last_shard()}
    shards = _existing_shards(folder, PUBLIC, settings, overwrite)
    if shards is None:
        _start_set(folder, PUBLIC, settings)
        shards = {}
    names = _incomplete(folder, shard_names(count, settings["last_shard"]), shards)
    for name in shards.keys() & names:
        # The file has another size than the manifest lists. An unlisted file stays: fetch_shards() checks it.
        (folder / name).unlink(missing_ok=True)
    shards |= fetch_shards(folder, names, _open, num_workers)
    _write_manifest(folder, PUBLIC, settings, shards)


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def build_parser():
    parser = cli.make_parser("nanochat.dataset", __doc__)
    add, add_mode = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    add("-n", "--num_files", type=int, default=-1, help="public shards to download besides the last (-1 = all 1,823)")
    add("-w", "--num_workers", type=int, default=4, help="number of parallel downloads")
    add_mode("--pocket", **cli.FLAG, help="generate the pocket corpus instead")
    add("--chars", type=int, default=30_000_000, help="--pocket: characters of training text")
    paths = dict(type=cli.path, nargs="+", action="extend", metavar="PATH")
    add_mode("--from_files", **paths, help="read these files and folders instead")
    add("--val_share", type=float, default=0.01, help="share of documents for validation (at most 5%% of the text)")
    add("--text_column", default="text", help="--from_files: field of jsonl, column of parquet that holds the text")
    add("--seed", type=int, default=42, help="seed of the pocket corpus and of the order of documents")
    add("--data_dir", type=cli.path, help="folder of the shards (default: base_data in NANOCHAT_BASE_DIR)")
    add("--overwrite", **cli.FLAG, help="replace existing shards that have another origin or other settings")
    add_mode("--verify", **cli.FLAG, help="only compare the shards with their sha256")
    return parser


def main(argv=None):
    args = cli.parse_args(build_parser(), argv)
    for flag, mode in {"chars": "pocket", "val_share": "from_files", "text_column": "from_files"}.items():
        is_default = getattr(args, flag) == build_parser().get_default(flag)
        require(is_default or getattr(args, mode), f"--{flag} needs --{mode}")
    folder = data_folder(args.data_dir)
    if args.verify:
        return print0(f"all {verify(folder)} shards in {folder} match the manifest")
    with _lock(folder):
        if args.pocket:
            write_pocket(folder, args.chars, args.seed, args.overwrite)
        elif args.from_files:
            write_files(folder, args.from_files, args.val_share, args.seed, args.overwrite, args.text_column)
        else:
            download(folder, args.num_files, args.num_workers, args.overwrite)


def _lock(folder):
    """Context manager of the folder's lock: two concurrent downloads would append to the same partial file."""
    import filelock

    lock = filelock.FileLock(folder / ".lock")
    try:
        return lock.acquire(timeout=0)
    except filelock.Timeout:
        print0(f"waiting for another `{COMMAND}` to finish with {folder}")
        return lock.acquire()
    except OSError as e:
        raise UserError(f"cannot write to {folder} ({e.strerror}); choose another --data_dir") from e


if __name__ == "__main__":
    cli.run_script(main)
