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


def _follow_ups(rng, split, world, subject, attribute):
    """
    Up to three exchanges after one about an attribute of a character or place.

    Their questions say "he", "there" or "that friend", name another character, or correct the name.
    """
    exchanges = []
    for _ in range(0 if attribute == "afraid" else rng.choice((0, 0, 1, 1, 2, 3))):
        a, (new_attribute, template) = subject, rng.choice(world.table("follow"))
        template = world.expand(rng, template, split)
        other = getattr(a, attribute) if attribute in ("friend", "neighbor") and rng.random() < 0.5 else a
        if other is not a and other.he != a.he and "{a." in template:
            a = subject = other
        elif attribute == "friend" and other is not a:  # of the same sex: "he" would mean `a`
            subject, (new_attribute, template) = other, rng.choice(world.table("friend of"))
            template = re.sub("{a}'s <best friend>|the <best friend> of {a}", "[that|{a.his}] friend", template)
        elif attribute == "near" or attribute == "home" and rng.random() < 0.3:
            subject = a.near if attribute == "near" else a.place
        elif attribute in ATTRIBUTES and rng.random() < 0.5:
            subject = rng.choice([c for c in world.characters if c is not a])
            new_attribute, template = attribute, rng.choice(world.lines(rng.choice(("and", "correct"))))
        if isinstance(subject, Place):
            new_attribute, template = rng.choice(world.table("follow place"))
        question = ask(rng, split, world, template, a=a, b=subject, p=subject)
        if not question:
            break
        attribute, reply = new_attribute, world.statement(new_attribute, subject)[1]
        exchanges.append((question, reply))
    return exchanges


def character_exchanges(rng, split, world):
    """
    A question about a character: who it is, yes or no, a choice, about a friend, two attributes, two characters.

    The reply to a yes-or-no question is the fact itself. A small model does not learn to compare the two: after 7
    million tokens of training, "so yes" or "so no" was right in 45 % of the cases.
    """
    a, b = rng.sample(world.characters, 2)
    form = rng.choice(("check", "check", "check", "which", "which who", "friend of", "clause", "same", "introduce"))
    if form == "introduce":
        exchanges = section_exchange(rng, split, world, "introduce character", a=a)
    else:
        attribute, template, *more = rng.choice(world.table(form))
        second = rng.choice([row for row in world.table(form) if row[0] != attribute])
        reply, other, friend = (world.statement(attribute, c)[1] for c in (a, b, a.friend))
        if form == "clause":  # two attributes
            template, reply = f"{template} and {second[2]}?", f"{reply} {world.statement(second[0], a)[1]}"
        elif form == "same":
            template, reply = rng.choice((template, *more)), f"{reply.removesuffix('.')}, and {other}"
        elif form == "friend of":
            reply = f"{world.statement('friend', a)[1]} {friend}"
        others = [c for c in world.characters if getattr(c, attribute) != getattr(a, attribute) and c is not a.friend]
        o, u = rng.sample((a, rng.choice(others)), 2)  # the random order balances the answers
        question = ask(rng, split, world, template, a=a, b=b, o=o, u=u)
        exchanges = [(question, reply)] if question else []
    followed = exchanges and form in ("check", "which", "which who", "introduce")
    return exchanges + (_follow_ups(rng, split, world, a, "") if followed else [])


def fact_exchanges(rng, split, world):
    """A question about a character or place, or for one ("Who is the baker?"), and follow-ups."""
    f = fact(rng, split, world)
    return [(f.question, f.answer), *_follow_ups(rng, split, world, f.subject, f.attribute)]


def _sum(rng, split, world):
    """A sum, and in some cases one or two more steps with its result."""
    exchanges = [arithmetic_problem(rng, split, world)]
    for _ in range(rng.choice((0, 0, 1, 2))):
        left = int(exchanges[-1][1].rpartition(" ")[2])
        # People use the first ones most.
        template, step = rng.choice(world.lines("sum turns")[: rng.choice((50, 999))]).split(" => ")
        n = rng.randint(2, rng.choice((9, 20, 99)) if step[0] in "+-" else 9)
        operator, right = step[0], int(step[1:].replace("{n}", str(n)))
        result = apply_operator(left, operator, right)
        if result and result > 0 and (question := ask(rng, split, world, template, n=n)):
            exchanges.append((question, f"That is <<{left}{operator}{right}={result}>>{result}.\n#### {result}"))
    return exchanges


# Topic -> (weight, function). Without a function, it stands for the sections whose names begin with it.
TOPICS = {"fact": (23, fact_exchanges), "character": (14, character_exchanges), "sum": (6, _sum)}
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
    for _ in range(rng.choice((1, 1, 1, 1, 2, 3))):
        exchanges += draw_exchanges(rng, split, world, topics)
        if len(exchanges[-1][1]) > 500:  # characters: a story, and two stories exceed a context of 512 tokens
            break
    if told or rng.random() < 0.02:
        exchanges += section_exchange(rng, split, world, "name asked" if told else "name unknown", n=n)
    elif rng.random() < 0.1:
        exchanges += draw_exchanges(rng, split, world, ("talk thanks", "talk bye"))
    return exchanges
