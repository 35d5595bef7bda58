"""
The pocket world: stories, facts, sums, words and small talk made from a seed, so that everything runs offline.

`pocket_world.txt` beside this file says who lives there and how one talks about it; here documents for pretraining and
problems for the tasks are made of that. Facts are the same for every seed. Everything that could be asked
in an evaluation has a key (a question's text, the numbers of a sum, a story's plot and cast) and `split_of` gives each
key to one split for ever, so training, validation and test never share a problem, whatever the seeds.
"""

import hashlib
import re
from dataclasses import dataclass
from random import Random

from nanochat.pocket.world import Place, fill, load_world

ATTRIBUTES = ("kind", "home", "color", "food", "job", "hobby", "fear", "thing", "friend")  # of a character
OUTSIDERS = {"n": "strangers", "w": "countries", "t": "subjects"}  # slot -> section, of what is not in the world
# Drawn about as often as there are facts: a character has one of each, and `who` asks for them backwards.
FACT_WEIGHTS = dict.fromkeys(ATTRIBUTES, 2) | {"who": 5, "landmark": 1, "famous": 1, "near": 1, "resident": 1}


def split_of(*key):
    """The split that `key` belongs to, for ever: "test" (10 %), "val" (5 %) or "train"."""
    digest = hashlib.blake2b("|".join(map(str, key)).encode(), digest_size=4).digest()
    bucket = int.from_bytes(digest, "big") % 20
    return "test" if bucket < 2 else "val" if bucket == 2 else "train"


# ---------------------------------------------------------------------------------------------------------------------
# Problems. Each function draws until it has one whose key belongs to `split` ("train", "val" or "test").


@dataclass(frozen=True)
class Fact:
    attribute: str
    subject: object  # the Character or Place it is about
    question: str
    answer: str  # a sentence
    value: str  # the right choice
    choices: tuple  # four values, the right one among them


def fact(rng, split, world):
    """A question about the world. Its wording for this very subject belongs to `split`; the fact itself is shared."""
    while True:
        attribute = rng.choices(list(FACT_WEIGHTS), FACT_WEIGHTS.values())[0]
        subjects, slot = world.subjects(attribute)
        subject = rng.choice(subjects)
        question = fill(rng, rng.choice(world.lines(f"ask {attribute}")), **{slot: subject})
        if split_of("fact", question) == split:
            break
    value, answer = (t.format(**{slot: subject}) for t in world.say[attribute])
    if attribute == "resident":
        value = rng.choice(subject.residents).name
    not_wrong = {value, subject.name, *(r.name for r in getattr(subject, "residents", ()))}
    choices = [value, *rng.sample([v for v in world.values[attribute] if v not in not_wrong], 3)]
    rng.shuffle(choices)
    return Fact(attribute, subject, question, answer, value, tuple(choices))


HARD_TOPS = (99, 999, 9999, 9999)  # small ones too, or practice on large ones costs some of what was learnt before


def _numbers(rng, ops, hard):
    """
    x, y, z for one or two operators: numbers of one to three digits, or of up to four, whose every result is whole and
    at least 2.
    """
    top = rng.choice(HARD_TOPS if hard else (9, 20, 99, 999))
    small, factor, third = (min(top, 999), 99, 99) if hard else (min(top, 99), 12, 9)
    first, second = (*ops, None)[:2]
    if second == "/":  # (x + y) / z
        z = rng.randint(2, third)
        total = z * rng.randint(2, small)
        x = rng.randint(2, total - 2)
        return x, total - x, z
    if first == "+":
        top = small if second == "*" else top
        x, y = rng.randint(2, top), rng.randint(2, top)
    elif first == "-":
        x = rng.randint(6, max(top, 12))
        y = rng.randint(2, x - (4 if second else 2))
    elif first == "*":
        x, y = rng.randint(2, small), rng.randint(2, factor)
    else:
        y = rng.randint(2, factor)
        x = y * rng.randint(2, small)
    result = _apply(x, first, y)
    z = rng.randint(2, result - 2) if second == "-" else rng.randint(2, third if second == "*" else top)
    return x, y, z


