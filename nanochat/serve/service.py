"""The service behind the HTTP routes: the workers, and the checks that turn a request into tokens and settings."""

import random
import re
import time

from nanochat.common import UserError
from nanochat.serve.metrics import Metrics
from nanochat.serve.schemas import MAX_CHARS, MAX_MESSAGE_CHARS, MAX_MESSAGES, ApiError, check
from nanochat.serve.worker import Worker
from nanochat.tokenizer import get_tokenizer

# Fields that have the same name and meaning in a request's body and in the engine's Request.
ENGINE_FIELDS = {*"temperature top_k top_p min_p repetition_penalty frequency_penalty presence_penalty seed".split()}
BOS = "<|bos|>"


class Service:
    """Owns the workers and the metrics, and knows the model's tokenizer and context."""

    def __init__(self, options):
        self.options, self.tokenizer = options, get_tokenizer()
        self.vocab_size = self.tokenizer.get_vocab_size()
        self.workers = [Worker(i, options) for i in range(options.num_workers)]
        self.metrics = Metrics(self.workers)
        self.created = int(time.time())

    @property
    def ready_workers(self):
        return [worker for worker in self.workers if worker.state == "ready"]

    @property
    def status(self):
        """State of the server: "ok" if at least one worker is ready, else "loading" or "dead"."""
        return "ok" if self.ready_workers else "loading" if any(w.state == "loading" for w in self.workers) else "dead"

    @property
    def free_workers(self):
        """The number of workers that would start another answer at once."""
        return sum(worker.in_flight < self.options.max_rows for worker in self.ready_workers)

    @property
    def model(self):
        """The ModelInfo of the served model; None if no worker is ready."""
        return next((worker.model for worker in self.ready_workers), None)

    def pick_worker(self, n_answers, model_name):
        """The least loaded worker. Raises ApiError if none can take `n_answers` more, or the model is another one."""
        reason = self.workers[0].error if self.status == "dead" else "the model is loading"
        check(self.status == "ok", f"{reason}; try again later", param=None, status=503)
        worker = min(self.ready_workers, key=lambda w: w.in_flight)
        is_full = worker.in_flight and worker.in_flight + n_answers > self.options.max_rows + self.options.max_queue
        check(not is_full, "too many requests are waiting; try again later", param=None, status=429)
        message = f"no model {str(model_name)[:100]!r} here, only {worker.model.name}"
        check(model_name in (None, worker.model.name), message, "model", status=404, code="model_not_found")
        return worker

    def chat_prompt(self, messages, max_tokens):
        """The conversation as tokens. Raises ApiError if it is malformed or too long."""
        messages = [{"role": m.role.replace("developer", "system"), "content": m.content} for m in messages]
        context, last, truncate = self.model.context, messages[-1], self.options.overflow == "truncate"
        sizes = [len(m["content"]) for m in messages]
        fits = len(sizes) <= MAX_MESSAGES and max(sizes) <= MAX_MESSAGE_CHARS and sum(sizes) <= MAX_CHARS
        limits = f"{MAX_MESSAGES} messages, {MAX_MESSAGE_CHARS:,} characters in each and {MAX_CHARS:,} in all"
        message = f"the conversation is longer than {limits}; leave out its oldest turns"
        check(fits or truncate, message, "messages", code="context_length_exceeded")
        # The answer continues a last message of the assistant.
        continued = self.tokenizer.encode(last["content"]) if last["role"] == "assistant" else []
        room = max(8, context - min(max_tokens, context // 2) - len(continued)) if truncate else None
        try:
            tokens = self.tokenizer.render_for_completion({"messages": messages}, room)
        except UserError as e:
            raise ApiError(400, str(e), param="messages") from e
        return self.check_length(tokens + continued, "messages")

    def text_prompts(self, prompts):
        """
        Yield (tokens, whether <|bos|> was added) for each of `prompts`, strings or lists of tokens. Raises ApiError.

        The tokens begin with <|bos|>, as every training document does; it is added if the client has not sent it.
        """
        bos = self.tokenizer.get_bos_token_id()
        for prompt in prompts:
            check(prompt != [], "a prompt has no tokens", "prompt")
            sent_bos = prompt.startswith(BOS) if isinstance(prompt, str) else prompt[0] == bos
            tokens = self.tokenizer.encode(prompt.removeprefix(BOS)) if isinstance(prompt, str) else prompt[sent_bos:]
            self._check_vocabulary(tokens, "prompt")
            yield self.check_length([bos, *tokens], "prompt"), not sent_bos

    def engine_settings(self, body, max_tokens, logprobs):
        """The fields of an engine's Request, except its prompt. Raises ApiError for unknown tokens."""
        bias = {int(t) if re.fullmatch(r"\d{1,9}", t) else t: value for t, value in (body.logit_bias or {}).items()}
        self._check_vocabulary(bias, "logit_bias")
        self._check_vocabulary(body.stop_token_ids or (), "stop_token_ids")
        settings = {"temperature": self.options.temperature, "top_k": self.options.top_k}
        settings |= {"seed": random.getrandbits(31)} | body.model_dump(include=ENGINE_FIELDS, exclude_none=True)
        settings |= {"stop": tuple(body.stop or ()), "stop_tokens": frozenset(body.stop_token_ids or ())}
        return settings | dict(max_tokens=max_tokens, num_samples=body.n or 1, logit_bias=bias, logprobs=logprobs)

    def _check_vocabulary(self, tokens, param):
        for token in tokens:
            if not isinstance(token, int) or not 0 <= token < self.vocab_size:
                message = f"token {str(token)[:20]!r} is not in the vocabulary of {self.vocab_size:,}"
                raise ApiError(400, message, param=param)

    def check_length(self, tokens, param):
        """`tokens`, if they leave room for an answer. Raises ApiError."""
        n, context = len(tokens), self.model.context
        # Clients look for the first words.
        message = f"This model's maximum context length is {context:,} tokens, which must hold the answer too. "
        message += f"The prompt has {n:,} tokens; shorten it"
        detail = {"type": "exceed_context_size_error", "code": "context_length_exceeded"}
        check(n < context, message, param, n_prompt_tokens=n, n_ctx=context, **detail)
        return tokens
