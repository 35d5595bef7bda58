"""Stories, and descriptions of characters and places, from the templates of the pocket world."""

from nanochat.pocket.problems import split_of
from nanochat.pocket.world import Place, fill


def places_away(world, a, b):
    """Places where neither of the two characters lives."""
    return [p for p in world.places if p not in (a.place, b.place)]


def story(rng, split, world, title=False):
    """
    (text, main character, second character, place) of a story.

    The combination of plot, characters and place belongs to `split`.
    """
    while True:
        plot = rng.choice(world.sections["plot"])
        a, b = rng.sample(world.characters, 2)
        p = rng.choice(world.places)
        fits = p not in (a.place, b.place) and (a.fear != b.fear or "cannot sleep" not in plot[0])
        if fits and split_of("story", plot[0], a, b, p) == split:
            break
    details = rng.sample(world.lines("opening more"), rng.randint(0, 2))
    opening = " ".join([rng.choice(world.lines("opening")), *details])
    sections = rng.choice((("ending",), ("closing",), ("ending", "closing")))
    ending = " ".join(rng.choice(world.lines(section)) for section in sections)
    heading = [rng.choice((plot[0], *world.lines("heading"))), "-"] if title else []
    text = "\n".join([*heading, opening, *plot[1:], ending]).replace("\n-\n", "\n\n")
    return fill(rng, text, a=a, b=b, p=p), a, b, p


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
