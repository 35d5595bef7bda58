"""Stories, and descriptions of characters and places, from the templates of the pocket world."""

from collections import namedtuple
from copy import copy

from nanochat.pocket.problems import stranger
from nanochat.pocket.world import Person, Place, an, fill, split_of

# A story, its main characters `a` and `b`, its place `p`, and a phrase for what it is about, such as "a race".
Story = namedtuple("Story", "text a b p topic")


def hero(rng, split, world):
    """A main character from outside of the pocket world, such as a dragon named Tom, with the traits of an animal."""
    character, person = copy(rng.choice(world.characters)), stranger(rng, world, split)
    Person.__init__(character, person.name, person.he)
    character.kind = rng.choice(world.entries_of("heroes", split))
    character.a_kind = an(character.kind)
    return character


def story(rng, split, world, title=False, foreign=0.0):
    """
    A random Story. The combination of plot, characters and place belongs to `split`.

    With the probability `foreign`, the main character is no animal of the pocket world (see `hero`).
    """
    while True:
        plot = rng.choice(world.sections["plot"])
        a, b = rng.sample(world.characters, 2)
        p = rng.choice(world.places)
        lead = hero(rng, split, world) if rng.random() < foreign else a
        fits = p not in (lead.place, b.place) and (lead.fear != b.fear or "cannot sleep" not in plot[0])
        if fits and split_of("story", plot[0], a, b, p) == split:
            break
    a = lead
    details = rng.sample(world.lines("opening more"), rng.randint(0, 1))  # of two, a small model repeats the first
    opening = " ".join([rng.choice(world.lines("opening")), *details])
    topic = world.expand(rng, rng.choice(world.topics[world.sections["plot"].index(plot)]), split)
    sections = rng.choice((("ending",), ("closing",), ("ending", "closing")))
    ending = " ".join(rng.choice(world.lines(section)) for section in sections)
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
        text.append(world.random_line(rng, f"describe {attribute}", a=subject, s=s, S=S))
    return " ".join(text)
