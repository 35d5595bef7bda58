"""Checkpoints: whole or absent, verified, and falling back to the newest good one."""

import json
import os

import pytest
import torch

from nanochat import checkpoint_manager as cm
from nanochat.common import Compute, UserError
from nanochat.gpt import GPT, GPTConfig

CPU = Compute(torch.device("cpu"), torch.float32)
CONFIG = GPTConfig(sequence_len=16, vocab_size=600, n_layer=1, n_head=2, n_kv_head=2, n_embd=32)


def trained(steps=1):
    torch.manual_seed(0)
    model = GPT(CONFIG)
    model.init_weights("cpu")
    optimizers = model.setup_optimizers()
    for _ in range(steps):
        idx = torch.randint(0, 600, (2, 16))
        model(idx, idx).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return model, optimizers


def save(folder, step, keep=0, **meta):
    model, optimizers = trained(step)
    cm.save_checkpoint(folder, step, model, optimizers, {"user_config": {}, **meta}, CPU, keep)
    return model, optimizers


def test_weights_and_moments_come_back_exactly(base):
    folder = cm.checkpoint_dir("base", "d1")
    model, optimizers = save(folder, 3, note="kept")
    path, meta = cm.find_checkpoint(folder)
    assert (meta["step"], meta["note"], meta["model_config"]["n_embd"]) == (3, "kept", 32)
    again, new_optimizers = trained(1)
    cm.load_weights(again, path)
    cm.load_optimizers(path, meta, new_optimizers)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
    for a, b in zip(optimizers, new_optimizers, strict=True):
        for name, value in a.state_shard().items():
            assert value == b.steps if name == "steps" else torch.equal(value, b.state_shard()[name])
    loaded, tokenizer, _ = cm.load_model("base", CPU)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert tokenizer.get_vocab_size() == 600


@pytest.mark.parametrize("name", ["model.safetensors", "optim_rank0.pt", "meta.json"])
@pytest.mark.parametrize("harm", ["cut", "empty", "flip", "gone"])
def test_a_damaged_checkpoint_is_passed_over(base, capsys, name, harm):
    folder = cm.checkpoint_dir("base", "d1")
    for step in (1, 2):
        save(folder, step)
    victim = folder / "step_000002" / name
    data = victim.read_bytes()
    if harm == "gone":
        victim.unlink()
    else:
        half = len(data) // 2
        flipped = data[:half] + bytes([data[half] ^ 255]) + data[half + 1 :]
        victim.write_bytes({"cut": data[:half], "empty": b"", "flip": flipped}[harm])
    path, meta = cm.find_checkpoint(folder)
    assert (path.name, meta["step"]) == ("step_000001", 1)
    assert "step_000002" in capsys.readouterr().err
    with pytest.raises(UserError, match="step_000002"):  # what was asked for is not replaced
        cm.find_checkpoint(folder, step=2)


def test_an_unfinished_save_is_not_seen(base, monkeypatch):
    folder = cm.checkpoint_dir("base", "d1")
    save(folder, 1)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError):
        save(folder, 2)
    monkeypatch.undo()
    assert (folder / "step_000002.tmp").is_dir()
    assert cm.find_checkpoint(cm.base_dir() / folder)[1]["step"] == 1
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    save(folder, 2)
    assert cm.find_checkpoint(folder)[1]["step"] == 2


def test_only_the_newest_are_kept(base):
    folder = cm.checkpoint_dir("base", "d1")
    for step in (1, 2, 3):
        save(folder, step, keep=2)
    assert sorted(p.name for p in folder.iterdir()) == ["step_000002", "step_000003"]


def test_tags(base):
    for tag in ("d2", "d10", "d9_tuned", "d300.old1"):
        save(cm.checkpoint_dir("base", tag), 1)
    assert cm.find_model_tag("base") == "d10"
    with pytest.raises(UserError, match="scripts.chat_sft"):
        cm.find_model_tag("sft")


def test_a_new_run_sets_an_old_one_aside(base):
    folder = cm.checkpoint_dir("base", "d1")
    for n in (1, 2):
        save(folder, n)
        cm.set_aside(folder)
        assert not folder.exists()
        assert (folder.with_name(f"d1.old{n}") / f"step_{n:06d}" / "meta.json").exists()


def test_meta_can_be_added_to(base):
    folder = cm.checkpoint_dir("base", "d1")
    save(folder, 1)
    cm.update_meta(folder / "step_000001", CPU, val_bpb=1.5)
    assert cm.find_checkpoint(folder)[1]["val_bpb"] == 1.5


def test_other_tokenizer_other_model(base):
    folder = cm.checkpoint_dir("base", "d1")
    save(folder, 1)
    meta_path = folder / "step_000001" / "meta.json"
    meta = json.loads(meta_path.read_text(encoding="utf-8"))
    meta["model_config"]["vocab_size"] = 700
    meta_path.write_text(json.dumps(meta), encoding="utf-8")
    with pytest.raises(UserError, match="vocabulary of 700"):
        cm.load_model("base", CPU)


def test_nothing_that_runs_code_is_loaded(base):
    """A pickle that would run code on loading, in place of the optimizer's state, is refused."""
    folder = cm.checkpoint_dir("base", "d1")
    _, optimizers = save(folder, 1)
    path, meta = cm.find_checkpoint(folder)

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(base / "pwned"),)

    torch.save(Evil(), path / "optim_rank0.pt")
    with pytest.raises(UserError, match="cannot be read"):
        cm.load_optimizers(path, meta, optimizers)
    assert not (base / "pwned").exists()
