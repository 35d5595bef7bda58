"""SmolTalk: general conversations. https://huggingface.co/datasets/HuggingFaceTB/smol-smoltalk"""

from tasks.common import ParquetDataset, Task

SHARDS = {"train": (4, 1), "test": (1,)}  # files on the public host, then on a small mirror


class SmolTalk(Task):
    def __init__(self, split, **kwargs):
        super().__init__(**kwargs)
        assert split in SHARDS, split
        self.data = ParquetDataset("HuggingFaceTB/smol-smoltalk", f"data/{split}", SHARDS[split])

    def num_examples(self):
        return len(self.data)

    def get_example(self, index):
        """Messages alternate from user to assistant, now and then after one system message."""
        return {"messages": self.data[index]["messages"]}
