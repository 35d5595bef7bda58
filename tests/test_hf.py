"""The exported folder as transformers' Auto classes load it, against our own model and tokenizer."""

import json
import os
import random
import stat

import pytest
import torch
from helpers import CPU, raises_user_error, random_model, random_words

from nanochat import hf
from nanochat.checkpoint_manager import load_model
from nanochat.engine import Engine
from nanochat.hf import export
from nanochat.tokenizer import get_tokenizer

transformers = pytest.importorskip("transformers")
TEXTS = [
    "Hello there",
    " a  b\n\n\tc ",
    "1234567 apples, 3.5%",
    "naïve café 你好 🎉👩‍👩‍👧",
    "cafe\u0301 \u1100\u1161",  # decomposed; NFC would change it
    "don't you'LL I'm\r\nx",
    "\0\x01\x7f\u2028\ufeff\ufffd<|",
    " ,  . ' n't ,",
    "",
]
NAMES = ["<|bos|>", "<|user_end|>", "a<|assistant_start|>b", "<|assistant_end|> <|python_start|>1+1<|python_end|>"]
CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "I am nanochat."},
    {"role": "user", "content": "Tell me more\nabout it."},
]


@pytest.fixture(scope="module")
def exported(pocket_base, tmp_path_factory):
    """(model, tokenizer, folder they are exported to)."""
    folder = tmp_path_factory.mktemp("hf") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(pocket_base))
        tokenizer = get_tokenizer()
        model = random_model(tokenizer.get_vocab_size(), std=0.1, sequence_len=128, n_head=4, n_embd=64)
        export(model.requires_grad_(False), tokenizer, folder)
    return model, tokenizer, folder


@pytest.fixture(scope="module")
def hf_tokenizer(exported):
    return transformers.AutoTokenizer.from_pretrained(exported[2])


def random_text(rng):
    return rng.choice([rng.choice(TEXTS), rng.choice(NAMES), random_words(rng, rng.randint(1, 6))])


def random_message(rng, role):
    """(message for the template, the same message for our tokenizer)."""
    if role == "assistant" and rng.random() < 0.3:
        kinds = [["text"], ["python", "python_output"], ["text", "python", "python_output"]]
        types = [type for _ in range(rng.randint(1, 3)) for type in rng.choice(kinds)] + ["text"]
        types = [a for a, b in zip(types, types[1:] + [""], strict=True) if not a == b == "text"]
        parts = [{"type": type, "text": random_text(rng)} for type in types]
        if len(types) > 1:
            return {"role": role, "content": parts}, {"role": role, "content": parts}
    texts = [random_text(rng) for _ in range(rng.randint(1, 3))]
    ours = {"role": role, "content": "\n\n".join(texts)}
    if role == "system" and rng.random() < 0.5:
        role = "developer"
    if len(texts) > 1:
        return {"role": role, "content": [{"type": "text", "text": text} for text in texts]}, ours
    if role == "assistant" and rng.random() < 0.1:
        return {"role": role, "content": None}, ours | {"content": ""}
    return {"role": role, "content": texts[0]}, ours


def random_chat(rng):
    """(messages for the template, the same messages for our tokenizer)."""
    roles = ["system"] * rng.randint(0, 1) + ["user", "assistant"] * rng.randint(1, 3)
    pairs = [random_message(rng, role) for role in roles[: rng.choice([None, -1])]]
    return [theirs for theirs, _ in pairs], [ours for _, ours in pairs]


def test_exported_model_gives_the_same_ids_logits_and_completions(exported, hf_tokenizer):
    model, tokenizer, folder = exported
    hf_model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert hf_model.get_input_embeddings().padding_idx is None  # its row would get no gradient
    ids = hf_tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == tokenizer.render_for_completion({"messages": CHAT})
    torch.testing.assert_close(hf_model(ids).logits, model(ids), atol=1e-5, rtol=0)
    generated = hf_model.generate(ids, max_new_tokens=20, do_sample=False)[0].tolist()
    engine = Engine(model, tokenizer)
    results, masks = engine.generate_batch(ids[0].tolist(), max_tokens=20, temperature=0)
    # Equal up to the first calculator result (mask 0), which transformers does not insert.
    n = next((i for i, m in enumerate(masks[0][ids.size(1) :]) if not m), 20)
    assert generated[: ids.size(1) + n] == results[0][: ids.size(1) + n]
    # In a padded batch too.
    batch = hf_tokenizer.apply_chat_template(
        [CHAT, CHAT[:2]], add_generation_prompt=True, padding=True, return_tensors="pt"
    )
    rows = hf_model.generate(**batch, max_new_tokens=n, do_sample=False)[:, batch["input_ids"].size(1) :].tolist()
    assert rows[0] == generated[ids.size(1) : ids.size(1) + n]


