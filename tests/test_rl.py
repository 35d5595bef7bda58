"""Reinforcement learning: gradients against a plain policy gradient, rollouts, and runs of chat_rl."""

import json
import math

import pytest
import torch
from helpers import (
    BOS,
    CPU,
    END,
    ROOT,
    ByteTokenizer,
    LetterTask,
    assert_equal_weights,
    load_weights,
    logged_metrics,
    raises_user_error,
    random_model,
    read_jsonl,
    run_on_ranks,
)

from nanochat.common import UserError
from nanochat.engine import Engine
from nanochat.rl import Rollout, advantages, make_sampler, policy_batches, roll_out, sync
from nanochat.train import train_step
from scripts.chat_rl import problems_of_step
from tasks.mixtures import find_task


def rollout(prompt, tokens, mask, reward):
    return Rollout(prompt, tokens, mask, reward, False)


def example_groups():
    """Two groups of rollouts with different rewards, one with equal ones; answers of 1 to 9 tokens, some forced."""
    generator = torch.Generator().manual_seed(5)

    def ids(n):
        return torch.randint(0, 256, (n,), generator=generator).tolist()

    def group(rewards):
        prompt, lengths = ids(4), [1 + (3 * i) % 9 for i in range(len(rewards))]
        return [
            rollout(prompt, [*ids(n - 1), END], [int(j % 3 != 1) for j in range(n)], reward)
            for n, reward in zip(lengths, rewards, strict=True)
        ]

    return [group([1, 0, 0, 1]), group([1, 1, 1, 1]), group([0, 0, 0, 1])]


class GradientRecorder:
    """Takes the place of an optimizer and records the gradients."""

    def __init__(self, model):
        self.model, self.gradients = model, None

    def reduce_grads(self):
        self.gradients = {name: p.grad.clone() for name, p in self.model.named_parameters()}

    def grad_sq_norm(self):
        return torch.stack([g.square().sum() for g in self.gradients.values()]).sum()

    def step(self, scale):
        pass

    def zero_grad(self, set_to_none):
        self.model.zero_grad(set_to_none=set_to_none)


def gradients(groups, max_tokens):
    """({parameter name: gradient}, result) of train_step() with micro-batches of `max_tokens`."""
    model = random_model(std=0.2)
    recorder = GradientRecorder(model)
    batches, skipped_tokens = policy_batches(groups, max_tokens, "cpu")
    result = train_step(model, [recorder], batches, CPU, skipped_tokens=skipped_tokens)
    return recorder.gradients, result


def plain_gradients(groups):
    """
    ({parameter name: gradient}, loss, number of sampled tokens), with one forward pass per rollout.
    The loss is -sum(advantage * log-probability) / n over the n sampled tokens.
    """
    model = random_model(std=0.2)
    n_tokens = sum(sum(r.mask) for group in groups for r in group)
    loss = 0
    for group in groups:
        mean = sum(r.reward for r in group) / len(group)
        for r in group:
            ids = torch.tensor([r.prompt + r.tokens])
            logprobs = model(ids)[0].log_softmax(-1)
            for j, (token, sampled) in enumerate(zip(r.tokens, r.mask, strict=True)):
                loss = loss - sampled * (r.reward - mean) * logprobs[len(r.prompt) + j - 1, token]
    loss = loss / n_tokens
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}, loss.item(), n_tokens


@pytest.mark.parametrize("max_tokens", [1, 12, 50, 1000])
def test_gradients_equal_a_plain_policy_gradient_for_any_micro_batch_size(max_tokens):
    expected, loss, n_tokens = plain_gradients(example_groups())
    actual, result = gradients(example_groups(), max_tokens)
    assert result.tokens == n_tokens
    assert math.isclose(result.loss, loss, abs_tol=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, atol=1e-6, rtol=1e-5)
    assert max(g.abs().max() for g in expected.values()) > 1e-3


