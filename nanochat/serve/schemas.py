"""The JSON of OpenAI's API: request bodies with their limits, errors, and the parts of answers."""

import time
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from nanochat.common import well_formed

MAX_MESSAGE_CHARS, MAX_CHARS = 8_000, 32_000  # in one message, and in all messages of a request
RETRY = {"Retry-After": "1"}  # seconds
ERROR_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 500: "server_error"}
ERROR_TYPES |= {503: "service_unavailable_error", 504: "timeout_error"}
StopString = Annotated[str, Field(min_length=1)]


class Schema(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


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


class CompletionBody(Schema):
    """The fields that chat and text completions share; null means the default."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=4)] | None = None
    stop_token_ids: list[int] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None


class ChatRequest(CompletionBody):
    messages: list[Message] = Field(min_length=1, max_length=500)
    max_completion_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None


class CompletionRequest(CompletionBody):
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
    """An error that the client gets in place of an answer: HTTP status, JSON body and headers."""

    def __init__(self, status, message, headers=None, **detail):
        self.status, self.headers = status, RETRY if status in (429, 503) else headers
        message = well_formed(message)  # it may quote a lone surrogate from the request
        error = {"message": message, "type": ERROR_TYPES.get(status, "invalid_request_error")}
        self.body = {"error": error | {"param": None, "code": None} | detail}


def envelope(object, id, model):
    """The first fields of every answer and of every chunk of a stream."""
    created, system = int(time.time()), "nanochat"
    return {"id": id, "object": object, "created": created, "model": model, "system_fingerprint": system}
