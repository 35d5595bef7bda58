"""
Questions about the pocket world in people's words: facts, arithmetic, letters.

A wording is a template with all choices made and its slots empty. `split_of` assigns each wording to one split, and
each problem (the numbers of a calculation, a letter and a word) too. So training, validation and test share neither
problems nor wordings, whatever the seeds. No wording of people.txt is generated in any split.
"""

import ast
import functools
import itertools
import re
from collections import namedtuple
from pathlib import Path

from nanochat.pocket.world import Person, fill, load_world, split_of

PEOPLE_FILE = Path(__file__).with_name("people.txt")
# Before a calculation; x % y is the remainder.
LEADS = {"+": "That makes", "-": "That leaves", "*": "That makes", "/": "That gives", "%": "That leaves"}
NUMBER_WORDS = "two three four five six seven eight nine ten eleven twelve".split()


def wording(text):
    """The words of a text or template, without names, numbers, case and punctuation, as a str."""
    words = re.findall(r"[a-z]+", re.sub(r"\{\w+(?:\.(\w+))?\}", r"\1", text).lower())
    return " ".join(word for word in words if word not in _names())


@functools.cache
def _names():
    """All words of names, in lower case."""
    world = load_world()
    people = " ".join(world.lines("boys") + world.lines("girls")).split(" | ")
    for section in ("boys", "girls"):
        people += itertools.starmap(blend, itertools.product(world.entries_of(section, "train"), repeat=2))
    return {*" ".join(map(str, world.characters + world.places)).lower().split(), *map(str.lower, people)}