def _apply(x, op, y):
    return {"+": x + y, "-": x - y, "*": x * y, "/": x // y}[op]


def sum_problem(rng, split, world, hard=False):
    """
    (question, answer) in GSM8K's format: <<34+12=46>>46 calls the calculator, the last line is `#### 46`.

    Many numbers of hard ones are larger than any in the text of the world.
    """
    while True:
        question, answer, ops = rng.choice(world.sums)
        x, y, z = _numbers(rng, ops, hard)
        if split_of("sum", x, *(f"{op}{n}" for op, n in zip(ops, (y, z), strict=False))) == split:
            break
    a, b, c = rng.sample(world.characters, 3)
    slots = dict(x=x, y=y, z=z, a=a, b=b, c=c, p=rng.choice(world.place_list), i=rng.choice(world.words_in("things")))
    result = x

    def call(match):
        nonlocal result
        left, op, right = re.fullmatch(r"(\d+|@)(.)(\d+)", match[1]).groups()
        before, result = result, _apply(result, op, int(right))
        return f"<<{before if left == '@' else left}{op}{right}={result}>>{result}"

    answer = re.sub(r"<<(.*?)>>", call, fill(rng, answer, **slots))
    return fill(rng, question, **slots), f"{answer}\n#### {result}"


def letter_problem(rng, split, words):
    """(word, letter): nine times in ten the letter is one of the word's."""
    while True:
        word = rng.choice(words)
        letter = rng.choice(word if rng.random() < 0.9 else "abcdefghijklmnopqrstuvwxyz")
        if split_of("letter", word, letter) == split:
            return word, letter


def story(rng, split, world, title=False):
    """(text, hero, friend, place). Plot, cast and place together belong to `split`."""
    plots = world.sections["plot"]
    while True:
        plot = rng.choice(plots)
        a, b = rng.sample(world.characters, 2)
        p = rng.choice(world.place_list)
        fits = p not in (a.place, b.place) and (a.fear != b.fear or "cannot sleep" not in plot[0])
        if fits and split_of("story", plot[0], a, b, p) == split:
            break
    more = rng.sample(world.lines("opening more"), rng.randint(0, 2))
    opening = " ".join([rng.choice(world.lines("opening")), *more])
    kinds = rng.choice((("ending",), ("closing",), ("ending", "closing")))
    ending = " ".join(rng.choice(world.lines(kind)) for kind in kinds)
    lines = [rng.choice((plot[0], *world.lines("heading"))), "-"] if title else []
    text = "\n".join([*lines, opening, *plot[1:], ending]).replace("\n-\n", "\n\n")
    return fill(rng, text, a=a, b=b, p=p), a, b, p


def describe(rng, world, subject, sentences):
    """`sentences` true sentences about a character or a place, in any order, the first with the name."""
    if isinstance(subject, Place):
        lines = rng.sample(world.lines("describe place"), min(4, sentences - 1))
        return " ".join([f"{subject} is a {subject.about}.", *(fill(rng, line, p=subject) for line in lines)])
    names = rng.sample(["home", "wears", "food", "job", "hobby", "fear", "thing", "friend"], min(8, sentences - 1))
    text = [fill(rng, world.lines("describe kind")[0], S=subject, a=subject)]
    for name in names:
        s, S = (subject, subject) if rng.random() < 0.4 else (subject.he, subject.He)
        text.append(fill(rng, rng.choice(world.lines(f"describe {name}")), a=subject, s=s, S=S))
    return " ".join(text)


# ---------------------------------------------------------------------------------------------------------------------
# Talk


def exchange(rng, split, world, topic):
    """(what a user says, what is replied) on `topic`; None when the words drawn belong to another split."""
    says, replies = world.talk[topic]
    told = story(rng, split, world) if topic == "ask story" else None
    a, b, p = told[1:] if told else (*rng.sample(world.characters, 2), rng.choice(world.place_list))
    slots = dict(a=a, b=b, p=p, places=world.place_names)
    slots |= {slot: rng.choice(world.words_in(name)) for slot, name in OUTSIDERS.items()}
    text = fill(rng, rng.choice(says), **slots)
    if split_of("talk", text) != split:
        return None
    if told:  # a small model keeps its characters apart if both are named before the story gets going
        opening = told[0].split("\n")[0]
        return (text, told[0]) if {b.name, b.kind} & {*re.findall(r"\w+", text + opening)} else None
    if topic in ("ask who", "ask place"):
        return text, describe(rng, world, a if topic == "ask who" else p, rng.randint(3, 5))
    return text, fill(rng, rng.choice(replies), **slots)


def about(rng, split, world):
    """One or two exchanges about a character: an open or a yes-or-no question, then one that only says he or she."""
    while True:
        a, o = rng.choice(world.characters), rng.choice(world.characters)
        attribute, template = rng.choice(world.table("check")) if rng.random() < 0.5 else (rng.choice(ATTRIBUTES), None)
        if template and o.friend is not a:
            o = rng.choice((a, o))
            question, yes = template.format(a=a, o=o), getattr(a, attribute) == getattr(o, attribute)
            reply = world.say[attribute][1].format(a=a).removesuffix(".") + (", so yes." if yes else ", so no.")
        else:
            question = fill(rng, rng.choice(world.lines(f"ask {attribute}")), a=a)
            reply = world.say[attribute][1].format(a=a)
        if split_of("fact", question) == split:
            turns = [(question, reply)]
            break
    second, _, template = rng.choice(world.lines("follow")).partition(" | ")
    question = fill(rng, template, a=a)
    if second != attribute and split_of("fact", a, question) == split:
        turns.append((question, world.say[second][1].format(a=a)))
    return turns


# What one turn of a conversation is about -> how often. Greetings and goodbyes come at their place.
TURNS = {"fact": 22, "about": 10, "ask story": 12, "ask who": 8, "ask place": 4, "sum": 6, "name": 9, "what": 5}
TURNS |= {"unknown": 5, "stranger": 3, "feel": 3, "can": 3, "like": 2, "sad": 1, "happy": 1, "world": 2, "places": 1}
TURNS |= dict.fromkeys(("maker", "age", "size", "limits", "home", "eat", "favorite place"), 1)


def talk(rng, split, world, topics):
    """An exchange on one of `topics` (name -> weight), whichever comes first with words that belong to `split`."""
    while True:
        topic = rng.choices(list(topics), topics.values())[0]
        if topic == "fact":
            f = fact(rng, split, world)
            return [(f.question, f.answer)]
        if topic == "sum":
            return [sum_problem(rng, split, world)]
        if topic == "about":
            return about(rng, split, world)
        if turn := exchange(rng, split, world, topic):
            return [turn]


def conversation(rng, split, world):
    """One to five exchanges (what a user says, what is replied); replies may hold calculator calls as in GSM8K."""
    turns = talk(rng, split, world, {"hello": 2, "hello name": 1}) if rng.random() < 0.25 else []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        turns += talk(rng, split, world, TURNS)
        if len(turns[-1][1]) > 500:  # a story: two of them would not fit into a context of 512 tokens
            break
    if rng.random() < 0.2:
        turns += talk(rng, split, world, {"thanks": 2, "bye": 1})
    return turns


def casually(rng, text):
    """As people type: now and then without capitals, without the last mark, or after a greeting."""
    luck = rng.random()
    if luck < 0.1:
        return text.lower()
    if luck < 0.2:
        return text.rstrip("?.!")
    if luck < 0.25:
        return text.lower().rstrip("?.!")
    if luck < 0.35 and text.endswith("?"):
        return rng.choice(("Hi! ", "Hello! ", "Hello, ", "Hey, ", "Please tell me: ", "I have a question. ")) + text
    return text


# ---------------------------------------------------------------------------------------------------------------------
# Documents


def _story_page(rng, split, world):
    return story(rng, split, world, title=rng.random() < 0.8)[0]


def _portrait_page(rng, split, world):
    cast = rng.sample(world.characters, rng.choice((1, 1, 2, 3)))
    return "\n\n".join(describe(rng, world, c, rng.randint(6, 9)) for c in cast)


def _place_page(rng, split, world):
    p = rng.choice(world.place_list)
    neighbors = [describe(rng, world, c, rng.randint(2, 4)) for c in p.residents]
    return "\n\n".join([describe(rng, world, p, rng.randint(4, 5)), *neighbors[: rng.randint(0, 2)]])


def _card_page(rng, split, world):
    def card(c):
        rows = [f"{name}: {getattr(c, name)}" for name in ("kind", "home", "wears", *ATTRIBUTES[3:])]
        rng.shuffle(rows)
        return "\n".join([f"name: {c}", *rows])

    return "\n\n".join(card(c) for c in rng.sample(world.characters, rng.randint(1, 4)))


def _list_page(rng, split, world):
    """One sentence each on many characters: backwards (the baker is Hazel), or two side by side."""
    name = rng.choice(("reverse", "reverse", "pair"))
    lines = []
    for _ in range(rng.randint(6, 14)):
        a, b = rng.sample(world.characters, 2)
        lines.append(fill(rng, rng.choice(world.lines(name)), a=a, b=b))
    return rng.choice("\n ").join(lines)


def _chatter_page(rng, split, world):
    a, b = rng.sample(world.characters, 2)
    here, p = rng.sample([p for p in world.place_list if p not in (a.place, b.place)], 2)
    talk = []
    for template in rng.sample(world.lines("chatter"), rng.randint(3, 6)):
        one, two = rng.sample((a, b), 2)
        talk.append(fill(rng, template, a=one, b=two, p=p))
    first, last = (fill(rng, rng.choice(world.lines(f"chatter {s}")), a=a, b=b, p=here) for s in ("opening", "ending"))
    heading = [fill(rng, rng.choice(world.lines("heading")), a=a, b=b, p=here), ""]
    return "\n".join([*heading, first, *talk, last])


def _letter_page(rng, split, world):
    a, b = rng.sample(world.characters, 2)
    p = rng.choice([p for p in world.place_list if p not in (a.place, b.place)])
    return fill(rng, rng.choice(world.lines("letter")), a=a, b=b, p=p)


def _question_page(rng, split, world):
    quiz, page = rng.random() < 0.5, []
    for _ in range(rng.randint(3, 8)):
        f = fact(rng, split, world)
        choices = "".join(f"- {choice}\n" for choice in f.choices)
        page.append(f"Question: {f.question}\n{choices if quiz else ''}Answer: {f.value if quiz else f.answer}")
    return "\n\n".join(page)


def _sum_page(rng, split, world):
    if rng.random() < 0.3:  # bare equations with numbers small enough to know by heart
        rows = []
        while len(rows) < 20:
            x, op, y = rng.randint(2, 20), rng.choice("+-*"), rng.randint(2, 20)
            if x - y >= 2 and split_of("sum", x, f"{op}{y}") == split:
                rows.append(f"{x} {op} {y} = {_apply(x, op, y)}")
        return "\n".join(rows)
    page = []
    for _ in range(rng.randint(3, 8)):
        question, answer = sum_problem(rng, split, world)
        answer = re.sub(r"<<(.*?=).*?>>", r"\1", answer)  # a plain page has no calculator: 34+12=46
        page.append(f"Question: {question}\nAnswer: {answer}")
    return "\n\n".join(page)


def _spelling_page(rng, split, world):
    rows = []
    for _ in range(rng.randint(8, 20)):
        word, letter = letter_problem(rng, split, world.words)
        n = word.count(letter)
        often = ("does not appear", "appears once")[n] if n < 2 else f"appears {n} times"
        slots = dict(w=word, l=letter, often=often, dashes="-".join(word), commas=",".join(word))
        rows.append(rng.choice(world.lines("spelling")).format_map(slots))
    return "\n".join(rows)


def _echo_page(rng, split, world):
    """Words without any sense, said twice: what teaches a small model to copy whatever stands before."""
    rows = []
    for _ in range(rng.randint(3, 6)):
        a, b = rng.sample(world.characters, 2)
        words = rng.choice((" ", ", ")).join(rng.sample(world.words, rng.randint(2, 8)))
        rows.append(rng.choice(world.lines("echo")).format(a=a, b=b, s=words))
    return "\n".join(rows)


def _lookup_page(rng, split, world):
    """Things that are true on this page only, and questions about them: what teaches to look them up."""
    keys, values, row, question = rng.choice(world.table("lookup"))
    n = rng.randint(4, 8)
    pools = {"names": world.characters, "words": world.words, "numbers": range(2, 1000)}
    known = list(zip(rng.sample(pools[keys], n), rng.sample(pools[values], n), strict=True))
    asked = [rng.choice(known) for _ in range(rng.randint(4, 10))]
    lines = [row.format(k=k, v=v) for k, v in known] + [question.format(k=k, v=v) for k, v in asked]
    return "\n".join(lines)


PAGES = {  # kind of document -> how often, per hundred
    _story_page: 28,
    _portrait_page: 9,
    _place_page: 4,
    _card_page: 2,
    _list_page: 8,
    _chatter_page: 8,
    _letter_page: 5,
    _question_page: 13,
    _sum_page: 6,
    _spelling_page: 6,
    _echo_page: 5,
    _lookup_page: 6,
}


def documents(split, chars, seed=0, world=None):
    """Yield documents for "train" or "val", `chars` characters in all (the last one may pass it), none in both."""
    assert split in ("train", "val"), split
    world = world or load_world()
    rng = Random(f"pocket documents {split} {seed}")
    pages, weights = list(PAGES), list(PAGES.values())
    while chars > 0:
        text = rng.choices(pages, weights)[0](rng, split, world)
        # The problems on a page belong to the split already; this keeps apart whole pages, also those without any.
        if (hashlib.blake2b(text.encode(), digest_size=1).digest()[0] < 32) == (split == "val"):
            yield text
            chars -= len(text)
