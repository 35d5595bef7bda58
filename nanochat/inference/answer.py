"""Assembles an answer from its tokens, for the server and for the terminal."""

import itertools

from nanochat.inference.detokenizer import Detokenizer


class Answer:
    """
    One answer to a request, complete when `finish` is set (see Row.finish).

    `pieces` has one (part type, text) per token, see Detokenizer. `steps` are the calculator's calls; the position of a
    step is the number of characters of `text` before it. `logprobs` has (token, log-probabilities) for each text token
    before the stop string.
    """

    def __init__(self, tokenizer, index=0, stop=(), stop_tokens=()):
        self.tokenizer, self.index, self.stop_tokens = tokenizer, index, stop_tokens
        self.detokenizer = Detokenizer(tokenizer, stop)
        self.python_start, self.python_end = map(tokenizer.encode_special, ("<|python_start|>", "<|python_end|>"))
        self.text, self.pieces, self.steps, self.logprobs = "", [], [], []
        self.open_step = None  # tool step whose expression or result is incomplete
        self.pending_logprobs = []  # log-probabilities of tokens whose text is held back
        self.n_returned_logprobs = 0  # entries that new_logprobs() has returned
        self.n_tokens, self.finish = 0, None

    def push(self, token, logprobs=None, finish=None):
        """Add a token; returns the delta, a dict with new text as "content" and completed steps as "tool_steps"."""
        self.n_tokens, self.finish = self.n_tokens + 1, finish
        detokenizer, is_stop_token = self.detokenizer, finish == "stop" and token in self.stop_tokens
        part, text = (detokenizer.part, "") if is_stop_token else detokenizer.push(token)
        if logprobs and part == "text" and not is_stop_token and token not in detokenizer.special_tokens:
            self.pending_logprobs.append((token, logprobs))
        if finish:
            text += detokenizer.flush()[1]
        self.pieces.append((part, text))
        delta = {}
        if self.open_step or token == self.python_start:
            delta = self._update_step(token, part, text)
        if text and part == "text":
            delta["content"] = text
            self.text += text
        if self.pending_logprobs and (text or finish):
            self.logprobs += self._logprobs_before_stop() if detokenizer.stopped else self.pending_logprobs
            self.pending_logprobs = []
        return delta

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

    def _logprobs_before_stop(self):
        """The pending log-probabilities of the tokens that begin before the stop string."""
        n_bytes = [len(self.tokenizer.decode_bytes([token])) for token, _ in self.logprobs + self.pending_logprobs]
        starts = [0, *itertools.accumulate(n_bytes)][len(self.logprobs) :]
        end = len(self.text.encode())
        return [entry for entry, start in zip(self.pending_logprobs, starts, strict=False) if start < end]

    @property
    def parts(self):
        """The answer as the parts of an assistant's message."""
        runs = itertools.groupby(self.pieces, key=lambda piece: piece[0])
        parts = [{"type": part, "text": "".join(text for _, text in run)} for part, run in runs]
        return [part for part in parts if part["text"]]

    def new_logprobs(self):
        """Entries of `logprobs` that were added since the last call."""
        start, self.n_returned_logprobs = self.n_returned_logprobs, len(self.logprobs)
        return self.logprobs[start:]

    def message(self):
        """The assistant's message in the format of the API."""
        return {"role": "assistant", "content": self.text} | ({"tool_steps": self.steps} if self.steps else {})
