"""Verdicts on single examples against lm-evaluation-harness, which runs the exported model on the same examples."""

import json
import random
import socket
import subprocess

import pytest
from helpers import CPU, environment, python_command, random_model, random_words, wait_until

from nanochat.chat_eval import evaluate_task
from nanochat.checkpoint_manager import checkpoint_dir, save_checkpoint
from nanochat.core_eval import evaluate_core, scored_rows
from nanochat.dclm.tasks import CoreTask
from nanochat.engine import Engine
from nanochat.hf import export
from nanochat.tokenizer import get_tokenizer
from tasks.common import Task, render_mc

pytestmark = pytest.mark.slow


class RandomChoices(Task):
    """Multiple choice problems of random words."""

    eval_type = "categorical"

    def num_examples(self):
        return 40

    def get_example(self, index):
        rng = random.Random(index)
        choices, letters = [random_words(rng, rng.randint(1, 4)) for _ in range(4)], tuple("ABCD")
        question = render_mc(random_words(rng, rng.randint(3, 30)) + "?", letters, choices)
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": rng.choice(letters)}]
        return {"messages": messages, "letters": letters}

    def evaluate(self, problem, answer):
        return answer == problem["messages"][-1]["content"]


@pytest.fixture
def model(base):
    """(model, tokenizer): a random model whose weights are large enough for distinct predictions."""
    tokenizer = get_tokenizer()
    model = random_model(tokenizer.get_vocab_size(), std=0.2, seed=3, sequence_len=256, n_head=4, n_embd=64)
    return model.requires_grad_(False), tokenizer


@pytest.fixture
def harness(model, tmp_path, monkeypatch):
    """
    harness([{context, choices}]) -> [[(log-likelihood, is_greedy) of each choice]] from lm-evaluation-harness.

    It runs the model exported to tmp_path/hf, unless `lm` is another one.
    """
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    export(*model, tmp_path / "hf")
    lm = HFLM(pretrained=str(tmp_path / "hf"), device="cpu", dtype="float32", batch_size=7)

    def harness(items, chat=False, lm=lm):
        path = tmp_path / "items.jsonl"
        path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
        task = {
            "task": "items",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(path)}, "cache_dir": str(tmp_path / "cache")},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{context}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": 0,
            "target_delimiter": "",
            "metric_list": [{"metric": "acc"}],
        }
        results = lm_eval.simple_evaluate(
            lm,
            tasks=[task],
            task_manager=TaskManager(include_defaults=False),  # the default tasks are thousands of files
            apply_chat_template=chat,
            bootstrap_iters=0,
        )
        samples = sorted(results["samples"]["items"], key=lambda sample: sample["doc_id"])
        assert len(samples) == len(items)
        return [[tuple(response[0]) for response in sample["resps"]] for sample in samples]

    return harness


def argmax(numbers):
    return max(range(len(numbers)), key=numbers.__getitem__)


@pytest.fixture
def served_url(base, model):
    """URL of a server of the model."""
    save_checkpoint(checkpoint_dir("sft", "d2"), 1, model[0], [], {}, CPU)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    flags = ["-i", "sft", "--port", port, "--device-type=cpu", "--dtype=float32"]
    with (
        open(base / "server.log", "wb") as log,
        subprocess.Popen(
            python_command("-m", "scripts.chat_web", *flags), env=environment(), stdout=log, stderr=log
        ) as process,
    ):
        try:
            wait_until(lambda: b" is ready" in (base / "server.log").read_bytes(), seconds=120)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def test_letters_equal_those_of_the_harness(model, harness):
    task = RandomChoices()
    records = evaluate_task(task, Engine(*model, CPU)).records
    questions = [record["messages"][0]["content"] for record in records]
    items = [{"context": question, "choices": list("ABCD")} for question in questions]
    expected = ["ABCD"[argmax([ll for ll, _ in choices])] for choices in harness(items, chat=True)]
    assert [record["answers"][0] for record in records] == expected
    assert len(set(expected)) > 1


