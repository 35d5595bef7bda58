"""
The user's own conversations, from a JSONL file. Each line is a JSON array of at least two messages:

    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]

User and assistant alternate, user first. A system message may come before them. A line may also be an object with that
array under "messages".
"""

import json
from pathlib import Path

from nanochat.common import UserError
from nanochat.tokenizer import check_conversation
from tasks.common import Task


class CustomJSON(Task):
    """Conversations of one JSONL file. Raises UserError with file and line number for an invalid one."""

    def __init__(self, path, **kwargs):
        super().__init__(**kwargs)
        path = Path(path)
        if not path.is_file():
            raise UserError(f"no conversations at {path}; generate some with `python -m dev.gen_synthetic_data`")
        self.conversations = []
        with open(path, encoding="utf-8") as f:
            for number, line in enumerate(f, 1):
                if line.strip():
                    self.conversations.append({"messages": _parse(line, f"{path}:{number}")})

    def num_examples(self):
        return len(self.conversations)

    def get_example(self, index):
        return self.conversations[index]


def _parse(line, where):
    """The validated messages of one line; `where` is "file:line"."""
    try:
        value = json.loads(line)
        messages = value.get("messages") if isinstance(value, dict) else value
        _, turns = check_conversation({"messages": messages}) if messages else ("", [])
    except json.JSONDecodeError as e:
        raise UserError(f"{where}: not JSON ({e.msg} at column {e.colno})") from None
    except UserError as e:
        raise UserError(f"{where}: {e}") from None
    if len(turns) < 2:
        raise UserError(f"{where}: expected a JSON array of at least two messages, from user and assistant in turns")
    return messages
