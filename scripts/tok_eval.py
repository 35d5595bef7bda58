"""
Compare the tokenizer's compression with GPT-2's and GPT-4's tokenizers, if tiktoken has cached them.

    python -m scripts.tok_eval

Reads tokenizer/ and base_data/. Writes the report's section "Tokenizer evaluation".
"""

import contextlib
from pathlib import Path
from unittest import mock

from nanochat.cli import make_parser, parse_args, path, run_script
from nanochat.common import print0
from nanochat.report import get_report, table
from nanochat.tokenizer import Tokenizer, get_tokenizer

BASELINES = {"gpt2": "GPT-2", "cl100k_base": "GPT-4"}


def build_parser():
    parser = make_parser("scripts.tok_eval", __doc__)
    parser.add_argument("--data_dir", type=path, help="folder of the shards (default: base_data in NANOCHAT_BASE_DIR)")
    return parser


def load_cached(name):
    """tiktoken's tokenizer `name`, or None if it is not cached: the evaluation never waits for a download."""
    with contextlib.suppress(FileNotFoundError), mock.patch("tiktoken.load.read_file", side_effect=FileNotFoundError):
        return Tokenizer.from_pretrained(name)


def evaluation_texts(data_dir=None):
    """{name: text}: five short texts of different kinds, and the first row group of each split."""
    from nanochat.dataset import parquets_iter_batched

    files = sorted(Path(__file__).with_name("tok_eval_texts").glob("*.txt"))
    texts = {file.stem: file.read_text(encoding="utf-8").strip() for file in files}
    texts |= {split: "\n".join(next(parquets_iter_batched(split, data_dir=data_dir))) for split in ("train", "val")}
    return {name: text for name, text in texts.items() if text}


def compression_table(texts, tokenizer, baseline=None, label=""):
    """Markdown table of bytes per token; with a `baseline` tokenizer also its numbers and the share of tokens saved."""
    rows = []
    for name, text in texts.items():
        n_bytes, n = len(text.encode()), len(tokenizer.encode(text))
        row = {"Text": name, "Bytes": f"{n_bytes:,}", "Our tokens": f"{n:,}", "Our bytes/token": f"{n_bytes / n:.2f}"}
        if baseline:
            m = len(baseline.encode(text))
            row |= {f"{label} tokens": f"{m:,}", f"{label} bytes/token": f"{n_bytes / m:.2f}"}
            row["Tokens saved"] = f"{(m - n) / m:+.1%}"
        rows.append(row)
    return table(rows[0], [row.values() for row in rows])


def main(argv=None):
    args = parse_args(build_parser(), argv)
    tokenizer, texts = get_tokenizer(), evaluation_texts(args.data_dir)
    sections = [compression_table(texts, tokenizer)]
    for name, label in BASELINES.items():
        if baseline := load_cached(name):
            body = compression_table(texts, tokenizer, baseline, label)
        else:
            command = f"python -c \"import tiktoken; tiktoken.get_encoding('{name}')\""
            body = f"Left out: tiktoken has not cached {name}; with a network, `{command}` caches it."
        sections.append(f"### Comparison with {label} ({name})\n\n{body}")
    print0("\n\n".join(sections))
    get_report().log(section="Tokenizer evaluation", data=[f"Vocabulary: {tokenizer.get_vocab_size():,}", *sections])


if __name__ == "__main__":
    run_script(main)
