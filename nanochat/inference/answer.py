"""Assembles an answer from its tokens, for the server and for the terminal."""

import itertools
from bisect import bisect_left

from nanochat.inference.detokenizer import Detokenizer


class Answer:
    """
    One answer to a request, complete when `finish` is set (see Row.finish).

    `pieces` has one (part type, text) per token, see Detokenizer. `steps` are the calculator's calls; the position of a
    step is the number of characters of `text` before it. `logprobs` has (token, log-probabilities, position) for each
    text token before the stop string; with `every_token`, also for special tokens and the calculator's. The tokens of
    one character have its position.
    """

    def __init__(self, tokenizer, index=0, stop=(), stop_tokens=(), every_token=False):
        self.tokenizer, self.index, self.stop_tokens, self.every_token = tokenizer, index, stop_tokens, every_token
        self.detokenizer = Detokenizer(tokenizer, stop)
        self.python_start, self.python_end = map(tokenizer.encode_special, ("<|python_start|>", "<|python_end|>"))
        self.text, self.pieces, self.steps, self.logprobs, self.finish = "", [], [], [], None
        self.open_step = None  # tool step whose expression or result is incomplete
        self.n_returned_logprobs = 0  # entries that new_logprobs() has returned

    def push(self, token, logprobs=None, finish=None):
        """Add a token; returns the delta, a dict with new text as "content" and completed steps as "tool_steps"."""
        self.finish = finish
        detokenizer, is_stop_token = self.detokenizer, finish == "stop" and token in self.stop_tokens
        held_back, in_character = detokenizer.held_back, detokenizer.utf8_decoder.getstate()[0] != b""
        part, text = (detokenizer.part, "") if is_stop_token else detokenizer.push(token)
        is_text = part == "text" and not is_stop_token and token not in detokenizer.special_tokens
        if self.every_token or (logprobs and is_text):
            new_text = (text + detokenizer.held_back)[len(held_back) :] if part == "text" else ""
            is_replaced = in_character and new_text.startswith("\ufffd")  # the token begins after the U+FFFD
            self.logprobs.append((token, logprobs, len(self.text) + len(held_back) + is_replaced))
        if finish:
            text += detokenizer.flush()[1]
        self.pieces.append((part, text))
        delta = self._update_step(token, part, text) if self.open_step or token == self.python_start else {}
        if text and part == "text":
            delta["content"] = text
            self.text += text
        if detokenizer.stopped:
            self.logprobs = self.logprobs[: self._n_before_end()]
        return delta

    def _n_before_end(self):
        """Number of entries of `logprobs` that begin before the end of `text`."""
        return bisect_left(self.logprobs, len(self.text), key=lambda entry: entry[2])

    def _update_step(self, token, part, text):
        """Add a token to the open tool step; returns {"tool_steps": [...]} if that completes a step, else {}."""
        step, completed = self.open_step, []
        if token == self.python_start:
            completed = [step] if step else []
            step = {"type": "calculator", "expression": "", "result": None}
        elif part == "python":
            step["expression"] += text
        elif part == "python_output":
            step["result"] = (step["result"] or "") + text
        # A result may follow <|python_end|>, so the step stays open until the next token.
        if self.finish or (self.detokenizer.part == "text" and token != self.python_end):
            completed, step = [*completed, step], None
        self.open_step = step
        completed = [step | {"position": len(self.text)} for step in completed]
        self.steps += completed
        return {"tool_steps": completed} if completed else {}

    @property
    def parts(self):
        """The answer as the parts of an assistant's message."""
        runs = itertools.groupby(self.pieces, key=lambda piece: piece[0])
        parts = [{"type": part, "text": "".join(text for _, text in run)} for part, run in runs]
        return [part for part in parts if part["text"]]

    def new_logprobs(self):
        """Entries of `logprobs` that belong to `text` and were not returned before."""
        start = self.n_returned_logprobs
        self.n_returned_logprobs = len(self.logprobs) if self.finish else self._n_before_end()
        return self.logprobs[start : self.n_returned_logprobs]
