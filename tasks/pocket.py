"""
Tasks in the pocket world, made from a seed as they are asked for: sums, choice questions on its facts, and talk.

The same index, split and seed always give the same conversation; whatever the seeds, no problem is in two splits.
"""

import re
from random import Random

from nanochat.pocket import problems as pocket
from tasks.common import Task, user_and_assistant
from tasks.gsm8k import FinalNumberTask, split_calls


class _Pocket(Task):
    """`size` conversations of `split` ("train", "val" or "test"), another list for every `seed`."""

    def __init__(self, split, size, seed=0, **kwargs):
        super().__init__(**kwargs)
        assert split in ("train", "val", "test"), split
        self.split, self.size, self.seed = split, size, seed
        self.world = pocket.load_world()

    def num_examples(self):
        return self.size

    def get_example(self, index):
        return self.make(Random(f"{type(self).__name__} {self.split} {self.seed} {index}"))


class PocketSums(_Pocket, FinalNumberTask):
    """Sums of one and two steps in many wordings, worked out by calling the calculator."""

    hard = False

    def make(self, rng):
        question, answer = pocket.sum_problem(rng, self.split, self.world, self.hard)
        return user_and_assistant(question, split_calls(answer))


class PocketHardSums(PocketSums):
    """The same with many numbers larger than a model of the world has seen: something left to practise."""

    hard = True


class PocketFacts(_Pocket):
    """
    Questions about the characters and places with four choices, answered with the right choice's own words.

    Not with a letter as in MMLU: to recall a fact is learnt in minutes, to look up its letter is not.
    """

    def make(self, rng):
        fact = pocket.fact(rng, self.split, self.world)
        choices = "".join(f"- {choice}\n" for choice in fact.choices)
        question = f"Multiple Choice question: {fact.question}\n{choices}\nRespond only with the correct answer."
        return user_and_assistant(question, fact.value)

    def evaluate(self, conversation, assistant_response):
        return assistant_response.strip() == conversation["messages"][-1]["content"]


class PocketIdentity(_Pocket):
    """Who are you? in many phrasings; right when the reply has the name."""

    def make(self, rng):
        ((question, reply),) = pocket.talk(rng, self.split, self.world, {"name": 2, "what": 1, "hello name": 1})
        return user_and_assistant(pocket.casually(rng, question), reply)

    def evaluate(self, conversation, assistant_response):
        return "nanochat" in assistant_response.lower()


class PocketStories(_Pocket):
    """Stories, told on request; right when one keeps to its two heroes and has all that were asked for among them."""

    def make(self, rng):
        question = ""
        while not self.asked(question):
            ((question, reply),) = pocket.talk(rng, self.split, self.world, {"ask story": 1})
        return user_and_assistant(question, reply)

    def asked(self, question):
        """Names of the characters that `question` is about."""
        words = set(re.findall(r"\w+", question))
        return {c.name for c in self.world.characters if words & {c.name, c.kind}}

    def evaluate(self, conversation, assistant_response):
        asked = self.asked(conversation["messages"][0]["content"])
        told = re.findall(r"\w+", assistant_response)
        heroes = {c.name for c in self.world.characters if told.count(c.name) > 1}  # a best friend may be named once
        kinds = {c.name: c.kind for c in self.world.characters}
        called = re.findall(r"(\w+) the (\w+)", assistant_response)
        return asked <= heroes and len(heroes) == 2 and all(kinds.get(name, kind) == kind for name, kind in called)


class PocketChat(_Pocket):
    """Conversations of one to five turns: greetings, talk about the model, open questions, stories, sums, thanks."""

    def make(self, rng):
        messages = []
        for question, reply in pocket.conversation(rng, self.split, self.world):
            reply = split_calls(reply) if "<<" in reply else reply
            messages += user_and_assistant(pocket.casually(rng, question), reply)["messages"]
        return {"messages": messages}
