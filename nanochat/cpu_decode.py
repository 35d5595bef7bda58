"""
One decoding step on a CPU, with as few operations as may be.

A step reads every weight once, and the memory sets its pace; but the hundreds of small operations of the model's own
forward pass would take as long again. So queries, keys and values come from one matrix, and the stream between the
layers and the attention are in float32, which CPUs are quicker with than with bfloat16.
"""

import math

import torch
import torch.nn.functional as F

from nanochat.gpt import SOFTCAP


def project(x, weight):
    """F.linear. For few rows in float32 a wide product reads the weights twice as fast from the other side."""
    B, (n_out, n_in) = len(x), weight.shape
    if x.dtype != torch.float32 or B > 4 or n_out < n_in:
        return F.linear(x, weight)
    x = torch.cat((x, x)) if B == 1 else x  # not of a single row, which takes the slow way again
    return (weight @ x.t()).t()[:B]


def norm(x):
    """gpt.norm, of float32 and in fewer operations."""
    return F.normalize(x, dim=-1) * math.sqrt(x.size(-1))


class CPUDecoder:
    """Steps of `model`, a GPT on a CPU that is not trained any more: its weights are from here on views of ours."""

    def __init__(self, model):
        c = self.config = model.config
        self.model, self.layers = model, []
        for block in model.transformer.h:
            attn = block.attn
            parts = [attn.c_q, attn.c_k, attn.c_v]
            qkv = torch.cat([part.weight.data for part in parts])
            for part, view in zip(parts, qkv.split([part.out_features for part in parts]), strict=True):
                part.weight.data = view  # so that nothing is held twice
            self.layers.append((qkv, attn.c_proj.weight, block.mlp.c_fc.weight, block.mlp.c_proj.weight))
        self.sizes = [(c.n_head + c.n_kv_head) * c.head_dim, c.n_kv_head * c.head_dim]

    @torch.inference_mode()
    def __call__(self, ids, cache):
        """Logits (B, V) in float32 after ids (B,), which join `cache`."""
        c, (n_qk, n_v) = self.config, self.sizes
        B, dtype = len(ids), self.layers[0][0].dtype
        positions, mask = cache.begin(1)
        cos, sin = (table[positions] for table in self.model.rotary(cache.max_position(1)))  # (B, 1, D / 2)
        cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, -sin), -1)
        gqa = c.n_head != c.n_kv_head
        x = norm(F.embedding(ids, self.model.transformer.wte.weight).float())
        for layer, (w_qkv, w_proj, w_up, w_down) in enumerate(self.layers):
            qk, v = project(norm(x).to(dtype), w_qkv).float().split((n_qk, n_v), -1)
            qk = qk.view(B, -1, c.head_dim)
            qk = torch.addcmul(qk * cos, qk.roll(c.head_dim // 2, -1), sin)
            q, k = norm(qk).unsqueeze(2).split((c.n_head, c.n_kv_head), 1)
            k, v = cache.insert(layer, k, v.view(B, -1, 1, c.head_dim))
            y = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=gqa)
            x = x + project(y.view(B, -1).to(dtype), w_proj)
            up = project(norm(x).to(dtype), w_up)
            x = x + project(up.relu_().square_(), w_down)
        cache.advance(1)
        logits = project(norm(x).to(dtype), self.model.lm_head.weight)[:, : c.vocab_size].float()
        return logits.div_(SOFTCAP).tanh_().mul_(SOFTCAP)
