"""Keys and values of tokens: of the rows being decoded, and of earlier ones for prompts that begin alike."""

from bisect import bisect_left, insort
from collections import OrderedDict

import torch

SPARE_COLUMNS = 64  # of a new or grown cache, so that the tokens after a prompt fit


class KVCache:
    """
    Keys and values of all layers for rows of different lengths; row b's tokens are columns 0 to lengths[b] - 1.

    The model calls begin(T), insert(layer, k, v) for every layer, advance(T). Storage is allocated at the first insert
    in k's dtype, and doubles in place when rows or columns run out. Columns beyond a row's length hold finite
    leftovers, which the mask hides.
    """

    def __init__(self, n_layer, rows=0, device="cpu"):
        self.n_layer, self.device = n_layer, device
        self.lengths = [0] * rows  # tokens held, per row
        self.data = None  # (n_layer, 2, rows, Hkv, columns, D)

    def max_position(self, T):
        """One more than the largest position of the next T tokens, over all rows."""
        return max(self.lengths) + T

    def begin(self, T):
        """Positions (B, T) of the next T tokens of every row, and what each attends to: None or a bool mask."""
        lengths = torch.tensor(self.lengths, device=self.device)
        self.positions = lengths[:, None] + torch.arange(T, device=self.device)
        self.rows = torch.arange(len(self.lengths), device=self.device)[:, None]
        self.uniform, S = len(set(self.lengths)) == 1, self.max_position(T)
        if self.uniform and (T == 1 or S == T):  # all columns, or the plain causal triangle
            return self.positions, None
        seen = self.positions[:1] if self.uniform else self.positions
        return self.positions, (torch.arange(S, device=self.device) <= seen[..., None])[:, None]  # (B or 1, 1, T, S)

    def insert(self, layer, k, v):
        """Store k, v (B, Hkv, T, D) of `layer` behind each row's tokens; returns all its columns (B, Hkv, S, D)."""
        B, H, T, D = k.shape
        assert B == len(self.lengths), f"{B} rows for a cache of {len(self.lengths)}"
        S = self.max_position(T)
        self.reserve(B, S, H, D, k.dtype)
        for kept, new in zip(self.data[layer], (k, v), strict=True):
            if self.uniform:
                kept[:B, :, S - T : S] = new
            else:
                kept[self.rows, :, self.positions] = new.transpose(1, 2).to(kept.dtype)
        return tuple(self.data[layer, :, :B, :, :S])

    def advance(self, T):
        self.lengths = [n + T for n in self.lengths]

    def append(self, other, rows, room=0):
        """Append copies of `rows` of `other`, which may repeat, and reserve columns for `room` more tokens."""
        first, self.lengths = len(self.lengths), self.lengths + [other.lengths[r] for r in rows]
        S = max((other.lengths[r] for r in rows), default=0)
        if S:
            self._reserve_like(len(self.lengths), max(self.lengths) + room, other.data)
            self.data[:, :, first : len(self.lengths), :, :S] = other.data[:, :, rows, :, :S]

    def restore(self, row, data):
        """Let `row`, which is empty, hold the tokens of `data` (n_layer, 2, Hkv, tokens, D)."""
        n = data.size(-2)
        self._reserve_like(len(self.lengths), n, data)
        self.data[:, :, row, :, :n] = data
        self.lengths[row] = n

    def select(self, rows):
        """Keep only `rows`, in this order; a row may be named more than once. Rows that stay in place cost nothing."""
        moved = [(to, source) for to, source in enumerate(rows) if to != source]
        lengths = [self.lengths[r] for r in rows]
        S = max((lengths[to] for to, _ in moved), default=0)
        if S:
            self._reserve_like(len(rows), S, self.data)
            to, source = zip(*moved, strict=True)
            self.data[:, :, list(to), :, :S] = self.data[:, :, list(source), :, :S]
        self.lengths = lengths

    def _reserve_like(self, rows, columns, data):
        self.reserve(rows, columns, data.size(-3), data.size(-1), data.dtype)

    def reserve(self, rows, columns, heads, head_dim, dtype):
        """Make room for `rows` and `columns`."""
        have_rows, have_columns = (0, 0) if self.data is None else (self.data.size(2), self.data.size(4))
        if rows <= have_rows and columns <= have_columns:
            return
        rows = have_rows if rows <= have_rows else max(rows, 2 * have_rows)
        columns = have_columns if columns <= have_columns else max(columns + SPARE_COLUMNS, 2 * have_columns)
        shape = (self.n_layer, 2, rows, heads, columns, head_dim)
        grown = torch.zeros(shape, dtype=dtype, device=self.device)  # not empty: a masked NaN would still spread
        if self.data is not None:
            grown[:, :, :have_rows, :, :have_columns] = self.data
        self.data = grown


class PrefixCache:
    """
    Keys and values of finished rows, for prompts that begin with the same tokens: the next turn of a conversation.

    Holds at most `max_tokens` tokens; the least recently used row goes first.
    """

    MIN_SHARED = 4  # fewer tokens are computed sooner than found

    def __init__(self, max_tokens):
        self.max_tokens, self.held = max_tokens, 0
        self.rows = OrderedDict()  # tuple of tokens -> (n_layer, 2, Hkv, tokens, D), the least recently used first
        self.order = []  # the tuples sorted: those that begin most alike are neighbours

    def find(self, tokens):
        """(n, data): the most tokens at the start of `tokens` that a row has too, and that row's data, or (0, None)."""
        candidates = [(common_prefix_length(row, tokens), row) for row in self._neighbours(tuple(tokens))]
        n, best = max(candidates, default=(0, None))
        if n < self.MIN_SHARED:
            return 0, None
        self.rows.move_to_end(best)
        return n, self.rows[best]

    def add(self, tokens, cache, row):
        """Keep a copy of `row` of `cache`, which holds `tokens`, in place of the row that it goes on from."""
        tokens = tuple(tokens[: cache.lengths[row]])
        if not self.MIN_SHARED <= len(tokens) <= self.max_tokens:
            return
        for old in self._neighbours(tokens):
            n = common_prefix_length(old, tokens)
            if n == len(tokens):
                return  # it is there, or a longer row that serves as well
            if n == len(old):
                self._drop(old)
        self.rows[tokens] = cache.data[:, :, row, :, : len(tokens)].clone()
        insort(self.order, tokens)
        self.held += len(tokens)
        while self.held > self.max_tokens:
            self._drop(next(iter(self.rows)))

    def _neighbours(self, tokens):
        i = bisect_left(self.order, tokens)
        return self.order[max(0, i - 1) : i + 1]

    def _drop(self, tokens):
        del self.rows[tokens]
        del self.order[bisect_left(self.order, tokens)]
        self.held -= len(tokens)


def common_prefix_length(a, b):
    """Number of tokens at the start of `a` and `b` that are equal, found by bisection."""
    low, high = 0, min(len(a), len(b))
    a, b = tuple(a[:high]), tuple(b[:high])
    while low < high:  # comparing slices is much faster than comparing single tokens
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
