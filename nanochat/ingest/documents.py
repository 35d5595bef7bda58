"""Documents from your files: txt, md (split at blank lines), jsonl ("text" of each line), parquet (column `text`)."""

import hashlib
import json
from pathlib import Path

from nanochat.common import UserError, well_formed

DOC_CHARS = 10_000  # text files are split into documents of about this size, the default of tok_train's --doc_cap


def source_files(paths):
    """All readable files among `paths`, including those in folders, in a reproducible order."""
    files = []
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"--from_files: no file or folder at {path}")
        candidates = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        readable = [p for p in candidates if p.suffix.lower() in (".txt", ".md", ".jsonl", ".parquet")]
        if not readable:
            raise UserError(f"--from_files: no txt, md, jsonl or parquet file at {path}")
        files += readable
    return files


def labeled_documents(files, val_share, seed):
    """
    Yield (is_validation, text) for every document of `files`.

    The split depends on a hash of the text, so that duplicates never appear in both training and validation.
    """
    for path in files:
        for text in read_documents(path):
            digest = hashlib.blake2b(text.encode(), digest_size=8, key=b"%d" % seed).digest()
            yield int.from_bytes(digest, "big") < val_share * 2**64, text


def read_documents(path):
    """Yield the non-blank documents of one file without loading it whole. Raises UserError if it is unreadable."""
    kind = path.suffix.lower().lstrip(".")
    read = {"parquet": parquet_documents, "jsonl": json_documents}.get(kind, text_documents)
    try:
        yield from (text for text in read(path) if text and text.strip())
    except UserError:
        raise
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read as {kind} ({str(e).splitlines()[0]})") from e


def parquet_documents(path):
    """Yield column `text` of a parquet file."""
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    if "text" not in file.schema_arrow.names:
        raise UserError(f"{path} has no column `text`, only {', '.join(file.schema_arrow.names)}")
    for batch in file.iter_batches(1024, columns=["text"]):
        yield from batch.column(0).to_pylist()


def json_documents(path):
    """Yield the "text" of every line of a jsonl file. Raises UserError with the number of a malformed line."""
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            try:
                if line.strip():
                    yield well_formed(json.loads(line)["text"])
            except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as e:
                expected = 'expected a JSON object with a string "text"'
                raise UserError(f"{path}:{number}: {expected}, got {line.strip()[:60]}") from e


def text_documents(path, size=DOC_CHARS):
    """Yield pieces of a text file. Each ends at the first blank line after `size` characters, or after 2 * `size`."""
    doc, chars = [], 0
    with open(path, encoding="utf-8-sig") as file:
        while line := file.readline(size):
            doc.append(line)
            chars += len(line)
            if chars >= (2 * size if line.strip() else size):
                yield "".join(doc)
                doc, chars = [], 0
    yield "".join(doc)