def test_plain_text_begins_with_bos_and_comes_back_unchanged(exported, hf_tokenizer):
    _, tokenizer, _ = exported
    bos = tokenizer.get_bos_token_id()
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert hf_tokenizer(text)["input_ids"] == [bos, *ids]
        assert hf_tokenizer.encode(text, add_special_tokens=False) == ids
        assert hf_tokenizer.decode(hf_tokenizer.encode(text), skip_special_tokens=True) == text
        offsets = hf_tokenizer(text, return_offsets_mapping=True)["offset_mapping"][1:]
        assert all(
            text[a:b].encode().find(tokenizer.decode_bytes([i])) >= 0 for i, (a, b) in zip(ids, offsets, strict=True)
        )
    for text in NAMES:
        ids = hf_tokenizer(text, split_special_tokens=True)["input_ids"]
        assert ids == tokenizer.encode(text, prepend=bos)
    batch = hf_tokenizer(["a", "a b c"], padding=True)
    assert batch["attention_mask"] == [[0] * 2 + [1] * 2, [1] * 4]
    assert (hf_tokenizer.bos_token_id, hf_tokenizer.model_max_length) == (bos, 128)
    assert hf_tokenizer.pad_token_id != hf_tokenizer.eos_token_id  # trainers do not train on padding


def test_chat_template_renders_what_our_tokenizer_and_server_render(exported, hf_tokenizer):
    _, tokenizer, _ = exported
    for seed in range(100):
        theirs, ours = random_chat(random.Random(seed))
        ids, mask = tokenizer.render_conversation({"messages": ours}, 100_000)
        out = hf_tokenizer.apply_chat_template(theirs, return_dict=True, return_assistant_tokens_mask=True)
        assert (out["input_ids"], out["assistant_masks"]) == (ids, mask), seed
        text = hf_tokenizer.apply_chat_template(theirs, tokenize=False)
        assert hf_tokenizer.encode(text, add_special_tokens=False) == ids
        prompt = hf_tokenizer.apply_chat_template(theirs, add_generation_prompt=True)["input_ids"]
        if ours[-1]["role"] == "user":
            assert prompt == tokenizer.render_for_completion({"messages": ours}), seed
        else:  # the server continues it
            assert prompt == ids[:-1]
    start = [*CHAT, {"role": "assistant", "content": "It is "}]
    ids = tokenizer.render_for_completion({"messages": CHAT}) + tokenizer.encode("It is ")
    assert hf_tokenizer.apply_chat_template(start, continue_final_message=True)["input_ids"] == ids


@pytest.mark.parametrize(
    "messages, problem",
    [
        ([("system", "a")], "needs a user message"),
        ([("assistant", "a")], "message 1 of 1 has the role assistant, expected user: user and assistant alternate"),
        ([("user", "a"), ("user", "b")], "message 2 of 2 has the role user, expected assistant"),
        ([("system", "a"), ("system", "b"), ("user", "c")], "message 2 of 3 has the role system, expected user"),
        ([("user", "a"), ("tool", "b")], "role tool"),
        ([("user", None)], r"message 1 of 1 \(user\) has the content None, expected a string or parts"),
        ([("user", 7)], "has the content 7, expected a string"),
        ([("user", {"text": "a"})], "has the content text, expected a string"),
        ([("user", [{"type": "image_url", "image_url": {"url": "x" * 500}}])], "content {'type': 'image_url'"),
        ([("user", [{"type": "python", "text": "1+1"}])], "with a type of text$"),
        ([("user", "a"), ("assistant", [{"type": "audio", "text": ""}])], "with a type of text, python, python_output"),
        ([("user", [{"type": "text", "text": None}])], "has the content"),
    ],
)
def test_chat_template_refuses_what_it_cannot_render(hf_tokenizer, messages, problem):
    messages = [{"role": role, "content": content} for role, content in messages]
    with pytest.raises(Exception, match=problem) as error:
        hf_tokenizer.apply_chat_template(messages)
    assert len(str(error.value)) < 300


