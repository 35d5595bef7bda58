"""The exported folder as transformers' Auto classes load it, against our own model and tokenizer."""

import pytest
import torch
from helpers import random_model

from nanochat import hf
from nanochat.common import UserError
from nanochat.engine import Engine
from nanochat.hf import export
from nanochat.tokenizer import get_tokenizer

transformers = pytest.importorskip("transformers")
TEXTS = ["Hello there", " a  b\n\n\tc ", "1234567 apples, 3.5%", "naïve café 你好 🎉", "don't you'LL I'm\r\nx", ""]
CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "I am nanochat."},
    {"role": "user", "content": "Tell me more\nabout it."},
]


@pytest.fixture
def exported(base):
    """(model, tokenizer, folder they are exported to)."""
    tokenizer = get_tokenizer()
    model = random_model(tokenizer.get_vocab_size(), std=0.1, sequence_len=128, n_head=4, n_embd=64)
    model.requires_grad_(False)
    export(model, tokenizer, base / "out")
    return model, tokenizer, base / "out"


def test_exported_model_gives_the_same_ids_logits_and_completions(exported):
    model, tokenizer, folder = exported
    hf_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert hf_tokenizer.encode(text) == tokenizer.encode(text)
        assert hf_tokenizer.decode(tokenizer.encode(text)) == text
    assert hf_tokenizer.bos_token_id == tokenizer.get_bos_token_id()
    hf_model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = hf_tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == tokenizer.render_for_completion({"messages": CHAT})
    torch.testing.assert_close(hf_model(ids).logits, model(ids), atol=1e-5, rtol=0)
    generated = hf_model.generate(ids, max_new_tokens=20, do_sample=False)[0].tolist()
    engine = Engine(model, tokenizer)
    results, masks = engine.generate_batch(ids[0].tolist(), max_tokens=20, temperature=0)
    # Equal up to the first calculator result (mask 0), which transformers does not insert.
    n = next((i for i, m in enumerate(masks[0][ids.size(1) :]) if not m), 20)
    assert generated[: ids.size(1) + n] == results[0][: ids.size(1) + n]


def test_existing_folder_is_not_overwritten(base):
    (base / "out").mkdir()
    with pytest.raises(UserError, match="already exists"):
        hf.main(["-i", "sft", str(base / "out")])
