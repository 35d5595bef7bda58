"""The reference's names, calls, flags and defaults are ours: scripts and snippets written for it work here."""

import importlib

import pytest
import torch
from helpers import ByteTokenizer, needs_mirror, random_model

from nanochat import common, dataset
from nanochat.chat_eval import evaluate_task
from nanochat.cli import parse_args
from nanochat.engine import Engine, KVCache
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import RustBPETokenizer, get_token_bytes, get_tokenizer
from tasks.arc import ARC
from tasks.common import Conversation, Message, Task, TaskMixture, TaskSequence, render_mc, user_and_assistant
from tasks.customjson import CustomJSON
from tasks.gsm8k import GSM8K
from tasks.humaneval import HumanEval
from tasks.mmlu import MMLU
from tasks.smoltalk import SmolTalk
from tasks.spellingbee import SimpleSpelling, SpellingBee

# SPEC section 1: script -> "flag=default ...". Where our default differs on purpose, it is ours.
MACHINE = "run=dummy device_type="
RATES = "embedding_lr=0.2 unembedding_lr=0.004 matrix_lr=0.02 weight_decay=0.0"
MODEL = "model_tag=None step=None device_type="
TOKENS = 20 * 524288
FLAGS = {
    "nanochat.dataset": "num_files=-1 num_workers=4",
    "scripts.tok_train": "max_chars=10000000000 doc_cap=10000 vocab_size=65536",
    "scripts.base_train": f"{MACHINE} {RATES} depth=20 max_seq_len=2048 num_iterations=-1 target_flops=-1.0 "
    "target_param_data_ratio=20 device_batch_size=32 total_batch_size=524288 grad_clip=1.0 warmup_ratio=0.0 "
    f"warmdown_ratio=0.2 final_lr_frac=0.0 resume_from_step=-1 eval_every=250 eval_tokens={TOKENS} save_every=-1 "
    "core_metric_every=2000 core_metric_max_per_task=500 sample_every=2000 model_tag=",
    "scripts.base_loss": f"device_batch_size=32 split_tokens={TOKENS} model_tag=None model_step=None device_type=",
    "scripts.base_eval": "hf_path=None max_per_task=-1 model_tag=None step=None",
    # max_seq_len=-1 is the base model's context; 2048 in the reference.
    "scripts.mid_train": f"{MACHINE} {RATES} model_tag=None step=None dtype= num_iterations=-1 max_seq_len=-1 "
    f"device_batch_size=32 init_lr_frac=1.0 eval_every=150 eval_tokens={TOKENS} total_batch_size=524288 dry_run=False",
    "scripts.chat_sft": f"{MACHINE} {RATES} source=mid model_tag=None step=None dtype= device_batch_size=4 "
    "num_epochs=1 num_iterations=-1 target_examples_per_step=32 init_lr_frac=0.02 eval_every=100 eval_steps=100 "
    "eval_metrics_every=200 eval_metrics_max_problems=1024",
    # top_k=50 in the reference, whose loss assumes samples without it.
    "scripts.chat_rl": f"{MACHINE} {RATES} source=sft model_tag=None step=None dtype= device_batch_size=8 "
    "examples_per_step=16 num_samples=16 max_new_tokens=256 temperature=1.0 top_k=0 init_lr_frac=0.05 num_epochs=1 "
    "save_every=60 eval_every=60 eval_examples=400",
    # source= is the newest stage that exists; required or sft in the reference.
    "scripts.chat_eval": f"{MODEL} source= dtype= task_name=None temperature=0.0 max_new_tokens=512 num_samples=1 "
    "top_k=50 batch_size=8 max_problems=None",
    "scripts.chat_cli": f"{MODEL} source= dtype= prompt=None temperature=0.6 top_k=50",
    # 0.0.0.0 in the reference: open to everybody.
    "scripts.chat_web": f"{MODEL} source= dtype= num_gpus=1 temperature=0.8 top_k=50 max_tokens=512 port=8000 "
    "host=127.0.0.1",
}
SHORT_FLAGS = {
    "nanochat.dataset": "nw",
    "scripts.chat_eval": "iadtmnkbgsx",
    "scripts.chat_cli": "igsptkd",
    "scripts.chat_web": "nitkmgspd",
}


@pytest.mark.parametrize("module", FLAGS)
def test_flags_and_defaults(module):
    parser = importlib.import_module(module).build_parser()
    defaults = {option: action.default for action in parser._actions for option in action.option_strings}
    if "--recipe" in defaults:
        defaults |= {f"--{name}": value for name, value in vars(parse_args(parser, ["--recipe=reference"])).items()}
    flags = dict(flag.split("=") for flag in FLAGS[module].split())
    assert {flag: str(defaults.get(f"--{flag}", "no such flag")) for flag in flags} == flags
    assert defaults.keys() >= {f"-{letter}" for letter in SHORT_FLAGS.get(module, "")}


def test_common(base, capsys):
    assert common.get_base_dir() == base
    assert common.autodetect_device_type() in ("cuda", "mps", "cpu")
    common.print0("from rank 0")
    assert capsys.readouterr().out == "from rank 0\n"


