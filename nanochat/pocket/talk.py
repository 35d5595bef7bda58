"""
Conversations about the pocket world and about the model itself, as lists of (user message, reply).

Every user message belongs to one split, as in `problems.py`.
"""

import re

from nanochat.pocket.problems import arithmetic_problem, fact, split_of
from nanochat.pocket.stories import describe, story
from nanochat.pocket.world import ATTRIBUTES, fill

# Topic -> weight. The topics "fact", "arithmetic" and "character" have functions, the others sections "talk <topic>".
TOPICS = {"fact": 22, "character": 10, "ask story": 12, "ask who": 8, "ask place": 4, "arithmetic": 6, "name": 9}
TOPICS |= {"what": 5, "unknown": 5, "stranger": 3, "feel": 3, "can": 3, "like": 2, "sad": 1, "happy": 1, "world": 2}
TOPICS |= dict.fromkeys(("places", "maker", "age", "size", "limits", "home", "eat", "favorite place"), 1)
IDENTITY_TOPICS = {"name", "what", "maker", "age", "size", "limits", "home", "like", "eat", "favorite place"}
# Slot -> section of the world file with words outside the pocket world, which the model does not know.
OUTSIDE_WORDS = {"n": "strangers", "w": "countries", "t": "subjects"}


def topic_exchange(rng, split, world, topic):
    """A random (user message, reply) of a topic with its own section; None if the message is in another split."""
    questions, replies = ([line[2:] for line in world.lines(f"talk {topic}") if line[0] == mark] for mark in "?!")
    if topic == "ask story":
        text, a, b, p = story(rng, split, world)
    else:
        (a, b), p = rng.sample(world.characters, 2), rng.choice(world.places)
    slots = dict(a=a, b=b, p=p, places=world.place_names)
    slots |= {slot: rng.choice(world.words_in(section)) for slot, section in OUTSIDE_WORDS.items()}
    question = fill(rng, rng.choice(questions), **slots)
    if split_of("talk", question) != split:
        return None
    if topic == "ask story":
        # A small model mixes up the characters unless both appear in the question or the first paragraph.
        named = {b.name, b.kind} & {*re.findall(r"\w+", question + text.split("\n")[0])}
        return (question, text) if named else None
    if topic in ("ask who", "ask place"):
        return question, describe(rng, world, a if topic == "ask who" else p, rng.randint(3, 5))
    return question, fill(rng, rng.choice(replies), **slots)


def character_exchanges(rng, split, world):
    """
    One or two exchanges about a character.

    The first question is open or yes-or-no; the second says "he" or "she" instead of the name.
    """
    while True:
        a, b = rng.choice(world.characters), rng.choice(world.characters)
        attribute, template = rng.choice(world.table("check")) if rng.random() < 0.5 else (rng.choice(ATTRIBUTES), None)
        _, reply = world.statement(attribute, a)
        if template and b.friend is not a:  # otherwise "Is {b.friend} {a}'s best friend?" would name a twice
            b = rng.choice((a, b))  # balances the answers yes and no
            question, yes = template.format(a=a, o=b), getattr(a, attribute) == getattr(b, attribute)
            reply = f"{reply.removesuffix('.')}, so {'yes' if yes else 'no'}."
        else:
            question = world.random_line(rng, f"ask {attribute}", a=a)
        if split_of("fact", question) == split:
            break
    exchanges = [(question, reply)]
    second_attribute, _, template = rng.choice(world.lines("follow")).partition(" | ")
    question = fill(rng, template, a=a)
    if second_attribute != attribute and split_of("fact", a, question) == split:
        exchanges.append((question, world.statement(second_attribute, a)[1]))
    return exchanges


def draw_exchanges(rng, split, world, topic_weights):
    """One or two exchanges on a random topic whose user messages belong to `split`."""
    while True:
        topic = rng.choices(list(topic_weights), topic_weights.values())[0]
        if topic == "fact":
            f = fact(rng, split, world)
            return [(f.question, f.answer)]
        if topic == "arithmetic":
            return [arithmetic_problem(rng, split, world)]
        if topic == "character":
            return character_exchanges(rng, split, world)
        if exchange := topic_exchange(rng, split, world, topic):
            return [exchange]


def conversation(rng, split, world, topics=TOPICS):
    """One to eight exchanges (user message, reply). Replies may contain calculator calls in GSM8K's format."""
    exchanges = draw_exchanges(rng, split, world, {"hello": 2, "hello name": 1}) if rng.random() < 0.25 else []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        exchanges += draw_exchanges(rng, split, world, topics)
        if len(exchanges[-1][1]) > 500:  # characters: a story, and two stories exceed a context of 512 tokens
            break
    if rng.random() < 0.2:
        exchanges += draw_exchanges(rng, split, world, {"thanks": 2, "bye": 1})
    return exchanges


def informal(rng, text):
    """`text` as people type it: sometimes in lower case, without the final punctuation, or after a greeting."""
    variant = rng.random()
    text = text.lower() if variant < 0.1 or 0.2 <= variant < 0.25 else text
    text = text.rstrip("?.!") if 0.1 <= variant < 0.25 else text
    if 0.25 <= variant < 0.35 and text.endswith("?"):
        text = rng.choice(("Hi! ", "Hello! ", "Hello, ", "Hey, ", "Please tell me: ", "I have a question. ")) + text
    return text
