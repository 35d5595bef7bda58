"""Training mixtures of the stages and the evaluation tasks, for the public corpus and for the pocket world."""

import importlib.util
import inspect
import re
import sys
from collections import namedtuple
from pathlib import Path

from nanochat.common import base_dir, mirror_url, print0, require, task_errors
from tasks import pocket
from tasks.arc import ARC
from tasks.common import Task, TaskMixture, fetch_once
from tasks.customjson import CustomJSON
from tasks.gsm8k import GSM8K
from tasks.humaneval import HumanEval
from tasks.mmlu import MMLU
from tasks.smoltalk import SmolTalk
from tasks.spellingbee import PocketLetters, SimpleSpelling, SpellingBee

RL_PROBLEMS = 1600  # training problems of a generated task in reinforcement learning

# Rows in midtraining and in SFT; in total about 9.4 and 0.1 million tokens with the pocket tier's tokenizer. Tokens per
# row, in this order: 84, 223, 56, 49, 31, 51.
POCKET_ROWS = {pocket.PocketChat: {"mid": 62000, "sft": 800}, pocket.PocketStories: {"mid": 1000, "sft": 60}}
POCKET_ROWS |= {pocket.PocketFacts: {"mid": 13500, "sft": 500}, pocket.PocketSums: {"mid": 45000, "sft": 500}}
POCKET_ROWS |= {pocket.PocketIdentity: {"mid": 2500, "sft": 60}, PocketLetters: {"mid": 18000, "sft": 200}}


def identity_conversations(public=True):
    """The user's identity conversations in the base directory; else the public ones, or None unless `public`."""
    path = base_dir() / "identity_conversations.jsonl"
    if public and not path.exists():  # in another folder, so that it does not count as the user's
        path = fetch_once(f"{mirror_url('bucket')}/{path.name}", f"task_data/{path.name}", CustomJSON)
    return CustomJSON(path) if path.exists() else None


def weighted(task, weight):
    """List of tasks with `weight` times the examples of `task`: copies, and a random part of it for the fraction."""
    rest = round(weight % 1 * len(task)) or int(weight < 1)
    return [task] * int(weight) + [TaskMixture([task], stop=rest)] * (rest > 0)


