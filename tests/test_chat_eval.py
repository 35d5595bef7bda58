"""Chat evaluation of scripted models, against hand-computed scores and full forward passes."""

import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    BOS,
    CPU,
    END,
    OUTPUT,
    OUTPUT_END,
    PYTHON,
    PYTHON_END,
    ByteTokenizer,
    ScriptedModel,
    raises_user_error,
    random_model,
    read_jsonl,
    report_metrics,
)

from nanochat.chat_eval import Score, chat_core, evaluate_task, pass_at_k
from nanochat.cli import choose_source
from nanochat.common import UserError
from nanochat.engine import Engine
from tasks import mixtures
from tasks.common import Task


class ListTask(Task):
    """A task of (question, correct answer) pairs."""

    def __init__(self, problems, letters=None, eval_type=None):
        self.problems, self.letters = problems, letters
        self.eval_type = eval_type or ("categorical" if letters else "generative")

    def __len__(self):
        return len(self.problems)

    def __getitem__(self, index):
        question, answer = self.problems[index]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return {"messages": messages, "letters": self.letters}

    def evaluate(self, conversation, response):
        return response == conversation["messages"][-1]["content"]


def scripted_engine(answers, sequence_len=64):
    """An engine that answers each question with answers[question], a list of token ids and strings."""

    def script(sequence):
        for question, parts in answers.items():
            prompt = [BOS, *question.encode()]
            if sequence[: len(prompt)] == prompt:
                ids = [i for part in parts for i in ([part] if isinstance(part, int) else part.encode())]
                return (ids + [END])[min(len(sequence) - len(prompt), len(ids))]
        return END

    return Engine(ScriptedModel(script, sequence_len), ByteTokenizer())


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


def test_repetition_is_the_share_of_long_answers_that_repeat_a_sentence():
    story = [f"Then {name} went to the old mill." for name in ("Pip", "Moss", "Ivy", "Ruby", "Fern", "Rusty")]
    answers = [" ".join(story), " ".join([*story, story[0]]), "Yes. Yes. Yes. Yes. Yes. Yes. Yes.", story[0] * 3]
    assert Score([{"answers": answers}]).repetition == 0.5
    assert Score([{"answers": ["I do not know."]}]).repetition is None


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_categorical_answer_is_the_likeliest_letter_of_the_problem(batch_size):
    # The scripted model gives equal logits to the chosen letter and to X, which is not an option of the problem.
    chosen = {"short": "C", "a longer one": "C", "mid one": "A", "q": "B"}
    engine = scripted_engine({})
    engine.model.script = lambda s: [ord("X"), ord(chosen.get(bytes(s[1:]).decode(), "B"))]
    task = ListTask([("short", "C"), ("a longer one", "A"), ("mid one", "A"), ("q", "C")], letters=["A", "B", "C"])
    score = evaluate_task(task, engine, batch_size=batch_size)
    assert [record["answers"] for record in score.records] == [["C"], ["C"], ["A"], ["B"]]
    assert verdicts(score) == [[True], [False], [True], [False]]
    assert score.accuracy == 0.5


@torch.no_grad()
def test_letters_equal_those_of_full_forward_passes():
    model = random_model(n_kv_head=1)
    letters = list("ABCD")
    task = ListTask([("question " * (i % 5) + str(i), "A") for i in range(20)], letters)
    score = evaluate_task(task, Engine(model, ByteTokenizer()), batch_size=7)
    for i, record in enumerate(score.records):
        logits = model(torch.tensor([ByteTokenizer().render_for_completion(task[i], 64)]))[0, -1]
        assert record["answers"] == [max(letters, key=lambda letter: logits[ord(letter)].item())]
    assert len({record["answers"][0] for record in score.records}) > 1


