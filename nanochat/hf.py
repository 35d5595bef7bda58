"""
Export of models to Hugging Face transformers, for its NanoChat class: configuration, weights, tokenizer.

    python -m nanochat.hf -i sft out/

Then AutoModelForCausalLM.from_pretrained("out") and AutoTokenizer.from_pretrained("out") load the folder. The weights
are written in float32 unless --dtype says otherwise.
"""

import os
import shutil
from pathlib import Path

from nanochat.cli import add_model_flags, make_parser, parse_args, path, run_script
from nanochat.cluster import compute_init
from nanochat.common import UserError, base_dir, require

HERE = Path(__file__).parent
# Parts of parameter names, ours -> transformers'.
NAMES = {"transformer.wte": "model.embed_tokens", "transformer.h": "model.layers"}
NAMES |= {"attn.c_q": "self_attn.q_proj", "attn.c_k": "self_attn.k_proj", "attn.c_v": "self_attn.v_proj"}
NAMES |= {"attn.c_proj": "self_attn.o_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
# The chat template writes this noncharacter into each "<|" of a message, so that the name of a special token stays
# text. The tokenizer removes it again.
ESCAPE = "\ufdd0"


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
    """Write model, tokenizer and model card to `folder`, for from_pretrained(). Logits and ids are the same as ours."""
    from tokenizers.normalizers import Replace
    from transformers import GenerationConfig, NanoChatConfig, NanoChatForCausalLM, PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    folder, config = Path(folder), model.config
    bos, end = tokenizer.get_bos_token_id(), tokenizer.encode_special("<|assistant_end|>")
    dtype = model.lm_head.weight.dtype
    # The pad token is <|bos|>: padding is not trained on, but the end token must be. The model's configuration has no
    # pad token, whose embedding would be frozen.
    ids = dict(bos_token_id=bos, eos_token_id=end, pad_token_id=None)
    hf = NanoChatForCausalLM(NanoChatConfig(**hf_config(config), **ids, dtype=dtype)).to(dtype)
    hf.load_state_dict(hf_weights(model))
    hf.generation_config = GenerationConfig(bos_token_id=bos, eos_token_id=[end, bos], pad_token_id=bos)
    hf.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):  # only the owner could read them
        shutil.copymode(folder / "config.json", file)
    ranks = str(base_dir() / "tokenizer" / "ranks.tiktoken")
    special = sorted(tokenizer.get_special_tokens(), key=tokenizer.encode_special)
    converted = TikTokenConverter(ranks, pattern=tokenizer.pattern, extra_special_tokens=special).converted()
    converted.normalizer = Replace(ESCAPE, "")
    names = dict(bos_token="<|bos|>", eos_token="<|assistant_end|>", pad_token="<|bos|>", add_bos_token=True)
    # Padding is on the left, because a generated text continues the right end.
    settings = dict(padding_side="left", model_max_length=config.sequence_len, clean_up_tokenization_spaces=False)
    template = (HERE / "chat_template.jinja").read_text(encoding="utf-8")
    hf_tokenizer = PreTrainedTokenizerFast(tokenizer_object=converted, chat_template=template, **names, **settings)
    hf_tokenizer.save_pretrained(folder)
    card = (HERE / "model_card.md").read_text(encoding="utf-8")
    sizes = dict(context=config.sequence_len, vocabulary=config.vocab_size, parameters=hf.num_parameters())
    (folder / "README.md").write_text(card.format(**sizes), encoding="utf-8")


def main(argv=None):
    parser = make_parser("nanochat.hf", __doc__)
    add_model_flags(parser)
    parser.add_argument("folder", type=path, help="output folder; must not exist")
    args = parse_args(parser, argv)
    try:
        from safetensors import SafetensorError
        from transformers import logging
    except ImportError as e:
        raise UserError("transformers is not installed: pip install transformers") from e
    from nanochat.checkpoint_manager import load_model

    require(not args.quantize, f"--quantize={args.quantize}: only float32 and bfloat16 weights can be exported")
    folder = Path(args.folder)
    require(not folder.exists(), f"{folder} already exists; choose a new folder")
    compute = compute_init("cpu", args.dtype or "float32")
    model, tokenizer, _ = load_model(args.source, compute, model_tag=args.model_tag, step=args.step)
    logging.disable_progress_bar()
    draft = Path(f"{folder}.{os.getpid()}.tmp")
    try:
        draft.mkdir(parents=True)
        export(model, tokenizer, draft)
        draft.rename(folder)
    except (OSError, SafetensorError) as e:
        raise UserError(f"cannot write {folder}: {e}") from e
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    print(f"wrote {folder}")


if __name__ == "__main__":
    run_script(main)
