"""Tasks: the interface, public data sets, generated tasks, and the user's own conversations."""

import copy
import gzip
import json
import pickle
import re
import subprocess
import threading
import time
from collections import Counter
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import MIRROR, QuietHandler, environment, needs_mirror, python_command, raises_user_error, serve_http

from dev import gen_synthetic_data
from nanochat.calculator import calculate
from nanochat.common import UserError
from nanochat.dclm.tasks import load_tasks
from nanochat.tokenizer import get_tokenizer
from tasks import mixtures
from tasks.arc import ARC
from tasks.common import (
    Conversation,
    Message,
    PublicTask,
    Task,
    TaskMixture,
    TaskSequence,
    render_mc,
    user_and_assistant,
)
from tasks.customjson import CustomJSON
from tasks.gsm8k import GSM8K, final_number, split_calls
from tasks.humaneval import HumanEval
from tasks.mmlu import MMLU
from tasks.pocket import PocketChat, PocketFacts, PocketIdentity, PocketPeople, PocketStories, PocketSums
from tasks.smoltalk import SmolTalk
from tasks.spellingbee import PocketLetters, SimpleSpelling, SpellingBee, question_templates

SPLITS = ("train", "val", "test")


@pytest.fixture(autouse=True)
def no_hosts(empty_base, monkeypatch):
    """Makes all public hosts unreachable; the fixture `mirror` replaces them by a local copy."""
    for host in ("HUB", "BUCKET", "GITHUB"):
        monkeypatch.setenv(f"NANOCHAT_{host}_URL", str(empty_base / "nowhere"))


class Numbers(Task):
    """Example i is the number first + i."""

    def __init__(self, n, first=0, **kwargs):
        super().__init__(**kwargs)
        self.n, self.first = n, first

    def num_examples(self):
        return self.n

    def get_example(self, index):
        return self.first + index


def question(conversation):
    return conversation["messages"][0]["content"]


def as_text(conversation):
    """The last answer as text, including calculator calls and their outputs."""
    content = conversation["messages"][-1]["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def assert_well_formed(conversation):
    messages = conversation["messages"]
    assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2) and messages
    for m in messages:
        parts = [{"type": "text", "text": m["content"]}] if isinstance(m["content"], str) else m["content"]
        assert parts and all(p["text"] and p["type"] in ("text", "python", "python_output") for p in parts)
        for call, output in zip(parts, parts[1:], strict=False):
            if call["type"] == "python" and m is messages[-1]:
                assert output["type"] == "python_output"


# ---------------------------------------------------------------------------------------------------------------------
# The interface


def test_start_stop_and_step_select_examples():
    assert list(Numbers(10)) == list(range(10))
    sliced = Numbers(10, start=2, stop=9, step=3)
    assert len(sliced) == 3 and list(sliced) == [2, 5, 8] and sliced[-1] == 8
    assert len(Numbers(3, stop=100)) == 3 and len(Numbers(3, start=5)) == 0
    with pytest.raises(IndexError):
        sliced[3]


def test_mixture_has_a_fixed_order_and_repeats_tasks_listed_twice():
    few, many = Numbers(3, first=100), Numbers(40)
    mixture = TaskMixture([many, few, few])
    assert len(mixture) == 46 and sorted(mixture) == [*range(40), 100, 100, 101, 101, 102, 102]
    assert list(mixture) == list(TaskMixture([Numbers(40), few, few])) != [*many, *few, *few]
    pairs = [(t, i) for t, n in enumerate((40, 3, 3)) for i in range(n)]
    Random(42).shuffle(pairs)
    assert list(mixture) == [(many, few, few)[t][i] for t, i in pairs]
    assert list(TaskSequence([few, many])) == [*few, *many]
    assert list(TaskMixture([many, few], stop=5)) == list(TaskMixture([many, few]))[:5]


def test_render_mc_prompt():
    assert render_mc("Why?", ["A", "B"], ["so", "not so"]) == (
        "Multiple Choice question: Why?\n- so=A\n- not so=B\n\nRespond only with the letter of the correct answer."
    )
    with pytest.raises(ValueError):
        render_mc("Why?", ["A", "B"], ["so"])


def test_fingerprint_changes_with_the_content(empty_base, tmp_path, monkeypatch):
    def own(name, n):
        return CustomJSON(write(tmp_path / "own.jsonl", named(name, n)))

    few, many = Numbers(3, first=100), Numbers(1000)
    tasks = [
        few,
        many,
        Numbers(1000, stop=999),
        Numbers(1000, first=1),
        TaskMixture([few, many]),
        TaskMixture([many, few]),
    ]
    tasks += [TaskMixture([few, many, few]), TaskSequence([few, many]), own("a", 600), own("b", 600), own("a", 601)]
    tasks += [PocketSums(split, size, seed) for split, size, seed in (("train", 9, 0), ("test", 9, 0), ("train", 9, 1))]
    prints = [task.fingerprint() for task in tasks]
    assert len(set(prints)) == len(prints) and all(re.fullmatch("[0-9a-f]{64}", value) for value in prints)
    assert TaskMixture([Numbers(3, first=100), Numbers(1000)]).fingerprint() == prints[4]
    monkeypatch.setattr("nanochat.pocket.world.FILES", [write(tmp_path / "world.txt", "another world")])
    assert PocketSums("train", 9).fingerprint() != prints[-3]


