"""Chat evaluation of scripted models, against hand-computed scores and full forward passes."""

import itertools
import json

import pytest
import torch
from test_engine import BOS, END, OUTPUT, OUTPUT_END, PYTHON, PYTHON_END, VOCAB, ByteTokenizer, ScriptedModel

from nanochat.chat_eval import Score, chat_core, evaluate_task, pass_at_k
from nanochat.common import Compute, UserError
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from tasks.common import Task


class ByteChat(ByteTokenizer):
    def render_for_completion(self, conversation, max_tokens=None):
        ids = self.encode(conversation["messages"][0]["content"])
        return [BOS, *(ids if max_tokens is None else ids[1 - max_tokens :])]


class ListTask(Task):
    """A task of (question, correct answer) pairs."""

    def __init__(self, problems, letters=None):
        self.problems, self.letters = problems, letters
        self.eval_type = "categorical" if letters else "generative"

    def __len__(self):
        return len(self.problems)

    def __getitem__(self, index):
        question, answer = self.problems[index]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return {"messages": messages, "letters": self.letters}

    def evaluate(self, conversation, response):
        return response == conversation["messages"][-1]["content"]


def answering(answers, sequence_len=64):
    """An engine whose model generates answers[question] (a list of ids and strings) after each question."""

    def script(sequence):
        for question, parts in answers.items():
            prompt = [BOS, *question.encode()]
            if sequence[: len(prompt)] == prompt:
                ids = [i for part in parts for i in ([part] if isinstance(part, int) else part.encode())]
                return (ids + [END])[min(len(sequence) - len(prompt), len(ids))]
        return END

    return Engine(ScriptedModel(script, sequence_len), ByteChat())


def verdicts(score):
    return [record["verdicts"] for record in score.records]


def test_pass_at_k_equals_counting_all_subsets():
    for n in range(1, 7):
        for correct in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(itertools.combinations([True] * correct + [False] * (n - correct), k))
                assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_chat_core_and_standard_error_by_hand():
    assert chat_core({"a": 0.625, "b": 0.3}, {"a": 0.25, "b": 0.0}) == pytest.approx((0.5 + 0.3) / 2)
    score = Score([{"verdicts": [v]} for v in (True, True, True, False)])
    assert score.accuracy == 0.75
    assert score.stderr == pytest.approx((0.75 * 0.25 / 3) ** 0.5)
    score = Score([{"verdicts": [True, False]}, {"verdicts": [False, False]}])
    assert (score.accuracy, score.pass_at(2)) == (0.25, 0.5)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_letters_are_compared_with_letters_only(batch_size):
    # The scripted model gives equal logits to the chosen letter and to X, which is not an option of the problem.
    chosen = {"short": "C", "a longer one": "C", "mid one": "A", "q": "B"}
    engine = answering({})
    engine.model.script = lambda s: [ord("X"), ord(chosen.get(bytes(s[1:]).decode(), "B"))]
    task = ListTask([("short", "C"), ("a longer one", "A"), ("mid one", "A"), ("q", "C")], letters=["A", "B", "C"])
    score = evaluate_task(task, engine, batch_size=batch_size)
    assert [record["answers"] for record in score.records] == [["C"], ["C"], ["A"], ["B"]]
    assert verdicts(score) == [[True], [False], [True], [False]]
    assert score.accuracy == 0.5


@torch.no_grad()
def test_letters_equal_those_of_a_full_forward_pass():
    torch.manual_seed(0)
    model = GPT(GPTConfig(sequence_len=64, vocab_size=VOCAB, n_layer=2, n_head=2, n_kv_head=1, n_embd=32))
    model.init_weights("cpu")
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    letters = list("ABCD")
    task = ListTask([("question " * (i % 5) + str(i), "A") for i in range(20)], letters)
    score = evaluate_task(task, Engine(model, ByteChat()), batch_size=7)
    for i, record in enumerate(score.records):
        logits = model(torch.tensor([ByteChat().render_for_completion(task[i], 64)]))[0, -1]
        assert record["answers"] == [max(letters, key=lambda letter: logits[ord(letter)].item())]
    assert len({record["answers"][0] for record in score.records}) > 1


