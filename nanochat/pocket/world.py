"""
The characters, places and text templates of the pocket world, read from `pocket_world.txt`.

In a template, [a|b] is a random choice, and {a.he} is a slot: an attribute of a Character or Place.
"""

import functools
import re
from pathlib import Path

from nanochat.common import UserError, require

WORLD_FILE = Path(__file__).with_name("pocket_world.txt")
ATTRIBUTES = ("kind", "home", "color", "food", "job", "hobby", "fear", "thing", "friend")  # of a character


def read_sections(text):
    """
    {section name: list of blocks} of a file with "== name" headings; a block is the list of lines below one heading.

    Empty lines and comments ("# ...") are dropped; a literal \\n in a line becomes a line break.
    """
    sections = {}
    for section in re.split(r"^== ", text, flags=re.M)[1:]:
        name, *lines = section.split("\n")
        block = [line.replace("\\n", "\n") for line in lines if line and not line.startswith("# ")]
        sections.setdefault(name, []).append(block)
    return sections


def fill(rng, template, **slots):
    """`template` with one random alternative of each [a|b] and its slots filled. Raises UserError for another slot."""
    try:
        return re.sub(r"\[([^\[\]]*)\]", lambda m: rng.choice(m[1].split("|")), template).format_map(slots)
    except (AttributeError, LookupError, ValueError) as e:
        raise UserError(f"{WORLD_FILE}: wrong slot in a template: {e}, in {template!r}") from e


def gerund(phrase):
    """Verb phrase with its verb as a gerund: 'dig tunnels' -> 'digging tunnels'."""
    verb, _, rest = phrase.partition(" ")
    verb = verb[:-1] if verb.endswith("e") else re.sub(r"([^aeiou][aeiou])([dgmnpt])$", r"\1\2\2", verb)
    return f"{verb}ing {rest}".strip()


class Named:
    """In a text, it is its name."""

    def __str__(self):
        return self.name


class Place(Named):
    """A place and its two residents. Templates use its attributes: {p.at}, {p.landmark}, {p.who.kind}."""

    def __init__(self, name, preposition, about, landmark, famous, near):
        self.name, self.about, self.landmark, self.famous, self.near = name, about, landmark, famous, near
        self.at = f"{preposition} {name}"
        self.residents = []


class Character(Named):
    """An animal of the pocket world. Templates use its attributes: {a.his}, {a.a_job}, {a.place.landmark}."""

    def __init__(self, name, he, kind, home, wears, food, job, hobby, fear, thing, friend):
        self.name, self.he, self.kind, self.home, self.wears, self.food = name, he, kind, home, wears, food
        self.job, self.hobby, self.fear, self.thing, self.friend = job, hobby, fear, thing, friend
        self.him, self.his = {"he": ("him", "his"), "she": ("her", "her")}[he]
        self.color, self.garment = wears.split()
        for noun in ("kind", "wears", "garment", "job", "thing"):
            value = getattr(self, noun)
            setattr(self, f"a_{noun}", f"{'an' if value[0] in 'aeiou' else 'a'} {value}")
        self.He, self.His, self.Food = he.capitalize(), self.his.capitalize(), food.capitalize()
        self.doing = gerund(hobby)


class World:
    """
    The parsed world file.

    Raises ValueError for a wrong row, a place without two residents, and a home, friend or neighbor that is missing
    from the tables.
    """

    def __init__(self, text):
        self.sections = read_sections(text)
        places, characters = self.entries("places", Place), self.entries("characters", Character)
        try:
            for place in places.values():
                place.near = places[place.near]
            for c in characters.values():
                c.place, c.friend, c.at = places[c.home], characters[c.friend], places[c.home].at
                c.place.residents.append(c)
        except KeyError as e:
            raise ValueError(f"{e} is missing from the tables of characters and places") from None
        for place in places.values():
            require(len(place.residents) >= 2, f"{place} has fewer than two characters who live there")
            place.who, place.who2 = place.residents[:2]
        self.places, self.characters = list(places.values()), list(characters.values())
        *most, last = places
        self.place_names = f"{', '.join(most)} and {last}"
        self.statements = {attribute: templates for attribute, *templates in self.table("say")}
        # attribute -> all its values, sorted: the choices of a question
        self.values = {a: sorted({self.statement(a, s)[0] for s in self.subjects(a)}) for a in self.statements}
        self.values["resident"] = sorted(characters)
        rows = " ".join(self.lines("characters") + self.lines("places"))
        self.words = sorted({*self.words_in("words"), *re.findall(r"(?<![A-Za-z])[a-z]{3,}", rows)})

    def entries(self, section, kind):
        """{name: Character or Place} of the rows of a section."""
        entries = {}
        for row in self.table(section):
            try:
                entries[row[0]] = kind(*row)
            except (LookupError, TypeError, ValueError) as e:
                raise ValueError(f"wrong row in {section}: {' | '.join(row)}") from e
        return entries

    def lines(self, section):
        """The lines of a section, or of its first block if it has several."""
        return self.sections[section][0]

    def table(self, section):
        """The rows of a section, each a list of cells."""
        return [[cell.strip() for cell in line.split("|")] for line in self.lines(section)]

    def words_in(self, section):
        """The words of a section, in the order of the file."""
        return " ".join(self.lines(section)).split()

    def random_line(self, rng, section, **slots):
        """A random template of a section, filled (see `fill`)."""
        return fill(rng, rng.choice(self.lines(section)), **slots)

    def subjects(self, attribute):
        """The characters or places that have `attribute`."""
        return self.places if "{p" in self.statements[attribute][0] else self.characters

    def statement(self, attribute, subject):
        """[value, sentence] of an attribute of a Character or Place, e.g. ["mouse", "Pip is a mouse."]."""
        return [template.format(a=subject, p=subject) for template in self.statements[attribute]]


@functools.cache
def load_world():
    """The World of `pocket_world.txt`. Raises UserError if an edit has made the file wrong."""
    try:
        return World(WORLD_FILE.read_text(encoding="utf-8"))
    except (AttributeError, LookupError, ValueError) as e:
        raise UserError(f"{WORLD_FILE}: {e}") from e
