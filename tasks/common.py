"""
The `Task` interface, base classes of tasks, mixtures of tasks, the multiple-choice prompt, and access to public data.

A conversation is {"messages": [{"role": "user" | "assistant", "content": str or list of parts}, ...]}; a part is
{"type": "text" | "python" | "python_output", "text": str}. Multiple-choice problems also have "letters".
"""

import hashlib
import json
import time
from random import Random

from nanochat.common import UserError, base_dir, dist_env, fetch, file_fingerprint, mirror_url, read_errors, require

FINGERPRINT_EXAMPLES = 256


class Message(dict):
    """{"role", "content"}; fields can be read as attributes too."""

    def __init__(self, role, content, **fields):
        super().__init__(role=role, content=content, **fields)
        self.__dict__ = self


class Conversation(dict):
    """{"messages": [...]} and other fields, also as attributes; `answer` is the content of the last message."""

    def __init__(self, messages, **fields):
        super().__init__({"answer": messages[-1]["content"], "messages": messages} | fields)
        self.__dict__ = self


class Task:
    """
    A data set of conversations, or its slice start:stop:step.

    Subclasses implement num_examples() and get_example(index), of the data set before slicing; for evaluation also
    `eval_type` and evaluate().
    """

    eval_type = "generative"  # or "categorical": the answer is one of the conversation's "letters"
    baseline = 0.0  # accuracy of random guessing
    start, stop, step = 0, None, 1  # for subclasses that do not call __init__

    def __init__(self, start=0, stop=None, step=1):
        assert start >= 0 and step >= 1 and (stop is None or stop >= start), (start, stop, step)
        self.start, self.stop, self.step = start, stop, step

    def _indices(self):
        return range(self.num_examples())[self.start : self.stop : self.step]

    def __len__(self):
        return len(self._indices())

    def __getitem__(self, index):
        return self.get_example(self._indices()[index])

    def evaluate(self, conversation, assistant_response):
        """True if the response (a string) solves the problem of the conversation."""
        raise NotImplementedError(f"{type(self).__name__} has no correct answers; it is for training only")

    def evaluate_many(self, pairs):
        """Verdicts on a list of (conversation, response) pairs."""
        return [self.evaluate(conversation, response) for conversation, response in pairs]

    def reward(self, conversation, assistant_response):
        """Reward of the response in reinforcement learning, a finite number."""
        return self.evaluate(conversation, assistant_response)

    def origin(self):
        """JSON-serializable list: what the examples are made from, for fingerprint()."""
        return []

    def fingerprint(self):
        """sha256 (hex) of the origin, the number of examples, and up to 256 evenly spaced examples."""
        every = max(1, -(-len(self) // FINGERPRINT_EXAMPLES))
        content = [type(self).__name__, len(self), self.origin(), [self[i] for i in range(0, len(self), every)]]
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


class ListTask(Task):
    """A task with one element of the list `self.items` per example; unless overridden, it is the example."""

    def num_examples(self):
        return len(self.items)

    def get_example(self, index):
        return self.items[index]


class ChoiceTask(Task):
    """A multiple-choice task with four choices: the answer is a letter."""

    eval_type, baseline = "categorical", 0.25

    def evaluate(self, conversation, assistant_response):
        return assistant_response == conversation["messages"][-1]["content"]


class PublicTask(Task):
    """
    A public data set on Hugging Face, read from parquet files, in the order of `datasets`' shuffle(seed=42).

    Subclasses implement conversation(row), where `row` is a dict of the columns. See `fetch_files` for the parameters.
    """

    def __init__(self, repo, stem, shards=(1,), **kwargs):
        super().__init__(**kwargs)
        import numpy as np
        import pyarrow.parquet

        self.paths = fetch_files(repo, stem, shards)
        with read_errors(" or ".join(map(str, self.paths)), "is damaged", "delete it, then it is downloaded again"):
            self.table = pyarrow.concat_tables([pyarrow.parquet.read_table(path) for path in self.paths])
        self.order = np.random.default_rng(42).permutation(len(self.table))

    def num_examples(self):
        return len(self.order)

    def get_example(self, index):
        return self.conversation(self.table.slice(int(self.order[index]), 1).to_pylist()[0])

    def origin(self):
        return [file_fingerprint(path) for path in self.paths]


class GeneratedTask(Task):
    """
    `size` generated conversations. Each depends only on split, seed and index, and in a WordTask on `corpus`.

    Subclasses implement make(rng), which returns a conversation whose problem belongs to `self.split`.
    """

    def __init__(self, split, size, seed=0, corpus="pocket", **kwargs):
        super().__init__(**kwargs)
        assert split in ("train", "val", "test") and corpus in ("pocket", "public"), (split, corpus)
        self.split, self.size, self.seed = split, size, seed

    def num_examples(self):
        return self.size

    def get_example(self, index):
        return self.make(Random(f"{type(self).__name__} {self.split} {self.seed} {index}"))

    def origin(self):
        from nanochat.pocket.world import FILES

        return [self.split, self.size, self.seed, *(file.read_text(encoding="utf-8") for file in FILES)]


class TaskMixture(ListTask):
    """All examples of several tasks, shuffled with a fixed seed. A task listed twice contributes twice."""

    def __init__(self, tasks, **kwargs):
        super().__init__(**kwargs)
        self.tasks = list(tasks)
        self.items = [(t, row) for t, task in enumerate(self.tasks) for row in range(len(task))]
        Random(42).shuffle(self.items)

    def get_example(self, index):
        task, row = self.items[index]
        return self.tasks[task][row]

    def origin(self):
        return [task.fingerprint() for task in self.tasks]


class TaskSequence(TaskMixture):
    """All examples of several tasks, one task after the other: a curriculum."""

    def __init__(self, tasks, **kwargs):
        super().__init__(tasks, **kwargs)
        self.items.sort()


def user_and_assistant(question, answer, **fields):
    """A conversation with one question and one answer; `fields` are added to it."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **fields}


def render_mc(question, letters, choices):
    """
    The prompt of a multiple-choice problem.

    Each letter follows its choice, because small models associate the two better in this order. There is no space
    between "=" and the letter, so that the letter is the same token as in the answer.
    """
    lines = "".join(f"- {choice}={letter}\n" for letter, choice in zip(letters, choices, strict=True))
    return f"Multiple Choice question: {question}\n{lines}\nRespond only with the letter of the correct answer."


def fetch_files(repo, stem, shards=(1,)):
    """
    Local paths of <stem>-00000-of-0000N.parquet ... of the data set `repo`, downloaded once per machine.

    `shards` lists the values of N to try, in order: a mirror may have fewer files than the public host. Raises
    UserError if the files can neither be found nor downloaded.
    """
    folder = base_dir() / "task_data" / repo
    candidates = [[folder / f"{stem}-{i:05d}-of-{n:05d}.parquet" for i in range(n)] for n in shards]

    def complete():
        return next((paths for paths in candidates if all(map(_is_parquet, paths))), None)

    return once_per_host(complete, lambda: _download(repo, folder, candidates))


def once_per_host(ready, download):
    """The value of ready() once it is true; until then, local rank 0 calls download() and the others wait."""
    while not (value := ready()):
        if dist_env()[1] == 0:
            download()
        else:  # if the download fails, torchrun stops this process
            time.sleep(0.5)
    return value


def _download(repo, folder, candidates):
    """Download the first complete list of files among `candidates`."""
    for paths in candidates:
        try:
            for path in [path for path in paths if not _is_parquet(path)]:
                url = f"{mirror_url('hub')}/{repo}/resolve/main/{path.relative_to(folder).as_posix()}"
                fetch(url, path, attempts=3, check=_check_parquet)
            return
        except UserError as e:
            error = e
    raise UserError(f"cannot download {repo}: {error}; set NANOCHAT_HUB_URL to use a mirror (a URL or a folder)")


def _is_parquet(path):
    """Whether `path` is a complete parquet file, which ends with its magic number."""
    return path.is_file() and path.read_bytes().endswith(b"PAR1")  # it will be read whole anyway


def _check_parquet(path):
    require(_is_parquet(path), f"{path} is not a complete parquet file")


def fetch_once(url, name, check):
    """Path of the file `name` in the base directory, downloaded from `url` if it is missing."""
    path = base_dir() / name
    return once_per_host(lambda: path.exists() and path, lambda: fetch(url, path, attempts=3, check=check))
