"""
The calculator tool: evaluates arithmetic and str.count with a parser of its own, never with Python's eval.

Arithmetic uses exact fractions, so 0.1+0.2 is 0.3 and 0.2*50 is 10, as in the training data. There are no powers and
no operations that build strings, so a result is never longer than its expression, and the limit on the length of
expressions also limits time and memory.
"""

import re
from decimal import Context, Decimal
from fractions import Fraction
from operator import add, mul, sub, truediv

MAX_CHARS = 256  # maximum length of an expression and of a result
MAX_DEPTH = 32  # maximum depth of nested parentheses
SIGNIFICANT_DIGITS = 15  # of a result that is not an integer

# Commas belong to a number only if they group all its digits by three: 1,234 but not 1,23 or 1234,567.
_TOKEN = re.compile(r"[ \t]+|((?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+|[-+*/()])")
_STRING = r"""("[^"\\\n]*"|'[^'\\\n]*')"""
_COUNT = re.compile(rf"\s*{_STRING}\s*\.\s*count\s*\(\s*{_STRING}\s*\)\s*")
_OPERATORS = {"+": add, "-": sub, "*": mul, "/": truediv}


class _SyntaxError(ValueError):
    """The tokens do not form a valid expression."""


def calculate(expr):
    """
    The result of `expr` as text, or None if `expr` is invalid or divides by zero.

    Valid are + - * / and parentheses over decimal numbers, and '…'.count('…'). Results that are not integers are
    rounded to 15 significant digits.
    """
    if len(expr) > MAX_CHARS:
        return None
    if match := _COUNT.fullmatch(expr):
        text, part = (quoted[1:-1] for quoted in match.groups())
        return str(text.count(part))
    if _TOKEN.sub("", expr):  # text outside tokens
        return None
    tokens = [token for token in _TOKEN.findall(expr) if token]  # white space gives ""
    tokens.reverse()  # so that pop() takes the next token
    try:
        result = _format(_sum(tokens, 0))
    except (_SyntaxError, ZeroDivisionError):
        return None
    return result if not tokens and len(result) <= MAX_CHARS else None


def _sum(tokens, depth):
    value = _product(tokens, depth)
    while tokens and tokens[-1] in "+-":
        value = _OPERATORS[tokens.pop()](value, _product(tokens, depth))
    return value


def _product(tokens, depth):
    value = _factor(tokens, depth)
    while tokens and tokens[-1] in "*/":
        value = _OPERATORS[tokens.pop()](value, _factor(tokens, depth))
    return value


def _factor(tokens, depth):
    """Parse a number or a parenthesized sum, after any number of signs."""
    sign = 1
    while tokens and tokens[-1] in "+-":
        sign = -sign if tokens.pop() == "-" else sign
    token = tokens.pop() if tokens else ""
    if token == "(" and depth < MAX_DEPTH:
        value = _sum(tokens, depth + 1)
        if not tokens or tokens.pop() != ")":
            raise _SyntaxError("unclosed parenthesis")
        return sign * value
    if not token or token in "()*/":
        raise _SyntaxError(token)
    return sign * Fraction(token.replace(",", "").rstrip("."))


def _format(value):
    if value.denominator == 1:
        return str(value.numerator)
    rounded = Context(prec=SIGNIFICANT_DIGITS).divide(Decimal(value.numerator), Decimal(value.denominator))
    return format(rounded.normalize(), "f")
