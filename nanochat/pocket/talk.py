"""
Conversations about the pocket world and about the model itself, as lists of exchanges (user message, reply).

Every user message belongs to one split, as in `problems.py`. The functions for topics return exchanges, or [] if the
wording that they have drawn belongs to another split.
"""

import re
from functools import partial

from nanochat.pocket.problems import apply_operator, arithmetic_problem, ask, comparison, fact, stranger
from nanochat.pocket.stories import story
from nanochat.pocket.world import ATTRIBUTES, Place, fill


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
    s = story(rng, split, world, foreign=0.15, requested=re.findall(r"{([\w.]+)", template))
    question = ask(rng, split, world, template, **s._asdict(), doing=s.topic)
    if not question:
        return []
    section = rng.choice(world.groups["told"])
    follow_up = section_exchange(rng, split, world, section, **s._asdict()) if rng.random() < 0.4 else []
    return [(question, s.text), *follow_up]


def _follow_up(rng, split, world, subject, attribute):
    """
    (attribute, template, a, b) of a question that follows one about `attribute` of `subject`, a Character or Place.

    The reply is about `b`, which is `subject`, a friend, neighbor or place that was mentioned, or another character.
    None if its pronoun would be ambiguous. `attribute` is "" if that question was not about a single attribute.
    """
    if isinstance(subject, Place) or attribute == "home" and rng.random() < 0.3:
        place = subject if isinstance(subject, Place) else subject.place
        attribute_asked, template = rng.choice(world.table("follow place"))
        if attribute != "near":
            return attribute_asked, template, place, place
        return (attribute_asked, template, place.near, place.near) if "there" in template else None
    if attribute in ATTRIBUTES and rng.random() < 0.5:
        other = rng.choice([c for c in world.characters if c is not subject])
        return attribute, rng.choice(world.lines(rng.choice(("and", "correct")))), subject, other
    attribute_asked, template = rng.choice(world.table("follow"))
    other = getattr(subject, attribute) if attribute in ("friend", "neighbor") else subject
    if other is not subject and rng.random() < 0.5:
        if other.he != subject.he:
            subject = other
        elif attribute == "friend":
            attribute_asked, template = rng.choice(world.table("friend of"))
            template = re.sub("{a}'s <best friend>|the <best friend> of {a}", "[that|{a.his}] friend", template)
            return attribute_asked, template, subject, other
    template = world.expand(rng, template, split)
    return (attribute_asked, template, subject, subject) if other is subject or "{a." in template else None


def _follow_ups(rng, split, world, subject, attribute, reply):
    """Up to three exchanges after one with this reply about an attribute of a character or place."""
    exchanges, replies = [], [reply]
    number = 0 if attribute == "afraid" else rng.choice((0, 0, 0, 1, 2, 3))  # "Moss and Pepper are afraid of ..."
    for _ in range(20):  # tries
        if len(exchanges) < number and (follow_up := _follow_up(rng, split, world, subject, attribute)):
            attribute_asked, template, a, b = follow_up
            question, reply = ask(rng, split, world, template, a=a, b=b, p=b), world.statement(attribute_asked, b)[1]
            if question and reply not in replies:
                exchanges.append((question, reply))
                replies.append(reply)
                subject, attribute = b, attribute_asked
    return exchanges


def character_exchanges(rng, split, world):
    """
    A question about a character (who it is, yes or no, a choice, a friend, two attributes, two characters), follow-ups.

    The reply to a yes-or-no question is the fact itself. A small model does not learn to compare the two: after 7
    million tokens of training, "so yes" or "so no" was right in 45 % of the cases.
    """
    a, b = rng.sample(world.characters, 2)
    form = rng.choice(("check", "check", "check", "which", "which who", "friend of", "clause", "same", "introduce"))
    if form == "introduce":
        exchanges = section_exchange(rng, split, world, "introduce character", a=a)
    else:
        rows = [row for row in world.table(form) if form != "clause" or row[0] != "friend"]  # "he" would be the friend
        attribute, template, *more = rng.choice(rows)
        reply = world.statement(attribute, a)[1]
        if form == "clause":
            second, _, clause = rng.choice([row for row in world.table(form) if row[0] != attribute])
            template, reply = f"{template} and {clause}?", f"{reply} {world.statement(second, a)[1]}"
        elif form == "same":
            other = world.statement(attribute, b)[1]
            template, reply = rng.choice((template, *more)), f"{reply.removesuffix('.')}, and {other}"
        elif form == "friend of":
            reply = f"{world.statement('friend', a)[1]} {world.statement(attribute, a.friend)[1]}"
        others = [c for c in world.characters if getattr(c, attribute) != getattr(a, attribute) and c is not a.friend]
        o, u = rng.sample((a, rng.choice(others)), 2)  # the random order balances the answers
        question = ask(rng, split, world, template, a=a, b=b, o=o, u=u)
        exchanges = [(question, reply)] if question else []
    if exchanges and form in ("check", "which", "which who", "introduce"):
        exchanges += _follow_ups(rng, split, world, a, "", exchanges[0][1])
    return exchanges


def fact_exchanges(rng, split, world):
    """A question about a character or place, or for one ("Who is the baker?"), and follow-ups."""
    f = fact(rng, split, world)
    return [(f.question, f.answer), *_follow_ups(rng, split, world, f.subject, f.attribute, f.answer)]


def _sum(rng, split, world):
    """A sum, and in some cases one or two more steps with its result."""
    exchanges = [arithmetic_problem(rng, split, world)]
    for _ in range(rng.choice((0, 0, 1, 2))):
        left = int(exchanges[-1][1].rpartition(" ")[2])
        templates = world.lines("sum turns")  # people use the first 50 most
        template, step = rng.choice(rng.choice((templates[:50], templates))).split(" => ")
        n = rng.randint(2, rng.choice((9, 20, 99)) if step[0] in "+-" else 9)
        operator, right = step[0], int(step[1:].replace("{n}", str(n)))
        result = apply_operator(left, operator, right)
        if result and result > 0 and (question := ask(rng, split, world, template, n=n)):
            exchanges.append((question, f"That is <<{left}{operator}{right}={result}>>{result}.\n#### {result}"))
    return exchanges


# Topic -> (weight, function). Without a function, it stands for the sections whose names begin with it.
TOPICS = {"fact": (23, fact_exchanges), "character": (14, character_exchanges), "sum": (8, _sum)}
TOPICS |= {"comparison": (2, comparison), "story": (7, story_exchanges)}
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
    n, form = stranger(rng, world, split), rng.random()
    told = section_exchange(rng, split, world, "name told", n=n) if form < 0.12 and "self" in topics else []
    exchanges = draw_exchanges(rng, split, world, ("talk hello", "talk hello name")) if form > 0.9 else [*told]
    for _ in range(rng.choice((0 if told else 1, 1, 1, 1, 2, 3))):
        exchanges += draw_exchanges(rng, split, world, topics)
        if len(exchanges[-1][1]) > 500:  # characters: a story, and two stories exceed a context of 512 tokens
            break
    if told or rng.random() < 0.02:
        exchanges += section_exchange(rng, split, world, "name asked" if told else "name unknown", n=n)
    elif rng.random() < 0.1:
        exchanges += draw_exchanges(rng, split, world, ("talk thanks", "talk bye"))
    return exchanges