def test_conversation_and_message_of_the_tutorial():
    conversation = Conversation([Message(role="user", content="q"), Message(role="assistant", content="a")], level=3)
    assert conversation["messages"] == user_and_assistant("q", "a")["messages"]
    assert (conversation.answer, conversation.messages[0].role, conversation.level) == ("a", "user", 3)
    assert pickle.loads(pickle.dumps(conversation)) == copy.deepcopy(conversation) == conversation


# ---------------------------------------------------------------------------------------------------------------------
# Public data sets


def test_split_calls_and_final_number_of_gsm8k():
    parts = split_calls("She has 12 x 2 = <<12*2=24>>24 pages.\nSo <<a=b=3>>3.\n#### 1,024")
    assert [(p["type"], p["text"]) for p in parts] == [
        ("text", "She has 12 x 2 = "),
        ("python", "12*2"),
        ("python_output", "24"),
        ("text", "24 pages.\nSo "),
        ("python", "a=b"),  # split at the last "="
        ("python_output", "3"),
        ("text", "3.\n#### 1,024"),
    ]
    assert final_number("x\n#### -1,024.5") == "-1024.5" and final_number("It is #### 7.") == "7"
    assert final_number("1024") is None


@needs_mirror
def test_arc_problems_and_evaluation(mirror):
    for subset, size in (("ARC-Easy", 1226), ("ARC-Challenge", 580)):
        task = ARC(subset, "test")
        assert len(task) == size and task.eval_type == "categorical"
        for conversation in (task[i] for i in range(0, size, 50)):
            assert_well_formed(conversation)
            answer, letters = as_text(conversation), conversation["letters"]
            assert answer in letters and all(f"={letter}\n" in question(conversation) for letter in letters)
            wrong = next(letter for letter in letters if letter != answer)
            assert task.evaluate(conversation, answer) and not task.evaluate(conversation, wrong)
            assert task.reward(conversation, answer) == 1.0


@needs_mirror
def test_mmlu_problems_and_evaluation(mirror):
    test, train = MMLU("all", "test", stop=100), MMLU("auxiliary_train", "train")
    assert len(test) == 100 and len(train) == 3858
    for task in (test, train):
        for i in range(0, 100, 20):
            assert_well_formed(task[i])
            assert as_text(task[i]) in "ABCD" and task.evaluate(task[i], as_text(task[i]))


@needs_mirror
def test_gsm8k_problems_and_evaluation(mirror):
    train, test = GSM8K("main", "train"), GSM8K("main", "test", stop=420)
    assert len(train) == 7473 and len(test) == 420
    for i in range(0, 420, 20):
        assert_well_formed(test[i])
        text = as_text(test[i])
        number = re.search(r"#### (\S+)", text)[1]
        assert test.evaluate(test[i], text) and test.evaluate(test[i], f"so\n#### {number}")
        assert not test.evaluate(test[i], "#### 123456") and not test.evaluate(test[i], number)


@needs_mirror
def test_smoltalk_conversations(mirror):
    train = SmolTalk("train")
    assert len(train) == 3571 and len(SmolTalk("test")) == 429
    for i in range(0, 3571, 100):
        roles = [m["role"] for m in train[i]["messages"]]
        roles = roles[1:] if roles[0] == "system" else roles
        assert roles[:2] == ["user", "assistant"]


class RawRows(PublicTask):
    """The rows of a public data set as they are."""

    def conversation(self, row):
        return row


@needs_mirror
def test_rows_are_shuffled_like_in_the_datasets_library(mirror, tmp_path):
    datasets = pytest.importorskip("datasets")
    path = MIRROR / "allenai/ai2_arc/resolve/main/ARC-Challenge/validation-00000-of-00001.parquet"
    shuffled = datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path)).shuffle(seed=42)
    task = RawRows("allenai/ai2_arc", "ARC-Challenge/validation")
    assert [row["id"] for row in task] == shuffled["id"]


