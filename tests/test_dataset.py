"""Shards: downloads from an unreliable host, the user's own files, the pocket corpus, and errors of readers."""

import codecs
import gzip
import hashlib
import http.server
import importlib
import json
import os
import random
import shutil
import subprocess
from pathlib import Path

import filelock
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import (
    MIRROR,
    ROOT,
    WORDS,
    QuietHandler,
    environment,
    needs_mirror,
    python_command,
    raises_user_error,
    run_python,
    serve_http,
)

from nanochat import cli, dataset
from nanochat.common import UserError
from nanochat.ingest import download, shards
from nanochat.ingest.documents import MIN_VAL_DOCS, labeled_documents, text_documents


@pytest.fixture(autouse=True)
def data_dir(empty_base, monkeypatch):
    """Folder of the shards; it does not exist yet."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # retries do not wait
    return empty_base / "base_data"


def make_documents(count, seed=0):
    """`count` different documents of 30 random words and a number."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=30)) + f" {i}" for i in range(count)]


class FileHandler(QuietHandler):
    """
    Serves the folder server.root and records requests in server.requests as (method, file name, Range header).
    server.faults[file name] lists the faults of the next requests: an HTTP status, "close" (no response), "truncate"
    (half of the file) or "truncate chunk" (part of a chunked response).
    """

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        name = self.path.rsplit("/", 1)[-1]
        self.server.requests.append((self.command, name, self.headers.get("Range")))
        faults = self.server.faults.get(name)
        fault = faults.pop(0) if faults else None
        path = self.server.root / self.path.lstrip("/")
        if fault == "close":
            return self.connection.close()
        if not path.exists() or isinstance(fault, int):
            return self.send_error(fault or 404)
        data, start = path.read_bytes(), 0
        if self.headers.get("Range"):
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        self.send_response(206 if start else 200)
        if fault == "truncate chunk":
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            return self.wfile.write(b"ffff\r\n" + data[start : start + 100])
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if body:
            self.wfile.write(data[start : len(data) // 2 if fault == "truncate" else None])


@pytest.fixture
def host(tmp_path, monkeypatch):
    """An HTTP host with five shards of the public corpus in host.folder; see FileHandler for its faults."""
    with serve_http(FileHandler) as host:
        host.root, host.faults, host.requests = tmp_path / "www", {}, []
        host.folder = host.root / download.PUBLIC / "resolve" / "main"
        for i in range(5):
            shards.write_shard(host.folder / f"shard_{i:05d}.parquet", make_documents(1500, seed=i))
        monkeypatch.setenv("NANOCHAT_HUB_URL", host.url)
        yield host


def downloads(host):
    """(file name, Range header) of each GET request."""
    return [(name, byte_range) for method, name, byte_range in host.requests if method == "GET"]


def shard_numbers(paths):
    return [path.name[6:11] for path in paths]


def test_download_retries_after_truncated_responses_and_server_errors(host, data_dir):
    host.faults = {
        "shard_01822.parquet": [503],
        "shard_00001.parquet": [500, 429],
        "shard_00002.parquet": ["close", "truncate chunk"],
    }
    assert download.find_last_shard() == 4
    host.faults["shard_00000.parquet"] = ["truncate"]
    dataset.main(["-n", "3", "-w", "2"])
    assert shard_numbers(dataset.list_parquet_files()) == ["00000", "00001", "00002", "00004"]
    for path in dataset.list_parquet_files():
        assert path.read_bytes() == (host.folder / path.name).read_bytes()
    half = (host.folder / "shard_00000.parquet").stat().st_size // 2
    assert ("shard_00000.parquet", f"bytes={half}-") in downloads(host)
    manifest = json.loads((data_dir / "manifest.json").read_text(encoding="utf-8"))["shards"]
    assert {n: s["sha256"] for n, s in manifest.items()} == {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in dataset.list_parquet_files()
    }
    assert not [p for p in data_dir.iterdir() if p.suffix in (".part", ".tmp")]


def test_last_shard_of_the_host_is_validation_for_any_number_of_shards(host, monkeypatch):
    dataset.main(["-n", "2"])
    assert shard_numbers(dataset.shard_files("train")) == ["00000", "00001"]
    assert shard_numbers(dataset.shard_files("val")) == ["00004"]
    dataset.main(["-n", "100"])
    assert shard_numbers(dataset.shard_files("train")) == ["00000", "00001", "00002", "00003"]
    assert shard_numbers(dataset.shard_files("val")) == ["00004"]
    monkeypatch.setattr(download, "LAST_SHARD", 4)  # a host with the full corpus needs one request
    host.requests.clear()
    assert download.find_last_shard() == 4 and len(host.requests) == 1


def test_mirror_can_be_a_local_folder(host, monkeypatch):
    monkeypatch.setenv("NANOCHAT_HUB_URL", str(host.root))
    dataset.main(["-n", "1"])
    assert shard_numbers(dataset.list_parquet_files()) == ["00000", "00004"] and not host.requests


def test_only_missing_or_truncated_shards_are_downloaded(host, data_dir):
    dataset.main(["-n", "3"])
    host.requests.clear()
    dataset.main(["-n", "3"])
    assert not host.requests
    truncated = data_dir / "shard_00001.parquet"
    truncated.write_bytes(truncated.read_bytes()[:1000])
    with pytest.raises(UserError, match="shard_00001.parquet"):
        dataset.shard_files("train")
    dataset.main(["-n", "3"])
    assert downloads(host) == [("shard_00001.parquet", None)]
    assert truncated.read_bytes() == (host.folder / truncated.name).read_bytes()


def test_failed_download_names_the_shards_and_is_not_readable(host, data_dir):
    (host.folder / "shard_00001.parquet").write_bytes(b"not parquet")
    host.faults["shard_00002.parquet"] = ["truncate"] * 5
    with raises_user_error("2 of 4 shards are missing") as error:
        dataset.main(["-n", "3"])
    assert "shard_00001.parquet is damaged" in str(error.value) and "cannot fetch" in str(error.value)
    with pytest.raises(UserError, match="no finished shards"):
        dataset.list_parquet_files()
    shards.write_shard(host.folder / "shard_00001.parquet", make_documents(1500))
    host.faults.clear()
    host.requests.clear()
    dataset.main(["-n", "3"])
    assert len(dataset.list_parquet_files()) == 4
    half = (host.folder / "shard_00002.parquet").stat().st_size // 2
    assert sorted(downloads(host)) == [("shard_00001.parquet", None), ("shard_00002.parquet", f"bytes={half}-")]


def test_readers_see_new_shards_only_after_all_are_downloaded(host, data_dir):
    dataset.main(["-n", "1"])
    (host.folder / "shard_00002.parquet").write_bytes(b"not parquet")
    with pytest.raises(UserError):
        dataset.main(["-n", "4"])
    assert (data_dir / "shard_00003.parquet").exists()
    assert shard_numbers(dataset.list_parquet_files()) == ["00000", "00004"]


def test_unreachable_host_raises_user_error(host):
    host.shutdown()
    host.server_close()
    with pytest.raises(UserError, match="cannot fetch .*--pocket"):
        dataset.main(["-n", "1"])


def test_verify_detects_a_flipped_byte(host, data_dir):
    dataset.main(["-n", "2"])
    dataset.main(["--verify"])
    path = data_dir / "shard_00001.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="shard_00001.parquet"):
        dataset.main(["--verify"])


def test_shards_have_the_format_of_the_public_corpus(tmp_path):
    documents = make_documents(3000)
    parts = list(shards.cut_shards(documents, shard_chars=sum(map(len, documents[:1500]))))
    assert [len(part) for part in parts] == [2048, 952]  # 1,500 documents, rounded up to a whole row group
    assert sum(parts, []) == documents
    shards.write_shard(tmp_path / "a.parquet", parts[0])
    file = pq.ParquetFile(tmp_path / "a.parquet")
    column = file.metadata.row_group(0).column(0)
    assert file.num_row_groups == 2 and file.metadata.row_group(1).num_rows == 1024
    assert (column.compression, column.has_dictionary_page, column.is_stats_set) == ("ZSTD", False, False)
    assert dataset.read_row_group(tmp_path / "a.parquet", 1) == documents[1024:2048]


def test_row_groups_are_numbered_over_all_shards(host):
    dataset.main(["-n", "2"])
    groups = dataset.row_groups("train")
    assert [(path.name[6:11], i, rows) for path, i, rows in groups] == [
        *(("00000", 0, 1024), ("00000", 1, 476)),
        *(("00001", 0, 1024), ("00001", 1, 476)),
    ]
    strided = list(dataset.parquets_iter_batched("train", start=1, step=2))
    assert strided == [dataset.read_row_group(path, i) for path, i, _ in groups[1::2]]


def all_documents(split):
    return [text for batch in dataset.parquets_iter_batched(split) for text in batch]


def test_own_files_of_every_format_become_shards(tmp_path):
    source = tmp_path / "own"
    (source / "sub").mkdir(parents=True)
    (source / "a.txt").write_text("\ufeffplain text\n", encoding="utf-8")
    (source / "sub" / "b.MD").write_text("# märkdown\n", encoding="utf-8")
    (source / "c.jsonl").write_text(
        '{"text": "line one"}\n\n{"text": "half \\ud800 pair", "id": 2}\n', encoding="utf-8"
    )
    pq.write_table(pa.table({"text": ["from parquet", None], "x": [1, 2]}), source / "d.parquet")
    (source / "ignored.py").write_text("no", encoding="utf-8")
    (source / "e.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in make_documents(500) * 2))
    dataset.main(["--from-files", str(source), "--val-share", "0.1"])
    train, val = all_documents("train"), all_documents("val")
    expected = ["plain text\n", "# märkdown\n", "line one", "half ? pair", "from parquet", *make_documents(500) * 2]
    assert sorted(train + val) == sorted(expected)
    assert not set(train) & set(val)  # each document of e.jsonl occurs twice, in one split
    assert 50 <= len(val) <= 150
    assert train != [text for text in expected if text in set(train)]  # shuffled
    second = tmp_path / "second"
    dataset.main(["--from-files", str(source), "--val-share", "0.1", f"--data-dir={second}"])
    assert (second / "shard_00000.parquet").read_bytes() == dataset.shard_files("train")[0].read_bytes()


def write_jsonl(path, texts, field="text"):
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))
    return path


def split_of_files(*paths, val_share=0.01):
    """(training documents, validation documents) of own files."""
    labeled = list(labeled_documents(paths, val_share, seed=42))
    return tuple([text for is_val, text in labeled if is_val == split] for split in (False, True))


def test_validation_of_a_small_corpus_has_a_minimum_of_documents_within_5_percent(tmp_path):
    for count, val_count in ((400, MIN_VAL_DOCS), (40, 2), (19, 1), (2, 1)):
        documents = make_documents(count)
        train, val = split_of_files(write_jsonl(tmp_path / "a.jsonl", documents))
        assert sorted(train + val) == sorted(documents) and len(val) == val_count
        assert val_count == 1 or sum(map(len, val)) <= 0.05 * sum(map(len, documents))


def test_validation_of_a_book_is_at_most_5_percent_and_is_printed(tmp_path, capsys):
    paragraphs = "\n\n".join(make_documents(2000))
    (tmp_path / "book.txt").write_text(paragraphs)
    dataset.main(["--from-files", str(tmp_path / "book.txt")])
    n_train, n_val = (sum(map(len, all_documents(split))) for split in ("train", "val"))
    assert n_train + n_val == len(paragraphs) and 0 < n_val <= 0.05 * len(paragraphs)
    n_docs = len(all_documents("val"))
    share = 100 * n_val / len(paragraphs)
    assert f"validation: {n_docs} documents, {n_val:,} characters ({share:.1f} %)" in capsys.readouterr().out


@pytest.mark.parametrize("val_share", [0.01, 0.4])
def test_equal_documents_are_in_one_split(tmp_path, val_share):
    """Also where the minimum chooses the validation documents, and where only white space at the ends differs."""
    documents = make_documents(12)
    files = [write_jsonl(tmp_path / "a.jsonl", documents * 2)]
    files.append(write_jsonl(tmp_path / "b.jsonl", [f"{document}\n" for document in documents]))
    for number, document in enumerate(documents):
        files.append(tmp_path / f"{number}.txt")
        files[-1].write_text(document)
    train, val = split_of_files(*files, val_share=val_share)
    assert len(train + val) == 48 and len(val) == (4 if val_share == 0.01 else 16)
    assert not {text.strip() for text in train} & {text.strip() for text in val}
    reverse = split_of_files(*files[::-1], val_share=val_share)
    assert [sorted(texts) for texts in reverse] == [sorted(train), sorted(val)]


@pytest.mark.parametrize(
    "lines, message",
    [
        ([], "no text;"),
        (["a"], "one document only;.* store it as txt"),
        (["a", " a", "a\n"], "all 3 documents are equal;"),
    ],
)
def test_too_little_text_is_an_error_that_says_why(tmp_path, lines, message):
    with raises_user_error(message):
        dataset.main(["--from-files", str(write_jsonl(tmp_path / "a.jsonl", lines)), "--overwrite"])
    with pytest.raises(UserError, match="no shards"):
        dataset.list_parquet_files()


def test_hidden_files_are_skipped_and_other_files_are_counted(tmp_path, capsys):
    source = tmp_path / "own"
    for name in ("a.txt", "sub/b.md", "sub/.hidden.txt", "._a.txt", ".ipynb_checkpoints/a.txt", "__MACOSX/a.txt"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(f"text of {name}")
    for name in ("1.json", "2.JSON", "3.json", "table.csv", "archive.tar.gz", "LICENSE", "sub/.hidden.json"):
        (source / name).write_text("not read")
    (source / "again.txt").symlink_to(source / "a.txt")
    (source / "up").symlink_to(source)
    os.mkfifo(source / "pipe.txt")
    dataset.main(["--from-files", str(source), str(source / "sub"), str(source / "a.txt")])
    assert sorted(all_documents("train") + all_documents("val")) == ["text of a.txt", "text of sub/b.md"]
    line = "left out: 3 .json, 2 linked folder or device, 1 without a suffix, 1 .tar.gz, 1 .csv"
    (printed,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out: ")]
    assert sorted(printed.removeprefix("left out: ").split(", ")) == sorted(line.removeprefix("left out: ").split(", "))
    named = ["--from-files", str(source / "sub" / ".hidden.txt"), str(source / "a.txt"), "--overwrite"]
    dataset.main(named)  # a hidden file that is named is read
    assert len(all_documents("train") + all_documents("val")) == 2
    for name in ("a.txt", "again.txt", "pipe.txt", "sub/b.md"):
        (source / name).unlink()
    with raises_user_error("no txt, md, jsonl or parquet file at .*own; found only 3 .json, .*1 .csv"):
        dataset.main(["--from-files", str(source)])


def zstd(data):
    return pa.compress(data, codec="zstd", asbytes=True)


@pytest.mark.parametrize("compress, suffix", [(gzip.compress, ".gz"), (zstd, ".zst")])
def test_compressed_files_are_read(tmp_path, compress, suffix):
    documents = make_documents(100)
    plain = write_jsonl(tmp_path / "a.jsonl", documents)
    packed = tmp_path / f"a.jsonl{suffix.upper()}"
    packed.write_bytes(compress(plain.read_bytes()))
    assert split_of_files(packed) == split_of_files(plain)
    pq.write_table(pa.table({"text": documents}), tmp_path / "b.parquet")
    (tmp_path / f"b.parquet{suffix}").write_bytes(compress((tmp_path / "b.parquet").read_bytes()))
    assert split_of_files(tmp_path / f"b.parquet{suffix}") == split_of_files(plain)
    packed.write_bytes(packed.read_bytes()[:-20])
    with raises_user_error(f"a.jsonl{suffix.upper()} cannot be read as jsonl"):
        split_of_files(packed)


@pytest.mark.parametrize("encoding, mark", [("utf-16-le", codecs.BOM_UTF16_LE), ("utf-16-be", codecs.BOM_UTF16_BE)])
def test_utf16_with_a_byte_order_mark_is_read(tmp_path, encoding, mark):
    (tmp_path / "a.txt").write_bytes(mark + "Grüße\r\n“quoted” 🙂\n".encode(encoding))
    assert list(text_documents(tmp_path / "a.txt")) == ["Grüße\n“quoted” 🙂\n"]


TEXT_TYPES = [pa.large_string(), pa.string_view(), pa.binary(), pa.binary_view()]
TEXT_TYPES.append(pa.dictionary(pa.int32(), pa.string()))


@pytest.mark.parametrize("text_type", TEXT_TYPES, ids=str)
def test_every_text_type_is_read_from_own_files_and_as_shards(tmp_path, data_dir, text_type):
    texts = [*make_documents(30), "Grüße", None]
    column = pa.array(texts)
    column = column.dictionary_encode() if pa.types.is_dictionary(text_type) else column.cast(text_type)
    pq.write_table(pa.table({"text": column, "n": range(32)}), tmp_path / "a.parquet")
    assert sorted(sum(split_of_files(tmp_path / "a.parquet"), [])) == sorted(texts[:-1])
    assert dataset.read_row_group(tmp_path / "a.parquet", 0) == [*texts[:-1], ""]
    assert str(dataset.read_column(tmp_path / "a.parquet", 0).type) in ("string", "large_string")


@pytest.mark.parametrize(
    "column, message",
    [
        (pa.array([1, 2]), "column `text` has the type int64, expected text"),
        (pa.array([["a"], ["b"]]), r"has the type list<.*>, expected text"),
        (pa.array([{"a": "b"}]), r"has the type struct<.*>, expected text"),
        (pa.array([b"fine", b"caf\xe9"]), r"is not UTF-8: b'caf\\xe9'"),
    ],
)
def test_other_columns_are_an_error_in_own_files_and_in_shards(tmp_path, column, message):
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    with raises_user_error(message):
        split_of_files(tmp_path / "a.parquet")
    with raises_user_error(message):
        dataset.read_row_group(tmp_path / "a.parquet", 0)


def test_two_columns_of_one_name_are_an_error(tmp_path):
    columns = [pa.array(["a", "b"]), pa.array(["c", "d"])]
    pq.write_table(pa.table(columns, names=["text", "text"]), tmp_path / "a.parquet")
    with raises_user_error("a.parquet has more than one column `text`"):
        split_of_files(tmp_path / "a.parquet")


def test_from_files_can_be_repeated(tmp_path):
    documents = make_documents(30)
    files = [write_jsonl(tmp_path / f"{i}.jsonl", documents[i::2]) for i in range(2)]
    dataset.main(["--from-files", str(files[0]), "--from-files", str(files[1])])
    assert sorted(all_documents("train") + all_documents("val")) == sorted(documents)


def test_files_in_the_folder_of_the_shards_are_refused(data_dir):
    data_dir.mkdir(parents=True)
    (data_dir / "a.txt").write_text("\n\n".join(make_documents(30)))
    for path in (data_dir, data_dir / "a.txt"):
        with raises_user_error("is in the folder of the shards; choose another --data_dir"):
            dataset.main(["--from-files", str(path)])
    dataset.main(["--from-files", str(data_dir), f"--data-dir={data_dir / 'shards'}"])


def test_shards_of_a_folder_without_manifest(tmp_path):
    """Suffixes in any case; subfolders are skipped, whatever their name, also when the set is replaced."""
    for name in ("a.PARQUET", "b.parquet"):
        pq.write_table(pa.table({"text": [name]}), tmp_path / name)
    (tmp_path / "c.parquet").mkdir()  # Spark writes folders with such names
    assert [path.name for path in dataset.list_parquet_files(tmp_path)] == ["a.PARQUET", "b.parquet"]
    dataset.main(["--pocket", "--chars=20000", "--overwrite", f"--data-dir={tmp_path}"])
    assert sorted(path.name for path in tmp_path.glob("[!.]*.*")) == [
        *("c.parquet", "manifest.json", "shard_00000.parquet", "shard_00001.parquet")
    ]


def test_text_column_selects_another_field(tmp_path):
    documents = make_documents(30)
    files = [write_jsonl(tmp_path / "a.jsonl", [*documents[:15], None], field="body"), tmp_path / "b.parquet"]
    pq.write_table(pa.table({"title": documents, "body": [*documents[15:], *[None] * 15]}), files[1])
    for path, fields in zip(files, ("body", "title, body"), strict=True):
        with raises_user_error(rf"{path.name}.* {fields}; .*--text_column"):
            dataset.main(["--from-files", str(path)])
    dataset.main(["--from-files", *map(str, files), "--text-column=body"])
    assert sorted(all_documents("train") + all_documents("val")) == sorted(documents)


def test_changed_sources_are_written_anew(tmp_path, data_dir, capsys):
    def run(*paths, flags=()):
        dataset.main(["--from-files", *map(str, paths), *flags])
        return capsys.readouterr().out, sorted(all_documents("train") + all_documents("val"))

    a = write_jsonl(tmp_path / "a.jsonl", make_documents(30))
    assert len(run(a)[1]) == 30
    os.utime(a, (0, 0))
    assert "already holds own files" in run(a)[0]
    a.write_text(a.read_text().replace("cat", "CAT"))  # same size
    os.utime(a, (0, 0))
    printed, texts = run(a)
    assert "changed: a.jsonl; writing the set anew" in printed and "CAT" in "".join(texts)
    b = write_jsonl(tmp_path / "b.jsonl", ["one more"])
    printed, texts = run(a, b)
    assert "changed: b.jsonl" in printed and len(texts) == 31
    with raises_user_error("holds own files .* from .*a.jsonl, .*b.jsonl, not .*--overwrite"):
        run(b)
    with raises_user_error("holds own files .*'seed': 42.*'seed': 1"):
        run(a, b, flags=["--seed=1"])
    b.unlink()
    assert "changed: b.jsonl" in run(a)[0]
    moved = a.rename(tmp_path / "moved.jsonl")
    assert "already holds own files" in run(moved)[0]  # content decides
    before = {path: path.read_bytes() for path in dataset.list_parquet_files()}
    moved.rename(a).write_text("damaged")
    with raises_user_error("a.jsonl:1"):
        run(a)
    assert {path: path.read_bytes() for path in dataset.list_parquet_files()} == before
    with raises_user_error("is in the folder of the shards"):  # the shards themselves are no sources
        run(data_dir)


@pytest.mark.parametrize("kind", ["--pocket", "--from-files"])
def test_set_of_an_older_version_is_written_anew(tmp_path, data_dir, capsys, kind):
    source = write_jsonl(tmp_path / "a.jsonl", make_documents(30))
    command = ["--pocket", "--chars=20000"] if kind == "--pocket" else ["--from-files", str(source)]
    dataset.main(command)
    files = [path.read_bytes() for path in dataset.list_parquet_files()]
    manifest = json.loads((data_dir / "manifest.json").read_text())
    manifest.pop("sources")
    if kind == "--from-files":
        manifest["settings"] = {"files": 1, "bytes": 4000, "val_share": 0.01, "seed": 42}
    (data_dir / "manifest.json").write_text(json.dumps(manifest))
    if kind == "--from-files":
        with raises_user_error("--overwrite"):
            dataset.main(command)
        command += ["--overwrite"]
    dataset.main(command)
    assert kind == "--from-files" or "writing the set anew" in capsys.readouterr().out
    assert [path.read_bytes() for path in dataset.list_parquet_files()] == files
    dataset.main(command[:2])
    assert "already holds" in capsys.readouterr().out


def test_a_small_text_file_is_cut_into_enough_documents(tmp_path):
    (tmp_path / "e.txt").write_text("A short line of text.\n\n" * 150)
    dataset.main(["--from-files", str(tmp_path / "e.txt")])
    n_train, n_val = (sum(map(len, all_documents(split))) for split in ("train", "val"))
    assert n_train > n_val > 0


def test_edited_pocket_world_is_written_anew(monkeypatch, capsys):
    dataset.main(["--pocket", "--chars=20000"])
    original = dataset.file_fingerprint
    edited = {"bytes": 1, "sha256": "that of an edited file"}
    monkeypatch.setattr(
        dataset, "file_fingerprint", lambda path: edited if path.name == "pocket_world.txt" else original(path)
    )
    dataset.main(["--pocket", "--chars=20000"])
    assert "changed: pocket_world.txt; writing the set anew" in capsys.readouterr().out


def test_data_dir_that_is_a_file_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with raises_user_error("cannot write to .*file .*choose another --data_dir"):
        dataset.main(["--pocket", f"--data_dir={tmp_path / 'file'}"])
    with raises_user_error("no shards in .*file"):
        dataset.list_parquet_files(tmp_path / "file")


def test_fingerprint_depends_on_content_only(tmp_path, data_dir):
    prints = set()
    for seed in (0, 1):
        source = write_jsonl(tmp_path / f"{seed}.jsonl", make_documents(30, seed))
        dataset.main(["--from-files", str(source), "--overwrite"])
        copy = shutil.copytree(data_dir, tmp_path / f"copy{seed}")
        assert dataset.fingerprint(copy) == dataset.fingerprint()
        (copy / "manifest.json").unlink()
        (copy / "._shard_00000.parquet").write_bytes(b"Mac OS X")  # hidden, in a folder without a manifest
        assert dataset.fingerprint(copy) == dataset.fingerprint(copy) and len(dataset.list_parquet_files(copy)) == 2
        prints |= {dataset.fingerprint(), dataset.fingerprint(copy)}
    assert len(prints) == 4


PATH_FLAGS = [
    *(("nanochat.dataset", "data_dir"), ("scripts.tok_train", "data_dir"), ("scripts.tok_eval", "data_dir")),
    *(("scripts.base_train", "data_dir"), ("scripts.base_loss", "data_dir"), ("scripts.base_eval", "save_samples")),
    *(("scripts.base_eval", "hf_path"), ("scripts.chat_eval", "save_samples"), ("dev.gen_synthetic_data", "persona")),
    *(("dev.gen_synthetic_data", "out"),),
]


@pytest.mark.parametrize("module, flag", PATH_FLAGS)
def test_flags_with_a_path_expand_the_home_folder(module, flag):
    """The shell leaves the ~ of --flag=~/x as it is."""
    parser, required = importlib.import_module(module).build_parser(), ["-i", "sft"] if "chat_eval" in module else []
    args = cli.parse_args(parser, [*required, f"--{flag}=~/x"])
    assert getattr(args, flag) == str(Path.home() / "x")


@pytest.mark.parametrize("unit", ["word ", "a line\n", "a paragraph\n\n", "öä"])
def test_long_text_is_split_into_documents_without_loss(tmp_path, unit):
    text = unit * 20_000
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    pieces = list(text_documents(tmp_path / "a.txt", size=1000))
    assert "".join(pieces) == text
    assert all(len(piece) <= 3000 for piece in pieces) and len(pieces) > 10
    if unit.endswith("\n\n"):
        assert all(piece.endswith("\n\n") for piece in pieces)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", b'{"text": "fine"}\n{"text": "cut\n', "a.jsonl:2: expected a JSON object"),
        ("a.jsonl", b'{"text": "fine"}\n[1]\n', "a.jsonl:2"),
        ("a.jsonl", b'{"messages": []}\n', "a.jsonl:1"),
        ("a.jsonl", b'{"text": 7}\n', "a.jsonl:1"),
        ("a.txt", b"caf\xe9", "a.txt:1: the byte 0xe9 is not UTF-8; .*iconv -f"),
        ("a.txt", b"a\n" * 9000 + b"caf\xe9", "a.txt:9001: "),
        ("a.jsonl", b'{"text": "caf\xe9"}\n', "a.jsonl:1: the byte 0xe9"),
        ("a.txt", "no mark".encode("utf-16-le"), "a.txt:1: many NUL bytes; .*iconv -f utf-16"),
        ("a.jsonl", b"[" * 200_000, "a.jsonl:1: expected a JSON object"),
        ("a.parquet", b"PAR1 no", "cannot be read as parquet"),
        ("a.docx", b"", "no txt, md, jsonl or parquet"),
    ],
)
def test_error_names_the_unreadable_file(tmp_path, data_dir, name, content, message):
    (tmp_path / name).write_bytes(content)
    with raises_user_error(message):
        dataset.main(["--from-files", str(tmp_path / name)])
    assert not list(data_dir.glob("*.parquet"))


def test_other_shards_are_replaced_only_with_overwrite(host, data_dir, tmp_path):
    dataset.main(["-n", "1"])
    before = {path: path.read_bytes() for path in dataset.list_parquet_files()}
    for other in (["--pocket", "--chars=20000"], ["--from-files", str(ROOT / "tests")]):
        with pytest.raises(UserError, match="holds karpathy|no txt"):
            dataset.main(other)
    assert {path: path.read_bytes() for path in dataset.list_parquet_files()} == before
    (data_dir / "manifest.json").unlink()
    assert len(dataset.list_parquet_files()) == 2  # without a manifest, all parquet files are read
    with pytest.raises(UserError, match="unknown origin"):
        dataset.main(["-n", "1"])
    dataset.main(["--pocket", "--chars=20000", "--overwrite"])
    assert shard_numbers(dataset.list_parquet_files()) == ["00000", "00001"]


def test_interrupted_write_is_not_readable(data_dir):
    def interrupted_documents():
        for number, text in enumerate(make_documents(5000)):
            yield number % 50 == 0, text
            if number == 3000:
                raise KeyboardInterrupt

    arguments = dict(kind="own files", settings={"seed": 1}, shard_chars=1000)
    with pytest.raises(KeyboardInterrupt):
        dataset.write_set(data_dir, documents=interrupted_documents(), **arguments)
    with pytest.raises(UserError, match="no shards"):
        dataset.list_parquet_files()
    documents = [(number % 50 == 0, text) for number, text in enumerate(make_documents(1500))]
    dataset.write_set(data_dir, documents=documents, **arguments)
    assert len(dataset.list_parquet_files()) == 3 and len(all_documents("val")) == 30
    assert sorted(all_documents("train") + all_documents("val")) == sorted(text for _, text in documents)


def test_pocket_shards_are_reproducible_with_disjoint_splits(tmp_path, capsys):
    dataset.main(["--pocket", "--chars=200_000"])
    train, val = all_documents("train"), all_documents("val")
    assert 204_000 <= sum(map(len, train + val)) < 210_000 and 4_000 <= sum(map(len, val)) < 10_000
    assert not set(train) & set(val)
    first = [path.read_bytes() for path in dataset.list_parquet_files()]
    dataset.main(["--pocket", "--chars=200_000"])
    assert "already holds" in capsys.readouterr().out
    dataset.main(["--pocket", "--chars=200_000", f"--data_dir={tmp_path / 'second'}"])
    assert [path.read_bytes() for path in dataset.list_parquet_files(tmp_path / "second")] == first


def test_second_writer_waits_for_the_first(data_dir):
    data_dir.mkdir(parents=True)
    command = python_command("-m", "nanochat.dataset", "--pocket", "--chars=20000")
    with filelock.FileLock(data_dir / ".lock"):
        second = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)
        assert "waiting" in second.stdout.readline()
    assert "validation" in second.communicate(timeout=30)[0] and second.returncode == 0


