"""Any causal language model of Hugging Face, by name or from a folder, in the form that nanochat.core_eval scores."""

from pathlib import Path

import torch

from nanochat.common import UserError
from nanochat.core_eval import padded

LOGITS = 1 << 27  # of one pass, which has them for all its tokens: 512 MiB of float32


def load_hf(path, compute):
    """
    (HFScorer, HFTokenizer) of `path`: a folder with config.json, or a name on the Hub.

    Raises UserError when there is no such model, or it does not predict next tokens.
    """
    try:
        import transformers
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as e:
        raise UserError(f"--hf_path needs transformers: pip install transformers ({e})") from e
    if Path(path).exists() and not (Path(path) / "config.json").is_file():
        raise UserError(
            f"--hf_path={path}: no config.json there, so it is no Hugging Face model; "
            "checkpoints of ours are named by --model_tag and --step"
        )
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # of loading; downloads still show theirs
    try:
        model, info = AutoModelForCausalLM.from_pretrained(path, dtype=compute.dtype, output_loading_info=True)
        tokenizer = HFTokenizer(AutoTokenizer.from_pretrained(path))
    except UserError as e:
        raise UserError(f"--hf_path={path}: {e}") from None
    except Exception as e:  # of many kinds: OSError, ValueError, KeyError, those of safetensors and the Hub
        raise UserError(f"--hf_path={path}: cannot be loaded as a causal language model ({_line(e)})") from e
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"--hf_path={path}: {len(missing)} weights are missing, such as {missing[0]}")
    have, need = model.get_input_embeddings().weight.size(0), tokenizer.size
    if need > have:
        raise UserError(f"--hf_path={path}: the tokenizer has {need:,} tokens, the model {have:,}")
    return HFScorer(model.to(compute.device).eval(), path), tokenizer


def _line(error, limit=200):
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:limit]}{'...' if len(text) > limit else ''}"


class HFTokenizer:
    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if self.bos is None:
            raise UserError("the tokenizer has neither a bos nor an eos token to begin a prompt with")
        self.size = 1 + max(tokenizer.get_vocab().values(), default=0)
        if len(self.encode(["two words"], self.bos)[0]) < 3:  # transformers makes an empty one where files are missing
            raise UserError("there is no tokenizer with the model, or it makes no tokens of a text")

    def get_bos_token_id(self):
        return self.bos

    def encode(self, texts, prepend):
        """Ids of each text, after the id `prepend`."""
        rows = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        return [[prepend, *row] for row in rows]

    def decode(self, ids):
        return self.tokenizer.decode(ids)


class HFScorer:
    """
    What GPTScorer is, for a model of transformers.

    Prefixes are shared where its cache is plain keys and values (no window, no recurrent state), and of equal length
    in a pass, so that no padding ever lies before a token. Rows are cropped to the positions that the model has.
    """

    equal_prefixes = True

    @torch.inference_mode()
    def __init__(self, model, name):
        from transformers import DynamicCache
        from transformers.cache_utils import DynamicLayer

        self.model, self.device = model, model.device
        self.max_tokens = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.max_logits = max(1, LOGITS // model.config.get_text_config().vocab_size)
        one, other = (model(torch.tensor([[1, 2, 3, last]], device=self.device), use_cache=True) for last in (4, 5))
        if not torch.allclose(one.logits[:, :3], other.logits[:, :3], atol=1e-3):
            raise UserError(f"--hf_path={name}: {type(model).__name__} looks at later tokens; give a causal model")
        cache = getattr(one, "past_key_values", None)
        self.shares_prefixes = type(cache) is DynamicCache and all(
            type(layer) is DynamicLayer for layer in cache.layers
        )

    def prefill(self, prefixes):
        """A cache with a row for each of `prefixes`, which are equally long; None for empty ones."""
        if not prefixes[0]:
            return None
        ids = torch.tensor(prefixes, device=self.device)
        return self.model.base_model(input_ids=ids, use_cache=True).past_key_values  # without the head

    def logits(self, cache, owners, rests, rows, columns):
        """Yield logits (n, V) in float32 after rests[row][column], where rests[i] follows row owners[i] of `cache`."""
        from transformers import DynamicCache

        n = max(1, self.max_logits // max(map(len, rests)))
        places = torch.tensor([rows, columns], device=self.device)
        for start in range(0, len(rests), n):
            repeated = DynamicCache()
            for i, layer in enumerate(cache.layers if cache else ()):
                repeated.update(*(kept[owners[start : start + n]] for kept in (layer.keys, layer.values)), i)
            ids = padded(rests[start : start + n], self.device)
            some = self.model(input_ids=ids, past_key_values=repeated if cache else None, use_cache=bool(cache)).logits
            here = places[:, (places[0] >= start) & (places[0] < start + n)]
            yield some[here[0] - start, here[1]].float()
