"""Checkpoints: atomic saves, verification on loading, fallback to an undamaged one, what a model was made from."""

import contextlib
import importlib
import itertools
import json
import os
import random
import re
import resource
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers import CPU, raises_user_error

from nanochat import checkpoint_manager as cm
from nanochat import dataset
from nanochat.common import UserError, atomic_path, set_aside
from nanochat.dataset import parquets_iter_batched
from nanochat.gpt import GPT, GPTConfig
from nanochat.serve import worker
from nanochat.tokenizer import Tokenizer, get_token_bytes, get_tokenizer, save_as_default
from tasks import mixtures

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


def test_every_flipped_bit_of_meta_json_is_noticed(base, capsys):
    folder = cm.checkpoint_dir("base", "d1")
    for step in (1, 2):
        save(folder, step)
    path = folder / "step_000002" / "meta.json"
    data = path.read_bytes()
    rng = random.Random(0)
    for _ in range(200):
        i = rng.randrange(len(data))
        if data[i : i + 1].isspace() or 0 <= i - data.rindex(b'"sha256"') < 8:  # whose loss changes no content
            continue
        path.write_bytes(data[:i] + bytes([data[i] ^ 1 << rng.randrange(8)]) + data[i + 1 :])
        assert cm.find_checkpoint(folder)[0].name == "step_000001", path.read_bytes()[i - 40 : i + 40]
    assert "if you have edited it, delete its sha256" in capsys.readouterr().err