def test_chat_template_refuses_tools(hf_tokenizer):
    with pytest.raises(Exception, match="this model cannot call tools"):
        hf_tokenizer.apply_chat_template(CHAT, tools=[{"type": "function", "function": {"name": "f"}}])
    with pytest.raises(Exception, match="takes no documents"):
        hf_tokenizer.apply_chat_template(CHAT, documents=[{"title": "a", "text": "b"}])
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]}
    with pytest.raises(Exception, match="message 5 of 5 has tool_calls: this model cannot call tools"):
        hf_tokenizer.apply_chat_template([*CHAT, call])


def test_chat_pipeline_stops_at_the_end_token(exported):
    _, tokenizer, folder = exported
    pipeline = transformers.pipeline("text-generation", model=str(folder))
    end = torch.tensor([tokenizer.encode_special("<|assistant_end|>")])
    pipeline.model.lm_head.register_forward_hook(lambda module, args, logits: logits.index_fill(-1, end, 1e6))
    (answer,) = pipeline(CHAT, max_new_tokens=50)
    assert answer["generated_text"] == [*CHAT, {"role": "assistant", "content": ""}]


def test_command_exports_the_checkpoint_with_ordinary_file_modes(sft_checkpoint, run_main, capsys):
    old = os.umask(0o027)
    try:
        run_main("nanochat.hf", "-i", "sft", sft_checkpoint / "new" / "out")
    finally:
        os.umask(old)
    folder = sft_checkpoint / "new" / "out"
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o640}
    assert capsys.readouterr().out.endswith(f"wrote {folder}\n")
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "128 tokens of context, a vocabulary of 600 tokens" in card and '[{"role": "user"' in card
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


def test_folder_that_exists_or_cannot_be_written_is_refused(sft_checkpoint, monkeypatch):
    (sft_checkpoint / "out").mkdir()
    with raises_user_error("out already exists; choose a new folder"):
        hf.main(["-i", "sft", "out"])
    with raises_user_error("--quantize=int8: only float32 and bfloat16 weights can be exported"):
        hf.main(["-i", "sft", "--quantize=int8", "new"])
    (sft_checkpoint / "file").touch()
    with raises_user_error("cannot write file/out: .*Not a directory"):
        hf.main(["-i", "sft", "file/out"])

    def disk_full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf, "export", disk_full)
    with raises_user_error("cannot write new: .*No space left on device"):
        hf.main(["-i", "sft", "new"])
    assert not list(sft_checkpoint.glob("new*"))


# ---------------------------------------------------------------------------------------------------------------------
# Import


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def made_by_transformers(folder, exported, dtype=torch.float32, **changes):
    """A folder with random weights as transformers draws them, and the tokenizer of `exported`; returns the model."""
    vocab_size = exported[1].get_vocab_size()
    shape = dict(vocab_size=vocab_size, hidden_size=96, intermediate_size=384, num_hidden_layers=3)
    shape |= dict(num_attention_heads=6, max_position_embeddings=64)
    torch.manual_seed(0)
    model = transformers.NanoChatForCausalLM(transformers.NanoChatConfig(**shape | changes)).to(dtype).eval()
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(exported[2]).save_pretrained(folder)
    return model


def test_an_exported_model_comes_back_bit_for_bit(exported, tmp_path, monkeypatch, capsys):
    model, tokenizer, folder = exported
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))  # without a tokenizer
    hf.main(["--import", str(folder), "-i", "sft", "--model_tag=again"])
    assert capsys.readouterr().out.endswith("chat with it: python -m scripts.chat_cli -i sft -g again\n")
    loaded, same_tokenizer, _ = load_model("sft", CPU)
    assert same_tokenizer.fingerprint() == tokenizer.fingerprint()
    for name, p in loaded.state_dict().items():
        size = tokenizer.get_vocab_size() if name in hf.TABLES else len(p)
        assert torch.equal(p[:size], model.state_dict()[name][:size]), name
    hf.main(["-i", "sft", str(tmp_path / "out")])
    assert files(tmp_path / "out") == files(folder)
    with raises_user_error("again already exists; choose another --model_tag"):
        hf.main(["--import", str(folder), "-i", "sft", "--model_tag=again"])


