"""ARC: grade-school science questions, most with four choices. https://huggingface.co/datasets/allenai/ai2_arc"""

from tasks.common import ChoiceTask, PublicTask, render_mc, user_and_assistant


class ARC(PublicTask, ChoiceTask):
    def __init__(self, subset, split, **kwargs):
        assert subset in ("ARC-Easy", "ARC-Challenge") and split in ("train", "validation", "test"), (subset, split)
        super().__init__("allenai/ai2_arc", f"{subset}/{split}", **kwargs)

    def conversation(self, row):
        letters = row["choices"]["label"]  # a few questions have 1 to 4 instead of A to D
        question = render_mc(row["question"], letters, row["choices"]["text"])
        return user_and_assistant(question, row["answerKey"], letters=letters)
