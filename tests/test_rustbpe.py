"""The Rust trainer and encoder against slow Python, tiktoken and the `regex` module."""

import itertools
import json
import os
import random
import subprocess
import sys
import threading
import unicodedata
from collections import Counter

import pytest
import regex
import rustbpe
import tiktoken
from helpers import MIRROR, ROOT

from nanochat.tokenizer import SPLIT_PATTERN

PUBLIC_SHARDS = MIRROR / "karpathy" / "fineweb-edu-100b-shuffle" / "resolve" / "main"


def train(texts, vocab_size, **options):
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(iter(texts), vocab_size, **options)
    return tokenizer


def merge(tokens, pair):
    """Join every occurrence of `pair` (two bytes objects), from the left."""
    out, i = [], 0
    while i < len(tokens):
        both = tuple(tokens[i : i + 2]) == pair
        out.append(tokens[i] + tokens[i + 1] if both else tokens[i])
        i += 1 + both
    return out


def naive_tokens(texts, vocab_size):
    """The tokens of greedy BPE: all pairs are counted anew for each merge; ties go to the pair of lowest ranks."""
    words = Counter(piece for text in texts for piece in regex.findall(SPLIT_PATTERN, text))
    words = [([bytes([b]) for b in word.encode()], n) for word, n in words.items()]
    ranks = {bytes([b]): b for b in range(256)}
    while len(ranks) < vocab_size:
        counts = Counter()
        for tokens, n in words:
            for pair in zip(tokens, tokens[1:], strict=False):
                counts[pair] += n
        if not counts:
            break
        best = min(counts, key=lambda p: (-counts[p], ranks[p[0]], ranks[p[1]]))
        words = [(merge(tokens, best), n) for tokens, n in words]
        assert best[0] + best[1] not in ranks
        ranks[best[0] + best[1]] = len(ranks)
    return list(ranks)


def tokens_of(tokenizer):
    tokens, ranks = zip(*tokenizer.get_mergeable_ranks(), strict=True)
    assert ranks == tuple(range(len(tokens)))
    return list(tokens)


def strange_text(rng, length):
    """Random characters, with plenty of what the split pattern treats specially, of which all Unicode tables know."""
    kinds = [
        lambda: rng.choice(" \t\n\r\x0b\x0c\x85\xa0\u2028\u3000\u200b"),
        lambda: rng.choice("'''sdmtSDMT\u017f") + rng.choice(["ll", "VE", "re", "x", ""]),
        lambda: rng.choice("0123456789½²٣Ⅷ"),
        lambda: chr(rng.randrange(0x21, 0x7F)),
        lambda: chr(rng.randrange(0x300, 0x370)),
        lambda: chr(rng.randrange(0x80, 0x3000)),
        lambda: chr(rng.randrange(0x80, 0x110000)),
    ]
    text = "".join(rng.choice(kinds)() for _ in range(length))
    return "".join(c for c in text if unicodedata.category(c) not in ("Cn", "Cs"))


def real_texts(limit):
    """`limit` characters of text that people wrote: the mirror's where it exists, else this repository's modules."""
    if PUBLIC_SHARDS.exists():
        import pyarrow.parquet as pq

        documents = pq.read_table(PUBLIC_SHARDS / "shard_00003.parquet").column("text").to_pylist()
    else:
        documents = [path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("nanochat/*.py"))]
    out = []
    for text in itertools.cycle(documents):
        out.append(text[:limit])
        limit -= len(out[-1])
        if limit <= 0:
            return out


@pytest.mark.parametrize("seed", range(12))
def test_merges_equal_the_naive_trainer_on_random_text(seed):
    rng = random.Random(seed)
    letters = ["ab", "aab c", "abc' s12\n", "aéß漢😀 '1s"][seed % 4]
    texts = ["".join(rng.choices(letters, k=rng.randrange(60))) for _ in range(40)]
    assert tokens_of(train(texts, 330, buffer_size=7)) == naive_tokens(texts, 330)


def test_merges_equal_the_naive_trainer_on_real_text():
    texts = real_texts(20_000)
    assert tokens_of(train(texts, 380)) == naive_tokens(texts, 380)


