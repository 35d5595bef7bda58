"""The pocket world: deterministic, grammatical and consistent texts; splits without common problems."""

import ast
import hashlib
import itertools
import operator
import re
from random import Random

import pytest
from helpers import environment, raises_user_error, run_python

from nanochat.calculator import calculate
from nanochat.pocket.documents import documents
from nanochat.pocket.problems import (
    arithmetic_problem,
    ask,
    comparison,
    fact,
    letter_problem,
    people_wordings,
    sum_template,
    wording,
    wording_split,
)
from nanochat.pocket.stories import story
from nanochat.pocket.talk import (
    TOPICS,
    conversation,
    draw_exchanges,
    fact_exchanges,
    section_exchange,
)
from nanochat.pocket.world import ATTRIBUTES, FILES, WORLD_FILE, World, gerund, load_world
from tasks import pocket
from tasks.spellingbee import PocketLetters

SPLITS = ("train", "val", "test")
ENDINGS = "From that day on, {a} and {b} were even better friends.\nAnd {a} never forgot that day.\n"
COLUMNS = "name he kind home wears food job hobby fear thing friend".split()


@pytest.fixture(scope="module")
def world():
    return load_world()


@pytest.fixture(scope="module")
def cast():
    """The characters of the world file, parsed independently of nanochat.pocket: name -> {column: cell}."""
    text = WORLD_FILE.read_text(encoding="utf-8")
    rows = re.search(r"^== characters\n(.*?)\n\n", text, re.S | re.M)[1].splitlines()
    cells = [[cell.strip() for cell in row.split("|")] for row in rows if not row.startswith("#")]
    return {row[0]: dict(zip(COLUMNS, row, strict=True)) for row in cells}


@pytest.fixture(scope="module")
def train_text():
    return list(documents("train", 1_500_000, seed=1))


def draws(make, split, n=1500, seeds=(1, 2)):
    """n results of `make(rng, split)` for each seed."""
    return [make(rng, split) for seed in seeds for rng in [Random(seed)] for _ in range(n)]


def test_documents_are_reproducible_from_the_seed_in_another_process():
    digest = hashlib.sha256("\0".join(documents("train", 100_000, seed=3)).encode()).hexdigest()
    code = (
        "import hashlib; from nanochat.pocket.documents import documents; "
        "print(hashlib.sha256('\\0'.join(documents('train', 100_000, seed=3)).encode()).hexdigest())"
    )
    done = run_python("-c", code, env=environment(PYTHONHASHSEED="7"))
    assert done.stdout.strip() == digest
    assert list(documents("train", 5000, seed=3)) != list(documents("train", 5000, seed=4))


def test_documents_have_the_requested_size(train_text):
    sizes = [len(d) for d in train_text]
    assert 1_500_000 <= sum(sizes) < 1_500_000 + 5000
    assert min(sizes) >= 60 and max(sizes) < 3500 and 500 < sum(sizes) / len(sizes) < 900


def test_training_and_validation_documents_are_disjoint(train_text):
    val = [d for seed in (1, 2, 9) for d in documents("val", 60_000, seed=seed)]
    assert len(val) > 100 and not set(val) & set(train_text)
    train_lines = {line for d in train_text for line in d.split("\n") if line.startswith("Question: ")}
    val_lines = {line for d in val for line in d.split("\n") if line.startswith("Question: ")}
    assert len(val_lines) > 50 and not train_lines & val_lines


def expressions(answer):
    return [m.split("=") for m in re.findall(r"<<(.*?)>>", answer)]


# kind of problem -> function that generates one and returns the part that must not occur in another split
KEYS = {
    "fact": lambda rng, split, w: fact(rng, split, w).question,
    "letter": lambda rng, split, w: letter_problem(rng, split, w.words),
    "story": lambda rng, split, w: story(rng, split, w).text,
    "topic": lambda rng, split, w: draw_exchanges(rng, split, w, ["self name"])[0][0],
    "character": lambda rng, split, w: draw_exchanges(rng, split, w, ["character"])[0][0],
    "sum": lambda rng, split, w: tuple(e for e, _ in expressions(arithmetic_problem(rng, split, w)[1])),
}


