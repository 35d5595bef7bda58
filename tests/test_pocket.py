"""The pocket world: deterministic, grammatical, true to its own tables, and never the same problem in two splits."""

import ast
import hashlib
import itertools
import re
import subprocess
import sys
from random import Random

import pytest

from nanochat.pocket import problems as pocket
from nanochat.pocket.world import WORLD_FILE, World, gerund

SPLITS = ("train", "val", "test")
NAMES = "name he kind home wears food job hobby fear thing friend".split()


@pytest.fixture(scope="module")
def world():
    return pocket.load_world()


@pytest.fixture(scope="module")
def cast():
    """The characters as the file has them, read without the module under test: name -> {column: cell}."""
    text = WORLD_FILE.read_text(encoding="utf-8")
    rows = re.search(r"^== characters\n(.*?)\n\n", text, re.S | re.M)[1].splitlines()
    cells = [[cell.strip() for cell in row.split("|")] for row in rows if not row.startswith("#")]
    return {row[0]: dict(zip(NAMES, row, strict=True)) for row in cells}


@pytest.fixture(scope="module")
def train_text():
    return list(pocket.documents("train", 1_500_000, seed=1))


def draws(make, split, n=1500, seeds=(1, 2)):
    """What `make(rng)` gives, n times for each seed."""
    return [make(rng, split) for seed in seeds for rng in [Random(seed)] for _ in range(n)]


def test_documents_repeat_with_the_seed_and_in_another_process():
    digest = hashlib.sha256("\0".join(pocket.documents("train", 100_000, seed=3)).encode()).hexdigest()
    code = (
        "import hashlib; from nanochat.pocket import problems as pocket; "
        "print(hashlib.sha256('\\0'.join(pocket.documents('train', 100_000, seed=3)).encode()).hexdigest())"
    )
    env = {"PYTHONHASHSEED": "7", "PYTHONPATH": str(WORLD_FILE.parents[1])}
    other = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert other.strip() == digest
    assert list(pocket.documents("train", 5000, seed=3)) != list(pocket.documents("train", 5000, seed=4))


def test_documents_have_the_size_asked_for(train_text):
    sizes = [len(d) for d in train_text]
    assert 1_500_000 <= sum(sizes) < 1_500_000 + 5000
    assert min(sizes) >= 60 and max(sizes) < 3500 and 500 < sum(sizes) / len(sizes) < 900


def test_training_and_validation_documents_never_meet(train_text):
    val = [d for seed in (1, 2, 9) for d in pocket.documents("val", 60_000, seed=seed)]
    assert len(val) > 100 and not set(val) & set(train_text)
    train_lines = {line for d in train_text for line in d.split("\n") if line.startswith("Question: ")}
    val_lines = {line for d in val for line in d.split("\n") if line.startswith("Question: ")}
    assert len(val_lines) > 50 and not train_lines & val_lines


def expressions(answer):
    return [m.split("=") for m in re.findall(r"<<(.*?)>>", answer)]