def test_errors_of_missing_and_damaged_shards_name_the_commands(data_dir):
    with pytest.raises(UserError, match=r"no shards in .*-n 8.*--pocket.*--from_files"):
        dataset.shard_files("train")
    data_dir.mkdir(parents=True)
    shards.write_shard(data_dir / "only.parquet", ["text"])
    with pytest.raises(UserError, match="one shard only"):
        dataset.shard_files("train")
    (data_dir / "shard.parquet").write_bytes((data_dir / "only.parquet").read_bytes()[:-20])
    with raises_user_error(r"shard.parquet is damaged .*delete it and run"):
        dataset.row_groups("val")


@pytest.mark.parametrize("flags", [["-n", "0"], ["-n", "-2"], ["-w", "0"], ["--pocket", "--verify"], ["--pockets"]])
def test_wrong_flags_exit_with_code_2_and_one_line(flags, data_dir):
    done = run_python("-m", "nanochat.dataset", *flags, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")
    assert not list(data_dir.glob("*.parquet"))


@pytest.mark.parametrize("flags", [["--chars=9"], ["--val_share=0.2"], ["--pocket", "--text_column=body"]])
def test_flags_without_their_mode_are_refused(flags, data_dir):
    """They would start the public download."""
    with raises_user_error(f"{flags[-1].partition('=')[0]} needs --"):
        dataset.main(flags)
    assert not data_dir.exists()


class MirrorHandler(QuietHandler, http.server.SimpleHTTPRequestHandler):
    """Serves the local mirror."""

    def __init__(self, *args):
        super().__init__(*args, directory=str(MIRROR))


@needs_mirror
def test_public_shards_from_a_static_server(monkeypatch):
    with serve_http(MirrorHandler) as server:
        monkeypatch.setenv("NANOCHAT_HUB_URL", server.url)
        dataset.main(["-n", "4"])
    assert shard_numbers(dataset.shard_files("train")) == ["00000", "00001", "00002"]
    assert sum(rows for *_, rows in dataset.row_groups("train")) == 5559
    assert len(all_documents("val")) == 1829
