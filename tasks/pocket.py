"""
Tasks about the pocket world: arithmetic, multiple-choice questions on its facts, identity, stories, conversations.

The same split, seed and index always give the same conversation. No problem is in two splits, whatever the seeds.
"""

import re
from pathlib import Path

from nanochat.pocket.problems import PEOPLE_FILE, arithmetic_problem, fact
from nanochat.pocket.talk import TOPICS, conversation, draw_exchanges
from nanochat.pocket.world import load_world
from tasks.common import GeneratedTask, ListTask, user_and_assistant
from tasks.gsm8k import FinalNumberTask, split_calls

ROLES = {"?": "user", "!": "assistant"}  # mark of a line in people.txt -> role
KNOWS_NOTHING = re.compile(r"(?i)\b(do not|don't) (know|understand)|know nothing|only know|no idea|never learned")
# These decline too, but answer questions about the model's abilities.
CANNOT = re.compile(r"(?i)\b(cannot|can't|not able|unable|have no|do not (remember|have)|does not live|lies outside)")


class PocketSums(GeneratedTask, FinalNumberTask):
    """Arithmetic problems of one and two steps in many wordings, solved with calls of the calculator."""

    hard = False

    def make(self, rng):
        question, answer = arithmetic_problem(rng, self.split, load_world(), self.hard)
        return user_and_assistant(question, split_calls(answer))


class PocketHardSums(PocketSums):
    """PocketSums with larger numbers than midtraining and SFT use, so reinforcement learning has room to improve."""

    hard = True


class PocketFacts(GeneratedTask):
    """
    Questions about characters and places with four choices. The answer is the text of the correct choice.

    It is not a letter as in MMLU: a small model learns facts within minutes, but not to map choices to letters.
    """

    baseline = 0.25

    def make(self, rng):
        f = fact(rng, self.split, load_world())
        choices = "".join(f"- {choice}\n" for choice in f.choices)
        question = f"Multiple Choice question: {f.question}\n{choices}\nRespond only with the correct answer."
        return user_and_assistant(question, f.value)

    def evaluate(self, conversation, assistant_response):
        return assistant_response.strip() == conversation["messages"][-1]["content"]


class PocketIdentity(GeneratedTask):
    """ "Who are you?" in many wordings. A reply is correct if it contains the model's name."""

    def make(self, rng):
        topics = ["self name"] * 4 + ["self what", "self human", "self chatgpt"] + ["talk hello name"] * 2
        return user_and_assistant(*draw_exchanges(rng, self.split, load_world(), topics)[0])

    def evaluate(self, conversation, assistant_response):
        return "nanochat" in assistant_response.lower()


class PocketStories(GeneratedTask):
    """
    Requests for a story about given characters.

    A story is correct if it has exactly two main characters, among them all requested ones, and gets every
    character's kind of animal right.
    """

    def make(self, rng):
        while True:
            question, reply = draw_exchanges(rng, self.split, load_world(), ["story"])[0]
            problem = user_and_assistant(question, reply)
            if _mentioned_characters(question) and self.evaluate(problem, reply):  # no heroes from outside
                return problem

    def evaluate(self, conversation, assistant_response):
        requested = _mentioned_characters(conversation["messages"][0]["content"])
        kinds = {c.name: c.kind for c in load_world().characters}
        words = re.findall(r"\w+", assistant_response)
        main_characters = {name for name in kinds if words.count(name) > 1}  # a third character may be named once
        named_kinds = re.findall(r"(\w+) the (\w+)", assistant_response)
        kinds_agree = all(kinds.get(name, kind) == kind for name, kind in named_kinds)
        return requested <= main_characters and len(main_characters) == 2 and kinds_agree


def _mentioned_characters(text):
    """Names of the characters that `text` mentions by name or by kind."""
    words = set(re.findall(r"\w+", text))
    return {c.name for c in load_world().characters if words & {c.name, c.kind}}


class PocketChat(GeneratedTask):
    """Conversations of one to eight exchanges: facts, stories, arithmetic, small talk, questions about the model."""

    topics = TOPICS

    def make(self, rng):
        exchanges = conversation(rng, self.split, load_world(), self.topics)
        parts = (user_and_assistant(text, split_calls(reply) if "<<" in reply else reply) for text, reply in exchanges)
        messages = [message for part in parts for message in part["messages"]]
        if rng.random() < 0.5:  # clients of the API send the text of earlier replies, without their calls
            for message, (_, reply) in zip(messages[1:-2:2], exchanges, strict=False):
                message |= {"content": re.sub("<<.*?>>", "", reply), "weight": 0} if "<<" in reply else {}
        return {"messages": messages}


class WorldChat(PocketChat):
    """PocketChat without anything about the model itself, for a model with another persona."""

    topics = [topic for topic in TOPICS if topic != "self"]

    def make(self, rng):
        while "nanochat" in str(chat := super().make(rng)).lower():  # in some greetings
            pass
        return chat


class PocketPeople(ListTask):
    """
    Questions in people's own words, from people.txt, which describes its format. They are for evaluation only.

    Each conversation has a "kind", such as "facts", and a list of "verdicts", (mark, expected) pairs.
    """

    def __init__(self, path=PEOPLE_FILE, **_):
        super().__init__()
        self.items, kind = [], None
        for block in Path(path).read_text(encoding="utf-8").split("\n\n"):
            lines = [line for line in block.splitlines() if line.strip() and line[0] != "#"]
            if lines and lines[0].startswith("== "):
                kind = lines.pop(0)[3:]
            turns = [{"role": ROLES[line[0]], "content": line[2:]} for line in lines if line[0] in ROLES]
            verdicts = [(line[0], line[2:]) for line in lines if line[0] not in ROLES]
            if turns:
                turns.append({"role": "assistant", "content": " ".join(text for _, text in verdicts)})
                self.items.append({"messages": turns, "kind": kind, "verdicts": verdicts})

    def evaluate(self, conversation, assistant_response):
        verdicts = conversation["verdicts"]
        # Only the beginning: a character of a story may say that he does not know something.
        if ("*", "refuses") not in verdicts and KNOWS_NOTHING.search(assistant_response[:200]):
            return False
        return all(_verdict(*verdict, assistant_response) for verdict in verdicts)


def _verdict(mark, expected, response):
    """One verdict of people.txt on a response."""
    if mark == "=":
        numbers = re.findall(r"\d[\d,]*", response)
        return bool(numbers) and numbers[-1].replace(",", "") == expected
    if (mark, expected) == ("*", "story"):
        sentences = re.split(r"(?<=[.!?])\s", response.strip())
        return len(response.split()) > 60 and len(set(sentences)) == len(sentences)
    if (mark, expected) == ("*", "refuses"):  # a question that has to be declined
        return bool(KNOWS_NOTHING.search(response) or CANNOT.search(response))
    return bool(re.search(expected, response, re.I | re.S)) == (mark == "+")
