"""
The calculator tool: evaluates arithmetic, from its syntax tree and never with eval, and str.count.

Arithmetic uses exact fractions, so 0.1+0.2 is 0.3 and 0.2*50 is 10, as in the training data. There are no powers and
no operations that build strings, so a result is never longer than its expression, and the limit on the length of
expressions also limits time and memory.
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
_OPERATORS = {ast.Add: add, ast.Sub: sub, ast.Mult: mul, ast.Div: truediv, ast.UAdd: pos, ast.USub: neg}


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
    # Python's parser sees a number as its index in `tokens`, because its own numbers look different: no 007, no 1,234.
    # The spaces keep it from finding operators of two characters.
    source = " ".join(token if token in "+-*/()" else str(i) for i, token in enumerate(tokens))
    try:
        result = _format(_evaluate(ast.parse(source, mode="eval").body, tokens))
    except (SyntaxError, ZeroDivisionError):
        return None
    return result if len(result) <= MAX_CHARS else None


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
