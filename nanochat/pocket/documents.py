"""Documents for pretraining on the pocket world: stories, descriptions, dialogues, letters, exercises."""

import hashlib
import re
from random import Random

from nanochat.pocket.problems import apply_operator, fact, letter_problem, split_of, sum_problem
from nanochat.pocket.stories import describe, places_away, story
from nanochat.pocket.world import ATTRIBUTES, fill, load_world


def _story(rng, split, world):
    return story(rng, split, world, title=rng.random() < 0.8)[0]


def _characters(rng, split, world):
    """Descriptions of one to three characters."""
    characters = rng.sample(world.characters, rng.choice((1, 1, 2, 3)))
    return "\n\n".join(describe(rng, world, c, rng.randint(6, 9)) for c in characters)


def _place(rng, split, world):
    """Description of a place and up to two residents."""
    p = rng.choice(world.places)
    residents = [describe(rng, world, c, rng.randint(2, 4)) for c in p.residents]
    return "\n\n".join([describe(rng, world, p, rng.randint(4, 5)), *residents[: rng.randint(0, 2)]])


def _cards(rng, split, world):
    """One to four characters as "attribute: value" lines."""

    def card(c):
        rows = [f"{attribute}: {getattr(c, attribute)}" for attribute in ("kind", "home", "wears", *ATTRIBUTES[3:])]
        rng.shuffle(rows)
        return "\n".join([f"name: {c}", *rows])

    return "\n\n".join(card(c) for c in rng.sample(world.characters, rng.randint(1, 4)))


def _statements(rng, split, world):
    """Sentences about many characters: "The baker is Hazel.", or comparisons of two characters."""
    section = rng.choice(("reverse", "reverse", "pair"))
    lines = []
    for _ in range(rng.randint(6, 14)):
        a, b = rng.sample(world.characters, 2)
        lines.append(world.write(rng, section, a=a, b=b))
    return rng.choice("\n ").join(lines)


def _dialogue(rng, split, world):
    a, b = rng.sample(world.characters, 2)
    meeting_place, p = rng.sample(places_away(world, a, b), 2)
    slots = dict(a=a, b=b, p=meeting_place)
    lines = []
    for template in rng.sample(world.lines("chatter"), rng.randint(3, 6)):
        speaker, other = rng.sample((a, b), 2)
        lines.append(fill(rng, template, a=speaker, b=other, p=p))
    opening = world.write(rng, "chatter opening", **slots)
    ending = world.write(rng, "chatter ending", **slots)
    return "\n".join([world.write(rng, "heading", **slots), "", opening, *lines, ending])


def _letter(rng, split, world):
    a, b = rng.sample(world.characters, 2)
    return world.write(rng, "letter", a=a, b=b, p=rng.choice(places_away(world, a, b)))


def _facts(rng, split, world):
    """Questions and answers, on half of the pages with choices."""
    multiple_choice, page = rng.random() < 0.5, []
    for _ in range(rng.randint(3, 8)):
        f = fact(rng, split, world)
        choices = "".join(f"- {choice}\n" for choice in f.choices) if multiple_choice else ""
        page.append(f"Question: {f.question}\n{choices}Answer: {f.value if multiple_choice else f.answer}")
    return "\n\n".join(page)


def _sums(rng, split, world):
    """Arithmetic: 20 bare equations, or problems with their answers."""
    page = []
    if rng.random() < 0.3:
        while len(page) < 20:  # numbers small enough for a model to memorize
            x, operator, y = rng.randint(2, 20), rng.choice("+-*"), rng.randint(2, 20)
            if x - y >= 2 and split_of("sum", x, f"{operator}{y}") == split:
                page.append(f"{x} {operator} {y} = {apply_operator(x, operator, y)}")
        return "\n".join(page)
    for _ in range(rng.randint(3, 8)):
        question, answer = sum_problem(rng, split, world)
        answer = re.sub(r"<<(.*?=).*?>>", r"\1", answer)  # documents show 34+12=46 instead of calling the calculator
        page.append(f"Question: {question}\nAnswer: {answer}")
    return "\n\n".join(page)


def _spelling(rng, split, world):
    rows = []
    for _ in range(rng.randint(8, 20)):
        word, letter = letter_problem(rng, split, world.words)
        count = word.count(letter)
        often = ("does not appear", "appears once")[count] if count < 2 else f"appears {count} times"
        slots = dict(w=word, l=letter, often=often, dashes="-".join(word), commas=",".join(word))
        rows.append(world.write(rng, "spelling", **slots))
    return "\n".join(rows)


def _echoes(rng, split, world):
    """Lists of random words, each repeated: a small model learns to copy from its context."""
    rows = []
    for _ in range(rng.randint(3, 6)):
        a, b = rng.sample(world.characters, 2)
        words = rng.choice((" ", ", ")).join(rng.sample(world.words, rng.randint(2, 8)))
        rows.append(world.write(rng, "echo", a=a, b=b, s=words))
    return "\n".join(rows)


def _lookups(rng, split, world):
    """Facts made up for this page and questions about them: a small model learns to look them up in its context."""
    key_pool, value_pool, row, question = rng.choice(world.table("lookup"))
    n = rng.randint(4, 8)
    pools = {"names": world.characters, "words": world.words, "numbers": range(2, 1000)}
    facts = list(zip(rng.sample(pools[key_pool], n), rng.sample(pools[value_pool], n), strict=True))
    queried_facts = [rng.choice(facts) for _ in range(rng.randint(4, 10))]
    return "\n".join([row.format(k=k, v=v) for k, v in facts] + [question.format(k=k, v=v) for k, v in queried_facts])


# Kinds of documents, in percent.
PAGES = {_story: 28, _characters: 9, _place: 4, _cards: 2, _statements: 8, _dialogue: 8, _letter: 5, _facts: 13}
PAGES |= {_sums: 6, _spelling: 6, _echoes: 5, _lookups: 6}


def documents(split, chars, seed=0):
    """
    Yield documents of "train" or "val" until they have `chars` characters in all; the last one may exceed that.

    No document is in both splits.
    """
    assert split in ("train", "val"), split
    world, rng = load_world(), Random(f"pocket documents {split} {seed}")
    while chars > 0:
        text = rng.choices(list(PAGES), PAGES.values())[0](rng, split, world)
        # The problems on a page belong to `split` already. The hash also separates pages without problems.
        if (hashlib.blake2b(text.encode(), digest_size=1).digest()[0] < 32) == (split == "val"):
            yield text
            chars -= len(text)
