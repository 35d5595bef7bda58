"""Writes documents as parquet shards in the format of the public corpus: column `text`, row groups of 1,024, zstd."""

import random

from nanochat.common import atomic_path, file_fingerprint, print0, require

SHARD_CHARS = 250_000_000  # minimum size of a shard in characters, about 100 MB compressed
ROW_GROUP = 1024  # documents per row group, the unit of reading


def cut(texts, is_full):
    """Yield lists of consecutive `texts`. A list ends when is_full(list, its characters); the last one has the rest."""
    part, chars = [], 0
    for text in texts:
        part.append(text)
        chars += len(text)
        if is_full(part, chars):
            yield part
            part, chars = [], 0
    if part:
        yield part


def cut_shards(documents, shard_chars=SHARD_CHARS):
    """Yield lists of documents: whole row groups with at least `shard_chars` characters; the last list has the rest."""
    return cut(documents, lambda shard, chars: chars >= shard_chars and len(shard) % ROW_GROUP == 0)


def write_shard(path, documents):
    """Write a list of str as one shard, atomically; returns its manifest entry {"bytes", "sha256"}."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    options = dict(use_dictionary=False, write_statistics=False, compression="zstd", compression_level=3)
    with atomic_path(path) as draft:
        pq.write_table(pa.table({"text": pa.array(documents, pa.string())}), draft, row_group_size=ROW_GROUP, **options)
    return file_fingerprint(path)


def write_shards(folder, documents, seed, shard_chars=SHARD_CHARS):
    """
    Write an iterable of (is_validation, text): training shards, then one validation shard. Returns {name: entry}.

    Keeps one training shard and all validation documents in memory. Documents are shuffled within their shard; the
    loader shuffles the row groups of all shards.
    """
    rng, val, shards, sizes = random.Random(seed), [], {}, []

    def train_documents():
        for is_val, text in documents:
            if is_val:
                val.append(text)
            else:
                yield text

    def add_shard(texts, split):
        sizes.append(sum(map(len, texts)))
        name = f"shard_{len(shards):05d}.parquet"
        shards[name] = write_shard(folder / name, texts)
        share = f" ({100 * sizes[-1] / sum(sizes):.1f} %)" if split == "validation" else ""
        print0(f"{name}, {split}: {len(texts):,} document{'s' * (len(texts) != 1)}, {sizes[-1]:,} characters{share}")

    for shard in cut_shards(train_documents(), shard_chars):
        rng.shuffle(shard)
        add_shard(shard, "training")
    require(shards and val, "too little text: training and validation need at least one document each")
    add_shard(val, "validation")
    return shards
