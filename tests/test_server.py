"""
The HTTP server as its clients see it: a real server process, and as clients the openai package, httpx and sockets.

The model has random weights, except that it always completes two chains of tokens: one calls the calculator, one is a
character of four bytes. All other answers are compared with plain full forward passes.
"""

import asyncio
import base64
import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import httpx
import openai
import psutil
import pytest
import torch
from helpers import ROOT
from prometheus_client.parser import text_string_to_metric_families

from nanochat.checkpoint_manager import checkpoint_dir, save_checkpoint
from nanochat.common import Compute, UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import get_tokenizer
from scripts import chat_web

pytestmark = pytest.mark.slow
MODEL, LONG_MODEL, CONTEXT = "nanochat-d2-sft", "nanochat-long-sft", 256
LONG = 30_000  # tokens: an answer that takes longer than any test
ROWS = 8
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
QUESTION = [{"role": "user", "content": "Who lives in the old mill?"}]
SUM = [*QUESTION, {"role": "assistant", "content": "So ~"}]  # answered with a call of the calculator
FOX = [*QUESTION, {"role": "assistant", "content": "A ^"}]  # answered with one character in four tokens
CHAINS = [
    ["~", "=", "<|python_start|>", "6", "*", "7", "<|python_end|>"],
    ["<|output_end|>", "!", "<|assistant_end|>"],
    ["^", *(bytes([b]) for b in "🦊".encode()), "<|assistant_end|>"],
]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"

# ---------------------------------------------------------------------------------------------------------------------
# The model and its expected answers


def token_id(tokenizer, name):
    if isinstance(name, str) and name in tokenizer.special_tokens:
        return tokenizer.encode_special(name)
    return tokenizer.ranks[name if isinstance(name, bytes) else name.encode()]


def chained_model(tokenizer, sequence_len):
    """A random model that follows each token of a chain with the next one, in any context."""
    torch.manual_seed(0)
    n_vocab = tokenizer.get_vocab_size()
    reserved = (
        16  # channels of the residual stream for the chains: only embeddings write them, only the head reads them
    )
    model = GPT(GPTConfig(sequence_len, n_vocab, n_layer=2, n_head=2, n_kv_head=2, n_embd=64))
    model.init_weights("cpu")
    wte, head = model.transformer.wte.weight, model.lm_head.weight
    with torch.no_grad():
        head.normal_(std=0.3)
        for block in model.transformer.h:
            for proj in (block.attn.c_proj.weight, block.mlp.c_proj.weight):
                proj.normal_(std=0.3)[:reserved] = 0
        wte[:, :reserved] = head[:, :reserved] = 0
        chains = [[token_id(tokenizer, name) for name in chain] for chain in CHAINS]
        only_in_chains = {*sum(chains, []), *tokenizer.special_tokens.values()}
        head[list(only_in_chains)] = 0
        for channel, (token, following) in enumerate(pair for c in chains for pair in zip(c, c[1:], strict=False)):
            wte[token, channel] = 30
            head[following, channel] = 20
    return model.eval()


class Reference:
    """Computes answers by full forward passes, without the engine or a cache."""

    def __init__(self, tokenizer):
        self.tokenizer, self.model = tokenizer, chained_model(tokenizer, CONTEXT)

    @torch.inference_mode()
    def logits(self, ids):
        return self.model(torch.tensor([ids]))[0]

    def prompt(self, messages):
        """Ids of the prompt; a last message of the assistant is continued."""
        ids = self.tokenizer.render_for_completion({"messages": messages})
        return ids + (self.tokenizer.encode(messages[-1]["content"]) if messages[-1]["role"] == "assistant" else [])

    def greedy(self, ids, n, adjust=lambda logits, answer: logits):
        """The greedy answer of `n` tokens to `ids`; `adjust(logits, answer so far)` returns the logits to use."""
        answer = []
        for _ in range(n):
            answer.append(adjust(self.logits(ids + answer)[-1].clone(), answer).argmax().item())
        return answer

    def text(self, messages, n=24, **settings):
        return self.tokenizer.decode(self.greedy(self.prompt(messages), n, **settings))


@pytest.fixture(scope="module")
def served_base(pocket_base, tmp_path_factory):
    """A base dir with two sft models: "d2" with context 256, and "long" with a context that takes minutes to fill."""
    base = tmp_path_factory.mktemp("served")
    (base / "tokenizer").symlink_to(pocket_base / "tokenizer")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(base))
        cpu, tokenizer = Compute(torch.device("cpu"), torch.float32), get_tokenizer()
        for tag, length in (("d2", CONTEXT), ("long", LONG + 1000)):
            save_checkpoint(checkpoint_dir("sft", tag), 7, chained_model(tokenizer, length), [], {}, cpu)
    return base


@pytest.fixture(scope="module")
def reference(served_base):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(served_base))
        return Reference(get_tokenizer())


# ---------------------------------------------------------------------------------------------------------------------
# Server processes


def eventually(condition, what, seconds=60):
    """Wait until `condition()` is truthy and return its value; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if result := condition():
            return result
        time.sleep(0.02)
    raise AssertionError(f"still not after {seconds} s: {what}")


@dataclasses.dataclass
class Server:
    process: subprocess.Popen
    port: int
    log: Path
    key: str = "none"
    refusals: list = dataclasses.field(default_factory=list)  # responses of /health and chat during loading

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    @cached_property
    def http(self):
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {self.key}"}, timeout=60)

    @cached_property
    def client(self):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0, timeout=60)

    def ready(self):
        assert self.process.poll() is None, f"the server ended\n{self.log.read_text()}"
        try:
            health = self.http.get("/health")
        except httpx.TransportError:
            return False
        if health.status_code != 200:
            self.refusals += [health, self.post(CHAT, {"messages": QUESTION})]
        return health.status_code == 200

    def post(self, path, body, **kw):
        """The response to `body`, sent as JSON unless it is bytes."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.http.post(path, content=content, headers={"Content-Type": "application/json"}, **kw)

    def chat(self, messages=QUESTION, **settings):
        """An answer from the openai client, greedy by default; fields the client does not know go into extra_body."""
        known = {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 24}
        return self.client.chat.completions.create(**known | settings)

    def text(self, messages=QUESTION, **settings):
        return self.chat(messages, **settings).choices[0].message.content

    def samples(self):
        families = text_string_to_metric_families(self.http.get("/metrics").text)
        return [sample for family in families for sample in family.samples]

    def metrics(self):
        """{name of a metric: its sum over all labels}; of the requests, only those for completions count."""
        sums = defaultdict(float)
        for sample in self.samples():
            if "completions" in sample.labels.get("endpoint", "completions"):
                sums[sample.name] += sample.value
        return sums

    def running(self, n):
        eventually(lambda: self.metrics()["nanochat_running_rows"] == n, f"nanochat_running_rows == {n}")

    def waiting(self, n):
        eventually(lambda: self.metrics()["nanochat_waiting_requests"] == n, f"nanochat_waiting_requests == {n}")

    def connect(self, body, path=CHAT):
        """A socket on which a request was sent and nothing was read yet."""
        data = json.dumps(body).encode()
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {self.key}\r\nContent-Length: {len(data)}\r\n"
        connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + data)
        return connection


@contextlib.contextmanager
def serving(base, *flags, key="none"):
    """A server with these flags that is ready. At the end of the context it gets SIGTERM and must exit cleanly."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    flags = ["-i", "sft", "--port", str(port), "--device-type=cpu", "--dtype=float32", *flags]
    env = os.environ | {"PYTHONPATH": str(ROOT), "NANOCHAT_BASE_DIR": str(base)}
    log = base / f"{port}.log"
    with open(log, "wb") as out:
        command = [sys.executable, "-m", "scripts.chat_web", *flags]
        process = subprocess.Popen(command, env=env, cwd=base, stdout=out, stderr=out, start_new_session=True)
    server = Server(process, port, log, key)
    try:
        eventually(server.ready, "/health is 200", seconds=120)
        yield server
        process.terminate()
        assert process.wait(60) in (0, -signal.SIGTERM), log.read_text()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def server(served_base):
    with serving(served_base, f"--max_rows={ROWS}") as server:
        yield server
        assert "Traceback" not in server.log.read_text()


@pytest.fixture(scope="module")
def guarded(served_base):
    """A server with the long model, one row and one place in the queue, an API key and a CORS origin."""
    flags = ["-g", "long", "--max_rows=1", "--max_queue=1", "--api_key=s3cret", "--cors", "https://chat.example"]
    with serving(served_base, *flags, key="s3cret") as server:
        yield server
        assert "Traceback" not in server.log.read_text()


def error_of(response, status, param=None):
    """The error in a response, which must have OpenAI's format and reveal no internals of the server."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert {"message", "type", "param", "code"} <= error.keys() and error["message"]
    for leak in ("Traceback", ".py", str(ROOT), sys.prefix, "/tmp"):
        assert leak not in response.text
    assert not re.search(r"0x[0-9a-f]{6}", response.text)
    if param:
        assert (error["param"] or "").startswith(param), error
    return error


