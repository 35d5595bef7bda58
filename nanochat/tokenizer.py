"""
The tokenizer: text to token ids and back, and conversations to ids with a loss mask.

Byte-level BPE as in GPT-4. Our Rust extension (rustbpe) learns the merges and encodes with them; tiktoken encodes with
third-party vocabularies. The ids of the nine special tokens follow those of the merges. Only `encode_special` and the
rendering of conversations produce special tokens: `encode` treats its input as plain text, so a user who types
<|assistant_start|> cannot inject the token.

Files: tokenizer.json (pattern, special tokens, checksum) and ranks.tiktoken (tiktoken's format: one line per token with
its bytes in base64 and its rank).
"""

import base64
import contextlib
import hashlib
import json
import tempfile
from bisect import bisect_left
from pathlib import Path

from nanochat.common import UserError, atomic_path, base_dir, load_extension, print0, require, set_aside

# <|bos|> starts every document. python_* enclose the assistant's call of the calculator, output_* its result.
SPECIAL_TOKENS = ("<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>")
SPECIAL_TOKENS += ("<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>")

# GPT-4's pattern, except that digits are grouped by at most two instead of three.
SPLIT_PATTERN = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
SPLIT_PATTERN += r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"

# Part type of an assistant's message -> (special token before, special token after, loss mask).
PARTS = {"text": (None, None, 1), "python": ("<|python_start|>", "<|python_end|>", 1)}
PARTS |= {"python_output": ("<|output_start|>", "<|output_end|>", 0)}
TRAIN_HINT = "train one with `python -m scripts.tok_train`"


