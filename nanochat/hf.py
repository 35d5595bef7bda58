"""Our models in the form of transformers' NanoChat class: its configuration, and weights under its names."""

from nanochat.gpt import NORM_EPS

NAMES = {
    "transformer.wte": "model.embed_tokens",
    "transformer.h": "model.layers",
    "attn.c_q": "self_attn.q_proj",
    "attn.c_k": "self_attn.k_proj",
    "attn.c_v": "self_attn.v_proj",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def hf_config(config):
    """The fields of a NanoChatConfig for a GPTConfig, as a dict."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "intermediate_size": 4 * config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "max_position_embeddings": config.sequence_len,
        "rms_norm_eps": NORM_EPS,
    }


def hf_weights(model):
    """The state dict of NanoChatForCausalLM: shares memory with `model`, without the rows that pad its tables."""
    weights = {}
    for name, p in model.state_dict().items():
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        weights[name] = p[: model.config.vocab_size] if name in ("model.embed_tokens.weight", "lm_head.weight") else p
    return weights