def refused(server, status=400, param=None, path=CHAT, **body):
    """The error in the response to a request with the fields `body`."""
    prompt = {"messages": QUESTION} if path == CHAT else {"prompt": "Once"}
    return error_of(server.post(path, prompt | {"max_tokens": 4} | body), status, param)


def frames(response):
    """The JSON of a stream's events; the stream must be well formed and end with [DONE]."""
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
    *events, end = [e for e in response.text.split("\n\n") if e and not e.startswith(":")]
    assert end == "data: [DONE]" and response.text.endswith("\n\n")
    assert all(e.startswith("data: ") and "\n" not in e for e in events)
    return [json.loads(e[6:]) for e in events]


def joined(chunks):
    """{index: text} from the chunks of a stream."""
    texts = defaultdict(str)
    for choice in (c for chunk in chunks for c in chunk.choices):
        texts[choice.index] += choice.delta.content or ""
    return texts


# ---------------------------------------------------------------------------------------------------------------------
# Answers


def test_answers_equal_those_of_full_forward_passes(server, reference):
    assert server.text() == reference.text(QUESTION)
    turns = [*QUESTION, {"role": "assistant", "content": "Nobody."}, {"role": "user", "content": "And before?"}]
    assert server.text(turns) == reference.text(turns) != server.text()
    system = {"role": "system", "content": "Be brief."}
    assert server.text([system, *turns]) == reference.text([system, *turns])
    assert server.text([system | {"role": "developer"}, *turns]) == reference.text([system, *turns])
    parts = [{"type": "text", "text": "Who lives"}, {"type": "text", "text": "in the mill?"}]
    whole = [{"role": "user", "content": "Who lives\n\nin the mill?"}]
    assert server.text([{"role": "user", "content": parts}]) == reference.text(whole)


def test_the_fields_of_an_answer(server):
    before = int(time.time())
    answer = server.chat()
    assert answer.id.startswith("chatcmpl-") and answer.object == "chat.completion" and answer.model == MODEL
    assert before <= answer.created <= time.time() and answer.system_fingerprint
    (choice,) = answer.choices
    assert (choice.index, choice.message.role, choice.finish_reason) == (0, "assistant", "length")
    assert choice.logprobs is None and "tool_steps" not in choice.message.model_extra
    assert server.chat().id != answer.id


def test_usage_adds_up_and_max_tokens_is_respected(server, reference):
    for n in (1, 2, 40):
        answer = server.chat(max_tokens=n)
        usage = answer.usage
        assert (usage.completion_tokens, answer.choices[0].finish_reason) == (n, "length")
        assert usage.prompt_tokens == len(reference.prompt(QUESTION))
        assert usage.total_tokens == usage.prompt_tokens + n
    assert server.chat(max_completion_tokens=3, max_tokens=9).usage.completion_tokens == 3


def test_calculator_steps_are_returned_beside_the_content(server, reference):
    answer = server.chat(SUM)
    message, usage = answer.choices[0].message, answer.usage
    step = {"type": "calculator", "expression": "6*7", "result": "42", "position": 1}
    assert (message.content, message.tool_steps, answer.choices[0].finish_reason) == ("=!", [step], "stop")
    assert usage.completion_tokens == len("=<6*7><>!<") + len(reference.tokenizer.encode("42"))
    deltas = [c.choices[0].delta for c in server.chat(SUM, stream=True)]
    steps = [(i, d.tool_steps) for i, d in enumerate(deltas) if "tool_steps" in d.model_extra]
    ((at, streamed),) = steps
    assert streamed == [step]
    assert "".join(d.content or "" for d in deltas[:at]) == "=" and "".join(d.content or "" for d in deltas) == "=!"


def test_a_last_message_of_the_assistant_is_continued(server, reference):
    started = [*QUESTION, {"role": "assistant", "content": "It is the"}]
    flags = {"continue_final_message": True, "add_generation_prompt": True}  # unknown to this server, so ignored
    assert server.text(started) == reference.text(started) == server.text(started, extra_body=flags)


def test_a_repeated_prompt_is_cached_and_its_answer_the_same(server, reference):
    question = [{"role": "user", "content": "What does nobody else ask here?"}]
    first, second = server.chat(question), server.chat(question)
    cached = [a.usage.prompt_tokens_details.cached_tokens for a in (first, second)]
    assert cached[0] < cached[1] == first.usage.prompt_tokens - 1
    assert first.choices[0].message.content == second.choices[0].message.content == reference.text(question)


