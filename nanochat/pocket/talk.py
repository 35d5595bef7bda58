"""
Conversations about the pocket world and about the model itself, as lists of exchanges (user message, reply).

Every user message belongs to one split, as in `problems.py`. The functions for topics return exchanges, or [] if the
wording that they have drawn belongs to another split.
"""

import re
from functools import partial

from nanochat.pocket.problems import apply_operator, arithmetic_problem, ask, comparison, fact, stranger
from nanochat.pocket.stories import story
from nanochat.pocket.world import ATTRIBUTES, fill


def section_exchange(rng, split, world, section, **slots):
    """An exchange from a section with lines "? question" and "! reply"."""
    questions, replies = ([line[2:] for line in world.lines(section) if line[0] == mark] for mark in "?!")
    (a, b), p, n = rng.sample(world.characters, 2), rng.choice(world.places), stranger(rng, world, split)
    slots = {c.name: c for c in world.characters} | dict(a=a, b=b, p=p, n=n, places=world.place_names) | slots
    question = ask(rng, split, world, rng.choice(questions), **slots)
    return [(question, fill(rng, world.expand(rng, rng.choice(replies)), **slots))] if question else []


def story_exchanges(rng, split, world):
    """A request for a story, the story, and in some cases a question about it."""
    section = rng.choice(("none", "one", "two", "two", "kinds"))
    template = world.expand(rng, rng.choice(world.lines(f"ask story {section}")), split)
    s = story(rng, split, world, foreign=0.15, requested=re.findall(r"{(b|p|topic)\b", template))
    question = ask(rng, split, world, template, **s._asdict())
    if not question:
        return []
    section = rng.choice(world.groups["told"])
    follow_up = section_exchange(rng, split, world, section, **s._asdict()) if rng.random() < 0.4 else []
    return [(question, s.text), *follow_up]


def _two_attributes(rng, split, world, a):
    """(question, reply) about two attributes of a character. No question if both are the same."""
    (first, question, _), (second, _, more) = rng.sample(world.table("clause"), 2)
    reply = " ".join(world.statement(attribute, a)[1] for attribute in (first, second))
    return first != second and ask(rng, split, world, f"{question} and {more}?", a=a), reply


def _two_characters(rng, split, world, a):
    """(question, reply) about an attribute of two characters: what it is, or whether it is the same."""
    attribute, *questions = rng.choice(world.table("same"))
    b = rng.choice([c for c in world.characters if c is not a])
    first, second = (world.statement(attribute, c)[1] for c in (a, b))
    return ask(rng, split, world, rng.choice(questions), a=a, b=b), f"{first.removesuffix('.')}, and {second}"


def _first_question(rng, split, world, a):
    """
    (question, reply, attribute): open, yes or no, a choice of two, or about a friend, two attributes, two characters.

    The reply to a yes-or-no question is the fact itself. A small model does not learn to compare the two: after 7
    million tokens of training, "so yes" or "so no" was right in 45 % of the cases.
    """
    forms = ("ask", "ask", "ask", "check", "check", "check", "which", "which who", "friend of", "two", "same")
    form, attribute = rng.choice(forms), rng.choice(ATTRIBUTES)
    if form in ("two", "same"):
        question, reply = (_two_attributes if form == "two" else _two_characters)(rng, split, world, a)
        return question, reply, None
    if form == "ask":
        template = rng.choice(world.lines(f"ask {attribute}"))
    else:
        attribute, template = rng.choice(world.table(form))
    others = [c for c in world.characters if getattr(c, attribute) != getattr(a, attribute) and c is not a.friend]
    pair = rng.sample((a, rng.choice(others)), 2)  # the random order balances the answers
    question = ask(rng, split, world, template, a=a, o=pair[0], u=pair[1])
    reply = world.statement("job" if attribute == "work" else attribute, a)[1]
    if form == "friend of":
        return question, f"{world.statement('friend', a)[1]} {world.statement(attribute, a.friend)[1]}", None
    return question, reply, attribute if form == "ask" else ""