@pytest.mark.parametrize("max_rows", [1, 3, 64])
def test_generated_answers_are_judged_in_order(max_rows):
    answers = {"one": ["uno"], "two, a longer question": ["deux"], "three": ["tres, no"], "four": [""]}
    problems = [("one", "uno"), ("two, a longer question", "dos"), ("three", "tres, no"), ("four", "cuatro")]
    seen = []
    score = evaluate_task(
        ListTask(problems),
        answering(answers),
        max_rows=max_rows,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert verdicts(score) == [[True], [False], [True], [False]]
    assert [record["index"] for record in score.records] == [0, 1, 2, 3]
    assert score.records[1]["answers"] == ["deux"] and seen == [(i, 4) for i in (1, 2, 3, 4)]
    assert len(evaluate_task(ListTask(problems), answering(answers), max_problems=2).records) == 2


def test_calculator_calls_and_outputs_are_not_judged():
    answers = {"6*7?": ["It is ", PYTHON, "6*7", PYTHON_END, "????", "42."]}
    score = evaluate_task(ListTask([("6*7?", "It is 42.")]), answering(answers))
    assert score.accuracy == 1
    stray = {"6*7?": ["It is ", PYTHON, "no sum", PYTHON_END, OUTPUT, "43", OUTPUT_END, "42."]}
    assert evaluate_task(ListTask([("6*7?", "It is 42.")]), answering(stray)).accuracy == 1


def test_samples_differ_and_are_reproducible():
    engine = Engine(ScriptedModel(lambda s: [ord("a"), ord("b"), END]), ByteChat())
    settings = dict(num_samples=6, temperature=1.0, max_new_tokens=3)
    task = ListTask([("q", "a"), ("r", "b")])
    score = evaluate_task(task, engine, **settings)
    answers = [record["answers"] for record in score.records]
    assert all(len(a) == 6 for a in answers) and len(set(answers[0])) > 1 and answers[0] != answers[1]
    assert evaluate_task(task, engine, max_rows=2, **settings) == score
    assert evaluate_task(task, engine, seed=1, **settings) != score


def test_a_greedy_answer_is_generated_once(monkeypatch):
    engine, steps = answering({"q": ["a"], "r": ["x"]}), []
    forward = engine.backend.forward
    monkeypatch.setattr(engine.backend, "forward", lambda tokens, cache: steps.append(tokens) or forward(tokens, cache))
    score = evaluate_task(ListTask([("q", "a"), ("r", "b")]), engine, num_samples=4)
    assert [record["answers"] for record in score.records] == [["a"] * 4, ["x"] * 4]
    assert verdicts(score) == [[True] * 4, [False] * 4]
    assert max(map(len, steps)) == 2  # rows: one per problem


def test_prompts_longer_than_the_context_are_cropped():
    engine = answering({}, sequence_len=32)
    long = ListTask([("x" * 100, "")])
    assert evaluate_task(long, engine, max_new_tokens=100).accuracy == 1
    engine.model.script = lambda s: [ord("X"), ord("A") if len(s) == 32 else ord("B")]
    assert evaluate_task(ListTask([("x" * 100, "A")], ["A", "B"]), engine).accuracy == 1


def test_an_empty_task_is_an_error():
    with pytest.raises(UserError, match="ListTask: no problems"):
        evaluate_task(ListTask([]), answering({}))


@pytest.mark.parametrize("letters", [None, ["A", "B"]])
def test_every_rank_gets_the_score_of_one_process(letters, monkeypatch):
    problems = [(f"question {i}", "AB"[i % 3 > 0]) for i in range(7)]
    engine = answering({question: [answer] for question, answer in problems[:4]})
    alone = evaluate_task(ListTask(problems, letters), engine)
    shares = {}

    def gather(out, records):  # the real one is called by all ranks at once
        shares[engine.compute.rank] = records
        out[:] = [shares.get(r, []) for r in range(3)]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    for rank in range(3):
        engine.compute = Compute(torch.device("cpu"), torch.float32, rank=rank, world_size=3)
        score = evaluate_task(ListTask(problems, letters), engine)
    assert score == alone and [len(shares[r]) for r in range(3)] == [3, 2, 2]


# ---------------------------------------------------------------------------------------------------------------------
# The script


@pytest.fixture
def checkpoint(base):
    """Base directory with a tiny random sft checkpoint whose metadata names the pocket corpus."""
    from nanochat.checkpoint_manager import checkpoint_dir, save_checkpoint

    torch.manual_seed(0)
    model = GPT(GPTConfig(sequence_len=128, vocab_size=600, n_layer=1, n_head=2, n_kv_head=2, n_embd=32))
    model.init_weights("cpu")
    torch.nn.init.normal_(model.lm_head.weight, std=0.3)
    cpu = Compute(torch.device("cpu"), torch.float32)
    save_checkpoint(checkpoint_dir("sft", "d1"), 3, model, [], {"data": "pocket", "user_config": {}}, cpu)
    return base


def test_the_script_scores_saves_and_reports(checkpoint, capsys):
    from scripts.chat_eval import main

    samples = checkpoint / "samples.jsonl"
    main(["-i", "sft", "-x", "6", "-m", "4", "--save-samples", str(samples), "--device-type=cpu", "--dtype=float32"])
    shown = capsys.readouterr().out
    lines = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    metrics = json.loads((checkpoint / "report" / "chat-evaluation-sft.json").read_text(encoding="utf-8"))["metrics"]
    tasks = dict.fromkeys(line["task"] for line in lines)
    assert {"PocketSums", "PocketFacts", "SpellingBee"} <= set(tasks) and "MMLU" not in tasks
    for task in tasks:
        counted = [v for line in lines if line["task"] == task for v in line["verdicts"]]
        assert len(counted) == 6 and metrics["task_scores"][task] == sum(counted) / 6
        assert f"{task}: {sum(counted) / 6:.2%} [" in shown
    section = (checkpoint / "report" / "chat-evaluation-sft.md").read_text(encoding="utf-8")
    assert f"- ChatCORE: {metrics['chat_core']:.4f}\n" in section and "ChatCORE" in shown


@pytest.mark.parametrize(
    "flags, message",
    [
        (["-a", "GSM9K"], "no task 'GSM9K'"),
        (["-x", "0"], "max_problems=0"),
        (["-t", "-1"], "temperature=-1"),
        (["--save_samples", "no/such/folder.jsonl"], "no such folder"),
        (["--step", "7"], "no checkpoint of step 7"),
    ],
)
def test_user_errors_of_the_script(checkpoint, flags, message):
    from scripts.chat_eval import main

    with pytest.raises(UserError, match=message):
        main(["-i", "sft", "--device-type=cpu", *flags])
