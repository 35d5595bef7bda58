"""
Documents from your files: txt, md (split at blank lines), jsonl ("text" of each line), parquet (column `text`).

Each may be compressed (.gz, .zst).
"""

import codecs
import collections
import hashlib
import io
import json
import os
import re
from pathlib import Path

from nanochat.common import UserError, print0, read_errors, require, well_formed
from nanochat.ingest.columns import open_parquet, to_strings
from nanochat.ingest.shards import cut

MIN_DOC_CHARS = 400
DOC_CHARS = 10_000  # text files are split into documents of about this size, the default of tok_train's --doc_cap
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}  # suffix -> pyarrow's name
UNDECODABLE = re.compile("[\udc80-\udcff]")  # how errors="surrogateescape" decodes a byte that is not UTF-8
ICONV = "if it is text, convert it, for example with `iconv -f {} -t utf-8`"
MIN_VAL_DOCS = 8  # number of validation documents that a small set gets, if they are within MAX_VAL_SHARE
MAX_VAL_SHARE = 0.05  # maximum share of validation in all characters, unless the only document in it is longer

# ---------------------------------------------------------------------------------------------------------------------
# Files


def source_files(paths, exclude):
    """
    All readable files among `paths` and in the folders among them, each once, as sorted absolute paths.

    Leaves out hidden files in these folders, and what is in the folder `exclude`. Prints how many files of other kinds
    there are. Raises UserError for a path without any readable file.
    """
    files, left_out = {}, collections.Counter()
    for path in paths:
        require(os.path.exists(path), f"--from_files: no file or folder at {path}")
        inside = os.path.commonpath([exclude, os.path.realpath(path)]) == str(exclude)
        require(not inside, f"--from_files: {path} is in the folder of the shards; choose another --data_dir")
        found, others = {}, collections.Counter()
        for candidate in sorted(_walk(path)) if os.path.isdir(path) else [Path(path)]:
            real = Path(os.path.realpath(candidate))  # unlike resolve(), also of a link to itself
            if exclude in real.parents:
                continue
            if _kind(candidate)[0] and real.is_file():
                found.setdefault(real, candidate.absolute())
            else:
                others[_description(candidate)] += 1
        reason = f"; found only {_listing(others)}" if others else ""
        require(found, f"--from_files: no txt, md, jsonl or parquet file at {path}{reason}")
        files = found | files
        left_out += others
    if left_out:
        print0(f"left out: {_listing(left_out)}")
    return sorted(files.values())


def _walk(folder):
    """Paths of all files in `folder` and its subfolders, and of links to folders, but for what is hidden."""

    def fail(error):
        raise UserError(f"--from_files: cannot read {error.filename} ({error.strerror})") from error

    for parent, folders, names in os.walk(folder, onerror=fail):
        folders[:] = filter(_is_visible, folders)
        links = (name for name in folders if os.path.islink(os.path.join(parent, name)))
        yield from (Path(parent, name) for name in (*links, *filter(_is_visible, names)))


def _is_visible(name):
    return not name.startswith(".") and name != "__MACOSX"  # macOS adds this folder to zip archives


def _kind(path):
    """("jsonl", "gzip") for x.jsonl.gz; ("jsonl", None) for x.jsonl; (None, ...) if the file is of no known kind."""
    compression = COMPRESSIONS.get(path.suffix.lower())
    suffix = (path.with_suffix("") if compression else path).suffix.lower()
    return suffix[1:] if suffix in (".txt", ".md", ".jsonl", ".parquet") else None, compression


def _description(path):
    """For the list of what is left out: the suffix in lower case; both suffixes of a compressed file."""
    if not path.is_file():
        return "linked folder or device"
    return "".join(path.suffixes[-2 if _kind(path)[1] else -1 :]).lower() or "without a suffix"


def _listing(counts):
    """{".csv": 3} as "3 .csv"; the most frequent first."""
    return ", ".join(f"{count:,} {suffix}" for suffix, count in counts.most_common())


# ---------------------------------------------------------------------------------------------------------------------
# Splits


