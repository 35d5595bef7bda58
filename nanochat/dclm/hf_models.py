"""Causal language models of Hugging Face, by name or from a folder, for nanochat.core_eval."""

import textwrap
from pathlib import Path

import torch

from nanochat.common import UserError, require
from nanochat.inference.backends import pad

# Maximum number of logits per forward pass, 512 MiB of float32; transformers computes them at every position.
LOGITS_PER_PASS = 1 << 27


def load_hf(path, compute):
    """
    (HFScorer, HFTokenizer) of `path`: a folder with config.json, or a name on the Hub.

    Raises UserError if there is no such model, or if it is not a causal language model.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer, logging
    except ImportError as e:
        raise UserError(f"--hf_path needs transformers: pip install transformers ({e})") from e
    flag = f"--hf_path={path}"
    has_config = not Path(path).exists() or (Path(path) / "config.json").is_file()
    require(has_config, f"{flag}: no config.json there; to score a nanochat checkpoint, use --model_tag and --step")
    logging.set_verbosity_error()
    logging.disable_progress_bar()  # of loading weights; downloads still show their progress
    try:
        model, info = AutoModelForCausalLM.from_pretrained(path, dtype=compute.dtype, output_loading_info=True)
        tokenizer = HFTokenizer(AutoTokenizer.from_pretrained(path))
    except Exception as e:  # OSError, ValueError, KeyError, and the errors of safetensors and the Hub
        reason = textwrap.shorten(repr(e), 200, placeholder="...")
        raise UserError(f"{flag}: cannot be loaded as a causal language model ({reason})") from e
    missing = sorted(info["missing_keys"])
    require(not missing, f"{flag}: {len(missing)} weights are missing, such as {', '.join(missing[:1])}")
    n_tokens, n_rows = tokenizer.size, len(model.get_input_embeddings().weight)
    require(n_tokens <= n_rows, f"{flag}: the tokenizer has {n_tokens:,} tokens, the model {n_rows:,}")
    return HFScorer(model.to(compute.device).eval(), flag), tokenizer


class HFTokenizer:
    """A tokenizer of transformers with the methods that evaluate_core() calls."""

    def __init__(self, tokenizer):
        self.tokenizer, self.decode = tokenizer, tokenizer.decode
        self.bos = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        require(self.bos is not None, "the tokenizer has neither a bos nor an eos token to start prompts with")
        self.size = 1 + max(tokenizer.get_vocab().values(), default=0)
        # transformers creates an empty tokenizer if the tokenizer's files are missing.
        require(len(self.encode(["two words"], self.bos)[0]) > 2, "the model has no working tokenizer")

    def get_bos_token_id(self):
        return self.bos

    def encode(self, texts, prepend):
        """Token ids of each text, each preceded by the id `prepend`."""
        rows = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        return [[prepend, *row] for row in rows]


class HFScorer:
    """
    Scores a model of transformers; has the interface of core_eval.GPTScorer.

    Prefixes are shared only if the model has a plain KV cache (no sliding window, no recurrent state). The prefixes of
    one pass have equal lengths, so that padding never precedes a token. Rows are cropped to the model's context.
    """

    equal_prefixes = True

    @torch.inference_mode()
    def __init__(self, model, flag):
        from transformers.cache_utils import DynamicCache, DynamicLayer

        self.model, self.device, config = model, model.device, model.config.get_text_config()
        self.max_tokens = getattr(config, "max_position_embeddings", None)
        self.max_logits = max(1, LOGITS_PER_PASS // config.vocab_size)  # positions per pass
        # In a causal model, changing the last token leaves the logits before it unchanged.
        one, other = (model(torch.tensor([[1, 2, 3, last]], device=self.device), use_cache=True) for last in (4, 5))
        causal = torch.allclose(one.logits[:, :3], other.logits[:, :3], atol=1e-3)
        require(causal, f"{flag}: {type(model).__name__} looks at later tokens; give a causal model")
        cache = getattr(one, "past_key_values", None)
        self.shares_prefixes = type(cache) is DynamicCache and {*map(type, cache.layers)} == {DynamicLayer}

    def prefill(self, prefixes):
        """A cache with one row for each of `prefixes`, which have equal lengths; None if they are empty."""
        if not prefixes[0]:
            return None
        ids = torch.tensor(prefixes, device=self.device)
        return self.model.base_model(input_ids=ids, use_cache=True).past_key_values  # without the head

    def logits(self, cache, cache_rows, suffixes, rows, columns):
        """
        Yield float32 logits (n, V), in chunks, at the positions (row, column) of `suffixes`.

        suffixes[i] continues row cache_rows[i] of `cache`.
        """
        n = max(1, self.max_logits // max(map(len, suffixes)))  # rows per pass
        positions = torch.tensor([rows, columns], device=self.device)
        for start in range(0, len(suffixes), n):
            repeated = type(cache)() if cache else None
            for i, layer in enumerate(cache.layers if cache else ()):
                repeated.update(*(x[cache_rows[start : start + n]] for x in (layer.keys, layer.values)), i)
            ids = pad(suffixes[start : start + n], self.device)
            logits = self.model(input_ids=ids, past_key_values=repeated, use_cache=bool(cache)).logits
            row, column = positions[:, (positions[0] >= start) & (positions[0] < start + n)]
            yield logits[row - start, column].float()
