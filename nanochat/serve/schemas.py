"""The JSON of OpenAI's API: request bodies with their limits, errors, and the parts of answers."""

import json
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from nanochat.common import require, well_formed

MAX_MESSAGES, MAX_MESSAGE_CHARS, MAX_CHARS = 500, 8_000, 32_000  # of a request, unless old turns are cut
RETRY = {"Retry-After": "1"}  # seconds
ERROR_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 500: "server_error"}
ERROR_TYPES |= {503: "service_unavailable_error", 504: "timeout_error"}
# Fields of OpenAI's API that this server does not implement, and the values that ask for nothing.
UNSUPPORTED = dict.fromkeys(("tools", "functions", "audio", "prediction", "web_search_options"), ())
UNSUPPORTED |= dict.fromkeys(("tool_choice", "function_call"), ("none", "auto"))
UNSUPPORTED |= {"tool_calls": (), "reasoning_effort": ("none",), "response_format": ({"type": "text"},)}
UNSUPPORTED |= {"best_of": (1,), "suffix": ("",), "modalities": (["text"],), "verbosity": ("medium",)}


class Schema(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    @model_validator(mode="after")
    def refuse_unsupported(self):
        unused = {"tools", "functions"} if self.model_extra.get("tool_choice") == "none" else ()
        for name, value in self.model_extra.items():
            if name in UNSUPPORTED and name not in unused and value not in (None, [], *UNSUPPORTED[name]):
                ctx = {"name": name, "value": json.dumps(value)[:60]}
                raise PydanticCustomError("unsupported_parameter", "{name}={value} is not supported; leave it out", ctx)
        return self


def message_text(content):
    """The text of a message's content: a string, or text parts, which are joined."""
    if not isinstance(content, list):
        return content
    for i, part in enumerate(content):
        kind = str(part.get("type") if isinstance(part, dict) else type(part).__name__)
        require(kind == "text", f"part {i} has the type {kind[:40]!r}; only parts of the type 'text' are supported")
        require(isinstance(part.get("text"), str), f"part {i} has no string 'text'")
    return "\n\n".join(part["text"] for part in content)


def stop_strings(stop):
    """`stop` as a list of strings."""
    stop = [stop] if isinstance(stop, str) else stop
    are_texts = isinstance(stop, list) and all(isinstance(text, str) and text for text in stop)
    require(are_texts, "expected a string, or a list of strings, that are not empty")
    require(len(stop) <= 4, f"{len(stop)} stop strings are too many, the limit is 4")
    return stop


def prompt_list(prompt):
    """`prompt` as a list of prompts, each a string or a list of token ids."""
    prompts = prompt if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else [prompt]
    are_texts = all(isinstance(p, str) for p in prompts)
    if not are_texts and not all(isinstance(p, list) and all(type(token) is int for token in p) for p in prompts):
        raise ValueError("expected a string, a list of strings, a list of token ids, or a list of such lists")
    return prompts


NonEmpty = Annotated[str, Field(min_length=1)]
Stop = NonEmpty | Annotated[list[NonEmpty], Field(max_length=4)]
Prompt = str | list[str] | list[int] | list[list[int]]


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class Message(Schema):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(message_text, json_schema_input_type=str | list[TextPart])]

    @model_validator(mode="before")
    @classmethod
    def fill_content(cls, message):
        """An assistant's content may be null, as the official clients send it."""
        is_null = isinstance(message, dict) and message.get("role") == "assistant" and message.get("content") is None
        return message | {"content": ""} if is_null else message


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
    stop: Annotated[list[str], BeforeValidator(stop_strings, json_schema_input_type=Stop)] | None = None
    stop_token_ids: list[int] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def replace_surrogates(cls, body):
        """Half an emoji (a lone surrogate) becomes "?"; it cannot be encoded."""
        return json.loads(well_formed(json.dumps(body, ensure_ascii=False))) if isinstance(body, dict) else body


class ChatRequest(CompletionBody):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class CompletionRequest(CompletionBody):
    prompt: Annotated[list[str | list[int]], BeforeValidator(prompt_list, json_schema_input_type=Prompt)]
    max_tokens: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None


class InspectRequest(CompletionBody):
    messages: list | None = None  # an assistant's content may have parts, as in the training data
    prompt: str | Annotated[list[int], Field(min_length=1)] | None = None
    position: Annotated[int, Field(ge=0)] | None = None
    layer: Annotated[int, Field(ge=0)] = 0
    head: Annotated[int, Field(ge=0)] = 0


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


def check(condition, message, param, status=400, **detail):
    """Raises ApiError unless `condition` holds; `param` is the field that is wrong."""
    if not condition:
        raise ApiError(status, message, param=param, **detail)
