"""
Letters in words: counting them (SpellingBee) by spelling the word out and then asking the calculator, and plain
spelling (SimpleSpelling), which is all that a model can copy from.

Words come from the pocket world, or from a public list of 370 thousand English words that is downloaded once.
"""

from random import Random

from nanochat.common import base_dir, fetch, mirror_url
from nanochat.pocket import problems as pocket
from tasks.common import Task, user_and_assistant
from tasks.gsm8k import FinalNumberTask

WORDS_URL = "dwyl/english-words/refs/heads/master/words_alpha.txt"

ENGLISH = """
How many {l} are in {w}
How many {l} are there in {w}
How many times does {l} appear in {w}
How often does {l} appear in {w}
How often is {l} in {w}
How many times is the letter {l} in the word {w}
How many {l}'s are in {w}
How many {l}'s does {w} have
How many {l}'s can you find in {w}
How many of the letters in {w} are {l}
Count the {l} in {w}
Count the letter {l} in the word {w}
Please count the {l}'s in {w}
Can you count the {l} in {w}
Can you tell me how many {l} are in {w}
Do you know how many times {l} is in {w}
Tell me how many {l} there are in {w}
What is the number of {l} in {w}
In the word {w}, how many {l} are there
In {w}, how often do you see {l}
If I spell {w}, how many {l} do I need
I want to know how many {l} are in {w}
""".strip().splitlines()
OTHERS = """
¿Cuántas {l} hay en {w}
¿Cuántas veces aparece {l} en {w}
¿Cuántas letras {l} tiene la palabra {w}
Cuenta las {l} de {w}
Dime cuántas {l} contiene {w}
{w}里有几个{l}
{w}中有多少个{l}
{l}在{w}里出现几次
数一数{w}里的{l}
单词{w}含有几个字母{l}
{w}에 {l}이 몇 개 있나요
{w}에서 {l}은 몇 번 나오나요
단어 {w}에 글자 {l}이 몇 개 들어 있어요
{w} 속의 {l} 개수를 세어 주세요
{w}에는 {l}이 몇 번 쓰이나요
Combien de {l} y a-t-il dans {w}
Combien de fois voit-on {l} dans {w}
Combien de lettres {l} le mot {w} contient-il
Compte les {l} dans {w}
Dis-moi combien de {l} il y a dans {w}
Wie viele {l} sind in {w}
Wie oft kommt {l} in {w} vor
Wie viele {l} hat das Wort {w}
Zähle die {l} in {w}
Sag mir, wie viele {l} in {w} stecken
{w}に{l}はいくつありますか
{w}の中に{l}は何回出てきますか
単語{w}には{l}がいくつ入っていますか
{w}に含まれる{l}の数を教えて
""".strip().splitlines()
SPELL = ("Spell the word: {w}", "Spell the word: {w}", "How do you spell {w}?", "Please spell {w}.", "Spell {w}")


def public_words():
    """The public word list, from the base directory or downloaded to it."""
    path = base_dir() / "words_alpha.txt"
    if not path.exists():
        fetch(f"{mirror_url('github')}/{WORDS_URL}", path, attempts=3)
    return path.read_text(encoding="utf-8").split()


class _Words(Task):
    """`size` problems; `corpus` is "pocket" or "public". Words and letters of the splits never overlap."""

    def __init__(self, size=1000, split="train", corpus="public", seed=0, **kwargs):
        super().__init__(**kwargs)
        assert split in ("train", "val", "test") and corpus in ("pocket", "public"), (split, corpus)
        self.size, self.split, self.seed = size, split, seed
        self.words = public_words() if corpus == "public" else pocket.load_world().words
        self.templates = ENGLISH + OTHERS if corpus == "public" else ENGLISH

    def num_examples(self):
        return self.size

    def get_example(self, index):
        return self.make(Random(f"{type(self).__name__} {self.split} {self.seed} {index}"))


class SpellingBee(_Words, FinalNumberTask):
    """How many l are in w? Nine letters in ten are in the word."""

    def make(self, rng):
        word, letter = pocket.letter_problem(rng, self.split, self.words)
        template = rng.choice(self.templates)
        if rng.random() < 0.3:
            template = template.lower()
        letter_quote, word_quote = (rng.choice(("", "'", '"')) for _ in range(2))
        asked = {"l": f"{letter_quote}{letter}{letter_quote}", "w": f"{word_quote}{word}{word_quote}"}
        question = template.format(**asked)
        question += "?" if rng.random() < 0.5 else ""
        n, rows = 0, []
        for i, c in enumerate(word, 1):
            n += c == letter
            rows.append(f"{i}:{c}" + (f" ({n})" if c == letter else ""))
        steps = "\n".join(
            ["Let us spell the word {w} and count {l}.".format(**asked), f"{word}:{','.join(word)}", *rows]
        )
        parts = [
            {
                "type": "text",
                "text": f"{steps}\nThat makes {n}. To be sure: ",
            },
            {"type": "python", "text": f"'{word}'.count('{letter}')"},
            {"type": "python_output", "text": str(n)},
            {"type": "text", "text": f" The calculator says {n}.\n#### {n}"},
        ]
        return user_and_assistant(question, parts)


class SimpleSpelling(_Words):
    """Spell the word: w. In the pocket world also as people would ask."""

    def make(self, rng):
        while True:
            word = rng.choice(self.words)
            if pocket.split_of("spell", word) == self.split:
                ask = rng.choice(SPELL) if self.words is pocket.load_world().words else SPELL[0]
                return user_and_assistant(ask.format(w=word), f"{word}:{','.join(word)}")
