"""Documents about the pocket world for pretraining: stories, descriptions, exercises."""

import hashlib
import re
from functools import partial
from random import Random

from nanochat.pocket.stories import describe, story
from nanochat.pocket.talk import TOPICS, draw_exchanges
from nanochat.pocket.world import fill, load_world

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
    templates = (rng.choice(world.table(section))[-1] for _ in range(rng.randint(6, 14)))
    pairs = ((world.expand(rng, template), *rng.sample(world.characters, 2)) for template in templates)
    yield rng.choice("\n ").join(fill(rng, template, a=a, b=b) for template, a, b in pairs)


def _questions(rng, split, world, topics=tuple(topic for topic in TOPICS if topic != "story")):
    """Questions and replies, as plain text without calculator calls: <<34+12=46>>46 becomes 34+12=46."""
    for _ in range(rng.randint(2, 7)):
        for question, reply in draw_exchanges(rng, split, world, topics):
            reply = re.sub(r"<<(.*?=).*?>>", r"\1", reply)
            yield f"Question: {question}\nAnswer: {reply}\n"


# Generator of a kind of document -> its weight.
WEIGHTS = {_story: 18, _descriptions: 15, _statements: 16}
WEIGHTS |= {partial(_questions, topics=["fact"]): 17, _questions: 26, partial(_questions, topics=["sum"]): 9}


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
        # Problems and wordings belong to `split`. A hash assigns documents without any to one split.
        hash_split = "val" if hashlib.blake2b(text.encode(), digest_size=1).digest()[0] < 32 else "train"
        if document_lines not in (_descriptions, _statements) or hash_split == split:
            yield text
            chars -= len(text)
