"""
The Transformer: rotary embeddings, QK-norm, squared ReLU, grouped-query attention, untied embeddings, capped logits.

Linear layers have no biases, norms no weights. The loss is computed in chunks of tokens, so the logits of a batch are
never materialized. GPT(config) allocates nothing: weights are on the meta device until allocate() or init_weights().
"""

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat import ops
from nanochat.adamw import AdamW
from nanochat.common import require
from nanochat.muon import Muon

SOFTCAP = 15.0  # logits are 15 tanh(logits / 15), so they stay within (-15, 15)
NORM_EPS = 1.1920929e-07  # float32 epsilon; older versions of torch default to the epsilon of the input's dtype
VOCAB_MULTIPLE = 64  # rows of wte and lm_head are padded to a multiple, for aligned matmuls and equal shards


@dataclass(frozen=True)
class GPTConfig:
    """The model's shape; stored in every checkpoint as `model_config`."""

    sequence_len: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 6  # query heads
    n_kv_head: int = 6  # key and value heads (grouped-query attention when fewer)
    n_embd: int = 768

    def __post_init__(self):
        for name, value in asdict(self).items():
            require(isinstance(value, int) and value >= 1, f"{name}={value!r}: expected a whole number of at least 1")
        problem = f"n_embd={self.n_embd} does not split into n_head={self.n_head} heads of even size"
        require(self.n_embd % (2 * self.n_head) == 0, problem)
        problem = f"n_head={self.n_head} is not a multiple of n_kv_head={self.n_kv_head}"
        require(self.n_head % self.n_kv_head == 0, problem)

    @classmethod
    def from_depth(cls, depth, sequence_len, vocab_size):
        """Config of a model of `depth` layers: width 64 x depth, head size at most 128 and a multiple of 8."""
        require(depth >= 1, f"--depth={depth}: expected at least 1")
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
    """RMSNorm without a weight (Zhang and Sennrich 2019)."""
    return F.rms_norm(x, (x.size(-1),), eps=NORM_EPS)


