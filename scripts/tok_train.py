"""
Train the tokenizer on the training shards.

    python -m scripts.tok_train                                            # 65,536 tokens from 10 billion characters
    python -m scripts.tok_train --max_chars=10000000 --vocab_size=4096     # in seconds

Reads base_data/. Writes tokenizer/, which stays as it was until the new one is whole.
"""

import bisect
import gc
import itertools
import math
import statistics
import time

from nanochat.cli import make_parser, parse_args, run_script
from nanochat.common import UserError, base_dir, format_duration, print0

# Contractions, numbers, white space, other scripts, a character of several code points, a name that must stay text.
SAMPLE = (
    "Hello, world! It's 1234567 o'clock,\r\n\tisn't it?   \u00a0안녕하세요 漢字 ½ é e\u0301 "
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 <|bos|>\n\n "
)


def count(text):
    """argparse type: a whole number, also written as 10e9."""
    number = float(text)
    if not number.is_integer():
        raise ValueError
    return int(number)


def build_parser():
    parser = make_parser("scripts.tok_train", __doc__)
    parser.add_argument("--max_chars", type=count, default=10_000_000_000, help="stop reading after so many characters")
    parser.add_argument("--doc_cap", type=count, default=10_000, help="characters read of each document at most")
    parser.add_argument("--vocab_size", type=count, default=65_536, help="tokens, the special ones included")
    return parser


class Progress:
    """Prints a line now and then: what is done, and how long the rest will take."""

    def __init__(self, name, bound="", every=2.0):
        self.name, self.bound, self.every = name, bound, every
        self.start = self.last = None

    def __call__(self, share, text):
        now = time.time()
        if self.start is None:
            self.start = self.last = now
        if now - self.last >= self.every:
            left = format_duration((now - self.start) * (1 - share) / share)
            print0(f"{self.name}: {share:4.0%} | {text} | {self.bound}{left} left")
            self.last = now


def read_texts(max_chars, doc_cap, totals):
    """
    Yield the training documents as pyarrow string arrays, until there are `max_chars` characters, of which each
    document gives `doc_cap` at most; counts what it read in `totals`.
    """
    import pyarrow.compute as pc

    from nanochat.dataset import read_column, row_groups

    groups = row_groups("train")
    progress = Progress("reading and counting")
    progress(0, "")
    for i, (path, index, _) in enumerate(groups):
        texts = read_column(path, index).drop_null()
        lengths = (min(n, doc_cap) for n in pc.utf8_length(texts).to_pylist())
        ends = list(itertools.accumulate(lengths, initial=totals["characters"]))
        wanted = min(bisect.bisect_left(ends, max_chars), len(texts))  # the document that reaches max_chars is the last
        yield texts[:wanted]
        totals["documents"] += wanted
        totals["characters"] = ends[wanted]
        if ends[wanted] >= max_chars:
            return
        share = max((i + 1) / len(groups), totals["characters"] / max_chars)
        progress(share, f"{totals['documents']:,} documents, {totals['characters']:,} characters")


def main(argv=None):
    args = parse_args(build_parser(), argv)
    for flag in ("max_chars", "doc_cap"):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag}={getattr(args, flag)}: give 1 or more")
    from nanochat.report import get_report
    from nanochat.tokenizer import Tokenizer

    # Train
    print0(f"training a tokenizer of {args.vocab_size:,} tokens on at most {args.max_chars:,} characters")
    start = time.time()
    totals = {"documents": 0, "characters": 0}
    merging = Progress("merging", bound="at most ")  # the later merges are the quicker ones

    def tell(phase, done, total):
        if phase == "merging":
            merging(done / max(total, 1), f"{done:,} of {total:,} merges")

    texts = read_texts(args.max_chars, args.doc_cap, totals)
    tokenizer = Tokenizer.train_from_arrow(texts, args.vocab_size, tell, max_chars=args.doc_cap)
    train_time = time.time() - start
    vocab_size = tokenizer.get_vocab_size()
    print0(f"trained on {totals['characters']:,} characters in {format_duration(train_time)}")
    if vocab_size < args.vocab_size:
        print0(
            f"warning: the text has no more pairs to merge; the vocabulary is {vocab_size:,}, not {args.vocab_size:,}"
        )

    # Save and check
    directory = base_dir() / "tokenizer"
    assert tokenizer.decode(tokenizer.encode(SAMPLE)) == SAMPLE
    tokenizer.save(directory)
    print0(f"saved {vocab_size:,} tokens to {directory}")

    # Report
    token_bytes = [n for n in tokenizer.count_bytes() if n]
    mean = statistics.fmean(token_bytes)
    results = {
        "train_time": train_time,
        "wall_clock_seconds": time.time() - start,
        "vocab_size": vocab_size,
        "num_special_tokens": len(tokenizer.get_special_tokens()),
        **totals,
        "token_bytes_min": min(token_bytes),
        "token_bytes_max": max(token_bytes),
        "token_bytes_mean": mean,
        "token_bytes_std": math.sqrt(sum((n - mean) ** 2 for n in token_bytes) / (len(token_bytes) - 1)),
    }
    get_report().log(section="Tokenizer training", data=[vars(args), results])


if __name__ == "__main__":
    gc.disable()  # nothing here makes garbage in cycles, and looking for it takes a tenth of a short run
    run_script(main)
