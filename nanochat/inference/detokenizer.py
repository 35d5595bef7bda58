"""Incremental detokenization: turns the tokens of an answer into text while they are generated."""

import codecs

from nanochat.tokenizer import SPECIAL_TOKENS

# Special token -> type of the part that begins after it. The other special tokens add no text.
PART_AFTER = {"<|python_start|>": "python", "<|output_start|>": "python_output"}
PART_AFTER |= dict.fromkeys(("<|python_end|>", "<|output_end|>"), "text")


class Detokenizer:
    """
    Incremental detokenizer of one answer. Pieces of text are (part type, text).

    Part types are those of a message: "text", "python" (a call of the calculator) and "python_output" (its result).
    Text ends before the first stop string in `stop`; then `stopped` is True. A suffix of the text that may be the
    beginning of a stop string is held back.
    """

    def __init__(self, tokenizer, stop=()):
        self.tokenizer, self.stop = tokenizer, stop
        self.special_tokens = {tokenizer.encode_special(name): PART_AFTER.get(name) for name in SPECIAL_TOKENS}
        self.utf8_decoder = codecs.getincrementaldecoder("utf-8")("replace")  # buffers a partial UTF-8 character
        self.part, self.held_back, self.stopped = "text", "", False

    def push(self, token):
        """The piece of text that `token` completes; may be empty."""
        if token not in self.special_tokens:
            return self.part, self._before_stop(self.utf8_decoder.decode(self.tokenizer.decode_bytes([token])))
        if self.special_tokens[token] is None:
            return self.part, ""
        piece = self.flush()
        self.part = self.special_tokens[token]
        return piece

    def flush(self):
        """The remaining piece of text; a partial character becomes U+FFFD."""
        text = self._before_stop(self.utf8_decoder.decode(b"", final=True))
        held_back, self.held_back = self.held_back, ""
        return self.part, text + held_back

    def _before_stop(self, new_text):
        """Held-back text plus `new_text`, cut at a stop string; holds back a suffix that may begin one."""
        if self.stopped:
            return ""
        if not self.stop or self.part != "text":
            return new_text
        text, self.held_back = self.held_back + new_text, ""
        matches = [i for stop in self.stop if (i := text.find(stop)) >= 0]
        if matches:
            self.stopped = True
            return text[: min(matches)]
        suffixes = (text[i:] for i in range(len(text)))
        self.held_back = next((s for s in suffixes for stop in self.stop if stop.startswith(s)), "")
        return text.removesuffix(self.held_back)


def visible_text(tokenizer, tokens):
    """The text of an answer without the calculator's calls and results."""
    detokenizer = Detokenizer(tokenizer)
    return "".join(text for part, text in [*map(detokenizer.push, tokens), detokenizer.flush()] if part == "text")
