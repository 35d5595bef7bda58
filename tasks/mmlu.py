"""MMLU: choice questions on 57 subjects. https://huggingface.co/datasets/cais/mmlu"""

from tasks.common import ChoiceTask, ParquetDataset, render_mc, user_and_assistant

LETTERS = ["A", "B", "C", "D"]
SPLITS = {"all": ("auxiliary_train", "validation", "dev", "test"), "auxiliary_train": ("train",)}


class MMLU(ChoiceTask):
    def __init__(self, subset, split, **kwargs):
        super().__init__(**kwargs)
        assert split in SPLITS.get(subset, ()), (subset, split)
        self.data = ParquetDataset("cais/mmlu", f"{subset}/{split}")

    def num_examples(self):
        return len(self.data)

    def get_example(self, index):
        row = self.data[index]
        row = row.get("train", row)  # the auxiliary_train subset wraps its rows
        question = render_mc(row["question"], LETTERS, row["choices"])
        return user_and_assistant(question, LETTERS[row["answer"]], letters=LETTERS, subject=row["subject"])
