"""CORE: prompts against literal text, verdicts against one full forward pass per example, and damaged files."""

import itertools
import json
import math
import random
import shutil
import zipfile

import pytest
import torch
from helpers import (
    CPU,
    WORDS,
    raises_user_error,
    random_model,
    random_words,
    read_jsonl,
    report_metrics,
    transformers_model,
)

from dev.bench.bench_core import plain
from nanochat.common import UserError
from nanochat.core_eval import CoreScore, crop, evaluate_core, prefix_groups, score, scored_rows
from nanochat.dclm.tasks import CoreTask, bundle_dir, load_tasks
from nanochat.tokenizer import get_tokenizer


def make_rows(kind, n, seed=0):
    """`n` random rows of a task of this kind, as in the bundle's files."""
    rng = random.Random(seed)
    if kind == "multiple_choice":
        return [
            {
                "query": random_words(rng, rng.randint(1, 12)),
                "choices": [random_words(rng, rng.randint(1, 4)) for _ in range(4)],
            }
            | {"gold": rng.randrange(4)}
            for _ in range(n)
        ]
    if kind == "schema":
        heads = [random_words(rng, rng.randint(1, 8)) for _ in range(n)]
        return [
            {
                "context_options": [f"{head} cat", f"{head} the blue dog"],
                "continuation": random_words(rng, 3),
                "gold": 0,
            }
            for head in heads
        ]
    stories = [random_words(rng, 30) for _ in range(3)]
    return [
        {
            "context": f" {rng.choice(stories)} {random_words(rng, 3)}\n",
            "continuation": random_words(rng, rng.randint(1, 2)),
        }
        for _ in range(n)
    ]


TASKS = [  # zero-shot and few-shot, also with more shots than there are other examples
    CoreTask("choice", "multiple_choice", 0, " ", 0.25, make_rows("multiple_choice", 30)),
    CoreTask("choice_shots", "multiple_choice", 3, "\nAnswer: ", 0.25, make_rows("multiple_choice", 20, 1)),
    CoreTask("schema", "schema", 0, " ", 0.5, make_rows("schema", 20)),
    CoreTask("schema_shots", "schema", 9, " ", 0.5, make_rows("schema", 6, 2)),
    CoreTask("story", "language_modeling", 0, " ", 0.0, make_rows("language_modeling", 25)),
    CoreTask("story_shots", "language_modeling", 2, "\nAnswer: ", 0.0, make_rows("language_modeling", 9, 3)),
]


@pytest.fixture
def tokenizer(base):
    return get_tokenizer()


def small_model(tokenizer, n_kv_head=2):
    return random_model(tokenizer.get_vocab_size(), sequence_len=32, n_kv_head=n_kv_head)


