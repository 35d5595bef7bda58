"""Bits per byte: the cross entropy of a model on text, on a scale that does not depend on the tokenizer."""

import math

import torch
import torch.distributed as dist


@torch.no_grad()
def evaluate_bpb(model, batches, token_bytes, compute):
    """
    Bits per byte over `batches` of (inputs, targets), each (B, T), summed over all ranks.

    `token_bytes` (V,) holds each token's length in bytes, 0 for special tokens: those, and targets of -1, count
    neither in the nats nor in the bytes. inf when there are no bytes.
    """
    token_bytes = token_bytes.to(compute.device)
    totals = torch.zeros(
        2, dtype=torch.float64 if compute.device.type != "mps" else torch.float32, device=compute.device
    )
    for x, y in batches:
        x, y = x.to(compute.device, non_blocking=True), y.to(compute.device, non_blocking=True)
        with compute.autocast():
            nats = model(x, y, loss_reduction="none")
        num_bytes = token_bytes[y.clamp(min=0)] * (y >= 0)
        totals += torch.stack(((nats * (num_bytes > 0)).sum(), num_bytes.sum())).to(totals.dtype)
    if compute.world_size > 1:
        dist.all_reduce(totals)
    nats, num_bytes = totals.tolist()
    return nats / (math.log(2) * num_bytes) if num_bytes else math.inf
