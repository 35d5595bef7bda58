"""
The characters, places and text templates of the pocket world, read from three text files.

In a template, [a|b] is a random choice, which may be nested, <section> is a random entry of a section, and {a.he} is a
slot: an attribute of a Character, Person or Place.
"""

import functools
import hashlib
import re
from pathlib import Path

from nanochat.common import UserError, require

WORLD_FILE = Path(__file__).with_name("pocket_world.txt")
# The world; what people say, and the replies; more wordings of what they say
FILES = [WORLD_FILE.with_name(f"pocket_{name}.txt") for name in ("world", "talk", "phrases")]
ATTRIBUTES = ("kind", "home", "color", "food", "job", "hobby", "fear", "thing", "friend")  # of a character
# he -> him, his, and the verb forms has, does, is
FORMS = {"he": "him his has does is", "she": "her her has does is", "they": "them their have do are"}
FORMS |= {"I": "me my have do am", "we": "us our have do are"}


def digest(text):
    """A 32-bit hash of `text`, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big")


def split_of(*key):
    """Split of the problem or wording with this key: "test" (10 %), "val" (5 %) or "train", by a hash of the key."""
    bucket = digest("|".join(map(str, key))) % 20
    return "test" if bucket < 2 else "val" if bucket == 2 else "train"


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


def _files():
    """The names of the files, for error messages."""
    return " or ".join(map(str, FILES))


def choose(rng, template):
    """`template` with one random alternative of each [a|b]."""
    while "[" in template:  # innermost choices first
        template, n = re.subn(r"\[([^\[\]]*)\]", lambda m: rng.choice(m[1].split("|")), template)
        require(n, f"{_files()}: brackets do not match in {template!r}")
    return template


def fill(rng, template, **slots):
    """`template` with its choices made (see `choose`) and slots filled. Raises UserError for another slot."""
    try:
        return choose(rng, template).format_map(slots)
    except (AttributeError, LookupError, ValueError) as e:
        raise UserError(f"{_files()}: wrong slot in a template: {e}, in {template!r}") from e


def an(noun):
    """`noun` with its indefinite article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def gerund(phrase):
    """Verb phrase with its verb as a gerund: 'dig tunnels' -> 'digging tunnels'."""
    verb, _, rest = phrase.partition(" ")
    verb = verb[:-1] if verb.endswith("e") else re.sub(r"([^aeiou][aeiou])([dgmnpt])$", r"\1\2\2", verb)
    return f"{verb}ing {rest}".strip()


class Named:
    """In a text, it is its name."""

    def __str__(self):
        return self.name


class Person(Named):
    """Somebody outside of the pocket world, by name or as in "my brother". Templates use {a.his}, {a.has}, {a.does}."""

    def __init__(self, name, he):
        self.name, self.he = name, he
        for form, word in zip(("him", "his", "has", "does", "is"), FORMS[he].split(), strict=True):
            setattr(self, form, word)
        self.He, self.His = he.capitalize(), self.his.capitalize()


class Place(Named):
    """A place and its two residents. Templates use its attributes: {p.at}, {p.landmark}, {p.who.kind}."""

    def __init__(self, name, preposition, about, landmark, famous, near):
        self.name, self.about, self.landmark, self.famous, self.near = name, about, landmark, famous, near
        self.at = f"{preposition} {name}"
        self.residents = []


class Character(Person):
    """An animal of the pocket world. Templates use its attributes: {a.his}, {a.a_job}, {a.place.landmark}."""

    def __init__(self, name, he, kind, home, wears, food, job, hobby, fear, thing, friend):
        super().__init__(name, he)
        self.kind, self.home, self.wears, self.food, self.job = kind, home, wears, food, job
        self.hobby, self.fear, self.thing, self.friend = hobby, fear, thing, friend
        self.color, self.garment = wears.split()
        self.sex = {"he": "boy", "she": "girl"}[he]
        for noun in ("kind", "wears", "garment", "job", "thing"):
            setattr(self, f"a_{noun}", an(getattr(self, noun)))
        self.Food, self.doing = food.capitalize(), gerund(hobby)


