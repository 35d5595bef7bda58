"""
What PyTorch does slowly on CPU, done faster: together a training step of the pocket model takes 0.6 of the time.

Each is a handful of PyTorch's own operations with fewer passes over memory than autograd makes of the plain formula.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

QUERY_BLOCK = 256


def causal_attention(q, k, v):
    """
    Causal attention, all (B, H, T, D), by plain matmuls: a block of queries at a time with the keys up to its end.

    In bfloat16 two to three times as fast, forward and backward, as scaled_dot_product_attention.
    """
    T, q = q.size(2), q * q.size(-1) ** -0.5
    future = torch.full((QUERY_BLOCK, QUERY_BLOCK), -torch.inf, dtype=q.dtype).triu(1)
    out = []
    for start in range(0, T, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, T)
        scores = q[:, :, start:end] @ k[:, :, :end].transpose(-1, -2)
        scores[..., start:] += future[: end - start, : end - start]
        out.append(scores.softmax(-1) @ v[:, :, :end])
    return torch.cat(out, dim=2)


class RMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) over the last dimension; the backward pass needs only the result and the factor."""

    @staticmethod
    def forward(ctx, x, eps):
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        factor = norm.square_().div_(x.size(-1)).add_(eps).rsqrt_().to(x.dtype)
        y = x * factor
        ctx.save_for_backward(y, factor)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        y, factor = ctx.saved_tensors
        along = (grad * y).mean(-1, keepdim=True)
        return torch.addcmul(grad, y, along, value=-1).mul_(factor), None


class SquaredReLU(torch.autograd.Function):
    """max(x, 0)^2."""

    @staticmethod
    def forward(ctx, x):
        x = F.relu(x)
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return (grad * x).mul_(2)
