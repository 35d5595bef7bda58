from collections.abc import Callable, Iterable
from typing import Any

class Tokenizer:
    """A byte-level BPE tokenizer: knows the 256 bytes until it is trained."""

    def __init__(self) -> None: ...
    @staticmethod
    def from_tokens(tokens: Iterable[bytes], pattern: str | None = None) -> Tokenizer:
        """From the bytes of every token in the order of the ids. ValueError when no merges could have made them."""

    def train_from_iterator(
        self,
        iterator: Iterable[str],
        vocab_size: int,
        buffer_size: int = 8192,
        pattern: str | None = None,
        progress: Callable[[str, int, int | None], Any] | None = None,
        max_chars: int | None = None,
    ) -> None:
        """
        Learn at most `vocab_size - 256` merges from the first `max_chars` characters of each text.

        `progress(phase, done, total)` hears of counting and merging.
        """

    def train_from_arrow(
        self,
        batches: Iterable[Any],
        vocab_size: int,
        column: str = "text",
        pattern: str | None = None,
        progress: Callable[[str, int, int | None], Any] | None = None,
        max_chars: int | None = None,
    ) -> None:
        """The same from pyarrow Arrays, ChunkedArrays, RecordBatches or Tables, without a Python string per text."""

    def get_pattern(self) -> str: ...
    def get_mergeable_ranks(self) -> list[tuple[bytes, int]]: ...
    def encode(self, text: str) -> list[int]: ...
    def encode_batch(self, texts: list[str], num_threads: int | None = None) -> list[list[int]]: ...

Matrix = tuple[str, int, int, int, int]
"""dtype ("float32", "bfloat16" or "int8"), address, rows, columns, address of the rows' scales or 0."""

class Decoder:
    """
    The model's forward pass over a few tokens on a CPU; what it is given the addresses of must stay where it is.

    `layers` has the matrices of queries, keys and values in one, of the attention's output, and of the MLP: up, down;
    `heads` are (n_head, n_kv_head, head_dim).
    """

    def __init__(
        self,
        embedding: Matrix,
        layers: list[list[Matrix]],
        head: Matrix,
        heads: tuple[int, int, int],
        eps: float,
        softcap: float,
    ) -> None: ...
    def forward(
        self,
        tokens: list[list[int]],
        lengths: list[int],
        cache: tuple[str, int, int, int],
        rotary: tuple[int, int],
        logits: int | None,
        threads: int,
    ) -> None:
        """
        Let `tokens`, a list for each row, join a cache (dtype, address, rows, columns) whose rows have `lengths`.

        The cache is float32 or bfloat16 (layers, 2, rows, n_kv_head, columns, head_dim); `rotary` are the addresses of
        cosines and sines (positions, head_dim / 2). Logits after every token go to `logits`, an address, if that is
        given. Raises ValueError for ids that the embedding lacks, and for a cache without room.
        """

def sample(
    logits: int,
    vocab_size: int,
    uniforms: list[float],
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> list[int]:
    """
    A token for each number in `uniforms` (from 0 to 1), from float32 logits (len(uniforms), vocab_size) at an address.

    `temperature` 0 takes the likeliest; `top_k` 0, `top_p` 1 and `min_p` 0 are off.
    """
