"""Stories, and descriptions of characters and places, from the templates of the pocket world."""

import re
from collections import namedtuple
from copy import copy
from random import Random

from nanochat.pocket.problems import stranger
from nanochat.pocket.world import Person, Place, an, digest, fill, split_of

# A story, its main characters `a` and `b`, its place `p`, and a phrase for what it is about, such as "a race".
Story = namedtuple("Story", "text a b p topic")


def hero(rng, split, world, requested=("a", "a.kind")):
    """
    A main character from outside of the pocket world, such as a dragon named Tom, living like the first animal.

    `requested`: slots of the request. Without the kind, it is a boy or a girl; without the name, each kind has its own.
    """
    character, asked = copy(world.characters[0]), {"a.kind", "a.a_kind"} & {*requested}
    kind, _, he = rng.choice(world.entries_of("heroes", split)).partition(" ")  # "queen she" is always female
    person = stranger(rng if "a" in requested else Random(kind), world, split, asked and he)
    Person.__init__(character, person.name, person.he)
    character.kind = kind if asked else {"he": "boy", "she": "girl"}[person.he]
    character.a_kind = an(character.kind)
    return character


def _cast(rng, split, world, foreign, requested):
    """(plot, a, b, p, topic) for a request, see story(); None if the choices made belong to another split."""
    slots = {slot.partition(".")[0].replace("doing", "topic") for slot in requested} & {"a", "b", "p", "topic"}
    p = rng.choice(world.places) if "p" in slots else None
    topics = ["<doings>"] if "doing" in requested else rng.choice(world.topics)
    topic = world.expand(rng, rng.choice(topics), split)
    plots = zip(world.sections["plot"], world.topics, strict=True)
    plots = [(plot, t) for plot, t in plots if (t == topics if "topic" in slots else t[0][0] != "<")]
    candidates = sorted(world.characters, key=lambda c: digest(f"{p or topics[0]} {c}"))
    if "a" in slots and rng.random() < foreign:
        candidates = [hero(rng, split, world, requested)]
    elif "a" in slots or not slots or "topic" in slots and (topics[0][0] == "<" or re.search("{[ab]", topic)):
        candidates = [rng.choice(candidates)]
    if "a" not in slots and "{a.his}" in topic:  # a request for "her lost bell" names nobody
        return None
    for a in candidates:
        b = rng.choice([c for c in world.characters if c is not a]) if "b" in slots else a.friend
        key, place = (b if "b" in slots else a).kind, p or a.place.near
        plots.sort(key=lambda pair, key=key: digest(f"{key} {pair[0][0]}"))
        for plot, phrases in plots[:1] if {"b", "p"} & slots else plots:
            if place not in (a.place, b.place) and split_of("story", plot[0], a, b, place) == split:
                return plot, a, b, place, fill(rng, topic if "topic" in slots else phrases[0], a=a, b=b)


def story(rng, split, world, title=False, foreign=0.0, requested=("a", "a.kind", "b", "p", "topic")):
    """
    A random Story. The combination of plot, characters and place belongs to `split`.

    With the probability `foreign`, the main character is no animal of the pocket world (see `hero`).
    `requested`: slots of a request, such as "a.kind"; what they name is random, and "doing" is a topic like "flying a
    kite". The rest follows from it, since a small model learns little from what it cannot foresee: `a` from the place
    or from the only plot of a topic (if there are several, it is random), `b` and `p` from `a` (the best friend, the
    place next to the home), the plot from `b` if that is requested, else from `a`, opening and ending from `a`.
    """
    cast = None
    while not cast:
        cast = _cast(rng, split, world, foreign, requested)
    plot, a, b, p, topic = cast
    opening, ending = (lines[digest(a.kind) % len(lines)] for lines in map(world.lines, ("opening", "ending")))
    heading = [rng.choice((plot[0], *world.lines("heading"))), "-"] if title else []
    text = "\n".join([*heading, opening, *plot[1:], ending]).replace("\n-\n", "\n\n")
    return Story(fill(rng, text, a=a, b=b, p=p, topic=topic), a, b, p, topic)


def describe(rng, world, subject, sentences):
    """`sentences` true sentences about a character (at most 9) or a place (at most 5). The first names the subject."""
    if isinstance(subject, Place):
        templates = rng.sample(world.lines("describe place"), min(4, sentences - 1))
        return " ".join([f"{subject} is a {subject.about}.", *(fill(rng, t, p=subject) for t in templates)])
    attributes = ["home", "wears", "food", "job", "hobby", "fear", "thing", "friend"]
    text = [fill(rng, world.lines("describe kind")[0], S=subject, a=subject)]
    for attribute in rng.sample(attributes, min(8, sentences - 1)):
        s, S = (subject, subject) if rng.random() < 0.4 else (subject.he, subject.He)
        text.append(fill(rng, rng.choice(world.lines(f"describe {attribute}")), a=subject, s=s, S=S))
    return " ".join(text)