@pytest.mark.parametrize("kind", KEYS)
def test_splits_have_no_common_problems_for_any_seed(kind, world):
    keys = {split: set(draws(lambda r, s: KEYS[kind](r, s, world), split, n=600)) for split in SPLITS}
    assert all(len(k) >= 10 for k in keys.values())
    for one, two in itertools.combinations(SPLITS, 2):
        assert not keys[one] & keys[two]


@pytest.mark.parametrize("split", SPLITS)
def test_every_split_has_conversations_about_all_topics(split, world):
    for topic in TOPICS:
        assert draw_exchanges(Random(1), split, world, [topic])
    if split == "train":
        for section in world.groups["self"] + world.groups["unknown"] + world.groups["talk"]:
            assert any(section_exchange(Random(i), split, world, section) for i in range(30)), section
    for seed in range(100):
        exchanges = conversation(Random(seed), split, world)
        assert 1 <= len(exchanges) <= 12 and all(question and reply for question, reply in exchanges)


def test_replies_take_their_facts_from_the_world_file(world):
    names = "|".join(c.name for c in world.characters + world.places)
    replies = [line for section in world.sections for line in world.lines(section) if line.startswith("! ")]
    assert len(replies) > 100
    assert not [r for r in replies if re.search(rf"\b({names})\b", re.sub(r"\{.*?\}", "", r))]


def test_only_sections_with_replies_mark_their_questions(world):
    """A mark in a section that others refer to would be typed by the user."""
    for section in world.sections:
        marks = {line[:2] for line in world.lines(section)} & {"? ", "! "}
        assert marks in (set(), {"? ", "! "}), section


def test_only_a_name_that_was_told_is_remembered(world):
    remembered = 0
    for seed in range(600):
        said = ""
        for question, reply in conversation(Random(seed), "train", world):
            if name := re.match(r"(?:Your name is|You are) ([A-Z]\w+)[.,]", reply):
                assert re.search(rf"(?i)\b{name[1]}\b", said), (question, reply)
                remembered += 1
            said += f"{question}\n"
    assert 20 < remembered < 120


def user_messages(split, n=300):
    """User messages of `n` examples of each task."""
    tasks = pocket.PocketChat, pocket.PocketSums, pocket.PocketIdentity, pocket.PocketStories, PocketLetters
    for task in tasks:
        for example in task(split=split, size=n, seed=5, corpus="pocket"):
            yield from (m["content"] for m in example["messages"] if m["role"] == "user")
    yield from (fact(Random(i), split, load_world()).question for i in range(n))
    yield from (q for i in range(9 * n) for q, _ in comparison(Random(i), split, load_world()))


def test_splits_and_people_have_no_common_wordings():
    wordings = {split: {wording(text) for text in user_messages(split)} for split in SPLITS}
    wordings["people"] = people_wordings()
    assert {split: len(w) > 100 for split, w in wordings.items()} == dict.fromkeys(wordings, True)
    for one, two in itertools.combinations(wordings, 2):
        assert not wordings[one] & wordings[two], (one, two)


def test_training_has_more_than_1600_wordings_of_each_kind(world):
    """Distinct wordings in 20,000 draws, before misspellings and remarks."""
    for section in ("ask food", "ask job", "ask home", "ask story two"):
        rng = Random(3)
        draws = [world.expand(rng, rng.choice(world.lines(section))) for _ in range(20_000)]
        assert len({wording(d) for d in draws if wording_split(d) == "train"}) > 1600, section
    rng = Random(4)
    sums = [world.expand(rng, sum_template(rng, world)[0]) for _ in range(6000)]
    assert len({wording(d) for d in sums if wording_split(d) == "train"}) > 1600


def test_held_out_verbs_do_not_occur_in_training(world):
    lists = [s for s in world.sections if s.startswith("verbs ")]
    assert len(lists) >= 6
    for section in lists:
        entries = [set(world.entries_of(section, split)) for split in SPLITS]
        assert all(entries) and not any(a & b for a, b in itertools.combinations(entries, 2)), section


