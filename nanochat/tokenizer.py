"""
Text to token ids and back, and conversations to ids with a loss mask.

Byte-level BPE in the manner of GPT-4: our Rust crate (rustbpe) learns the merges and encodes with them; tiktoken
encodes with the tokenizers of others. Nine special tokens follow the merges. They come only from rendering
conversations and from `encode_special`: text is always encoded as plain text, so a user who types <|assistant_start|>
gets those letters and never the token.

Files: tokenizer.json (pattern, special tokens, checksums), ranks.tiktoken (tiktoken's own format: on each line a
token's bytes in base64 and its rank) and token_bytes.pt (int32 tensor (V,): bytes of each token, 0 for special ones).
"""

import base64
import contextlib
import hashlib
import io
import itertools
import json
import struct
import zipfile
from bisect import bisect_left
from pathlib import Path

from nanochat.common import UserError, atomic_path, base_dir

SPECIAL_TOKENS = (
    "<|bos|>",  # starts every document
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",  # the assistant calls a tool
    "<|python_end|>",
    "<|output_start|>",  # the tool answers
    "<|output_end|>",
)

# GPT-4's pattern, but digits go in groups of one or two instead of up to three.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)

# Parts of an assistant's message: the special tokens before and after, and 1 if the model shall learn to write them.
PARTS = {
    "text": (None, None, 1),
    "python": ("<|python_start|>", "<|python_end|>", 1),
    "python_output": ("<|output_start|>", "<|output_end|>", 0),
}
TRAIN = "train one with `python -m scripts.tok_train`"


