"""GSM8K: grade-school math problems, solved with a calculator. https://huggingface.co/datasets/openai/gsm8k"""

import re

from tasks.common import PublicTask, Task, user_and_assistant


def split_calls(answer):
    """
    The parts of an answer in GSM8K's format: <<12/60=0.2>> becomes a python part (12/60) and its output (0.2).

    The text after >> repeats the result. It is kept, so the model learns to read the output of its tool.
    """
    pieces = enumerate(re.split(r"<<([^>]*)=([^>]*)>>", answer))
    return [{"type": ("text", "python", "python_output")[i % 3], "text": text} for i, text in pieces if text]


def final_number(text):
    """The number after the first "####" as a string without commas; None if there is none."""
    match = re.search(r"#### (-?[0-9.,]+)", text)
    return match[1].replace(",", "").rstrip(".") if match else None


class FinalNumberTask(Task):
    """A task whose answers end with `#### number`. Their content is a list of parts, the last one text."""

    def evaluate(self, conversation, assistant_response):
        reference = final_number(conversation["messages"][-1]["content"][-1]["text"])
        return reference is not None and final_number(assistant_response) == reference


class GSM8K(PublicTask, FinalNumberTask):
    def __init__(self, subset, split, **kwargs):
        assert subset in ("main", "socratic") and split in ("train", "test"), (subset, split)
        super().__init__("openai/gsm8k", f"{subset}/{split}", **kwargs)

    def conversation(self, row):
        return user_and_assistant(row["question"], split_calls(row["answer"]))