def test_merges_do_not_depend_on_the_number_of_threads(tmp_path):
    path = tmp_path / "text.json"
    path.write_text(json.dumps(real_texts(500_000)), encoding="utf-8")
    code = (
        "import json, rustbpe; t = rustbpe.Tokenizer()\n"
        f"t.train_from_iterator(iter(json.load(open({str(path)!r}, encoding='utf-8'))), 2000, buffer_size=9)\n"
        "print(t.get_mergeable_ranks())"
    )
    outputs = set()
    for threads in ("1", "3"):
        env = os.environ | {"RAYON_NUM_THREADS": threads}
        outputs.add(subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True).stdout)
    assert len(outputs) == 1 and b", 1999)]" in outputs.pop()


def test_ids_equal_tiktoken():
    rng = random.Random(0)
    texts = real_texts(1_000_000)
    tokenizer = train(texts + [strange_text(rng, 300) for _ in range(300)], 8000)
    ranks = dict(tokenizer.get_mergeable_ranks())
    assert len(ranks) == 8000  # no two tokens have the same bytes
    oracle = tiktoken.Encoding("oracle", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})
    runs = ["", " ", "a" * 5000, " " * 5000 + "x", "ab" * 999, "\r\n" * 999, "!" * 999 + "\n\n", "'" * 99, "<|bos|>"]
    for text in texts[:100] + runs + [strange_text(rng, rng.randrange(100)) for _ in range(3000)]:
        ids = tokenizer.encode(text)
        assert ids == oracle.encode_ordinary(text), text
        assert oracle.decode(ids) == text


def naive_dropout(rng, pairs, word, dropout):
    """The tokens of `word` by algorithm 1 of Provilkov et al. (2020). `pairs`: a merge's parts -> rank."""
    tokens = [bytes([b]) for b in word]
    while True:
        ranks = (pairs.get(pair) for pair in zip(tokens, tokens[1:], strict=False))
        kept = [(rank, i) for i, rank in enumerate(ranks) if rank and rng.random() >= dropout]
        if not kept:
            return tuple(tokens)
        _, i = min(kept)
        tokens[i : i + 2] = [tokens[i] + tokens[i + 1]]


@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_dropout_gives_the_tokens_of_the_paper_as_often(dropout):
    rng = random.Random(2)
    tokenizer = train(real_texts(300_000), 2000)
    tokens = [token for token, _ in tokenizer.get_mergeable_ranks()]
    pairs = {}
    for rank, token in enumerate(tokens[256:], 256):
        parts = rustbpe.Tokenizer.from_tokens(tokens[:rank], ".+|\n").encode(token.decode()) if token.isalpha() else ()
        pairs |= {tuple(tokens[i] for i in parts): rank} if len(parts) == 2 else {}
    for word in [token for token in tokens if len(token) > 6 and token.isalpha()][:8]:
        ours, n = Counter(), 3000
        for i in range(n):  # the number changes which merges are left out
            ids = tokenizer.encode(f"{word.decode()}{i}", dropout)
            ends = list(itertools.accumulate(len(tokens[j]) for j in ids))
            ours[tuple(tokens[j] for j in ids[: ends.index(len(word)) + 1])] += 1
        theirs = Counter(naive_dropout(rng, pairs, word, dropout) for _ in range(n))
        distance = sum(abs(ours[t] - theirs[t]) for t in ours | theirs) / (2 * n)  # of the distributions
        again = Counter(naive_dropout(rng, pairs, word, dropout) for _ in range(n))
        noise = sum(abs(again[t] - theirs[t]) for t in again | theirs) / (2 * n)
        assert distance < 0.02 + 1.5 * noise, (word, distance, noise)


def test_dropout_keeps_the_text():
    rng = random.Random(3)
    texts = real_texts(100_000)[:20] + [strange_text(rng, rng.randrange(100)) for _ in range(300)] + ["ab" * 999]
    tokenizer = train(texts, 1000)
    tokens = [token for token, _ in tokenizer.get_mergeable_ranks()]
    rows = {dropout: tokenizer.encode_batch(texts, 2, dropout=dropout) for dropout in (0.0, 0.2, 1.0)}
    assert rows[0.0] == [tokenizer.encode(text) for text in texts]
    assert rows[0.2] == [tokenizer.encode(text, dropout=0.2) for text in texts] != rows[0.0]
    for text, *ids in zip(texts, *rows.values(), strict=True):
        assert all(b"".join(tokens[i] for i in row) == text.encode() for row in ids)
    assert rows[1.0][0] == list(texts[0].encode())