class Tokenizer:
    """A BPE tokenizer: mergeable ranks (bytes -> id), a split pattern, and special tokens (name -> id)."""

    def __init__(self, pattern, ranks, special_tokens, bos="<|bos|>"):
        rustbpe = load_extension()
        self.pattern, self.ranks, self.special_tokens, self.bos = pattern, ranks, special_tokens, bos
        self.tokens = {rank: token for token, rank in ranks.items()}
        self.tokens |= {i: name.encode() for name, i in special_tokens.items()}
        try:
            bpe = rustbpe.Tokenizer.from_tokens(sorted(ranks, key=ranks.get), pattern)
            self.encode_ordinary, self.encode_ordinary_batch, self.drops = bpe.encode, bpe.encode_batch, True
        except ValueError:  # rustbpe requires rank b for byte b; GPT-2's vocabulary has another order
            import tiktoken

            bpe = tiktoken.Encoding("other", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_tokens)
            self.encode_ordinary, self.encode_ordinary_batch = bpe.encode_ordinary, bpe.encode_ordinary_batch
            self.drops = False  # BPE dropout

    @classmethod
    def train_from_iterator(cls, iterator, vocab_size, progress=None, max_chars=None, arrow=False):
        """
        Train a tokenizer of `vocab_size` tokens, including special tokens, on an iterator of str.

        The vocabulary is smaller if no pairs to merge are left. Only the first `max_chars` characters of each
        text are used. With `arrow` the iterator yields pyarrow string arrays, which are read without creating Python
        strings. `progress(phase, done, total)` is called repeatedly: phase "counting" with (bytes, None),
        then phase "merging" with (merges, total merges).
        """
        trainer, n_special = load_extension().Tokenizer(), len(SPECIAL_TOKENS)
        smallest = 256 + n_special  # bytes and special tokens
        require(smallest <= vocab_size < 2**32, f"vocab_size={vocab_size}: expected {smallest} to 2**32")
        train = trainer.train_from_arrow if arrow else trainer.train_from_iterator
        train(iterator, vocab_size - n_special, pattern=SPLIT_PATTERN, progress=progress, max_chars=max_chars)
        tokens = trainer.get_mergeable_ranks()
        ranks = dict(tokens)
        assert len(ranks) == len(tokens), "two tokens have the same bytes"
        return cls(SPLIT_PATTERN, ranks, {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)})

    @classmethod
    def from_pretrained(cls, name):
        """tiktoken's tokenizer `name`, such as "gpt2" or "cl100k_base"; tiktoken downloads it unless it is cached."""
        import tiktoken

        names = tiktoken.list_encoding_names()
        require(name in names, f"no tokenizer {name!r}; tiktoken has {', '.join(names)}")
        e = tiktoken.get_encoding(name)
        return cls(e._pat_str, e._mergeable_ranks, e._special_tokens, bos="<|endoftext|>")

    @classmethod
    def from_directory(cls, directory):
        """Load the tokenizer that `save` wrote. Raises UserError if a file is missing or damaged."""
        path = Path(directory) / "tokenizer.json"
        ranks_path = path.with_name("ranks.tiktoken")
        try:
            config, data = json.loads(path.read_bytes()), ranks_path.read_bytes()
            pattern, special_tokens, bos = config["pattern"], dict(config["special_tokens"]), config["bos"]
            sha256 = config["sha256"]["ranks.tiktoken"]
        except (FileNotFoundError, NotADirectoryError) as e:
            raise UserError(f"no tokenizer at {e.filename}; {TRAIN_HINT}") from None
        except (ValueError, KeyError, TypeError) as e:
            raise UserError(f"{path} is damaged or not a tokenizer of this project; {TRAIN_HINT}") from e
        require(hashlib.sha256(data).hexdigest() == sha256, f"{ranks_path} is damaged; {TRAIN_HINT}")
        ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, data.splitlines())}
        return cls(pattern, ranks, special_tokens, bos)

    def save(self, directory):
        """Write both files atomically."""
        ranks = b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in self.ranks.items())
        config = {"vocab_size": self.get_vocab_size(), "pattern": self.pattern, "special_tokens": self.special_tokens}
        config |= {"bos": self.bos, "sha256": {"ranks.tiktoken": hashlib.sha256(ranks).hexdigest()}}
        # The second file is renamed only after both have been written to disk.
        with atomic_path(Path(directory) / "tokenizer.json") as config_draft:
            config_draft.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            with atomic_path(Path(directory) / "ranks.tiktoken") as draft:
                draft.write_bytes(ranks)

    def fingerprint(self):
        """sha256 (hex) of the pattern, the tokens and the special tokens: equal if all texts get equal ids."""
        digest = hashlib.sha256(json.dumps([self.pattern, self.bos, sorted(self.special_tokens.items())]).encode())
        for token in sorted(self.ranks, key=self.ranks.get):
            digest.update(b"%d %d %b" % (self.ranks[token], len(token), token))
        return digest.hexdigest()

    # -----------------------------------------------------------------------------------------------------------------
    # Vocabulary

    def get_vocab_size(self):
        return 1 + max(self.tokens)

    def get_special_tokens(self):
        return list(self.special_tokens)

    def get_bos_token_id(self):
        return self.encode_special(self.bos)

    def encode_special(self, name):
        """Id of the special token `name`."""
        expected = ", ".join(self.special_tokens)
        require(name in self.special_tokens, f"{name!r} is not a special token; expected one of {expected}")
        return self.special_tokens[name]

    def id_to_token(self, token):
        """Text of one token; incomplete UTF-8 becomes U+FFFD."""
        return self.decode([token])

    def count_bytes(self):
        """List of the length of each token in bytes, indexed by id; 0 for special tokens and unused ids."""
        sizes = {rank: len(token) for token, rank in self.ranks.items()}
        return [sizes.get(i, 0) for i in range(self.get_vocab_size())]

    # -----------------------------------------------------------------------------------------------------------------
    # Text

    def encode(self, text, prepend=None, append=None, num_threads=8, dropout=0.0):
        """
        Ids of a str, or for a list of str a list of ids each, encoded on `num_threads` threads.

        `prepend` and `append` are special tokens, given by id or name. `dropout`: the probability that a merge is left
        out (BPE dropout, Provilkov et al. 2020), the same ones each time a text is encoded; not for GPT-2's vocabulary.
        """
        ids = (self.encode_special(t) if isinstance(t, str) else t for t in (prepend, append))
        head, tail = ([] if i is None else [i] for i in ids)
        require(not dropout or self.drops, "BPE dropout needs a tokenizer of tok_train")
        options = {"dropout": dropout} if dropout else {}
        if isinstance(text, str):
            return head + self.encode_ordinary(text, **options) + tail
        rows = self.encode_ordinary_batch(text, num_threads=num_threads, **options)
        return [head + row + tail for row in rows] if head or tail else rows

    __call__ = encode_batch = encode

    def decode(self, ids):
        """Text of `ids`. Special tokens appear by name; invalid UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids):
        """Bytes of `ids`, possibly invalid UTF-8. Special tokens appear by name."""
        return b"".join([self.tokens[i] for i in ids])

    # -----------------------------------------------------------------------------------------------------------------
    # Conversations

    def render_conversation(self, conversation, max_tokens=2048, dropout=0.0):
        """
        (ids, mask) of a conversation {"messages": [{"role", "content"}, ...]}, truncated to `max_tokens` (None = all).

        The mask is 1 for the tokens that the model is trained to generate. A leading system message is prepended to
        the first user message. An assistant's content is a str or a list of parts {"type", "text"} with a type of
        PARTS. `dropout` is that of `encode`, for the user's messages. Raises UserError for a malformed conversation.
        """
        system, messages = check_conversation(conversation)
        if system:
            messages = [messages[0] | {"content": f"{system}\n\n{messages[0]['content']}"}, *messages[1:]]
        pairs = [(self.get_bos_token_id(), 0)]
        for message in messages:
            pairs += self._render_message(message, dropout)
        return [i for i, _ in pairs[:max_tokens]], [in_loss for _, in_loss in pairs[:max_tokens]]

    def render_for_completion(self, conversation, max_tokens=None):
        """
        Prompt ids for the assistant's next message. A final assistant message in the conversation is ignored.

        If the prompt is longer than `max_tokens`, whole turns are dropped, oldest first; the system message is kept. If
        the last user message alone is too long, its beginning is cut off.
        """
        _, messages = check_conversation(conversation)
        system = conversation["messages"][: -len(messages)]
        messages = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        user_start, _, assistant_start = map(self.encode_special, SPECIAL_TOKENS[1:4])

        def prompt(first):
            """The prompt that starts with the user message messages[first]."""
            ids, _ = self.render_conversation({"messages": [*system, *messages[first:]]}, max_tokens=None)
            return [*ids, assistant_start]

        starts = range(0, len(messages), 2)
        n = bisect_left(starts, True, key=lambda first: max_tokens is None or len(prompt(first)) <= max_tokens)
        if n < len(starts):
            return prompt(starts[n])
        require(max_tokens >= 8, f"max_tokens={max_tokens} leaves no room for a prompt; give at least 8")
        bos, *question, _ = prompt(len(messages) - 1)
        return [bos, user_start, *question[3 - max_tokens :], assistant_start]

    def visualize_tokenization(self, ids, mask):
        """The tokens for a terminal, separated by bars: green where the mask is 1, else red."""
        return "|".join(f"\033[{32 if m else 31}m{self.id_to_token(t)}\033[0m" for t, m in zip(ids, mask, strict=True))

    def _render_message(self, message, dropout):
        """[(id, mask)] of one message."""
        content = message["content"]
        if message["role"] == "user":
            return [(i, 0) for i in self.encode(content, "<|user_start|>", "<|user_end|>", dropout=dropout)]
        pairs = [(self.encode_special("<|assistant_start|>"), 0)]
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            before, after, in_loss = PARTS[part["type"]]
            pairs += [(i, in_loss) for i in self.encode(part["text"], before, after)]
        pairs.append((self.encode_special("<|assistant_end|>"), 1))
        return [(i, 0) for i, _ in pairs] if message.get("weight") == 0 else pairs


RustBPETokenizer = Tokenizer  # former name, for older scripts


def get_tokenizer():
    """The trained tokenizer, from tokenizer/ in the base directory."""
    return Tokenizer.from_directory(base_dir() / "tokenizer")


def save_as_default(tokenizer):
    """Make `tokenizer` the one of get_tokenizer(). Another one there is set aside, an equal one is left."""
    folder = base_dir() / "tokenizer"
    with contextlib.suppress(UserError):  # none yet, or a damaged one
        if get_tokenizer().fingerprint() == tokenizer.fingerprint():
            return print0(f"{folder} holds this tokenizer already")
    with tempfile.TemporaryDirectory(prefix="draft.", dir=base_dir()) as draft:
        tokenizer.save(Path(draft) / "tokenizer")
        if folder.exists():
            set_aside(folder, "another tokenizer (rename it back to use models trained with it)")
        (Path(draft) / "tokenizer").rename(folder)
    print0(f"saved {tokenizer.get_vocab_size():,} tokens to {folder}")


def check_tokenizer(fingerprint, expected, checkpoint):
    """Raises UserError unless the base directory's tokenizer has the fingerprint that `checkpoint` records."""
    if fingerprint == expected:
        return
    hint = "put its tokenizer back, or train the model anew"
    for path in sorted(base_dir().glob("tokenizer?*")):
        with contextlib.suppress(UserError, OSError):
            if Tokenizer.from_directory(path).fingerprint() == expected:
                hint = f"its tokenizer is {path.name}: move tokenizer away and rename {path.name} to tokenizer"
    was, now = f"was trained with tokenizer {expected[:12]}", f"{base_dir() / 'tokenizer'} is {fingerprint[:12]}"
    raise UserError(f"{checkpoint} {was}, {now}; {hint}")


