"""
Tasks in the pocket world, made from a seed as they are asked for: sums, choice questions on its facts, and talk.

The same index, split and seed always give the same conversation; whatever the seeds, no problem is in two splits.
"""

from random import Random

from nanochat import pocket
from tasks.common import ChoiceTask, Task, render_mc, user_and_assistant
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

    def make(self, rng):
        question, answer = pocket.sum_problem(rng, self.split, self.world)
        return user_and_assistant(question, split_calls(answer))


class PocketFacts(_Pocket):
    """
    Questions about the characters and places with four choices, answered with the right choice's own words.

    Not with a letter, as in PocketLetters: recalling a fact is learnt in minutes, looking up its letter is not.
    """

    def make(self, rng):
        fact = pocket.fact(rng, self.split, self.world)
        choices = "".join(f"- {choice}\n" for choice in fact.choices)
        question = f"Multiple Choice question: {fact.question}\n{choices}\nRespond only with the correct answer."
        return user_and_assistant(question, fact.value)

    def evaluate(self, conversation, assistant_response):
        return assistant_response.strip() == conversation["messages"][-1]["content"]


class PocketLetters(_Pocket, ChoiceTask):
    """The same questions in the form of ARC and MMLU: the answer is the letter of the right choice."""

    def make(self, rng):
        fact = pocket.fact(rng, self.split, self.world)
        letters = list(pocket.LETTERS)
        question = render_mc(fact.question, letters, fact.choices)
        return user_and_assistant(question, letters[fact.choices.index(fact.value)], letters=letters)


class PocketIdentity(_Pocket):
    """Who are you? in many phrasings; right when the reply has the name."""

    def make(self, rng):
        ((question, reply),) = pocket.talk(rng, self.split, self.world, {"name": 2, "what": 1, "hello name": 1})
        return user_and_assistant(pocket.casually(rng, question), reply)

    def evaluate(self, conversation, assistant_response):
        return "nanochat" in assistant_response.lower()


class PocketChat(_Pocket):
    """Conversations of one to five turns: greetings, talk about the model, open questions, stories, sums, thanks."""

    def make(self, rng):
        messages = []
        for question, reply in pocket.conversation(rng, self.split, self.world):
            reply = split_calls(reply) if "<<" in reply else reply
            messages += user_and_assistant(pocket.casually(rng, question), reply)["messages"]
        return {"messages": messages}