def character_exchanges(rng, split, world):
    """One to four exchanges about a character: later ones say "he" or "she", name another one, or correct the name."""
    a = rng.choice(world.characters)
    question, reply, attribute = _first_question(rng, split, world, a)
    exchanges = [(question, reply)] if question else []
    for _ in range(rng.choice((0, 0, 1, 1, 2, 3)) if exchanges and attribute is not None else 0):
        b = rng.choice([c for c in world.characters if c is not a])
        new_attribute, template = rng.choice(world.table("follow"))
        if changes_subject := attribute and rng.random() < 0.5:
            new_attribute, template = attribute, rng.choice(world.lines(rng.choice(("and", "correct"))))
        if question := ask(rng, split, world, template, a=a, b=b):
            a, attribute = b if changes_subject else a, new_attribute
            exchanges.append((question, world.statement(attribute, a)[1]))
    return exchanges


def _place(rng, split, world):
    """Up to four exchanges about a place; later questions say "there"."""
    p, exchanges = rng.choice(world.places), []
    for _ in range(rng.choice((2, 3, 4))):
        attribute, template = rng.choice(world.table("follow place"))
        template = template if exchanges else rng.choice(world.lines(f"ask {attribute}"))
        if question := ask(rng, split, world, template, p=p):
            exchanges.append((question, world.statement(attribute, p)[1]))
    return exchanges


def _sum(rng, split, world):
    """A sum, and in some cases one or two more steps with its result."""
    exchanges = [arithmetic_problem(rng, split, world)]
    for _ in range(rng.choice((0, 0, 1, 2))):
        left = int(exchanges[-1][1].rpartition(" ")[2])
        template, step = rng.choice(world.lines("sum turns")).split(" => ")
        n = rng.randint(2, rng.choice((9, 20, 99)) if step[0] in "+-" else 9)
        operator, right = step[0], int(step[1:].replace("{n}", str(n)))
        result = apply_operator(left, operator, right)
        if result and result > 0 and (question := ask(rng, split, world, template, n=n)):
            exchanges.append((question, f"That is <<{left}{operator}{right}={result}>>{result}.\n#### {result}"))
    return exchanges


# Topic -> (weight, function). Without a function, it stands for the sections whose names begin with it.
TOPICS = {"fact": (17, lambda *args: [fact(*args)[2:4]]), "character": (18, character_exchanges), "place": (3, _place)}
TOPICS |= {"sum": (6, _sum), "comparison": (2, comparison), "story": (7, story_exchanges)}
TOPICS |= {"introduce": (4, None), "self": (22, None), "unknown": (15, None), "talk": (33, None)}


def draw_exchanges(rng, split, world, topics=TOPICS):
    """Exchanges on a random topic of `topics`: keys of TOPICS, or names of sections."""
    exchanges = []
    while not exchanges:
        topic = rng.choices(list(topics), [TOPICS.get(topic, (1, None))[0] for topic in topics])[0]
        section, (_, function) = rng.choice(world.groups.get(topic, [topic])), TOPICS.get(topic, (1, None))
        exchanges = (function or partial(section_exchange, section=section))(rng, split, world)
    return exchanges


def conversation(rng, split, world, topics=TOPICS):
    """A few exchanges (user message, reply). Replies may contain calculator calls in GSM8K's format."""
    exchanges, n, form = [], stranger(rng, world, split), rng.random()
    if form < 0.12 and "self" in topics:
        exchanges += section_exchange(rng, split, world, "name told", n=n)
    elif form > 0.9:
        exchanges += draw_exchanges(rng, split, world, ("talk hello", "talk hello name"))
    name_told = bool(exchanges) and form < 0.12
    for _ in range(rng.choice((1, 1, 1, 1, 2, 3))):
        exchanges += draw_exchanges(rng, split, world, topics)
        if len(exchanges[-1][1]) > 500:  # characters: a story, and two stories exceed a context of 512 tokens
            break
    if name_told or rng.random() < 0.02:
        exchanges += section_exchange(rng, split, world, "name asked" if name_told else "name unknown", n=n)
    elif rng.random() < 0.1:
        exchanges += draw_exchanges(rng, split, world, ("talk thanks", "talk bye"))
    return exchanges
