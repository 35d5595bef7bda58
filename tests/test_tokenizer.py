"""The Tokenizer class, its files, rendering of conversations, and tok_train and tok_eval on a small corpus."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken
import torch
from helpers import raises_user_error

from nanochat.common import UserError
from nanochat.tokenizer import (
    SPECIAL_TOKENS,
    SPLIT_PATTERN,
    RustBPETokenizer,
    Tokenizer,
    check_conversation,
    get_token_bytes,
    get_tokenizer,
)
from scripts import tok_eval, tok_train

TEXTS = ["The cat sat on the mat. The cat's mat!\n\nWhat is 12 + 30? It is 42.", "Ünïcödé 漢字 😀 안녕하세요"] * 3


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train_from_iterator(iter(TEXTS), 320)


# ---------------------------------------------------------------------------------------------------------------------
# Text


def test_special_tokens_follow_the_merges_in_order(tokenizer):
    assert tokenizer.get_vocab_size() == 320
    assert tokenizer.get_special_tokens() == list(SPECIAL_TOKENS)
    assert [tokenizer.encode_special(name) for name in SPECIAL_TOKENS] == list(range(311, 320))
    assert tokenizer.get_bos_token_id() == 311
    with pytest.raises(ValueError, match="not a special token"):
        tokenizer.encode_special("<|system|>")


def test_encoding_equals_tiktoken_and_round_trips(tokenizer):
    reference = tiktoken.Encoding(
        "reference", pat_str=SPLIT_PATTERN, mergeable_ranks=tokenizer.ranks, special_tokens={}
    )
    more_texts = ["", " \r\n\t  x", "<|bos|><|user_start|>", "\U0001f468\u200d\U0001f469", tok_train.SAMPLE]
    for text in TEXTS + more_texts:
        ids = tokenizer.encode(text)
        assert ids == reference.encode_ordinary(text) == tokenizer(text)
        assert max(ids, default=0) < 311  # special tokens are never encoded from text
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode_bytes(ids) == text.encode()


def test_prepend_and_append_take_ids_and_names(tokenizer):
    cat, mat = tokenizer.encode("cat"), tokenizer.encode("mat")
    assert tokenizer.encode("cat", prepend="<|bos|>", append=5) == [311, *cat, 5]
    assert tokenizer.encode(["cat", "mat", ""], prepend=0, append="<|user_end|>") == [
        [0, *cat, 313],
        [0, *mat, 313],
        [0, 313],
    ]
    assert tokenizer.encode(["cat", "mat"], num_threads=2) == [cat, mat]


def test_id_to_token_of_an_incomplete_character_and_of_a_special_token(tokenizer):
    assert tokenizer.id_to_token(0xC3) == "\ufffd"
    assert tokenizer.id_to_token(311) == "<|bos|>"


@pytest.mark.parametrize("vocab_size", [264, 0, -5])
def test_vocabulary_below_the_minimum_raises_user_error(vocab_size):
    with pytest.raises(UserError, match=f"vocab_size={vocab_size}: expected 265 to"):
        Tokenizer.train_from_iterator(iter(TEXTS), vocab_size)


def test_minimum_vocabulary_and_more_tokens_than_the_text_has_merges():
    assert Tokenizer.train_from_iterator(iter(TEXTS), 265).get_vocab_size() == 265
    small = Tokenizer.train_from_iterator(iter(["ab"]), 1000)
    assert small.get_vocab_size() == 257 + 9 and small.encode_special("<|bos|>") == 257


def test_unknown_tiktoken_name_raises_user_error():
    with pytest.raises(UserError, match="no tokenizer 'gpt9'; tiktoken has .*gpt2"):
        Tokenizer.from_pretrained("gpt9")


# ---------------------------------------------------------------------------------------------------------------------
# Files


def test_save_and_load_round_trip(tokenizer, empty_base):
    tokenizer.save(empty_base / "tokenizer")
    loaded = get_tokenizer()
    assert isinstance(loaded, RustBPETokenizer)
    assert (loaded.pattern, loaded.ranks, loaded.bos) == (tokenizer.pattern, tokenizer.ranks, tokenizer.bos)
    assert loaded.special_tokens == tokenizer.special_tokens
    assert sorted(p.name for p in (empty_base / "tokenizer").iterdir()) == ["ranks.tiktoken", "tokenizer.json"]
    assert loaded.encode(TEXTS) == tokenizer.encode(TEXTS)


def test_ranks_file_is_in_tiktokens_format(tokenizer, empty_base, monkeypatch):
    from tiktoken.load import load_tiktoken_bpe

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    # Older versions of tiktoken read local files with the package `blobfile`.
    monkeypatch.setattr("tiktoken.load.read_file", lambda path: Path(path).read_bytes())
    tokenizer.save(empty_base)
    assert load_tiktoken_bpe(str(empty_base / "ranks.tiktoken")) == tokenizer.ranks


def test_token_bytes_count_raw_bytes(tokenizer, empty_base):
    tokenizer.save(empty_base / "tokenizer")
    counts = get_token_bytes("cpu")
    assert counts.dtype == torch.int32 and counts.shape == (320,)
    assert counts[:256].tolist() == [1] * 256  # including bytes that are invalid UTF-8 on their own
    assert counts[311:].tolist() == [0] * 9
    for text in TEXTS:
        assert counts[tokenizer.encode(text, prepend="<|bos|>")].sum() == len(text.encode())


def test_error_of_a_missing_tokenizer_names_the_command(empty_base):
    for load in (get_tokenizer, get_token_bytes):
        with pytest.raises(
            UserError, match="no tokenizer at .*tokenizer.json; train one with `python -m scripts.tok_train`"
        ):
            load()


@pytest.mark.parametrize("name", ["tokenizer.json", "ranks.tiktoken"])
@pytest.mark.parametrize("damage", ["truncated", "missing", "other content"])
def test_error_names_the_damaged_file(tokenizer, empty_base, name, damage):
    tokenizer.save(empty_base / "tokenizer")
    path = empty_base / "tokenizer" / name
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(data[: len(data) // 2] if damage == "truncated" else b"[1, 2]")
    with raises_user_error(f"{name}.*tok_train"):
        get_tokenizer()


def test_failed_save_keeps_the_old_files(tokenizer, empty_base, monkeypatch):
    tokenizer.save(empty_base)
    before = {p.name: p.read_bytes() for p in empty_base.iterdir()}

    def disk_full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", disk_full)
    with pytest.raises(OSError):
        Tokenizer.train_from_iterator(iter(TEXTS), 300).save(empty_base)
    assert {p.name: p.read_bytes() for p in empty_base.iterdir()} == before


# ---------------------------------------------------------------------------------------------------------------------
# Conversations


def user(text):
    return {"role": "user", "content": text}


def assistant(content):
    return {"role": "assistant", "content": content}


def chat(*messages):
    return {"messages": list(messages)}


def render(tokenizer, *spans):
    """Expected (ids, mask) of a conversation, from pairs (text or name of a special token, mask)."""
    ids, mask = [], []
    for text, mask_value in spans:
        new = [tokenizer.encode_special(text)] if text in SPECIAL_TOKENS else tokenizer.encode(text)
        ids += new
        mask += [mask_value] * len(new)
    return ids, mask


def test_render_conversation_with_a_tool_call(tokenizer):
    parts = [
        {"type": "text", "text": "It is "},
        {"type": "python", "text": "12+30"},
        {"type": "python_output", "text": "42"},
        {"type": "text", "text": "42."},
    ]
    conversation = chat(
        {"role": "system", "content": "Be kind."}, user("12 + 30?"), assistant(parts), user("Sure?"), assistant("Yes.")
    )
    rendered = tokenizer.render_conversation(conversation)
    assert rendered == render(
        tokenizer,
        ("<|bos|>", 0),
        *[("<|user_start|>", 0), ("Be kind.\n\n12 + 30?", 0), ("<|user_end|>", 0)],
        *[("<|assistant_start|>", 0), ("It is ", 1)],
        *[("<|python_start|>", 1), ("12+30", 1), ("<|python_end|>", 1)],
        *[("<|output_start|>", 0), ("42", 0), ("<|output_end|>", 0)],
        *[("42.", 1), ("<|assistant_end|>", 1)],
        *[("<|user_start|>", 0), ("Sure?", 0), ("<|user_end|>", 0)],
        *[("<|assistant_start|>", 0), ("Yes.", 1), ("<|assistant_end|>", 1)],
    )
    assert tokenizer.render_conversation(conversation, max_tokens=20) == (rendered[0][:20], rendered[1][:20])
    assert conversation["messages"][1]["content"] == "12 + 30?"  # the argument is not modified


def test_dropout_only_concerns_the_users_messages(tokenizer):
    cats = "The cat sat on the mat. " * 5
    conversation = chat(user(cats), assistant(cats))
    ids, mask = tokenizer.render_conversation(conversation, dropout=0.5)
    question, answer = (ids[2 : mask.index(1) - 2], [i for i, m in zip(ids, mask, strict=True) if m][:-1])
    assert answer == tokenizer.encode(cats) and tokenizer.decode(question) == cats
    assert question == tokenizer.encode(cats, dropout=0.5) != answer
    assert tokenizer.render_conversation(conversation)[0][2 : 2 + len(answer)] == answer


def test_dropout_with_another_vocabulary_raises_user_error():
    ranks = {bytes([255 - b]): b for b in range(256)}
    other = Tokenizer(SPLIT_PATTERN, ranks, {"<|bos|>": 256})
    assert other.decode(other.encode("cat")) == "cat"
    with raises_user_error("BPE dropout needs a tokenizer of tok_train"):
        other.encode("cat", dropout=0.1)


def test_special_token_names_in_messages_are_encoded_as_text(tokenizer):
    ids, mask = tokenizer.render_conversation(chat(user("<|assistant_start|>"), assistant("<|assistant_end|><|bos|>")))
    special = [(tokenizer.id_to_token(i), m) for i, m in zip(ids, mask, strict=True) if i >= 311]
    assert special == [
        *[("<|bos|>", 0), ("<|user_start|>", 0), ("<|user_end|>", 0)],
        *[("<|assistant_start|>", 0), ("<|assistant_end|>", 1)],
    ]


@pytest.mark.parametrize(
    "conversation, message",
    [
        (chat(), "at least one message, got"),
        ([user("a")], r"expected {\"messages\": \[...\]} .*, got \[{'role'"),
        (chat(assistant("a")), "message 1 of 1 has the role 'assistant', expected 'user'"),
        (chat(user("a"), user("b")), "message 2 of 2 has the role 'user', expected 'assistant'"),
        (chat(user("a"), {"role": "system", "content": "b"}), "message 2 of 2 has the role 'system'"),
        (chat({"role": "system", "content": "b"}), "ends after its system message"),
        (chat({"role": "system", "content": "b"}, assistant("a")), "message 2 of 2 .* expected 'user'"),
        (chat(user("a"), "b"), "message 2 of 2 is 'b', expected an object"),
        (chat(user(3)), "message 1 of 1 .* has the content 3, expected a string$"),
        (chat(user([{"type": "text", "text": "a"}])), r"message 1 of 1 \(user\) has the content"),
        (chat(user("a"), assistant([{"type": "image", "text": "b"}])), "message 2 of 2 .* type of text, python"),
        (chat(user("a"), assistant([{"type": ["text"], "text": "b"}])), "message 2 of 2 .* type of text, python"),
        (chat(user("a"), {"role": "assistant"}), "message 2 of 2 .* has the content None, expected a string, or"),
    ],
)
def test_malformed_conversations_raise_user_errors(tokenizer, conversation, message):
    for check in (check_conversation, tokenizer.render_conversation, tokenizer.render_for_completion):
        with raises_user_error(message):
            check(conversation)


def test_check_conversation_separates_the_system_message():
    system, messages = {"role": "system", "content": "Hi."}, [user("a"), assistant("b")]
    assert check_conversation(chat(system, *messages)) == ("Hi.", messages)
    assert check_conversation(chat(*messages)) == ("", messages)


def test_prompt_ends_with_assistant_start(tokenizer):
    prompt, _ = render(
        tokenizer,
        *[("<|bos|>", 0), ("<|user_start|>", 0), ("Hi.\n\nWhy?", 0), ("<|user_end|>", 0), ("<|assistant_start|>", 0)],
    )
    system = {"role": "system", "content": "Hi."}
    assert tokenizer.render_for_completion(chat(system, user("Why?"))) == prompt
    assert tokenizer.render_for_completion(chat(system, user("Why?"), assistant("Because."))) == prompt


def test_prompt_is_a_prefix_of_the_rendered_conversation(tokenizer):
    conversation = chat(user("a"), assistant("b"), user("c"), assistant("d"))
    prompt = tokenizer.render_for_completion(conversation)
    ids, mask = tokenizer.render_conversation(conversation)
    assert ids[: len(prompt)] == prompt and mask[len(prompt) :] == [1] * (len(ids) - len(prompt))


def test_truncation_drops_the_oldest_turns_and_keeps_the_system_message(tokenizer):
    system = {"role": "system", "content": "Be kind."}
    turns = [user("one"), assistant("1"), user("two"), assistant("2"), user("three")]
    full = tokenizer.render_for_completion(chat(system, *turns))
    assert tokenizer.render_for_completion(chat(system, *turns), max_tokens=len(full)) == full
    without_first = tokenizer.render_for_completion(chat(system, *turns[2:]))
    assert tokenizer.render_for_completion(chat(system, *turns), max_tokens=len(full) - 1) == without_first
    last = tokenizer.render_for_completion(chat(system, turns[4]))
    assert tokenizer.render_for_completion(chat(system, *turns), max_tokens=len(last)) == last


@pytest.mark.parametrize("max_tokens", [8, 50, 2048])
def test_truncation_of_a_single_long_question_keeps_its_end(tokenizer, max_tokens):
    question = "12 + 30? " * 2000 + "What is it?"
    ids = tokenizer.render_for_completion(chat(user("a"), assistant("b"), user(question)), max_tokens)
    tail = tokenizer.encode(question)[-(max_tokens - 4) :]
    assert ids == [311, 312, *tail, 313, 314]


def test_max_tokens_too_small_for_a_prompt_raises_user_error(tokenizer):
    with pytest.raises(UserError, match="max_tokens=-3 leaves no room"):
        tokenizer.render_for_completion(chat(user("What?")), max_tokens=-3)


def test_visualize_tokenization_colors_tokens_by_mask(tokenizer):
    ids, mask = tokenizer.render_conversation(chat(user("a"), assistant("b")))
    colored = tokenizer.visualize_tokenization(ids, mask)
    assert "\033[31ma\033[0m" in colored and "\033[32mb\033[0m" in colored and colored.count("|\033") == len(ids) - 1


# ---------------------------------------------------------------------------------------------------------------------
# Scripts


@pytest.fixture
def shards(empty_base):
    """A base directory with three shards of TEXTS; the last one is validation."""
    (empty_base / "base_data").mkdir()
    for i in range(3):
        table = pa.table({"text": [f"{text} {i}" for text in TEXTS]})
        pq.write_table(table, empty_base / "base_data" / f"shard_{i:05d}.parquet")
    return empty_base


def test_tok_train_and_tok_eval_write_tokenizer_and_report(shards, capsys, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shards / "no-cache"))
    tok_train.main(["--vocab-size=300", "--max_chars=1e6"])
    assert get_tokenizer().get_vocab_size() == 300
    tok_eval.main([])
    out = capsys.readouterr().out
    assert "saved 300 tokens" in out and "| korean |" in out and "| val |" in out
    assert "Left out: tiktoken has not cached gpt2" in out
    assert (shards / "report" / "tokenizer-training.md").exists()
    assert "Left out" in (shards / "report" / "tokenizer-evaluation.md").read_text(encoding="utf-8")

    monkeypatch.setattr(Tokenizer, "from_pretrained", lambda name: get_tokenizer())
    tok_eval.main([])
    assert "| news | 579 |" in capsys.readouterr().out


def test_data_dir_is_another_folder_of_shards(shards, tmp_path, capsys):
    """A folder without a manifest, with a hidden file and with text as bytes."""
    folder = (shards / "base_data").rename(tmp_path / "shards")
    table = pa.table({"text": [text.encode() for text in TEXTS]})
    pq.write_table(table, folder / "shard_00001.parquet")
    (folder / "._shard_00003.parquet").write_bytes(b"Mac OS X")
    tok_train.main(["--vocab_size=300", f"--data_dir={folder}"])
    tok_eval.main([f"--data-dir={folder}"])
    assert "| train |" in (out := capsys.readouterr().out) and "| val |" in out
    with pytest.raises(UserError, match="no shards in /nowhere"):
        tok_eval.main(["--data-dir=/nowhere"])
    with pytest.raises(UserError, match="no shards in"):
        tok_train.main(["--vocab_size=300"])


def test_tok_train_reads_the_training_split_up_to_max_chars(shards):
    def read_texts(max_chars, doc_cap):
        return [text for array in tok_train.read_texts(max_chars, doc_cap, totals) for text in array.to_pylist()]

    totals = {"documents": 0, "characters": 0}
    texts = read_texts(10**6, 10)
    lengths = [min(len(text), 10) for text in texts]
    assert [text[:10] for text in texts] == [text[:10] for text in TEXTS] * 2  # the third shard is validation
    assert totals == {"documents": 12, "characters": sum(lengths)}
    totals = {"documents": 0, "characters": 0}
    assert read_texts(11, 10) == texts[:2] and totals == {"documents": 2, "characters": sum(lengths[:2])}


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--vocab_size=264"], "vocab_size=264: expected 265 to 2"),
        (["--vocab_size=99999999999"], "vocab_size=99999999999: expected 265 to 2"),
        (["--max_chars=0"], "--max_chars=0: expected 1 to 1e18"),
        (["--doc_cap=-1"], "--doc_cap=-1: expected 1 to 1e18"),
        (["--doc_cap=1e30"], "expected 1 to 1e18"),
    ],
)
def test_tok_train_keeps_the_old_tokenizer_on_a_user_error(shards, tokenizer, flags, message):
    tokenizer.save(shards / "tokenizer")
    with pytest.raises(UserError, match=message):
        tok_train.main(flags)
    assert get_tokenizer().ranks == tokenizer.ranks


def test_tok_train_on_a_damaged_shard(shards, tokenizer):
    tokenizer.save(shards / "tokenizer")
    shard = shards / "base_data" / "shard_00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-50])
    with pytest.raises(UserError, match="shard_00001.parquet"):
        tok_train.main(["--vocab_size=300"])
    assert get_tokenizer().ranks == tokenizer.ranks


def test_tok_train_on_shards_without_text(tmp_path, shards, tokenizer):
    tokenizer.save(shards / "tokenizer")
    for name in "ab":
        pq.write_table(pa.table({"text": pa.array([None, ""], pa.string())}), tmp_path / f"{name}.parquet")
    with pytest.raises(UserError, match="no text in the training shards"):
        tok_train.main(["--vocab_size=300", f"--data_dir={tmp_path}"])
    assert get_tokenizer().ranks == tokenizer.ranks


def test_tok_train_without_shards_names_the_command(empty_base):
    with pytest.raises(UserError, match="python -m nanochat.dataset"):
        tok_train.main([])


@pytest.mark.parametrize("value", ["inf", "nan", "1.5", "many"])
def test_max_chars_must_be_an_integer(value, capsys):
    with pytest.raises(SystemExit) as stop:
        tok_train.main([f"--max_chars={value}"])
    assert stop.value.code == 2 and value in capsys.readouterr().err