def test_wording_ignores_names_numbers_case_and_punctuation():
    assert wording("Where does Pip live?") == wording("where does HAZEL live") == wording("Where does {a} live?")
    assert wording("What is 3 + 4?") == wording("what is {x} + {y}") == "what is"
    assert wording("Is {o.food} good?") == "is food good"
    assert wording_split("What is {x} + {y}?") == "train"  # short ones


def test_questions_belong_to_one_split_however_they_are_typed(world):
    template = "[Please |]tell me [right now|today|at once|if you can] where {a} [lives|stays|is at home]."
    for split in SPLITS:
        asked = [ask(Random(i), split, world, template, a=world.characters[0]) for i in range(800)]
        assert any(asked) and any(question is None for question in asked)
        assert all("Pip" in q or "pip" in q for q in asked if q)


def arithmetic(expression):
    """The value of an expression such as 12+3*4, by Python's parser."""
    operators = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}

    def value(node):
        if isinstance(node, ast.Constant):
            return node.value
        return operators[type(node.op)](value(node.left), value(node.right))

    return value(ast.parse(expression, mode="eval").body)


@pytest.mark.parametrize("hard", [False, True])
def test_sums_are_correct_and_use_only_numbers_of_their_question(world, hard):
    operators, steps = set(), set()
    templates = (line for name in world.sections for line in world.lines(name) if " => " in line)
    constants = {n for line in templates for n in re.findall(r"\d+", line.split(" => ")[1])}  # half, a dozen, ...
    words = dict(zip("two three four five six seven eight nine ten eleven twelve".split(), range(2, 13), strict=True))
    for question, answer in draws(lambda r, s: arithmetic_problem(r, s, world, hard), "test"):
        calls, last = expressions(answer), re.fullmatch(r"(?s).*\n#### (\d+)", answer)[1]
        in_words = {str(words[w]) for w in re.findall(r"[a-z]+", question.lower()) if w in words}
        ((expression, result),) = calls
        assert int(calculate(expression)) == int(result) >= 1
        if not expression.startswith("remainder"):
            assert arithmetic(expression) == int(result)
        assert set(re.findall(r"\d+", expression)) <= {*re.findall(r"\d+", question), *in_words, *constants}
        operators.update(signs := re.findall(r"[-+*/]", expression))
        steps.add(len(signs))
        assert last == result and f">>{result}." in answer and not re.search(r"\(\d+\)", expression)
    train = draws(lambda r, s: arithmetic_problem(r, s, world, hard), "train", n=600)
    assert sum("remainder: " in answer for _, answer in train) > 5
    assert operators == set("+-*/") and steps >= {1, 2, 3}


def test_comparisons_are_correct(world):
    sizes = set()
    for question, answer in itertools.chain(*draws(lambda r, s: comparison(r, s, world), "train", n=300)):
        size, left, right, result = re.match(r"The (\w+) number is <<\1: (\d+), (\d+)=(\d+)>>\4", answer).groups()
        assert int(result) == {"larger": max, "smaller": min}[size](int(left), int(right))
        assert {left, right} == set(re.findall(r"\d+", question)) and calculate(f"{size}: {left}, {right}") == result
        if owner := re.search(r"answer is ([A-Z]\w+)\.", answer):
            assert owner[1].lower() in question.lower()
        sizes.add((size, bool(owner)))
    assert len(sizes) == 4


def test_follow_up_questions_mean_who_or_what_was_mentioned(world, cast):
    """ "He" is the character of the reply and "there" its place; both were mentioned, at the latest in the question."""
    pronouns, mentions, changes = {"he": "he|his|him", "she": "she|her"}, 0, 0
    for exchanges in draws(lambda r, s: fact_exchanges(r, s, world), "train", n=1500):
        for (question, reply), (before, answer) in itertools.pairwise(reversed(exchanges)):
            subject, told = reply.split()[0].removesuffix("'s"), (before + answer).lower()
            if subject in cast and re.search(rf"(?i)\b({pronouns[cast[subject]['he']]})\b", question):
                mentions += 1
                changes += subject != answer.split()[0].removesuffix("'s")
                assert subject.lower() in told + question.lower(), exchanges
            elif re.search(r"(?i)\bthere[.?!]*$", question):
                assert any(p.name in reply and p.name.lower() in told for p in world.places), exchanges
    assert mentions > 300 and changes > 10  # "Pip's best friend is Hazel." "Where does she live?"


