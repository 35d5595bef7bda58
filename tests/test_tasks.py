"""Tasks: the interface, public data sets, generated tasks, and the user's own conversations."""

import json
import re
import threading
from pathlib import Path
from random import Random

import pytest
from helpers import MIRROR, QuietHandler, needs_mirror, raises_user_error, serve_http

from dev import gen_synthetic_data
from nanochat.calculator import calculate
from nanochat.common import UserError
from tasks import mixtures
from tasks.arc import ARC
from tasks.common import PublicTask, Task, TaskMixture, TaskSequence, render_mc
from tasks.customjson import CustomJSON
from tasks.gsm8k import GSM8K, final_number, split_calls
from tasks.mmlu import MMLU
from tasks.pocket import PocketChat, PocketFacts, PocketIdentity, PocketStories, PocketSums
from tasks.smoltalk import SmolTalk
from tasks.spellingbee import SimpleSpelling, SpellingBee, question_templates

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


# ---------------------------------------------------------------------------------------------------------------------
# Generated tasks

GENERATED = {
    "sums": PocketSums,
    "facts": PocketFacts,
    "stories": PocketStories,
    "identity": PocketIdentity,
    "chat": PocketChat,
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


def test_stories_must_have_the_requested_characters():
    task = PocketStories("test", 200)
    assert all(task.evaluate(c, as_text(c)) for c in task)
    conversation = next(c for c in task if len(re.findall(r"about ([A-Z]\w+) and ([A-Z]\w+)\.", question(c))))
    one, other = re.search(r"about (\w+) and (\w+)\.", question(conversation)).groups()
    story = as_text(conversation)
    assert not task.evaluate(conversation, story.replace(other, one))  # one character twice
    assert not task.evaluate(conversation, re.sub(rf"\b{one}\b", "Bob", story))
    assert not task.evaluate(conversation, f"{story} {one} the unicorn was happy.")
    assert not task.evaluate(conversation, "I do not know any stories.")


def test_identity_answers_must_have_the_name():
    task = PocketIdentity("test", 100)
    assert all(task.evaluate(c, as_text(c)) and not task.evaluate(c, "I am Bob.") for c in task)


# ---------------------------------------------------------------------------------------------------------------------
# Mixtures


@pytest.mark.parametrize("stage", [mixtures.midtraining, mixtures.sft])
def test_pocket_mixtures_need_no_network(stage):
    train, val = stage("pocket")
    assert len(train) > 3000 and 200 < len(val) < len(train) / 4
    questions = {question(train[i]) for i in range(0, len(train), 7)}
    assert len(questions) > 400
    for i in range(0, len(val), 9):
        assert_well_formed(val[i])


@needs_mirror
def test_sizes_of_the_public_mixtures(mirror, monkeypatch):
    monkeypatch.setattr(mixtures, "SimpleSpelling", lambda size: SimpleSpelling(size=size // 100))
    train, val = mixtures.midtraining("public")
    assert len(train) == 3571 + 3858 + 7473 + 2 * 300 + 2000 + 80_000 and len(val) == 429 + 5200 + 420
    train, val = mixtures.sft("public")
    assert len(train) == 2251 + 1119 + 7473 + 3571 + 300 + 3 + 300 and len(val) == 429


def test_evaluation_tasks_accept_a_seed():
    assert {"ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "SpellingBee", "PocketSums", "PocketFacts"} <= set(
        mixtures.EVAL_TASKS
    )
    for name, entry in mixtures.EVAL_TASKS.items():
        if name.startswith("Pocket") or name == "SpellingBee":
            one, two = (entry.make(seed=seed, corpus="pocket") for seed in (0, 7))
            assert [question(one[i]) for i in range(20)] != [question(two[i]) for i in range(20)]
            assert entry.baseline == (0.25 if name == "PocketFacts" else 0.0)  # four choices


# ---------------------------------------------------------------------------------------------------------------------
# The user's own conversations

CONVERSATION = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]


def test_custom_json_reads_arrays_and_objects(tmp_path):
    path = tmp_path / "conversations.jsonl"
    path.write_text(
        f"{json.dumps(CONVERSATION)}\n\n{json.dumps({'messages': CONVERSATION, 'id': 7})}\n", encoding="utf-8"
    )
    assert list(CustomJSON(path)) == [{"messages": CONVERSATION}] * 2


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
    ],
)
def test_custom_json_error_names_the_line(line, message, tmp_path):
    path = tmp_path / "conversations.jsonl"
    path.write_text(f"{json.dumps(CONVERSATION)}\n{line}\n", encoding="utf-8")
    with raises_user_error(f"^{re.escape(f'{path}:2: ')}.*{message}"):
        CustomJSON(path)


def test_custom_json_error_for_a_missing_file_names_the_command(tmp_path):
    with pytest.raises(UserError, match="gen_synthetic_data"):
        CustomJSON(tmp_path / "none.jsonl")


# ---------------------------------------------------------------------------------------------------------------------
# dev/gen_synthetic_data.py


def test_synthetic_data_from_templates(empty_base, tmp_path, capsys):
    gen_synthetic_data.main(["-n", "60", "--out", str(tmp_path / "a.jsonl")])
    gen_synthetic_data.main(["-n", "60"])  # to standard output, which is no terminal in tests
    out, err = capsys.readouterr()
    assert out == (tmp_path / "a.jsonl").read_text(encoding="utf-8") and "60 conversations of nanochat" in err
    conversations = list(CustomJSON(tmp_path / "a.jsonl"))
    assert len(conversations) == 60 and len({json.dumps(c) for c in conversations}) > 55
    replies = " ".join(m["content"] for c in conversations for m in c["messages"] if m["role"] == "assistant")
    assert "nanochat" in replies and not re.search(r"[\[\]{}|]", replies)
    assert not (empty_base / "identity_conversations.jsonl").exists()


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
