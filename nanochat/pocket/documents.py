"""Documents about the pocket world for pretraining: stories, descriptions, exercises."""

import hashlib
import re
from random import Random

from nanochat.pocket.problems import fact, letter_problem
from nanochat.pocket.stories import describe, story
from nanochat.pocket.talk import TOPICS, draw_exchanges
from nanochat.pocket.world import load_world

# Each of these functions yields one document in pieces of one or several lines.


def _story(rng, split, world):
    """A story, usually with a heading."""
    yield story(rng, split, world, title=rng.random() < 0.8, foreign=0.15).text


def _descriptions(rng, split, world):
    """Descriptions of one to three characters, or of a place and its residents."""
    p = rng.choice(world.places)
    subjects = rng.sample(world.characters, rng.choice((1, 1, 2, 3))) if rng.random() < 0.7 else [p, *p.residents]
    yield "\n\n".join(describe(rng, world, subject, rng.randint(4, 9)) for subject in subjects)


def _statements(rng, split, world):
    """Sentences about many characters: "The baker is Hazel.", or comparisons of two characters."""
    section = rng.choice(("reverse", "pair", "fact text", "fact text"))
    pairs = (rng.sample(world.characters, 2) for _ in range(rng.randint(6, 14)))
    lines = [world.random_line(rng, section, a=a, b=b).rpartition(" | ")[2] for a, b in pairs]
    yield rng.choice("\n ").join(lines)


def _questions(rng, split, world, topics=tuple(topic for topic in TOPICS if topic != "story")):
    """Questions and replies, as plain text without calculator calls: <<34+12=46>>46 becomes 34+12=46."""
    for _ in range(rng.randint(2, 7)):
        for question, reply in draw_exchanges(rng, split, world, topics):
            reply = re.sub(r"<<(.*?=).*?>>", r"\1", reply)
            yield f"Question: {question}\nAnswer: {reply}\n"


def _facts(rng, split, world):
    """Questions and answers, with choices in half of the documents."""
    if rng.random() < 0.5:
        return (yield from _questions(rng, split, world, ["fact"]))
    for _ in range(rng.randint(3, 8)):
        f = fact(rng, split, world)
        choices = "".join(f"- {choice}\n" for choice in f.choices)
        yield f"Question: {f.question}\n{choices}Answer: {f.value}\n"


def _arithmetic(rng, split, world):
    """Arithmetic problems with their answers."""
    return _questions(rng, split, world, ["sum"])


def _spelling(rng, split, world):
    """Sentences that spell words or count letters in them."""
    for _ in range(rng.randint(8, 20)):
        word, letter = letter_problem(rng, split, world.words, blended=0.4)
        count = word.count(letter)
        frequency = ("does not appear", "appears once")[count] if count < 2 else f"appears {count} times"
        yield world.random_line(rng, "spelling", w=word, l=letter, often=frequency, spaced=" ".join(word))


# Generator of a kind of document -> share of the documents in percent.
WEIGHTS = {_story: 18, _descriptions: 15, _statements: 16}
WEIGHTS |= {_facts: 17, _questions: 16, _arithmetic: 9, _spelling: 9}


HELD_OUT = (_story, _facts, _questions, _arithmetic, _spelling)  # whose content depends on the split


def documents(split, chars, seed=0):
    """
    Yield documents of the split "train" or "val" until they have at least `chars` characters in total.

    No document is in both splits, whatever the seeds.
    """
    assert split in ("train", "val"), split
    world, rng = load_world(), Random(f"pocket documents {split} {seed}")
    while chars > 0:
        document_lines = rng.choices(list(WEIGHTS), WEIGHTS.values())[0]
        text = "\n".join(document_lines(rng, split, world)).strip()
        # Problems and wordings belong to `split`. A hash assigns the documents without any to one split.
        hash_split = "val" if hashlib.blake2b(text.encode(), digest_size=1).digest()[0] < 32 else "train"
        if document_lines in HELD_OUT or hash_split == split:
            yield text
            chars -= len(text)
