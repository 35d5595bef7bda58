"""MMLU: multiple-choice questions on 57 subjects. https://huggingface.co/datasets/cais/mmlu"""

from tasks.common import ChoiceTask, PublicTask, render_mc, user_and_assistant

LETTERS = ["A", "B", "C", "D"]
SPLITS = {"all": ("auxiliary_train", "validation", "dev", "test"), "auxiliary_train": ("train",)}


class MMLU(PublicTask, ChoiceTask):
    def __init__(self, subset, split="train", **kwargs):
        assert split in SPLITS.get(subset, ()), (subset, split)
        super().__init__("cais/mmlu", f"{subset}/{split}", **kwargs)

    def conversation(self, row):
        row = row.get("train", row)  # rows of the auxiliary_train subset are nested under "train"
        question = render_mc(row["question"], LETTERS, row["choices"])
        return user_and_assistant(question, LETTERS[row["answer"]], letters=LETTERS, subject=row["subject"])
