"""
Tasks about the pocket world: arithmetic, multiple-choice questions on its facts, identity, stories, conversations.

The same split, seed and index always give the same conversation. No problem is in two splits, whatever the seeds.
"""

import re

from nanochat.pocket.problems import arithmetic_problem, fact
from nanochat.pocket.talk import IDENTITY_TOPICS, TOPICS, conversation, draw_exchanges, informal
from nanochat.pocket.world import load_world
from tasks.common import GeneratedTask, user_and_assistant
from tasks.gsm8k import FinalNumberTask, split_calls


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
        ((question, reply),) = draw_exchanges(rng, self.split, load_world(), {"name": 2, "what": 1, "hello name": 1})
        return user_and_assistant(informal(rng, question), reply)

    def evaluate(self, conversation, assistant_response):
        return "nanochat" in assistant_response.lower()


class PocketStories(GeneratedTask):
    """
    Requests for a story about given characters.

    A story is correct if it has exactly two main characters, among them all requested ones, and gets every
    character's kind of animal right.
    """

    def make(self, rng):
        question = ""
        while not _mentioned_characters(question):
            ((question, reply),) = draw_exchanges(rng, self.split, load_world(), {"ask story": 1})
        return user_and_assistant(question, reply)

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
    """Conversations of one to eight exchanges: greetings, facts, stories, arithmetic, questions about the model."""

    topics = TOPICS

    def make(self, rng):
        messages = []
        for question, reply in conversation(rng, self.split, load_world(), self.topics):
            reply = split_calls(reply) if "<<" in reply else reply
            messages += user_and_assistant(informal(rng, question), reply)["messages"]
        return {"messages": messages}


class WorldChat(PocketChat):
    """PocketChat without anything about the model itself, for a model with another persona."""

    topics = {topic: weight for topic, weight in TOPICS.items() if topic not in IDENTITY_TOPICS}

    def make(self, rng):
        while "nanochat" in str(chat := super().make(rng)).lower():  # in some greetings
            pass
        return chat
