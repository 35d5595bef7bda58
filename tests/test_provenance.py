"""What a model was made from: loading and resuming are refused with another tokenizer, other data, another source."""

import json
import random
import shutil

import pytest
from helpers import CPU, raises_user_error

from nanochat.checkpoint_manager import checkpoint_dir, load_model
from nanochat.tokenizer import Tokenizer, save_as_default

pytestmark = pytest.mark.slow

SIZE = ["--max_seq_len=32", "--device_batch_size=2", "--total_batch_size=64", "--device_type=cpu", "--eval_every=-1"]
COMMANDS = {
    "base": ["scripts.base_train", "--depth=1", *SIZE, "--sample_every=-1", "--core_metric_every=-1"],
    "mid": ["scripts.mid_train", *SIZE],
    "sft": ["scripts.chat_sft", "--device_batch_size=2", "--target_examples_per_step=2", "--eval_every=-1"],
    "rl": ["scripts.chat_rl", "--device_batch_size=2", "--examples_per_step=1", "--num_samples=2", "--eval_every=-1"],
}
EXTRA = {"sft": ["--eval_metrics_every=-1"], "rl": ["--max_new_tokens=4"]}


def command(stage, *flags):
    return [*COMMANDS[stage], *EXTRA.get(stage, []), "--num_iterations=1", *flags]


@pytest.fixture(scope="module")
def trained_base(pocket_base, tmp_path_factory):
    """A base directory with one checkpoint of every stage, of one step each. Read-only."""
    import importlib

    folder = tmp_path_factory.mktemp("trained") / "base"
    shutil.copytree(pocket_base, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder))
        for stage in COMMANDS:
            module, *flags = command(stage)
            importlib.import_module(module).main(flags)
    return folder


@pytest.fixture
def trained(trained_base, tmp_path, monkeypatch):
    """A copy of trained_base; also the working directory."""
    shutil.copytree(trained_base, tmp_path / "base")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "base"


def use_another_tokenizer(base):
    """Trains a tokenizer of the same size on other text, which sets the old one aside."""
    rng = random.Random(0)
    text = " ".join("".join(rng.choices("abcdefghij", k=rng.randrange(2, 9))) for _ in range(5000))
    tokenizer = Tokenizer.train_from_iterator([text], 600)
    assert tokenizer.get_vocab_size() == 600
    save_as_default(tokenizer)
    assert (base / "tokenizer.old1" / "tokenizer.json").exists()


def edit_meta(base, stage, **changes):
    """Changes entries of meta.json of a stage's checkpoint; None removes one."""
    path = next((base / checkpoint_dir(stage, "d1")).glob("step_*/meta.json"))
    meta = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({k: v for k, v in meta.items() if v is not None}), encoding="utf-8")


def test_checkpoints_record_what_they_were_made_from(trained):
    made_from = {stage: load_model(stage, CPU)[2]["made_from"] for stage in COMMANDS}
    assert set(made_from["base"]) == {"tokenizer", "shards"}
    for source, stage in (("base", "mid"), ("mid", "sft"), ("sft", "rl")):
        assert made_from[stage]["model"] == load_model(source, CPU)[2]["files"]["model.safetensors"]["sha256"]
        assert made_from[stage]["shards"] == made_from["base"]["shards"]
    assert len({made_from[stage]["mixture"] for stage in ("mid", "sft", "rl")}) == 3


@pytest.mark.parametrize(
    "flags",
    [
        ["scripts.base_loss", "--device_batch_size=2", "--split_tokens=64"],
        ["scripts.base_eval", "--max_per_task=1"],
        ["scripts.chat_eval", "-i", "sft", "-a", "PocketSums"],
        ["scripts.chat_cli", "-p", "hi"],
        ["nanochat.hf", "-i", "sft", "out"],
        *(command(stage, *resume) for stage in COMMANDS for resume in ((), ("--resume",)) if stage != "base" or resume),
    ],
    ids=lambda flags: f"{flags[0]}{'--resume' in flags and ' --resume' or ''}",
)
def test_every_loader_refuses_another_tokenizer_of_the_same_size(trained, run_main_in, mirror, flags):
    use_another_tokenizer(trained)
    with raises_user_error("tokenizer"):
        run_main_in(*flags)


def test_a_tokenizer_that_was_put_back_is_accepted(trained):
    use_another_tokenizer(trained)
    with raises_user_error("tokenizer.old1: move"):
        load_model("sft", CPU)
    (trained / "tokenizer").rename(trained / "elsewhere")
    (trained / "tokenizer.old1").rename(trained / "tokenizer")
    load_model("sft", CPU)


def test_an_equal_tokenizer_is_left_in_its_place(trained, run_main_in):
    run_main_in("scripts.tok_train", "--vocab_size=600")
    assert not (trained / "tokenizer.old1").exists()


@pytest.mark.parametrize("stage", COMMANDS)
@pytest.mark.parametrize("resume", ["--resume", "--resume_from_step=1"])
def test_resume_is_refused_when_the_data_have_changed(trained, run_main_in, stage, resume):
    name = "shards" if stage == "base" else "mixture"
    made_from = load_model(stage, CPU)[2]["made_from"]
    run_main_in(*command(stage, resume))  # finished already
    edit_meta(trained, stage, made_from=made_from | {name: "0" * 64})
    with raises_user_error("cannot resume .* without --resume"):
        run_main_in(*command(stage, resume))


def test_base_resume_is_refused_with_other_shards(trained, run_main_in, capsys):
    run_main_in("nanochat.dataset", "--pocket", "--chars=210000", "--overwrite")
    with raises_user_error("other shards"):
        run_main_in(*command("base", "--resume"))
    capsys.readouterr()
    run_main_in("scripts.base_loss", "--device_batch_size=2", "--split_tokens=64")
    assert capsys.readouterr().err.count("trained on other shards") == 1


def test_mid_resume_is_refused_with_another_base_model(trained, run_main_in):
    run_main_in(*command("base", "--seed=2"))
    with raises_user_error("another checkpoint of the previous stage"):
        run_main_in(*command("mid", "--resume"))


def test_sft_resume_is_refused_with_other_conversations(trained, run_main_in, tmp_path):
    line = '[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "%s"}]\n'
    path = tmp_path / "own.jsonl"
    path.write_text(line % "one", encoding="utf-8")
    flags = command("sft", f"--conversations={path}")
    run_main_in(*flags)
    run_main_in(*flags, "--resume")
    path.write_text(line % "two", encoding="utf-8")
    with raises_user_error("other conversations"):
        run_main_in(*flags, "--resume")


def test_a_checkpoint_without_fingerprints_warns_and_resumes_only_with_a_flag(trained, run_main_in, capsys):
    edit_meta(trained, "base", made_from=None)
    load_model("base", CPU)
    assert capsys.readouterr().err.count("does not record") == 1
    with raises_user_error("--resume_unverified"):
        run_main_in(*command("base", "--resume"))
    run_main_in(*command("base", "--resume", "--resume_unverified", "--num_iterations=2"))
    assert "made_from" in load_model("base", CPU)[2]


def test_load_model_takes_the_reference_call(trained):
    model, _, meta = load_model("sft", "cpu", "eval", "d1", 1)
    assert not model.lm_head.weight.requires_grad
    assert meta["step"] == 1
    assert load_model("sft", CPU.device, phase="train", model_tag="d1")[0].lm_head.weight.requires_grad
    with raises_user_error('choose "train" or "eval"'):
        load_model("sft", "cpu", phase="test")