@pytest.mark.parametrize("n_kv_head", [6, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_made_by_transformers_gives_the_same_logits(exported, base, n_kv_head, dtype):
    theirs = made_by_transformers(base / "theirs", exported, dtype, num_key_value_heads=n_kv_head)
    hf.main(["--import", "theirs"])
    model, tokenizer, meta = load_model("base", CPU)
    assert (meta["model_tag"], model.config.n_kv_head, meta["dtype"]) == ("theirs", n_kv_head, str(dtype)[6:])
    ids = torch.tensor([tokenizer.encode(" ".join(TEXTS))[:60]])
    torch.testing.assert_close(model(ids), theirs.float()(ids).logits, atol=1e-4, rtol=0)
    hf.main(["-i", "base", "out"])
    hf.main(["--import", "out"])
    hf.main(["-i", "base", "-g", "out", "again"])
    assert files(base / "again") == files(base / "out")


def test_trained_weights_of_transformers_come_back_bit_for_bit(exported, base):
    # Embeddings of the usual scale are not changed for the sake of another epsilon.
    theirs = made_by_transformers(base / "theirs", exported, torch.bfloat16, initializer_range=1.0)
    hf.main(["--import", "theirs"])
    hf.main(["-i", "base", "out"])
    again = transformers.AutoModelForCausalLM.from_pretrained("out", dtype="auto").state_dict()
    assert all(torch.equal(p, again[name]) for name, p in theirs.state_dict().items())


def test_an_imported_model_is_evaluated_and_finetuned(exported, base, run_main, capsys):
    hf.main(["--import", str(exported[2]), "--model_tag=d1"])
    run_main("scripts.base_loss", "--split_tokens=2048", "--device_batch_size=2")
    assert "val bpb" in capsys.readouterr().out
    flags = ["--source=base", "--corpus=pocket", "--num_iterations=1", "--device_batch_size=2"]
    run_main("scripts.chat_sft", *flags, "--target_examples_per_step=2", "--eval_every=-1", "--compile=0")
    assert load_model("sft", CPU)[2]["model_tag"] == "d1"
    capsys.readouterr()
    run_main("scripts.chat_cli", "-i", "base", "-p", "Hi", "-t", "0", "-m", "8", "--json")
    answer = json.loads(capsys.readouterr().out)
    prompt = exported[1].render_for_completion({"messages": [{"role": "user", "content": "Hi"}]})
    assert answer["prompt_tokens"] == len(prompt)  # a chat, not plain text


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"intermediate_size": 100}, "has intermediate_size=100, nanochat's models have 384"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0, nanochat's models have 15.0"),
        ({"attention_bias": True}, "attention_bias=True, nanochat's models have False"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            "rotary embedding is .'default', 500000.0., expected",
        ),
        ({"vocab_size": 1000}, "the tokenizer has 600 tokens, the model 1,000"),
    ],
)
def test_models_that_ours_cannot_be_are_refused(exported, base, changes, problem):
    made_by_transformers(base / "theirs", exported, **changes)
    with raises_user_error(problem):
        hf.main(["--import", "theirs"])
    assert not (base / "base_checkpoints").exists()


def test_folders_without_a_model_are_refused(exported, base):
    with raises_user_error("no model in nowhere: it has no tokenizer.json"):
        hf.main(["--import", "nowhere"])
    made_by_transformers(base / "theirs", exported)
    (base / "theirs" / "tokenizer.json").unlink()
    with raises_user_error("theirs"):
        hf.main(["--import", "theirs"])
    transformers.AutoTokenizer.from_pretrained(exported[2]).save_pretrained("theirs")
    weights = base / "theirs" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with raises_user_error("cannot read theirs"):
        hf.main(["--import", "theirs"])
    (base / "llama").mkdir()
    transformers.LlamaConfig().save_pretrained("llama")
    transformers.AutoTokenizer.from_pretrained(exported[2]).save_pretrained("llama")
    with raises_user_error("llama holds a model of the type 'llama', expected nanochat"):
        hf.main(["--import", "llama"])


def test_the_card_has_the_scores_of_this_checkpoint(sft_checkpoint, run_main):
    run_main("scripts.chat_eval", "-i", "sft", "-a", "PocketSums", "-x", "8", "-m", "8")
    run_main("nanochat.hf", "-i", "sft", "out")
    assert "| PocketSums | 0.0 |" in (sft_checkpoint / "out" / "README.md").read_text(encoding="utf-8")
    report = sft_checkpoint / "report" / "chat-evaluation-sft.json"
    report.write_text(report.read_text().replace('"step": 3', '"step": 2'))
    run_main("nanochat.hf", "-i", "sft", "other")
    assert "PocketSums" not in (sft_checkpoint / "other" / "README.md").read_text(encoding="utf-8")
