"""
Decoding steps on a GPU as CUDA graphs.

A step of a few rows is hundreds of small kernels, and starting them from Python takes many times what they take. A
graph starts them all at once, but knows one shape and one place in memory: so a step always goes over all rows that
the cache has room for, and over a power of two of its columns, with a mask for what is not there.
"""

import sys
from collections import Counter

import torch

MIN_COLUMNS = 128
EAGER_STEPS = 8  # of a shape before it is worth a graph, which takes about as long to record as ten steps


class StaticStep:
    """The model's forward pass over one token per row of `cache`, in shapes and places that stay as they are."""

    def __init__(self, model, cache, columns):
        self.model, self.data, self.columns = model, cache.data, columns
        rows, device = cache.data.size(2), cache.data.device
        self.ids = torch.zeros(rows, dtype=torch.long, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.rows = torch.arange(rows, device=device)
        self.seen = torch.arange(columns, device=device)
        self.tables = model.rotary(max(columns, model.config.sequence_len))  # held: the model may want larger ones

    # What the model asks of a cache

    def max_position(self, T):
        return self.columns

    def begin(self, T):
        return self.lengths[:, None], (self.seen <= self.lengths[:, None])[:, None, None]

    def insert(self, layer, k, v):
        for kept, new in zip(self.data[layer], (k, v), strict=True):
            kept[self.rows, :, self.lengths] = new[:, :, 0].to(kept.dtype)
        return tuple(self.data[layer, ..., : self.columns, :])

    def advance(self, T):
        pass

    def fill(self, tokens, lengths):
        """Say what the first rows' next tokens are, and how many they hold; the others' logits have no meaning."""
        n = len(tokens)
        self.ids[:n].copy_(torch.tensor(tokens))
        self.lengths.zero_()  # rows that nobody has write to their first column, as their first token will again
        self.lengths[:n].copy_(torch.tensor(lengths))

    def run(self):
        """Logits (rows, V)."""
        return self.model(self.ids[:, None], kv_cache=self)[:, -1]


class CUDADecoder:
    """Decoding steps of `model`, a GPT that is not trained any more; `precision` makes the context to compute in."""

    def __init__(self, model, precision):
        self.model, self.precision = model, precision
        self.data, self.uses, self.graphs = None, Counter(), {}  # of a cache; by number of columns
        self.pool, self.works = None, True

    def __call__(self, tokens, cache):
        """Logits (B, V) after `tokens`, one per row, which join `cache`; None where a graph is not to be had."""
        needed = cache.max_position(1)
        if not self.works or cache.data is None or len(tokens) > cache.data.size(2) or needed > cache.data.size(4):
            return None
        if self.data is not cache.data:
            self.data, self.uses, self.graphs = cache.data, Counter(), {}
        columns = min(cache.data.size(4), max(MIN_COLUMNS, 1 << (needed - 1).bit_length()))
        self.uses[columns] += 1
        if self.uses[columns] < EAGER_STEPS:
            return None
        if columns in self.graphs:
            step, run = self.graphs[columns]
            step.fill(tokens, cache.lengths)
        else:
            step = StaticStep(self.model, cache, columns)
            step.fill(tokens, cache.lengths)  # before recording, which runs it
            try:
                run = self.record(step)
            except RuntimeError as e:
                print(f"warning: decoding without CUDA graphs ({str(e).splitlines()[0]})", file=sys.stderr)
                self.works = False
                return None
            self.graphs[columns] = step, run
        logits = run()[: len(tokens)].clone()  # the next step of this graph writes to the same place
        cache.advance(1)
        return logits

    def record(self, step):
        """A function that replays the graph of `step`."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), self.precision():
            for _ in range(2):  # kernels are chosen and loaded
                step.run()
        torch.cuda.current_stream().wait_stream(stream)
        graph, self.pool = torch.cuda.CUDAGraph(), self.pool or torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self.pool), self.precision():
            logits = step.run()

        def run():
            graph.replay()
            return logits

        return run