def test_sampled_end_token_is_trained_and_forced_tokens_are_not():
    ((x, y, weights),), skipped_tokens = policy_batches(
        [[rollout([1, 2], [7, 8, 9, END], [1, 0, 0, 1], 1.0), rollout([1, 2], [5], [1], 0.0)]], 64, "cpu"
    )
    order = [0, 1] if x[0, 2] == 7 else [1, 0]
    assert x[order].tolist() == [[1, 2, 7, 8, 9], [1, 2, 0, 0, 0]]
    assert y[order].tolist() == [[-1, 7, -1, -1, END], [-1, 5, -1, -1, -1]]
    assert weights[order][:, 0].tolist() == [0.5, -0.5]
    assert skipped_tokens == 0


def test_groups_with_equal_rewards_are_skipped_and_leave_the_weights_unchanged():
    equal = [rollout([1], [2, END], [1, 1], 0.0)] * 4
    assert advantages(equal) is None
    assert policy_batches([equal], 8, "cpu") == ([], 8)
    model, before = random_model(std=0.2), random_model(std=0.2).state_dict()
    optimizers = model.setup_optimizers()
    batches, skipped_tokens = policy_batches(example_groups(), 8, "cpu")
    train_step(model, optimizers, batches, CPU, skipped_tokens=skipped_tokens)  # now the optimizers have momentum
    moved = {name: p.clone() for name, p in model.state_dict().items()}
    result = train_step(model, optimizers, [], CPU, skipped_tokens=8)
    assert result.loss == 0 and result.grad_norm == 0 and result.tokens == 8
    assert any((moved[name] != before[name]).any() for name in before)
    assert all((moved[name] == p).all() for name, p in model.state_dict().items())


def test_rollout_is_independent_of_its_batch():
    sampler = Engine(random_model(std=0.2).requires_grad_(False), ByteTokenizer(), CPU)
    batched = roll_out(sampler, LetterTask(), {3: 30, 4: 40, 12: 50}, 4, 12, max_rows=256)
    for i, seed in {12: 50, 4: 40}.items():
        (single,) = roll_out(sampler, LetterTask(), {i: seed}, 4, 12, max_rows=3).values()
        assert [r.tokens for r in single] == [r.tokens for r in batched[i]]
    first = batched[3][0]
    assert first.tokens != batched[3][1].tokens
    assert len(first.tokens) == len(first.mask) <= 12
    assert all(r.cut_off == (len(r.tokens) == 12 and r.tokens[-1] not in (END, BOS)) for r in batched[3])


@pytest.mark.parametrize("method, result, message", [
    ("reward", float("nan"), "^task Faulty: rewards must be finite, got .nan"),
    ("reward", None, "^task Faulty: TypeError"),
    ("__getitem__", None, "^task Faulty, problem 0: expected .*messages"),
])  # fmt: skip
def test_error_of_a_faulty_task_names_the_task(method, result, message):
    task = type("Faulty", (LetterTask,), {method: lambda *_: result})()
    sampler = Engine(random_model().requires_grad_(False), ByteTokenizer(), CPU)
    with raises_user_error(message):
        roll_out(sampler, task, {0: 1}, 2, 4, max_rows=4)


def test_training_raises_the_reward():
    model = random_model(std=0.2)
    optimizers = model.setup_optimizers(matrix_lr=0.01, embedding_lr=0.01, unembedding_lr=0.01)
    sampler, rewards = make_sampler(model, ByteTokenizer(), CPU), []
    for step in range(25):
        sync(sampler, model)
        groups = roll_out(sampler, LetterTask(), {i: 100 * step + i for i in range(4)}, 16, 8, max_rows=64).values()
        rewards.append(sum(r.reward for group in groups for r in group) / 64)
        batches, skipped_tokens = policy_batches(groups, 16, "cpu")
        train_step(model, optimizers, batches, CPU, skipped_tokens=skipped_tokens)
    assert rewards[0] < 0.05
    assert sum(rewards[-3:]) / 3 > 0.5


