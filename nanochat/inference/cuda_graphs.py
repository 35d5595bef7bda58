"""
Decode steps as CUDA graphs.

A decode step of a few rows is hundreds of small kernels, and launching them from Python takes many times longer than
they run. A graph launches them together, but its shapes and addresses are fixed. So a step always runs over all rows
that the cache has allocated and over a power of two of its columns, with a mask for the rest.
"""

import sys
from collections import Counter

import torch

from nanochat.inference.backends import TorchBackend

EAGER_STEPS = 8  # steps of one shape before its graph is recorded, which costs about ten steps


class StaticStep:
    """
    One decode step with static shapes; stands in for the KVCache in the model's forward pass.

    `cache`: the KVCache whose storage it reads and writes; `columns`: how many of its columns are attended to.
    """

    def __init__(self, model, cache, columns):
        self.model, self.data, self.columns = model, cache.data, columns
        rows, device = cache.data.size(2), cache.data.device
        self.ids, self.lengths = torch.zeros(2, rows, dtype=torch.long, device=device)
        self.rows = torch.arange(rows, device=device)
        self.positions = torch.arange(columns, device=device)
        # The graph holds the tables' addresses; without this reference the model could replace them by larger ones.
        self.rotary_tables = model.rotary(max(columns, model.config.sequence_len))

    def max_position(self, T):
        return self.columns

    def begin(self, T):
        return self.lengths[:, None], (self.positions <= self.lengths[:, None])[:, None, None]

    def insert(self, layer, k, v):
        for stored, new in zip(self.data[layer], (k, v), strict=True):
            stored[self.rows, :, self.lengths] = new[:, :, 0].to(stored.dtype)
        return tuple(self.data[layer, ..., : self.columns, :])

    def advance(self, T):
        pass

    def set_inputs(self, tokens, lengths):
        """Next token and current length of the first rows; the logits of the other rows are meaningless."""
        n = len(tokens)
        self.ids[:n].copy_(torch.tensor(tokens).flatten())
        self.lengths.zero_()  # unused rows write to their first column, which their first token will overwrite
        self.lengths[:n].copy_(torch.tensor(lengths))

    def run(self):
        """Logits (rows, V)."""
        return self.model(self.ids[:, None], kv_cache=self)[:, -1]


class CUDAGraphBackend(TorchBackend):
    """Replays decode steps as graphs; prefill, and shapes not yet recorded, run eagerly."""

    enabled = True  # until recording fails
    storage = None  # cache data that the graphs belong to

    def forward(self, tokens, cache):
        """Append `tokens`, a list of one token per row, to `cache`; returns the logits (B, V) after them."""
        replay = self._graph(tokens, cache)
        if replay is None:
            return super().forward(tokens, cache)
        logits = replay()[: len(tokens)].clone()  # the graph's next step overwrites its output
        cache.advance(1)
        return logits

    def _graph(self, tokens, cache):
        """A function that replays this step's graph, or None where it must run eagerly."""
        needed = cache.max_position(1)
        if not self.enabled or cache.data is None or len(tokens) > cache.data.size(2) or needed > cache.data.size(4):
            return None
        if self.storage is not cache.data:  # start anew; a memory pool cannot outlive its graphs
            # `uses` and `graphs` are by columns.
            self.storage, self.uses, self.graphs, self.pool = cache.data, Counter(), {}, None
        columns = min(cache.data.size(4), max(128, 1 << (needed - 1).bit_length()))
        self.uses[columns] += 1
        if self.uses[columns] < EAGER_STEPS:
            return None
        step, replay = self.graphs.get(columns) or (StaticStep(self.model, cache, columns), None)
        step.set_inputs(tokens, cache.lengths)  # before recording, which runs the step
        if replay is None:
            try:
                replay = self.record(step)
            except RuntimeError as e:
                print(f"warning: decoding without CUDA graphs ({str(e).splitlines()[0]})", file=sys.stderr)
                self.enabled = False
                return None
            self.graphs[columns] = step, replay
        return replay

    def record(self, step):
        """Record `step` as a graph; returns a function that replays it and returns its logits."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), self.precision():
            for _ in range(2):  # warm-up: kernels are selected and loaded outside the graph
                step.run()
        torch.cuda.current_stream().wait_stream(stream)
        graph, self.pool = torch.cuda.CUDAGraph(), self.pool or torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self.pool), self.precision():
            logits = step.run()

        def replay():
            graph.replay()
            return logits

        return replay
