"""
How the public shards are made: FineWeb-Edu, shuffled once, cut into parquet files of about 100 MB.

    python -m dev.repackage_data_reference --out_dir=shards          # about 1 TB of disk and a day

For reference: `python -m nanochat.dataset` downloads the result, or from a folder like it that NANOCHAT_HUB_URL names.
The last shard that comes out is validation.
"""

from pathlib import Path

from nanochat.cli import make_parser, parse_args, run_script
from nanochat.dataset import cut_shards, write_shard


def main(argv=None):
    parser = make_parser("dev.repackage_data_reference", __doc__)
    parser.add_argument("--out_dir", default="shards", help="folder of the shards")
    parser.add_argument("--dataset", default="HuggingFaceFW/fineweb-edu", help="on the hub, with a column text")
    parser.add_argument("--config", default="sample-100BT", help="configuration of the dataset")
    args = parse_args(parser, argv)
    from datasets import load_dataset

    rows = load_dataset(args.dataset, args.config or None, split="train").shuffle(seed=42)
    for index, documents in enumerate(cut_shards(row["text"] for row in rows)):
        entry = write_shard(Path(args.out_dir) / f"shard_{index:05d}.parquet", documents)
        print(f"shard {index}: {len(documents):,} documents, {entry['bytes']:,} bytes", flush=True)


if __name__ == "__main__":
    run_script(main)
