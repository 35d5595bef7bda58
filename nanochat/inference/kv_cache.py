"""Key-value caches: KVCache for the rows being decoded, PrefixCache for prefixes that prompts share."""

from bisect import bisect_left, insort
from collections import OrderedDict

import torch


class KVCache:
    """
    Keys and values of all layers, for rows of different lengths. Row b's tokens are columns 0 to lengths[b] - 1.

    A forward pass calls begin(T), insert(layer, k, v) for every layer, and advance(T). Storage is allocated at the
    first insert, in k's dtype, and doubles when rows or columns run out. Columns beyond a row's length hold stale but
    finite values, which the mask hides.
    """

    def __init__(self, n_layer, rows=0, device="cpu"):
        self.n_layer, self.device = n_layer, device
        self.lengths = [0] * rows  # tokens per row
        self.data = None  # (n_layer, 2, rows, Hkv, columns, D)

    def max_position(self, T):
        """1 + the largest position of the next T tokens, over all rows."""
        return max(self.lengths) + T

    def begin(self, T):
        """Positions (B, T) of the next T tokens, and the attention mask: bool (B or 1, 1, T, S), or None if trivial."""
        self.positions = torch.tensor(self.lengths, device=self.device)[:, None] + torch.arange(T, device=self.device)
        self.rows = torch.arange(len(self.lengths), device=self.device)[:, None]
        self.uniform, S = len(set(self.lengths)) == 1, self.max_position(T)
        if self.uniform and (T == 1 or S == T):  # attend to all columns, or causally to the new ones
            return self.positions, None
        last = self.positions[:1] if self.uniform else self.positions
        return self.positions, (torch.arange(S, device=self.device) <= last[..., None])[:, None]

    def insert(self, layer, k, v):
        """Store k, v (B, Hkv, T, D) after each row's tokens; returns the layer's keys and values (B, Hkv, S, D)."""
        B, _, T, _ = k.shape
        assert B == len(self.lengths), f"{B} rows for a cache of {len(self.lengths)}"
        S = self.max_position(T)
        self.reserve(B, S, k)
        for stored, new in zip(self.data[layer], (k, v), strict=True):
            if self.uniform:
                stored[:B, :, S - T : S] = new
            else:
                stored[self.rows, :, self.positions] = new.transpose(1, 2).to(stored.dtype)
        return tuple(self.data[layer, :, :B, :, :S])

    def advance(self, T):
        self.lengths = [n + T for n in self.lengths]

    def append(self, other, rows, room=0):
        """Append copies of rows of another cache; indices may repeat. Reserves columns for `room` more tokens."""
        first, self.lengths = len(self.lengths), self.lengths + [other.lengths[r] for r in rows]
        S = max((other.lengths[r] for r in rows), default=0)
        if S:
            self.reserve(len(self.lengths), max(self.lengths) + room, other.data)
            self.data[:, :, first : len(self.lengths), :, :S] = other.data[:, :, rows, :, :S]

    def select(self, rows):
        """Keep only `rows`, in this order; indices may repeat. Rows that keep their index are not copied."""
        moves = [(to, source) for to, source in enumerate(rows) if to != source]
        lengths = [self.lengths[r] for r in rows]
        S = max((lengths[to] for to, _ in moves), default=0)
        if S:
            self.reserve(len(rows), S, self.data)
            to, source = zip(*moves, strict=True)
            self.data[:, :, list(to), :, :S] = self.data[:, :, list(source), :, :S]
        self.lengths = lengths

    def reserve(self, rows, columns, like):
        """Allocate room for at least `rows` x `columns`; dtype and sizes are those of `like` (..., Hkv, any, D)."""
        old_rows, old_columns = (0, 0) if self.data is None else (self.data.size(2), self.data.size(4))
        if rows <= old_rows and columns <= old_columns:
            return
        rows = old_rows if rows <= old_rows else max(rows, 2 * old_rows)
        # 64 spare columns for the tokens after a prompt
        columns = old_columns if columns <= old_columns else max(columns + 64, 2 * old_columns)
        shape = (self.n_layer, 2, rows, like.size(-3), columns, like.size(-1))
        grown = torch.zeros(shape, dtype=like.dtype, device=self.device)  # not empty(): a masked NaN would still spread
        if self.data is not None:
            grown[:, :, :old_rows, :, :old_columns] = self.data
        self.data = grown


class PrefixCache:
    """
    Keys and values of finished rows, reused by prompts that begin with the same tokens: a conversation's next turn.

    Holds at most `max_tokens` tokens; the least recently used row is evicted first.
    """

    MIN_SHARED = 4  # computing fewer tokens is cheaper than looking them up

    def __init__(self, max_tokens):
        self.max_tokens, self.num_tokens = max_tokens, 0
        self.rows = OrderedDict()  # tuple of tokens -> (n_layer, 2, Hkv, tokens, D), least recently used first
        self.sorted_rows = []  # keys of `rows`, sorted: a neighbor has the longest common prefix

    def restore(self, tokens, cache, row):
        """Copy the longest prefix of `tokens` that is stored to the empty row `row` of `cache`; returns its length."""
        candidates = self._neighbors(tuple(tokens))
        n, best = max(((common_prefix_length(old, tokens), old) for old in candidates), default=(0, None))
        if n < self.MIN_SHARED:
            return 0
        self.rows.move_to_end(best)
        cache.reserve(len(cache.lengths), n, self.rows[best])
        cache.data[:, :, row, :, :n] = self.rows[best][..., :n, :]
        cache.lengths[row] = n
        return n

    def add(self, tokens, cache, row):
        """Store a copy of row `row` of `cache`, whose tokens are `tokens`. Evicts rows that are prefixes of it."""
        tokens = tuple(tokens[: cache.lengths[row]])
        if not self.MIN_SHARED <= len(tokens) <= self.max_tokens:
            return
        for old in self._neighbors(tokens):
            if old[: len(tokens)] == tokens:
                return  # already stored, or a prefix of a stored row
            if tokens[: len(old)] == old:
                self._evict(old)
        self.rows[tokens] = cache.data[:, :, row, :, : len(tokens)].clone()
        insort(self.sorted_rows, tokens)
        self.num_tokens += len(tokens)
        while self.num_tokens > self.max_tokens:
            self._evict(next(iter(self.rows)))

    def _neighbors(self, tokens):
        i = bisect_left(self.sorted_rows, tokens)
        return self.sorted_rows[max(0, i - 1) : i + 1]

    def _evict(self, tokens):
        del self.rows[tokens]
        del self.sorted_rows[bisect_left(self.sorted_rows, tokens)]
        self.num_tokens -= len(tokens)


def common_prefix_length(a, b):
    """Number of leading tokens that `a` and `b` have in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
