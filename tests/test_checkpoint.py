"""Checkpoints: atomic saves, verification on loading, and the fallback to the newest undamaged one."""

import json
import os
import resource

import pytest
import torch
from helpers import CPU, raises_user_error

from nanochat import checkpoint_manager as cm
from nanochat.common import UserError, atomic_path
from nanochat.gpt import GPT, GPTConfig

CONFIG = GPTConfig(sequence_len=16, vocab_size=600, n_layer=1, n_head=2, n_kv_head=2, n_embd=32)


def trained_model(steps=1):
    """(model, optimizers) after `steps` optimizer steps on random tokens."""
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
    model, optimizers = trained_model(step)
    cm.save_checkpoint(folder, step, model, optimizers, {"user_config": {}, **meta}, CPU, keep)
    return model, optimizers


def test_weights_and_optimizer_state_are_restored_exactly(base):
    folder = cm.checkpoint_dir("base", "d1")
    model, optimizers = save(folder, 3, note="kept")
    path, meta = cm.find_checkpoint(folder)
    assert (meta["step"], meta["note"], meta["model_config"]["n_embd"]) == (3, "kept", 32)
    restored, new_optimizers = trained_model(1)
    cm.load_weights(restored, path)
    cm.load_optimizers(path, meta, new_optimizers)
    for p, q in zip(model.parameters(), restored.parameters(), strict=True):
        assert torch.equal(p, q)
    for a, b in zip(optimizers, new_optimizers, strict=True):
        for name, value in a.state_shard().items():
            assert value == b.steps if name == "steps" else torch.equal(value, b.state_shard()[name])
    loaded, tokenizer, _ = cm.load_model("base", CPU)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert tokenizer.get_vocab_size() == 600


@pytest.mark.parametrize("name", ["model.safetensors", "optim_rank0.pt", "meta.json"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped byte", "missing"])
def test_damaged_checkpoint_is_skipped_with_a_warning(base, capsys, name, damage):
    folder = cm.checkpoint_dir("base", "d1")
    for step in (1, 2):
        save(folder, step)
    damaged = folder / "step_000002" / name
    data = damaged.read_bytes()
    if damage == "missing":
        damaged.unlink()
    else:
        half = len(data) // 2
        flipped = data[:half] + bytes([data[half] ^ 255]) + data[half + 1 :]
        damaged.write_bytes({"truncated": data[:half], "empty": b"", "flipped byte": flipped}[damage])
    path, meta = cm.find_checkpoint(folder)
    assert (path.name, meta["step"]) == ("step_000001", 1)
    assert "step_000002" in capsys.readouterr().err
    with pytest.raises(UserError, match="step_000002"):  # an explicit step has no fallback
        cm.find_checkpoint(folder, step=2)


@pytest.fixture
def max_file_size():
    """max_file_size(n): writing more than n bytes to a file fails until the end of the test, as on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda n: resource.setrlimit(resource.RLIMIT_FSIZE, (n, old[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.parametrize("optimizer_state", [True, False])
@pytest.mark.parametrize("size", [0, 50_000])
def test_disk_full_is_one_line_and_leaves_older_checkpoints(base, max_file_size, size, optimizer_state):
    folder = cm.checkpoint_dir("base", "d1")
    model, optimizers = save(folder, 1)
    max_file_size(size)
    with raises_user_error(r"cannot write .*step_000002: .*make room in .*--resume"):
        cm.save_checkpoint(folder, 2, model, optimizers if optimizer_state else [], {}, CPU, keep=1)
    assert [path.name for path in folder.iterdir()] == ["step_000001"]
    assert cm.find_checkpoint(folder)[1]["step"] == 1


def test_all_ranks_raise_the_write_error_of_one(base):
    folder = cm.checkpoint_dir("base", "d1")

    class Rank0(type(CPU)):
        def all_gather(self, value):
            return [value, UserError("cannot write: rank 1")]

    with raises_user_error("rank 1"):
        cm.save_checkpoint(folder, 2, *trained_model(), {}, Rank0(CPU.device, CPU.dtype))
    assert not list(folder.iterdir())


@pytest.mark.parametrize(("error", "remedy"), [(PermissionError(13, "Permission denied"), "writable"), (24, "room")])
def test_a_file_that_cannot_be_written_is_one_line(tmp_path, error, remedy):
    with raises_user_error(f"a.txt: .*{remedy}"), atomic_path(tmp_path / "a.txt") as draft:
        draft.write_text("half")
        raise OSError(error, "Too many open files") if isinstance(error, int) else error
    assert not list(tmp_path.iterdir())


def test_failed_save_leaves_no_readable_checkpoint(base, monkeypatch):
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


def test_only_the_newest_checkpoints_are_kept(base):
    folder = cm.checkpoint_dir("base", "d1")
    for step in (1, 2, 3):
        save(folder, step, keep=2)
    assert sorted(p.name for p in folder.iterdir()) == ["step_000002", "step_000003"]


def test_default_tag_is_the_deepest_model(base):
    for tag in ("d2", "d10", "d9_tuned", "d300.old1"):
        save(cm.checkpoint_dir("base", tag), 1)
    assert cm.find_model_tag("base") == "d10"
    with pytest.raises(UserError, match="scripts.chat_sft"):
        cm.find_model_tag("sft")


def test_set_aside_renames_the_old_checkpoint_folder(base):
    folder = cm.checkpoint_dir("base", "d1")
    for n in (1, 2):
        save(folder, n)
        cm.set_aside(folder)
        assert not folder.exists()
        assert (folder.with_name(f"d1.old{n}") / f"step_{n:06d}" / "meta.json").exists()


def test_update_meta_adds_a_value(base):
    folder = cm.checkpoint_dir("base", "d1")
    save(folder, 1)
    cm.update_meta(folder / "step_000001", CPU, val_bpb=1.5)
    assert cm.find_checkpoint(folder)[1]["val_bpb"] == 1.5


def test_model_with_another_vocabulary_size_than_the_tokenizer_is_refused(base):
    folder = cm.checkpoint_dir("base", "d1")
    save(folder, 1)
    meta_path = folder / "step_000001" / "meta.json"
    meta = json.loads(meta_path.read_text(encoding="utf-8"))
    meta["model_config"]["vocab_size"] = 700
    meta_path.write_text(json.dumps(meta), encoding="utf-8")
    with pytest.raises(UserError, match="vocabulary of 700"):
        cm.load_model("base", CPU)


def test_optimizer_state_that_would_run_code_is_refused(base):
    """A pickle in place of the optimizer state is not executed."""
    folder = cm.checkpoint_dir("base", "d1")
    _, optimizers = save(folder, 1)
    path, meta = cm.find_checkpoint(folder)

    class Exploit:
        def __reduce__(self):
            return os.mkdir, (str(base / "executed"),)

    torch.save(Exploit(), path / "optim_rank0.pt")
    with pytest.raises(UserError, match="cannot be read"):
        cm.load_optimizers(path, meta, optimizers)
    assert not (base / "executed").exists()