def test_pieces_equal_the_regex_module():
    rng = random.Random(1)
    texts = [strange_text(rng, rng.randrange(60)) for _ in range(3000)]
    # With room for every merge each distinct piece of two bytes or more becomes one token: the ids show the pieces.
    tokenizer = train(texts, 10_000_000)
    tokens = tokens_of(tokenizer)
    for text in texts:
        assert [tokens[i].decode() for i in tokenizer.encode(text)] == regex.findall(SPLIT_PATTERN, text)


def test_the_default_pattern_is_the_projects():
    assert rustbpe.Tokenizer().get_pattern() == SPLIT_PATTERN


def test_another_pattern():
    tokenizer = train(["ab ab"], 300, pattern=r"\w+|\W+")
    assert tokenizer.get_pattern() == r"\w+|\W+"
    assert tokens_of(tokenizer)[256:] == [b"ab"]


def test_an_untrained_tokenizer_knows_the_bytes():
    assert rustbpe.Tokenizer().encode("é!") == [0xC3, 0xA9, 0x21]


def test_training_stops_when_pairs_run_out():
    assert tokens_of(train(["aaaaa"], 1000))[256:] == [b"aa", b"aaa", b"aaaaa"]
    assert tokens_of(train([], 1000))[256:] == []


@pytest.mark.parametrize(
    "texts, vocab_size, options, error, message",
    [
        (["a"], 255, {}, ValueError, "vocab_size=255 is not between 256 and"),
        (["a"], -1, {}, ValueError, "vocab_size=-1 is not between 256 and"),
        (["a"], 300, {"pattern": "(["}, ValueError, "the split pattern is not a valid regular expression"),
        (["a", "\ud800"], 300, {}, ValueError, "surrogates not allowed"),
        (["a", b"a"], 300, {}, TypeError, "bytes"),
        ((1 / 0 for _ in "a"), 300, {}, ZeroDivisionError, "division by zero"),
    ],
)
def test_mistakes_raise_and_leave_the_tokenizer_as_it_was(texts, vocab_size, options, error, message):
    tokenizer = train(["ab ab"], 257)
    with pytest.raises(error, match=message.replace("(", r"\(")):
        tokenizer.train_from_iterator(iter(texts), vocab_size, **options)
    assert tokens_of(tokenizer)[256:] == [b"ab"]


def test_other_threads_run_while_it_counts():
    """The iterator waits for a thread that can only proceed while the interpreter is free."""
    texts, ticks, stop = real_texts(3_000_000), [0], threading.Event()

    def tick():
        while not stop.is_set():
            ticks[0] += 1
            stop.wait(0.001)

    def feed():
        yield from texts
        seen.append(ticks[0])  # all is read: merging happens after this

    seen = []
    thread = threading.Thread(target=tick)
    thread.start()
    train(feed(), 20_000)
    stop.set()
    thread.join()
    assert ticks[0] - seen[0] > 10


def test_progress_is_reported_and_its_errors_end_the_training():
    calls = []
    train(["abc abd"] * 300_000, 258, progress=lambda *news: calls.append(news))
    assert calls[0][0] == "counting" and 1 << 20 <= calls[0][1] < 2 << 20 and calls[0][2] is None
    assert calls[-1] == ("merging", 2, 2)

    def interrupt(phase, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(["abc abd"], 258, progress=interrupt)


# ---------------------------------------------------------------------------------------------------------------------
# Arrow


def arrow_forms(texts):
    """The same texts in all the forms that pyarrow has for them."""
    import pyarrow as pa

    for kind in (pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())):
        array = pa.array(texts, pa.string()).cast(kind) if pa.types.is_string_view(kind) else pa.array(texts, kind)
        yield [array]
        yield [pa.concat_arrays([pa.array(["not this"], kind), array, pa.array(["nor this"], kind)])[1:-1]]
        yield [pa.chunked_array([array[:3], array[3:3], array[3:]])]
        yield [pa.table({"n": range(len(texts)), "text": array})]
        yield iter([pa.record_batch({"text": array[:5]}), pa.record_batch({"text": array[5:]})])


def test_arrow_gives_the_same_merges():
    texts = [*real_texts(300_000), "", None, "漢字 é😀", ""]
    expected = tokens_of(train([text or "" for text in texts], 600))
    for batches in arrow_forms(texts):
        tokenizer = rustbpe.Tokenizer()
        tokenizer.train_from_arrow(batches, 600)
        assert tokens_of(tokenizer) == expected


