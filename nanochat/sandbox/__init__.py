"""The sandbox process in which nanochat/execution.py runs untrusted programs."""
