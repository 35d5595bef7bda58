"""Inference: sampling, continuous batching, the KV cache, and the backends that run the model."""