def test_sampler_has_the_logits_of_the_model():
    model = random_model(std=0.2)
    sampler = make_sampler(model, ByteTokenizer(), CPU)
    sync(sampler, model)
    prompts = [[BOS, 5, 6], [BOS, 7]]
    with torch.inference_mode():
        for prompt, logits in zip(prompts, sampler.next_logits(prompts), strict=True):
            torch.testing.assert_close(logits, model(torch.tensor([prompt]))[0, -1], atol=1e-4, rtol=0)


def test_every_epoch_has_all_problems():
    first = [i for step in range(5) for i in problems_of_step(step, 4, 20, seed=1)]
    assert sorted(first) == list(range(20))
    second = [i for step in range(5, 10) for i in problems_of_step(step, 4, 20, seed=1)]
    assert sorted(second) == list(range(20)) and second != first
    other = problems_of_step(0, 4, 20, seed=2)
    assert problems_of_step(0, 4, 20, seed=1) == problems_of_step(0, 4, 20, seed=1) != other
    assert len(set(problems_of_step(4, 4, 20, seed=1).values())) == 4


# ---------------------------------------------------------------------------------------------------------------------
# The script


FLAGS = ["--task=PocketHardSums", "--examples_per_step=3", "--num_samples=4", "--max_new_tokens=12", "--eval_every=-1"]
FLAGS += ["--dtype=float32", "--device_type=cpu", "--device_batch_size=2", "--save_every=2"]


@pytest.fixture
def after_sft(base, run_main):
    """`base` with a tiny base model and an sft model trained from it, d1."""
    size = ["--max_seq_len=64", "--device_batch_size=2", "--total_batch_size=256", "--device_type=cpu"]
    run_main("scripts.base_train", "--depth=1", *size, "--num_iterations=3", "--eval_every=-1", "--sample_every=-1",
             "--core_metric_every=-1")  # fmt: skip
    run_main("scripts.chat_sft", "--source=base", "--num_iterations=3", "--device_batch_size=2", "--eval_every=-1",
             "--target_examples_per_step=4", "--eval_metrics_every=-1")  # fmt: skip
    return base


def reward_length(self, conversation, text):
    """A reward that an untrained model gets, too."""
    return len(text) / 100


def test_resumed_run_is_bit_identical(after_sft, run_main, capsys, monkeypatch):
    monkeypatch.setattr("tasks.pocket.PocketHardSums.reward", reward_length)
    run_main("scripts.chat_rl", *FLAGS, "--num_iterations=4", "--eval_every=2", "--eval_examples=4", "--eval_samples=2")
    folder = after_sft / "chatrl_checkpoints" / "d1"
    uninterrupted, rows = load_weights(folder, 4), logged_metrics(after_sft, "rl")
    initial = load_weights(after_sft / "chatsft_checkpoints" / "d1", 3)
    assert any((uninterrupted[name] != initial[name]).any() for name in uninterrupted)
    assert {"reward", "cut_off", "loss", "grad_norm"} <= rows[1].keys()
    assert {"greedy", "pass@1", "pass@2"} <= rows[0].keys()
    assert "held out: greedy" in capsys.readouterr().out
    assert json.loads((folder / "step_000004" / "meta.json").read_text())["corpus"] == "pocket"
    (folder / "step_000004" / "meta.json").unlink()  # as if the process had been killed before it wrote this file
    run_main("scripts.chat_rl", *FLAGS, "--num_iterations=4", "--resume")
    assert "step_000002: resuming" in capsys.readouterr().out
    assert_equal_weights(load_weights(folder, 4), uninterrupted)
    run_main("scripts.chat_eval", "-i", "rl", "-a", "PocketSums", "-x", 2, "-m", 8)
    run_main("nanochat.report", "generate")
    assert "## Chat RL" in (after_sft / "report.md").read_text(encoding="utf-8")