MAKERS = {  # what makes a problem, and the part of it that must be in one split only
    "fact": lambda rng, split, w: pocket.fact(rng, split, w).question,
    "letter": lambda rng, split, w: pocket.letter_problem(rng, split, w.words),
    "story": lambda rng, split, w: pocket.story(rng, split, w)[0],
    "talk": lambda rng, split, w: pocket.talk(rng, split, w, {"name": 1, "what": 1, "hello name": 1})[0][0],
    "about": lambda rng, split, w: pocket.about(rng, split, w)[0][0],
    "sum": lambda rng, split, w: tuple(e for e, _ in expressions(pocket.sum_problem(rng, split, w)[1])),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_no_problem_is_in_two_splits_whatever_the_seed(kind, world):
    keys = {split: set(draws(lambda r, s: MAKERS[kind](r, s, world), split, n=600)) for split in SPLITS}
    assert all(len(k) >= 10 for k in keys.values())
    for one, two in itertools.combinations(SPLITS, 2):
        assert not keys[one] & keys[two]


@pytest.mark.parametrize("split", SPLITS)
def test_conversations_end_and_have_words_in_every_split(split, world):
    topics = {t for t in (*pocket.TURNS, "hello", "thanks", "bye") if t not in ("fact", "about", "sum")}
    assert topics <= set(world.talk)
    for seed in range(100):
        turns = pocket.conversation(Random(seed), split, world)
        assert 1 <= len(turns) <= 9 and all(question and reply for question, reply in turns)


def arithmetic(expression):
    """The value of 12+3*4 by Python's own parser."""
    operators = {ast.Add: "__add__", ast.Sub: "__sub__", ast.Mult: "__mul__", ast.Div: "__truediv__"}

    def value(node):
        if isinstance(node, ast.Constant):
            return node.value
        left, right = value(node.left), value(node.right)
        return getattr(left, operators[type(node.op)])(right)

    return value(ast.parse(expression, mode="eval").body)


def test_sums_are_right_and_can_be_copied_from_their_question(world):
    operators, steps = set(), set()
    for question, answer in draws(lambda r, s: pocket.sum_problem(r, s, world), "test"):
        calls, last = expressions(answer), re.fullmatch(r"(?s).*\n#### (\d+)", answer)[1]
        known = re.findall(r"\d+", question)
        for expression, result in calls:
            assert arithmetic(expression) == int(result) >= 2
            assert set(re.findall(r"\d+", expression)) <= {*known, *(r for _, r in calls)}
            operators.update(re.findall(r"[-+*/]", expression))
        steps.add(len(calls))
        assert last == calls[-1][1] and f"<<{'='.join(calls[0])}>>{calls[0][1]}" in answer
        assert all(2 <= int(n) <= 1998 for n in known)
    assert operators == set("+-*/") and steps == {1, 2}


def names_one(row, question):
    return any(re.search(rf"\b{row[k]}\b", question) for k in ("kind", "job", "wears", "food", "hobby", "thing"))


def test_facts_agree_with_the_table(world, cast):
    facts = draws(lambda r, s: pocket.fact(r, s, world), "test") + draws(lambda r, s: pocket.fact(r, s, world), "train")
    assert {f.attribute for f in facts} == set(pocket.FACT_WEIGHTS)
    for f in facts:
        assert len(set(f.choices)) == 4 and f.value in f.choices
        if f.attribute in pocket.ATTRIBUTES:
            row = cast[str(f.subject)]
            assert f.value == (row["wears"].split()[0] if f.attribute == "color" else row[f.attribute])
            assert str(f.subject) in f.question and str(f.subject) in f.answer and f.value in f.answer
        elif f.attribute == "who":  # the question must fit one character only
            assert [name for name, row in cast.items() if names_one(row, f.question)] == [f.value], f.question
        elif f.attribute == "resident":
            assert [name for name in f.choices if cast[name]["home"] == str(f.subject)] == [f.value]


def test_the_tables_are_consistent(world, cast):
    assert len(cast) == 28 and len(world.places) == 14 and len(world.words) >= 1000
    assert all(cast[row["friend"]]["friend"] == name for name, row in cast.items())
    assert all(p.near.near is p and p.near is not p and len(p.residents) == 2 for p in world.place_list)
    for column in ("name", "kind", "wears", "food", "job", "hobby", "thing"):  # so that `who` has one answer
        assert len({row[column] for row in cast.values()}) == len(cast), column
    assert all(re.fullmatch("[a-z]{2,12}", word) for word in world.words)


TRUE_OF = {  # what a document may say of a character, and the column that decides
    r"([A-Z]\w+) the ([a-z]+)": "kind",
    r"([A-Z]\w+) (?:lives|lived) (?:in|at|on) ([A-Z]\w+ [A-Z]\w+)": "home",
    r"([A-Z]\w+) works as an? ([a-z]+(?: [a-z]+)?)\.": "job",
    r"([A-Z]\w+) is afraid of (?!is )([a-z ]+)\.": "fear",
    r"([A-Z]\w+)'s favorite food is ([a-z ]+)\.": "food",
    r"([A-Z]\w+) (?:likes|loves) to (?!eat|visit|tell)([a-z ]+)\.": "hobby",
    r"([A-Z]\w+)'s best friend is ([A-Z]\w+)": "friend",
    r"The [a-z ]+ with the ([a-z ]+) is ([A-Z]\w+)": "wears",
    r"The ([a-z ]+) belongs to ([A-Z]\w+)": "thing",
}


def test_documents_tell_the_truth(train_text, cast):
    text, seen = "\n".join(train_text), 0
    for pattern, column in TRUE_OF.items():
        found = [m if m[0] in cast else m[::-1] for m in re.findall(pattern, text)]
        for name, value in [m for m in found if m[0] in cast]:
            assert value == cast[name][column], (name, column, value)
            seen += 1
    assert seen > 3000


def test_documents_are_well_formed(train_text):
    for d in train_text:
        assert not re.search(r"[\[\]{}@\0]|  | \n|\n\n\n|\.\.", d), d
        prose = "\n".join(line for line in d.split("\n") if not re.search("letter |spelled |[Tt]he \\w+ card", line))
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|\b([a-z]+) \1\b", prose), d
        assert d.count('"') % 2 == 0 and d == d.strip(), d


def test_pronouns_agree(train_text, cast):
    """A portrait of one character has no pronoun of the other kind."""
    portraits = [p for d in train_text for p in d.split("\n\n") if re.match(r"[A-Z]\w+ is an? \w+\. ", p)]
    assert len(portraits) > 100
    for p in portraits:
        wrong = r"\b([Ss]he|[Hh]er)\b" if cast[p.split()[0]]["he"] == "he" else r"\b([Hh]e|[Hh]is|[Hh]im)\b"
        assert not re.search(wrong, p), p


def test_a_story_keeps_its_characters(world, cast):
    for text, a, b, p in draws(lambda r, s: pocket.story(r, s, world), "test", n=300):
        named = {name for name in cast if re.search(rf"\b{name}\b(?! (?:Square|Market|Bay|Lane|Hill|Farm))", text)}
        assert {a.name, b.name} <= named <= {a.name, b.name, a.friend.name} and p.name in text
        assert 400 < len(text) < 1500


def test_a_world_of_ones_own_is_checked():
    text = WORLD_FILE.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="Nobody"):
        World(text.replace("| silver whistle | Hazel", "| silver whistle | Nobody"))


@pytest.mark.parametrize(
    "phrase, expected",
    [("dig tunnels", "digging tunnels"), ("swim", "swimming"), ("write poems", "writing poems"), ("play", "playing")],
)
def test_gerund(phrase, expected):
    assert gerund(phrase) == expected
