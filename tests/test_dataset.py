"""Shards: downloads from an unreliable host, the user's own files, the pocket corpus, and errors of readers."""

import hashlib
import http.server
import json
import random
import subprocess

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

from nanochat import dataset
from nanochat.common import UserError
from nanochat.ingest import download, shards
from nanochat.ingest.documents import read_documents, text_documents


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
    with pytest.raises(UserError, match="cannot reach .*--pocket"):
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


def test_small_corpus_has_a_minimum_of_validation_documents(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in make_documents(40)))
    dataset.main(["--from-files", str(tmp_path / "a.jsonl")])
    assert len(all_documents("val")) == shards.MIN_VAL_DOCS and len(all_documents("train")) == 32
    (tmp_path / "one.txt").write_text("one document")
    with pytest.raises(UserError, match="too little text"):
        dataset.main(["--from-files", str(tmp_path / "one.txt"), "--overwrite"])
    with pytest.raises(UserError, match="no finished shards"):
        dataset.list_parquet_files()


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
        ("a.txt", b"caf\xe9", "cannot be read as txt .*utf-8"),
        ("a.parquet", b"PAR1 no", "cannot be read as parquet"),
        ("a.docx", b"", "no txt, md, jsonl or parquet"),
    ],
)
def test_error_names_the_unreadable_file(tmp_path, data_dir, name, content, message):
    (tmp_path / name).write_bytes(content)
    with raises_user_error(message):
        dataset.main(["--from-files", str(tmp_path / name)])
    assert not list(data_dir.glob("*.parquet"))


def test_error_for_a_parquet_file_without_text_column_lists_its_columns(tmp_path):
    pq.write_table(pa.table({"content": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="no column `text`, only content"):
        list(read_documents(tmp_path / "a.parquet"))


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
    assert len(list(data_dir.glob("*.parquet"))) == 2
    with pytest.raises(UserError, match="no finished shards"):
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
