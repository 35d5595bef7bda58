"""
Train the tokenizer on the training shards.

    python -m scripts.tok_train                                            # 65,536 tokens from 10 billion characters
    python -m scripts.tok_train --max_chars=10000000 --vocab_size=4096     # a few seconds

Reads base_data/. Writes tokenizer/; another tokenizer there is renamed to tokenizer.old1, .old2, ...
"""

import bisect
import gc
import itertools
import statistics
import time

from nanochat.cli import make_parser, parse_args, path, run_script
from nanochat.common import format_duration, print0, require
from nanochat.tracking import progress_printer

# Round-trip check: contractions, numbers, white space, other scripts, a multi-code-point emoji, a special token's name.
SAMPLE = "It's 1234567,\r\n\tisn't it?   \u00a0안녕하세요 漢字 ½ é e\u0301 \U0001f468\u200d\U0001f469 <|bos|>\n\n "


def count(text):
    """argparse type: an integer, optionally in scientific notation (10e9)."""
    number = float(text)
    if not number.is_integer():
        raise ValueError
    return int(number)


def build_parser():
    parser = make_parser("scripts.tok_train", __doc__)
    parser.add_argument("--max_chars", type=count, default=10_000_000_000, help="maximum characters of training text")
    parser.add_argument("--doc_cap", type=count, default=10_000, help="maximum characters read from each document")
    parser.add_argument("--vocab_size", type=count, default=65_536, help="number of tokens, including special tokens")
    parser.add_argument("--data_dir", type=path, help="folder of the shards (default: base_data in NANOCHAT_BASE_DIR)")
    return parser


def read_texts(max_chars, doc_cap, totals, data_dir=None):
    """
    Yield the training documents as pyarrow string arrays until they have `max_chars` characters.

    At most `doc_cap` characters per document are counted. Adds to totals["documents"] and totals["characters"].
    """
    import pyarrow.compute as pc

    from nanochat.dataset import read_column, row_groups

    groups, show_progress = row_groups("train", data_dir), progress_printer("characters", every=2.0)
    for i, (shard, index, _) in enumerate(groups, 1):
        texts = read_column(shard, index).drop_null()
        lengths = (min(n, doc_cap) for n in pc.utf8_length(texts).to_pylist())
        ends = list(itertools.accumulate(lengths, initial=totals["characters"]))
        n = min(bisect.bisect_left(ends, max_chars), len(texts))  # the document that reaches max_chars is the last
        yield texts[:n]
        totals.update(documents=totals["documents"] + n, characters=ends[n])
        expected = min(max_chars, ends[n] * len(groups) // i)
        show_progress("reading and counting", ends[n], expected, f"{totals['documents']:,} documents")
        if ends[n] >= max_chars:
            return


def main(argv=None):
    args = parse_args(build_parser(), argv)
    require(1 <= args.max_chars <= 10**18, f"--max_chars={args.max_chars}: expected 1 to 1e18")
    require(1 <= args.doc_cap <= 10**18, f"--doc_cap={args.doc_cap}: expected 1 to 1e18")
    from nanochat.report import get_report
    from nanochat.tokenizer import Tokenizer, save_as_default

    # Train
    print0(f"training a tokenizer of {args.vocab_size:,} tokens on at most {args.max_chars:,} characters")
    start, totals, show_progress = time.time(), {"documents": 0, "characters": 0}, progress_printer("merges", every=2.0)

    def progress(phase, done, total):
        if phase == "merging":  # read_texts shows the progress of counting
            show_progress(phase, done, total)

    texts = read_texts(args.max_chars, args.doc_cap, totals, args.data_dir)
    tokenizer = Tokenizer.train_from_iterator(texts, args.vocab_size, progress, max_chars=args.doc_cap, arrow=True)
    require(totals["characters"], "no text in the training shards; make others with `python -m nanochat.dataset`")
    train_time = time.time() - start
    vocab_size, n_merges = tokenizer.get_vocab_size(), len(tokenizer.ranks) - 256
    show_progress("merging", n_merges, n_merges)
    print0(f"trained on {totals['characters']:,} characters in {format_duration(train_time)}")
    if vocab_size < args.vocab_size:
        print0(f"warning: no more pairs to merge; the vocabulary has {vocab_size:,} tokens, not {args.vocab_size:,}")

    # Save
    assert tokenizer.decode(tokenizer.encode(SAMPLE)) == SAMPLE
    save_as_default(tokenizer)

    # Report
    token_bytes = [n for n in tokenizer.count_bytes() if n]
    results = {"train_time": train_time, "wall_clock_seconds": time.time() - start, "vocab_size": vocab_size}
    results |= {"num_special_tokens": len(tokenizer.get_special_tokens()), **totals}
    results |= {"token_bytes_min": min(token_bytes), "token_bytes_max": max(token_bytes)}
    results |= {"token_bytes_mean": statistics.fmean(token_bytes), "token_bytes_std": statistics.stdev(token_bytes)}
    get_report().log("Tokenizer training", [vars(args), results], {"wall_clock_seconds": results["wall_clock_seconds"]})


if __name__ == "__main__":
    gc.disable()  # training creates no reference cycles, and collection takes a tenth of a short run
    run_script(main)
