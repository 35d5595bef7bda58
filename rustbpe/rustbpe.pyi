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
