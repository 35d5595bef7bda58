"""
Problems about the pocket world: facts, arithmetic and letters in words.

Every problem has a key: the text of a question, the numbers of a calculation. `split_of` assigns each key to one split.
Training, validation and test therefore never share a problem, whatever the seeds.
"""

import hashlib
import re
from pathlib import Path
from typing import NamedTuple

from nanochat.pocket.world import ATTRIBUTES, Character, Place, fill

PEOPLE_FILE = Path(__file__).with_name("people.txt")
# Roughly proportional to the number of facts: 28 characters, 14 places. "who" asks which character has an attribute.
FACT_WEIGHTS = dict.fromkeys(ATTRIBUTES, 2) | {"who": 5, "landmark": 1, "famous": 1, "near": 1, "resident": 1}


def split_of(*key):
    """Split of the problem with this key: "test" (10 %), "val" (5 %) or "train", by a hash of the key."""
    digest = hashlib.blake2b("|".join(map(str, key)).encode(), digest_size=4).digest()
    bucket = int.from_bytes(digest, "big") % 20
    return "test" if bucket < 2 else "val" if bucket == 2 else "train"


class Fact(NamedTuple):
    """A question about a character or place."""

    attribute: str
    subject: Character | Place
    question: str
    answer: str  # a full sentence
    value: str  # the correct choice
    choices: list  # four values in random order, one of them correct


def fact(rng, split, world):
    """A Fact whose question belongs to `split`. Other splits ask for the same facts in different words."""
    while True:
        attribute = rng.choices(list(FACT_WEIGHTS), FACT_WEIGHTS.values())[0]
        subject = rng.choice(world.subjects(attribute))
        question = world.random_line(rng, f"ask {attribute}", a=subject, p=subject)
        if split_of("fact", question) == split:
            break
    value, answer = world.statement(attribute, subject)
    residents = [c.name for c in getattr(subject, "residents", ())]
    value = rng.choice(residents) if attribute == "resident" else value
    wrong = [v for v in world.values[attribute] if v not in (value, subject.name, *residents)]
    choices = [value, *rng.sample(wrong, 3)]
    rng.shuffle(choices)
    return Fact(attribute, subject, question, answer, value, choices)


def apply_operator(x, operator, y):
    """x + y, x - y, x * y or the integer quotient x / y."""
    return {"+": x + y, "-": x - y, "*": x * y, "/": x // y}[operator]


def _operands(rng, operators, hard):
    """
    Random operands (x, y, z) for one operator (x + y), which leaves z unused, or two operators ((x + y) * z).

    All results, including intermediate ones, are integers of at least 2.
    """
    # Hard problems include small numbers: training on large numbers only would hurt accuracy on small ones.
    top = rng.choice((99, 999, 9999, 9999) if hard else (9, 20, 99, 999))
    factor, top_y, top_z = (min(top, 999), 99, 99) if hard else (min(top, 99), 12, 9)
    first, second = (*operators, None)[:2]
    if second == "/":  # (x + y) / z
        z = rng.randint(2, top_z)
        total = z * rng.randint(2, factor)
        x = rng.randint(2, total - 2)
        return x, total - x, z
    if first == "+":
        top = factor if second == "*" else top
        x, y = rng.randint(2, top), rng.randint(2, top)
    elif first == "-":
        x = rng.randint(6, max(top, 12))
        y = rng.randint(2, x - (4 if second else 2))
    elif first == "*":
        x, y = rng.randint(2, factor), rng.randint(2, top_y)
    else:
        y = rng.randint(2, top_y)
        x = y * rng.randint(2, factor)
    top_z = apply_operator(x, first, y) - 2 if second == "-" else top_z if second == "*" else top
    return x, y, rng.randint(2, top_z)


def arithmetic_problem(rng, split, world, hard=False):
    """
    (question, answer) of an arithmetic problem of one or two steps whose numbers belong to `split`.

    The answer is in GSM8K's format: <<34+12=46>>46 is a calculator call, the last line is `#### 46`. Operands are at
    most 999, in hard problems 9999.
    """
    while True:
        question, answer = rng.choice(world.lines("sums")).split(" => ")
        operators = re.findall(r"<<(?:\{x\}|@)(.)\{.\}>>", answer)
        x, y, z = _operands(rng, operators, hard)
        if split_of("sum", x, *(f"{o}{n}" for o, n in zip(operators, (y, z), strict=False))) == split:
            break
    a, b, c = rng.sample(world.characters, 3)
    slots = dict(x=x, y=y, z=z, a=a, b=b, c=c, p=rng.choice(world.places), i=rng.choice(world.words_in("things")))
    answer, result = fill(rng, answer, **slots), x
    for call, left, operator, right in re.findall(r"(<<(\d+|@)(.)(\d+)>>)", answer):
        left = result if left == "@" else left  # @ is the previous result
        result = apply_operator(result, operator, int(right))
        answer = answer.replace(call, f"<<{left}{operator}{right}={result}>>{result}", 1)
    return fill(rng, question, **slots), f"{answer}\n#### {result}"


def letter_problem(rng, split, words):
    """A random (word, letter) pair of `split`. In at least 90 % of the draws the word contains the letter."""
    while True:
        word = rng.choice(words)
        letter = rng.choice(word if rng.random() < 0.9 else "abcdefghijklmnopqrstuvwxyz")
        if split_of("letter", word, letter) == split:
            return word, letter