def test_completions_continue_plain_text(server, reference):
    tokenizer = reference.tokenizer
    ids = [tokenizer.get_bos_token_id(), *tokenizer.encode("Once upon a time")]
    expected = tokenizer.decode(reference.greedy(ids, 16))
    ask = server.client.completions.create
    answer = ask(model=MODEL, prompt="Once upon a time", temperature=0)
    choice = answer.choices[0]
    assert (answer.object, choice.text, choice.finish_reason) == ("text_completion", expected, "length")
    assert ask(model=MODEL, prompt=ids, temperature=0).choices[0].text == expected
    echoed = ask(model=MODEL, prompt="Once upon a time", temperature=0, echo=True).choices[0]
    assert echoed.text.endswith(f"Once upon a time{expected}")
    many = ask(model=MODEL, prompt=[ids, ids[:3], ids[:-1]], temperature=0, n=2, max_tokens=5)
    assert [c.index for c in many.choices] == list(range(6))
    assert many.choices[0].text == many.choices[1].text == tokenizer.decode(reference.greedy(ids, 5))
    assert many.choices[3].text == tokenizer.decode(reference.greedy(ids[:3], 5))
    assert (many.usage.prompt_tokens, many.usage.completion_tokens) == (2 * len(ids) + 2, 30)
    chunks = list(ask(model=MODEL, prompt=ids, temperature=0, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]


def test_a_stream_is_for_one_prompt(server):
    with pytest.raises(openai.BadRequestError, match="one prompt"):
        server.client.completions.create(model=MODEL, prompt=["Once upon a time", "Then"], stream=True)


def test_every_generated_token_of_a_completion_has_logprobs(server, reference):
    """Also special tokens: clients cut off the last entry, which is the generated token."""
    tokenizer = reference.tokenizer
    end = tokenizer.encode_special("<|assistant_end|>")
    bias = {str(end): 100}
    body = dict(model=MODEL, prompt="The mill", temperature=0, max_tokens=1, logprobs=1, echo=True, logit_bias=bias)
    choice = server.client.completions.create(**body).choices[0]
    assert choice.finish_reason == "stop"
    n = len(tokenizer.encode("The mill"))
    logprobs = choice.logprobs
    assert [len(x) for x in (logprobs.tokens, logprobs.token_logprobs, logprobs.text_offset)] == [n + 1] * 3
    assert logprobs.tokens[-1] == "<|assistant_end|>"
    assert logprobs.text_offset[-1] == len("The mill")


def test_a_stream_of_logprobs_equals_the_whole_answer(server):
    body = dict(model=MODEL, prompt="Once upon \U0001f98a a time", temperature=0, max_tokens=12, logprobs=2, echo=True)
    whole = server.client.completions.create(**body).choices[0]
    chunks = [chunk.choices[0] for chunk in server.client.completions.create(**body, stream=True)]
    assert "".join(chunk.text for chunk in chunks) == whole.text
    for field in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        streamed = [entry for chunk in chunks if chunk.logprobs for entry in getattr(chunk.logprobs, field)]
        assert streamed == getattr(whole.logprobs, field)
    for token, offset in zip(whole.logprobs.tokens, whole.logprobs.text_offset, strict=True):
        assert token.startswith("bytes:") or whole.text[offset:].startswith(token)


def test_an_echo_has_logprobs_of_the_tokens_that_were_sent(server, reference):
    """The server adds <|bos|> to text. It is an entry of its own only if the client sent it, as a token or by name."""
    tokenizer, body = reference.tokenizer, dict(model=MODEL, max_tokens=0, logprobs=1, echo=True)
    ids = tokenizer.encode("The mill", prepend="<|bos|>")
    prompts = ["The mill", "<|bos|>The mill"]
    answers = [server.client.completions.create(prompt=prompt, **body) for prompt in (*prompts, ids)]
    assert {(a.choices[0].text, a.usage.prompt_tokens) for a in answers} == {("The mill", len(ids))}
    marked = [ids[0], tokenizer.encode_special("<|user_start|>"), *ids[1:]]
    choice = server.client.completions.create(prompt=marked, **body).choices[0]
    assert (choice.text, choice.logprobs.text_offset[:4]) == ("The mill", [0, 0, 0, len(choice.logprobs.tokens[2])])
    plain, named, by_id = (answer.choices[0].logprobs for answer in answers)
    assert named == by_id and named.tokens == ["<|bos|>", *plain.tokens] and "".join(plain.tokens) == "The mill"
    assert named.token_logprobs == [None, *plain.token_logprobs] and None not in plain.token_logprobs


def test_lm_eval_reads_the_likelihood_of_a_continuation(server, reference):
    # lm-eval's local-completions model sends context and continuation as ids, by default without <|bos|>, and ignores
    # the generated token.
    tokenizer = reference.tokenizer
    rows = [[*tokenizer.encode("The mill is old. "), *tokenizer.encode(c)] for c in ("It is red.", "Nobody, really")]
    body = dict(model=MODEL, prompt=rows, temperature=0, max_tokens=1, logprobs=1, seed=1234, echo=True)
    answer = server.client.completions.create(**body)
    for row, choice in zip(rows, sorted(answer.choices, key=lambda c: c.index), strict=True):
        logprobs = choice.logprobs
        assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == len(row) + 1
        assert "".join(logprobs.tokens[: len(row)]) == tokenizer.decode(row)
        lengths = [len(token) for token in logprobs.tokens[: len(row)]]
        assert logprobs.text_offset[: len(row) + 1] == [sum(lengths[:i]) for i in range(len(row) + 1)]
        expected = reference.logits([tokenizer.get_bos_token_id(), *row]).log_softmax(-1)
        for i, token in enumerate(row):
            assert logprobs.token_logprobs[i] == pytest.approx(expected[i, token].item(), abs=1e-3)
            assert max(logprobs.top_logprobs[i].values()) == pytest.approx(expected[i].max().item(), abs=1e-3)
    nothing = server.client.completions.create(**body | {"max_tokens": 0})
    assert nothing.usage.completion_tokens == 0 and nothing.choices[0].text == tokenizer.decode(rows[0])
    assert nothing.choices[0].logprobs.token_logprobs == pytest.approx(
        sorted(answer.choices, key=lambda c: c.index)[0].logprobs.token_logprobs[:-1], abs=1e-3
    )


# ---------------------------------------------------------------------------------------------------------------------
# Streams


def test_only_the_first_chunk_has_the_role(server):
    first, *rest = server.chat(stream=True)
    assert first.object == "chat.completion.chunk"
    assert (first.choices[0].delta.role, first.choices[0].delta.content or "") == ("assistant", "")
    assert rest and all(c.choices[0].delta.role is None for c in rest)


@pytest.mark.parametrize("messages, reason", [(QUESTION, "length"), (FOX, "stop")])
def test_chunks_share_id_and_model_and_only_the_last_has_a_finish_reason(server, messages, reason):
    chunks = list(server.chat(messages, stream=True))
    assert len({(c.id, c.model, c.created, c.object) for c in chunks}) == 1 and chunks[0].model == MODEL
    assert [c.choices[0].finish_reason for c in chunks] == [None] * (len(chunks) - 1) + [reason]
    assert not chunks[-1].choices[0].delta.content
    assert all(c.choices[0].delta.content for c in chunks[1:-1])  # no empty pieces


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 1, "seed": 3},
        {"temperature": 1.5, "seed": 4, "top_p": 0.9, "n": 3, "max_tokens": 60},
        {"messages": SUM},
        {"messages": FOX},
        {"stop": ["e", "z"], "temperature": 1, "seed": 5},
        {"frequency_penalty": 0.5, "max_tokens": 100},
    ],
    ids=str,
)
def test_a_joined_stream_equals_the_whole_answer(server, settings):
    answer = server.chat(**settings)
    chunks = list(server.chat(**settings, stream=True))
    assert dict(joined(chunks)) == {c.index: c.message.content for c in answer.choices}
    ends = {c.index: c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason}
    assert ends == {c.index: c.finish_reason for c in answer.choices}


def test_usage_comes_in_an_extra_chunk_on_request(server):
    *chunks, last = server.chat(stream=True, stream_options={"include_usage": True})
    assert last.choices == [] and last.usage.completion_tokens == 24
    assert last.usage.total_tokens == last.usage.prompt_tokens + 24
    assert all(c.choices and c.usage is None and "usage" in c.model_fields_set for c in chunks)
    for options in (None, {"include_usage": False}, {"include_usage": None}):
        assert all(c.choices and c.usage is None for c in server.chat(stream=True, stream_options=options))
    for options in ({"include_usage": True}, {"include_usage": None}, {}):
        for stream in ({}, {"stream": False}):
            refused(server, param="stream_options", stream_options=options, **stream)


def test_the_bytes_of_a_stream(server):
    response = server.post(CHAT, {"messages": FOX, "max_tokens": 8, "temperature": 0, "stream": True})
    assert frames(response)[-1]["choices"][0]["finish_reason"] == "stop"
    assert response.headers["cache-control"].startswith("no-cache")
    response = server.post(TEXT, {"prompt": "Once", "max_tokens": 8, "stream": True})
    assert {frame["object"] for frame in frames(response)} == {"text_completion"}


def test_incomplete_characters_are_held_back_until_the_answer_ends(server):
    for n, expected in ((8, "🦊"), (2, "\ufffd")):  # cut off after two of its four bytes
        assert server.text(FOX, max_tokens=n) == expected
        pieces = [c.choices[0].delta.content or "" for c in server.chat(FOX, max_tokens=n, stream=True)]
        assert [piece for piece in pieces if piece] == [expected]
    answer = server.chat(FOX, max_tokens=4, logprobs=True)
    assert [t.bytes for t in answer.choices[0].logprobs.content] == [[b] for b in "🦊".encode()]


def boundaries(reference, n=24):
    """(question, its greedy answer, [strings of two characters that straddle the boundary of two tokens])."""
    for word in "mill barn house tower castle garden forest".split():
        question = [{"role": "user", "content": f"Who lives in the old {word}?"}]
        tokens = reference.greedy(reference.prompt(question), n)
        pieces = [reference.tokenizer.decode([token]) for token in tokens]
        text, found = "".join(pieces), []
        for i in range(3, n - 1):
            stop = pieces[i][-1:] + pieces[i + 1][:1]
            if text == reference.tokenizer.decode(tokens) and text.find(stop) == len("".join(pieces[: i + 1])) - 1:
                found.append(stop)
        if found:  # not so if a character of the random model's answer consists of several tokens
            return question, text, found
    raise AssertionError("no question has such an answer")