@contextlib.contextmanager
def max_file_size(n):
    """Context manager in which writing more than `n` bytes to a file fails, as on a full disk; pytest writes too."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.parametrize("optimizer_state", [True, False])
@pytest.mark.parametrize("size", [0, 50_000])
def test_disk_full_is_one_line_and_leaves_older_checkpoints(base, size, optimizer_state):
    folder = cm.checkpoint_dir("base", "d1")
    model, optimizers = save(folder, 1)
    with max_file_size(size), raises_user_error(r"cannot write .*step_000002: .*make room in .*--resume"):
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


@pytest.mark.parametrize("keep", [0, -1])
def test_all_checkpoints_are_kept(base, keep):
    folder = cm.checkpoint_dir("base", "d1")
    for step in (1, 2):
        save(folder, step, keep=keep)
    assert len(list(folder.iterdir())) == 2


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
        set_aside(folder, "an earlier run")
        assert not folder.exists()
        assert (folder.with_name(f"d1.old{n}") / f"step_{n:06d}" / "meta.json").exists()


def test_a_model_that_was_set_aside_is_not_loaded_by_default(base):
    save(cm.checkpoint_dir("base", "d1.old1"), 1)
    cm.checkpoint_dir("base", "d1").mkdir()
    with raises_user_error("no base checkpoint"):
        cm.find_model_tag("base")


def test_update_meta_adds_a_value(base):
    folder = cm.checkpoint_dir("base", "d1")
    save(folder, 1)
    cm.update_meta(folder / "step_000001", CPU, val_bpb=1.5)
    assert cm.find_checkpoint(folder)[1]["val_bpb"] == 1.5


def test_model_with_another_vocabulary_size_than_the_tokenizer_is_refused(base):
    folder = cm.checkpoint_dir("base", "d1")
    save(folder, 1)
    edit_meta("base", lambda meta: meta["model_config"].update(vocab_size=700))
    with raises_user_error("vocabulary of 700"):
        cm.load_model("base", CPU)


def test_model_of_another_version_is_refused(base):
    save(cm.checkpoint_dir("base", "d1"), 1)
    edit_meta("base", lambda meta: meta["model_config"].update(window=64))
    with raises_user_error("another version: .*'window'"):
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


# ---------------------------------------------------------------------------------------------------------------------
# What a model was made from

SIZE = ["--max_seq_len=32", "--total_batch_size=64", "--sample_every=-1", "--core_metric_every=-1"]
STAGES = {
    "base": ["scripts.base_train", "--depth=1", *SIZE],
    "mid": ["scripts.mid_train", *SIZE[:2]],
    "sft": ["scripts.chat_sft", "--target_examples_per_step=2", "--eval_metrics_every=-1"],
    "rl": ["scripts.chat_rl", "--examples_per_step=1", "--num_samples=2", "--max_new_tokens=4"],
}


def stage(name, *flags):
    """Runs one step of a stage."""
    module, *own_flags = STAGES[name]
    common = ["--device_type=cpu", "--dtype=float32", "--device_batch_size=2", "--eval_every=-1"]
    run(module, *own_flags, *common, *([] if "--num_iterations" in str(flags) else ["--num_iterations=1"]), *flags)


def run(module, *flags):
    importlib.import_module(module).main(list(flags))


def edit_meta(name, edit):
    """Calls `edit` with the content of meta.json of the newest checkpoint of stage `name`."""
    path = cm.find_checkpoint(cm.checkpoint_dir(name, "d1"))[0] / "meta.json"
    meta = json.loads(path.read_text(encoding="utf-8"))
    del meta["sha256"]  # it is of the old content
    edit(meta)
    path.write_text(json.dumps(meta), encoding="utf-8")


def save_another_tokenizer():
    """Replaces the tokenizer by one of the same size, trained on other text."""
    texts = [text.upper() for texts in parquets_iter_batched("train") for text in texts]
    save_as_default(Tokenizer.train_from_iterator(texts, 600))
    assert get_tokenizer().get_vocab_size() == 600


@pytest.fixture(scope="module")
def small_mixtures():
    """Reduces the pocket mixtures to a few hundred conversations, for speed."""
    with pytest.MonkeyPatch.context() as patch:
        for task in mixtures.POCKET_ROWS:
            patch.setitem(mixtures.POCKET_ROWS, task, {"mid": 40, "sft": 20})
        yield


@pytest.fixture(scope="module")
def all_stages(pocket_base, small_mixtures, tmp_path_factory):
    """A base directory with the first step of all four stages. Read-only."""
    folder = tmp_path_factory.mktemp("all_stages") / "base"
    shutil.copytree(pocket_base, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder))
        for name in STAGES:
            stage(name)
    return folder


@pytest.fixture
def trained(all_stages, tmp_path, monkeypatch):
    """A copy of all_stages, which is the base directory; the working directory is its parent."""
    shutil.copytree(all_stages, tmp_path / "base")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "base"


@pytest.fixture(scope="module")
def other_tokenizer(all_stages, tmp_path_factory):
    """all_stages with another tokenizer. Read-only."""
    folder = tmp_path_factory.mktemp("other_tokenizer") / "base"
    shutil.copytree(all_stages, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder))
        save_another_tokenizer()
    return folder


def test_checkpoints_record_what_they_were_made_from(trained):
    metas = {name: cm.load_model(name, CPU)[2] for name in STAGES}
    origins = {name: meta["made_from"] for name, meta in metas.items()}
    assert origins["base"] == {"tokenizer": get_tokenizer().fingerprint(), "shards": dataset.fingerprint()}
    for source, name in itertools.pairwise(STAGES):
        assert origins[name]["model"] == metas[source]["files"]["model.safetensors"]["sha256"]
        assert origins["base"].items() <= origins[name].items()
    assert len({origins[name]["mixture"] for name in ("mid", "sft", "rl")}) == 3


def load_as_chat_web():
    settings = dict.fromkeys(["dtype", "model_tag", "step", "quantize"])
    worker._load(SimpleNamespace(device_type="cpu", source="sft", num_workers=1, **settings))


@pytest.mark.parametrize(
    "load",
    [
        partial(run, "scripts.chat_cli", "-p", "hi"),
        load_as_chat_web,
        partial(run, "scripts.chat_eval", "-i", "rl", "-a", "PocketSums"),
        partial(run, "scripts.base_loss", "--device_batch_size=2", "--split_tokens=64"),
        partial(run, "scripts.base_eval", "--max_per_task=1"),
        partial(run, "nanochat.hf", "-i", "mid", "out"),
        *(partial(stage, name) for name in ("mid", "sft", "rl")),
        *(partial(stage, name, flag) for name in STAGES for flag in ("--resume", "--resume_from_step=1")),
    ],
    ids=lambda load: " ".join(load.args[:2]) if isinstance(load, partial) else "chat_web",
)
def test_another_tokenizer_of_the_same_size_is_refused(other_tokenizer, monkeypatch, load):
    if "nanochat.hf" in getattr(load, "args", ()):
        pytest.importorskip("transformers")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(other_tokenizer))
    with raises_user_error("with tokenizer [0-9a-f]{12}, .*tokenizer is [0-9a-f]{12}; its tokenizer is tokenizer.old1"):
        load()


def test_tokenizers_are_set_aside_and_can_be_put_back(trained, capsys):
    tokenizer = get_tokenizer()
    save_as_default(tokenizer)
    assert "already" in capsys.readouterr().out
    save_another_tokenizer()
    assert "renamed to tokenizer.old1" in capsys.readouterr().out
    (trained / "tokenizer").rename(trained / "tokenizer_of_another_model")
    (trained / "tokenizer.old1").rename(trained / "tokenizer")
    assert get_token_bytes().tolist() == tokenizer.count_bytes()
    cm.load_model("sft", CPU)
    (trained / "tokenizer" / "ranks.tiktoken").write_bytes(b"damaged")
    save_as_default(tokenizer)  # its message recommends tok_train, so an equal tokenizer must replace damaged files
    assert get_token_bytes().tolist() == tokenizer.count_bytes()


@pytest.mark.parametrize("failing", ["os.fsync", "pathlib.Path.rename"])
def test_a_failed_save_keeps_the_old_tokenizer(trained, monkeypatch, failing):
    """Path.rename fails as if the process had been killed before the old tokenizer was set aside."""
    before = get_tokenizer().fingerprint()

    def fail(*_):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(failing, fail)
        save_another_tokenizer()
    assert get_tokenizer().fingerprint() == before
    save_another_tokenizer()
    assert sorted(path.name for path in trained.glob("tokenizer*")) == ["tokenizer", "tokenizer.old1"]


def test_other_shards(trained, capsys):
    """base_train does not resume; base_loss warns."""
    run("nanochat.dataset", "--pocket", "--chars=210000", "--overwrite")
    with raises_user_error("cannot resume .* other shards, or another number of them .*; run without --resume"):
        stage("base", "--resume")
    capsys.readouterr()
    run("scripts.base_loss", "--device_batch_size=2", "--split_tokens=64", "--device_type=cpu")
    assert capsys.readouterr().err.count("warning: the model was trained on other shards") == 1


@pytest.mark.parametrize("name", ["mid", "sft"])
def test_another_mixture_is_not_resumed(trained, monkeypatch, name):
    stage(name, "--resume")  # finished already
    monkeypatch.setitem(mixtures.POCKET_ROWS, mixtures.pocket.PocketSums, {"mid": 39, "sft": 19})
    with raises_user_error("cannot resume .* other conversations or tasks"):
        stage(name, "--resume")


OWN_TASK = """
from tasks.common import Task, user_and_assistant
class Own(Task):
    def __init__(self, split): super().__init__()
    def num_examples(self): return 3
    def get_example(self, index): return user_and_assistant("say %s", "ok")
    def evaluate(self, conversation, response): return False
