"""
The Transformer: rotary positions, QK-norm, ReLU² MLP, grouped-query attention, untied embeddings, soft-capped logits.

No biases, no norm weights. The head and its cross entropy are computed in chunks of tokens, so that the logits of a
whole batch never exist at once. Weights are made on the meta device: GPT(config) costs nothing until init_weights().
"""

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat import ops
from nanochat.adamw import AdamW
from nanochat.common import UserError
from nanochat.muon import Muon

SOFTCAP = 15.0  # logits are 15 tanh(logits / 15), so they stay within (-15, 15)
NORM_EPS = 1.1920929e-07  # float32 machine epsilon, torch's default; explicit, since older torch uses the input's dtype
VOCAB_MULTIPLE = (
    64  # rows of wte and lm_head are padded up to it: aligned matmuls, and any usual world size divides them
)
CHUNK_ELEMENTS = 1 << 21  # logits of one chunk on CPU: 8 MiB of float32 stay in the cache
CUDA_CHUNK_ELEMENTS = 1 << 29  # on GPU: 2 GiB of float32


@dataclass(frozen=True)
class GPTConfig:
    """Shape of the model; stored whole in every checkpoint as `model_config`."""

    sequence_len: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 6  # query heads
    n_kv_head: int = 6  # key and value heads (grouped-query attention when fewer)
    n_embd: int = 768

    def __post_init__(self):
        for name, value in asdict(self).items():
            if not isinstance(value, int) or value < 1:
                raise UserError(f"{name}={value!r}: expected a whole number of at least 1")
        if self.n_embd % self.n_head or (self.n_embd // self.n_head) % 2:
            raise UserError(f"n_embd={self.n_embd} does not split into n_head={self.n_head} heads of even size")
        if self.n_head % self.n_kv_head:
            raise UserError(f"n_head={self.n_head} is not a multiple of n_kv_head={self.n_kv_head}")

    @classmethod
    def from_depth(cls, depth, sequence_len, vocab_size):
        """The one dial of the recipe: 64 x depth wide, heads of about 128 (the next size that divides the width)."""
        if depth < 1:
            raise UserError(f"--depth={depth}: expected at least 1")
        n_embd = 64 * depth
        n_head = math.ceil(n_embd / 128)
        while n_embd % n_head or (n_embd // n_head) % 8:
            n_head += 1
        return cls(sequence_len, vocab_size, depth, n_head, n_head, n_embd)

    @property
    def head_dim(self):
        return self.n_embd // self.n_head

    @property
    def padded_vocab_size(self):
        return math.ceil(self.vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def norm(x):
    """RMSNorm over the last dimension, without a weight (Zhang and Sennrich 2019)."""
    if x.device.type == "cpu":
        return ops.RMSNorm.apply(x, NORM_EPS)
    return F.rms_norm(x, (x.size(-1),), eps=NORM_EPS)


def rotate(x, cos, sin):
    """Rotary embedding by minus theta, halves split. x (B, T, H, D); cos, sin (1 or B, T, 1, D/2) in float32."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1).to(x.dtype)


class CausalSelfAttention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer = layer
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        self.c_q = nn.Linear(config.n_embd, self.n_head * self.head_dim, bias=False)
        self.c_k = nn.Linear(config.n_embd, self.n_kv_head * self.head_dim, bias=False)
        self.c_v = nn.Linear(config.n_embd, self.n_kv_head * self.head_dim, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def keys_and_values(self, x, cos, sin):
        """Those of x (B, T, C), each (B, Hkv, T, D)."""
        k, v = (linear(x).unflatten(-1, (self.n_kv_head, self.head_dim)) for linear in (self.c_k, self.c_v))
        return norm(rotate(k, cos, sin)).transpose(1, 2), v.transpose(1, 2)

    def forward(self, x, cos, sin, kv_cache, mask):
        B, T, C = x.shape
        q = self.c_q(x).view(B, T, self.n_head, self.head_dim)
        q = norm(rotate(q, cos, sin)).transpose(1, 2)
        k, v = self.keys_and_values(x, cos, sin)
        gqa, causal = self.n_head != self.n_kv_head, mask is None and T > 1
        if kv_cache is not None:
            held = kv_cache.insert(self.layer, k, v)
            if not causal:
                k, v = held
                q = q.to(k.dtype)
        if x.device.type == "cpu" and not gqa and (kv_cache is None or causal):
            y = ops.causal_attention(q, k, v)
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=gqa)
        return self.c_proj(y.to(x.dtype).transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x):
        x = self.c_fc(x)
        return self.c_proj(ops.SquaredReLU.apply(x) if x.device.type == "cpu" else F.relu(x).square())


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.attn = CausalSelfAttention(config, layer)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, kv_cache, mask):
        x = x + self.attn(norm(x), cos, sin, kv_cache, mask)
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.grad_checkpoint = False  # recompute each block in the backward pass: less memory, about a third more time
        self._rotary = None  # (cos, sin), each (positions, head_dim / 2); grows with the positions asked for
        with torch.device("meta"):
            self.transformer = nn.ModuleDict(
                {
                    # nn.Embedding would draw its weights here, and on meta that takes as long as importing torch.
                    "wte": nn.Embedding.from_pretrained(
                        torch.empty(config.padded_vocab_size, config.n_embd), freeze=False
                    ),
                    "h": nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
                }
            )
            self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)

    def allocate(self, device):
        """Give the weights memory on `device`, in the dtypes that training keeps there, and no values yet."""
        # What to_empty() does, but from the meta device that one imports sympy: a second and more at every start.
        self._apply(lambda p: torch.empty(p.shape, dtype=p.dtype, device=device))
        if torch.device(device).type == "cuda":
            self.transformer.wte.to(dtype=torch.bfloat16)  # halves the largest table, and AdamW bears it

    def init_weights(self, device):
        """Materialise on `device` and draw the weights from torch's global generator."""
        self.allocate(device)
        for name, p in self.named_parameters():
            if name == "transformer.wte.weight":
                nn.init.normal_(p)
            elif name.endswith("c_proj.weight") or name == "lm_head.weight":
                nn.init.zeros_(p)  # every block starts as the identity, every token equally likely
            else:  # keeps activations' scale whatever the aspect ratio (spectral condition, Yang et al. 2023)
                fan_out, fan_in = p.shape
                nn.init.normal_(p, std=min(1.0, math.sqrt(fan_out / fan_in)) / math.sqrt(fan_in))

    def get_device(self):
        return self.transformer.wte.weight.device

    def num_params(self):
        return sum(p.numel() for p in self.parameters())

    def estimate_flops(self):
        """FLOPs per trained token, forward and backward (PaLM, Chowdhery et al. 2022, appendix B; no embedding)."""
        c = self.config
        matmul_params = self.num_params() - self.transformer.wte.weight.numel()
        return 6 * matmul_params + 12 * c.n_layer * c.n_head * c.head_dim * c.sequence_len

    def rotary(self, length):
        """cos and sin tables of at least `length` positions, float32 so that any precision sees the same angles."""
        device = self.get_device()
        if self._rotary is None or self._rotary[0].size(0) < length or self._rotary[0].device != device:
            length = max(self.config.sequence_len, 1 << (length - 1).bit_length())
            dim = self.config.head_dim
            with torch.inference_mode(False):  # a table first made while generating must serve training too
                inv_freq = 1.0 / 10000 ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)
                angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), inv_freq)
                self._rotary = angles.cos(), angles.sin()
        return self._rotary

    def hidden(self, idx, kv_cache=None, fill_only=False):
        """
        Final normed activations (B, T, C) of token ids (B, T), before the head.

        With `fill_only` the tokens join the cache, the rest of the last layer is left out, and the result is None.
        """
        T = idx.size(1)
        if kv_cache is None:
            positions, mask = slice(0, T), None
            cos, sin = (t[None, positions, None] for t in self.rotary(T))
        else:
            positions, mask = kv_cache.begin(T)
            cos, sin = (t[positions][:, :, None] for t in self.rotary(kv_cache.max_position(T)))
        x = self.transformer.wte(idx)
        if torch.is_autocast_enabled(x.device.type):  # the residual stream too, else every norm reads float32
            x = x.to(torch.get_autocast_dtype(x.device.type))
        x = norm(x)
        for block in self.transformer.h:
            if fill_only and block is self.transformer.h[-1]:
                kv_cache.insert(block.attn.layer, *block.attn.keys_and_values(norm(x), cos, sin))
            elif self.grad_checkpoint and torch.is_grad_enabled():
                x = torch.utils.checkpoint.checkpoint(block, x, cos, sin, None, None, use_reentrant=False)
            else:
                x = block(x, cos, sin, kv_cache, mask)
        if kv_cache is not None:
            kv_cache.advance(T)
        return None if fill_only else norm(x)

    def logits(self, x):
        """Soft-capped logits (..., V) in float32 of final activations (..., C)."""
        return SOFTCAP * torch.tanh(self.lm_head(x)[..., : self.config.vocab_size].float() / SOFTCAP)

    def forward(self, idx, targets=None, kv_cache=None, loss_reduction="mean", last_only=False, weights=None):
        """
        Logits (B, T, V) in float32 of token ids `idx` (B, T), or (B, 1, V) with `last_only`; given `targets` (B, T),
        -1 = not trained on, the cross entropy in nats: its "mean" or "sum" over the trained tokens, or "none": (B, T).
        With `weights` (B, T) a sum counts each token's as many times.
        """
        x = self.hidden(idx, kv_cache)
        if targets is None:
            return self.logits(x[:, -1:] if last_only else x)
        assert weights is None or loss_reduction == "sum", loss_reduction
        x, flat = x.flatten(0, 1), targets.flatten()
        if loss_reduction == "none":
            return self._token_losses(x, flat).view_as(targets)
        counts = (flat >= 0).float() if weights is None else (flat >= 0) * weights.flatten()
        if x.device.type == "cpu":  # elsewhere to ask which are trained on costs more than it saves
            trained = flat >= 0
            x, flat, counts = x[trained], flat[trained], counts[trained]
        total = ChunkedCrossEntropy.apply(x, self.lm_head.weight, flat, counts, self.config.vocab_size)
        return total / (flat >= 0).sum().clamp(min=1) if loss_reduction == "mean" else total

    def _token_losses(self, x, targets):
        """Cross entropy of each token (N,), 0 where the target is -1; chunked, and differentiable at full memory."""
        losses = []
        for xc, tc in zip(*(t.split(chunk_rows(x, self.config.vocab_size)) for t in (x, targets)), strict=True):
            losses.append(F.cross_entropy(self.logits(xc), tc, ignore_index=-1, reduction="none"))
        return torch.cat(losses)

    def setup_optimizers(
        self, unembedding_lr=0.004, embedding_lr=0.2, matrix_lr=0.02, weight_decay=0.0, ns_dtype=torch.bfloat16
    ):
        """
        [AdamW for head and embedding, Muon for the blocks' matrices]; AdamW's rates are for 768 wide, and scaled.

        `ns_dtype` is of Muon's Newton-Schulz: float32 keeps a float32 run the same on any number of processes.
        """
        scale = (self.config.n_embd / 768) ** -0.5
        head, wte = self.lm_head.weight, self.transformer.wte.weight
        groups = [
            {"params": [head], "lr": unembedding_lr * scale},
            {"params": [wte], "lr": embedding_lr * scale},
        ]
        adamw = AdamW(groups, betas=(0.8, 0.95), eps=1e-10, weight_decay=weight_decay)
        muon = Muon(self.transformer.h.parameters(), lr=matrix_lr, momentum=0.95, ns_dtype=ns_dtype)
        for group in adamw.param_groups + muon.param_groups:
            group["initial_lr"] = group["lr"]
        return [adamw, muon]

    @torch.inference_mode()
    def generate(self, tokens, max_tokens, temperature=1.0, top_k=None, seed=42):
        """Yield next tokens after the ids `tokens`, recomputing everything each time: the engine's slow, plain twin."""
        ids = torch.tensor([tokens], device=self.get_device())
        rng = torch.Generator(device=self.get_device()).manual_seed(seed)
        for _ in range(max_tokens):
            logits = self(ids, last_only=True)[:, -1]
            if top_k:
                kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                logits = logits.masked_fill(logits < kth, -torch.inf)
            if temperature > 0:
                probs = F.softmax(logits / temperature, dim=-1)
                next_id = torch.multinomial(probs, 1, generator=rng)
            else:
                next_id = logits.argmax(-1, keepdim=True)
            ids = torch.cat((ids, next_id), dim=1)
            yield next_id.item()


