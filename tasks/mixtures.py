"""Training mixtures of the stages and the evaluation tasks, for the public corpus and for the pocket world."""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from nanochat.common import UserError, mirror_url
from tasks.arc import ARC
from tasks.common import Task, TaskMixture, fetch_once
from tasks.customjson import CustomJSON
from tasks.gsm8k import GSM8K
from tasks.humaneval import HumanEval
from tasks.mmlu import MMLU
from tasks.pocket import PocketChat, PocketFacts, PocketHardSums, PocketIdentity, PocketStories, PocketSums
from tasks.smoltalk import SmolTalk
from tasks.spellingbee import SimpleSpelling, SpellingBee, WordTask

RL_PROBLEMS = 1600  # training problems of a generated task in reinforcement learning

# Rows in midtraining and in SFT; in total about 2.7 and 0.6 million tokens with the pocket tier's tokenizer.
POCKET_ROWS = {
    PocketChat: {"mid": 4200, "sft": 1300},  # 120 tokens per row
    PocketStories: {"mid": 1800, "sft": 300},  # 300
    PocketFacts: {"mid": 13000, "sft": 5000},  # 65
    PocketSums: {"mid": 7000, "sft": 1500},  # 55
    PocketIdentity: {"mid": 1500, "sft": 700},  # 40
    SpellingBee: {"mid": 5500, "sft": 800},  # 125
    SimpleSpelling: {"mid": 2000, "sft": 200},  # 25
}


def identity_conversations():
    """The user's identity conversations in the base directory, or the public ones, downloaded there."""
    name = "identity_conversations.jsonl"
    return CustomJSON(fetch_once(f"{mirror_url('bucket')}/{name}", name))


def make_generated(task, split, size, seed=0, corpus="public", **_):
    """An instance of `task`, a subclass of GeneratedTask; extra arguments are ignored."""
    options = {"corpus": corpus} if issubclass(task, WordTask) else {}
    return task(split=split, size=size, seed=seed, **options)


def pocket_mixture(stage, split, seed, divisor=1):
    """The pocket mixture for the stage "mid" or "sft", with 1 / `divisor` of the rows of each task."""
    sizes = {task: rows[stage] // divisor for task, rows in POCKET_ROWS.items()}
    return TaskMixture(make_generated(task, split, size, seed, "pocket") for task, size in sizes.items())


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
    train += [SmolTalk("train", stop=10_000), identity_conversations()]
    train += [SimpleSpelling(size=300), SpellingBee(size=300)]
    return TaskMixture(train), SmolTalk("test")


@dataclass(frozen=True)
class EvalTask:
    """An evaluation task; reinforcement learning can train on it if it has `train`."""

    make: Callable[..., Task]  # make(seed=0, corpus="public", level="strict"); most tasks ignore these
    baseline: float  # accuracy of random guessing
    corpus: str  # "public", "pocket", "both", or "own" for a class in a user's file
    train: Callable[..., Task] | None = None  # makes the training split, with the same parameters


def _generated(task, size, corpus="pocket", baseline=0.0):
    """The EvalTask of a GeneratedTask class, with `size` test problems."""
    train = partial(make_generated, task, "train", RL_PROBLEMS)
    return EvalTask(partial(make_generated, task, "test", size), baseline, corpus, train)


EVAL_TASKS = {
    "ARC-Easy": EvalTask(lambda **_: ARC("ARC-Easy", "test"), 0.25, "public"),
    "ARC-Challenge": EvalTask(lambda **_: ARC("ARC-Challenge", "test"), 0.25, "public"),
    "MMLU": EvalTask(lambda **_: MMLU("all", "test"), 0.25, "public"),
    "GSM8K": EvalTask(lambda **_: GSM8K("main", "test"), 0.0, "public", lambda **_: GSM8K("main", "train")),
    "HumanEval": EvalTask(lambda level="strict", **_: HumanEval(level), 0.0, "public"),
    "SpellingBee": _generated(SpellingBee, 256, corpus="both"),
    "PocketSums": _generated(PocketSums, 256),
    "PocketHardSums": _generated(PocketHardSums, 256),
    "PocketFacts": _generated(PocketFacts, 512, baseline=0.25),
    "PocketStories": _generated(PocketStories, 128),
    "PocketIdentity": EvalTask(partial(make_generated, PocketIdentity, "test", 128), 0.0, "pocket"),
}


def find_task(name):
    """The EvalTask `name`: a key of EVAL_TASKS, or "file.py:Class". Raises UserError if there is none."""
    if name in EVAL_TASKS:
        return EVAL_TASKS[name]
    path, _, class_name = name.rpartition(":")
    if not path.endswith(".py"):
        raise UserError(f"no task {name!r}; there are {', '.join(EVAL_TASKS)}, and your own as file.py:Class")
    try:
        spec = importlib.util.spec_from_file_location("own_task", os.path.expanduser(path))
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        task = getattr(module, class_name)
    except Exception as e:  # anything the user's file raises
        raise UserError(f"task {name}: {type(e).__name__}: {e}") from e
    if not (isinstance(task, type) and issubclass(task, Task)):
        raise UserError(f"task {name}: {class_name} is no subclass of tasks.common.Task")
    return EvalTask(lambda **_: task("test"), task.baseline, "own", lambda **_: task("train"))