"""


@pytest.mark.slow
def test_another_training_task_is_not_resumed(trained):
    own = trained / "own.py"
    own.write_text(OWN_TASK % "one", encoding="utf-8")
    stage("rl", f"--task={own}:Own")
    own.write_text(OWN_TASK % "another", encoding="utf-8")
    with raises_user_error("cannot resume .* other conversations or tasks"):
        stage("rl", f"--task={own}:Own", "--resume")


@pytest.mark.slow
def test_a_retrained_source_is_not_resumed_unless_step_selects_the_old_one(trained):
    stage("base", "--resume", "--num_iterations=2")
    with raises_user_error("cannot resume .* another checkpoint of the previous stage .*--step"):
        stage("mid", "--resume")
    stage("mid", "--resume", "--step=1")


@pytest.mark.slow
def test_a_retrained_source_is_not_resumed_unless_the_old_one_is_put_back(trained):
    stage("sft", "--seed=7")
    with raises_user_error("cannot resume .* another checkpoint of the previous stage .* rename its folder back"):
        stage("rl", "--resume")
    folder = cm.checkpoint_dir("sft", "d1")
    shutil.rmtree(folder)
    folder.with_name("d1.old1").rename(folder)
    stage("rl", "--resume")


@pytest.mark.slow
def test_checkpoint_of_an_older_version(trained, capsys, monkeypatch):
    """Loads with one warning, on rank 0 only; resuming needs a flag, after which the origin is recorded."""
    for name in ("base", "mid"):
        edit_meta(name, lambda meta: meta.pop("made_from"))
    capsys.readouterr()
    with raises_user_error("does not record .*--resume_unverified"):
        stage("mid", "--resume")
    stage("mid", "--resume", "--resume_unverified", "--num_iterations=2")
    assert capsys.readouterr().err.count("does not record") == 2  # one per run
    assert cm.load_model("mid", CPU)[2]["made_from"]["tokenizer"] == get_tokenizer().fingerprint()
    monkeypatch.setenv("RANK", "1")
    cm.load_model("base", CPU)
    assert "does not record" not in capsys.readouterr().err


def test_load_model_takes_the_calls_of_the_reference(trained):
    model, _, meta = cm.load_model("sft", torch.device("cpu"), "eval", "d1", 1)
    assert (meta["step"], model.lm_head.weight.requires_grad) == (1, False)
    model, _, _ = cm.load_model("sft", device="cpu", phase="train", model_tag="d1", step=1)
    assert model.lm_head.weight.requires_grad and model.lm_head.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("chat", "cpu"), "source 'chat': choose one of base, mid, sft, rl"),
        (("sft", CPU, "d1"), 'phase \'d1\': choose "train" or "eval"'),
        (("sft", "xpu"), "xpu: choose one of"),
    ],
)
def test_load_model_refuses_other_arguments(trained, arguments, message):
    with raises_user_error(re.escape(message)):
        cm.load_model(*arguments)
