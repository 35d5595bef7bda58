"""
The user's own conversations, from JSON lines, a JSON array (both also as .gz or .zst) or parquet. A conversation is

    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}    OpenAI
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]                  its messages alone
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]}        ShareGPT

User and assistant alternate, user first, assistant last. A system message may come before them. An assistant's message
with "weight": 0 is not trained on. Its content may be a list of parts, see tasks/common.py. The files that chat_cli's
/save and the chat page's export write are read too.
"""

import json
import re
from pathlib import Path

from nanochat.common import UserError, read_errors, require, well_formed
from nanochat.ingest.documents import read_lines
from nanochat.tokenizer import check_conversation, is_parts
from tasks.common import ListTask

ROLES = {"human": "user", "developer": "system"} | dict.fromkeys(("gpt", "chatgpt", "bot", "model"), "assistant")
SEPARATORS = re.compile(r"[\s,\]\ufeff]*")  # between JSON values; joined files have byte order marks in the middle
FORMS = 'readable are JSON or parquet of {"messages": [...]}, a list of messages, ShareGPT\'s {"conversations": [...]}'


class CustomJSON(ListTask):
    """Conversations of one file. Raises UserError with file and line number for an invalid one."""

    def __init__(self, filepath, **kwargs):
        super().__init__(**kwargs)
        self.path = Path(filepath).expanduser()
        hint = "generate some with `python -m dev.gen_synthetic_data`"
        require(self.path.is_file(), f"no file of conversations at {self.path}; {hint}")
        self.items = [_parse(value, f"{self.path}:{line}") for line, value in _values(self.path)]
        require(self.items, f"{self.path} is empty: no conversations; {FORMS}")

    def origin(self):
        return self.items


def _values(path):
    """Yield (line number, value) of each conversation: JSON values in a row, items of an array, or rows of parquet."""
    with read_errors(path, "cannot be read"):
        if path.suffix.lower() == ".parquet":
            import pyarrow.parquet

            return (yield from enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1))
        text = "".join(line for _, line in read_lines(path))
    decoder, position, line = json.JSONDecoder(), 0, 1
    while (start := SEPARATORS.match(text, position).end()) < len(text):
        line += text.count("\n", position, start)
        try:
            value, position = decoder.raw_decode(text, start)
        except (ValueError, RecursionError) as e:
            first_line = text[start:].partition("\n")[0].strip()
            # In a pretty-printed value, the line of the error; else the line of the value, which may be cut.
            line = line if first_line.strip("[{") else getattr(e, "lineno", line)
            raise UserError(f"{path}:{line}: not JSON ({e}): {first_line[:60]}; {FORMS}") from None
        first = value[0] if isinstance(value, list) and value else None
        if isinstance(first, list) or isinstance(first, dict) and not {"role", "from"} & set(first):
            position = start + 1  # an array of conversations: next, its items one by one
        else:
            yield line, value
        line += text.count("\n", start, position)


def _parse(value, where):
    """The conversation in a JSON value, in our form; `where` is "file:line"."""
    try:
        fields = value if isinstance(value, dict) else {"messages": value}
        messages, system = fields.get("messages", fields.get("conversations")), fields.get("system")
        if not isinstance(messages, list) or not messages:  # repr() of every conversation would take long
            got = f"an object with the fields {', '.join(value)[:80]}" if isinstance(value, dict) else repr(value)[:80]
            raise UserError(f"expected at least two messages, got {got}; {FORMS}")
        messages = [{"role": "system", "content": system}] * bool(system) + messages
        messages = [_message(message, f"message {i}") for i, message in enumerate(messages, 1)]
        _, turns = check_conversation({"messages": messages})
        require(len(turns) >= 2, "expected at least two messages, from user and assistant in turns")
        require(len(turns) % 2 == 0, f"message {len(messages)}, the last one, is the user's; expected an assistant's")
    except UserError as e:
        raise UserError(f"{where}: {e}") from None
    return json.loads(well_formed(json.dumps({"messages": messages}, ensure_ascii=False)))  # no lone surrogates


def _message(message, where):
    """A message of any readable form in ours. What is no message stays as it is; check_conversation names it."""
    if not isinstance(message, dict):
        return message
    for name in ("tool_calls", "function_call"):
        require(not message.get(name), f"{where} has {name}; write calls as parts of type python and python_output")
    role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    role = ROLES.get(role.lower(), role.lower()) if isinstance(role, str) else role
    if content and is_parts(content, ["text"]):
        content = "\n\n".join(part["text"] for part in content)  # as in the API
    content = _tool_parts(content, message["tool_steps"]) if message.get("tool_steps") else content
    weight = message.get("weight")
    require(weight in (None, 0, 1), f"{where} has the weight {weight!r}, expected 0 or 1")
    return {"role": role, "content": content} | ({"weight": 0} if weight == 0 else {})


def _tool_parts(text, steps):
    """`text` and the calculator calls that the chat page exports, as a list of parts."""
    parts, start = [], 0
    try:
        for step in steps:
            parts += [("text", text[start : step["position"]]), ("python", step["expression"])]
            parts, start = [*parts, ("python_output", step["result"])], step["position"]
        parts.append(("text", text[start:]))
    except (TypeError, KeyError) as e:
        raise UserError(f"a step of tool_steps lacks position, expression or result ({e})") from e
    return [{"type": kind, "text": part} for kind, part in parts if part]
