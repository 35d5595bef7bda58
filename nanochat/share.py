"""
A model as one HTML file that runs it: weights in int8, tokenizer, calculator, and a page to chat and to look inside.

    python -m nanochat.share -i rl nanochat.html

The file opens in any browser, offline; it makes no request. The weights are those of --quantize=int8.
"""

import base64
import gzip
import re
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

from nanochat.cli import add_model_flags, make_parser, parse_args, path, run_script
from nanochat.cluster import compute_init
from nanochat.common import atomic_path, load_extension, require
from nanochat.pages import html_page
from nanochat.tokenizer import SPLIT_PATTERN

MAX_PARAMETERS = 50_000_000  # a page of about 60 MB


def character_class(category):
    """
    The characters of a Unicode category, such as r"\\p{L}", as a class of JavaScript's regular expressions.

    A browser may know another version of Unicode than the extension, whose tables these are.
    """
    every = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
    splitter = load_extension().Tokenizer.from_tokens([bytes([b]) for b in range(256)], category)  # drops all else
    codes = [ord(character) for character in bytes(splitter.encode(every)).decode()]
    # Successive codes have the same difference to their index.
    runs = ([code for _, code in run] for _, run in groupby(enumerate(codes), key=lambda pair: pair[1] - pair[0]))
    return "[" + "".join(f"\\u{{{run[0]:x}}}-\\u{{{run[-1]:x}}}" for run in runs) + "]"


def javascript_pattern(pattern):
    """
    The split pattern for JavaScript with the flag v. UserError unless it is this project's, up to the groups of digits.

    JavaScript has no possessive quantifiers; in this pattern they only save time. Its \\s is another set.
    """
    known = re.sub(r"\{1,\d\}", "{1,2}", pattern) == SPLIT_PATTERN
    require(known, f"the tokenizer splits texts by {pattern[:60]!r}; a page can hold only models of this project's")
    contractions = r"'(?:[sSdDmMtT\u017f]|[lL][lL]|[vV][eE]|[rR][eE])"  # U+017F is an s without regard to case
    pattern = pattern.replace("'(?i:[sdmt]|ll|ve|re)", contractions).replace("?+", "?").replace("++", "+")
    pattern = pattern.replace(r"\s", r"\p{White_Space}").replace(r"\S", r"\P{White_Space}")
    classes = {category: character_class(category) for category in (r"\p{L}", r"\p{N}")}
    return re.sub(r"\\p\{[LN]\}", lambda match: classes[match[0]], pattern)


def tokenizer_data(tokenizer):
    """What tokenizer.js needs: the bytes of the tokens by id (None for special tokens), special tokens, pattern."""
    ordinary = {i: token.decode("latin-1") for token, i in tokenizer.ranks.items()}
    tokens, special = [ordinary.get(i) for i in range(tokenizer.get_vocab_size())], tokenizer.special_tokens
    return {"tokens": tokens, "special": special, "pattern": javascript_pattern(tokenizer.pattern)}


def pack(model):
    """The int8 matrices of a quantized model, for model.js: the scales of all, then the weights, as base64 of gzip."""
    weights, scales = zip(*(m.int8 for m in model.modules() if hasattr(m, "int8")), strict=True)
    size, inner = model.config.vocab_size, range(1, len(weights) - 1)  # embedding and head have padding rows
    parts = [t if i in inner else t[:size] for tensors in (scales, weights) for i, t in enumerate(tensors)]
    return base64.b64encode(gzip.compress(b"".join(t.numpy().tobytes() for t in parts), mtime=0)).decode()


def page(model, tokenizer, name):
    """The HTML of a page that holds a quantized model."""
    data = {"name": name, "parameters": model.num_params(), "config": asdict(model.config), "weights": pack(model)}
    return html_page("share.html", data | {"tokenizer": tokenizer_data(tokenizer)})


def main(argv=None):
    parser = make_parser("nanochat.share", __doc__)
    add_model_flags(parser)
    parser.add_argument("file", type=path, help="the page to write, such as nanochat.html; must not exist")
    args = parse_args(parser, argv)
    from nanochat.checkpoint_manager import load_model

    file = Path(args.file)
    require(not file.exists(), f"{file} already exists; choose a new file")
    require(not (args.dtype or args.quantize), "a page has int8 weights: leave --dtype and --quantize out")
    compute = compute_init("cpu", "float32")
    model, tokenizer, meta = load_model(args.source, compute, "eval", args.model_tag, args.step, quantize="int8")
    name, n = f"nanochat-{meta['model_tag']}-{args.source}", model.num_params()
    require(n <= MAX_PARAMETERS, f"{name} has {n:,} parameters, a page holds {MAX_PARAMETERS:,}: share a smaller model")
    with atomic_path(file) as draft:
        draft.write_text(page(model, tokenizer, name), encoding="utf-8")
    print(f"wrote {file} ({file.stat().st_size / 1e6:.1f} MB); open it in a browser")


if __name__ == "__main__":
    run_script(main)
