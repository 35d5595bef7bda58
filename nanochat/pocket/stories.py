"""Stories, and descriptions of characters and places, from the templates of the pocket world."""

from collections import namedtuple
from copy import copy

from nanochat.pocket.problems import stranger
from nanochat.pocket.world import Person, Place, an, digest, fill, split_of

# A story, its main characters `a` and `b`, its place `p`, and a phrase for what it is about, such as "a race".
Story = namedtuple("Story", "text a b p topic")


def hero(rng, split, world):
    """A main character from outside of the pocket world, such as a dragon named Tom, living like the first animal."""
    character, person = copy(world.characters[0]), stranger(rng, world, split)
    Person.__init__(character, person.name, person.he)
    character.kind = rng.choice(world.entries_of("heroes", split))
    character.a_kind = an(character.kind)
    return character


def story(rng, split, world, title=False, foreign=0.0, requested=("b", "p", "topic")):
    """
    A random Story. The combination of plot, characters and place belongs to `split`.

    With the probability `foreign`, the main character is no animal of the pocket world (see `hero`).
    `requested`: those of b, p and topic that a request names; they are random. The others follow from the characters,
    since a small model learns little from what it cannot foresee: the best friend, the place next to the home, and a
    plot that is always the same for the requested friend, or without one for `a`. Opening and ending follow from `a`.
    """
    plots = [plot for plot in world.sections["plot"] if "topic" in requested or "{topic}" not in "".join(plot)]
    plot = None
    while not plot:
        a, b = rng.sample(world.characters, 2)
        a = hero(rng, split, world) if rng.random() < foreign else a
        b = b if "b" in requested else a.friend
        p = rng.choice(world.places) if "p" in requested else a.place.near
        key = rng.random() if "topic" in requested else (b if "b" in requested else a).kind
        order = sorted(plots, key=lambda plot, key=key: digest(f"{key} {plot[0]}"))
        fits = "p" not in requested or p not in (a.place, b.place)
        plot = fits and next((plot for plot in order if split_of("story", plot[0], a, b, p) == split), None)
    topic = rng.choice(world.topics[world.sections["plot"].index(plot)])
    topic = fill(rng, world.expand(rng, topic, split), a=a, b=b)
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
        text.append(world.random_line(rng, f"describe {attribute}", a=subject, s=s, S=S))
    return " ".join(text)