def rotate(x, cos, sin):
    """Rotary embedding by angle -theta on dimensions (i, i + D/2). x (B, T, H, D); cos, sin ([B,] T, 1, D/2)."""
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
        """k and v of x (B, T, C), each (B, Hkv, T, D)."""
        k, v = (linear(x).unflatten(-1, (self.n_kv_head, self.head_dim)) for linear in (self.c_k, self.c_v))
        return norm(rotate(k, cos, sin)).transpose(1, 2), v.transpose(1, 2)

    def forward(self, x, cos, sin, kv_cache, mask):
        B, T, C = x.shape
        q = norm(rotate(self.c_q(x).view(B, T, self.n_head, self.head_dim), cos, sin)).transpose(1, 2)
        k, v = self.keys_and_values(x, cos, sin)
        causal = kv_cache is None or mask is None and T > 1
        if kv_cache is not None:
            cached = kv_cache.insert(self.layer, k, v)
            if not causal:
                k, v = cached
                q = q.to(k.dtype)
        return self.c_proj(ops.attention(q, k, v, mask, causal).to(x.dtype).transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x):
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.attn = CausalSelfAttention(config, layer)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, kv_cache, mask, rows=None):
        x = x + self.attn(norm(x), cos, sin, kv_cache, mask)
        x = x if rows is None else x.flatten(0, 1)[rows]
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.document_start = None  # id of a document's first token; if set, attention stays within documents
        self.grad_checkpoint = False  # recompute blocks in the backward pass: less memory, a third slower
        self.block_forward, self.chunk_loss = Block.forward, ops.capped_cross_entropy_  # until compile()
        self._rotary = None  # (cos, sin), each (positions, head_dim / 2); grows on demand
        with torch.device("meta"):
            # nn.Embedding() would initialize its weights, which on meta takes as long as importing torch.
            wte = nn.Embedding.from_pretrained(torch.empty(config.padded_vocab_size, config.n_embd), freeze=False)
            blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
            self.transformer = nn.ModuleDict({"wte": wte, "h": blocks})
            self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)

    def allocate(self, device):
        """Allocate uninitialized weights on `device`, in the dtypes that training uses there."""
        # The same as to_empty(), but that imports sympy for meta tensors, which takes more than a second.
        self._apply(lambda p: torch.empty(p.shape, dtype=p.dtype, device=device))
        self.transformer.wte.to(dtype=ops.embedding_dtype(device))

    def init_weights(self, device=None):
        """Allocate the weights on `device` (default: theirs, or CPU) and draw them from torch's global generator."""
        self.allocate(device or ("cpu" if self.get_device().type == "meta" else self.get_device()))
        for name, p in self.named_parameters():
            if name == "transformer.wte.weight":
                nn.init.normal_(p)
            elif name.endswith("c_proj.weight") or name == "lm_head.weight":
                nn.init.zeros_(p)  # blocks start as the identity, logits as zero
            else:  # activations keep their scale for any aspect ratio (spectral condition, Yang et al. 2023)
                fan_out, fan_in = p.shape
                nn.init.normal_(p, std=min(1.0, math.sqrt(fan_out / fan_in)) / math.sqrt(fan_in))

    @torch.no_grad()
    def init_induction(self):
        """
        Give a new model an induction circuit, which predicts the token that followed the current one last time.

        The first head of the first layer attends to the previous token. The first head of the second layer attends to
        tokens that follow an occurrence of the current one (Elhage et al. 2021). Training forms such heads too, but
        late (Olsson et al. 2022). The scales are the best of a few on random tokens. UserError for a single layer.
        """
        require(self.config.n_layer > 1, "an induction circuit needs two layers: give --depth=2 or more")
        size, width, device = self.config.head_dim, self.config.n_embd, self.get_device()
        previous, match = (block.attn for block in self.transformer.h[:2])
        wte, head = self.transformer.wte.weight, self.lm_head.weight
        directions, copied, output = (nn.init.orthogonal_(torch.empty(size, width, device=device)) for _ in range(3))
        shared, directions[0] = directions[0].clone(), 0
        value, written = directions.chunk(2)
        copied -= copied @ written.T @ written
        head.copy_(5 / size * wte.float() @ copied.T @ output)
        match.c_v.weight[:size], match.c_proj.weight[:, :size] = copied, output.T
        # A part that all embeddings share lets scores depend on the distance alone: fast rotations favor distance 1.
        wte += 0.5 * math.sqrt(width) * shared
        query = (torch.arange(size, device=device) < 6).float()
        previous.c_q.weight[:size] = torch.outer(query, shared)
        previous.c_k.weight[:size] = torch.outer(rotate(query, *(t[1] for t in self.rotary(2))), shared)
        # Slow rotations hardly depend on the distance.
        slow = (torch.arange(size, device=device) % (size // 2) >= size // 4).nonzero()[:, 0]
        previous.c_v.weight[slow], previous.c_proj.weight[:, slow] = value, 2 * written.T
        match.c_q.weight[:size] = match.c_k.weight[:size] = 0
        match.c_q.weight[slow], match.c_k.weight[slow] = value, written

    def compile(self):
        """
        Compile the elementwise operations between matrix products, for passes without a cache.

        One graph serves all blocks, lengths and numbers of rows (a single row has its own). The last block has its own
        if it omits tokens, and evaluations have theirs.
        """
        fullgraph = self.get_device().type != "cpu"
        if not fullgraph:  # attention would be compiled anew for every length; a decorator would slow down imports
            ops.causal_attention = torch.compiler.disable(ops.causal_attention)
            # Squared ReLU and QK-norm are recomputed in the backward pass: a quarter less activation memory.
            torch._functorch.config.activation_memory_budget = 0.8
        self.block_forward = torch.compile(Block.forward, dynamic=True, fullgraph=fullgraph)
        # dynamic=None: with a variable vocabulary size, it would be up to three times as slow.
        self.chunk_loss = torch.compile(ops.capped_cross_entropy_, fullgraph=True)

    def get_device(self):
        return self.transformer.wte.weight.device

    def num_params(self):
        return sum(p.numel() for p in self.parameters())

    def estimate_flops(self):
        """FLOPs per token, forward and backward, without the embedding (PaLM, Chowdhery et al. 2022, appendix B)."""
        c = self.config
        matmul_params = self.num_params() - self.transformer.wte.weight.numel()
        return 6 * matmul_params + 12 * c.n_layer * c.n_head * c.head_dim * c.sequence_len

    def rotary(self, length):
        """cos and sin tables of at least `length` positions; float32 in every precision."""
        device = self.get_device()
        if self._rotary is None or self._rotary[0].size(0) < length or self._rotary[0].device != device:
            length = max(self.config.sequence_len, 1 << (length - 1).bit_length())
            dim = self.config.head_dim
            with torch.inference_mode(False):  # a table made during inference must work in training too
                inv_freq = 1.0 / 10000 ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)
                angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), inv_freq)
                self._rotary = angles.cos(), angles.sin()
        return self._rotary

    def hidden(self, idx, kv_cache=None, fill_only=False, rows=None):
        """
        Activations (B, T, C) of token ids (B, T) after the last norm, before the head.

        Given `rows` (N,), indices of tokens in the flattened batch: (N, C), without the last MLP for the other tokens.
        `fill_only` writes keys and values to the cache, skips the rest of the last layer, and returns None.
        """
        T, x = idx.size(1), self.transformer.wte(idx)
        if torch.is_autocast_enabled(x.device.type):  # casts the residual stream too; norms then read half the bytes
            x = x.to(torch.get_autocast_dtype(x.device.type))
        x = norm(x)
        if kv_cache is None:
            # Copies, since a compiled graph would depend on the length of the table that a view belongs to.
            cos, sin = (t[:T, None].clone() for t in self.rotary(T))
            mask = None if self.document_start is None else ops.document_mask(idx == self.document_start, x.dtype)
        else:
            positions, mask = kv_cache.begin(T)
            cos, sin = (t[positions][:, :, None] for t in self.rotary(kv_cache.max_position(T)))
        for block in self.transformer.h:
            last = block is self.transformer.h[-1]
            args = x, cos, sin, kv_cache, mask, rows if last else None
            if fill_only and last:
                kv_cache.insert(block.attn.layer, *block.attn.keys_and_values(norm(x), cos, sin))
            elif kv_cache is not None:
                x = block(*args)
            elif self.grad_checkpoint and torch.is_grad_enabled():
                x = torch.utils.checkpoint.checkpoint(self.block_forward, block, *args, use_reentrant=False)
            else:
                x = self.block_forward(block, *args)
        if kv_cache is not None:
            kv_cache.advance(T)
        return None if fill_only else norm(x)

    def logits(self, x):
        """Soft-capped float32 logits (..., V) of activations (..., C) from hidden()."""
        return SOFTCAP * torch.tanh(self.lm_head(x)[..., : self.config.vocab_size].float() / SOFTCAP)

    def forward(self, idx, targets=None, kv_cache=None, loss_reduction="mean", last_only=False, weights=None):
        """
        Logits (B, T, V), float32, of token ids `idx` (B, T); (B, 1, V) with `last_only`.

        Given `targets` (B, T), -1 = not trained on: the cross entropy in nats, as its "mean" or "sum" over trained
        tokens, or per token (B, T) with "none". `weights` (B, T) multiply the tokens' losses in a "sum".
        """
        if targets is None:
            x = self.hidden(idx, kv_cache)
            return self.logits(x[:, -1:] if last_only else x)
        assert weights is None or loss_reduction == "sum", loss_reduction
        flat, weights = targets.flatten(), None if weights is None else weights.flatten()
        if loss_reduction == "none":
            return self.token_losses(self.hidden(idx, kv_cache).flatten(0, 1), flat).view_as(targets)
        num_trained, rows = (flat >= 0).sum(), ops.trained_rows(flat)
        x = self.hidden(idx, kv_cache, rows=rows).view(-1, self.config.n_embd)
        if rows is not None:
            flat, weights = flat[rows], None if weights is None else weights[rows]
        head, size = self.lm_head.weight, self.config.vocab_size
        total = ops.cross_entropy_sum(x, head, flat, weights, size, SOFTCAP, self.chunk_loss)
        return total / num_trained.clamp(min=1) if loss_reduction == "mean" else total

    def token_losses(self, x, targets):
        """Cross entropy of each token (N,), 0 where the target is -1. Backward keeps the logits of all chunks."""
        rows = max(1, ops.chunk_rows(x, self.config.vocab_size) // 4)  # of float32 logits, and copies of them
        chunks = zip(x.split(rows), targets.split(rows), strict=True)
        return torch.cat([F.cross_entropy(self.logits(c), t, ignore_index=-1, reduction="none") for c, t in chunks])

    def setup_optimizers(
        self,
        unembedding_lr=0.004,
        embedding_lr=0.2,
        matrix_lr=0.02,
        weight_decay=0.0,
        ns_dtype=torch.bfloat16,
        adam_betas=(0.8, 0.95),
        muon_beta2=0.0,
    ):
        """
        [AdamW for head and embedding, Muon for the blocks' matrices].

        AdamW's learning rates are for width 768; they are scaled by (n_embd / 768) ** -0.5. `ns_dtype` is the precision
        of Muon's Newton-Schulz iteration; float32 makes a float32 run independent of the world size.
        """
        tables = (self.lm_head.weight, unembedding_lr), (self.transformer.wte.weight, embedding_lr)
        groups = [{"params": [table], "lr": lr * (self.config.n_embd / 768) ** -0.5} for table, lr in tables]
        adamw = AdamW(groups, betas=adam_betas, eps=1e-10, weight_decay=weight_decay)
        muon = Muon(self.transformer.h.parameters(), lr=matrix_lr, beta2=muon_beta2, ns_dtype=ns_dtype)
        for group in adamw.param_groups + muon.param_groups:
            group["initial_lr"] = group["lr"]
        return [adamw, muon]

    @torch.inference_mode()
    def generate(self, tokens, max_tokens, temperature=1.0, top_k=None, seed=42):
        """Yield the tokens after the ids `tokens`, without a cache: the reference that the engine is tested against."""
        ids = torch.tensor([tokens], device=self.get_device())
        rng = torch.Generator(device=self.get_device()).manual_seed(seed)
        for _ in range(max_tokens):
            logits = self(ids, last_only=True)[:, -1]
            if top_k:
                kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                logits = logits.masked_fill(logits < kth, -torch.inf)
            if temperature > 0:
                next_id = torch.multinomial(F.softmax(logits / temperature, dim=-1), 1, generator=rng)
            else:
                next_id = logits.argmax(-1, keepdim=True)
            ids = torch.cat((ids, next_id), dim=1)
            yield next_id.item()