def test_stop_strings_are_cut_off_wherever_tokens_end(server, reference):
    question, text, stops = boundaries(reference)
    for stop in [*stops[:3], [stops[-1], stops[0], "never"], text[5:12]]:
        at = min(text.find(s) for s in ([stop] if isinstance(stop, str) else stop) if s in text)
        answer = server.chat(question, stop=stop)
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (text[:at], "stop")
        assert joined(server.chat(question, stop=stop, stream=True))[0] == text[:at]
    unfinished = text[-2:] + "\n\n\n"  # the answer ends in a prefix of the stop string
    whole = joined(server.chat(question, stop=unfinished, stream=True))[0]
    assert server.text(question, stop=unfinished) == whole == text
    stopped = server.client.completions.create(model=MODEL, prompt="Once", temperature=0, stop=text[3])
    assert text[3] not in stopped.choices[0].text


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


def test_logprobs_equal_those_of_full_forward_passes(server, reference):
    prompt = reference.prompt(QUESTION)
    tokens = reference.greedy(prompt, 24)
    expected = reference.logits(prompt + tokens)[len(prompt) - 1 : -1].log_softmax(-1)
    for top in (0, 5, 20):
        answer = server.chat(logprobs=True, top_logprobs=top).choices[0]
        streamed = [t for c in server.chat(logprobs=True, top_logprobs=top, stream=True) for t in logprobs_of(c)]
        for got in (answer.logprobs.content, streamed):
            assert b"".join(bytes(t.bytes) for t in got).decode(errors="replace") == answer.message.content
            for t, token, row in zip(got, tokens, expected, strict=True):
                assert t.token == reference.tokenizer.decode([token])
                assert t.logprob == pytest.approx(row[token].item(), abs=1e-3) and t.logprob <= 0
                likeliest = row.topk(top).values.tolist()
                assert [o.logprob for o in t.top_logprobs] == pytest.approx(likeliest, abs=1e-3)
    assert server.chat(logprobs=False).choices[0].logprobs is None
    refused(server, param="top_logprobs", logprobs=True, top_logprobs=21)
    refused(server, param="top_logprobs", logprobs=False, top_logprobs=1)
    assert server.chat(logprobs=False, top_logprobs=0).choices[0].logprobs is None
    assert server.text() == reference.text(QUESTION)


def test_an_inspection_equals_a_full_forward_pass(server, reference):
    assistant = [{"type": "text", "text": "It is "}, {"type": "python", "text": "1+1"}]
    messages = [*QUESTION, {"role": "assistant", "content": [*assistant, {"type": "python_output", "text": "2"}]}]
    ids, _ = reference.tokenizer.render_conversation({"messages": messages})
    expected = reference.logits(ids).log_softmax(-1)
    seen = server.post("/v1/inspect", {"messages": messages, "position": 3, "layer": 1}).raise_for_status().json()
    assert (seen["model"], seen["position"], [token["id"] for token in seen["tokens"]]) == (MODEL, 3, ids)
    found = [token["logprob"] for token in seen["tokens"]]
    assert found == [None, *(pytest.approx(row[i].item(), abs=1e-3) for row, i in zip(expected, ids[1:], strict=False))]
    assert seen["logprobs"] == pytest.approx(expected[3].sort(descending=True).values.tolist(), abs=1e-3)
    assert [sum(row) for row in seen["attention"]] == [pytest.approx(1, abs=1e-4)] * len(ids)
    # The text goes on as an answer does, and may have many tokens: the reply is longer than the buffer of a pipe.
    body = {"prompt": reference.prompt(QUESTION), "temperature": 0, "max_tokens": 24}
    for _ in range(5):
        longer = server.post("/v1/inspect", body).raise_for_status().json()
        assert [token["id"] for token in longer["tokens"]][len(body["prompt"]) :] == reference.greedy(
            body["prompt"], 24
        )
    for body, message in [
        ({}, "give either messages or a prompt"),
        ({"prompt": "a", "messages": QUESTION}, "give either messages or a prompt"),
        ({"prompt": "a", "layer": 2}, "layer=2: expected 0 to 1"),
        ({"prompt": "a", "position": 9}, "position=9: expected 0 to"),
        ({"messages": [{"role": "assistant"}]}, "message 1 of 1 has the role 'assistant'"),
        ({"prompt": "a " * 500}, "maximum context length is 256 tokens"),
    ]:
        assert message in error_of(server.post("/v1/inspect", body), 400)["message"]


def test_the_page_gets_the_tokenizer(server, reference):
    data = server.http.get("/v1/tokenizer").raise_for_status().json()
    assert data["special"] == reference.tokenizer.special_tokens
    assert {i: t.encode("latin-1") for i, t in enumerate(data["tokens"]) if t is not None} == {
        i: token for token, i in reference.tokenizer.ranks.items()
    }


def logprobs_of(chunk):
    return (chunk.choices[0].logprobs and chunk.choices[0].logprobs.content) or []


def test_n_samples_share_one_prompt(server):
    settings = dict(n=2, temperature=1, seed=11, max_tokens=160)
    answer = server.chat(**settings)
    texts = {c.index: c.message.content for c in answer.choices}
    assert [*texts] == [0, 1] and texts[0] != texts[1]
    assert answer.usage.prompt_tokens == server.chat().usage.prompt_tokens and answer.usage.completion_tokens == 320
    chunks = list(server.chat(**settings, stream=True))
    assert joined(chunks) == texts
    order = [c.index for chunk in chunks for c in chunk.choices if c.delta.content]
    assert order != sorted(order)  # the samples are generated side by side
    assert len(server.chat(n=16).choices) == 16  # more than the batch has rows


def test_a_seed_repeats_an_answer_and_another_changes_it(server):
    settings = dict(temperature=1, max_tokens=40, extra_body={"top_k": 0})
    assert server.text(seed=1, **settings) == server.text(seed=1, **settings) != server.text(seed=2, **settings)
    assert server.text(**settings) != server.text(**settings)  # without a seed


@pytest.mark.parametrize("extreme", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1}], ids=str)
def test_a_filter_at_its_extreme_keeps_only_the_likeliest_token(server, reference, extreme):
    assert server.text(temperature=2, extra_body=extreme) == reference.text(QUESTION)


@pytest.mark.parametrize("temperature", [5e-324, 2e-5, 1, 2])
def test_settings_at_the_ends_of_their_ranges_are_answered(server, temperature):
    for field, values in {
        "top_p": [5e-324, 1e-300, 1e-30, 1],
        "min_p": [0, 5e-324, 1],
        "top_k": [0, 1, 10**6],
        "repetition_penalty": [5e-324, 1e-300, 1e-30, 2],
        "frequency_penalty": [-2, 2],
        "presence_penalty": [-2, 2],
        "seed": [0, -1, 2**63 - 1],
        "logit_bias": [{}, {str(i): -100 for i in range(600)}, {"5": 100, "6": 100}],
    }.items():
        for value in values:
            answer = server.chat(temperature=temperature, max_tokens=8, extra_body={field: value})
            assert answer.usage.completion_tokens in range(1, 9), (field, value)


def test_penalties_change_the_logits_as_published(server, reference):
    def by_count(logits, answer):  # OpenAI's penalties count the answer only
        for token, n in Counter(answer).items():
            logits[token] -= 1.5 * n + 0.5
        return logits

    def by_division(logits, answer):  # CTRL's penalty covers prompt and answer
        seen = torch.tensor(sorted({*answer, *reference.prompt(QUESTION)}))
        logits[seen] = torch.where(logits[seen] > 0, logits[seen] / 1.8, logits[seen] * 1.8)
        return logits

    plain = server.text(max_tokens=40)
    for settings, adjust in (
        ({"frequency_penalty": 1.5, "presence_penalty": 0.5}, by_count),
        ({"repetition_penalty": 1.8}, by_division),
    ):
        assert server.text(max_tokens=40, extra_body=settings) == reference.text(QUESTION, 40, adjust=adjust) != plain


def test_logit_bias_bans_and_forces_tokens(server, reference):
    first = reference.greedy(reference.prompt(QUESTION), 1)[0]
    vocab = reference.tokenizer.get_vocab_size()

    def ban(logits, answer):
        logits[first] = -math.inf
        return logits

    assert server.text(logit_bias={str(first): -100}) == reference.text(QUESTION, adjust=ban)
    forced = reference.tokenizer.ranks[b"z"]
    assert server.text(logit_bias={str(forced): 100}, max_tokens=5) == "zzzzz"
    for bias in ({str(vocab): 1}, {"-1": 1}):
        message = refused(server, param="logit_bias", logit_bias=bias)["message"]
        assert all(re.search(rf"(?<!\d){n}(?!\d)", message) for n in (*bias, vocab))
    for bias in ({"x": 1}, {"5": 101}, {"5": "1e"}, [5]):
        refused(server, param="logit_bias", logit_bias=bias)