TRAINING = """
import sys, torch
from helpers import ByteTokenizer, LetterTask, random_model
from nanochat.cluster import compute_cleanup, compute_init
from nanochat.rl import make_sampler, policy_batches, roll_out, sync
from nanochat.train import train_step

compute = compute_init("cpu", "float32")
model = random_model(std=0.2)
optimizers = model.setup_optimizers(matrix_lr=0.001, ns_dtype=torch.float32)
sampler, results = make_sampler(model, ByteTokenizer(), compute), []
for step in range(3):
    sync(sampler, model)
    problems = list({i: 10 * step + i for i in range(5)}.items())[compute.rank :: compute.world_size]
    groups = roll_out(sampler, LetterTask(), dict(problems), 6, 8, 64).values()
    batches, skipped_tokens = policy_batches(groups, 4, "cpu")
    result = train_step(model, optimizers, batches, compute, skipped_tokens=skipped_tokens)
    results += [result.loss, result.grad_norm, result.tokens]
if compute.rank == 0:
    torch.save([torch.tensor(results), *(p.detach() for p in model.parameters())], sys.argv[1])
del model, optimizers, sampler, groups, batches
compute_cleanup()
"""


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path):
    one, two = run_on_ranks(TRAINING, tmp_path)
    assert one[0][1] > 0.01  # the norm of the gradients
    torch.testing.assert_close(one[0], two[0], atol=1e-6, rtol=1e-5)
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=0)  # AdamW amplifies differences of tiny gradients


def test_chat_rl_user_errors(after_sft, run_main):
    for flag, message in {
        "--task=Chess": "no task 'Chess'; there are",
        "--task=MMLU": "--task=MMLU: choose one of",
        "--num_samples=1": "at least 2 answers",
        "--top_k=50": "another distribution",
        "--temperature=0.7": "another distribution",
        "--examples_per_step=0": "expected at least 1",
        "--model_tag=d99": "d99; there are checkpoints of d",
    }.items():
        with pytest.raises(UserError, match=message):
            run_main("scripts.chat_rl", *FLAGS, flag)
    assert not (after_sft / "chatrl_checkpoints").exists()


def test_custom_task_of_the_readme(after_sft, run_main, capsys):
    blocks = (ROOT / "README.md").read_text(encoding="utf-8").split("```python\n")[1:]
    (code,) = [block.split("```")[0] for block in blocks if "(Task)" in block]
    assert len(code.splitlines()) <= 40
    (after_sft / "first_word.py").write_text(code, encoding="utf-8")
    name = "first_word.py:FirstWord"
    run_main("scripts.chat_eval", "-i", "sft", "-a", f"{name}|PocketSums", "-x", 4, "-m", 8, "--save_samples=a.jsonl")
    assert f"{name}: 0.00%" in capsys.readouterr().out
    records = read_jsonl(after_sft / "a.jsonl")
    assert [r["task"] for r in records] == [name] * 4 + ["PocketSums"] * 4
    answer = records[0]["messages"][1]["content"]
    assert answer == min(records[0]["messages"][0]["content"].split(": ")[1].rstrip("?").split(", "))
    run_main("scripts.chat_rl", *FLAGS, f"--task={name}", "--num_iterations=1")
    output = capsys.readouterr().out
    assert "500 problems" in output and "the same problems" not in output
    (after_sft / "first_word.py").write_text(code.replace("{self.split} ", ""), encoding="utf-8")
    run_main("scripts.chat_rl", *FLAGS, f"--task={name}", "--num_iterations=1")
    assert f"warning: {name} has the same problems for training and evaluation" in capsys.readouterr().out


@pytest.mark.parametrize(("code", "name", "message"), [
    ("", "mine.py:Mine", "has no attribute 'Mine'"),
    ("class Mine: pass", "mine.py:Mine", "is no subclass"),
    ("def (", "mine.py:Mine", "SyntaxError"),
    ("", "gone.py:Mine", "FileNotFoundError"),
    ("", "mine:Mine", "no task 'mine:Mine'"),
])  # fmt: skip
def test_broken_custom_task_raises_user_error(tmp_path, monkeypatch, code, name, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(code)
    with raises_user_error(message):
        find_task(name)