def test_facts_agree_with_the_world_file(world, cast):
    facts = draws(lambda r, s: fact(r, s, world), "test") + draws(lambda r, s: fact(r, s, world), "train")
    assert {f.attribute for f in facts} == set(world.fact_weights)
    for f in facts:
        assert len(set(f.choices)) == len(f.choices) >= 3 and f.value in f.choices
        if f.attribute in ATTRIBUTES:
            row = cast[str(f.subject)]
            assert f.value == (row["wears"].split()[0] if f.attribute == "color" else row[f.attribute])
            assert str(f.subject) in f.answer and f.value in f.answer
        elif f.attribute.startswith("who "):  # the question must identify exactly one character
            column = f.attribute.split()[1]
            assert [name for name, row in cast.items() if row[column] == cast[f.value][column]] == [f.value]
        elif f.attribute == "resident":
            assert [name for name in f.choices if cast[name]["home"] == str(f.subject)] == [f.value]


def test_world_file_is_consistent(world, cast):
    assert len(cast) == 28 and len(world.places) == 14 and len(world.words) >= 1000
    assert all(cast[row["friend"]]["friend"] == name for name, row in cast.items())
    assert all(p.near.near is p and p.near is not p and len(p.residents) == 2 for p in world.places)
    # Otherwise questions of the attribute "who" would have several answers.
    for column in ("name", "kind", "wears", "food", "job", "hobby", "thing"):
        assert len({row[column] for row in cast.values()}) == len(cast), column
    assert all(re.fullmatch("[a-z]{2,12}", word) for word in world.words)


