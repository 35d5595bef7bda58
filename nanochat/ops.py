"""
The model's operations that are more than a formula: attention, and the loss without the logits of a whole batch.

Elementwise operations are bound by memory bandwidth, so in training torch.compile() fuses them: see GPT.compile().
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

QUERY_BLOCK = 256  # queries per block of CausalAttention
CPU_LOSS_ROWS = 256  # rows of the last MLP and the loss on a CPU: a multiple, so that shapes repeat
CPU_LOGITS_BYTES, CUDA_LOGITS_BYTES = 1 << 28, 1 << 30  # size of a chunk of logits: matrix products need many rows,
CPU_BLOCK_ELEMENTS = 1 << 21  # elementwise operations on a CPU few, whose intermediate results fit its cache


def on_cpu(x):
    """Whether `x` is on a CPU. Other devices have kernels that need no help."""
    return x.device.type == "cpu"


def attention(q, k, v, mask=None, causal=False):
    """
    Scaled dot-product attention. q (B, Hq, Tq, D); k, v (B, Hkv, Tk, D); returns (B, Hq, Tq, D).

    mask: broadcastable to (B, Hq, Tq, Tk); bool (True = attend) or float (added to the scores). `causal` requires
    Tq == Tk; a mask must then hide all later keys itself.
    """
    if causal and on_cpu(q):
        return causal_attention(q, k, v, mask)
    causal, grouped = causal and mask is None, q.size(1) != k.size(1)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=grouped)


def document_mask(starts, dtype):
    """Causal mask (B, 1, T, T): 0 within a document, else -inf. `starts` (B, T): True at a document's first token."""
    document = starts.cumsum(1)
    visible = (document[:, :, None] == document[:, None]).tril()
    return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, -torch.inf)[:, None]


def causal_attention(q, k, v, mask=None):
    """
    Causal attention on a CPU; shapes as in attention(). Blocks of queries skip all later keys.

    In bfloat16, forward and backward take half to three quarters of the time of scaled_dot_product_attention.
    """
    groups, scale = q.size(1) // k.size(1), q.size(-1) ** -0.5
    if groups > 1:
        k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
    rows = (t.flatten(0, 1) for t in (q, k, v))  # contiguous, or else every matrix product would copy them
    return CausalAttention.apply(scale, mask, *rows).unflatten(0, q.shape[:2])