class World:
    """
    The parsed world file.

    Raises ValueError for a wrong row, a place without two residents, and a home, friend or neighbor that is missing
    from the tables.
    """

    def __init__(self, text):
        self.sections, self.entries_of = read_sections(text), functools.cache(self.entries_of)
        self.groups = {}  # first word of their names -> sections
        for section in self.sections:
            self.groups.setdefault(section.split()[0], []).append(section)
        for section, (block, *_) in self.sections.items():
            require(block, f"the section {section!r} is empty")
            require(len({" => " in line for line in block}) < 2, f"a line of {section!r} has no ' => '")
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
        self.topics = [topics for _, *topics in self.table("story topics")]  # of each plot
        self.place_names = " and ".join(", ".join(places).rsplit(", ", 1))
        work = {job: phrases for job, *phrases in self.table("work")}
        for c in characters.values():  # what the job is about, and answers of several names
            c.works, c.work = work.get(c.job, (f"works as {c.a_job}", f"work as {c.a_job}"))
            c.neighbor = next(other for other in c.place.residents if other is not c)
            *names, last = (other.name for other in characters.values() if other.fear == c.fear)
            c.afraid = f"{', '.join(names)} and {last} are" if names else f"Only {last} is"
        self.statements = {attribute: templates for attribute, *templates, _ in self.table("say")}
        self.fact_weights = {attribute: float(weight) for attribute, *_, weight in self.table("say")}
        # attribute -> all its values, sorted: the choices of a question
        self.values = {a: sorted({self.statement(a, s)[0] for s in self.subjects(a)}) for a in self.statements}
        self.values["resident"] = sorted(characters)
        rows = " ".join(self.lines("characters") + self.lines("places"))
        self.words = sorted({*" ".join(self.lines("words")).split(), *re.findall(r"(?<![A-Za-z])[a-z]{3,}", rows)})
        self.sections["word"] = [[" | ".join(word for word in self.words if word.capitalize() not in characters)]]

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
        """The lines of a section, or of its first block if it has several. Raises UserError if there is none."""
        require(section in self.sections, f"{_files()}: no section {section!r}")
        return self.sections[section][0]

    def table(self, section):
        """The rows of a section, each a list of cells."""
        return [[cell.strip() for cell in line.split(" | ")] for line in self.lines(section)]

    def entries_of(self, section, split):
        """
        The lines of a section, or the words between " | " if it is a list of words.

        Each word belongs to one split, so that validation and test use verbs and names that training lacks.
        """
        lines = self.lines(section)
        words = sorted({word.strip() for line in lines for word in line.split(" | ")}, key=digest)
        start, stop = len(words) // 10 + 1, len(words) // 10 + len(words) // 20 + 2
        parts = {"test": words[:start], "val": words[start:stop], "train": words[stop:]}
        return parts[split] if len(words) > len(lines) else lines

    def expand(self, rng, template, split="train"):
        """`template` with all choices made: a random entry for each <section>, an alternative for each [a|b]."""
        while reference := re.search(r"<([^<>]+)>", template):
            entry = rng.choice(self.entries_of(reference[1], split))
            template = template[: reference.start()] + entry + template[reference.end() :]
        return choose(rng, template)

    def subjects(self, attribute):
        """The characters or places that have `attribute`."""
        return self.places if "{p" in self.statements[attribute][0] else self.characters

    def statement(self, attribute, subject):
        """[value, sentence] of an attribute of a Character or Place, e.g. ["mouse", "Pip is a mouse."]."""
        return [template.format(a=subject, p=subject) for template in self.statements[attribute]]


@functools.cache
def load_world():
    """The World of these files. Raises UserError if an edit has made one wrong."""
    try:
        return World("\n".join(file.read_text(encoding="utf-8") for file in FILES))
    except (AttributeError, LookupError, ValueError) as e:
        raise UserError(f"{_files()}: {e}") from e
