"""
Which tasks each stage trains on and which ones score a model, for public data and for the pocket world.
"""

from collections.abc import Callable
from dataclasses import dataclass

from nanochat.common import base_dir, fetch, mirror_url
from tasks.arc import ARC
from tasks.common import Task, TaskMixture
from tasks.customjson import CustomJSON
from tasks.gsm8k import GSM8K
from tasks.mmlu import MMLU
from tasks.pocket import PocketChat, PocketFacts, PocketIdentity, PocketStories, PocketSums
from tasks.smoltalk import SmolTalk
from tasks.spellingbee import SimpleSpelling, SpellingBee

DATA = ("public", "pocket")

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
        words = {"words": "pocket"} if task in (SpellingBee, SimpleSpelling) else {}
        return task(split=split, size=size, seed=seed, **words)

    return TaskMixture([make(task, size) for task, size in rows.items()])


def midtraining(data):
    """(train, validation) for mid_train; `data` is "public" (848 thousand rows) or "pocket"."""
    if data == "pocket":
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


def sft(data):
    """(train, validation) for chat_sft; `data` is "public" (23 thousand rows) or "pocket"."""
    if data == "pocket":
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
    make: Callable[..., Task]  # make(seed=0, words="public"); only the tasks made from a seed look at them
    baseline: float  # accuracy of a random guess
    data: str  # "public" or "pocket"


EVAL_TASKS = {
    "ARC-Easy": EvalTask(lambda **_: ARC("ARC-Easy", "test"), 0.25, "public"),
    "ARC-Challenge": EvalTask(lambda **_: ARC("ARC-Challenge", "test"), 0.25, "public"),
    "MMLU": EvalTask(lambda **_: MMLU("all", "test"), 0.25, "public"),
    "GSM8K": EvalTask(lambda **_: GSM8K("main", "test"), 0.0, "public"),
    "SpellingBee": EvalTask(
        lambda seed=0, words="public": SpellingBee(size=256, split="test", words=words, seed=seed), 0.0, "both"
    ),
    "PocketSums": EvalTask(lambda seed=0, **_: PocketSums("test", 256, seed), 0.0, "pocket"),
    "PocketFacts": EvalTask(lambda seed=0, **_: PocketFacts("test", 512, seed), 0.25, "pocket"),
    "PocketStories": EvalTask(lambda seed=0, **_: PocketStories("test", 128, seed), 0.0, "pocket"),
    "PocketIdentity": EvalTask(lambda seed=0, **_: PocketIdentity("test", 128, seed), 0.0, "pocket"),
}
