"""
The calculator tool: arithmetic and str.count, parsed by this file and never evaluated by Python.

Arithmetic is exact (fractions), so 0.1+0.2 is 0.3 and 0.2*50 is 10, as in the training data. There are no powers and no
string building, so a result is never longer than its expression and bounding the input bounds time and memory.
"""

import re
from decimal import Context, Decimal
from fractions import Fraction

MAX_CHARS = 256  # of an expression, and of a result
MAX_DEPTH = 32  # of nested parentheses
SIGNIFICANT_DIGITS = 15  # of a result that is not an integer

# Thousands commas belong to a number only where they group all of its digits by three: 1,234 but not 1,23 or 1234,567.
_TOKEN = re.compile(r"[ \t]*((?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+|[-+*/()])[ \t]*")
_STRING = r"""("[^"\\\n]*"|'[^'\\\n]*')"""
_COUNT = re.compile(rf"\s*{_STRING}\s*\.\s*count\s*\(\s*{_STRING}\s*\)\s*")


class _Refused(ValueError):
    """The text is not an expression of the calculator."""


def calculate(expr):
    """
    The result of `expr` as text, or None for anything but + - * / and parentheses over numbers, or '…'.count('…').

    Integral results print as integers, others rounded to 15 significant digits.
    """
    if len(expr) > MAX_CHARS:
        return None
    if match := _COUNT.fullmatch(expr):
        text, part = (quoted[1:-1] for quoted in match.groups())
        return str(text.count(part))
    try:
        tokens = _tokenize(expr)
        value = _sum(tokens, 0)
    except (_Refused, ZeroDivisionError):
        return None
    result = _format(value)
    return result if not tokens and len(result) <= MAX_CHARS else None


def _tokenize(expr):
    """Numbers and operators of `expr`, last one first, so that the parser can pop them."""
    tokens, at = [], 0
    while at < len(expr):
        match = _TOKEN.match(expr, at)
        if not match:
            raise _Refused(expr)
        tokens.append(match[1])
        at = match.end()
    return tokens[::-1]


def _sum(tokens, depth):
    value = _product(tokens, depth)
    while tokens and tokens[-1] in "+-":
        if tokens.pop() == "+":
            value += _product(tokens, depth)
        else:
            value -= _product(tokens, depth)
    return value


def _product(tokens, depth):
    value = _factor(tokens, depth)
    while tokens and tokens[-1] in "*/":
        if tokens.pop() == "*":
            value *= _factor(tokens, depth)
        else:
            value /= _factor(tokens, depth)
    return value


def _factor(tokens, depth):
    """A number or a parenthesis, with any number of signs before it."""
    sign = 1
    while tokens and tokens[-1] in "+-":
        sign = -sign if tokens.pop() == "-" else sign
    token = tokens.pop() if tokens else ""
    if token == "(" and depth < MAX_DEPTH:
        value = _sum(tokens, depth + 1)
        if not tokens or tokens.pop() != ")":
            raise _Refused("unclosed parenthesis")
        return sign * value
    if not token or token in "()*/":
        raise _Refused(token)
    return sign * Fraction(token.replace(",", "").rstrip("."))


def _format(value):
    if value.denominator == 1:
        return str(value.numerator)
    rounded = Context(prec=SIGNIFICANT_DIGITS).divide(Decimal(value.numerator), Decimal(value.denominator))
    return format(rounded.normalize(), "f")
