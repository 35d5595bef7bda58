"""An answer while its tokens come in: its text, the calculator's steps, log-probabilities and how it ended."""

from nanochat.inference.detokenizer import Detokenizer


class Answer:
    """One choice while its tokens come in: its text, the calculator's steps, log-probabilities and how it ended."""

    def __init__(self, tokenizer, index=0, stop=(), stop_tokens=()):
        self.tokenizer, self.index, self.stop_tokens = tokenizer, index, stop_tokens
        self.stream = Detokenizer(tokenizer, stop)
        self.python_start, self.python_end = map(tokenizer.encode_special, ("<|python_start|>", "<|python_end|>"))
        self.text, self.steps, self.logprobs = "", [], []
        self.call, self.result = None, None  # of a step that is not finished
        self.unseen = []  # log-probabilities of tokens whose text is held back
        self.n_told = 0  # of the log-probabilities
        self.n_tokens, self.cached, self.finish = 0, 0, None

    def push(self, token, logprobs, finish):
        """The delta that this token brings, {} when there is nothing to show yet."""
        self.n_tokens += 1
        was, ends = self.stream.kind, finish == "stop" and token in self.stop_tokens
        kind, piece = (was, "") if ends else self.stream.push(token)
        delta, unwritten = {}, ends or token in self.stream.hidden or token in self.stream.parts
        if token == self.python_start:
            delta |= self._step()
            self.call = ""
        elif kind == "python" and self.call is not None:
            self.call += piece
        elif kind == "output":
            self.result = (self.result or "") + piece
        if kind == "text" and was == "text" and logprobs and not unwritten:
            self.unseen.append((token, logprobs))
        if self.call is not None and self.stream.kind == "text" and token != self.python_end:
            delta |= self._step()  # the output has ended, or there is none
        if finish:
            self.finish = finish
            if kind == "text":
                piece += self.stream.flush()[1]
            delta |= self._step()
        if kind == "text" and piece:
            delta["content"] = piece
            self.text += piece
        if self.unseen and (piece or finish):
            self.logprobs += self.unseen[: None if not self.stream.stopped else self._kept()]
            self.unseen = []
        return delta

    def _step(self):
        """The finished step of the calculator, if there is one."""
        if self.call is None:
            return {}
        step = {"type": "calculator", "expression": self.call, "result": self.result, "position": len(self.text)}
        self.steps.append(step)
        self.call = self.result = None
        return {"tool_steps": [step]}

    def _kept(self):
        """How many of the unseen tokens have text before the stop."""
        n, size = 0, len(b"".join(self.bytes(token) for token, _ in self.logprobs))
        for token, _ in self.unseen:
            if size >= len(self.text.encode()):
                break
            size, n = size + len(self.bytes(token)), n + 1
        return n

    def bytes(self, token):
        return self.tokenizer.decode_bytes([token])

    def new_logprobs(self):
        """Those since the last call."""
        start, self.n_told = self.n_told, len(self.logprobs)
        return self.logprobs[start:]

    def message(self):
        return {"role": "assistant", "content": self.text} | ({"tool_steps": self.steps} if self.steps else {})
