"""
The model's operations that differ by device, or that need their own backward pass. gpt.py calls one function for each.

On a CPU, PyTorch's elementwise operations are bound by memory bandwidth, so the functions here make fewer passes over
memory than autograd would. Together they save 40 % of a pocket model's training step (Zen 5, 2 cores, 2026-11).
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

QUERY_BLOCK = 256  # queries per block of causal_attention()
# Maximum number of logits in one chunk of the loss: 8 MiB of float32 on a CPU, which fits its cache; 2 GiB on a GPU.
CPU_CHUNK_ELEMENTS, CUDA_CHUNK_ELEMENTS = 1 << 21, 1 << 29
BLOCKS_PER_MATMUL = 32  # on a CPU: matrix products need more rows than elementwise operations, for 256 MiB of logits


def rms_norm(x, eps):
    """x / sqrt(mean(x²) + eps) over the last dimension (Zhang and Sennrich 2019)."""
    return RMSNorm.apply(x, eps) if x.device.type == "cpu" else F.rms_norm(x, (x.size(-1),), eps=eps)


def squared_relu(x):
    """max(x, 0)²."""
    return SquaredReLU.apply(x) if x.device.type == "cpu" else F.relu(x).square()


def attention(q, k, v, mask=None, causal=False):
    """
    Scaled dot-product attention. q (B, Hq, Tq, D); k, v (B, Hkv, Tk, D); returns (B, Hq, Tq, D).

    mask: bool, broadcastable to (B, Hq, Tq, Tk), True = attend. `causal` requires Tq == Tk and no mask.
    """
    gqa = q.size(1) != k.size(1)
    if q.device.type == "cpu" and mask is None and q.size(2) == k.size(2) and not gqa:
        return causal_attention(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=gqa)


def embedding_dtype(device):
    """Dtype of the embedding table in training: bfloat16 on CUDA, which halves its memory, else float32."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


def chunk_rows(x, vocab_size):
    """Number of tokens per chunk of logits, on the device of `x`."""
    return max(1, (CUDA_CHUNK_ELEMENTS if x.is_cuda else CPU_CHUNK_ELEMENTS) // vocab_size)


def cross_entropy_sum(x, weight, targets, token_weights, vocab_size, softcap):
    """
    Weighted sum of the cross entropy of soft-capped logits, in nats, without materializing all logits.

    x (N, C) activations; weight (>= vocab_size, C) the head; targets (N,) ids, -1 = ignored; token_weights (N,) or
    None = 1.
    """
    trained = targets >= 0
    token_weights = trained.float() if token_weights is None else trained * token_weights
    if x.device.type == "cpu":  # on a GPU, boolean indexing would wait for the device
        x, targets, token_weights = x[trained], targets[trained], token_weights[trained]
    return ChunkedCrossEntropy.apply(x, weight, targets, token_weights, vocab_size, softcap)


def causal_attention(q, k, v):
    """
    Causal attention on a CPU; q, k, v and the result are (B, H, T, D). Blocks of queries skip all later keys.

    In bfloat16 it is two to three times as fast as scaled_dot_product_attention, forward and backward.
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
    """rms_norm() that saves only its output and scale for the backward pass."""

    @staticmethod
    def forward(ctx, x, eps):
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = norm.square_().div_(x.size(-1)).add_(eps).rsqrt_().to(x.dtype)
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        y, scale = ctx.saved_tensors
        projection = (grad * y).mean(-1, keepdim=True)
        return torch.addcmul(grad, y, projection, value=-1).mul_(scale), None


class SquaredReLU(torch.autograd.Function):
    """squared_relu() that saves only relu(x) for the backward pass."""

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


def capped_cross_entropy_(logits, targets, token_weights, softcap):
    """
    Weighted sum of the cross entropy of soft-capped `logits` (N, V), in nats. Overwrites `logits` with its gradient.

    targets (N,) ids, -1 only where the weight is 0. Capped logits are below `softcap`, so exp() cannot overflow.
    """
    target, scale = targets.clamp(min=0)[:, None], token_weights[:, None]
    t = logits.float().div_(softcap).tanh_()
    p = (t * softcap).exp_()
    z = p.sum(-1, keepdim=True)
    nats = ((z.log() - softcap * t.gather(1, target)) * scale).sum()
    p *= scale / z
    p.scatter_add_(1, target, -scale)
    logits.copy_(p.addcmul_(p, t.square_(), value=-1))  # d/dl of c tanh(l / c) is 1 - tanh²(l / c)
    return nats


class ChunkedCrossEntropy(torch.autograd.Function):
    """
    cross_entropy_sum(). The forward pass also computes the gradients, from each chunk's logits.

    Nothing is computed twice and nothing of size N x V is stored.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, token_weights, vocab_size, softcap):
        w = weight[:vocab_size].to(x.dtype)
        need_x, need_w = ctx.needs_input_grad[:2]
        grad_x = torch.empty_like(x) if need_x else None
        grad_w = (torch.empty_like if len(x) else torch.zeros_like)(weight, dtype=torch.float32) if need_w else None
        if need_w:
            grad_w[vocab_size:] = 0
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        block = chunk_rows(x, vocab_size)
        rows = block if x.is_cuda else block * BLOCKS_PER_MATMUL
        with torch.autocast(x.device.type, enabled=False):
            for i in range(0, len(x), rows):
                chunk = x[i : i + rows]
                logits = chunk @ w.T
                parts = (t.split(block) for t in (logits, targets[i : i + rows], token_weights[i : i + rows]))
                for part in zip(*parts, strict=True):
                    total += capped_cross_entropy_(*part, softcap)
                grad = logits  # overwritten by now
                if need_x:
                    torch.mm(grad, w, out=grad_x[i : i + rows])
                if need_w and x.dtype == torch.float32:
                    torch.addmm(grad_w[:vocab_size], grad.T, chunk, beta=float(i > 0), out=grad_w[:vocab_size])
                elif need_w:
                    product = grad.T @ chunk
                    grad_w[:vocab_size] = product if i == 0 else grad_w[:vocab_size].add_(product)
        ctx.save_for_backward(grad_x, grad_w)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, grad_output):
        grad_x, grad_w = ctx.saved_tensors
        grad_x = None if grad_x is None else grad_x * grad_output.to(grad_x.dtype)
        grad_w = None if grad_w is None else (grad_w * grad_output).to(ctx.weight_dtype)
        return grad_x, grad_w, None, None, None, None
