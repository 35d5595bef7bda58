"""
The pocket world's file, read into objects: characters, places, and templates to talk about them.

In a template [a|b] is a choice and {a.he} a slot; whatever stands behind a dot is an attribute of a Character or Place.
"""

import functools
import re
from pathlib import Path

WORLD_FILE = Path(__file__).with_name("pocket_world.txt")


@functools.cache
def _parts(template):
    """'a [b|c] d' -> ['a ', ['b', 'c'], ' d']: every other part is a list of alternatives."""
    parts = re.split(r"\[([^\[\]]*)\]", template)
    return [part.split("|") if i % 2 else part for i, part in enumerate(parts)]


def fill(rng, template, **slots):
    """The template with one alternative of each [a|b] chosen and its slots filled."""
    text = "".join([part if type(part) is str else rng.choice(part) for part in _parts(template)])
    return text.format_map(slots)


def article(noun):
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def gerund(phrase):
    """'dig tunnels' -> 'digging tunnels'."""
    verb, _, rest = phrase.partition(" ")
    if verb.endswith("e"):
        verb = verb[:-1]
    elif re.search(r"[^aeiou][aeiou][dgmnpt]$", verb):
        verb += verb[-1]
    return f"{verb}ing {rest}".strip()


class Place:
    def __init__(self, name, preposition, about, landmark, famous, near):
        self.name, self.about, self.landmark, self.famous, self.near = name, about, landmark, famous, near
        self.at = f"{preposition} {name}"
        self.residents = []

    who = property(lambda self: self.residents[0])
    who2 = property(lambda self: self.residents[1])

    def __str__(self):
        return self.name


class Character:
    """One of the cast. Templates reach everything as an attribute: {a.his}, {a.a_job}, {a.place.landmark}."""

    def __init__(self, name, he, kind, home, wears, food, job, hobby, fear, thing, friend):
        self.name, self.he, self.kind, self.home, self.wears, self.food = name, he, kind, home, wears, food
        self.job, self.hobby, self.fear, self.thing, self.friend = job, hobby, fear, thing, friend
        self.him, self.his = {"he": ("him", "his"), "she": ("her", "her")}[he]
        self.color, self.garment = wears.split()
        for noun in ("kind", "wears", "garment", "job", "thing"):
            setattr(self, f"a_{noun}", article(getattr(self, noun)))
        self.He, self.His, self.Food = he.capitalize(), self.his.capitalize(), food.capitalize()
        self.doing = gerund(hobby)

    def __str__(self):
        return self.name


class World:
    """The parsed world file. Raises ValueError when a home, friend or neighbor is not in its tables."""

    def __init__(self, text):
        self.sections = {}  # name -> list of blocks, a block being a list of lines
        for block in re.split(r"^== ", text, flags=re.M)[1:]:
            name, *lines = block.split("\n")
            lines = [line.replace("\\n", "\n") for line in lines if line and not line.startswith("# ")]
            self.sections.setdefault(name, []).append(lines)
        self.places = {row[0]: Place(*row) for row in self.table("places")}
        self.characters = [Character(*row) for row in self.table("characters")]
        by_name = {c.name: c for c in self.characters}
        for place in self.places.values():
            place.near = self._known(self.places, place.near)
        for c in self.characters:
            c.place = self._known(self.places, c.home)
            c.friend = self._known(by_name, c.friend)
            c.at = c.place.at
            c.place.residents.append(c)
        self.place_list = list(self.places.values())
        *most, last = self.places
        self.place_names = f"{', '.join(most)} and {last}"
        self.say = {attribute: (value, answer) for attribute, value, answer in self.table("say")}
        self.values = {attribute: self._values(attribute) for attribute in self.say}
        self.sums = [self._sum(line) for line in self.lines("sums")]
        self.talk = {}  # topic -> (what users say, what is replied)
        for name in self.sections:
            if name.startswith("talk "):
                lines = self.lines(name)
                self.talk[name[5:]] = tuple([line[2:] for line in lines if line[0] == mark] for mark in "?!")
        cells = " ".join(" ".join(row) for name in ("characters", "places") for row in self.table(name))
        vocabulary = re.findall(r"(?<![A-Za-z])[a-z]{3,}", cells)
        self.words = sorted({*self.words_in("words"), *vocabulary})

    @staticmethod
    def _known(table, name):
        if name not in table:
            raise ValueError(f"the world file names {name!r}, which is not in its tables")
        return table[name]

    def lines(self, name):
        return self.sections[name][0]

    def table(self, name):
        return [[cell.strip() for cell in line.split("|")] for line in self.lines(name)]

    @staticmethod
    def _sum(line):
        """(question, answer, operators of the one or two steps) of a line "question => answer"."""
        question, answer = line.split(" => ")
        return question, answer, re.findall(r"<<(?:\{x\}|@)(.)\{.\}>>", answer)

    @functools.cache  # noqa: B019 a world lives as long as the process
    def words_in(self, name):
        return " ".join(self.lines(name)).split()

    def subjects(self, attribute):
        """Those that have the attribute, and the slot that they fill."""
        return (self.place_list, "p") if "{p" in self.say[attribute][0] else (self.characters, "a")

    def _values(self, attribute):
        subjects, slot = self.subjects(attribute)
        values = [self.say[attribute][0].format(**{slot: s}) for s in subjects]
        return sorted({*values, *(c.name for c in self.characters)} if attribute == "resident" else {*values})


@functools.cache
def load_world(path=WORLD_FILE):
    return World(Path(path).read_text(encoding="utf-8"))
