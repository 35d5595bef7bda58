"""
Which tasks each stage trains on and which ones score a model, for public data and for the pocket world.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

from nanochat.common import UserError, base_dir, fetch, mirror_url
from tasks.arc import ARC
from tasks.common import Task, TaskMixture
from tasks.customjson import CustomJSON
from tasks.gsm8k import GSM8K
from tasks.humaneval import HumanEval
from tasks.mmlu import MMLU
from tasks.pocket import PocketChat, PocketFacts, PocketHardSums, PocketIdentity, PocketStories, PocketSums
from tasks.smoltalk import SmolTalk
from tasks.spellingbee import SimpleSpelling, SpellingBee

DATA = ("public", "pocket")
PRACTICE = 1600  # problems for reinforcement learning, of tasks that are made

# Rows of each pocket task in midtraining and in SFT: about 2.7 and 0.6 million tokens of the pocket tier's tokenizer.
POCKET_MID = {
    PocketChat: 4200,  # 120 tokens a row
    PocketStories: 1800,  # 300
    PocketFacts: 13000,  # 65
    PocketSums: 7000,  # 55
    PocketIdentity: 1500,  # 40
    SpellingBee: 5500,  # 125
    SimpleSpelling: 2000,  # 25
}
POCKET_SFT = {
    PocketChat: 1300,
    PocketStories: 300,
    PocketFacts: 5000,
    PocketSums: 1500,
    PocketIdentity: 700,
    SpellingBee: 800,
    SimpleSpelling: 200,
}


def identity_conversations():
    """The identity conversations: one's own in the base directory if there are any, else the public ones."""
    path = base_dir() / "identity_conversations.jsonl"
    if not path.exists():
        fetch(f"{mirror_url('bucket')}/identity_conversations.jsonl", path, attempts=3)
    return CustomJSON(path)


def _pocket(rows, split, seed):
    def make(task, size):
        corpus = {"corpus": "pocket"} if task in (SpellingBee, SimpleSpelling) else {}
        return task(split=split, size=size, seed=seed, **corpus)

    return TaskMixture([make(task, size) for task, size in rows.items()])


def midtraining(corpus):
    """(train, validation) for mid_train; `corpus` is "public" (848 thousand rows) or "pocket"."""
    if corpus == "pocket":
        return _pocket(POCKET_MID, "train", seed=1), _pocket({t: n // 20 for t, n in POCKET_MID.items()}, "val", seed=1)
    identity = identity_conversations()
    train = [
        SmolTalk("train"),
        MMLU("auxiliary_train", "train"),
        GSM8K("main", "train"),
        identity,
        identity,
        SimpleSpelling(size=200_000),
        SpellingBee(size=80_000),
    ]
    val = [SmolTalk("test"), MMLU("all", "test", stop=5200), GSM8K("main", "test", stop=420)]
    return TaskMixture(train), TaskMixture(val)


def sft(corpus):
    """(train, validation) for chat_sft; `corpus` is "public" (23 thousand rows) or "pocket"."""
    if corpus == "pocket":
        return _pocket(POCKET_SFT, "train", seed=2), _pocket({t: n // 10 for t, n in POCKET_SFT.items()}, "val", seed=2)
    train = [
        ARC("ARC-Easy", "train"),
        ARC("ARC-Challenge", "train"),
        GSM8K("main", "train"),
        SmolTalk("train", stop=10_000),
        identity_conversations(),
        SimpleSpelling(size=300),
        SpellingBee(size=300),
    ]
    return TaskMixture(train), SmolTalk("test")


@dataclass(frozen=True)
class EvalTask:
    make: Callable[..., Task]  # make(seed=0, corpus="public", level="strict"); most look at none of these
    baseline: float  # accuracy of a random guess
    corpus: str  # "public", "pocket" or "both"
    train: Callable[..., Task] | None = None  # the same for what reinforcement learning practises on


def _bee(split, size):
    return lambda seed=0, corpus="public", **_: SpellingBee(size=size, split=split, corpus=corpus, seed=seed)


def _made(task, split, size):
    return lambda seed=0, **_: task(split, size, seed)


EVAL_TASKS = {
    "ARC-Easy": EvalTask(lambda **_: ARC("ARC-Easy", "test"), 0.25, "public"),
    "ARC-Challenge": EvalTask(lambda **_: ARC("ARC-Challenge", "test"), 0.25, "public"),
    "MMLU": EvalTask(lambda **_: MMLU("all", "test"), 0.25, "public"),
    "GSM8K": EvalTask(lambda **_: GSM8K("main", "test"), 0.0, "public", lambda **_: GSM8K("main", "train")),
    "HumanEval": EvalTask(lambda level="strict", **_: HumanEval(level), 0.0, "public"),
    "SpellingBee": EvalTask(_bee("test", 256), 0.0, "both", _bee("train", PRACTICE)),
    "PocketSums": EvalTask(_made(PocketSums, "test", 256), 0.0, "pocket", _made(PocketSums, "train", PRACTICE)),
    "PocketHardSums": EvalTask(
        _made(PocketHardSums, "test", 256), 0.0, "pocket", _made(PocketHardSums, "train", PRACTICE)
    ),
    "PocketFacts": EvalTask(_made(PocketFacts, "test", 512), 0.25, "pocket", _made(PocketFacts, "train", PRACTICE)),
    "PocketStories": EvalTask(
        _made(PocketStories, "test", 128), 0.0, "pocket", _made(PocketStories, "train", PRACTICE)
    ),
    "PocketIdentity": EvalTask(_made(PocketIdentity, "test", 128), 0.0, "pocket"),
}


def find_task(name):
    """The EvalTask of a name in EVAL_TASKS, or of a class in a file, "mine.py:Mine". Raises UserError."""
    if name in EVAL_TASKS:
        return EVAL_TASKS[name]
    path, _, class_name = name.rpartition(":")
    if not path.endswith(".py"):
        raise UserError(f"no task {name!r}; there are {', '.join(EVAL_TASKS)}, and your own as file.py:Class")
    try:
        spec = importlib.util.spec_from_file_location("own_task", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        task = getattr(module, class_name)
    except Exception as e:  # whatever the file does
        raise UserError(f"task {name}: {type(e).__name__}: {e}") from e
    if not (isinstance(task, type) and issubclass(task, Task)):
        raise UserError(f"task {name}: {class_name} is no subclass of tasks.common.Task")
    return EvalTask(lambda **_: task("test"), task.baseline, "own", lambda **_: task("train"))