class Tokenizer:
    """Mergeable ranks (bytes -> id), a split pattern, and special tokens (name -> id) after the ranks."""

    def __init__(self, pattern, ranks, special_tokens, bos="<|bos|>"):
        import rustbpe

        self.pattern, self.ranks, self.special_tokens, self.bos = pattern, ranks, special_tokens, bos
        self.tokens = {rank: token for token, rank in ranks.items()}
        self.tokens |= {i: name.encode() for name, i in special_tokens.items()}
        try:
            bpe = rustbpe.Tokenizer.from_tokens(sorted(ranks, key=ranks.get), pattern)
            self.encode_text, self.encode_texts = bpe.encode, bpe.encode_batch
        except ValueError:  # GPT-2 and its heirs number the bytes in another order
            import tiktoken

            bpe = tiktoken.Encoding("other", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_tokens)
            self.encode_text, self.encode_texts = bpe.encode_ordinary, bpe.encode_ordinary_batch

    @classmethod
    def train_from_iterator(cls, iterator, vocab_size, progress=None, max_chars=None):
        """
        Learn `vocab_size` tokens, special ones included, from an iterator of str; fewer if its text has no more pairs.

        `progress(phase, done, total)` is called now and then: phase "counting", with the bytes done and None, or
        "merging", with the merges done and wanted. Of each text, only the first `max_chars` characters are read.
        """
        return cls._train("train_from_iterator", iterator, vocab_size, progress, max_chars)

    @classmethod
    def train_from_arrow(cls, batches, vocab_size, progress=None, max_chars=None):
        """The same from an iterator of pyarrow string arrays: no Python string is made of a text."""
        return cls._train("train_from_arrow", batches, vocab_size, progress, max_chars)

    @classmethod
    def _train(cls, method, texts, vocab_size, progress, max_chars):
        import rustbpe

        needed = 256 + len(SPECIAL_TOKENS)
        if vocab_size < needed:
            raise UserError(f"vocab_size={vocab_size} is too small: the 256 bytes and the special tokens need {needed}")
        if vocab_size >= 2**32:
            raise UserError(f"vocab_size={vocab_size} is too large: ids have 32 bits")
        trainer = rustbpe.Tokenizer()
        n = vocab_size - len(SPECIAL_TOKENS)
        getattr(trainer, method)(texts, n, pattern=SPLIT_PATTERN, progress=progress, max_chars=max_chars)
        tokens = trainer.get_mergeable_ranks()
        ranks = dict(tokens)
        assert len(ranks) == len(tokens), "two tokens have the same bytes"
        return cls(SPLIT_PATTERN, ranks, {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)})

    @classmethod
    def from_pretrained(cls, name):
        """One of tiktoken's tokenizers, such as "gpt2" or "cl100k_base"; tiktoken downloads those it has not cached."""
        import tiktoken

        if name not in tiktoken.list_encoding_names():
            raise UserError(f"no tokenizer {name!r}; tiktoken has {', '.join(tiktoken.list_encoding_names())}")
        e = tiktoken.get_encoding(name)
        return cls(e._pat_str, e._mergeable_ranks, e._special_tokens, bos="<|endoftext|>")

    @classmethod
    def from_directory(cls, directory):
        """The tokenizer that `save` wrote. Raises UserError when there is none, or it is damaged."""
        config = _read_config(directory)
        lines = _read_file(directory, "ranks.tiktoken", config).splitlines()
        ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
        return cls(config["pattern"], ranks, config["special_tokens"], config["bos"])

    def save(self, directory):
        """Write the three files; what was there before is replaced only when all of them are written."""
        lines = [b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in self.ranks.items()]
        files = {"ranks.tiktoken": b"".join(lines), "token_bytes.pt": _int_tensor(self.count_bytes())}
        config = {
            "vocab_size": self.get_vocab_size(),
            "pattern": self.pattern,
            "special_tokens": self.special_tokens,
            "bos": self.bos,
            "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
        }
        files["tokenizer.json"] = json.dumps(config, indent=2).encode() + b"\n"
        with contextlib.ExitStack() as stack:
            for name, data in reversed(files.items()):  # entered last, replaced first: tokenizer.json closes the set
                stack.enter_context(atomic_path(Path(directory) / name)).write_bytes(data)

    # -----------------------------------------------------------------------------------------------------------------
    # Vocabulary

    def get_vocab_size(self):
        return 1 + max(self.tokens)

    def get_special_tokens(self):
        return list(self.special_tokens)

    def get_bos_token_id(self):
        return self.encode_special(self.bos)

    def encode_special(self, name):
        """The id of a special token, by its name."""
        if name not in self.special_tokens:
            raise ValueError(f"{name!r} is not a special token; there are {', '.join(self.special_tokens)}")
        return self.special_tokens[name]

    def id_to_token(self, token):
        """One token as text; half a character becomes U+FFFD."""
        return self.decode([token])

    def count_bytes(self):
        """Bytes of each token, by id; 0 for special tokens, and for ids that are not in use."""
        counts = [0] * self.get_vocab_size()
        for token, rank in self.ranks.items():
            counts[rank] = len(token)
        return counts

    # -----------------------------------------------------------------------------------------------------------------
    # Text

    def encode(self, text, prepend=None, append=None, num_threads=8):
        """
        Ids of a str, or a list of such for a list of str, which is encoded on `num_threads` threads.

        `prepend` and `append` are special tokens, by id or name.
        """
        head, tail = (
            [] if t is None else [self.encode_special(t) if isinstance(t, str) else t] for t in (prepend, append)
        )
        if isinstance(text, str):
            return head + self.encode_text(text) + tail
        rows = self.encode_texts(text, num_threads=num_threads)
        return [head + row + tail for row in rows] if head or tail else rows

    __call__ = encode

    def decode(self, ids):
        """Text of `ids`, special tokens by name; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids):
        return b"".join([self.tokens[i] for i in ids])

    # -----------------------------------------------------------------------------------------------------------------
    # Conversations

    def render_conversation(self, conversation, max_tokens=2048):
        """
        (ids, mask) of {"messages": [{"role", "content"}, ...]}, cut to `max_tokens`; mask 1: the model shall write it.

        A leading system message joins the first question. An assistant's content is a str, or a list of parts
        {"type": "text" | "python" | "python_output", "text"}. Raises UserError for any other order or shape.
        """
        system, messages = check_conversation(conversation)
        ids, mask = [self.get_bos_token_id()], [0]
        for message in [_join(system, messages[0]), *messages[1:]]:
            for span, learned in self._spans(message):
                ids += span
                mask += [learned] * len(span)
        return ids[:max_tokens], mask[:max_tokens]

    def render_for_completion(self, conversation, max_tokens=None):
        """
        Ids that prompt for the assistant's next message; if the last message is the assistant's, it is left out.

        Beyond `max_tokens` whole turns go, oldest first (the system message then joins the first question that stays);
        if the last question alone is too long, its beginning goes.
        """
        system, messages = check_conversation(conversation)
        if messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        user_start, _, reply = (self.encode_special(t) for t in SPECIAL_TOKENS[1:4])
        bos = self.get_bos_token_id()
        rendered = [list(itertools.chain(*(span for span, _ in self._spans(m)))) for m in messages]

        def prompt(oldest):
            ((question, _),) = self._spans(_join(system, messages[oldest]))
            return [bos, *question, *itertools.chain(*rendered[oldest + 1 :]), reply]

        ids = prompt(0)
        if max_tokens is None or len(ids) <= max_tokens:
            return ids
        turns = range(2, len(messages), 2)
        first = bisect_left(turns, True, key=lambda oldest: len(prompt(oldest)) <= max_tokens)
        if first < len(turns):
            return prompt(turns[first])
        if max_tokens < 8:
            raise UserError(f"max_tokens={max_tokens} leaves no room for a prompt; give at least 8")
        _, *question, _ = prompt(len(messages) - 1)
        return [bos, user_start, *question[3 - max_tokens :], reply]

    def visualize_tokenization(self, ids, mask):
        """Tokens between bars for a terminal: green is what the model learns to write, red what it only reads."""
        return "|".join(f"\033[{32 if m else 31}m{self.id_to_token(t)}\033[0m" for t, m in zip(ids, mask, strict=True))

    def _spans(self, message):
        """[(ids, learned)] of one message: `learned` is 1 for what the model shall write, else 0."""
        content = message["content"]
        if message["role"] == "user":
            return [(self.encode(content, "<|user_start|>", "<|user_end|>"), 0)]
        spans = [([self.encode_special("<|assistant_start|>")], 0)]
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            spans.append((self.encode(part["text"], *PARTS[part["type"]][:2]), PARTS[part["type"]][2]))
        return [*spans, ([self.encode_special("<|assistant_end|>")], 1)]


RustBPETokenizer = Tokenizer  # the name in older scripts


def get_tokenizer():
    """The tokenizer of this base directory."""
    return Tokenizer.from_directory(base_dir() / "tokenizer")


def get_token_bytes(device="cpu"):
    """int32 tensor (V,): bytes of each token, 0 for special ones."""
    import torch

    directory = base_dir() / "tokenizer"
    data = _read_file(directory, "token_bytes.pt", _read_config(directory))
    return torch.load(io.BytesIO(data), weights_only=True, map_location=device)


# ---------------------------------------------------------------------------------------------------------------------
# What comes from outside


def _join(system, question):
    """The question with the system message before it, a blank line between."""
    return question | {"content": f"{system}\n\n{question['content']}"} if system else question


def check_conversation(conversation):
    """(text of the system message or "", the other messages), which are from user and assistant in turns."""
    messages = conversation.get("messages") if isinstance(conversation, dict) else None
    if not isinstance(messages, list) or not messages:
        raise UserError(
            f'a conversation is {{"messages": [...]}} with one message or more, not {str(conversation)[:80]}'
        )
    system = isinstance(messages[0], dict) and messages[0].get("role") == "system"
    for i, message in enumerate(messages):
        where = f"message {i + 1} of {len(messages)}"
        if not isinstance(message, dict):
            raise UserError(f"{where} is {str(message)[:80]!r}, expected an object with role and content")
        expected = "system" if system and i == 0 else ("user", "assistant")[(i - system) % 2]
        if message.get("role") != expected:
            raise UserError(
                f"{where} has the role {message.get('role')!r}, expected {expected!r}: "
                "user and assistant take turns, after at most one system message"
            )
        content = message.get("content")
        if not isinstance(content, str) and not (expected == "assistant" and _are_parts(content)):
            or_parts = (
                f", or a list of {{type, text}} with a type of {', '.join(PARTS)}" if expected == "assistant" else ""
            )
            raise UserError(f"{where} ({expected}) has the content {str(content)[:80]!r}, expected text{or_parts}")
    if len(messages) == system:
        raise UserError("the conversation ends after its system message, expected one from 'user'")
    return (messages[0]["content"], messages[1:]) if system else ("", messages)


def _are_parts(content):
    return isinstance(content, list) and all(
        isinstance(p, dict) and p.get("type") in PARTS and isinstance(p.get("text"), str) for p in content
    )


def _int_tensor(numbers):
    """
    What torch.save writes of an int32 tensor: a zip of a pickle and the numbers.

    Written by hand, because importing torch takes longer than training on 100 MB.
    """
    n = len(numbers)

    def text(s):
        return b"X" + struct.pack("<I", len(s)) + s.encode()

    def number(i):
        return b"J" + struct.pack("<i", i)

    storage = b"(" + text("storage") + b"ctorch\nIntStorage\n" + text("0") + text("cpu") + number(n) + b"tQ"
    offset, size, strides, grad, hooks = (
        number(0),
        number(n) + b"\x85",
        b"K\1\x85",
        b"\x89",
        b"ccollections\nOrderedDict\n)R",
    )
    arguments = b"(" + storage + offset + size + strides + grad + hooks + b"t"
    pickled = b"\x80\2ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R."
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        parts = {
            "data.pkl": pickled,
            "byteorder": b"little",
            "data/0": struct.pack(f"<{n}i", *numbers),
            "version": b"3\n",
        }
        for name, data in parts.items():
            archive.writestr(zipfile.ZipInfo(f"token_bytes/{name}"), data)
    return file.getvalue()


def _read_config(directory):
    """tokenizer.json as a dict."""
    path = Path(directory) / "tokenizer.json"
    if not path.exists():
        raise UserError(f"no tokenizer at {path}; {TRAIN}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.keys() >= {"vocab_size", "pattern", "special_tokens", "bos", "sha256"}:
            return config
    except (ValueError, AttributeError):
        pass
    raise UserError(f"{path} is damaged, or no tokenizer of ours; {TRAIN}")


def _read_file(directory, name, config):
    """The bytes of a file that belongs to the tokenizer, compared with its checksum."""
    path = Path(directory) / name
    data = path.read_bytes() if path.exists() else b""
    if hashlib.sha256(data).hexdigest() != config["sha256"].get(name):
        raise UserError(f"{path} is {'damaged' if data else 'missing'}; {TRAIN}")
    return data