def get_token_bytes(device="cpu"):
    """int32 tensor (V,): length of each token in bytes, 0 for special tokens."""
    import torch

    return torch.tensor(get_tokenizer().count_bytes(), dtype=torch.int32, device=device)


def check_conversation(conversation):
    """
    Validate a conversation {"messages": [...]}; returns (text of the system message or "", other messages).

    Roles must alternate user, assistant, ..., after at most one system message. Raises UserError that describes the
    first invalid message and what was expected.
    """
    messages = conversation.get("messages") if isinstance(conversation, dict) else None
    if not isinstance(messages, list) or not messages:
        raise UserError(f'expected {{"messages": [...]}} with at least one message, got {repr(conversation)[:80]}')
    n_system = int(isinstance(messages[0], dict) and messages[0].get("role") == "system")
    for i, message in enumerate(messages):
        role = ("user", "assistant")[(i - n_system) % 2] if i >= n_system else "system"
        where = f"message {i + 1} of {len(messages)}"
        if not isinstance(message, dict):
            raise UserError(f"{where} is {repr(message)[:80]}, expected an object with role {role!r} and content")
        if message.get("role") != role:
            rule = "user and assistant alternate, after at most one system message"
            raise UserError(f"{where} has the role {repr(message.get('role'))[:80]}, expected {role!r}: {rule}")
        content = message.get("content")
        if not isinstance(content, str) and not (role == "assistant" and is_parts(content)):
            parts = f", or a list of {{type, text}} with a type of {', '.join(PARTS)}" if role == "assistant" else ""
            raise UserError(f"{where} ({role}) has the content {repr(content)[:80]}, expected a string{parts}")
    require(messages[n_system:], "the conversation ends after its system message, expected a message with role 'user'")
    return messages[0]["content"] if n_system else "", messages[n_system:]


def is_parts(content, types=PARTS):
    """Whether `content`, any JSON value, is a list of {"type": one of `types`, "text": str}."""
    parts = content if isinstance(content, list) else [None]
    return all(isinstance(p, dict) and p.get("type") in [*types] and isinstance(p.get("text"), str) for p in parts)
