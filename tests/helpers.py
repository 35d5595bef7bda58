"""Constants, small models and functions that several test files share. Fixtures are in conftest.py."""

import contextlib
import http.server
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from nanochat.common import Compute, UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.hf import hf_config, hf_weights

ROOT = Path(__file__).parents[1]
MIRROR = ROOT.parent / "shared" / "data" / "mirror"  # a local copy of the public data sets, laid out like their hosts
needs_mirror = pytest.mark.skipif(not MIRROR.is_dir(), reason="no local copy of the public data sets beside the repo")
CPU = Compute(torch.device("cpu"), torch.float32)

# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers, models and tasks

SPECIALS = [
    "<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>",
    "<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>",
]  # fmt: skip
BOS, END, PYTHON, PYTHON_END, OUTPUT, OUTPUT_END = 256, 260, 261, 262, 263, 264
VOCAB = 256 + len(SPECIALS)  # vocabulary size of ByteTokenizer


class ByteTokenizer:
    """Every byte is a token; the special tokens follow from 256 on. A prompt is <|bos|> and the bytes of its text."""

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_bytes(self, ids):
        return bytes(ids)

    def encode_special(self, name):
        return 256 + SPECIALS.index(name)

    def get_bos_token_id(self):
        return BOS

    def render_for_completion(self, conversation, max_tokens=None):
        """<|bos|> and the texts of all messages but a final answer; cropped on the left to `max_tokens` tokens."""
        texts = [message["content"] for message in conversation["messages"]]
        if conversation["messages"][-1]["role"] == "assistant":
            texts.pop()
        ids = self.encode("\n\n".join(texts))
        return [BOS, *(ids if max_tokens is None else ids[1 - max_tokens :])]


def random_model(vocab_size=VOCAB, *, std=0.3, seed=0, **shape):
    """A GPT with all weights drawn from N(0, std²); the zeros of init_weights() would hide errors."""
    torch.manual_seed(seed)
    shape = {"sequence_len": 64, "n_layer": 2, "n_head": 2, "n_kv_head": 2, "n_embd": 32} | shape
    model = GPT(GPTConfig(vocab_size=vocab_size, **shape))
    model.init_weights("cpu")
    for p in model.parameters():
        torch.nn.init.normal_(p, std=std)
    return model


def transformers_model(model, **config_changes):
    """transformers' NanoChat model with the weights of `model`."""
    transformers = pytest.importorskip("transformers")
    config = transformers.NanoChatConfig(**hf_config(model.config) | config_changes)
    hf_model = transformers.NanoChatForCausalLM(config).eval()
    hf_model.load_state_dict(hf_weights(model))
    return hf_model


class ScriptedModel:
    """
    A model whose next token is chosen by a function: script(sequence) returns the next token of a row, or a list of
    equally likely ones. The KV cache stores the token ids as keys, so the model reads each sequence from the cache.
    """

    def __init__(self, script, sequence_len=64):
        self.script, self.config = script, SimpleNamespace(n_layer=1, sequence_len=sequence_len)
        self.batch_sizes = []  # of each decode step
        self.prefills = []  # (rows, tokens) of each prefill pass

    def get_device(self):
        return torch.device("cpu")

    def hidden(self, idx, kv_cache, fill_only):
        assert fill_only
        self.prefills.append(tuple(idx.shape))
        self._append(idx, kv_cache)

    def __call__(self, idx, kv_cache):
        self.batch_sizes.append(len(idx))
        logits = torch.zeros(len(idx), 1, VOCAB)
        for row, sequence in enumerate(self._append(idx, kv_cache)):
            tokens = self.script(sequence)
            logits[row, 0, tokens if isinstance(tokens, list) else [tokens]] = 100.0
        return logits

    def _append(self, idx, kv_cache):
        """Appends the tokens `idx` (B, T) to the cache; returns the whole sequence of each row."""
        kv_cache.begin(idx.size(1))
        ids = idx[:, None, :, None].double()
        keys, _ = kv_cache.insert(0, ids, ids)
        kv_cache.advance(idx.size(1))
        return [row[0, :n, 0].long().tolist() for row, n in zip(keys, kv_cache.lengths, strict=True)]


class LetterTask:
    """A task whose reward is the share of the letter a in the answer."""

    def __getitem__(self, i):
        return {"messages": [{"role": "user", "content": str(i)}, {"role": "assistant", "content": ""}]}

    def reward(self, conversation, text):
        return text.count("a") / max(1, len(text))


WORDS = "the cat dog sat on a mat sun is red blue and then it was all gone".split()


def random_words(rng, n):
    """A text of `n` random words."""
    return " ".join(rng.choice(WORDS) for _ in range(n))


# ---------------------------------------------------------------------------------------------------------------------
# Processes


def environment(**variables):
    """Environment of a child process that imports this repository's packages and these helpers."""
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])} | variables


def python_command(*arguments, ranks=1):
    """Command line that runs Python with `arguments`; for several ranks, under torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    return [sys.executable, *torchrun, *map(str, arguments)]


def run_python(*arguments, ranks=1, check=True, env=None, text=True, **options):
    """Runs Python in new processes -> CompletedProcess. With `check`, a failure is an error that shows the output."""
    done = subprocess.run(
        python_command(*arguments, ranks=ranks),
        env=env or environment(),
        capture_output=True,
        text=text,
        timeout=300,
        **options,
    )
    if check and done.returncode:
        raise AssertionError(f"{arguments} ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def run_on_ranks(program, tmp_path):
    """Runs `program`, which saves tensors to sys.argv[1], on one and on two ranks; returns both results."""
    script = tmp_path / "program.py"
    script.write_text(program, encoding="utf-8")
    for ranks in (1, 2):
        run_python(script, tmp_path / f"{ranks}.pt", ranks=ranks)
    return [torch.load(tmp_path / f"{ranks}.pt", weights_only=True) for ranks in (1, 2)]


def wait_until(condition, seconds=20):
    """Waits until condition() is true; fails after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not true after {seconds} s"
        time.sleep(0.01)


class QuietHandler(http.server.BaseHTTPRequestHandler):
    """A request handler that logs nothing."""

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def serve_http(handler):
    """An HTTP server on a free port of localhost, in a thread; server.url is its address without a final slash."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


# ---------------------------------------------------------------------------------------------------------------------
# Results


def read_jsonl(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def logged_metrics(base, stage):
    """The metrics that a training stage logged, one dictionary per line of its file."""
    return read_jsonl(base / "report" / "metrics" / f"{stage}.jsonl")


def report_metrics(base, section):
    """The metrics of a section of the report, such as "midtraining"."""
    return json.loads((base / "report" / f"{section}.json").read_text(encoding="utf-8"))["metrics"]


def load_weights(checkpoints, step):
    """{name: tensor} of a step in the folder `checkpoints`."""
    return load_file(checkpoints / f"step_{step:06d}" / "model.safetensors")


def assert_equal_weights(a, b):
    assert a.keys() == b.keys()
    assert all((a[name] == b[name]).all() for name in a)


@contextlib.contextmanager
def raises_user_error(match):
    """Expects a UserError whose message matches the pattern `match` and is a single line."""
    with pytest.raises(UserError, match=match) as error:
        yield error
    assert "\n" not in str(error.value)
