"""
Conversations of one's own from a JSONL file: each line a JSON array of at least two messages, user first, in turns.

    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]

A line may also be an object with that array under "messages".
"""

import json
from pathlib import Path

from nanochat.common import UserError
from tasks.common import Task


class CustomJSON(Task):
    """Raises UserError, naming file and line, for what is not such a conversation."""

    def __init__(self, path, **kwargs):
        super().__init__(**kwargs)
        path = Path(path)
        if not path.is_file():
            raise UserError(f"no conversations at {path}; write some with `python -m dev.gen_synthetic_data`")
        self.conversations = []
        with open(path, encoding="utf-8") as f:
            for number, line in enumerate(f, 1):
                if line.strip():
                    self.conversations.append(_conversation(line, f"{path}:{number}"))

    def num_examples(self):
        return len(self.conversations)

    def get_example(self, index):
        return {"messages": self.conversations[index]}


def _conversation(line, where):
    """The checked messages of one line; `where` is "file:line"."""
    try:
        messages = json.loads(line)
    except json.JSONDecodeError as e:
        raise UserError(f"{where}: not JSON ({e.msg} at column {e.colno})") from None
    if isinstance(messages, dict):
        messages = messages.get("messages")
    if not isinstance(messages, list) or len(messages) < 2:
        raise UserError(f"{where}: expected a JSON array of at least two messages")
    for i, message in enumerate(messages):
        role = "assistant" if i % 2 else "user"
        if not isinstance(message, dict) or message.get("role") != role:
            raise UserError(f'{where}: message {i + 1} must have "role": "{role}" (user first, then in turns)')
        if not isinstance(message.get("content"), str):
            raise UserError(f'{where}: message {i + 1} needs "content", a string')
    return messages
