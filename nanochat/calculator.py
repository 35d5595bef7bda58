"""
The calculator tool: arithmetic, parsed and never passed to eval, comparisons, and questions about a word's letters.

Arithmetic uses exact fractions, so 0.1+0.2 is 0.3 and 0.2*50 is 10, as in the training data. There are no powers, and
strings are at most doubled, so the limit on the length of expressions also limits time and memory.
"""

import ast
import re
from decimal import Context, Decimal
from fractions import Fraction
from operator import add, mul, neg, pos, sub, truediv

MAX_CHARS = 256  # maximum length of an expression and of a result
SIGNIFICANT_DIGITS = 15  # of a result that is not an integer

# Commas belong to a number only if they group all its digits by three: 1,234 but not 1,23 or 1234,567.
_TOKEN = re.compile(r"[ \t]+|((?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+|[-+*/()])")
_STRING = r"""("[^"\\\n]*"|'[^'\\\n]*')"""
_COUNT = re.compile(rf"\s*{_STRING}\s*\.\s*count\s*\(\s*{_STRING}\s*\)\s*")
_LETTERS = re.compile(r"(letters|backwards|length|letter (-?[0-9]+)|count ([^\n])): *([^\n]+)")
_PAIR = re.compile(r"(larger|smaller|remainder): ([0-9]+), ([0-9]+)")
_PAIRS = {"larger": max, "smaller": min, "remainder": lambda x, y: x % y if y else None}
_OPERATORS = {ast.Add: add, ast.Sub: sub, ast.Mult: mul, ast.Div: truediv, ast.UAdd: pos, ast.USub: neg}


def calculate(expr):
    """
    The result of `expr` as text, or None if `expr` is invalid, divides by zero or asks for a letter that is not there.

    Valid are + - * / and parentheses over decimal numbers, and '…'.count('…'). Results that are not integers are
    rounded to 15 significant digits. Whole numbers can be compared and divided with a remainder:

        larger: 15, 94 -> 94        smaller: 15, 94 -> 15       remainder: 94, 15 -> 4

    A model does not see the letters of a token, but it can copy the word into a request. Case and characters other than
    letters are ignored:

        letters: word -> w o r d    backwards: word -> d r o w  length: word -> 4
        letter 1: word -> w         letter -1: word -> d        count o: word -> 1
    """
    if len(expr) > MAX_CHARS:
        return None
    if match := _LETTERS.fullmatch(expr):
        return _about_letters(*match.groups())
    if match := _PAIR.fullmatch(expr):
        result = _PAIRS[match[1]](int(match[2]), int(match[3]))
        return None if result is None else str(result)
    if match := _COUNT.fullmatch(expr):
        text, part = (quoted[1:-1] for quoted in match.groups())
        return str(text.count(part))
    if _TOKEN.sub("", expr):  # text outside tokens
        return None
    tokens = [token for token in _TOKEN.findall(expr) if token]  # white space gives ""
    # Python's parser sees a number as its index in `tokens`, because its own numbers look different: no 007, no 1,234.
    # The spaces keep it from finding operators of two characters.
    source = " ".join(token if token in "+-*/()" else str(i) for i, token in enumerate(tokens))
    try:
        result = _format(_evaluate(ast.parse(source, mode="eval").body, tokens))
    except (SyntaxError, ZeroDivisionError):
        return None
    return result if len(result) <= MAX_CHARS else None


def _about_letters(request, position, counted, text):
    """The result of a request about the letters of `text`, see calculate(); None if there is none."""
    letters = [c for c in text.lower() if c.isalpha()]
    if position:
        i = int(position)
        return letters[i - (i > 0)] if 0 < abs(i) <= len(letters) else None
    if counted or request == "length":
        return str(letters.count(counted.lower()) if counted else len(letters))
    result = " ".join(letters if request == "letters" else reversed(letters))
    return result if 0 < len(result) <= MAX_CHARS else None


def _evaluate(node, tokens):
    """The value of a syntax tree as a Fraction."""
    match node:
        case ast.Constant(index):
            return Fraction(tokens[index].replace(",", "").rstrip("."))
        case ast.UnaryOp(operator, operand):
            return _OPERATORS[type(operator)](_evaluate(operand, tokens))
        case ast.BinOp(left, operator, right):
            return _OPERATORS[type(operator)](_evaluate(left, tokens), _evaluate(right, tokens))
    raise SyntaxError("neither a number nor an operation: a call like 2(3), or ()")


def _format(value):
    if value.denominator == 1:
        return str(value.numerator)
    rounded = Context(prec=SIGNIFICANT_DIGITS).divide(Decimal(value.numerator), Decimal(value.denominator))
    return format(rounded.normalize(), "f")
