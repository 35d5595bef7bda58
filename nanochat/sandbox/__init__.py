"""The inside of the sandbox that nanochat/execution.py runs untrusted code in."""
