from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

class Tokenizer:
    """A byte-level BPE tokenizer. Until it is trained, its tokens are the 256 bytes."""

    def __init__(self) -> None: ...
    @staticmethod
    def from_tokens(tokens: Iterable[bytes], pattern: str | None = None) -> Tokenizer:
        """
        From the bytes of every token in the order of the ids.

        Raises ValueError unless they are the 256 bytes followed by tokens that merge two earlier ones.
        """

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
        Learn up to `vocab_size - 256` merges from the first `max_chars` characters of each text.

        `progress(phase, done, total)` is called now and then: phase is "counting" (done in bytes, total None) or
        "merging" (done and total in merges). `buffer_size` is ignored.
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

    def get_pattern(self) -> str:
        """The regular expression that splits text into pieces."""

    def get_mergeable_ranks(self) -> list[tuple[bytes, int]]:
        """[(bytes, rank)] in the order of the ranks, for tiktoken."""

    def encode(self, text: str, dropout: float = 0.0) -> list[int]:
        """
        The token ids of `text`. Names of special tokens are treated as plain text.

        With `dropout` > 0, each possible merge is left out with that probability (BPE dropout, Provilkov et al. 2020).
        Equal texts get equal ids.
        """

    def encode_batch(self, texts: list[str], num_threads: int | None = None, dropout: float = 0.0) -> list[list[int]]:
        """The token ids of each text, on `num_threads` threads (default: all cores). `dropout` is that of `encode`."""

Matrix = Tensor | tuple[Tensor, Tensor]
"""(n_out, n_in) in float32 or bfloat16, or a pair of int8 weights and float32 scales (n_out, 1) or (n_out,)."""

class Decoder:
    """
    The forward pass of a model on a CPU, with the weights in contiguous torch tensors.

    The tensors' memory is kept and must not be resized. Raises ValueError for tensors that do not fit together.
    """

    def __init__(
        self,
        embedding: Tensor,
        layers: Sequence[tuple[Matrix, Matrix, Matrix, Matrix, Matrix, Matrix]],
        head: Matrix,
        n_head: int,
        n_kv_head: int,
        head_dim: int,
        eps: float,
        softcap: float,
    ) -> None:
        """`embedding` is (V, C) in float32 or bfloat16; a layer is (q, k, v, attn_proj, fc, mlp_proj)."""

    def forward(
        self,
        tokens: list[list[int]],
        lengths: list[int],
        cache: Tensor,
        cos: Tensor,
        sin: Tensor,
        logits: Tensor | None,
        threads: int,
    ) -> None:
        """
        Append `tokens`, a list for each row, to the rows of `cache`, which hold `lengths` tokens.

        `cache` is float32 or bfloat16 (n_layer, 2, rows, n_kv_head, columns, head_dim); `cos` and `sin` are float32
        (positions, head_dim / 2). The logits after each token go to `logits`, float32 (sum of tokens, V), unless it is
        None. Raises ValueError for unknown token ids, a full cache, and tensors of wrong shape or type.
        """

def sample(
    logits: Tensor,
    uniforms: list[float],
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> list[int]:
    """
    A token id for each number in `uniforms` (from 0 to 1), sampled from float32 logits (len(uniforms), V) on the CPU.

    `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 are off. Raises ValueError for other logits.
    """