def test_dataset(base):
    assert [file.suffix for file in dataset.list_parquet_files()] == [".parquet", ".parquet"]
    batches = list(dataset.parquets_iter_batched("train"))
    assert isinstance(batches[0][0], str)
    assert list(dataset.parquets_iter_batched(split="train", start=1, step=2)) == batches[1::2]


def test_tokenizer(base):
    tokenizer = get_tokenizer()
    assert isinstance(tokenizer, RustBPETokenizer)
    bos, texts = tokenizer.get_bos_token_id(), ["One day", "two cats", ""]
    ids = tokenizer.encode(texts, prepend="<|bos|>", append=bos, num_threads=2)
    assert ids == [tokenizer.encode(text, prepend=bos, append="<|bos|>") for text in texts]
    assert tokenizer.encode_batch(texts, num_threads=2) == tokenizer(texts) == [row[1:-1] for row in ids]
    assert tokenizer.decode(ids[0]) == "<|bos|>One day<|bos|>"
    assert tokenizer.id_to_token(tokenizer.encode_special("<|user_start|>")) == "<|user_start|>"
    conversation = user_and_assistant("Hi", "Hello!")
    ids, mask = tokenizer.render_conversation(conversation, max_tokens=2048)
    assert tokenizer.visualize_tokenization(ids, mask).endswith("\033[32m<|assistant_end|>\033[0m")
    prompt = tokenizer.render_for_completion(conversation)
    assert ids[: len(prompt)] == prompt
    assert get_token_bytes(device="cpu").tolist() == tokenizer.count_bytes()


def test_model_and_engine(base):
    """A seed document's example of generate_batch(), on a model that is built as in the reference."""
    tokenizer, shape = get_tokenizer(), {"n_layer": 1, "n_head": 2, "n_kv_head": 1, "n_embd": 32}
    config = GPTConfig(sequence_len=64, vocab_size=tokenizer.get_vocab_size(), **shape)
    model = GPT(config)
    for _ in range(2):
        model.init_weights()
        assert model.get_device() == torch.device("cpu")
    prompt = tokenizer.encode("The chemical formula for water is")
    ids = torch.tensor([prompt])
    assert model(ids, ids, loss_reduction="none").shape == ids.shape
    engine, settings = Engine(model, tokenizer), dict(num_samples=3, max_tokens=5, temperature=0.8, top_k=50)
    results, masks = engine.generate_batch(prompt, **settings)
    columns = list(engine.generate(prompt, **settings, seed=42))
    for i, (tokens, mask) in enumerate(zip(results, masks, strict=True)):
        completion = [column[i] for column, _ in columns][: len(tokens) - len(prompt)]
        assert tokens == prompt + completion and len(mask) == len(tokens)
        assert isinstance(tokenizer.decode(tokens), str)
    assert KVCache(config.n_layer).lengths == []


@needs_mirror
def test_tasks(empty_base, mirror):
    """The mixture of a seed document, smaller, and the names of the tasks' parameters."""
    bucket = common.mirror_url("bucket")
    parts = [
        SmolTalk(split="test"),
        MMLU(subset="auxiliary_train"),
        GSM8K(subset="main", split="test"),
        CustomJSON(filepath=f"{bucket}/identity_conversations.jsonl"),
        SimpleSpelling(size=20),
        SpellingBee(size=8),
    ]
    assert [len(part) for part in parts[3:]] == [300, 20, 8]
    mixture, curriculum = TaskMixture(parts), TaskSequence(parts[4:])
    assert isinstance(mixture, Task) and len(mixture) == sum(map(len, parts))
    assert {"role", "content"} == mixture[0]["messages"][0].keys()
    assert curriculum[0] == parts[4][0]
    assert len(ARC(subset="ARC-Easy", split="test", start=1, stop=9, step=2)) == 4
    for spelling_task in (SpellingBee, SimpleSpelling):
        assert len(spelling_task(size=5, split="test", corpus="pocket")) == 5
    assert len(MMLU(subset="all", split="test", stop=7)) == 7
    assert len(HumanEval(stop=3)) == 3
    assert render_mc("Why?", ("A", "B"), ("x", "y")).startswith("Multiple Choice question: Why?\n- x=A\n- y=B\n\n")


class MyTask(Task):
    """A seed document's task of one's own, as written there: no super().__init__(), no letters."""

    eval_type = "generative"  # or "categorical"

    def __init__(self):
        self.examples = [{"question": f"{i}?", "answer": "A"} for i in range(4)]

    def num_examples(self):
        return len(self.examples)

    def get_example(self, idx):
        ex = self.examples[idx]
        return Conversation(
            [Message(role="user", content=ex["question"]), Message(role="assistant", content=ex["answer"])]
        )

    def evaluate(self, problem, completion):
        return completion.strip() == problem.answer.strip()


@pytest.mark.parametrize("eval_type", ["generative", "categorical"])
def test_own_task(eval_type, monkeypatch):
    monkeypatch.setattr(MyTask, "eval_type", eval_type)
    engine = Engine(random_model(n_layer=1), ByteTokenizer())
    assert evaluate_task(MyTask(), engine, max_new_tokens=4).records[3]["answers"]