@pytest.mark.parametrize("max_rows", [1, 3, 64])
def test_generated_answers_are_evaluated_in_task_order(max_rows):
    answers = {"one": ["uno"], "two, a longer question": ["deux"], "three": ["tres, no"], "four": [""]}
    problems = [("one", "uno"), ("two, a longer question", "dos"), ("three", "tres, no"), ("four", "cuatro")]
    progress_calls = []
    score = evaluate_task(
        ListTask(problems),
        scripted_engine(answers),
        max_rows=max_rows,
        progress=lambda done, total: progress_calls.append((done, total)),
    )
    assert verdicts(score) == [[True], [False], [True], [False]]
    assert [record["index"] for record in score.records] == [0, 1, 2, 3]
    assert score.records[1]["answers"] == ["deux"] and progress_calls == [(i, 4) for i in (1, 2, 3, 4)]
    assert len(evaluate_task(ListTask(problems), scripted_engine(answers), max_problems=2).records) == 2


def test_calculator_calls_and_outputs_are_not_part_of_the_evaluated_answer():
    answers = {"6*7?": ["It is ", PYTHON, "6*7", PYTHON_END, "????", "42."]}
    score = evaluate_task(ListTask([("6*7?", "It is 42.")]), scripted_engine(answers))
    assert score.accuracy == 1
    # An output without a calculator result: the model generated the output tokens itself.
    stray = {"6*7?": ["It is ", PYTHON, "no sum", PYTHON_END, OUTPUT, "43", OUTPUT_END, "42."]}
    assert evaluate_task(ListTask([("6*7?", "It is 42.")]), scripted_engine(stray)).accuracy == 1


def test_samples_differ_and_are_reproducible():
    engine = Engine(ScriptedModel(lambda s: [ord("a"), ord("b"), END]), ByteTokenizer())
    settings = dict(num_samples=6, temperature=1.0, max_new_tokens=3)
    task = ListTask([("q", "a"), ("r", "b")])
    score = evaluate_task(task, engine, **settings)
    answers = [record["answers"] for record in score.records]
    assert all(len(a) == 6 for a in answers) and len(set(answers[0])) > 1 and answers[0] != answers[1]
    assert evaluate_task(task, engine, max_rows=2, **settings) == score
    assert evaluate_task(task, engine, seed=1, **settings) != score


def test_greedy_samples_share_one_generated_answer(monkeypatch):
    engine, steps = scripted_engine({"q": ["a"], "r": ["x"]}), []
    forward = engine.backend.forward
    monkeypatch.setattr(engine.backend, "forward", lambda tokens, cache: steps.append(tokens) or forward(tokens, cache))
    score = evaluate_task(ListTask([("q", "a"), ("r", "b")]), engine, num_samples=4)
    assert [record["answers"] for record in score.records] == [["a"] * 4, ["x"] * 4]
    assert verdicts(score) == [[True] * 4, [False] * 4]
    assert max(map(len, steps)) == 2  # one row per problem


def test_prompts_longer_than_the_context_are_cropped(capsys):
    engine = scripted_engine({}, sequence_len=32)
    long = ListTask([("x" * 100, ""), ("x" * 12, "")])
    assert evaluate_task(long, engine, max_new_tokens=100).accuracy == 1
    assert "ListTask: 50.0% of the prompts have more than 16 tokens and are cut" in capsys.readouterr().out
    engine.model.script = lambda s: [ord("X"), ord("A") if len(s) == 32 else ord("B")]
    assert evaluate_task(ListTask([("x" * 100, "A")], ["A", "B"]), engine).accuracy == 1
    assert "100.0% of the prompts have more than 32 tokens" in capsys.readouterr().out


def test_empty_task_raises_user_error():
    with pytest.raises(UserError, match="ListTask: no problems"):
        evaluate_task(ListTask([]), scripted_engine({}))


