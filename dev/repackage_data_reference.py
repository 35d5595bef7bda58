"""
Make the public shards: FineWeb-Edu, shuffled once and cut into parquet files of about 100 MB.

    python -m dev.repackage_data_reference --out_dir=shards          # needs about 1 TB of disk and a day

Kept for reference: `python -m nanochat.dataset` downloads the finished shards. The last shard is the validation split.
"""

from pathlib import Path

from nanochat.cli import make_parser, parse_args, path, run_script
from nanochat.ingest.shards import cut_shards, write_shard


def main(argv=None):
    parser = make_parser("dev.repackage_data_reference", __doc__)
    parser.add_argument("--out_dir", type=path, default="shards", help="folder to write the shards to")
    parser.add_argument(
        "--dataset", default="HuggingFaceFW/fineweb-edu", help="data set on the Hugging Face hub with a column `text`"
    )
    parser.add_argument("--config", default="sample-100BT", help="configuration of the data set")
    args = parse_args(parser, argv)
    from datasets import load_dataset

    rows = load_dataset(args.dataset, args.config or None, split="train").shuffle(seed=42)
    for index, documents in enumerate(cut_shards(row["text"] for row in rows)):
        entry = write_shard(Path(args.out_dir) / f"shard_{index:05d}.parquet", documents)
        print(f"shard {index}: {len(documents):,} documents, {entry['bytes']:,} bytes", flush=True)


if __name__ == "__main__":
    run_script(main)