def chunk_rows(x, vocab_size):
    """How many tokens' logits are computed at a time."""
    return max(1, (CUDA_CHUNK_ELEMENTS if x.is_cuda else CHUNK_ELEMENTS) // vocab_size)


class ChunkedCrossEntropy(torch.autograd.Function):
    """
    Sum of `counts` (N,) times the cross entropy of soft-capped logits, x (N, C) and weight (>= V, C), against targets
    (N,), where a count of 0 leaves one out.

    Gradients are made chunk by chunk in the forward pass, while a chunk's logits are at hand, so nothing is computed
    twice and nothing of size N x V is kept. Since capped logits stay below 15, exp() needs no maximum subtracted.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, counts, vocab_size):
        w = weight[:vocab_size].to(x.dtype)
        want_x, want_w = ctx.needs_input_grad[:2]
        grad_x = torch.empty_like(x) if want_x else None
        grad_w = torch.zeros_like(weight, dtype=torch.float32) if want_w else None
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        rows = chunk_rows(x, vocab_size)
        with torch.autocast(x.device.type, enabled=False):
            for i in range(0, x.size(0), rows):
                xc, tc, count = x[i : i + rows], targets[i : i + rows].clamp(min=0)[:, None], counts[i : i + rows]
                t = (xc @ w.T).float().div_(SOFTCAP).tanh_()
                p = (t * SOFTCAP).exp_()
                z = p.sum(-1, keepdim=True)
                total += ((z.log() - SOFTCAP * t.gather(1, tc)).squeeze(1) * count).sum()
                if not (want_x or want_w):
                    continue
                p *= count[:, None] / z
                p.scatter_add_(1, tc, -count[:, None])
                g = p.mul_(1 - t.square_()).to(x.dtype)  # through the cap: d/dl 15 tanh(l / 15) = 1 - tanh²
                if want_x:
                    torch.mm(g, w, out=grad_x[i : i + rows])
                if want_w:
                    grad_w[:vocab_size] += g.T @ xc
        ctx.save_for_backward(grad_x, grad_w)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, grad_output):
        grad_x, grad_w = ctx.saved_tensors
        grad_x = None if grad_x is None else grad_x * grad_output.to(grad_x.dtype)
        grad_w = None if grad_w is None else (grad_w * grad_output).to(ctx.weight_dtype)
        return grad_x, grad_w, None, None, None
