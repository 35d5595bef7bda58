"""The Prometheus metrics behind GET /metrics."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)  # upper bounds of the histograms' buckets


class Metrics:
    def __init__(self, workers):
        self.registry = r = CollectorRegistry()
        self.requests = Counter("nanochat_requests", "Requests answered.", ["endpoint", "status"], registry=r)
        self.prompt_tokens = Counter("nanochat_prompt_tokens", "Prompt tokens.", registry=r)
        self.completion_tokens = Counter("nanochat_completion_tokens", "Generated tokens.", registry=r)
        self.cached_tokens = Counter("nanochat_cached_tokens", "Prompt tokens found in the prefix cache.", registry=r)
        name, help = "nanochat_time_to_first_token_seconds", "From a request to its first token."
        self.first_token = Histogram(name, help, buckets=SECONDS, registry=r)
        name, help = "nanochat_inter_token_seconds", "Between tokens of an answer, averaged over those sent together."
        self.inter_token = Histogram(name, help, buckets=(0.001, 0.002, *SECONDS), registry=r)
        rows = Gauge("nanochat_running_rows", "Answers in the batches.", registry=r)
        rows.set_function(lambda: sum(w.load.rows for w in workers))
        waiting = Gauge("nanochat_waiting_requests", "Answers that wait for a place in a batch.", registry=r)
        waiting.set_function(lambda: sum(max(0, w.in_flight - w.load.rows) for w in workers))
        cached = Gauge("nanochat_prefix_cache_tokens", "Tokens in the prefix caches.", registry=r)
        cached.set_function(lambda: sum(w.load.cached_tokens for w in workers))
