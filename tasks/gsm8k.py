"""GSM8K: grade-school word problems, solved with calls of the calculator. https://huggingface.co/datasets/openai/gsm8k"""

import re

from tasks.common import ParquetDataset, Task, user_and_assistant


def split_calls(answer):
    """
    The parts of an answer in GSM8K's notation: <<12/60=0.2>> becomes a python part (12/60) and its output (0.2).

    The text after >> repeats the result and stays, so the model learns to read its tool's output.
    """
    parts = []
    for i, piece in enumerate(re.split(r"<<(.*?)>>", answer)):
        if i % 2:
            expression, _, result = piece.rpartition("=")
            parts += [{"type": "python", "text": expression}, {"type": "python_output", "text": result}]
        elif piece:
            parts.append({"type": "text", "text": piece})
    return parts


def final_number(text):
    """The number behind the first "####" as a string without commas, None where there is none."""
    match = re.search(r"#### (-?[0-9.,]+)", text)
    return match[1].replace(",", "").rstrip(".") if match else None


class FinalNumberTask(Task):
    """A task whose replies end in `#### number`; content is a list of parts, the last one text."""

    def evaluate(self, conversation, assistant_response):
        reference = final_number(conversation["messages"][-1]["content"][-1]["text"])
        return reference is not None and final_number(assistant_response) == reference


class GSM8K(FinalNumberTask):
    def __init__(self, subset, split, **kwargs):
        super().__init__(**kwargs)
        assert subset in ("main", "socratic") and split in ("train", "test"), (subset, split)
        self.data = ParquetDataset("openai/gsm8k", f"{subset}/{split}")

    def num_examples(self):
        return len(self.data)

    def get_example(self, index):
        row = self.data[index]
        return user_and_assistant(row["question"], split_calls(row["answer"]))