@pytest.mark.parametrize("max_chars", [0, 1, 7, 500])
def test_only_the_first_characters_of_each_text_count(max_chars):
    import pyarrow as pa

    texts = [*real_texts(50_000), "", "漢字 é😀 " * 20, "ab"]
    expected = tokens_of(train([text[:max_chars] for text in texts], 400))
    for method, source in [("train_from_iterator", texts), ("train_from_arrow", [pa.array(texts)])]:
        tokenizer = rustbpe.Tokenizer()
        getattr(tokenizer, method)(source, 400, max_chars=max_chars)
        assert tokens_of(tokenizer) == expected


def test_arrow_without_texts_and_with_long_ones():
    import pyarrow as pa

    long = ["ab " * 1_000_000, "", "cd " * 10, "ab " * 2_000_000]  # longer than what is copied at a time
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_arrow([pa.array([], pa.string()), pa.array(["", ""]), pa.array(long)], 300, progress=print)
    assert tokens_of(tokenizer)[256:] == tokens_of(train(long, 300))[256:]


def test_arrow_that_is_no_text():
    import pyarrow as pa

    broken = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(bytes([0, 0, 0, 0, 1, 0, 0, 0])), pa.py_buffer(b"\xff")]
    )
    for batches, error, message in [
        ([pa.array([1, 2])], TypeError, "the column has type int64, not string"),
        ([pa.table({"text": [b"a"]})], TypeError, "the column has type binary, not string"),
        ([pa.table({"words": ["a"]})], KeyError, "text"),
        ([broken], ValueError, "bytes that are not UTF-8"),
    ]:
        with pytest.raises(error, match=message):
            rustbpe.Tokenizer().train_from_arrow(batches, 300)
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_arrow([pa.table({"words": ["ab ab"]})], 257, column="words")
    assert tokens_of(tokenizer)[256:] == [b"ab"]


# ---------------------------------------------------------------------------------------------------------------------
# Encoding


def test_a_batch_equals_tiktoken_on_any_number_of_threads():
    rng = random.Random(2)
    texts = [*real_texts(300_000), *(strange_text(rng, rng.randrange(200)) for _ in range(500)), "", "<|bos|>"]
    tokenizer = train(texts, 4000)
    ranks = dict(tokenizer.get_mergeable_ranks())
    oracle = tiktoken.Encoding("oracle", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})
    expected = oracle.encode_ordinary_batch(texts)
    for threads in (None, 1, 3):
        assert tokenizer.encode_batch(texts, num_threads=threads) == expected
    assert tokenizer.encode_batch([]) == []


@pytest.mark.parametrize("pattern", [SPLIT_PATTERN, SPLIT_PATTERN.replace("{1,2}", "{1,3}"), r"\w+|\W+"])
def test_a_tokenizer_is_made_again_from_its_tokens(pattern):
    tokenizer = train(real_texts(50_000), 700, pattern=pattern)
    again = rustbpe.Tokenizer.from_tokens(tokens_of(tokenizer), pattern)
    text = real_texts(60_000)[-1] + " 1234567"
    assert tokens_of(again) == tokens_of(tokenizer) and again.encode(text) == tokenizer.encode(text)
    assert again.get_pattern() == pattern


def test_tokens_that_no_merges_make_are_refused():
    single = [bytes([b]) for b in range(256)]
    for tokens, wrong in [
        (single[:255], 255),
        (single[::-1], 0),
        ([*single, b"abc"], 256),
        ([*single, b"ab", b"ab"], 257),
    ]:
        with pytest.raises(ValueError, match=f"token {wrong} is not as expected"):
            rustbpe.Tokenizer.from_tokens(tokens)


def test_strange_input_takes_no_time():
    rng = random.Random(3)
    noise = rng.randbytes(10_000_000).decode("utf-8", errors="replace")
    tokenizer = train([noise, "a" * 1_000_000, "", " " * 1_000_000 + "x", "\n" * 1_000_000], 1000)
    tokens = tokens_of(tokenizer)
    for text in ("a" * 1_000_000, noise[:1_000_000], " " * 1_000_000 + "x", "\n \n" * 300_000, "'" * 100_000):
        assert b"".join(tokens[i] for i in tokenizer.encode(text)).decode() == text
    for call in (tokenizer.encode, lambda text: tokenizer.encode_batch([text])):
        with pytest.raises(UnicodeEncodeError, match="surrogates not allowed"):
            call("\ud800")
