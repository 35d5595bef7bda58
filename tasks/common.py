"""
What all tasks share: the `Task` interface, mixtures of tasks, the choice prompt, and reading public data sets.

A conversation is {"messages": [{"role": "user" | "assistant", "content": str or list of parts}, ...]}; a part is
{"type": "text" | "python" | "python_output", "text": str}. Choice problems also carry "letters".
"""

import time
from random import Random

from nanochat.common import UserError, base_dir, dist_env, fetch, mirror_url


class Task:
    """
    A data set of conversations, or the slice start:stop:step of one.

    Subclasses give num_examples() and get_example(index), and for evaluation `eval_type` and evaluate().
    """

    eval_type = "generative"  # or "categorical": the answer is one of the conversation's "letters"
    baseline = 0.0  # accuracy of a random guess, of a task in a file of one's own

    def __init__(self, start=0, stop=None, step=1):
        assert start >= 0 and step >= 1 and (stop is None or stop >= start), (start, stop, step)
        self.slice = slice(start, stop, step)

    def num_examples(self):
        """The size of the whole data set, before slicing."""
        raise NotImplementedError

    def get_example(self, index):
        """The conversation at `index` of the whole data set."""
        raise NotImplementedError

    def _rows(self):
        return range(self.num_examples())[self.slice]

    def __len__(self):
        return len(self._rows())

    def __getitem__(self, index):
        return self.get_example(self._rows()[index])

    def evaluate(self, conversation, assistant_response):
        """Whether the reply (a string) solves the conversation's problem."""
        raise NotImplementedError(f"{type(self).__name__} has no right answers, it is for training only")

    def evaluate_many(self, pairs):
        """evaluate() for each (conversation, reply)."""
        return [self.evaluate(conversation, reply) for conversation, reply in pairs]

    def reward(self, conversation, assistant_response):
        """What reinforcement learning pays for the reply: 1.0 or 0.0."""
        return float(self.evaluate(conversation, assistant_response))


class ChoiceTask(Task):
    """A task whose answer is a letter."""

    eval_type = "categorical"

    def evaluate(self, conversation, assistant_response):
        assert assistant_response in conversation["letters"], (assistant_response, conversation["letters"])
        return assistant_response == conversation["messages"][-1]["content"]


class TaskMixture(Task):
    """All rows of several tasks in one seeded order; a task named twice is seen twice."""

    def __init__(self, tasks, **kwargs):
        super().__init__(**kwargs)
        self.tasks = list(tasks)
        self.index = [(t, row) for t, task in enumerate(self.tasks) for row in range(len(task))]
        Random(42).shuffle(self.index)

    def num_examples(self):
        return len(self.index)

    def get_example(self, index):
        task, row = self.index[index]
        return self.tasks[task][row]


class TaskSequence(TaskMixture):
    """All rows of several tasks, one task after the other: a curriculum."""

    def __init__(self, tasks, **kwargs):
        super().__init__(tasks, **kwargs)
        self.index.sort()


def user_and_assistant(question, answer, **more):
    """A conversation of one question and one answer."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **more}


def render_mc(question, letters, choices):
    """
    The prompt of a choice problem. The letter stands after its choice, without a space: a small model binds the two
    better that way, and "=A" ends in the very character that it must answer.
    """
    lines = "".join(f"- {choice}={letter}\n" for letter, choice in zip(letters, choices, strict=True))
    return f"Multiple Choice question: {question}\n{lines}\nRespond only with the letter of the correct answer."


class ParquetDataset:
    """Rows (dicts) of a public data set's parquet files, in the order of datasets.shuffle(seed=42)."""

    def __init__(self, repo, stem, shards=(1,)):
        import numpy as np
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.table = pa.concat_tables([pq.read_table(path) for path in fetch_files(repo, stem, shards)])
        self.order = np.random.default_rng(42).permutation(len(self.table))

    def __len__(self):
        return len(self.order)

    def __getitem__(self, index):
        return self.table.slice(int(self.order[index]), 1).to_pylist()[0]


def fetch_files(repo, stem, shards=(1,)):
    """
    Local paths of the files <stem>-00000-of-0000N.parquet of the data set `repo`, downloaded once per machine.

    `shards` are the numbers of files N to try, in this order: a mirror may have fewer than the public host. Raises
    UserError when the files are neither here nor to be had.
    """
    folder = base_dir() / "task_data" / repo
    sets = [[f"{stem}-{i:05d}-of-{n:05d}.parquet" for i in range(n)] for n in shards]

    def here():
        return next(([folder / f for f in files] for files in sets if all((folder / f).exists() for f in files)), None)

    if dist_env()[1] == 0 and not here():
        _download(repo, sets, folder)
    while not here():  # another process of this machine is downloading; torchrun ends us if it fails
        time.sleep(0.5)
    return here()


def _download(repo, sets, folder):
    for files in sets:
        try:
            for name in files:
                if not (folder / name).exists():
                    fetch(f"{mirror_url('hub')}/{repo}/resolve/main/{name}", folder / name, attempts=3)
            return
        except UserError as e:
            error = e
    raise UserError(f"cannot get the data set {repo}: {error}; NANOCHAT_HUB_URL can name a mirror (a URL or a folder)")
