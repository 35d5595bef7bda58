"""
Models of Hugging Face transformers' NanoChat class: export to a folder, and import.

    python -m nanochat.hf -i sft out/                                 # then AutoModelForCausalLM.from_pretrained("out")
    python -m nanochat.hf --import out/ -i base --model_tag=theirs    # then chat_cli -i base -g theirs, for example

An export is in float32, or in the dtype that an imported model had, unless --dtype says otherwise. It holds the
tokenizer, the chat template and a model card with the scores in the report. An import becomes a checkpoint; its
tokenizer becomes that of the base directory.
"""

import os
import shutil
from pathlib import Path

from nanochat.cli import add_model_flags, make_parser, parse_args, path, run_script
from nanochat.cluster import compute_init
from nanochat.common import UserError, base_dir, require
from nanochat.records import json_dict, read_text, table
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer, save_as_default

HERE = Path(__file__).parent
# Parts of parameter names, ours -> transformers'.
NAMES = {"transformer.wte": "model.embed_tokens", "transformer.h": "model.layers"}
NAMES |= {"attn.c_q": "self_attn.q_proj", "attn.c_k": "self_attn.k_proj", "attn.c_v": "self_attn.v_proj"}
NAMES |= {"attn.c_proj": "self_attn.o_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
TABLES = ("transformer.wte.weight", "lm_head.weight")  # ours have padding rows
# The chat template writes this noncharacter into each "<|" of a message, so that the name of a special token stays
# text. The tokenizer removes it again.
ESCAPE = "\ufdd0"
# An imported tokenizer must give these the same ids as ours, and its template this conversation.
TEXTS = "Hello there, don't you'LL", " a  b\n\n\tc \r\n", "1234567 apples, 3.5%", "naïve café 你好 🎉", "\0\x7f<|bos|>"
CHAT = [{"role": role, "content": text} for role, text in (("user", "Who?"), ("assistant", "I."), ("user", "Why?"))]


def hf_config(config):
    """Keyword arguments of transformers' NanoChatConfig for a GPTConfig."""
    from nanochat.gpt import NORM_EPS

    sizes = dict(vocab_size=config.vocab_size, hidden_size=config.n_embd, intermediate_size=4 * config.n_embd)
    heads = dict(num_attention_heads=config.n_head, num_key_value_heads=config.n_kv_head)
    layers = dict(num_hidden_layers=config.n_layer, rms_norm_eps=NORM_EPS)
    return sizes | heads | layers | {"max_position_embeddings": config.sequence_len}


def hf_name(name):
    """transformers' name of our parameter."""
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name


def hf_weights(model):
    """The state dict for NanoChatForCausalLM. Shares memory with `model`; omits the padding rows of the vocabulary."""
    size = model.config.vocab_size
    return {hf_name(name): p[:size] if name in TABLES else p for name, p in model.state_dict().items()}


# ---------------------------------------------------------------------------------------------------------------------
# Export


def export(model, tokenizer, folder, source=None, meta=None):
    """
    Write model, tokenizer and model card to `folder`, for from_pretrained(). Logits and ids are the same as ours.

    `source` and `meta`: stage and metadata of the checkpoint, for the card.
    """
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
    (folder / "README.md").write_text(model_card(source, meta or {}, config, hf.num_parameters()), encoding="utf-8")


def model_card(source, meta, config, parameters):
    """Text of the model card, with the checkpoint's scores in the report. An imported model keeps its own."""
    section = json_dict(read_text(base_dir() / "report" / f"chat-evaluation-{source}.json"))
    same = all(section.get("values", {}).get(key) == meta.get(key) for key in ("model_tag", "step"))
    scores = section.get("metrics", {}).get("task_scores", {}) if same else {}
    rows = [[task, f"{100 * value:.1f}"] for task, value in scores.items()]
    facts = dict(context=config.sequence_len, vocabulary=config.vocab_size, parameters=parameters)
    facts["scores"] = f"\n{table(['Task', 'Accuracy, %'], rows)}\n" if rows else ""
    return meta.get("card") or (HERE / "model_card.md").read_text(encoding="utf-8").format(**facts)


# ---------------------------------------------------------------------------------------------------------------------
# Import


def load_folder(folder):
    """(model in float32, tokenizer, meta for the checkpoint) of a NanoChat model's folder. Raises UserError."""
    import torch
    from transformers import AutoConfig, AutoTokenizer, NanoChatForCausalLM

    from nanochat.gpt import GPT, NORM_EPS, GPTConfig

    c = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    require(c.model_type == "nanochat", f"{folder} holds a model of the type {c.model_type!r}, expected nanochat")
    fixed = {"intermediate_size": 4 * c.hidden_size, "hidden_act": "relu2", "final_logit_softcapping": 15.0}
    fixed |= {"attention_bias": False, "head_dim": c.hidden_size // c.num_attention_heads}
    for name, value in fixed.items():
        found = getattr(c, name, value)
        require(found == value, f"{folder}/config.json has {name}={found}, nanochat's models have {value}")
    rope = c.rope_parameters["rope_type"], c.rope_parameters["rope_theta"]
    require(rope == ("default", 10000), f"{folder}: the rotary embedding is {rope}, expected default, 10000")
    heads = c.num_attention_heads, c.num_key_value_heads
    config = GPTConfig(c.max_position_embeddings, c.vocab_size, c.num_hidden_layers, *heads, c.hidden_size)
    tokenizer = convert_tokenizer(AutoTokenizer.from_pretrained(folder, trust_remote_code=False), folder)
    size = tokenizer.get_vocab_size()
    require(size == c.vocab_size, f"{folder}: the tokenizer has {size:,} tokens, the model {c.vocab_size:,}")
    hf, info = NanoChatForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    wrong = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"], *info["unexpected_keys"]]))
    require(not wrong, f"{folder}: the weights do not fit config.json: {', '.join(wrong[:3])}")
    theirs, model = hf.state_dict(), GPT(config)
    model.allocate("cpu")
    for name, p in model.state_dict().items():
        weight = theirs[hf_name(name)]
        p.copy_(torch.cat([weight, weight.new_zeros(len(p) - len(weight), p.size(1))]) if name in TABLES else weight)
    # Small embeddings feel the epsilon of their norm. Scaled, they give with ours what they gave with theirs.
    wte = model.transformer.wte.weight.data
    if abs(c.rms_norm_eps - NORM_EPS) > 1e-5 * wte.square().mean():
        wte *= (NORM_EPS / c.rms_norm_eps) ** 0.5
    # A chat model, whatever stage it is saved as.
    meta = {"stage": "sft", "user_config": {}, "made_from": {"tokenizer": tokenizer.fingerprint(), "shards": None}}
    meta |= {"dtype": str(hf.dtype).removeprefix("torch."), "card": read_text(Path(folder) / "README.md")}
    return model, tokenizer, meta


def convert_tokenizer(hf_tokenizer, folder):
    """Our Tokenizer with the ids of `hf_tokenizer`, a byte-level BPE of transformers. Raises UserError."""
    import json

    from transformers.convert_slow_tokenizer import bytes_to_unicode

    problem = f"{folder}: the tokenizer is not a byte-level BPE with nanochat's special tokens"
    try:
        data = json.loads(hf_tokenizer.backend_tokenizer.to_str())
        special = {t["content"]: t["id"] for t in data["added_tokens"] if t["special"]}
        byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
        ranks = {bytes(byte_of[c] for c in t): i for t, i in data["model"]["vocab"].items() if t not in special}
        steps = data["pre_tokenizer"].get("pretokenizers", [data["pre_tokenizer"]])
        pattern = next(step["pattern"]["Regex"] for step in steps if step["type"] == "Split")
    except (AttributeError, KeyError, TypeError, StopIteration) as e:
        raise UserError(f"{problem} ({e!r})") from e
    require(set(SPECIAL_TOKENS) <= set(special), f"{problem}: {', '.join(sorted(set(SPECIAL_TOKENS) - set(special)))}")
    tokenizer = Tokenizer(pattern, dict(sorted(ranks.items(), key=lambda item: item[1])), special)
    for text in TEXTS:
        ids = hf_tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        require(tokenizer.encode(text) == ids, f"{problem}: {text!r} gets other ids from it")
    settings = dict(tokenize=False, add_generation_prompt=True)
    chat = hf_tokenizer.chat_template and hf_tokenizer.apply_chat_template(CHAT, **settings)
    if chat != tokenizer.decode(tokenizer.render_for_completion({"messages": CHAT})):
        print("warning: its chat template is not nanochat's; conversations are rendered with nanochat's")
    return tokenizer


def main(argv=None):
    parser = make_parser("nanochat.hf", __doc__)
    add_model_flags(parser, source="")
    add = parser.add_argument
    add("folder", type=path, help="output folder, must not exist; with --import the folder of a model")
    add("--import", action="store_true", dest="imports", help="make a checkpoint of a folder (default: -i base)")
    args = parse_args(parser, argv)
    require(args.imports or args.source, "-i/--source is required: the stage of the model to export")
    try:
        from safetensors import SafetensorError
        from transformers import logging
    except ImportError as e:
        raise UserError("transformers is not installed: pip install transformers") from e
    from nanochat.checkpoint_manager import checkpoint_dir, load_model, save_checkpoint

    require(not args.quantize, f"--quantize={args.quantize}: only float32 and bfloat16 weights can be exported")
    logging.disable_progress_bar()
    folder = Path(args.folder)
    if args.imports:
        source, tag = args.source or "base", args.model_tag or folder.resolve().name
        target = checkpoint_dir(source, tag)
        require(not target.exists(), f"{target} already exists; choose another --model_tag")
        require((folder / "tokenizer.json").is_file(), f"no model in {folder}: it has no tokenizer.json")
        try:
            model, tokenizer, meta = load_folder(folder)
        except Exception as e:  # transformers raises many kinds
            raise e if isinstance(e, UserError) else UserError(f"cannot read {folder}: {e!r}"[:300]) from e
        save_as_default(tokenizer)
        save_checkpoint(target, 0, model, None, meta, compute_init("cpu", "float32"))
        return print(f"wrote {target}; chat with it: python -m scripts.chat_cli -i {source} -g {tag}")
    require(not folder.exists(), f"{folder} already exists; choose a new folder")
    compute = compute_init("cpu", args.dtype or "float32")
    model, tokenizer, meta = load_model(args.source, compute, model_tag=args.model_tag, step=args.step)
    model = model.bfloat16() if meta.get("dtype") == "bfloat16" and not args.dtype else model
    draft = Path(f"{folder}.{os.getpid()}.tmp")
    try:
        draft.mkdir(parents=True)
        export(model, tokenizer, draft, args.source, meta)
        draft.rename(folder)
    except (OSError, SafetensorError) as e:
        raise UserError(f"cannot write {folder}: {e}") from e
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    print(f"wrote {folder}")


if __name__ == "__main__":
    run_script(main)