def labeled_documents(files, val_share, seed, column="text"):
    """
    Yield (is_validation, text) for every document of `files`.

    Validation is a share `val_share` of the documents, at least MIN_VAL_DOCS, but at most MAX_VAL_SHARE (`val_share`
    if larger) of all characters, and at least one document. A hash of the text chooses, so the order of the documents
    has no influence, and equal documents are in one split. Keeps all candidates in memory. Raises UserError if there
    are no two different documents.
    """
    # {hash: equal documents}. Chosen: hashes in the first `val_share` of their range. Reserve: the next MIN_VAL_DOCS.
    chosen, reserve = {}, {}
    count = chars = 0
    # A small set is cut into shorter documents, so that there are enough for both splits.
    size = min(DOC_CHARS, max(MIN_DOC_CHARS, sum(os.path.getsize(path) for path in files) // 50))
    for text in (text for path in files for text in read_documents(path, column, size)):
        digest = hashlib.blake2b(text.strip().encode(), digest_size=8, key=b"%d" % seed).digest()
        group = chosen if int.from_bytes(digest, "big") < val_share * 2**64 else reserve
        group.setdefault(digest, []).append(text)
        count, chars = count + 1, chars + len(text)
        if len(reserve) > MIN_VAL_DOCS:
            yield from ((False, text) for text in reserve.pop(max(reserve)))
    groups = dict(sorted((chosen | reserve).items()))
    reason = ("no text", "one document only")[count] if count < 2 else f"all {count} documents are equal"
    hint = "training and validation need at least one each: add more text, or store it as txt, which is split"
    require(len(groups) > 1, f"{reason}; {hint}")
    sizes = {digest: sum(map(len, texts)) for digest, texts in groups.items()}
    val, left = set(), chars * max(val_share, MAX_VAL_SHARE)
    for digest, size in sizes.items():
        if (digest in chosen or len(val) < MIN_VAL_DOCS) and size <= left:
            val.add(digest)
            left -= size
    val = val or {min(sizes, key=sizes.get)}
    yield from ((digest in val, text) for digest, texts in groups.items() for text in texts)


# ---------------------------------------------------------------------------------------------------------------------
# Documents of one file


def read_documents(path, column="text", size=DOC_CHARS):
    """Yield the non-blank documents of one file without loading it whole. Raises UserError if it is unreadable."""
    kind = _kind(path)[0]
    with read_errors(path, f"cannot be read as {kind}"):
        read = {"parquet": parquet_documents, "jsonl": json_documents}.get(kind)
        documents = read(path, column) if read else text_documents(path, size)
        yield from (text for text in documents if text and text.strip())


def _open(path):
    """Binary file with the decompressed content of `path`."""
    import pyarrow as pa

    file, compression = open(path, "rb"), _kind(path)[1]
    return pa.CompressedInputStream(file, compression) if compression else file


def read_lines(path, size=-1):
    """
    Yield (line number, line) of a file in UTF-8, or in UTF-16 with a byte order mark; a line in pieces of `size`.

    Raises UserError with the line of the first byte that is not UTF-8, or if the file is not text.
    """
    encoding = "utf-16" if _open(path).read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
    file, number = io.TextIOWrapper(_open(path), encoding, errors="surrogateescape"), 1
    while line := file.readline(size):
        if byte := UNDECODABLE.search(line):
            place = f"{path}:{number}: the byte 0x{ord(byte[0]) - 0xDC00:x}"
            raise UserError(f"{place} is not UTF-8; {ICONV.format('cp1252')}")
        require(line.count("\0") <= len(line) // 10, f"{path}:{number}: many NUL bytes; {ICONV.format('utf-16')}")
        yield number, line
        number += line.endswith("\n")


def parquet_documents(path, column="text"):
    """Yield one column of a parquet file; None for null."""
    file = io.BytesIO(_open(path).read()) if _kind(path)[1] else _open(path)
    for batch in open_parquet(path, column, file).iter_batches(1024, columns=[column]):
        yield from to_strings(batch.column(0), path).to_pylist()


def json_documents(path, column="text"):
    """Yield a field of every line of a jsonl file; None for null. Raises UserError with the number of a wrong line."""
    for number, line in read_lines(path):
        line = line.strip().lstrip("\ufeff")  # joined files may have a byte order mark in the middle
        try:
            record = json.loads(line) if line else {column: None}
            yield None if record[column] is None else well_formed(record[column])
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as e:
            got = line[:60]
            if isinstance(e, KeyError) and record:
                got = f"the fields {', '.join(record)}; name the one of the text with --text_column"
            raise UserError(f'{path}:{number}: expected a JSON object with a string "{column}", got {got}') from e


def text_documents(path, size=DOC_CHARS):
    """Pieces of a text file. Each ends at the first blank line after `size` characters, or after 2 * `size`."""
    lines = (line for _, line in read_lines(path, size))
    return map("".join, cut(lines, lambda doc, chars: chars >= (2 * size if doc[-1].strip() else size)))