@pytest.mark.parametrize("shots", [0, 3])
def test_core_multiple_choice_losses_equal_those_of_the_harness(model, harness, shots):
    rng = random.Random(shots)
    starts = ["cat", "dog", "sun", "mat"]  # no two options begin with the same token
    rows = [
        {
            "query": random_words(rng, rng.randint(1, 12)),
            "choices": [f"{start} {random_words(rng, rng.randint(0, 3))}".strip() for start in starts],
            "gold": rng.randrange(4),
        }
        for _ in range(30)
    ]
    task = CoreTask("t", "multiple_choice", shots, " ", 0.25, rows)
    result = evaluate_core(*model, CPU, tasks=[task])
    examples, tokenizer = task.examples(), model[1]
    items, lengths = [], []
    for i, example in enumerate(examples):
        prompts = task.prompts(examples, i)
        context = prompts[0][: -len(example["choices"][0]) - 1]
        items.append({"context": "<|bos|>" + context, "choices": [prompt[len(context) :] for prompt in prompts]})
        encoded = [tokenizer.encode(prompt, tokenizer.get_bos_token_id()) for prompt in prompts]
        lengths.append([len(row) - start for row, start in scored_rows("multiple_choice", encoded)])
    expected = [
        [-ll / n for (ll, _), n in zip(choices, counts, strict=True)]
        for choices, counts in zip(harness(items), lengths, strict=True)
    ]
    records = result.records["t"]
    for record, losses in zip(records, expected, strict=True):
        assert record["losses"] == pytest.approx(losses, abs=1e-3)
    assert [record["chosen"] for record in records] == [argmax([-loss for loss in losses]) for losses in expected]
    assert len({record["chosen"] for record in records}) > 1


def test_core_language_modeling_verdicts_equal_those_of_the_harness(model, harness):
    """Half of the continuations are the model's own greedy ones."""
    gpt, tokenizer = model
    rows = []
    for i in range(30):
        rng = random.Random(i)
        context = random_words(rng, rng.randint(2, 12))
        ids = tokenizer.encode(context, tokenizer.get_bos_token_id())
        greedy = tokenizer.decode(list(gpt.generate(ids, 2, temperature=0)))
        if i % 2 or "<|" in greedy:  # names of special tokens in plain text are tokens in `transformers`, text here
            greedy = random_words(rng, rng.randint(1, 2))
        rows.append({"context": context, "continuation": greedy})
    task = CoreTask("t", "language_modeling", 0, "", 0.0, rows)
    records = evaluate_core(gpt, tokenizer, CPU, tasks=[task]).records["t"]
    items = [{"context": "<|bos|>" + row["context"], "choices": [row["continuation"]]} for row in task.examples()]
    expected = [is_greedy for ((_, is_greedy),) in harness(items)]
    assert [record["correct"] for record in records] == expected
    assert 0 < sum(expected) < len(expected)


def test_the_api_as_local_completions_equals_the_exported_model(harness, served_url, tmp_path):
    """Prompts are ids or text; the server adds <|bos|> to text that lacks it, as the exported tokenizer does."""
    pytest.importorskip("tenacity")
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    rng, items = random.Random(0), []
    for i in range(24):
        sizes = [1] * 4 if i % 2 else [rng.randint(1, 5) for _ in range(4)]
        choices = [" " + word + " " * (n > 1) + random_words(rng, n - 1) for word, n in zip("ABCD", sizes, strict=True)]
        items.append({"context": random_words(rng, rng.randint(1, 30)), "choices": choices})
    expected = harness(items)
    for settings in ({}, {"tokenized_requests": False}):
        settings |= {"tokenizer": str(tmp_path / "hf"), "tokenizer_backend": "huggingface", "batch_size": 8}
        lm = LocalCompletionsAPI(f"{served_url}/v1/completions", model="nanochat-d2-sft", **settings)
        for row, expected_row in zip(harness(items, lm=lm), expected, strict=True):
            likelihoods, expected_likelihoods = ([ll for ll, _ in choices] for choices in (row, expected_row))
            assert likelihoods == pytest.approx(expected_likelihoods, abs=1e-3)
            assert argmax(likelihoods) == argmax(expected_likelihoods)
            assert [is_greedy for _, is_greedy in row] == [is_greedy for _, is_greedy in expected_row]
    assert len({argmax([ll for ll, _ in choices]) for choices in expected}) > 1