def write_shards(folder, n):
    """Writes a training split of `n` conversations, each in a file of its own."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        rows = [{"messages": [{"role": "user", "content": f"{i}/{n}"}, {"role": "assistant", "content": "a"}]}]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"train-{i:05d}-of-{n:05d}.parquet")


@pytest.mark.parametrize("n", [1, 4])
def test_data_sets_of_one_or_several_files_are_downloaded_once(n, tmp_path, monkeypatch):
    host = tmp_path / "host"
    write_shards(host / "HuggingFaceTB/smol-smoltalk/resolve/main/data", n)
    monkeypatch.setenv("NANOCHAT_HUB_URL", str(host))
    assert {question(c) for c in SmolTalk("train")} == {f"{i}/{n}" for i in range(n)}
    monkeypatch.setenv("NANOCHAT_HUB_URL", str(tmp_path / "unreachable"))
    assert len(SmolTalk("train")) == n


def test_failed_download_raises_user_error(empty_base):
    with raises_user_error("openai/gsm8k.*NANOCHAT_HUB_URL"):
        GSM8K("main", "train")
    assert not list(empty_base.rglob("*.parquet"))
    with pytest.raises(UserError, match="words_alpha.txt"):
        SpellingBee(size=1, corpus="public")


PAGE = "<!DOCTYPE html>\n<html>Log in</html>"
REFUSED = {
    PAGE: "a web page",
    "": "an empty file",
    "version https://git-lfs.github.com/spec/v1": "Git LFS",
    "PAR1abc": "no",
}
REFUSED |= {'{"error": "Too many requests"}': "too many requests"}


class PageHandler(QuietHandler):
    """Answers every request with the page, as a captive portal does."""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(PAGE.encode())


@pytest.mark.parametrize("body", REFUSED)
def test_fetched_parquet_is_checked_before_it_is_kept(body, empty_base, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_HUB_URL", str(tmp_path / "host"))
    hosted = tmp_path / "host/openai/gsm8k/resolve/main/main/train-00000-of-00001.parquet"
    hosted.parent.mkdir(parents=True)
    hosted.write_text(body, encoding="utf-8")
    with raises_user_error(f"openai/gsm8k.*{REFUSED[body]}.*nothing was kept"):
        GSM8K("main", "train")
    assert not [path for path in empty_base.rglob("*") if path.is_file()]


def test_page_of_a_captive_portal_is_refused_for_every_kind_of_file(empty_base, monkeypatch):
    with serve_http(PageHandler) as server:
        for host in ("HUB", "BUCKET", "GITHUB"):
            monkeypatch.setenv(f"NANOCHAT_{host}_URL", server.url)
        for make in (lambda: HumanEval("basic"), SpellingBee, mixtures.identity_conversations, load_tasks):
            with raises_user_error("a web page"):
                make()
    assert not [path for path in empty_base.rglob("*") if path.is_file() and path.suffix != ".lock"]


class SlowHandler(QuietHandler):
    """Answers with two conversations, of which the second arrives later."""

    requests = []

    def do_GET(self):
        line = json.dumps(user_and_assistant("a", "b")["messages"]).encode() + b"\n"
        self.requests.append(self.path)
        self.send_response(200)
        self.send_header("Content-Length", str(2 * len(line)))
        self.end_headers()
        for _ in range(2):
            self.wfile.write(line)
            self.wfile.flush()
            time.sleep(0.5)


@pytest.mark.slow
def test_one_rank_downloads_a_file_for_its_host(empty_base):
    program = "from tasks.mixtures import identity_conversations; print(len(identity_conversations()))"
    with serve_http(SlowHandler) as server:
        envs = [
            environment(NANOCHAT_BUCKET_URL=server.url, RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE="3")
            for r in range(3)
        ]
        command = python_command("-c", program)
        started = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for env in envs]
        outputs = [process.communicate(timeout=60)[0] for process in started]
    assert outputs == ["2\n"] * 3
    assert SlowHandler.requests == ["/identity_conversations.jsonl"]


def test_page_that_an_older_version_kept_is_noticed(empty_base, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_HUB_URL", str(tmp_path / "host"))
    write_shards(tmp_path / "host/HuggingFaceTB/smol-smoltalk/resolve/main/data", 1)
    kept = empty_base / "task_data/HuggingFaceTB/smol-smoltalk/data/train-00000-of-00001.parquet"
    kept.parent.mkdir(parents=True)
    for path in (kept, empty_base / "words_alpha.txt", empty_base / "identity_conversations.jsonl"):
        path.write_text(PAGE, encoding="utf-8")
    assert len(SmolTalk("train")) == 1
    with raises_user_error("words_alpha.txt is not a list of English words"):
        SpellingBee(size=1)
    with raises_user_error("identity_conversations.jsonl:1: not JSON"):
        mixtures.identity_conversations()


def test_damaged_parquet_names_the_file_and_what_to_do(empty_base):
    folder = empty_base / "task_data/HuggingFaceTB/smol-smoltalk/data"
    write_shards(folder, 1)
    (path,) = folder.iterdir()
    data = path.read_bytes()
    path.write_bytes(data[:4] + bytes(len(data) // 2) + data[4 + len(data) // 2 :])
    with raises_user_error(f"{path} is damaged .*; delete it"):
        SmolTalk("train")


@needs_mirror
def test_fingerprints_of_public_tasks(mirror):
    prints = [
        ARC(*args, **kw).fingerprint()
        for args in (("ARC-Easy", "test"), ("ARC-Easy", "train"))
        for kw in ({}, {"stop": 9})
    ]
    assert len(set(prints)) == 4 and prints[0] == ARC("ARC-Easy", "test").fingerprint()


# ---------------------------------------------------------------------------------------------------------------------
# Generated tasks

GENERATED = {
    "sums": PocketSums,
    "facts": PocketFacts,
    "stories": PocketStories,
    "identity": PocketIdentity,
    "chat": PocketChat,
    "letters": PocketLetters,
    "bee": lambda split, size, seed=0: SpellingBee(size, split, "pocket", seed),
    "spelling": lambda split, size, seed=0: SimpleSpelling(size, split, "pocket", seed),
}


@pytest.mark.parametrize("name", GENERATED)
def test_generated_tasks_depend_only_on_the_seed(name):
    make = GENERATED[name]
    assert list(make("train", 30, seed=1)) == list(make("train", 30, seed=1)) != list(make("train", 30, seed=2))
    assert make("train", 30, seed=1)[29] == make("train", 1000, seed=1)[29]  # not on the size
    for split in SPLITS:
        for conversation in make(split, 100, seed=3):
            assert_well_formed(conversation)


@pytest.mark.parametrize("name", ["sums", "facts", "bee"])
def test_splits_of_generated_tasks_have_no_common_problems(name):
    def key(conversation):
        """The part of a problem that must not occur in another split."""
        if name == "facts":
            return question(conversation).split("\n")[0]
        calls = [p["text"] for p in conversation["messages"][-1]["content"] if p["type"] == "python"]
        return tuple(calls)

    keys = {split: {key(c) for seed in (1, 2) for c in GENERATED[name](split, 700, seed=seed)} for split in SPLITS}
    assert not keys["train"] & keys["test"] and not keys["train"] & keys["val"] and not keys["val"] & keys["test"]


@pytest.mark.parametrize("name", ["sums", "bee"])
def test_tool_outputs_match_the_calculator(name):
    task = GENERATED[name]("test", 200)
    for conversation in task:
        parts = conversation["messages"][-1]["content"]
        calls = [(p["text"], q["text"]) for p, q in zip(parts, parts[1:], strict=False) if p["type"] == "python"]
        assert calls and all(calculate(call) == output for call, output in calls)
        assert task.evaluate(conversation, as_text(conversation))
        number = final_number(as_text(conversation))
        assert number == calls[-1][1]
        assert not task.evaluate(conversation, f"#### {int(number) + 1}") and not task.evaluate(conversation, number)


def test_spelling_bee_answers_spell_the_word_and_count_the_letter():
    for conversation in SpellingBee(200, "train", "pocket"):
        text = as_text(conversation)
        word, letter = re.search(r"'(\w+)'\.count\('(\w)'\)", text).groups()
        assert f"{word}:{','.join(word)}\n" in text
        assert all(f"{i}:{c}" in text for i, c in enumerate(word, 1))
        assert f"makes {word.count(letter)}." in text and f"({word.count(letter) + 1})" not in text
        assert word in question(conversation).lower()
    templates = question_templates("count", "public")
    assert len(set(templates)) >= 50 and set(question_templates("count", "pocket")) < set(templates)
    assert all(t.count("{l}") == 1 and t.count("{w}") == 1 for t in templates)


@needs_mirror
def test_spelling_bee_with_public_words(mirror):
    task = SpellingBee(50, "test", "public")
    assert len(task.words) == 370_099 and all(word.isalpha() for word in task.words[::1000])
    assert any(not question(c).isascii() for c in task)
    assert as_text(SimpleSpelling(size=1)[0]).count(":") == 1


def test_facts_accept_only_the_correct_choice():
    task = PocketFacts("test", 50)
    for conversation in task:
        choices = [line[2:] for line in question(conversation).splitlines() if line.startswith("- ")]
        assert len(set(choices)) == 4
        assert [choice for choice in choices if task.evaluate(conversation, f" {choice}\n")] == [as_text(conversation)]


def test_earlier_replies_stand_with_and_without_calls():
    """Clients of the API send earlier replies as text; such a reply is no example, since it computes without a call."""
    with_calls = without = 0
    for conversation in PocketChat("train", 1500):
        *earlier, last = conversation["messages"][1::2]
        assert "weight" not in last
        for message in earlier:
            text = as_text({"messages": [message]})
            is_sum = bool(re.search(r"#### \d+$", text))
            with_calls += is_sum and isinstance(message["content"], list)
            without += message.get("weight") == 0
            assert is_sum <= (isinstance(message["content"], list) or message.get("weight") == 0), message
    assert with_calls > 20 and without > 20


def test_stories_must_have_the_requested_characters():
    task = PocketStories("test", 400)
    assert all(task.evaluate(c, as_text(c)) for c in task)
    conversation = next(c for c in task if len(re.findall(r"about ([A-Z]\w+) and ([A-Z]\w+)\.", question(c))))
    one, other = re.search(r"about (\w+) and (\w+)\.", question(conversation)).groups()
    story = as_text(conversation)
    assert not task.evaluate(conversation, story.replace(other, one))  # one character twice
    assert not task.evaluate(conversation, re.sub(rf"\b{one}\b", "Bob", story))
    assert not task.evaluate(conversation, f"{story} {one} the unicorn was happy.")
    assert not task.evaluate(conversation, "I do not know any stories.")


def test_answers_about_letters_agree_with_the_word():
    kinds = set()
    for conversation in PocketLetters("train", 600):
        content = conversation["messages"][-1]["content"]
        parts, text = [p["text"] for p in content], "".join(p["text"] for p in content if p["type"] == "text")
        assert PocketLetters("train", 1).evaluate(conversation, text)
        assert not PocketLetters("train", 1).evaluate(conversation, text[:-2])
        assert not PocketLetters("train", 1).evaluate(conversation, text[:-2] + "1" + text[-2:])
        if len(parts) == 1:  # words to repeat
            assert text.lower() in question(conversation).lower() and kinds.add("repeat") is None
            continue
        _, call, result, _ = parts
        request, word = re.fullmatch(r"(.*): ['\"]?(\w+)['\"]?", call).groups()
        kind, argument = (*request.split(), "")[:2]
        letters = list(word.lower())
        if kind == "letter":
            expected = letters[-1 if argument == "-1" else int(argument) - 1]
            assert re.search(r"(first|last) letter is|Letter number \d is", text)
        else:
            expected = {"letters": " ".join(letters), "backwards": " ".join(letters[::-1]), "length": str(len(letters))}
            expected = (expected | {"count": str(letters.count(argument))})[kind]
        assert result == expected and word.lower() in question(conversation).lower()
        endings = rf"\.| letters\.|\n#### {result}|, so {'no' if result == '0' else 'yes'}\."
        assert re.search(rf"{result}({endings})$", text), text
        kinds.add((kind, argument == "-1", "so yes" in text, "so no" in text))
    assert len(kinds) == 9


def test_people_ask_more_than_300_questions_of_eight_kinds():
    items = list(PocketPeople())
    counts = Counter(item["kind"] for item in items)
    assert len(items) >= 300 and len(counts) >= 8 and min(counts.values()) >= 20
    assert all(item["verdicts"] for item in items)
    assert sum(len(item["messages"]) > 2 for item in items) >= 36
    for item in items:
        assert_well_formed(item)


PEOPLE = """== sums

