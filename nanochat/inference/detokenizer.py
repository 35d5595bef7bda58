"""The text of an answer while its tokens come in."""

PARTS = {"python_start": "python", "python_end": "text", "output_start": "output", "output_end": "text"}
HIDDEN = ("bos", "user_start", "user_end", "assistant_start", "assistant_end")


class Detokenizer:
    """
    Tokens of an answer in, (kind, piece of text) out; kind is "text", or the calculator's "python" or "output".

    Text ends before the first of the texts in `stop`, and `stopped` is then True. Only what could be the beginning of
    one of them is held back.
    """

    def __init__(self, tokenizer, stop=()):
        self.tokenizer, self.stop, self.kind = tokenizer, stop, "text"
        self.parts = {tokenizer.encode_special(f"<|{name}|>"): kind for name, kind in PARTS.items()}
        self.hidden = {tokenizer.encode_special(f"<|{name}|>") for name in HIDDEN}
        self.pending, self.emitted = [], 0  # tokens since the last clean cut, characters of them already given out
        self.held, self.stopped = "", False  # text that may begin a stop

    def push(self, token):
        """The text that is certain now: a character whose bytes are not all there yet waits for the next token."""
        if token in self.parts:
            piece, self.kind = self.flush(), self.parts[token]
            return piece
        if token in self.hidden:
            return self.kind, ""
        self.pending.append(token)
        text = self.tokenizer.decode(self.pending)
        start = self.emitted
        if text.endswith("\ufffd"):  # an unfinished character decodes to one U+FFFD
            self.emitted = len(text) - 1
            return self.kind, self._until_stop(text[start:-1])
        self.pending, self.emitted = [], 0
        return self.kind, self._until_stop(text[start:])

    def flush(self):
        """All that is left, also half a character (as U+FFFD)."""
        piece = self._until_stop(self.tokenizer.decode(self.pending)[self.emitted :])
        if not self.stopped:
            piece += self.held
        self.pending, self.emitted, self.held = [], 0, ""
        return self.kind, piece

    def _until_stop(self, piece):
        """What can be given out of the text held back and `piece`."""
        if self.stopped:
            return ""
        if not self.stop or self.kind != "text":
            return piece
        text, self.held = self.held + piece, ""
        found = [at for stop in self.stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)]
        for n in range(min(len(text), max(map(len, self.stop)) - 1), 0, -1):
            if any(stop.startswith(text[-n:]) for stop in self.stop):
                self.held = text[-n:]
                return text[:-n]
        return text


def visible_text(tokenizer, tokens):
    """What a reader sees of an answer: its text without the calculator's calls and outputs."""
    stream = Detokenizer(tokenizer)
    pieces = [*map(stream.push, tokens), stream.flush()]
    return "".join(piece for kind, piece in pieces if kind == "text")