class CausalAttention(torch.autograd.Function):
    """Causal attention of q, k, v (N, T, D), where N counts the heads of all rows; `mask` (B, 1, T, T) or None."""

    @staticmethod
    def forward(ctx, scale, mask, q, k, v):
        T, q, out, probabilities = q.size(1), q * scale, [], []
        future = torch.full((QUERY_BLOCK, QUERY_BLOCK), -torch.inf, dtype=q.dtype).triu(1)
        for start in range(0, T, QUERY_BLOCK):
            end = min(start + QUERY_BLOCK, T)
            scores = q[:, start:end] @ k[:, :end].mT
            if mask is None:
                scores[..., start:] += future[: end - start, : end - start]
            else:
                scores.unflatten(0, (len(mask), -1)).add_(mask[:, :, start:end, :end])
            probabilities.append(scores.softmax(-1))
            out.append(probabilities[-1] @ v[:, :end])
        ctx.scale = scale
        ctx.save_for_backward(q, k, v, *probabilities)
        return torch.cat(out, dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, *probabilities = ctx.saved_tensors
        grad, grad_q, grad_k, grad_v = grad.contiguous(), [], None, None
        for p in reversed(probabilities):  # the last block first, as it has all keys
            end = p.size(-1)
            start = end - p.size(-2)
            g = grad[:, start:end]
            grad_scores = torch._softmax_backward_data(g @ v[:, :end].mT, p, -1, p.dtype)
            block_k, block_v = grad_scores.mT @ q[:, start:end], p.mT @ g
            if grad_k is None:
                grad_k, grad_v = block_k, block_v
            else:
                grad_k[:, :end] += block_k
                grad_v[:, :end] += block_v
            grad_q.append(grad_scores @ k[:, :end])
        return None, None, torch.cat(grad_q[::-1], dim=1).mul_(ctx.scale), grad_k, grad_v


def compiler_problem(device):
    """Why torch.compile() does not work on this machine, such as a missing C++ compiler; None if it works."""
    try:
        torch.compile(lambda x: x.exp() + 1)(torch.zeros(64, device=device))
    except RuntimeError as e:
        return next(filter(None, str(e).splitlines()), type(e).__name__)
    return None


def embedding_dtype(device):
    """Dtype of the embedding table in training: bfloat16 on CUDA, which halves its memory, else float32."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


def chunk_rows(x, vocab_size):
    """Number of tokens per chunk of logits, in the dtype and on the device of `x`."""
    return max(1, (CUDA_LOGITS_BYTES if x.is_cuda else CPU_LOGITS_BYTES) // (vocab_size * x.element_size()))


def capped_cross_entropy_(logits, targets, token_weights, softcap):
    """
    Weighted sum of the cross entropy of soft-capped `logits` (N, V), in nats. Overwrites `logits` with its gradient.

    targets (N,) ids, -1 only where the weight is 0. Capped logits are below `softcap`, so exp() cannot overflow.
    """
    target, scale = targets.clamp(min=0)[:, None], token_weights[:, None]
    # tanh(logits / softcap); torch.tanh() is slower when compiled for a CPU.
    t = 1 - 2 / ((logits.float() * (2 / softcap)).exp() + 1)
    p = (softcap * t).exp()
    z = p.sum(-1, keepdim=True)
    nats = ((z.log() - softcap * t.gather(1, target)) * scale).sum()
    one_hot = torch.arange(logits.size(1), device=logits.device) == target
    # The derivative of c tanh(l / c) is 1 - tanh²(l / c).
    logits.copy_((p / z - one_hot.float()) * scale * (1 - t * t))
    return nats


def trained_rows(targets):
    """
    Indices of all `targets` (N,) other than -1, and of others up to a multiple of CPU_LOSS_ROWS; None = all tokens.

    The multiple is for matrix products, which compile for every shape. On a GPU the result is None, since the number
    of trained tokens would have to be waited for.
    """
    untrained = targets < 0
    if not on_cpu(targets) or not untrained.any():
        return None
    num_rows = -(-int((~untrained).sum()) // CPU_LOSS_ROWS) * CPU_LOSS_ROWS
    return untrained.argsort(stable=True)[:num_rows]


def cross_entropy_sum(x, weight, targets, token_weights, vocab_size, softcap, chunk_loss=capped_cross_entropy_):
    """
    Weighted sum of the cross entropy of soft-capped logits, in nats, without materializing all logits.

    x (N, C) activations; weight (>= vocab_size, C) the head; targets (N,) ids, -1 = ignored; token_weights (N,) or
    None = 1; chunk_loss: capped_cross_entropy_(), perhaps compiled.
    """
    trained = targets >= 0
    token_weights = trained.float() if token_weights is None else trained * token_weights
    return ChunkedCrossEntropy.apply(x, weight, targets, token_weights, vocab_size, softcap, chunk_loss)


class ChunkedCrossEntropy(torch.autograd.Function):
    """
    cross_entropy_sum(). The forward pass also computes the gradients, from each chunk's logits.

    Nothing is computed twice and nothing of size N x V is stored.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, token_weights, vocab_size, softcap, chunk_loss):
        needs_grad, w = any(ctx.needs_input_grad), weight[:vocab_size].to(x.dtype)
        grad_x = torch.empty_like(x) if needs_grad else None
        grad_w = torch.zeros_like(weight, dtype=torch.float32) if needs_grad else None
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        rows = chunk_rows(x, vocab_size)
        block_rows = rows if x.is_cuda else max(1, CPU_BLOCK_ELEMENTS // vocab_size)
        with torch.autocast(x.device.type, enabled=False):
            for i in range(0, len(x), rows):
                chunk = x[i : i + rows]
                logits = chunk @ w.T
                parts = logits, targets[i : i + rows], token_weights[i : i + rows]
                for block in zip(*(t.split(block_rows) for t in parts), strict=True):
                    total = total + chunk_loss(*block, softcap)  # compiled by torch 2.11, += gives gradients of 0
                if needs_grad:  # by now, `logits` is overwritten with its gradient
                    torch.mm(logits, w, out=grad_x[i : i + rows])
                if needs_grad and x.dtype == torch.float32:
                    grad_w[:vocab_size].addmm_(logits.T, chunk)
                elif needs_grad:
                    grad_w[:vocab_size] += logits.T @ chunk
        ctx.save_for_backward(grad_x, grad_w)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        grad_x, grad_w = ctx.saved_tensors
        return grad_x * grad_output, (grad_w * grad_output).to(ctx.weight_dtype), None, None, None, None, None