? 3 apples, 2 eaten, left?
= 1

== facts

? is pip a cat
+ \\bno\\b|mouse
- \\byes\\b

== outside

? who rules Peru
* refuses

== stories

? Tell of Pip.
! Pip ran.
? again
+ Pip
* story
"""


@pytest.mark.parametrize(
    "index, right, wrong",
    [
        (0, ["That leaves 3-2=1.\n#### 1", "1"], ["3", "One", "#### 11", ""]),
        (1, ["Pip is a mouse, so no.", "No!"], ["Yes, a mouse", "I do not know that.", ""]),
        (2, ["I do not know that.", "I only know the pocket world."], ["It is Pip.", ""]),
        (
            3,
            [" ".join(f"Pip ran {i} times." for i in range(20))],
            ["Pip ran.", "Pip ran. " * 30, "I do not know."],
        ),
    ],
)
def test_verdicts_on_answers_to_people(tmp_path, index, right, wrong):
    task = PocketPeople(write(tmp_path / "people.txt", PEOPLE))
    assert len(task) == 4 and [len(item["messages"]) for item in task] == [2, 2, 2, 4]
    assert [item["kind"] for item in task] == ["sums", "facts", "outside", "stories"]
    assert all(task.evaluate(task[index], answer) for answer in right)
    assert not any(task.evaluate(task[index], answer) for answer in wrong)


def test_identity_answers_must_have_the_name():
    task = PocketIdentity("test", 100)
    assert all(task.evaluate(c, as_text(c)) and not task.evaluate(c, "I am Bob.") for c in task)


# ---------------------------------------------------------------------------------------------------------------------
# Mixtures


@pytest.mark.parametrize("stage", [mixtures.midtraining, mixtures.sft])
def test_pocket_mixtures_need_no_network(stage):
    train, val = stage("pocket")
    assert len(train) > 2000 and 150 < len(val) < len(train) / 4
    questions = {question(train[i]) for i in range(0, len(train), 7)}
    assert len(questions) > 250
    for i in range(0, len(val), 9):
        assert_well_formed(val[i])


@needs_mirror
def test_sizes_of_the_public_mixtures(mirror, monkeypatch):
    monkeypatch.setattr(mixtures, "SimpleSpelling", lambda size: SimpleSpelling(size=size // 100))
    train, val = mixtures.midtraining("public")
    assert len(train) == 3571 + 3858 + 7473 + 2 * 300 + 2000 + 80_000 and len(val) == 429 + 5200 + 420
    train, val = mixtures.sft("public")
    assert len(train) == 2251 + 1119 + 7473 + 3571 + 300 + 3 + 300 and len(val) == 429
    assert mixtures.identity_conversations(public=False) is None  # the public ones do not count as the user's


def test_evaluation_tasks_accept_a_seed():
    assert {"ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "SpellingBee", "PocketSums", "PocketFacts"} <= set(
        mixtures.EVAL_TASKS
    )
    for name, entry in mixtures.EVAL_TASKS.items():
        if name != "PocketPeople" and name.startswith("Pocket") or name == "SpellingBee":
            one, two = (entry.make(seed=seed, corpus="pocket") for seed in (0, 7))
            assert [question(one[i]) for i in range(20)] != [question(two[i]) for i in range(20)]
            assert one.baseline == (0.25 if name == "PocketFacts" else 0.0)  # four choices


# ---------------------------------------------------------------------------------------------------------------------
# The user's own conversations

CONVERSATION = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]


def test_custom_json_reads_arrays_and_objects(tmp_path):
    path = tmp_path / "conversations.jsonl"
    path.write_text(
        f"{json.dumps(CONVERSATION)}\n\n{json.dumps({'messages': CONVERSATION, 'id': 7})}\n", encoding="utf-8"
    )
    assert list(CustomJSON(path)) == [{"messages": CONVERSATION}] * 2


def write(path, text):
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return path


def as_sharegpt(**fields):
    return {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}], **fields}


OPENAI = {"messages": CONVERSATION}
TEXT_PART = [{"type": "text", "text": "Hi"}]
FORMS = {
    "array": json.dumps([OPENAI, OPENAI]),
    "pretty array": json.dumps([OPENAI, OPENAI], indent=2),
    "comma after each line": f"{json.dumps(OPENAI)},\n{json.dumps(OPENAI)},\n",
    "array of lists": json.dumps([CONVERSATION, CONVERSATION]),
    "pretty objects": json.dumps(OPENAI, indent=2) + "\n" + json.dumps(OPENAI, indent=2),
    "pretty lists": json.dumps(CONVERSATION, indent=1) + "\n" + json.dumps(CONVERSATION, indent=1),
    "sharegpt": json.dumps(as_sharegpt()) + "\r\n" + json.dumps(as_sharegpt(id=1)) + "\r\n",
    "sharegpt array": json.dumps([as_sharegpt(), as_sharegpt()]),
    "bom": "\ufeff" + json.dumps(OPENAI) + "\n\ufeff" + json.dumps({"messages": CONVERSATION, "tools": []}),
    "roles": json.dumps([[{"role": "User", "content": TEXT_PART}, CONVERSATION[1]], CONVERSATION]),
}


@pytest.mark.parametrize("form", FORMS)
def test_custom_json_reads_the_common_forms(form, tmp_path):
    assert list(CustomJSON(write(tmp_path / "c.json", FORMS[form]))) == [OPENAI] * 2


def test_custom_json_reads_other_encodings(tmp_path):
    (tmp_path / "c.jsonl").write_bytes(json.dumps(OPENAI).encode("utf-16"))
    (tmp_path / "c.gz").write_bytes(gzip.compress(json.dumps(OPENAI).encode()))
    for name in ("c.jsonl", "c.gz"):
        assert list(CustomJSON(filepath=str(tmp_path / name))) == [OPENAI]


def test_custom_json_reads_system_messages_weights_and_text_parts(tmp_path):
    answers = [
        {"role": "assistant", "content": "No.", "weight": 0},
        {"role": "assistant", "content": "Yes.", "weight": 1},
    ]
    messages = [{"role": "developer", "content": [*TEXT_PART, *TEXT_PART]}, CONVERSATION[0], answers[0]]
    messages += [{"role": "user", "content": "half \ud83d \u2028"}, answers[1]]
    text = json.dumps({"messages": messages}) + json.dumps(as_sharegpt(system="Be brief."))
    first, second = CustomJSON(write(tmp_path / "c.jsonl", text))
    assert first["messages"] == [
        {"role": "system", "content": "Hi\n\nHi"},
        CONVERSATION[0],
        answers[0],
        {"role": "user", "content": "half ? \u2028"},
        {"role": "assistant", "content": "Yes."},
    ]
    assert second["messages"] == [{"role": "system", "content": "Be brief."}, *CONVERSATION]


def test_custom_json_reads_what_chat_cli_and_the_page_save(tmp_path):
    parts = [("text", "It is "), ("python", "2+2"), ("python_output", "4"), ("text", "4.")]
    answer = {"role": "assistant", "content": [{"type": kind, "text": text} for kind, text in parts]}
    saved = json.dumps({"messages": [CONVERSATION[0], answer]}, indent=2, ensure_ascii=False)
    step = {"type": "calculator", "expression": "2+2", "result": "4", "position": 6}
    exported = {"role": "assistant", "content": "It is 4.", "tool_steps": [step]}
    page = json.dumps({"title": "t", "created": "2026", "messages": [CONVERSATION[0], exported]}, indent=2)
    for text in (saved, page):
        assert CustomJSON(write(tmp_path / "c.json", text))[0]["messages"] == [CONVERSATION[0], answer]


def test_messages_of_weight_0_are_not_trained_on(base, tmp_path):
    messages = [CONVERSATION[0], CONVERSATION[1] | {"weight": 0}, CONVERSATION[0], CONVERSATION[1]]
    (ids, mask), (_, plain) = (
        get_tokenizer().render_conversation({"messages": m}) for m in (messages, CONVERSATION * 2)
    )
    half = len(plain) // 2 + 1
    assert len(mask) == len(ids) and not any(mask[:half]) and mask[half:] == plain[half:]


def test_custom_json_accepts_a_system_message_and_parts(tmp_path):
    path = tmp_path / "conversations.jsonl"
    parts = [{"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"}]
    messages = [{"role": "system", "content": "Be brief."}, CONVERSATION[0], {"role": "assistant", "content": parts}]
    path.write_text(json.dumps(messages), encoding="utf-8")
    assert list(CustomJSON(path)) == [{"messages": messages}]


@pytest.mark.parametrize(
    "line, message",
    [
        ('[{"role": "user"', "not JSON"),
        ("[]", "at least two messages"),
        ('{"text": "x"}', "at least two messages"),
        ("3", "messages"),
        (json.dumps(CONVERSATION[:1]), "at least two messages"),
        (json.dumps(CONVERSATION[::-1]), "message 1 .*'user'"),
        (json.dumps([CONVERSATION[0], CONVERSATION[0]]), "message 2 .*'assistant'"),
        (json.dumps([CONVERSATION[0], {"role": "assistant"}]), "message 2 .*content"),
        (json.dumps([{"role": "user", "content": ["Hi"]}, CONVERSATION[1]]), "message 1 .*content"),
        (json.dumps([{"role": "system", "content": "Be brief."}, CONVERSATION[0]]), "at least two messages"),
        ('["a", "b"]', "message 1 .*role"),
        (json.dumps(CONVERSATION)[:40], "not JSON"),  # a cut line
        (json.dumps({"instruction": "a", "output": "b"}), "fields instruction, output; readable are .*ShareGPT"),
        (json.dumps([{"prompt": "a", "chosen": "b", "rejected": "c"}]), "fields prompt, chosen, rejected"),
        (json.dumps({"messages": [*CONVERSATION, CONVERSATION[0]]}), "message 3, the last one, is the user's"),
        (json.dumps([CONVERSATION[0], {"role": "assistant", "content": None, "tool_calls": [1]}]), "has tool_calls"),
        (json.dumps([CONVERSATION[0], CONVERSATION[1] | {"weight": 0.5}]), "weight 0.5"),
        (json.dumps([CONVERSATION[0], CONVERSATION[1] | {"tool_steps": [{}]}]), "tool_steps"),
        ("[" * 100_000, "not JSON"),
        ("prompt,answer", "not JSON"),
        ("\udce9", "not UTF-8"),
    ],
)
def test_custom_json_error_names_the_line(line, message, tmp_path):
    path = tmp_path / "conversations.jsonl"
    path.write_bytes(
        f"{json.dumps(CONVERSATION)}\n{line}\n{json.dumps(CONVERSATION)}".encode("utf-8", "surrogateescape")
    )
    with raises_user_error(f"^{re.escape(f'{path}:2: ')}.*{message}"):
        CustomJSON(path)


def test_custom_json_error_in_a_pretty_printed_array_names_the_line(tmp_path):
    for text, line in (
        (json.dumps([OPENAI, OPENAI], indent=1)[:-30], 22),
        (json.dumps([OPENAI, CONVERSATION[:1]], indent=1), 14),
    ):
        with raises_user_error(f"c.json:{line}: "):
            CustomJSON(write(tmp_path / "c.json", text))


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_empty_file_raises_user_error(text, tmp_path):
    with raises_user_error("c.jsonl is empty"):
        CustomJSON(write(tmp_path / "c.jsonl", text))


def test_custom_json_reads_parquet_and_names_the_row(tmp_path):
    """As pandas and `datasets` write conversations; fields that other rows lack are null."""
    extra = [message | {"weight": None, "tool_calls": None} for message in CONVERSATION]
    pq.write_table(pa.table({"messages": [extra, extra, extra[:1]], "id": [1, 2, 3]}), path := tmp_path / "c.parquet")
    with raises_user_error("c.parquet:3: .*at least two messages"):
        CustomJSON(path)
    pq.write_table(pa.table({"messages": [extra, extra]}), path)
    assert list(CustomJSON(path)) == [{"messages": CONVERSATION}] * 2
    path.write_bytes(path.read_bytes()[:-9])
    with raises_user_error("c.parquet cannot be read"):
        CustomJSON(path)


def named(name, n):
    """`n` conversations about `name`, as JSON lines."""
    return "".join(
        json.dumps([CONVERSATION[0], {"role": "assistant", "content": f"{name} {i}"}]) + "\n" for i in range(n)
    )


def count(task, name):
    return sum(as_text(c).startswith(f"{name} ") for c in task)


def test_conversations_are_added_with_their_weights(empty_base, tmp_path, capsys, monkeypatch):
    mixture = TaskMixture([CustomJSON(write(tmp_path / "m.jsonl", named("m", 30)))])
    monkeypatch.setattr(mixtures, "sft", lambda corpus: (mixture, mixture))
    one, two = write(tmp_path / "one.jsonl", named("one", 20)), write(tmp_path / "two:2", named("two", 20))
    train, val = mixtures.training_tasks("sft", "pocket", [f"{one}:2.25", str(two)])
    assert (count(train, "one"), count(train, "two"), count(train, "m"), len(train)) == (45, 20, 30, 95)
    assert val is mixture and len(val) == 30
    assert f"{one}: 20 conversations x 2.25 of 95" in capsys.readouterr().out
    assert count(mixtures.training_tasks("sft", "pocket", [f"{one}:.01"])[0], "one") == 1
    for flag, message in ((f"{one}:0", "weight"), (f"{one}:-1", "weight"), (f"{one}:x", "one.jsonl:x")):
        with raises_user_error(message):
            mixtures.training_tasks("sft", "pocket", [flag])


def test_training_on_own_conversations_only(empty_base, tmp_path):
    few, many = write(tmp_path / "few.jsonl", named("few", 20)), write(tmp_path / "many.jsonl", named("many", 200))
    train, val = mixtures.training_tasks("mid", "public", [f"{few}:2", str(many)], only=True)
    assert (len(train), len(val)) == (2 * 20 + 200, 20 + 200)
    assert count(train, "many") == 200
    with raises_user_error("needs --conversations"):
        mixtures.training_tasks("mid", "public", only=True)


@pytest.mark.parametrize("stage", ["mid", "sft"])
def test_identity_file_replaces_what_the_pocket_mixture_says_of_the_model(empty_base, stage):
    write(empty_base / "identity_conversations.jsonl", named("Ada", 60))
    train, val = mixtures.training_tasks(stage, "pocket")
    persona = [task for task in train.tasks if as_text(task[0]).startswith("Ada")]
    assert sum(map(len, persona)) == 2 * mixtures.POCKET_ROWS[PocketIdentity][stage]
    assert not any("nanochat" in str(task[i]).lower() for task in (train, val) for i in range(0, len(task), 40))


def test_custom_json_error_for_a_missing_file_names_the_command(tmp_path):
    with pytest.raises(UserError, match="gen_synthetic_data"):
        CustomJSON(tmp_path / "none.jsonl")


# ---------------------------------------------------------------------------------------------------------------------
# dev/gen_synthetic_data.py


def test_synthetic_data_from_templates(empty_base, tmp_path):
    gen_synthetic_data.main(["-n", "60", "--out", str(tmp_path / "a.jsonl")])
    own = empty_base / "identity_conversations.jsonl"
    command = python_command("-m", "dev.gen_synthetic_data", "-n", "60")
    with open(tmp_path / "redirected.jsonl", "wb") as f:
        redirected = subprocess.run(command, env=environment(), stdout=f, stderr=subprocess.PIPE, check=True)
    assert b"60 conversations of nanochat -> standard output" in redirected.stderr and not own.exists()
    piped = subprocess.run(command, env=environment(), capture_output=True, check=True)  # as in a notebook
    assert not piped.stdout and str(own).encode() in piped.stderr
    texts = {path.read_text(encoding="utf-8") for path in (own, tmp_path / "a.jsonl", tmp_path / "redirected.jsonl")}
    assert len(texts) == 1
    conversations = list(CustomJSON(tmp_path / "a.jsonl"))
    assert len(conversations) == 60 and len({json.dumps(c) for c in conversations}) > 55
    replies = " ".join(m["content"] for c in conversations for m in c["messages"] if m["role"] == "assistant")
    assert "nanochat" in replies and not re.search(r"[\[\]{}|]", replies)


def test_synthetic_data_has_the_name_of_the_persona(tmp_path):
    persona = json.loads((Path(gen_synthetic_data.__file__).parent / "persona.json").read_text(encoding="utf-8"))
    (tmp_path / "me.json").write_text(json.dumps(persona | {"name": "Ada"}), encoding="utf-8")
    gen_synthetic_data.main(["-n", "40", f"--persona={tmp_path / 'me.json'}", f"--out={tmp_path / 'me.jsonl'}"])
    text = (tmp_path / "me.jsonl").read_text(encoding="utf-8")
    assert "I am Ada" in text and "I am nanochat" not in text


@pytest.mark.parametrize(
    "text, message", [("{", "not JSON"), ('{"name": "x"}', "missing: about, facts, maker, traits")]
)
def test_invalid_persona_raises_user_error(text, message, tmp_path):
    (tmp_path / "p.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "p.json"))) as e:
        gen_synthetic_data.main([f"--persona={tmp_path / 'p.json'}"])
    assert message in str(e.value)
    with pytest.raises(UserError, match="no persona file"):
        gen_synthetic_data.main([f"--persona={tmp_path / 'none.json'}"])


class ChatHandler(QuietHandler):
    """Returns server.replies in order, the last one repeatedly; a number is an HTTP error status."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append((self.path, self.headers.get("Authorization"), body))
            replies = self.server.replies
            reply = replies.pop(0) if len(replies) > 1 else replies[0]
        self.send_response(reply if isinstance(reply, int) else 200)
        self.end_headers()
        if isinstance(reply, str):
            self.wfile.write(json.dumps({"choices": [{"message": {"content": reply}}]}).encode())


