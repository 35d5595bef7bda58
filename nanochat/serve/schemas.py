"""The shapes of OpenAI's API: requests with their limits, and answers put together from tokens."""

import time
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from nanochat.common import well_formed

MAX_MESSAGE_CHARS, MAX_CHARS = 8_000, 32_000  # of one message, and of all
Stop = Annotated[str, Field(min_length=1)]


class Schema(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class TextPart(Schema):
    type: Literal["text"]
    text: str


class Message(Schema):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, Field(max_length=MAX_MESSAGE_CHARS)] | list[TextPart]

    @property
    def text(self):
        return self.content if isinstance(self.content, str) else "\n\n".join(part.text for part in self.content)


class ResponseFormat(Schema):
    type: Literal["text"]


class StreamOptions(Schema):
    include_usage: bool | None = None


class Sampling(Schema):
    """What both kinds of completions take; null is the default."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=2, allow_inf_nan=False)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    stop_token_ids: list[int] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None


class ChatRequest(Sampling):
    messages: list[Message] = Field(min_length=1, max_length=500)
    max_completion_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None


class CompletionRequest(Sampling):
    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None
    n_prompt_tokens: int | None = None
    n_ctx: int | None = None


class ErrorBody(BaseModel):
    error: ErrorDetail


class ApiError(Exception):
    """What a client is told instead of an answer."""

    def __init__(self, status, message, type="invalid_request_error", retry_after=None, **detail):
        self.status, self.retry_after = status, retry_after
        message = well_formed(message)  # it may quote half a character of the client's
        self.body = {"error": {"message": message, "type": type, "param": None, "code": None} | detail}


def chat_logprobs(tokenizer, entries):
    """OpenAI's form of [(token, (log-probability, [(token, log-probability)]))]."""

    def one(token, logprob):
        data = tokenizer.decode_bytes([token])
        return {"token": data.decode("utf-8", "replace"), "logprob": logprob, "bytes": [*data]}

    return {
        "content": [one(token, own) | {"top_logprobs": [one(*other) for other in top]} for token, (own, top) in entries]
    }


def text_logprobs(tokenizer, entries):
    """The older form, of plain completions; `entries` as above, or (token, None) for the first of a prompt."""
    tokens = [tokenizer.decode([token]) for token, _ in entries]
    offsets, offset, bos = [], 0, tokenizer.get_bos_token_id()
    for (token, _), text in zip(entries, tokens, strict=True):
        offsets.append(offset)
        offset += 0 if token == bos else len(text)  # which is no part of the text
    return {
        "tokens": tokens,
        "token_logprobs": [found and found[0] for _, found in entries],
        "top_logprobs": [found and {tokenizer.decode([t]): p for t, p in found[1]} for _, found in entries],
        "text_offset": offsets,
    }


def usage(answers, n_prompt):
    """Of the answers to a prompt of `n_prompt` tokens, which is counted once."""
    return token_counts(n_prompt, sum(answer.n_tokens for answer in answers), answers[0].cached)


def token_counts(n_prompt, n_completion, n_cached):
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_completion,
        "total_tokens": n_prompt + n_completion,
        "prompt_tokens_details": {"cached_tokens": n_cached},
    }


def envelope(object, key, model):
    return {
        "id": key,
        "object": object,
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": "nanochat",
    }