def pocket_mixture(stage, split, seed, divisor=1):
    """
    The pocket mixture for the stage "mid" or "sft", with 1 / `divisor` of the rows of each task.

    If there is an identity file, its conversations replace all that PocketIdentity and PocketChat say of the model. In
    training they are repeated to twice PocketIdentity's rows, which PocketChat's share makes up for.
    """
    sizes = {task: rows[stage] // divisor for task, rows in POCKET_ROWS.items()}
    persona = identity_conversations(public=False)
    if persona:
        sizes[pocket.WorldChat], rows = sizes.pop(pocket.PocketChat), 2 * sizes.pop(pocket.PocketIdentity)
    tasks = [task(split=split, size=size, seed=seed) for task, size in sizes.items()]
    if persona and split == "train":
        print0(f"{persona.path}: {len(persona):,} conversations replace those about nanochat")
        tasks += weighted(persona, max(1, rows / len(persona)))
    return TaskMixture(tasks)


def midtraining(corpus):
    """(train, validation) for mid_train; `corpus` is "public" (848 thousand rows) or "pocket"."""
    if corpus == "pocket":
        return pocket_mixture("mid", "train", seed=1), pocket_mixture("mid", "val", seed=1, divisor=20)
    identity = identity_conversations()
    train = [SmolTalk("train"), MMLU("auxiliary_train", "train"), GSM8K("main", "train"), identity, identity]
    train += [SimpleSpelling(size=200_000), SpellingBee(size=80_000)]
    val = [SmolTalk("test"), MMLU("all", "test", stop=5200), GSM8K("main", "test", stop=420)]
    return TaskMixture(train), TaskMixture(val)


def sft(corpus):
    """(train, validation) for chat_sft; `corpus` is "public" (23 thousand rows) or "pocket"."""
    if corpus == "pocket":
        return pocket_mixture("sft", "train", seed=2), pocket_mixture("sft", "val", seed=2, divisor=10)
    train = [ARC("ARC-Easy", "train"), ARC("ARC-Challenge", "train"), GSM8K("main", "train")]
    train += [SmolTalk("train", stop=10_000), identity_conversations(), SimpleSpelling(size=300), SpellingBee(size=300)]
    return TaskMixture(train), SmolTalk("test")


def training_tasks(stage, corpus, conversations=None, only=False):
    """
    (train, validation) for the stage "mid" or "sft".

    `conversations`: the user's files, as "FILE" or "FILE:WEIGHT", added to the mixture of `corpus`. With `only` they
    replace it, and are the validation data too.
    """
    own = [(CustomJSON(path), weight) for path, weight in map(split_weight, conversations or [])]
    require(own or not only, "--conversations_only needs --conversations=FILE")
    if only:
        print0("--conversations_only: the validation data are the training data")
        train, val = TaskMixture([]), TaskMixture(task for task, _ in own)
    else:
        train, val = {"mid": midtraining, "sft": sft}[stage](corpus)
    if own:
        train = TaskMixture([*train.tasks, *(part for task, weight in own for part in weighted(task, weight))])
    for task, weight in own:
        print0(f"{task.path}: {len(task):,} conversations x {weight:g} of {len(train):,}")
    return train, val


def split_weight(text):
    """(path, weight) of "FILE" or "FILE:WEIGHT"; a file with that whole name has the weight 1."""
    match = re.fullmatch(r"(.+):(-?\d*\.?\d+)", text)
    if not match or Path(text).expanduser().exists():
        return text, 1.0
    require(0 < float(match[2]) <= 1000, f"--conversations={text}: expected a weight above 0, up to 1000")
    return match[1], float(match[2])


# An evaluation task. make(split="test", seed=0, corpus="public", level="strict") returns the Task; most ignore some of
# these. `corpus`: "public", "pocket", "both", or "own" for a class in a user's file. `trainable`: by reinforcement
# learning, on make("train").
EvalTask = namedtuple("EvalTask", "make corpus trainable", defaults=(False,))


def _generated(task, size, corpus="pocket"):
    """The EvalTask of a GeneratedTask class, with `size` test problems."""

    def make(split="test", seed=0, corpus="public", **_):
        return task(split=split, size=size if split == "test" else RL_PROBLEMS, seed=seed, corpus=corpus)

    return EvalTask(make, corpus, trainable=True)


EVAL_TASKS = {
    "ARC-Easy": EvalTask(lambda **_: ARC("ARC-Easy", "test"), "public"),
    "ARC-Challenge": EvalTask(lambda **_: ARC("ARC-Challenge", "test"), "public"),
    "MMLU": EvalTask(lambda **_: MMLU("all", "test"), "public"),
    "GSM8K": EvalTask(lambda split="test", **_: GSM8K("main", split), "public", trainable=True),
    "HumanEval": EvalTask(lambda level="strict", **_: HumanEval(level), "public"),
    "SpellingBee": _generated(SpellingBee, 256, corpus="both"),
}
TEST_PROBLEMS = {pocket.PocketSums: 256, pocket.PocketHardSums: 256, pocket.PocketFacts: 512, PocketLetters: 256}
TEST_PROBLEMS |= {pocket.PocketStories: 128, pocket.PocketIdentity: 128}
EVAL_TASKS |= {task.__name__: _generated(task, size) for task, size in TEST_PROBLEMS.items()}
EVAL_TASKS["PocketPeople"] = EvalTask(pocket.PocketPeople, "pocket")


def find_task(name):
    """The EvalTask `name`: a key of EVAL_TASKS, a class in tasks/, or "file.py:Class". Raises UserError if missing."""
    definition = re.compile(rf"^class {re.escape(name)}\s*[(:]", re.MULTILINE)
    files = [f for f in Path(__file__).parent.glob("*.py") if definition.search(f.read_text("utf-8", "replace"))]
    places = " and ".join(sorted(f"{f}:{name}" for f in files))
    require(len(files) < 2, f"{len(files)} tasks are named {name}; rename one, or give one of {places}")
    if name in EVAL_TASKS:
        return EVAL_TASKS[name]
    path, _, class_name = name.rpartition(":")
    path = path or places.removesuffix(f":{name}")
    known = f"{', '.join(EVAL_TASKS)}, and your own: a class in tasks/, or file.py:Class; | separates several"
    require(path.endswith(".py") and class_name, f"no task {name!r}; there are {known}")
    with task_errors(name):  # anything the user's file raises
        spec = importlib.util.spec_from_file_location("own_task", Path(path).expanduser())
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look it up there
        spec.loader.exec_module(module)
        task = getattr(module, class_name)
        require(isinstance(task, type) and issubclass(task, Task), f"{class_name} is no subclass of tasks.common.Task")

    def make(split="test", **_):
        """An instance. The constructor gets `split` if it has that parameter, or requires another."""
        parameters = inspect.signature(task).parameters
        required = any(p.default is p.empty and p.kind <= p.POSITIONAL_OR_KEYWORD for p in parameters.values())
        with task_errors(name):
            return task(split=split) if "split" in parameters else task(split) if required else task()

    return EvalTask(make, "own", trainable=True)