# Class body, and what the error says after the task's name.
FAULTY_TASKS = [
    ("def evaluate(self, c, a): raise KeyError('oops')", ": KeyError: 'oops'"),
    ("def evaluate(self, c, a): raise SystemExit", ": SystemExit"),
    ("def evaluate(self, c, a): pass", ": evaluate.* returned None, expected True or False"),
    ("def evaluate(self, c, a): return float('nan')", ": evaluate.* returned nan"),
    ("def evaluate(self, c, a): return 'yes'", ": evaluate.* returned 'yes'"),
    ("def evaluate(self, c, a): return 0.5", ": evaluate.* returned 0.5"),
    ("def evaluate_many(self, pairs): return [True]", ": evaluate_many.* returned 1 verdicts, expected 3"),
    ("def evaluate_many(self, pairs): return [True, None, True]", ": evaluate.* returned None"),
    ("def num_examples(self): return 0", ": no problems to score"),
    ("def num_examples(self): return 3.0", ": TypeError: 'float'"),
    ("def get_example(self, i): return None", ", problem 0: expected .*messages"),
    ("def get_example(self, i): return [][i]", ", problem 0: IndexError"),
    ("eval_type = 'choice'", ": eval_type is 'choice'"),
    ("eval_type = 'categorical'", ", problem 0: no letters, and the answer 'Paris' is none of A, B, C, D"),
    ("evaluate = Task.evaluate", ": NotImplementedError"),
    ("def __init__(self): open('/no/such/file')", ": FileNotFoundError"),
    ("def __init__(self, split, path): pass", ": TypeError: .*path"),
    ("def broken(:", ": SyntaxError"),
]
OWN_TASK = """
from tasks.common import Conversation, Message, Task

class MyTask(Task):
    def num_examples(self):
        return 3
    def get_example(self, i):
        return Conversation([Message(role="user", content="Capital?"), Message(role="assistant", content="Paris")])
    def evaluate(self, problem, completion):
        return completion.strip() == problem.answer.strip()
    {body}
"""


@pytest.fixture
def own_task(tmp_path, monkeypatch):
    """own_task(class body) writes tasks/mytask.py with the class MyTask, as the tutorial does."""
    monkeypatch.setattr(mixtures, "__file__", str(tmp_path / "mixtures.py"))
    return lambda body: (tmp_path / "mytask.py").write_text(OWN_TASK.format(body=body), encoding="utf-8")


@pytest.mark.parametrize("body, message", FAULTY_TASKS, ids=lambda v: v[-12:])
def test_error_of_a_faulty_task_names_the_task(body, message, own_task):
    own_task(body)
    with raises_user_error(f"^task MyTask{message}"):
        evaluate_task(mixtures.find_task("MyTask").make(), scripted_engine({}))


def test_two_tasks_of_one_name_are_refused(own_task, tmp_path):
    """Also if one of them is built in: else it would be scored instead of the user's, without a word."""
    own_task("pass")
    (tmp_path / "gsm8k.py").write_text("class MyTask(Task): pass\nclass GSM8K(Task): pass\n")
    with raises_user_error("2 tasks are named MyTask; .*gsm8k.py:MyTask and .*mytask.py:MyTask"):
        mixtures.find_task("MyTask")
    assert mixtures.find_task(f"{tmp_path / 'mytask.py'}:MyTask").corpus == "own"
    assert mixtures.find_task("GSM8K") is mixtures.EVAL_TASKS["GSM8K"]
    (tmp_path / "mine.py").write_text("class GSM8K(Task): pass\n")
    with raises_user_error("2 tasks are named GSM8K"):
        mixtures.find_task("GSM8K")


CONSTRUCTORS = ["pass", "def __init__(self): self.x = 1", "def __init__(self, split): assert split == 'test'"]
CONSTRUCTORS += ["def __init__(self, *, split='train', n=3): assert split == 'test'"]
CONSTRUCTORS += ["eval_type = property(lambda self: 'generative')", "def __init__(self, s): assert s == 'test'"]


@pytest.mark.parametrize("body", CONSTRUCTORS)
def test_own_task_is_found_by_the_name_of_its_class(body, own_task):
    own_task(body)
    task = mixtures.find_task("MyTask")
    assert evaluate_task(task.make(seed=0, corpus="pocket"), scripted_engine({"Capital?": [" Paris"]})).accuracy == 1


@pytest.mark.parametrize(
    "prompt, letters",
    [("Which?\n- x=A\n- y=B\n\nRespond", "AB"), ("Which?\nA. x\n(B) y\nC) z", "ABC"), ("A or B?", "ABCD")],
)
def test_letters_of_a_categorical_task_are_those_of_its_prompt(prompt, letters):
    engine = scripted_engine({})
    engine.model.script = lambda s: [ord("E"), ord(letters[-1])]
    score = evaluate_task(ListTask([(prompt, "A")], eval_type="categorical"), engine)
    assert [record["answers"] for record in score.records] == [[letters[-1]]] and score.accuracy == 0


