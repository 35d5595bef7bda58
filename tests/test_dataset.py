"""Shards: downloads from an unreliable host, own files, the pocket corpus, and the errors that readers get."""

import functools
import hashlib
import http.server
import json
import random
import subprocess
import sys
import threading
from pathlib import Path

import filelock
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat import dataset
from nanochat.common import UserError
from nanochat.ingest import download, shards
from nanochat.ingest.documents import read_documents, text_documents

ROOT = Path(__file__).parents[1]
MIRROR = ROOT.parent / "shared" / "data" / "mirror"


@pytest.fixture(autouse=True)
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # retries do not wait
    return tmp_path / "base" / "base_data"


def make_documents(count, seed=0, words=30):
    rng = random.Random(seed)
    return [
        " ".join(rng.choices("the cat sat on a mat and saw the moon".split(), k=words)) + f" {i}" for i in range(count)
    ]


class Host:
    """Serves a folder. faults[file name] lists faults of the next requests: "cut", "cut chunk", "close" or a status."""

    def __init__(self, root):
        self.root, self.faults, self.requests = root, {}, []
        host = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_HEAD(self):
                self.do_GET(body=False)

            def do_GET(self, body=True):
                name = self.path.rsplit("/", 1)[-1]
                host.requests.append((self.command, name, self.headers.get("Range")))
                fault = host.faults.get(name, [])[:1]
                host.faults[name] = host.faults.get(name, [])[1:]
                path = host.root / self.path.lstrip("/")
                if fault == ["close"]:
                    return self.connection.close()
                if not path.exists() or isinstance((fault or [""])[0], int):
                    return self.send_error(fault[0] if fault else 404)
                data, start = path.read_bytes(), 0
                if self.headers.get("Range"):
                    start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
                self.send_response(206 if start else 200)
                if fault == ["cut chunk"]:
                    self.send_header("Transfer-Encoding", "chunked")
                    self.end_headers()
                    return self.wfile.write(b"ffff\r\n" + data[start : start + 100])
                self.send_header("Content-Length", str(len(data) - start))
                self.end_headers()
                if body:
                    self.wfile.write(data[start : len(data) // 2 if fault == ["cut"] else None])

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=functools.partial(self.server.serve_forever, 0.01), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def gets(self, name=""):
        return [(n, r) for method, n, r in self.requests if method == "GET" and name in n]


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A mirror with five shards."""
    folder = tmp_path / "www" / download.PUBLIC / "resolve" / "main"
    for i in range(5):
        shards.write_shard(folder / f"shard_{i:05d}.parquet", make_documents(1500, seed=i))
    host = Host(tmp_path / "www")
    host.folder = folder
    monkeypatch.setenv("NANOCHAT_HUB_URL", host.url)
    yield host
    host.server.shutdown()
    host.server.server_close()


def names(paths):
    return [path.name[6:11] for path in paths]


def test_download_survives_cut_connections_and_server_errors(host, base):
    host.faults = {
        "shard_01822.parquet": [503],
        "shard_00001.parquet": [500, 429],
        "shard_00002.parquet": ["close", "cut chunk"],
    }
    assert download.find_last_shard() == 4
    host.faults["shard_00000.parquet"] = ["cut"]
    dataset.main(["-n", "3", "-w", "2"])
    assert names(dataset.list_parquet_files()) == ["00000", "00001", "00002", "00004"]
    for path in dataset.list_parquet_files():
        assert path.read_bytes() == (host.folder / path.name).read_bytes()
    half = (host.folder / "shard_00000.parquet").stat().st_size // 2
    assert ("shard_00000.parquet", f"bytes={half}-") in host.gets()
    listed = json.loads((base / "manifest.json").read_text(encoding="utf-8"))["shards"]
    assert {n: s["sha256"] for n, s in listed.items()} == {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in dataset.list_parquet_files()
    }
    assert not [p for p in base.iterdir() if p.suffix in (".part", ".tmp")]


def test_the_hosts_last_shard_is_validation_for_any_number_of_shards(host, monkeypatch):
    dataset.main(["-n", "2"])
    assert names(dataset.shard_files("train")) == ["00000", "00001"]
    assert names(dataset.shard_files("val")) == ["00004"]
    dataset.main(["-n", "100"])
    assert names(dataset.shard_files("train")) == ["00000", "00001", "00002", "00003"]
    assert names(dataset.shard_files("val")) == ["00004"]
    monkeypatch.setattr(download, "LAST_SHARD", 4)  # a host with the full corpus needs one request
    host.requests.clear()
    assert download.find_last_shard() == 4 and len(host.requests) == 1


def test_a_mirror_can_be_a_local_folder(host, monkeypatch):
    monkeypatch.setenv("NANOCHAT_HUB_URL", str(host.root))
    dataset.main(["-n", "1"])
    assert names(dataset.list_parquet_files()) == ["00000", "00004"] and not host.requests


def test_complete_shards_need_no_network_and_truncated_ones_are_downloaded_again(host, base):
    dataset.main(["-n", "3"])
    host.requests.clear()
    dataset.main(["-n", "3"])
    assert not host.requests
    cut = base / "shard_00001.parquet"
    cut.write_bytes(cut.read_bytes()[:1000])
    with pytest.raises(UserError, match="shard_00001.parquet"):
        dataset.shard_files("train")
    dataset.main(["-n", "3"])
    assert host.gets() == [("shard_00001.parquet", None)]
    assert cut.read_bytes() == (host.folder / cut.name).read_bytes()


def test_a_failed_download_names_the_shards_and_leaves_no_finished_set(host, base):
    (host.folder / "shard_00001.parquet").write_bytes(b"not parquet")
    host.faults["shard_00002.parquet"] = ["cut"] * 5
    with pytest.raises(UserError) as error:
        dataset.main(["-n", "3"])
    assert "2 of 4 shards are missing" in str(error.value) and "\n" not in str(error.value)
    assert "shard_00001.parquet is damaged" in str(error.value) and "cannot fetch" in str(error.value)
    with pytest.raises(UserError, match="no finished shards"):
        dataset.list_parquet_files()
    shards.write_shard(host.folder / "shard_00001.parquet", make_documents(1500))
    host.faults.clear()
    host.requests.clear()
    dataset.main(["-n", "3"])
    assert len(dataset.list_parquet_files()) == 4
    half = (host.folder / "shard_00002.parquet").stat().st_size // 2
    assert sorted(host.gets()) == [("shard_00001.parquet", None), ("shard_00002.parquet", f"bytes={half}-")]


def test_readers_see_new_shards_only_after_all_are_downloaded(host, base):
    dataset.main(["-n", "1"])
    (host.folder / "shard_00002.parquet").write_bytes(b"not parquet")
    with pytest.raises(UserError):
        dataset.main(["-n", "4"])
    assert (base / "shard_00003.parquet").exists()
    assert names(dataset.list_parquet_files()) == ["00000", "00004"]


def test_an_unreachable_host_is_a_user_error(monkeypatch, host):
    host.server.shutdown()
    host.server.server_close()
    with pytest.raises(UserError, match="cannot reach .*--pocket"):
        dataset.main(["-n", "1"])


def test_verify_finds_a_flipped_byte(host, base):
    dataset.main(["-n", "2"])
    dataset.main(["--verify"])
    path = base / "shard_00001.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="shard_00001.parquet"):
        dataset.main(["--verify"])


def test_shards_have_the_format_of_the_public_ones(tmp_path):
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


def test_own_files_of_every_kind_become_shards(tmp_path):
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
    assert not set(train) & set(val)  # every line occurs twice, both times in the same split
    assert 50 <= len(val) <= 150
    assert train != [text for text in expected if text in set(train)]  # shuffled
    again = tmp_path / "again"
    dataset.main(["--from-files", str(source), "--val-share", "0.1", f"--data-dir={again}"])
    assert (again / "shard_00000.parquet").read_bytes() == dataset.shard_files("train")[0].read_bytes()


def test_a_small_set_has_a_minimum_of_validation_documents(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in make_documents(40)))
    dataset.main(["--from-files", str(tmp_path / "a.jsonl")])
    assert len(all_documents("val")) == shards.MIN_VAL_DOCS and len(all_documents("train")) == 32
    (tmp_path / "one.txt").write_text("one document")
    with pytest.raises(UserError, match="too little text"):
        dataset.main(["--from-files", str(tmp_path / "one.txt"), "--overwrite"])
    with pytest.raises(UserError, match="no finished shards"):
        dataset.list_parquet_files()


@pytest.mark.parametrize("unit", ["word ", "a line\n", "a paragraph\n\n", "öä"])
def test_text_is_cut_without_loss(tmp_path, unit):
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
def test_unreadable_own_files_are_named_in_the_error(tmp_path, base, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        dataset.main(["--from-files", str(tmp_path / name)])
    assert "\n" not in str(error.value)
    assert not list(base.glob("*.parquet"))


def test_the_error_for_a_parquet_file_without_text_lists_its_columns(tmp_path):
    pq.write_table(pa.table({"content": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="no column `text`, only content"):
        list(read_documents(tmp_path / "a.parquet"))


def test_other_shards_are_replaced_only_with_overwrite(host, base, tmp_path):
    dataset.main(["-n", "1"])
    before = {path: path.read_bytes() for path in dataset.list_parquet_files()}
    for other in (["--pocket", "--chars=20000"], ["--from-files", str(ROOT / "LICENSE").replace("LICENSE", "tests")]):
        with pytest.raises(UserError, match="holds karpathy|no txt"):
            dataset.main(other)
    assert {path: path.read_bytes() for path in dataset.list_parquet_files()} == before
    (base / "manifest.json").unlink()
    assert len(dataset.list_parquet_files()) == 2  # without a manifest, all parquet files
    with pytest.raises(UserError, match="unknown origin"):
        dataset.main(["-n", "1"])
    dataset.main(["--pocket", "--chars=20000", "--overwrite"])
    assert names(dataset.list_parquet_files()) == ["00000", "00001"]


def test_an_interrupted_set_is_not_readable(base):
    def interrupted():
        for number, text in enumerate(make_documents(5000)):
            yield number % 50 == 0, text
            if number == 3000:
                raise KeyboardInterrupt

    arguments = dict(kind="own files", settings={"seed": 1}, shard_chars=1000)
    with pytest.raises(KeyboardInterrupt):
        dataset.write_set(base, documents=interrupted(), **arguments)
    assert len(list(base.glob("*.parquet"))) == 2
    with pytest.raises(UserError, match="no finished shards"):
        dataset.list_parquet_files()
    documents = [(number % 50 == 0, text) for number, text in enumerate(make_documents(1500))]
    dataset.write_set(base, documents=documents, **arguments)
    assert len(dataset.list_parquet_files()) == 3 and len(all_documents("val")) == 30
    assert sorted(all_documents("train") + all_documents("val")) == sorted(text for _, text in documents)


def test_pocket_shards_are_reproducible_and_the_splits_disjoint(tmp_path, capsys):
    dataset.main(["--pocket", "--chars=200_000"])
    train, val = all_documents("train"), all_documents("val")
    assert 204_000 <= sum(map(len, train + val)) < 210_000 and 4_000 <= sum(map(len, val)) < 10_000
    assert not set(train) & set(val)
    first = [path.read_bytes() for path in dataset.list_parquet_files()]
    dataset.main(["--pocket", "--chars=200_000"])
    assert "already holds" in capsys.readouterr().out
    dataset.main(["--pocket", "--chars=200_000", f"--data_dir={tmp_path / 'twin'}"])
    assert [path.read_bytes() for path in dataset.list_parquet_files(tmp_path / "twin")] == first


def test_a_second_writer_waits_for_the_first(base):
    base.mkdir(parents=True)
    command = [sys.executable, "-m", "nanochat.dataset", "--pocket", "--chars=20000"]
    with filelock.FileLock(base / ".lock"):
        second = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert "waiting" in second.stdout.readline()
    assert "validation" in second.communicate(timeout=30)[0] and second.returncode == 0


def test_missing_shards_name_the_commands(base):
    with pytest.raises(UserError, match=r"no shards in .*-n 8.*--pocket.*--from_files"):
        dataset.shard_files("train")
    base.mkdir(parents=True)
    shards.write_shard(base / "only.parquet", ["text"])
    with pytest.raises(UserError, match="one shard only"):
        dataset.shard_files("train")
    (base / "shard.parquet").write_bytes((base / "only.parquet").read_bytes()[:-20])
    with pytest.raises(UserError, match=r"shard.parquet is damaged .*delete it and run") as error:
        dataset.row_groups("val")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("flags", [["-n", "0"], ["-n", "-2"], ["-w", "0"], ["--pocket", "--verify"], ["--pockets"]])
def test_wrong_flags_exit_with_2_and_one_line(flags, base):
    command = [sys.executable, "-m", "nanochat.dataset", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")
    assert not list(base.glob("*.parquet"))


@pytest.mark.skipif(not MIRROR.exists(), reason="no data mirror beside this repository")
def test_real_shards_from_a_static_server(monkeypatch):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(MIRROR))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=functools.partial(server.serve_forever, 0.01), daemon=True).start()
        monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *args: None)
        monkeypatch.setenv("NANOCHAT_HUB_URL", f"http://127.0.0.1:{server.server_port}")
        dataset.main(["-n", "4"])
        server.shutdown()
    assert names(dataset.shard_files("train")) == ["00000", "00001", "00002"]
    assert sum(rows for *_, rows in dataset.row_groups("train")) == 5559
    assert len(all_documents("val")) == 1829
