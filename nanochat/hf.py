"""
Export of models to Hugging Face transformers, for its NanoChat class: configuration, weights, tokenizer.

    python -m nanochat.hf -i sft out/

Then AutoModelForCausalLM.from_pretrained("out") and AutoTokenizer.from_pretrained("out") load the folder.
"""

from pathlib import Path

from nanochat.cli import add_model_flags, make_parser, parse_args, path, run_script
from nanochat.common import UserError, base_dir, compute_init

# Parts of parameter names, ours -> transformers'.
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
CHAT_TEMPLATE = """
{{- bos_token -}}
{%- set ns = namespace(system='') -%}
{%- for message in messages -%}
    {%- if message.role == 'system' -%}
        {%- set ns.system = message.content + '\n\n' -%}
    {%- elif message.role == 'user' -%}
        {{- '<|user_start|>' + ns.system + message.content + '<|user_end|>' -}}
        {%- set ns.system = '' -%}
    {%- else -%}
        {{- '<|assistant_start|>' + message.content + '<|assistant_end|>' -}}
    {%- endif -%}
{%- endfor -%}
{{- '<|assistant_start|>' if add_generation_prompt else '' -}}
""".strip()


def hf_config(config):
    """Keyword arguments of transformers' NanoChatConfig for a GPTConfig."""
    from nanochat.gpt import NORM_EPS

    sizes = dict(vocab_size=config.vocab_size, hidden_size=config.n_embd, intermediate_size=4 * config.n_embd)
    heads = dict(num_attention_heads=config.n_head, num_key_value_heads=config.n_kv_head)
    layers = dict(num_hidden_layers=config.n_layer, rms_norm_eps=NORM_EPS)
    return sizes | heads | layers | {"max_position_embeddings": config.sequence_len}


def hf_weights(model):
    """The state dict for NanoChatForCausalLM. Shares memory with `model`; omits the padding rows of the vocabulary."""
    weights = {}
    for name, p in model.state_dict().items():
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        weights[name] = p[: model.config.vocab_size] if name in ("model.embed_tokens.weight", "lm_head.weight") else p
    return weights


def export(model, tokenizer, folder):
    """
    Write model and tokenizer to `folder`, for from_pretrained(). Logits and token ids are the same as ours.

    One difference: text such as "<|bos|>" becomes a special token in transformers, but ordinary text in our tokenizer.
    """
    from transformers import GenerationConfig, NanoChatConfig, NanoChatForCausalLM, PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    bos, end = tokenizer.get_bos_token_id(), tokenizer.encode_special("<|assistant_end|>")
    dtype = model.lm_head.weight.dtype
    ids = dict(bos_token_id=bos, eos_token_id=end, pad_token_id=end)
    hf = NanoChatForCausalLM(NanoChatConfig(**hf_config(model.config), **ids, dtype=dtype)).to(dtype)
    hf.load_state_dict(hf_weights(model))
    hf.generation_config = GenerationConfig(**ids | {"eos_token_id": [end, bos]})
    hf.save_pretrained(folder)
    ranks = str(base_dir() / "tokenizer" / "ranks.tiktoken")
    special = sorted(tokenizer.get_special_tokens(), key=tokenizer.encode_special)
    converted = TikTokenConverter(ranks, pattern=tokenizer.pattern, extra_special_tokens=special).converted()
    names = dict(bos_token="<|bos|>", eos_token="<|assistant_end|>", pad_token="<|assistant_end|>")
    fast = PreTrainedTokenizerFast(tokenizer_object=converted, chat_template=CHAT_TEMPLATE, **names)
    fast.save_pretrained(folder)


def main(argv=None):
    parser = make_parser("nanochat.hf", __doc__)
    add_model_flags(parser)
    parser.add_argument("folder", type=path, help="output folder; must not exist")
    args = parse_args(parser, argv)
    if Path(args.folder).exists():
        raise UserError(f"{args.folder} already exists; choose a new folder")
    try:
        import transformers  # noqa: F401
    except ImportError as e:
        raise UserError("transformers is not installed: pip install transformers") from e
    from nanochat.checkpoint_manager import load_model

    compute = compute_init("cpu", args.dtype or "float32")
    model, tokenizer, _ = load_model(args.source, compute, "eval", args.model_tag, args.step)
    export(model, tokenizer, args.folder)
    print(f"wrote {args.folder}")


if __name__ == "__main__":
    run_script(main)
