"""SmolTalk: general conversations. https://huggingface.co/datasets/HuggingFaceTB/smol-smoltalk"""

from tasks.common import PublicTask

SHARDS = {"train": (4, 1), "test": (1,)}  # number of files: on the public host, or on a small mirror


class SmolTalk(PublicTask):
    def __init__(self, split, **kwargs):
        super().__init__("HuggingFaceTB/smol-smoltalk", f"data/{split}", SHARDS[split], **kwargs)

    def conversation(self, row):
        """Messages alternate between user and assistant; some conversations start with a system message."""
        return {"messages": row["messages"]}
