"""ARC: grade-school science questions with (mostly) four choices. https://huggingface.co/datasets/allenai/ai2_arc"""

from tasks.common import ChoiceTask, ParquetDataset, render_mc, user_and_assistant


class ARC(ChoiceTask):
    def __init__(self, subset, split, **kwargs):
        super().__init__(**kwargs)
        assert subset in ("ARC-Easy", "ARC-Challenge") and split in ("train", "validation", "test"), (subset, split)
        self.data = ParquetDataset("allenai/ai2_arc", f"{subset}/{split}")

    def num_examples(self):
        return len(self.data)

    def get_example(self, index):
        row = self.data[index]
        letters = row["choices"]["label"]  # some questions have 1 to 4 instead of A to D
        question = render_mc(row["question"], letters, row["choices"]["text"])
        return user_and_assistant(question, row["answerKey"], letters=letters)