def test_stop_tokens_end_the_answer_and_must_exist(server, reference):
    tokens = reference.greedy(reference.prompt(QUESTION), 24)
    answer = server.chat(extra_body={"stop_token_ids": [tokens[6]]}).choices[0]
    before = reference.tokenizer.decode(tokens[: tokens.index(tokens[6])])
    assert (answer.message.content, answer.finish_reason) == (before, "stop")
    vocab = reference.tokenizer.get_vocab_size()
    for token in (vocab, -1, 10**12):
        message = refused(server, param="stop_token_ids", stop_token_ids=[token])["message"]
        assert all(re.search(rf"(?<!\d){n}(?!\d)", message.replace(",", "")) for n in (token, vocab))
    assert server.text(stop=[], extra_body={"stop_token_ids": []}) == reference.text(QUESTION)
    for stop in ("", [""], list("abcde"), [1], {"a": 1}):
        refused(server, param="stop", stop=stop)


# ---------------------------------------------------------------------------------------------------------------------
# Invalid requests


@pytest.mark.parametrize(
    "messages",
    [
        None, "string", [], [123], [{}], [None], [[]], [{"role": 123, "content": "x"}], [{"role": "user"}],
        [{"role": "user", "content": 123}], [{"role": "user", "content": None}], [{"content": "x"}],
        [{"role": "robot", "content": "x"}], [*QUESTION, {}], [*QUESTION, *QUESTION],
        [{"role": "assistant", "content": "x"}], [{"role": "system", "content": "x"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": [{"type": "text"}]}], [{"role": "user", "content": ["x"]}],
    ],
    ids=str,
)  # fmt: skip
def test_invalid_messages(server, messages):
    error = refused(server, param="messages", messages=messages)
    assert error["type"] == "invalid_request_error"
    refused(server, param="messages", messages=messages, stream=True)


def test_bodies_that_are_not_a_json_object(server):
    for body in (b"", b"[]", b"3", b"null", b'"x"', b"{", b"\xff\xfe", b"{}x", b"[" * 100_000, b'{"a":' * 50_000):
        error_of(server.post(CHAT, body), 400)
        error_of(server.post(TEXT, body), 400)
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        body = json.dumps({"messages": QUESTION, "max_tokens": 1})
        response = server.http.post(CHAT, content=body, headers={"Content-Type": kind})
        assert response.status_code in (400, 415) and error_of(response, response.status_code)


def test_settings_out_of_range_name_the_parameter(server):
    wrong = []
    for path, prompt in ((CHAT, {"messages": QUESTION}), (TEXT, {"prompt": "Once"})):
        for field, values in {
            "max_tokens": [-1, 10**30, 1.5, "ten", math.nan, True, *([0] if path == CHAT else [])],
            "temperature": [2.1, -0.1, "hot", math.nan, math.inf, [1]],
            "top_p": [0, 1.01, -1, math.nan],
            "top_k": [-1, 1.5, "x"],
            "min_p": [-0.1, 1.1],
            "repetition_penalty": [0, 2.1, -1],
            "frequency_penalty": [2.1, -2.1],
            "presence_penalty": [2.1, "x"],
            "n": [0, 17, 1000, -1, 1.5],
            "seed": [1.5, "x"],
            "stream": [3, "maybe"],
            **({"top_logprobs": [-1, 21]} if path == CHAT else {"logprobs": [-1, 21], "echo": ["maybe"]}),
        }.items():
            for value in values:
                response = server.post(path, prompt | {"max_tokens": 4, field: value})
                error = response.json().get("error", {})
                kind = response.status_code, error.get("type"), error.get("param")
                if kind != (400, "invalid_request_error", field):
                    wrong.append((path, field, value, response.status_code, error))
    assert not wrong
    refused(server, param="max_completion_tokens", max_completion_tokens=0)


def test_null_and_unknown_fields_have_no_effect(server, reference):
    nulls = "max_completion_tokens top_p top_k min_p repetition_penalty frequency_penalty presence_penalty seed n stop"
    more = "stop_token_ids logit_bias logprobs top_logprobs stream stream_options response_format tools model"
    body = {"messages": QUESTION, "temperature": 0, "max_tokens": 24} | dict.fromkeys(f"{nulls} {more}".split())
    body |= {"user": "me", "store": True, "metadata": {"a": "b"}, "parallel_tool_calls": 3, "unheard_of": [{}]}
    for extra in (
        {}, {"tools": [], "tool_choice": "auto"}, {"functions": [], "reasoning_effort": "none", "modalities": ["text"]},
        {"tools": TOOLS, "tool_choice": "none", "best_of": 1, "suffix": None, "audio": None},
    ):  # fmt: skip
        answer = server.post(CHAT, body | extra).raise_for_status().json()
        assert answer["choices"][0]["message"]["content"] == reference.text(QUESTION)


@pytest.mark.parametrize(
    "field, value",
    [
        ("tools", TOOLS), ("tool_choice", "required"), ("functions", [{"name": "f"}]), ("best_of", 3), ("suffix", "x"),
        ("function_call", {"name": "f"}), ("modalities", ["text", "audio"]), ("reasoning_effort", "high"),
        ("prediction", {"type": "content", "content": "x"}), ("audio", {"voice": "x"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_parameters_without_effect_are_refused_by_name(server, field, value):
    for path in (CHAT, TEXT):
        error = refused(server, param=field, path=path, **{field: value})
        assert field in error["message"] and "not supported" in error["message"]
        assert error["code"] == "unsupported_parameter"


def test_roles_and_parts_are_read_as_the_official_clients_send_them(server, reference):
    def parts(*texts):
        return [{"type": "text", "text": text} for text in texts]

    plain = [{"role": "system", "content": "Be brief.\n\nAnd kind."}, *QUESTION]
    official = [{"role": "developer", "content": parts("Be brief.", "And kind.")}]
    official += [{"role": "user", "content": parts(QUESTION[0]["content"]), "name": "ann"}]
    assert server.text(official) == server.text(plain) == reference.text(plain)
    history = [*QUESTION, {"role": "assistant", "content": ""}, *QUESTION]
    null = [*QUESTION, {"role": "assistant", "content": None, "tool_calls": None, "refusal": None}, *QUESTION]
    assert server.text(null) == server.text(history)
    half_emoji = b'{"messages": [{"role": "user", "content": "the \\ud83d fox"}], "temperature": 0, "max_tokens": 24}'
    answer = server.post(CHAT, half_emoji).json()["choices"][0]["message"]["content"]
    assert answer == server.text([{"role": "user", "content": "the ? fox"}])


@pytest.mark.parametrize(
    "body, message",
    [
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
         "messages[0].content: part 0 has the type 'image_url'; only parts of the type 'text' are supported"),
        ({"messages": [*QUESTION, {"role": "tool", "content": "x"}]}, "messages[1].role: "),
        ({"messages": [*QUESTION, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]},
         "messages[1]: tool_calls="),
        ({"messages": [*QUESTION, {"role": "user", "content": None}]}, "messages[1].content: "),
        ({"stop": list("abcde")}, "stop: 5 stop strings are too many, the limit is 4"),
        ({"stop": ["a", 1]}, "stop: expected a string, or a list of strings"),
        ({"response_format": {"type": "json_object"}}, "response_format="),
        ({"messages": ["x"]}, "messages[0]: expected a JSON object"),
        ({"messages": []}, "messages: expected at least one element"),
        ({"stream_options": 1}, "stream_options: expected a JSON object"),
        ({"logit_bias": [1]}, "logit_bias: expected a JSON object"),
        (b'{"messages": [,]}', "the body is not valid JSON: "),
        (b'{"messages": "abc', "the body is not valid JSON: Unterminated string starting at character 13"),
        (b"\xff\xfe", "the body is not"),
        (b"", "the body is not a JSON object"),
        (b"[]", "the body is not a JSON object"),
        (b'{"messages": "\xe9"}', "the body cannot be read as JSON: 'utf-8' codec can't decode byte 0xe9"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_errors_say_what_is_wrong(server, body, message):
    body = {"messages": QUESTION} | body if isinstance(body, dict) else body
    error = error_of(server.post(CHAT, body), 400)
    assert error["message"].startswith(message) and "constrained" not in error["message"]


def test_bodies_of_many_levels_are_answered_or_refused(server):
    """Between those that json refuses to read and those that fit, there are some that it cannot write again."""
    statuses = set()
    for depth in range(800, 1040, 5):
        body = b'{"prompt": "Once", "max_tokens": 1, "user": ' + b"[" * depth + b"]" * depth + b"}"
        statuses.add(server.post(TEXT, body).status_code)
    assert statuses == {200, 400}


def test_errors_name_the_content_type_and_the_routes(server):
    for headers in ({}, {"Content-Type": "text/plain"}):
        response = server.http.post(CHAT, content=json.dumps({"messages": QUESTION}), headers=headers)
        assert "Content-Type: application/json" in error_of(response, 400)["message"]
    assert "/v1/chat/completions" in error_of(server.post("/v1/responses", {"input": "hi"}), 404)["message"]


def test_plain_text_is_the_only_response_format(server, reference):
    assert server.text(response_format={"type": "text"}) == reference.text(QUESTION)
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    for response_format in ({"type": "json_object"}, schema, {"type": "xml"}, {}, "text"):
        refused(server, param="response_format", response_format=response_format)


def test_the_error_for_a_prompt_beyond_the_context_has_its_length(server, reference):
    messages = [{"role": "user", "content": "mill " * 300}]
    many = [{"role": role, "content": "x" * 70} for _ in range(300) for role in ("user", "assistant")] + QUESTION
    for too_long in (many, [{"role": "user", "content": "x" * 9000}]):
        assert refused(server, messages=too_long)["code"] == "context_length_exceeded"
    for stream in (False, True):
        error = refused(server, messages=messages, stream=stream)
        assert (error["type"], error["code"]) == ("exceed_context_size_error", "context_length_exceeded")
        assert (error["n_prompt_tokens"], error["n_ctx"]) == (len(reference.prompt(messages)), CONTEXT)
    assert refused(server, path=TEXT, prompt=[5] * 400)["n_prompt_tokens"] == 401
    answer = server.chat(max_tokens=openai.omit)
    assert (answer.usage.total_tokens, answer.choices[0].finish_reason) == (CONTEXT, "length")
    assert server.chat(max_tokens=CONTEXT).usage.total_tokens == CONTEXT


def test_truncation_leaves_out_the_oldest_turns(served_base, reference):
    def conversation(n_turns, n_chars):
        question, answer = "why ".ljust(n_chars, "x"), "so".ljust(n_chars, "y")
        turns = [{"role": role, "content": text} for role, text in (("user", question), ("assistant", answer))]
        return turns * n_turns + QUESTION

    def request(messages, room):
        """The prompt of `room` tokens or less that begins with the oldest possible question."""
        prompts = (reference.prompt(messages[i:]) for i in reversed(range(0, len(messages), 2)))
        return list(itertools.takewhile(lambda prompt: len(prompt) <= room, prompts))[-1]

    with serving(served_base, "--overflow=truncate") as server:
        for messages in (conversation(600, 20), conversation(20, 1000), conversation(600, 3)):
            answer = server.chat(messages)
            prompt = request(messages, CONTEXT - 24)
            assert answer.usage.prompt_tokens == len(prompt)
            assert answer.choices[0].message.content == reference.tokenizer.decode(reference.greedy(prompt, 24))
        assert server.chat([{"role": "user", "content": "mill " * 8000}]).usage.prompt_tokens == CONTEXT - 24
        # A last message of the assistant is continued whole: older turns make room for it and for the answer.
        messages = [*conversation(30, 20), {"role": "assistant", "content": "one two " * 10}]
        prompt, usage = request(messages, CONTEXT - 100), server.chat(messages, max_tokens=100).usage
        assert (usage.prompt_tokens, usage.completion_tokens) == (len(prompt), 100)
        assert (
            refused(server, messages=[*QUESTION, {"role": "assistant", "content": "mill " * 300}])["n_ctx"] == CONTEXT
        )


@pytest.mark.parametrize(
    "prompt", [None, 5, {}, [], [[]], [""], [1, "a"], [[1], "a"], [600], [-1], [1.5], [[10**12]]], ids=str
)
def test_invalid_prompts(server, prompt):
    if prompt == [""]:  # <|bos|> alone is a valid prompt
        assert server.post(TEXT, {"prompt": prompt}).status_code == 200
    else:
        refused(server, param="prompt", path=TEXT, prompt=prompt)


def test_random_bodies_never_cause_a_server_error(server, reference):
    odd = [None, True, 0, -1, 1.5, 10**30, 1e308, math.nan, "", "x", "\ud800", "\0", [], {}, [None], [[[]]]]
    odd.append({"a": [{}]})
    fields = (
        "messages prompt model max_tokens max_completion_tokens temperature top_p top_k min_p repetition_penalty n "
        "frequency_penalty presence_penalty seed stop stop_token_ids logit_bias logprobs top_logprobs stream tools "
        "stream_options response_format user metadata echo suffix best_of"
    ).split()
    rng, statuses = random.Random(0), Counter()
    bodies = [{field: value} for field in fields for value in rng.sample(odd, 6)]
    bodies += [{field: rng.choice(odd) for field in rng.sample(fields, 3)} for _ in range(30)]
    bodies += [{"messages": [QUESTION[0] | {k: v}]} for k in ("role", "content") for v in odd]
    bodies += [{"messages": [{"role": "user", "content": [{"type": "text", "text": v}]}]} for v in odd]
    bodies += [{"logit_bias": {k: 1}} for k in ("", "x", "\ud800", "\0", "1e3", "٣", "9" * 5000)]
    bodies += [{k: {"5": v}} for k in ("logit_bias", "stream_options") for v in odd]
    for i, body in enumerate(bodies):
        path, prompt = ((CHAT, {"messages": QUESTION}), (TEXT, {"prompt": "Once"}))[i % 3 == 0]
        response = server.post(path, prompt | {"max_tokens": 1} | body)
        assert response.status_code in (200, 400, 404), (path, body, response.text)
        statuses[response.status_code] += 1
        if response.status_code != 200:
            error_of(response, response.status_code)
    assert statuses[200] > 50 and statuses[400] > 50
    assert server.text() == reference.text(QUESTION)


def test_malformed_and_truncated_requests_do_no_harm(server, reference):
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    for payload in (
        b"\x16\x03\x01\x02\x00\x01", b"GET\r\n\r\n", b"\0" * 1000, head, head + b"Content-Length: 100\r\n\r\n{",
        head + b"Content-Length: -5\r\n\r\n", head + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n",
    ):  # fmt: skip
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
            connection.sendall(payload)
    assert server.text() == reference.text(QUESTION)


def test_a_body_too_large_is_refused(server):
    error_of(server.post(CHAT, {"messages": QUESTION, "user": "x" * 2**23}), 413)
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += "Content-Length: {}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(head.format(10**12).encode())  # without any of the body
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


def test_errors_of_routes_and_models(server):
    assert error_of(server.http.get("/v1/nothing"), 404)["type"] == "not_found_error"
    error_of(server.http.get(CHAT), 405)
    error_of(server.http.post("/v1/models"), 405)
    for response in (server.post(CHAT, {"messages": QUESTION, "model": "gpt-7"}), server.http.get("/v1/models/gpt-7")):
        assert error_of(response, 404)["type"] == "not_found_error" and "gpt-7" in response.text
    with pytest.raises(openai.NotFoundError):
        server.chat(model="gpt-7")


# ---------------------------------------------------------------------------------------------------------------------
# Other routes


def test_models_are_listed(server):
    (model,) = server.client.models.list().data
    assert (model.id, model.object, model.owned_by, model.context_length) == (MODEL, "model", "nanochat", CONTEXT)
    assert isinstance(model.created, int) and server.client.models.retrieve(MODEL) == model
    assert server.http.get("/models").json() == server.http.get("/v1/models").json()


def test_routes_work_without_the_prefix_v1(server):
    for path, prompt in ((CHAT, {"messages": QUESTION}), (TEXT, {"prompt": "Once"})):
        body = prompt | {"temperature": 0, "max_tokens": 9}
        answers = [server.post(p, body).raise_for_status().json() for p in (path, path.removeprefix("/v1"))]
        assert answers[0]["choices"] == answers[1]["choices"]


def test_head_and_final_slashes(server):
    for path in ("/", "/health", "/v1/models", "/logo.svg"):
        answers = [server.http.request(method, path) for method in ("GET", "HEAD")]
        assert [response.status_code for response in answers] == [200, 200]
        assert answers[1].content == b""
        assert answers[0].headers["content-type"] == answers[1].headers["content-type"]
    assert server.http.get("/v1/models/").json() == server.http.get("/v1/models").json()
    body = {"messages": QUESTION, "max_tokens": 1}
    assert server.post(f"{CHAT}/", body).status_code == 200


def test_health_and_stats(server):
    health = server.http.get("/health").json()
    assert health.items() >= {"status": "ok", "ready": True, "num_gpus": 1, "available_workers": 1}.items()
    stats = server.http.get("/stats").json()
    assert (stats["total_workers"], stats["available_workers"], stats["busy_workers"]) == (1, 1, 0)
    (worker,) = stats["workers"]
    assert (worker["device"], worker["rows"], worker["waiting"]) == ("cpu", 0, 0)
    assert {"gpu_id", "cached_tokens"} <= worker.keys()


def test_the_page_may_run_its_own_script_and_nothing_else(server):
    page = server.http.get("/")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    policy = dict(d.strip().split(" ", 1) for d in page.headers["content-security-policy"].split(";") if d.strip())
    for tag in ("script", "style"):
        (inline,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page.text, re.S)
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    for directive in ("default-src", "base-uri", "form-action", "frame-ancestors"):
        assert policy[directive] == "'none'"
    assert (policy["connect-src"], policy["img-src"]) == ("'self'", "'self' data:")
    assert server.http.get("/logo.svg").headers["content-type"].startswith("image/svg+xml")


def test_request_ids_are_echoed_or_generated(server):
    echoed = server.http.get("/health", headers={"X-Request-Id": "abc-123"})
    made = [server.http.get("/health").headers["x-request-id"] for _ in range(2)]
    assert echoed.headers["x-request-id"] == "abc-123" and made[0] and made[0] != made[1]
    stream = server.post(CHAT, {"messages": QUESTION, "max_tokens": 1, "stream": True})
    assert stream.headers["x-request-id"] and server.http.get("/nothing").headers["x-request-id"]
    evil = server.http.get("/health", headers={"X-Request-Id": ("x" * 5000 + "é").encode()})
    assert evil.status_code < 500


def test_metrics_are_the_sums_of_all_usages(server):
    families = list(text_string_to_metric_families(server.http.get("/metrics").text))
    ours = {f.name: f.type for f in families if f.name.startswith("nanochat_")}
    assert all(f.documentation and f.type != "unknown" for f in families)
    kinds = dict.fromkeys(("requests", "prompt_tokens", "completion_tokens", "cached_tokens"), "counter")
    kinds |= dict.fromkeys(("time_to_first_token_seconds", "inter_token_seconds"), "histogram")
    kinds |= dict.fromkeys(("running_rows", "waiting_requests"), "gauge")
    assert ours.items() >= {f"nanochat_{name}": kind for name, kind in kinds.items()}.items()

    before = server.metrics()
    usages = [server.chat(max_tokens=n).usage for n in (1, 5, 9)]
    usages += [list(server.chat(m, stream=True, stream_options={"include_usage": True}))[-1].usage for m in (SUM, FOX)]
    usages.append(server.client.completions.create(model=MODEL, prompt="Once upon", max_tokens=7).usage)
    refused(server, temperature=3)
    expected = {
        "nanochat_requests_total": 7,
        "nanochat_prompt_tokens_total": sum(u.prompt_tokens for u in usages),
        "nanochat_completion_tokens_total": sum(u.completion_tokens for u in usages),
        "nanochat_cached_tokens_total": sum(u.prompt_tokens_details.cached_tokens for u in usages),
        "nanochat_time_to_first_token_seconds_count": 6,
        "nanochat_inter_token_seconds_count": sum(u.completion_tokens - 1 for u in usages),
    }

    def counted():
        after = server.metrics()
        return {name: after[name] - before[name] for name in expected}

    with contextlib.suppress(AssertionError):  # the last request may be counted just after its response
        eventually(lambda: counted() == expected, "all is counted", seconds=5)
    assert counted() == expected
    samples = server.samples()
    assert all(math.isfinite(s.value) for s in samples)
    labels = [(s.labels["endpoint"], s.labels["status"]) for s in samples if s.name == "nanochat_requests_total"]
    assert len(labels) == len({*labels}) and {"200", "400"} <= {status for _, status in labels}


def test_unknown_paths_and_methods_add_no_metrics(server):
    for i in range(20):
        server.http.get(f"/nothing/{i}")
        server.http.request(f"ODD{i}", "/v1/models")
    assert "/nothing" not in server.http.get("/metrics").text and "ODD" not in server.http.get("/metrics").text


# ---------------------------------------------------------------------------------------------------------------------
# API keys and CORS


def test_every_route_except_page_and_health_needs_the_key(guarded):
    schema = guarded.http.get("/openapi.json")
    assert schema.status_code == 200
    routes = {(m.upper(), re.sub(r"\{.*?\}", "x", p)) for p, ms in schema.json()["paths"].items() for m in ms}
    assert {("POST", CHAT), ("POST", TEXT), ("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/stats")} <= routes
    routes |= {
        ("GET", path) for path in ("/openapi.json", "/v1/models/", "/models", "/v1/models/x", "/chat/completions")
    }
    routes |= {("POST", path.removeprefix("/v1")) for path in (CHAT, TEXT)} | {("OPTIONS", "/v1/models")}
    keys = [b"", b"Bearer wrong", b"Bearer", b"Basic s3cret", b"s3cret", "Bearer s3crét".encode()]
    public = {"/", "/logo.svg", "/health"}
    for method, path in routes:
        for key in keys if path == "/metrics" else keys[:2]:
            headers = [(b"Authorization", key)] if key else []
            response = httpx.request(method, guarded.url + path, headers=headers)
            if path in public:
                assert response.status_code == 200
            else:
                assert error_of(response, 401)["type"] == "authentication_error", (method, path)
    assert httpx.get(guarded.url + "/health/", follow_redirects=True).status_code == 200
    with pytest.raises(openai.AuthenticationError):
        guarded.client.with_options(api_key="wrong").models.list()
    assert guarded.client.models.list().data[0].id == LONG_MODEL


def test_a_server_without_a_key_accepts_any_key(server):
    assert server.client.with_options(api_key="whatever").models.list().data
    assert httpx.get(f"{server.url}/v1/models").status_code == 200


def test_only_configured_origins_may_read_answers(server, guarded):
    def allowed(server, origin, method="GET", **headers):
        response = httpx.request(method, f"{server.url}/v1/models", headers={"Origin": origin} | headers)
        return response.headers.get("access-control-allow-origin"), response

    key = {"Authorization": "Bearer s3cret"}
    assert allowed(guarded, "https://chat.example", **key)[0] == "https://chat.example"
    preflight = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    origin, response = allowed(guarded, "https://chat.example", "OPTIONS", **preflight)
    assert origin == "https://chat.example" and response.is_success and LONG_MODEL not in response.text
    assert "authorization" in response.headers["access-control-allow-headers"].lower()
    for origin in ("http://localhost:3000", "http://127.0.0.1", "https://[::1]:3000"):  # the default: this machine's
        assert allowed(server, origin)[0] == origin and allowed(guarded, origin, **key)[0] is None
    assert allowed(guarded, "https://chat.example")[1].status_code == 401
    assert allowed(guarded, "https://chat.example")[0] == "https://chat.example"
    too_large = {"content": b"x" * 2**21, "headers": key | {"Origin": "https://chat.example"}}
    response = httpx.post(f"{guarded.url}{CHAT}", **too_large)
    assert response.status_code == 413
    assert response.headers["access-control-allow-origin"] == "https://chat.example"
    for origin in ("https://evil.example", "http://localhost.evil.com", "https://chat.example.evil.com", "null"):
        assert allowed(guarded, origin, **key)[0] is None
        assert allowed(guarded, origin, "OPTIONS", **preflight)[0] is None
        assert allowed(server, origin)[0] is None and allowed(server, origin, "OPTIONS", **preflight)[0] is None


# ---------------------------------------------------------------------------------------------------------------------
# Concurrent requests


def test_answers_do_not_depend_on_concurrent_requests(server):
    requests = []
    for i in range(12):
        question = {"role": "user", "content": f"Tell me about {i} {'owls ' * (i % 4 * 9)}"}
        sampling = dict(temperature=1, seed=i) if i % 2 else {}
        requests.append(dict(messages=[question], max_tokens=20 + 5 * i) | sampling)
    alone = [server.text(**request) for request in requests]

    def streamed(request):
        return joined(server.chat(**request, stream=True))[0]

    with ThreadPoolExecutor(12) as pool:  # more than there are rows
        assert list(pool.map(lambda request: server.text(**request), requests)) == alone
        assert list(pool.map(streamed, reversed(requests))) == alone[::-1]


def test_the_async_client_streams_many_answers_at_once(server, reference):
    async def ask(client, i):
        messages = [{"role": "user", "content": f"Number {i}?"}]
        stream = await client.chat.completions.create(
            model=MODEL, messages=messages, temperature=0, max_tokens=24, stream=True
        )
        return "".join([c.choices[0].delta.content or "" async for c in stream]), reference.text(messages)

    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, i) for i in range(5)))

    for got, expected in asyncio.run(all_of_them()):
        assert got == expected


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "at once"])
def test_a_client_that_disconnects_frees_its_row(guarded, stream):
    connection = guarded.connect({"messages": QUESTION, "max_tokens": LONG, "stream": stream})
    guarded.running(1)
    assert guarded.http.get("/health").status_code == 200  # responsive while an answer is generated
    connection.close()
    guarded.running(0)


def test_the_server_answers_after_many_clients_disconnected(server, reference):
    for i in range(100):
        body = {"messages": QUESTION, "max_tokens": 200, "stream": i % 2 == 0, "n": 1 + i % 3}
        with server.connect(body, path=CHAT) as connection:
            if i % 5 == 0:
                connection.recv(1)
    server.running(0)
    server.waiting(0)
    assert server.text() == reference.text(QUESTION)


def test_a_stream_that_nobody_reads_frees_its_place_when_it_is_computed(served_base):
    """Its events fill the buffers of the sockets, because each token has log-probabilities of 20 alternatives."""
    flags = ["-g", "long", "--max_rows=1", "--max_queue=0", "--request_timeout=60"]
    with serving(served_base, *flags) as server:
        body = {"messages": QUESTION, "max_tokens": 5000, "stream": True, "logprobs": True, "top_logprobs": 20, "n": 1}
        with server.connect(body):
            server.running(1)
            eventually(lambda: server.http.get("/stats").json()["workers"][0]["in_flight"] == 0, "the place is free")
            server.running(0)
            assert server.chat(model=LONG_MODEL, max_tokens=3).usage.completion_tokens == 3


def test_a_full_queue_gets_429_and_frees_up(guarded):
    long, short = ({"messages": QUESTION, "max_tokens": n, "stream": True} for n in (LONG, 3))
    with guarded.connect(long):
        guarded.running(1)
        with guarded.connect(long):
            guarded.waiting(1)
            full = guarded.post(CHAT, short)
            assert error_of(full, 429)["type"] == "rate_limit_error" and int(full.headers["retry-after"]) > 0
            with pytest.raises(openai.RateLimitError):
                guarded.chat(model=LONG_MODEL)
        guarded.waiting(0)  # a client that disconnects while waiting leaves the queue
        queued = guarded.connect(short)
        guarded.waiting(1)
    with queued:
        assert queued.recv(12) == b"HTTP/1.1 200"


# ---------------------------------------------------------------------------------------------------------------------
# Start, shutdown, crashes


def descendants(server):
    return psutil.Process(server.process.pid).children(recursive=True)


def test_sigterm_lets_short_answers_finish_and_ends_long_ones(served_base):
    with serving(served_base, "-g", "long", "--shutdown_timeout=3") as server:
        health, chat = server.refusals[:2]  # responses during loading
        assert health.json().items() >= {"status": "loading", "ready": False}.items() and error_of(chat, 503)
        assert int(health.headers["retry-after"]) > 0 and int(chat.headers["retry-after"]) > 0

        processes = descendants(server)
        short = server.chat(model=LONG_MODEL, max_tokens=60, stream=True)
        long = server.chat(model=LONG_MODEL, max_tokens=LONG, stream=True)
        next(short), next(long)
        server.process.send_signal(signal.SIGTERM)
        *_, last = short
        assert last.choices[0].finish_reason == "length"
        with pytest.raises((openai.APIError, httpx.TransportError)):
            list(long)
        with pytest.raises(openai.APIError):  # refused, or no connection
            server.chat(model=LONG_MODEL, max_tokens=1)
        assert server.process.wait(60) in (0, -signal.SIGTERM)
        assert not psutil.wait_procs(processes, timeout=30)[1]
        assert "Traceback" not in server.log.read_text()


def test_a_worker_that_dies_ends_streams_with_an_error(served_base):
    with serving(served_base, "-g", "long") as server:
        body = {"messages": QUESTION, "max_tokens": LONG}
        with ThreadPoolExecutor(2) as pool:
            stream = pool.submit(server.post, CHAT, body | {"stream": True})
            whole = pool.submit(server.post, CHAT, body)
            server.running(2)
            max(descendants(server), key=lambda p: p.memory_info().rss).kill()  # the worker: it holds the model
            *_, last = frames(stream.result())
            assert last["error"]["message"]
            error_of(whole.result(), 503)
        eventually(lambda: server.http.get("/health").status_code == 503, "/health is 503")
        health = server.http.get("/health")
        assert health.json().items() >= {"status": "dead", "ready": False}.items() and health.headers["retry-after"]
        response = server.post(CHAT, body)
        assert error_of(response, 503) and response.headers["retry-after"]
        assert server.http.get("/").status_code == 200 and server.metrics()["nanochat_running_rows"] == 0


@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_responses_conform_to_the_openapi_schema(server, tmp_path, mode):
    command = ["schemathesis", "run", f"{server.url}/openapi.json", f"--mode={mode}", "--max-examples=50", "--seed=1"]
    command += ["--phases=examples,coverage,fuzzing", "--exclude-checks=positive_data_acceptance", "--no-color"]
    command += ["--generation-allow-x00=false", "--continue-on-failure", "--request-timeout=60"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "flag", ["--num_workers=-1", "--temperature=-1", "--temperature=nan", "--top_k=-3", "--request_timeout=-5"]
)
def test_out_of_range_flags_are_refused_at_once(flag):
    with pytest.raises(UserError, match=f"{flag}(.0)?: give"):
        chat_web.main([flag])


@pytest.mark.parametrize("origin", ["chat.example", "https://chat.example/", "https://chat.example/app", ""])
def test_cors_origins_that_no_browser_sends_are_refused(origin):
    with pytest.raises(UserError, match=f"--cors={origin}: expected"):
        chat_web.main(["--cors", "https://chat.example:8443", "chrome-extension://abc", "null", origin])


@pytest.mark.parametrize("key", ["", "two words", "ключ", "newline\n"], ids=repr)
def test_keys_that_no_client_can_send_are_refused(key):
    """An empty one, as from `--api_key=$UNSET`, would let everybody in."""
    with pytest.raises(UserError, match="--api_key .* expected ASCII characters"):
        chat_web.main(["--api_key", key])