def blend(word, other):
    """The first half of `word` and the second half of `other`: a new word, which a model has to copy or spell."""
    return word[: (len(word) + 1) // 2] + other[(len(other) + 1) // 2 :]


@functools.cache
def people_wordings():
    """The wordings of all messages in people.txt, which no split may use."""
    return {wording(line[2:]) for line in PEOPLE_FILE.read_text(encoding="utf-8").splitlines() if line[:2] == "? "}


def wording_split(template):
    """The split of a wording. The shortest ones belong to "train": everybody uses them."""
    words = wording(template)
    return split_of("wording", words) if words.count(" ") > 2 else "train"


def ask(rng, split, world, template, **slots):
    """A question of `split` from a template, as people type it; None if the choices made belong to another split."""
    plain = world.expand(rng, template, split)
    if wording_split(plain) != split:
        return None
    typed = next((text for _ in range(9) if wording_split(text := informal(rng, plain)) == split), plain)
    question = " ".join(fill(rng, typed, **slots).split())
    # "my brother" may come first.
    question = careless(rng, re.sub(r"(?:^|(?<=[.?!] ))[a-z]", lambda m: m[0].upper(), question))
    return None if wording(question) in people_wordings() else question


def careless(rng, text):
    """`text`, sometimes in lower case or without punctuation."""
    style = rng.random()
    text = text.lower() if style < 0.2 else text
    text = text.rstrip("?.! ") if 0.1 < style < 0.3 else text
    return " ".join(re.sub("[.,?!':]", "", text).split()) if style < 0.04 else text


def informal(rng, text):
    """`text` in the words of a chat: with a remark before or after it, contractions, misspellings, typing errors."""
    world = load_world()
    for section, share in (("contractions", 0.4), ("misspellings", 0.07)):
        if rng.random() < share:
            for standard, *variants in world.table(section):
                if rng.random() < 0.6 and standard.lower() in text.lower():
                    text = re.sub(rf"\b{standard}\b(?![^{{]*\}})", rng.choice(variants), text, flags=re.I)
    if rng.random() < 0.07 and (pairs := list(re.finditer(r"(?<=[a-z])[a-z]{2}(?![^{]*\})", text))):
        pair = rng.choice(pairs)  # of letters: swapped, one missing, one doubled
        error = rng.choice((pair[0][::-1], pair[0][0], pair[0][0] + pair[0]))
        text = text[: pair.start()] + error + text[pair.end() :]
    if text[0] == "{" or text[-1] == "}":  # more words would belong to the slot
        return text
    if rng.random() < 0.15:  # words that do not matter
        words = " ".join(rng.sample(world.entries_of("word", "train"), rng.randint(2, 7)))
        text = rng.choice((f"{words}, {text}", f"{words}. {text}", f"My {words}: {text}", f"{text} {words}."))
    before, after = ("<before> " if rng.random() < 0.12 else ""), (" <after>" if rng.random() < 0.08 else "")
    return world.expand(rng, before) + text + world.expand(rng, after)


# A question about `subject`, a Character or Place. `answer`: a full sentence. `value`: the correct choice. `choices`:
# at most four values in random order, one of them correct.
Fact = namedtuple("Fact", "attribute subject question answer value choices")


def fact(rng, split, world):
    """A Fact whose wording belongs to `split`. Other splits ask for the same facts in other words."""
    question = None
    while not question:
        attribute = rng.choices(list(world.fact_weights), world.fact_weights.values())[0]
        subject = rng.choice(world.subjects(attribute))
        question = ask(rng, split, world, rng.choice(world.lines(f"ask {attribute}")), a=subject, p=subject)
    value, answer = world.statement(attribute, subject)
    residents = [c.name for c in getattr(subject, "residents", ())]
    value = rng.choice(residents) if attribute == "resident" else value
    wrong = [v for v in world.values[attribute] if v not in (value, subject.name, *residents)]
    choices = [value, *rng.sample(wrong, min(3, len(wrong)))]
    return Fact(attribute, subject, question, answer, value, rng.sample(choices, len(choices)))


def stranger(rng, world, split, he=None):
    """A Person with a first name that belongs to `split`. For training, some of the names are made up of two."""
    he = he or rng.choice(("he", "she"))
    name, other = (rng.choice(world.entries_of({"he": "boys", "she": "girls"}[he], split)) for _ in range(2))
    return Person(blend(name, other) if split == "train" and rng.random() < 0.3 else name, he)


def _owners(rng, world, split):
    """Slots a, b, c: three characters or other people. Only `a` may be described, as in "my brother"."""
    he, *names = rng.choice(world.table("others"))
    a, b, c = rng.sample([*rng.sample(world.characters, 3), *(stranger(rng, world, split) for _ in range(2))], 3)
    return dict(a=Person(rng.choice(names), he) if rng.random() < 0.2 else a, b=b, c=c)


def apply_operator(x, operator, y):
    """x + y, x - y, x * y, the quotient x / y, None unless an integer, or the remainder x % y, None unless x > y."""
    if operator == "/":
        return x // y if y and x % y == 0 else None
    return {"+": x + y, "-": x - y, "*": x * y, "%": x % y if x > y > 0 else None}[operator]


def sum_template(rng, world):
    """
    (question template, steps) of a random arithmetic problem. A step is "{x}+{y}", "@*2"; @ is the last result.

    @@ is the result before that. A remainder, "{x}%{y}", is always the only step.
    """
    forms = {"events": 14, "scene": 4, "problem": 14, "more problem": 34, "classic": 16}
    forms |= {"bare": 12, "more bare": 5, "order": 2, "more order": 3}
    form = rng.choices(list(forms), forms.values())[0]
    if form not in ("events", "scene"):
        question, steps = rng.choice(world.lines(form)).split(" => ")
        return f"<compute> {question}[?||.]" if form.endswith("bare") else question, steps.split("; ")
    scene = "scene " if form == "scene" else ""
    kinds = ("gain", "lose") if scene else ("gain", "lose", "lose", "scale", "share")
    sections = ["start", *rng.choices(kinds, k=rng.choice((1, 1, 1, 2, 2, 3)))]
    sections = sections[: sections.index("share") + 1] if "share" in sections else sections
    variables, sentences, steps, value = iter("xyzw?"), [], [], ""
    for section in sections:
        sentence, operation = rng.choice(world.lines(scene + section)).split(" => ")
        for slot in ("{n}", "{m}"):
            if slot in sentence + operation:
                variable = f"{{{next(variables)}}}"
                sentence, operation = sentence.replace(slot, variable), operation.replace(slot, variable)
        sentences.append(sentence)
        is_step = re.search(r"[-+*/]", operation)
        steps += [value + operation] if is_step else []
        value = "@" if is_step else operation
        if variable == "{?}":  # more numbers than variables
            return sum_template(rng, world)
    last = {"lose": " left", "share": " each"}.get(sections[-1], "")
    return " ".join([*sentences, "<scene question>" if scene else f"<how many{last}>"]), steps


def draw_numbers(rng, split, steps, hard, template):
    """
    ({variable: number}, expression, result) of a problem. The expression combines all steps.

    None if a step's result is no integer above 0, or if the calculation belongs to another split, by a hash of its
    numbers. Sums and products begin with the number that comes first in the template, since a model cannot learn an
    arbitrary order.
    """
    # Hard problems include small numbers: training on large numbers only would hurt accuracy on small ones.
    top = rng.choice((99, 999, 9999, 9999) if hard else (9, 20, 20, 99, 99, 99, 999, 999, 9999))
    factor, small = (min(top, 999), 99) if hard else (min(top, 99), 12)
    formula, values = " ".join(steps), {}  # a value is a tuple: an expression, its result, its place in the template
    for variable in "xyzw":
        slot = re.escape(f"{{{variable}}}")
        limit = small if re.search(rf"[*/%]{slot}", formula) else factor if re.search(rf"{slot}\*", formula) else top
        number = rng.randint(2, limit)
        values[f"{{{variable}}}"] = str(number), number, template.find(f"{{{variable}}}")
    numbers, key = {slot[1]: number for slot, (_, number, _) in values.items()}, []
    for step in steps:
        left, operator, right = re.fullmatch(r"(\S+?)([-+*/%])(\S+)", step).groups()
        operands = [values.get(text) or (text, int(text), len(template)) for text in (left, right)]
        if operator in "+*":
            operands.sort(key=lambda operand: operand[2])
        (left, x, place), (right, y, _) = operands
        result = apply_operator(x, operator, y)
        if result is None or not 1 <= result <= 99999:
            return None
        expression = f"remainder: {left}, {right}" if operator == "%" else f"({left}){operator}({right})"
        values |= {"@@": values.get("@"), "@": (expression, result, place)}
        key += [*([] if key else [x]), f"{operator}{y}"]
    # Without needless parentheses.
    expression = expression if operator == "%" else ast.unparse(ast.parse(expression)).replace(" ", "")
    return (numbers, expression, result) if split_of("sum", *key) == split else None


def arithmetic_problem(rng, split, world, hard=False):
    """
    (question, answer) of an arithmetic problem of one to three steps whose numbers and wording belong to `split`.

    The answer is in GSM8K's format: <<34+12=46>>46 is a calculator call, the last line is `#### 46`. One call has all
    steps, so a model need not copy results. Operands are at most 9999, but above 999 in few problems that
    are not `hard`.
    """
    question = None
    while not question:
        template, steps = sum_template(rng, world)
        template = world.expand(rng, template, split)
        tries = 500 if wording_split(template) == split else 0
        draws = (draw_numbers(rng, split, steps, hard, template) for _ in range(tries))
        numbers, expression, result = next(filter(None, draws), (None, None, None))
        if numbers:
            in_words = rng.random() < 0.2 and not re.search(r"[a-z]\{|\}[a-z]", template)  # not "80g" or "3x4"
            slots = {v: NUMBER_WORDS[n - 2] if in_words and n <= 12 else n for v, n in numbers.items()}
            slots |= _owners(rng, world, split)
            slots |= dict(p=rng.choice(world.places), i=rng.choice(world.entries_of("things", split)))
            question = ask(rng, split, world, template, **slots)
    lead = LEADS[re.match(r".*([-+*/%])", steps[-1])[1]]
    return question, f"{lead} <<{expression}={result}>>{result}.\n#### {result}"


def comparison(rng, split, world):
    """
    [(question, reply)]: who has more, or which number is larger. [] if the wording belongs to another split.

    The calculator decides: a small model copies numbers well, but does not learn to compare them.
    """
    template, verdict = rng.choice(world.lines("compare")).split(" => ")
    x, y = rng.sample(range(2, rng.choice((12, 100, 1000))), 2)
    slots = _owners(rng, world, split) | dict(x=x, y=y, i=rng.choice(world.entries_of("things", split)))
    question = ask(rng, split, world, template, **slots)
    size, winner = ("larger", max(x, y)) if verdict in ("more", "bigger") else ("smaller", min(x, y))
    owner = re.sub(r"\b(my|our)\b", "your", re.sub(r"^(I|we)$", "you", str(slots["a" if winner == x else "b"])))
    answer = f", so the answer is {owner}" if verdict in ("more", "less") else ""
    reply = f"The {size} number is <<{size}: {x}, {y}={winner}>>{winner}{answer}."
    return [(question, reply)] if question else []


def letter_problem(rng, split, words, absent=0.1, blended=0.0):
    """
    A random (word, letter) pair of `split`. With the probability 1 - `absent` the word contains the letter.

    `blended`: share of the words for training that are made up of two, so that a model learns to copy any word.
    """
    while True:
        word = rng.choice(words)
        word = blend(word, rng.choice(words)) if split == "train" and rng.random() < blended else word
        letter = rng.choice(word if rng.random() > absent else "abcdefghijklmnopqrstuvwxyz")
        if split_of("letter", word, letter) == split:
            return word, letter