def assert_equal_to_full_passes(result, forward, tokenizer, tasks, max_per_task=-1):
    """Compares every record of `result` with one pass forward(ids) -> logits over the whole example."""
    for task in tasks:
        examples = task.examples(max_per_task)
        records = result.records[task.label]
        assert [r["index"] for r in records] == list(range(len(examples)))
        for record in records:
            decision, correct = plain(forward, tokenizer, task, examples, record["index"])
            assert record["correct"] == correct
            if task.kind == "language_modeling":
                assert record["predicted"] == tokenizer.decode(decision)
            else:
                expected = [math.nan if x is None else x for x in record["losses"]]
                assert expected == pytest.approx(decision, abs=1e-4, nan_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# Prompts


def test_prompts_of_each_kind():
    choice = CoreTask("t", "multiple_choice", 1, "\nAnswer: ", 0, [])
    examples = [{"query": "Q: 1+1?", "choices": ["2", "3"], "gold": 0}, {"query": "Q: 2+2?", "choices": ["1", "4"]}]
    context = "Q: 1+1?\nAnswer: 2\n\nQ: 2+2?\nAnswer: "
    assert choice.prompts(examples, 1) == [context + "1", context + "4"]
    schema = CoreTask("t", "schema", 1, " ", 0, [])
    examples = [{"context_options": ["A", "B"], "continuation": "ran.", "gold": 1}]
    examples += [{"context_options": ["C", "D"], "continuation": "sat."}]
    assert schema.prompts(examples, 1) == ["B ran.\n\nC sat.", "B ran.\n\nD sat."]
    story = CoreTask("t", "language_modeling", 1, " -> ", 0, [])
    examples = [{"context": " one two ", "continuation": "three"}, {"context": "\nfour\n", "continuation": "five six"}]
    assert story.prompts(examples, 1) == ["one two -> three\n\nfour ->", "one two -> three\n\nfour -> five six"]


def test_example_order_and_shots_follow_the_seeds():
    rows = [{"context": str(i), "continuation": "x"} for i in range(20)]
    task = CoreTask("t", "language_modeling", 3, " ", 0, rows)
    order = list(range(20))
    random.Random(1337).shuffle(order)
    assert [row["context"] for row in task.examples()] == [str(i) for i in order]
    assert task.examples(5) == task.examples()[:5]
    examples = [{"context": str(i), "continuation": "x"} for i in range(6)]
    shots = random.Random(1234 + 2).sample([0, 1, 3, 4, 5], 3)  # from the other examples, after max_per_task
    assert task.prompts(examples, 2)[1] == "".join(f"{i} x\n\n" for i in shots) + "2 x"
    # Two other examples, but three shots.
    assert sorted(task.prompts(examples[:3], 0)[0].split("\n\n")) == [
        "0",
        "1 x",
        "2 x",
    ]


def test_scored_rows_and_crop_by_hand():
    options = [[0, 5, 6, 7], [0, 5, 8], [0, 5, 6]]
    assert scored_rows("multiple_choice", options) == [(row, 2) for row in options]
    assert scored_rows("schema", [[0, 1, 9, 8], [0, 2, 3, 9, 8]]) == [([0, 1, 9, 8], 2), ([0, 2, 3, 9, 8], 3)]
    assert scored_rows("schema", [[0, 1], [0, 1]]) == [([0, 1], 1)] * 2  # the first token is never predicted
    assert scored_rows("language_modeling", [[0, 1, 2], [0, 1, 2, 3, 4]]) == [([0, 1, 2, 3, 4], 3)]
    # The first token of the continuation merges with the last one of the context.
    assert scored_rows("language_modeling", [[0, 1, 7], [0, 1, 2, 3]]) == [([0, 1, 2, 3], 2)]
    assert crop([0, 1, 2, 3, 4], 3, None) == ([0, 1, 2, 3, 4], 3)
    assert crop([0, 1, 2, 3, 4], 3, 4) == ([1, 2, 3, 4], 2)
    assert crop([0, 1, 2, 3, 4], 1, 2) == ([3, 4], 1)


def test_groups_share_a_prefix_before_the_scored_tokens():
    a, b, c = (1, 2, 3, 4, 5), (1, 2, 3, 4, 6), (1, 9, 9, 9)
    assert sorted(prefix_groups({a: 4, b: 4, c: 3})) == [(3, [c]), (4, [a, b])]
    assert prefix_groups({a: 2, b: 4}) == [(2, [a]), (4, [b])]  # two of five tokens are below MIN_SHARED
    assert prefix_groups({a: 3, b: 4}) == [(3, [a, b])]


# ---------------------------------------------------------------------------------------------------------------------
# Verdicts


@pytest.mark.parametrize("n_kv_head", [1, 2])
@pytest.mark.parametrize("pass_tokens", [1, 100, 100_000])
def test_every_example_equals_a_full_forward_pass(tokenizer, pass_tokens, n_kv_head):
    model = small_model(tokenizer, n_kv_head)
    result = evaluate_core(model, tokenizer, CPU, tasks=TASKS, pass_tokens=pass_tokens)
    assert_equal_to_full_passes(result, model, tokenizer, TASKS)
    assert 0 < sum(map(len, result.records.values())) and len(set(result.accuracies.values())) > 1


def test_max_per_task_and_several_windows(tokenizer, monkeypatch):
    monkeypatch.setattr("nanochat.core_eval.WINDOW", 3)
    model, progress_calls = small_model(tokenizer), []
    result = evaluate_core(model, tokenizer, CPU, 8, TASKS, lambda *args: progress_calls.append(args))
    assert_equal_to_full_passes(result, model, tokenizer, TASKS, 8)
    assert all(done <= total for _, done, total in progress_calls)
    assert {(label, total) for label, done, total in progress_calls if done == total} == {
        (t.label, min(8, len(t.rows))) for t in TASKS
    }


def test_greedy_continuation_of_the_model_is_correct(tokenizer):
    """A random model predicts no fixed continuation, so the model itself generates the correct ones."""
    model, rows = small_model(tokenizer), []
    for i in range(12):
        context = random_words(random.Random(i), 5)
        ids = tokenizer.encode(context, tokenizer.get_bos_token_id())
        text = tokenizer.decode(list(model.generate(ids, 2, temperature=0)))
        rows.append({"context": context, "continuation": text if i % 3 else text + "x"})
    task = CoreTask("t", "language_modeling", 0, "", 0.0, rows)
    result = evaluate_core(model, tokenizer, CPU, tasks=[task])
    assert_equal_to_full_passes(result, model, tokenizer, [task])
    assert 0 < result.accuracies["t"] < 1


def test_equal_options_and_options_that_are_prefixes_of_other_options(tokenizer):
    choices = [["cat", "cat"], ["cat sat", "cat sat on"], ["cat sat on", "cat sat"], ["red"]]
    rows = [{"query": "the", "choices": c, "gold": 0} for c in choices]
    task = CoreTask("t", "multiple_choice", 0, " ", 0.0, rows)
    model = small_model(tokenizer)
    result = evaluate_core(model, tokenizer, CPU, tasks=[task])
    assert_equal_to_full_passes(result, model, tokenizer, [task])
    assert all(r["chosen"] == 0 and None in r["losses"] for r in result.records["t"])
    # Equal rows in one batch may differ in the last bit; evaluate_core() computes them once.
    rows = [
        {"query": "the", "choices": choices, "gold": 0} for choices in itertools.permutations(["dog", "dog", "sun"])
    ]
    result = evaluate_core(model, tokenizer, CPU, tasks=[CoreTask("t", "multiple_choice", 0, " ", 0.0, rows)])
    for record in result.records["t"]:
        losses = record["losses"]
        assert len(set(losses)) == 2 and record["chosen"] == losses.index(min(losses))


def test_options_of_one_token_share_one_forward_pass(tokenizer):
    passes = []  # token rows of each forward pass

    class RecordingScorer:
        shares_prefixes, equal_prefixes, max_tokens, device = True, False, None, "cpu"

        def prefill(self, prefixes):
            passes.append(prefixes)

        def logits(self, cache, cache_rows, suffixes, rows, columns):
            passes.append(suffixes)
            yield torch.zeros(len(rows), 10)

    rows = {option: ([0, 1, 2, option], 3) for option in range(4)}
    results = score(RecordingScorer(), rows, 100)
    assert passes == [[(0, 1)], [[2]]]
    assert [loss for loss, _ in results.values()] == pytest.approx([math.log(10)] * 4)


def test_centered_accuracy_and_core_by_hand():
    records = {"a": [{"correct": c} for c in (True, True, True, False)], "b": [{"correct": False}]}
    result = CoreScore(records, {"a": 0.5, "b": 0.2})
    assert result.accuracies == {"a": 0.75, "b": 0.0}
    assert result.centered == pytest.approx({"a": 0.5, "b": -0.25})
    assert result.core == pytest.approx(0.125)


# ---------------------------------------------------------------------------------------------------------------------
# The bundle and the script


@pytest.fixture
def bundle(base):
    """Folder of a bundle in the base directory, with one task of each kind."""
    folder = base / "eval_bundle"
    (folder / "eval_data" / "sub").mkdir(parents=True)
    kinds = ("multiple_choice", "schema", "language_modeling")
    rows = {kind: make_rows(kind, 12) for kind in kinds}
    lines = ["icl_tasks:"]
    for kind in kinds:
        lines += [f"- label: {kind}_task", f"  dataset_uri: sub/{kind}.jsonl", "  num_fewshot: [2]"]
        lines += [f"  icl_task_type: {kind}"]
        text = "".join(json.dumps(row) + "\n" for row in rows[kind])
        (folder / "eval_data" / "sub" / f"{kind}.jsonl").write_text(text)
    lines += ["  continuation_delimiter: ' ... '"]
    (folder / "core.yaml").write_text("\n".join(lines) + "\n")
    baselines = ["Eval Task,Kind,Random baseline", "multiple_choice_task,x,25", "schema_task,x,50"]
    (folder / "eval_meta_data.csv").write_text("\n".join([*baselines, "language_modeling_task,x,0"]) + "\n")
    return folder


@pytest.fixture
def checkpoint(base, tokenizer):
    """The model that is saved as step 7 of base model d2."""
    from nanochat.checkpoint_manager import checkpoint_dir, save_checkpoint

    model = small_model(tokenizer)
    meta = {"made_from": {"tokenizer": tokenizer.fingerprint()}}
    save_checkpoint(checkpoint_dir("base", "d2"), 7, model, None, meta, CPU)
    return model


def test_load_tasks_reads_the_bundle(bundle):
    tasks = load_tasks()
    assert [(t.label, t.kind, t.shots, t.delimiter, t.baseline) for t in tasks] == [
        ("multiple_choice_task", "multiple_choice", 2, " ", 0.25),
        ("schema_task", "schema", 2, " ", 0.5),
        ("language_modeling_task", "language_modeling", 2, " ... ", 0.0),
    ]
    assert tasks[1].rows == make_rows("schema", 12)
    assert [t.label for t in load_tasks(["schema_task"])] == ["schema_task"]


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


# message of load_tasks() -> function that damages the bundle in folder b
DAMAGES = {
    "cannot read .*schema.jsonl .*No such file": lambda b: (b / "eval_data/sub/schema.jsonl").unlink(),
    "cannot read .*core.yaml .*No such file": lambda b: (b / "core.yaml").unlink(),
    "cannot read .*eval_meta_data.csv .*No such file": lambda b: (b / "eval_meta_data.csv").unlink(),
    "schema.jsonl is empty": lambda b: (b / "eval_data/sub/schema.jsonl").write_text("\n"),
    "schema.jsonl:1: not JSON": lambda b: edit(b / "eval_data/sub/schema.jsonl", "{", "<"),
    "schema.jsonl:1: .* needs 'continuation'": lambda b: edit(b / "eval_data/sub/schema.jsonl", "continuation", "c"),
    "schema.jsonl:1: gold=2, but there are 2 options": lambda b: edit(
        b / "eval_data/sub/schema.jsonl", '"gold": 0', '"gold": 2'
    ),
    "schema.jsonl:1: .* needs 'gold', of type int": lambda b: edit(
        b / "eval_data/sub/schema.jsonl", '"gold": 0', '"gold": false'
    ),
    "schema.jsonl:1: 'context_options' must be a list of at least two": lambda b: (
        b / "eval_data/sub/schema.jsonl"
    ).write_text('{"context_options": ["a"], "continuation": "b", "gold": 0}'),
    "language_modeling.jsonl:1: the continuation is empty": lambda b: (
        b / "eval_data/sub/language_modeling.jsonl"
    ).write_text('{"context": "a", "continuation": " "}'),
    "two tasks have the label multiple_choice_task": lambda b: edit(
        b / "core.yaml", "schema_task", "multiple_choice_task"
    ),
    "cannot read .*language_modeling.jsonl .*decode": lambda b: (
        b / "eval_data/sub/language_modeling.jsonl"
    ).write_bytes(b"\xff"),
    "has icl_task_type='riddle'": lambda b: edit(b / "core.yaml", "type: schema", "type: riddle"),
    "has num_fewshot='two'": lambda b: edit(b / "core.yaml", "[2]", "two"),
    "is not valid YAML": lambda b: edit(b / "core.yaml", "- label", "- [label"),
    "icl_tasks": lambda b: (b / "core.yaml").write_text("tasks: 3\n"),
    "has dataset_uri=": lambda b: edit(b / "core.yaml", "sub/schema", "../../schema"),
    "the baseline of schema_task is None": lambda b: edit(b / "eval_meta_data.csv", "schema_task", "other_task"),
    "the baseline of schema_task is 'much'": lambda b: edit(b / "eval_meta_data.csv", "50", "much"),
    "the baseline of schema_task is '100'": lambda b: edit(b / "eval_meta_data.csv", "50", "100"),
    "Random baseline": lambda b: edit(b / "eval_meta_data.csv", "Random baseline", "Chance"),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_damaged_bundle_raises_user_error(bundle, message):
    DAMAGES[message](bundle)
    with raises_user_error(message):
        load_tasks()


def test_bundle_saved_by_another_editor_is_read(bundle):
    expected = load_tasks()
    for path in (path for path in bundle.rglob("*") if path.is_file()):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert load_tasks() == expected
    row = {"context": "cat \ud83d", "continuation": "dog"}
    (bundle / "eval_data/sub/language_modeling.jsonl").write_text(json.dumps(row))
    assert load_tasks(["language_modeling_task"])[0].rows == [row | {"context": "cat ?"}]


def test_bundle_is_downloaded_once_and_extracted_atomically(base, tmp_path, monkeypatch):
    bucket = tmp_path / "bucket"
    bucket.mkdir()
    monkeypatch.setenv("NANOCHAT_BUCKET_URL", str(bucket))
    with pytest.raises(UserError, match="no file at .*eval_bundle.zip"):
        bundle_dir()

    def write_zip(**members):
        with zipfile.ZipFile(bucket / "eval_bundle.zip", "w") as z:
            for name, text in members.items():
                z.writestr(name, text)

    for names, message in ((["eval_bundle/core.yaml", "../evil"], "outside"), (["core.yaml"], "contains no")):
        write_zip(**{name: "x" for name in names})
        with pytest.raises(UserError, match=message):
            bundle_dir()
    write_zip(**{"eval_bundle/core.yaml": "icl_tasks: []", "eval_bundle/eval_data/a.jsonl": "{}" * 1000})
    complete = (bucket / "eval_bundle.zip").read_bytes()
    encrypted = bytearray(complete)
    encrypted[complete.rindex(b"PK\1\2") + 8] |= 1  # a flag of the last file
    encrypted[complete.rindex(b"PK\3\4") + 6] |= 1
    for damaged in (complete[: len(complete) // 2], b"", complete.replace(b"{}{}", b"{x{}"), encrypted):
        (bucket / "eval_bundle.zip").write_bytes(damaged)
        with pytest.raises(UserError, match="not a complete zip file|an empty file"):
            bundle_dir()
        assert not list(base.glob("eval_bundle*[!k]")) and not (base.parent / "evil").exists()
    (bucket / "eval_bundle.zip").write_bytes(complete)
    assert (bundle_dir() / "eval_data" / "a.jsonl").stat().st_size == 2000
    shutil.rmtree(bucket)
    assert bundle_dir() == base / "eval_bundle"


def test_base_eval_writes_table_report_and_samples(base, bundle, checkpoint, run_main, tokenizer, capsys):
    run_main("scripts.base_eval", "--max-per-task=5", "--save-samples=samples.jsonl", "--device_type=cpu")
    expected = evaluate_core(checkpoint, tokenizer, CPU, 5, load_tasks())
    table = (base / "base_eval" / "base_model_000007.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in table] == ["Task", *expected.records, "CORE"]
    assert float(table[-1].split(",")[2]) == pytest.approx(expected.core, abs=1e-6)
    metrics = report_metrics(base, "base-model-evaluation")
    assert metrics["core"] == pytest.approx(expected.core) and metrics["wall_clock_seconds"] > 0
    section = (base / "report" / "base-model-evaluation.md").read_text()
    assert f"- CORE metric: {expected.core:.4f}\n" in section
    assert f"- schema_task: {expected.centered['schema_task']:.4f}\n" in section
    samples = read_jsonl("samples.jsonl")
    assert [s["correct"] for s in samples] == [r["correct"] for records in expected.records.values() for r in records]
    assert samples[0]["example"]["choices"] and samples[0]["task"] == "multiple_choice_task"
    out = capsys.readouterr().out
    assert "float32" in out and f"CORE on at most 5 examples per task: {expected.core:.4f}" in out
    (base / "base_eval" / "base_model_000007.csv").unlink()
    run_main("scripts.base_eval", "--tasks=schema_task", "--device_type=cpu")
    assert "CORE needs all" in capsys.readouterr().out
    assert not list((base / "base_eval").iterdir())


def test_base_eval_user_errors(base, bundle, checkpoint, run_main, tmp_path):
    for flags, message in (
        (["--tasks=riddles"], "no task 'riddles' .* there are multiple_choice_task"),
        (["--max-per-task=0"], "expected at least 1"),
        (["--step=3"], "no checkpoint of step 3"),
        (["--hf-path=x", "--step=3"], "not both"),
        (["--hf-path", base / "base_checkpoints" / "d2" / "step_000007"], "no config.json"),
        (["--save_samples=nowhere/x"], "no such folder"),
        (["--save_samples", tmp_path], "is not an ordinary file"),
        (["--save_samples=/dev/null"], "--save_samples=/dev/null is not an ordinary file"),
    ):
        with pytest.raises(UserError, match=message):
            run_main("scripts.base_eval", "--device_type=cpu", *flags)


def test_base_loss_reports_the_loss_of_both_splits(base, checkpoint, run_main):
    run_main("scripts.base_loss", "--model_step=7", "--device_batch_size=2", "--split_tokens=128", "--device_type=cpu")
    metrics = report_metrics(base, "base-model-loss")
    section = (base / "report" / "base-model-loss.md").read_text()
    for split in ("train", "val"):
        assert f"- {split} bpb: {metrics[f'{split}_bpb']:.4f}\n" in section
    with pytest.raises(UserError, match="no checkpoint of step 3"):
        run_main("scripts.base_loss", "--model-step=3", "--device_type=cpu")
    with pytest.raises(UserError, match="--split_tokens=100 is not a multiple of 64"):
        run_main("scripts.base_loss", "--split_tokens=100", "--device_batch_size=2", "--device_type=cpu")


@pytest.mark.slow
def test_two_processes_give_the_samples_of_one(base, bundle, checkpoint, run_script):
    samples = []
    for ranks in (1, 2):
        run_script("scripts.base_eval", f"--save_samples={ranks}_ranks.jsonl", "--device_type=cpu", ranks=ranks)
        samples.append(read_jsonl(f"{ranks}_ranks.jsonl"))
    for one, two in zip(*samples, strict=True):
        assert one.pop("losses", []) == pytest.approx(two.pop("losses", []), abs=1e-4)
        assert one == two


@pytest.mark.slow
def test_damaged_bundle_exits_with_code_2_and_one_line(base, bundle, checkpoint, run_script):
    (bundle / "eval_data" / "sub" / "schema.jsonl").write_text("")
    done = run_script("scripts.base_eval", "--device_type=cpu", check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face models


@pytest.fixture
def hf_folder(tmp_path, tokenizer):
    """hf_folder("gpt2") -> folder of a tiny random model of that architecture, with a tokenizer of whole words."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    def hf_folder(kind, positions=256, bos="<|endoftext|>", **settings):
        vocab = {bos: 0, "[UNK]": 1} | {
            f"{s}{w}": 2 + 2 * i + j for i, w in enumerate(WORDS) for j, s in enumerate("▁ ")
        }
        tok = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
        tok.pre_tokenizer = pre_tokenizers.Metaspace()
        torch.manual_seed(0)
        if kind == "nanochat":
            model = random_model(len(vocab), sequence_len=32)
            hf = transformers_model(model, max_position_embeddings=positions)
        else:
            config = transformers.AutoConfig.for_model(
                kind, vocab_size=len(vocab), bos_token_id=0, eos_token_id=0, **settings
            )
            hf = transformers.AutoModelForCausalLM.from_config(config)
            for p in hf.parameters():
                torch.nn.init.normal_(p, std=0.3)
        folder = tmp_path / "models" / kind
        hf.save_pretrained(folder)
        fast = transformers.PreTrainedTokenizerFast(
            tokenizer_object=tok, bos_token=bos, eos_token=bos, unk_token="[UNK]"
        )
        fast.save_pretrained(folder)
        return folder

    return hf_folder


GPT2 = dict(n_embd=32, n_layer=2, n_head=2)
LLAMA = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
HF_TASKS = [TASKS[0], TASKS[1], TASKS[2], TASKS[5]]


class SingleTextTokenizer:
    """The interface that plain() expects: encode() takes one text and adds no special token."""

    def __init__(self, tokenizer):
        self.tokenizer, self.get_bos_token_id, self.decode = tokenizer, tokenizer.get_bos_token_id, tokenizer.decode

    def encode(self, text):
        return self.tokenizer.encode([text], 0)[0][1:]


@pytest.mark.parametrize("kind, settings, shares", [
    ("gpt2", dict(GPT2, n_positions=256), True),
    pytest.param("llama", LLAMA, True, marks=pytest.mark.slow),
    ("nanochat", {}, True),
    pytest.param("mistral", dict(LLAMA, sliding_window=4), False, marks=pytest.mark.slow),
])  # fmt: skip
def test_hugging_face_model_equals_full_forward_passes(hf_folder, kind, settings, shares, monkeypatch):
    from nanochat.dclm.hf_models import load_hf

    scorer, tokenizer = load_hf(str(hf_folder(kind, **settings)), CPU)
    assert scorer.shares_prefixes == shares and scorer.max_tokens >= 256
    for pass_tokens, max_logits in ((1, 1), (10_000, 10_000)):
        scorer.max_logits = max_logits
        result = evaluate_core(scorer, tokenizer, CPU, tasks=HF_TASKS, pass_tokens=pass_tokens)
        assert_equal_to_full_passes(
            result, lambda ids: scorer.model(ids).logits, SingleTextTokenizer(tokenizer), HF_TASKS
        )


def test_long_prompts_are_cropped_on_the_left(hf_folder):
    from nanochat.dclm.hf_models import load_hf

    scorer, tokenizer = load_hf(str(hf_folder("gpt2", **GPT2, n_positions=20)), CPU)
    task = TASKS[1]
    result = evaluate_core(scorer, tokenizer, CPU, tasks=[task])
    examples, cropped = task.examples(), 0
    for record in result.records[task.label]:
        rows = tokenizer.encode(task.prompts(examples, record["index"]), 0)
        for (row, start), loss in zip(scored_rows(task.kind, rows), record["losses"], strict=True):
            n, cropped = len(row) - start, cropped + (len(row) > 20)
            logits = scorer.model(torch.tensor([row[-20:]])).logits[0, -1 - n : -1]
            if n:
                expected = torch.nn.functional.cross_entropy(logits, torch.tensor(row[-n:])).item()
                assert loss == pytest.approx(expected, abs=1e-4)
    assert cropped > 10


def test_base_eval_of_a_hugging_face_folder(base, bundle, hf_folder, run_main):
    run_main("scripts.base_eval", "--hf-path", hf_folder("gpt2", **GPT2), "--device_type=cpu")
    (table,) = (base / "base_eval").iterdir()
    assert table.name.endswith("models-gpt2.csv") and table.read_text().splitlines()[-1].startswith("CORE,,")
    assert not (base / "report" / "base-model-evaluation.json").exists()  # the report is about our own model


def test_load_hf_refuses_models_that_are_not_causal_or_incomplete(hf_folder, tmp_path):
    from nanochat.dclm.hf_models import load_hf

    bert = hf_folder("bert", hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    with pytest.raises(UserError, match="looks at later tokens"):
        load_hf(str(bert), CPU)
    good = hf_folder("gpt2", **GPT2)
    hidden = [path.rename(path.with_name(f"hidden_{path.name}")) for path in good.glob("tokenizer*")]
    with pytest.raises(UserError, match="no working tokenizer"):
        load_hf(str(good), CPU)
    for path in hidden:
        path.rename(path.with_name(path.name.removeprefix("hidden_")))
    edit(good / "config.json", '"n_layer": 2', '"n_layer": 3')
    with pytest.raises(UserError, match="weights are missing"):
        load_hf(str(good), CPU)
    edit(good / "config.json", '"gpt2"', '"t5"')
    with pytest.raises(UserError, match="cannot be loaded"):
        load_hf(str(good), CPU)
    (good / "config.json").write_text("{")
    with raises_user_error("cannot be loaded"):
        load_hf(str(good), CPU)
