"""Chat and text completions: from a request's body to OpenAI's JSON, whole or in chunks."""

import asyncio
import contextlib
import itertools
import time
import uuid
from collections import defaultdict

from nanochat.inference.answer import Answer
from nanochat.serve.schemas import check


class Generation:
    """The answers to one prompt, while a worker generates them."""

    def __init__(self, completion, key, tokens, added_bos):
        self.completion, self.key, self.tokens, self.added_bos = completion, key, tokens, added_bos
        settings = completion.settings
        stop, n = (settings["stop"], settings["stop_tokens"]), settings["num_samples"]
        self.answers = [Answer(completion.tokenizer, i, *stop, completion.scores_every_token) for i in range(n)]
        self.n_cached = 0  # prompt tokens taken from the prefix cache

    async def batches(self):
        """
        Yield {answer: [one delta per new token]} as tokens arrive, and update the metrics. Raises WorkerError.

        A delta is what the token adds to the message: {}, or text as "content", or a calculator step as "tool_steps".
        Before the first token, the answers begin with the prompt if the request has echo=true.
        """
        completion, last_time = self.completion, {}  # `last_time`: answer -> time of its newest token
        metrics = completion.service.metrics
        metrics.prompt_tokens.inc(len(self.tokens))
        if completion.echo:
            await self._echo()
        if not completion.settings["max_tokens"]:
            return
        start = time.perf_counter()
        events = completion.worker.generate(self.key, tokens=self.tokens, **completion.settings)
        async with contextlib.aclosing(events):
            async for batch in events:
                now, deltas = time.perf_counter(), defaultdict(list)
                if not last_time:
                    metrics.first_token.observe(now - start)
                    *_, self.n_cached = batch[0]
                    metrics.cached_tokens.inc(self.n_cached)
                for sample, token, logprobs, finish, _ in batch:
                    answer = self.answers[sample]
                    deltas[answer].append(answer.push(token, logprobs, finish))
                for answer, new in deltas.items():
                    gap = (now - last_time.get(answer, now)) / len(new)
                    for _ in new if answer in last_time else new[1:]:  # no gap before the first token
                        metrics.inter_token.observe(gap)
                    last_time[answer] = now
                metrics.completion_tokens.inc(len(batch))
                yield deltas

    async def run(self):
        """Generate all answers to the end."""
        async for _ in self.batches():
            pass

    async def _echo(self):
        """Begin the answers with the prompt and, if they are wanted, its tokens' log-probabilities."""
        completion, tokens = self.completion, self.tokens
        echo, scores = Answer(completion.tokenizer, every_token=completion.scores_every_token), [None] * len(tokens)
        if completion.scores_every_token:
            scores = await completion.worker.ask("score", f"{self.key}-score", tokens, completion.settings["logprobs"])
        for i, (token, score) in enumerate(zip(tokens, scores, strict=True), 1):
            echo.push(token, score, finish="length" if i == len(tokens) else None)
        for answer in self.answers:
            # Clients find their own tokens by position, so a <|bos|> that they did not send is left out.
            answer.text, answer.logprobs = echo.text, echo.logprobs[self.added_bos :]


class Completion:
    """
    A request for a chat or text completion. The constructor raises ApiError if the request is invalid.

    answer() generates everything at once, chunks() streams. Subclasses turn the body into prompts and format the
    choices; a choice is the JSON of one answer, or of a piece of it.
    """

    def __init__(self, service, body, n_prompts=1):
        check(body.stream or body.stream_options is None, "stream_options needs stream=true", "stream_options")
        self.service, self.body, self.tokenizer = service, body, service.tokenizer
        self.worker = service.pick_worker((body.n or 1) * n_prompts, body.model)
        self.id = f"{self.id_prefix}-{uuid.uuid4().hex}"

    def _set_prompts(self, prompts, max_tokens, logprobs):
        """Prepare one Generation for each of `prompts`, (tokens, whether <|bos|> was added to the client's tokens)."""
        self.settings = self.service.engine_settings(self.body, max_tokens, logprobs)
        self.generations = [Generation(self, f"{self.id}-{i}", *prompt) for i, prompt in enumerate(prompts)]

    async def answer(self):
        """The whole answer as JSON."""
        await asyncio.gather(*(generation.run() for generation in self.generations))
        answers = [answer for generation in self.generations for answer in generation.answers]
        choices = [self._choice(a, a.finish or "length", a.logprobs, **self._content(a)) for a in answers]
        choices = [choice | {"index": i} for i, choice in enumerate(choices)]
        return self._envelope(self.object) | {"choices": choices, "usage": usage(self.generations)}

    async def chunks(self):
        """Yield lists of the chunks of a stream, each to be sent without delay."""
        (generation,) = self.generations
        with_usage = self.body.stream_options and self.body.stream_options.include_usage
        head = self._envelope(self.chunk_object) | ({"usage": None} if with_usage else {})
        async with contextlib.aclosing(generation.batches()) as batches:
            async for batch in batches:
                yield [head | {"choices": [c]} for a, new in batch.items() for c in self._chunk_choices(a, new)]
        if with_usage:
            yield [head | {"choices": [], "usage": usage([generation])}]

    def _envelope(self, object):
        """The first fields of the answer, and of every chunk of a stream."""
        fields = {"id": self.id, "object": object, "created": int(time.time()), "model": self.worker.model.name}
        return fields | {"system_fingerprint": "nanochat"}

    def _choice(self, answer, finish, logprobs, **content):
        """
        The JSON of a choice, an answer or a piece of it; `content` is its message, delta or text.

        `logprobs`: [(token, (its log-probability, [(alternative token, its log-probability)]), position in the text)].
        """
        wanted = self.settings["logprobs"] is not None and (logprobs or not self.body.stream)
        formatted = self._formatted(logprobs) if wanted else None
        return {"index": answer.index, **content, "finish_reason": finish, "logprobs": formatted}


