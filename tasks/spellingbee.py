"""
Letters in words: counting (SpellingBee), spelling (SimpleSpelling), questions of all kinds (PocketLetters).

SpellingBee's answers spell the word, keep a running count and then call the calculator. The words come from the pocket
world or from a public list of 370 thousand English words.
"""

import functools
import re
from pathlib import Path

from nanochat.calculator import calculate
from nanochat.common import mirror_url, require
from nanochat.pocket.problems import ask, letter_problem
from nanochat.pocket.world import load_world, read_sections, split_of
from tasks.common import GeneratedTask, fetch_once, user_and_assistant
from tasks.gsm8k import FinalNumberTask, split_calls

ORDINALS = "first/1st second/2nd third/3rd fourth/4th fifth/5th sixth/6th seventh/7th eighth/8th".split()
WORDS_URL = "dwyl/english-words/refs/heads/master/words_alpha.txt"


@functools.cache
def _sections():
    return read_sections(Path(__file__).with_suffix(".txt").read_text(encoding="utf-8"))


def question_templates(section, corpus):
    """Question templates of a section ("count" or "spell") for the corpus "public" or "pocket"."""
    return [*_sections()[section][0], *_sections().get(f"{section} {corpus}", [[]])[0]]


def public_words():
    """The public word list, downloaded to the base directory once."""
    return read_words(fetch_once(f"{mirror_url('github')}/{WORDS_URL}", "words_alpha.txt", read_words))


def read_words(path):
    """The words of a list. Raises UserError if it is no list of words."""
    words = path.read_text(encoding="utf-8", errors="replace").split()
    valid = len(words) > 1000 and all(word.isascii() and word.isalpha() for word in words)
    require(valid, f"{path} is not a list of English words ({' '.join(words)[:80]}); delete it if it is there")
    return words


class WordTask(GeneratedTask):
    """
    Problems about the words of a corpus, "pocket" or "public".

    Subclasses set `section`, the section of their question templates in spellingbee.txt.
    """

    def __init__(self, size=1000, split="train", corpus="public", seed=0, **kwargs):
        super().__init__(split, size, seed, corpus, **kwargs)
        self.words = public_words() if corpus == "public" else load_world().words
        self.templates = question_templates(self.section, corpus)


class SpellingBee(WordTask, FinalNumberTask):
    """Counting a letter in a word. The letter occurs in at least 90 % of the words."""

    section = "count"

    def make(self, rng):
        word, letter = letter_problem(rng, self.split, self.words)
        template = rng.choice(self.templates)
        template = template.lower() if rng.random() < 0.3 else template
        letter_quote, word_quote = (rng.choice(("", "'", '"')) for _ in range(2))
        slots = {"l": f"{letter_quote}{letter}{letter_quote}", "w": f"{word_quote}{word}{word_quote}"}
        question = template.format(**slots) + ("?" if rng.random() < 0.5 else "")
        return user_and_assistant(question, count_letter(word, letter, **slots))


def count_letter(word, letter, w, l):  # noqa: E741
    """The parts of an answer that counts `letter` in `word`; `w` and `l` are both as the question writes them."""
    lines, count = [f"Let us spell the word {w} and count {l}.", f"{word}:{','.join(word)}"], word.count(letter)
    lines += [f"{i}:{c}" + (f" ({word[:i].count(c)})" if c == letter else "") for i, c in enumerate(word, 1)]
    call = f"<<'{word}'.count('{letter}')={count}>>"
    lines += [f"That makes {count}. To be sure: {call} The calculator says {count}.", f"#### {count}"]
    return split_calls("\n".join(lines))


class PocketLetters(GeneratedTask):
    """Questions about a word in people's words: its spelling, length, and letters; and requests to repeat words."""

    def make(self, rng):
        world, question = load_world(), None
        while not question:
            answer, *templates = rng.choice(_sections()["letters"])
            templates += question_templates("count", "pocket") if "####" in answer else []
            word, letter = letter_problem(rng, self.split, world.words, 0.5 if "{yes}" in answer else 0.1, blended=0.4)
            quote, k = rng.choice(("", "", "'", '"')), rng.randint(1, min(len(ORDINALS), len(word)))
            if answer == "{w}":  # words to repeat
                word = f"{quote} {quote}".join(rng.sample(world.words, rng.randint(2, 14)))
            slots = dict(w=f"{quote}{word}{quote}", k=rng.choice(ORDINALS[k - 1].split("/")))
            slots["l"] = rng.choice((letter, f"'{letter}'", f'"{letter}"', letter.upper()))
            question = ask(rng, self.split, world, rng.choice(templates), **slots)
        # The reply copies the word as the user typed it: a small model learns exact copies first.
        word = re.search(re.escape(slots["w"]) + "|" + word.replace("'", ""), question, re.I)[0]
        reply = answer.format(w=word, l=letter, k=k, count=(n := word.lower().count(letter)), yes="yes" if n else "no")
        reply = re.sub("<<(.*?)>>", lambda call: f"<<{call[1]}={calculate(call[1])}>>{calculate(call[1])}", reply)
        return user_and_assistant(question, split_calls(reply))

    def evaluate(self, conversation, assistant_response):
        texts = (part["text"] for part in conversation["messages"][-1]["content"] if part["type"] == "text")
        return assistant_response.splitlines()[-1:] == "".join(texts).splitlines()[-1:]


class SimpleSpelling(WordTask):
    """Spelling a word letter by letter."""

    section = "spell"

    def make(self, rng):
        while True:
            word = rng.choice(self.words)
            if split_of("spell", word) == self.split:
                return user_and_assistant(rng.choice(self.templates).format(w=word), f"{word}:{','.join(word)}")