@pytest.mark.parametrize("letters", [None, ["A", "B"]])
def test_score_on_every_rank_equals_the_score_of_one_process(letters, monkeypatch):
    problems = [(f"question {i}", "AB"[i % 3 > 0]) for i in range(7)]
    engine = scripted_engine({question: [answer] for question, answer in problems[:4]})
    single = evaluate_task(ListTask(problems, letters), engine)
    shares = {}  # rank -> its records

    def gather(out, records, group):  # the ranks run one after another here; the last one gets the records of all
        shares[engine.compute.rank] = records
        out[:] = [shares.get(r, []) for r in range(3)]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    for rank in range(3):
        engine.compute = dataclasses.replace(CPU, rank=rank, world_size=3)
        score = evaluate_task(ListTask(problems, letters), engine)
    assert score == single and [len(shares[r]) for r in range(3)] == [3, 2, 2]


# ---------------------------------------------------------------------------------------------------------------------
# The script


def test_script_writes_samples_and_report(sft_checkpoint, capsys):
    from scripts.chat_eval import main

    samples = sft_checkpoint / "samples.jsonl"
    main(["-i", "sft", "-x", "6", "-m", "4", "--save-samples", str(samples), "--device-type=cpu", "--dtype=float32"])
    output = capsys.readouterr().out
    lines = read_jsonl(samples)
    metrics = report_metrics(sft_checkpoint, "chat-evaluation-sft")
    tasks = dict.fromkeys(line["task"] for line in lines)
    assert {"PocketSums", "PocketFacts", "SpellingBee"} <= set(tasks) and "MMLU" not in tasks
    for task in tasks:
        correct = [v for line in lines if line["task"] == task for v in line["verdicts"]]
        assert len(correct) == 6 and metrics["task_scores"][task] == sum(correct) / 6
        assert f"{task}: {sum(correct) / 6:.2%} [" in output
    section = (sft_checkpoint / "report" / "chat-evaluation-sft.md").read_text(encoding="utf-8")
    assert f"- ChatCORE: {metrics['chat_core']:.4f}\n" in section and "ChatCORE" in output


@pytest.mark.parametrize(
    "flags, message",
    [
        (["-a", "GSM9K"], "no task 'GSM9K'"),
        (["-a", "PocketSums|"], "no task ''.*| separates"),
        (["-x", "0"], "max_problems=0"),
        (["-t", "-1"], "temperature=-1"),
        (["--save_samples", "no/such/folder.jsonl"], "no such folder"),
        (["--step", "7"], "no checkpoint of step 7"),
    ],
)
def test_script_raises_user_errors(sft_checkpoint, flags, message):
    from scripts.chat_eval import main

    with pytest.raises(UserError, match=message):
        main(["-i", "sft", "--device-type=cpu", *flags])


def test_default_source_is_the_first_stage_with_a_checkpoint(empty_base, capsys):
    chat = ("sft", "rl", "mid", "base")

    def chosen(stages, **flags):
        args = SimpleNamespace(**{"source": "", "model_tag": None} | flags)
        choose_source(args, stages)
        return args.source, capsys.readouterr().err

    assert chosen(chat) == ("sft", "")  # the error of load_model then names the command that makes it
    for stage, folder in (("base", "base"), ("mid", "mid"), ("rl", "chatrl"), ("sft", "chatsft")):
        assert chosen(chat[:3])[0] == {"base": "sft", "mid": "sft", "rl": "mid", "sft": "rl"}[stage]
        checkpoint = empty_base / f"{folder}_checkpoints" / "d1" / "step_000001"
        checkpoint.mkdir(parents=True)
        (checkpoint / "meta.json").touch()
        source, printed = chosen(chat)
        assert source == stage and (f"the {stage} model" in printed) == (stage != "sft")
    assert chosen(chat, model_tag="d2")[0] == "sft" and chosen(chat, source="mid") == ("mid", "")