class ChatCompletion(Completion):
    id_prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"
    scores_every_token = echo = False

    def __init__(self, service, body):
        check(body.logprobs or not body.top_logprobs, "top_logprobs needs logprobs=true", "top_logprobs")
        super().__init__(service, body)
        max_tokens = body.max_completion_tokens or body.max_tokens or service.options.max_tokens
        prompt = service.chat_prompt(body.messages, max_tokens)
        self._set_prompts([(prompt, False)], max_tokens, (body.top_logprobs or 0) if body.logprobs else None)

    def _content(self, answer):
        steps = {"tool_steps": answer.steps} if answer.steps else {}
        return {"message": {"role": "assistant", "content": answer.text} | steps}

    def _chunk_choices(self, answer, deltas):
        if len(answer.pieces) == len(deltas):  # there were no tokens before
            yield self._choice(answer, None, [], delta={"role": "assistant", "content": ""})
        for delta in merged(deltas):
            yield self._choice(answer, None, answer.new_logprobs(), delta=delta)
        if answer.finish:
            yield self._choice(answer, answer.finish, answer.new_logprobs(), delta={})

    def _formatted(self, logprobs):
        """`logprobs` in the format of chat completions."""

        def entry(token, logprob):
            data = self.tokenizer.decode_bytes([token])
            return {"token": data.decode("utf-8", "replace"), "logprob": logprob, "bytes": [*data]}

        content = [entry(t, p) | {"top_logprobs": [entry(*other) for other in top]} for t, (p, top), _ in logprobs]
        return {"content": content}


class TextCompletion(Completion):
    id_prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, service, body):
        super().__init__(service, body, len(body.prompt))
        self.scores_every_token, self.echo = body.logprobs is not None, body.echo
        max_tokens = 16 if body.max_tokens is None else body.max_tokens
        check(max_tokens or body.echo, "max_tokens=0 needs echo=true", "max_tokens")
        prompts, n = list(service.text_prompts(body.prompt)), body.n or 1
        check(len(prompts) * n <= 128, f"{len(prompts)} prompts with {n} answers each are more than 128", "prompt")
        message = "a stream is for the answer to one prompt, of at least one token"
        check(not body.stream or (len(prompts) == 1 and max_tokens), message, "stream")
        self._set_prompts(prompts, max_tokens, body.logprobs)

    def _content(self, answer):
        return {"text": answer.text}

    def _chunk_choices(self, answer, deltas):
        # If there were no tokens before, the text may begin with an echo.
        text = answer.text if len(answer.pieces) == len(deltas) else "".join(new.get("content", "") for new in deltas)
        if text or answer.finish:
            yield self._choice(answer, answer.finish, answer.new_logprobs(), text=text)

    def _formatted(self, logprobs):
        """`logprobs` in the format of text completions. The first token of an echoed prompt has none, but None."""
        return {
            "tokens": [self._token_text(token) for token, _, _ in logprobs],
            "token_logprobs": [entry and entry[0] for _, entry, _ in logprobs],
            "top_logprobs": [entry and {self._token_text(t): p for t, p in entry[1]} for _, entry, _ in logprobs],
            "text_offset": [position for _, _, position in logprobs],
        }

    def _token_text(self, token):
        """The text of a token; its bytes as "bytes:\\xf0\\x9f" if they are no complete characters."""
        data = self.tokenizer.decode_bytes([token])
        text = data.decode("utf-8", "replace")
        return text if text.encode() == data else "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


async def inspection(service, body):
    """What is inside a text, see nanochat/inspection.py; with max_tokens, the text goes on first."""
    check((body.messages is None) != (body.prompt is None), "give either messages or a prompt", "prompt")
    worker, key = service.pick_worker(1, body.model), f"inspect-{uuid.uuid4().hex}"
    if body.messages is None:
        tokens, _ = next(service.text_prompts([body.prompt]))
    else:
        tokens, _ = service.tokenizer.render_conversation({"messages": body.messages}, max_tokens=None)
        service.check_length(tokens, "messages")
    if body.max_tokens:
        settings = service.engine_settings(body, body.max_tokens, None) | {"num_samples": 1}
        async with contextlib.aclosing(worker.generate(key, tokens=tokens, **settings)) as events:
            async for batch in events:
                tokens = [*tokens, *(token for _, token, *_ in batch)]
    fields = {"ids": tokens, **body.model_dump(include={"position", "layer", "head"})}
    return {"object": "inspection", "model": worker.model.name} | await worker.ask("inspect", key, fields)


def usage(generations):
    """The token counts of a response. A prompt with several answers counts once."""
    n_prompt = sum(len(generation.tokens) for generation in generations)
    n_completion = sum(len(answer.pieces) for generation in generations for answer in generation.answers)
    counts = {"prompt_tokens": n_prompt, "completion_tokens": n_completion, "total_tokens": n_prompt + n_completion}
    return counts | {"prompt_tokens_details": {"cached_tokens": sum(generation.n_cached for generation in generations)}}


def merged(deltas):
    """Yield the deltas of one answer, with consecutive pieces of text joined and empty deltas left out."""
    for is_text, run in itertools.groupby(filter(None, deltas), key=lambda delta: delta.keys() == {"content"}):
        if is_text:
            yield {"content": "".join(delta["content"] for delta in run)}
        else:
            yield from run