STATEMENTS = {  # pattern of a statement about a character -> column of its value
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


def test_documents_agree_with_the_world_file(train_text, cast):
    lines = [line for d in train_text for line in d.split("\n") if not line.startswith("Question: ")]
    text, checked = "\n".join(lines), 0
    for pattern, column in STATEMENTS.items():
        statements = [m if m[0] in cast else m[::-1] for m in re.findall(pattern, text)]
        for name, value in [m for m in statements if m[0] in cast]:
            expected = (cast[name][column], cast[name]["wears"] if column == "thing" else None)
            assert value.startswith(expected[0]) or value == expected[1], (name, column, value)
            checked += 1
    assert checked > 3000


def test_documents_are_well_formed(train_text):
    for d in train_text:
        assert not re.search(r"[\[\]{}@\0]|  | \n|\n\n\n", d), d
        excepted = "^Question: |letter |spelled |[Tt]he \\w+ card"  # people's questions may be wrong
        prose = "\n".join(line for line in d.split("\n") if not re.search(excepted, line))
        assert not re.search(r"\.\.|\ba [aeiou]|\ban [^aeiouh]|\b([a-z]+) \1\b", prose), d
        assert d.count('"') % 2 == 0 and d == d.strip(), d


def test_pronouns_agree_with_the_character(train_text, cast):
    """The description of a character uses only the pronouns of that character."""
    descriptions = [p for d in train_text for p in d.split("\n\n") if re.match(r"[A-Z]\w+ is an? \w+\. ", p)]
    descriptions = [p for p in descriptions if sum(name in p for name in cast) <= 2]  # the character and the friend
    assert len(descriptions) > 100
    for p in descriptions:
        wrong = r"\b([Ss]he|[Hh]er)\b" if cast[p.split()[0]]["he"] == "he" else r"\b([Hh]e|[Hh]is|[Hh]im)\b"
        assert not re.search(wrong, p), p


def test_stories_mention_only_their_characters_and_place(world, cast):
    for text, a, b, p, topic in draws(lambda r, s: story(r, s, world), "test", n=300):
        mentioned = {name for name in cast if re.search(rf"\b{name}\b(?! (?:Square|Market|Bay|Lane|Hill|Farm))", text)}
        assert {a.name, b.name} <= mentioned <= {a.name, b.name, a.friend.name} and p.name in text
        assert 400 < len(text) < 1500 and topic


def test_a_story_about_any_topic_is_about_it(world):
    topics = {split: set(world.entries_of("topics", split)) for split in SPLITS}
    assert sum(map(len, topics.values())) > 300 and not topics["train"] & topics["test"]
    texts = draws(lambda r, s: story(r, s, world), "test", n=300)
    about_any = [s for s in texts if s.topic in topics["test"].difference(*world.topics)]
    assert len(about_any) > 100 and all(s.text.count(s.topic) >= 3 for s in about_any)


def test_a_story_is_about_what_was_requested(world):
    for exchanges in draws(lambda r, s: draw_exchanges(r, s, world, ["story"]), "train", n=300):
        request, text = exchanges[0]
        for c in world.characters:
            if re.search(rf"\b{c.name}\b(?! (?:Square|Market|Bay|Lane|Hill|Farm))", request):
                assert c.name in text, request
        for p in world.places:
            assert p.name not in request or p.name in text, request


@pytest.mark.parametrize("slots", [["a"], ["p"], ["a", "b"], ["a", "p"]])
def test_a_story_follows_from_its_request(slots, world):
    """Equal requests get equal stories, so that a small model can learn them."""
    stories = {}
    for s in draws(lambda r, split: story(r, split, world, requested=slots), "train", n=600):
        request = tuple(str(getattr(s, slot)) for slot in slots)
        assert stories.setdefault(request, s.text) == s.text, request
    assert 10 < len(stories) < 600


def test_what_a_hero_does_is_the_topic(world):
    doings = set(world.entries_of("doings", "train"))
    assert len(doings) > 80
    for s in draws(lambda r, split: story(r, split, world, requested=["a", "doing"]), "train", n=100):
        assert s.topic in doings and s.text.count(s.topic) >= 3, s


def test_a_hero_from_outside_is_the_main_character(world):
    texts = draws(lambda r, s: story(r, s, world, foreign=1.0), "train", n=50)
    assert all(s.a.name not in {c.name for c in world.characters} and s.text.count(s.a.name) > 2 for s in texts)


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("| silver whistle | Hazel", "| silver whistle | Nobody", "'Nobody' is missing from the tables"),
        ("| silver whistle | Hazel", "| silver whistle", "wrong row in characters: Pip | he | mouse"),
        ("Pip | he |", "Pip | they |", "wrong row in characters: Pip | they"),
        ("| red scarf |", "| scarf |", "wrong row in characters: Pip"),
        ("mouse | Clock Square |", "mouse | Moon Lake |", "Clock Square has fewer than two characters"),
        ("== places", "== towns", "'places'"),
        (ENDINGS, "", "the section 'ending' is empty"),
        ("A story about {a} and {b}", "A story about {a.nose} and {b}", "no attribute 'nose', in 'A story"),
        ("A story about {a} and {b}", "A story about {k} and {b}", "wrong slot in a template: 'k'"),
    ],
)
def test_a_wrong_edit_of_the_world_file_is_an_error_that_names_it(tmp_path, monkeypatch, old, new, message):
    text = WORLD_FILE.read_text(encoding="utf-8")
    assert old in text
    path = tmp_path / "edited_world.txt"
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    monkeypatch.setattr("nanochat.pocket.world.FILES", [path, *FILES[1:]])
    load_world.cache_clear()
    try:
        with raises_user_error(f"edited_world.txt or .*: .*{re.escape(message)}"):
            list(documents("train", 200_000))
    finally:
        load_world.cache_clear()


def test_a_sum_without_its_steps_is_an_error_that_names_the_section():
    text = "\n".join(file.read_text(encoding="utf-8") for file in FILES)
    with raises_user_error("a line of 'order' has no ' => '"):
        World(text.replace("== order\n", "== order\nAdd {x} and {y}\n", 1))


@pytest.mark.parametrize(
    "phrase, expected",
    [("dig tunnels", "digging tunnels"), ("swim", "swimming"), ("write poems", "writing poems"), ("play", "playing")],
)
def test_gerund(phrase, expected):
    assert gerund(phrase) == expected