@pytest.fixture
def endpoint():
    """A chat endpoint that records its requests as (path, Authorization header, body); see ChatHandler."""
    with serve_http(ChatHandler) as server:
        server.requests, server.replies, server.lock = [], [json.dumps(CONVERSATION)], threading.Lock()
        server.url += "/v1"
        yield server


def test_synthetic_data_from_an_endpoint(endpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    endpoint.replies = [
        "no JSON",
        json.dumps(CONVERSATION[:1]),
        f"Here it is:\n```json\n{json.dumps(CONVERSATION)}\n```",
    ]
    out = tmp_path / "conversations.jsonl"
    gen_synthetic_data.main([f"--endpoint={endpoint.url}", "--model=some-model", "-n", "5", "--out", str(out)])
    assert list(CustomJSON(out)) == [{"messages": CONVERSATION}] * 5
    assert len(endpoint.requests) == 7  # two replies were invalid
    path, authorization, body = endpoint.requests[0]
    assert path == "/v1/chat/completions" and authorization == "Bearer secret"
    assert body["model"] == "some-model" and body["temperature"] == 1.0 and "nanochat" in body["messages"][0]["content"]
    # The prompts ask for different first messages.
    assert len({r[2]["messages"][0]["content"] for r in endpoint.requests}) > 3


def test_endpoint_error_raises_user_error_and_writes_nothing(endpoint, tmp_path):
    endpoint.replies = [401]
    out = tmp_path / "conversations.jsonl"
    with pytest.raises(UserError, match="401"):
        gen_synthetic_data.main([f"--endpoint={endpoint.url}", "--model=m", "-n", "3", "--out", str(out)])
    assert not out.exists()
    with pytest.raises(UserError, match="--model"):
        gen_synthetic_data.main([f"--endpoint={endpoint.url}"])
