"""
Interactive chat. Commands:

/clear           start a new conversation
/regenerate      replace the last answer by a new one
/system [TEXT]   show the system text, or set it (- removes it) and start a new conversation
/temp [X]        show or set the temperature; 0 = greedy
/topk [N]        show or set top-k: sample from the N likeliest tokens; 0 = all
/save [FILE]     write the conversation to a new JSON file
/quit            end the conversation, as Ctrl-D does

Ctrl-C stops an answer. Type // to send a message that begins with /.
"""

import json
import time
from pathlib import Path

from nanochat.common import UserError, require
from nanochat.engine import Request
from nanochat.terminal.console import append_history, load_history, print_answer, print_speed, read_line


def run_repl(chat, history, verbose=False):
    """Answer questions and run commands until the user ends the conversation. `history` is the history file."""
    load_history(history)
    print("/help lists the commands, Ctrl-C stops an answer, Ctrl-D ends the conversation.")
    while True:
        try:
            if line := read_line():
                append_history(history, line)
            if question := run_command(chat, line):
                print("\nAssistant: ", end="", flush=True)
                print_answer(chat, question)
                if chat.usage["finish_reason"] == "length":
                    print(f"(cut off after {chat.usage['completion_tokens']} tokens)")
                if verbose:
                    print_speed(chat.usage)
        except KeyboardInterrupt:
            print("(stopped)")
        except UserError as e:
            print(e)
        except EOFError:
            print()
            return


def run_command(chat, line):
    """Run the command in `line`; returns a question to ask, or None. Raises EOFError to end the conversation."""
    if line.lower() in ("quit", "exit", "clear"):
        line = "/" + line
    if not line.startswith("/") or line.startswith("//"):
        return line.removeprefix("/")
    command, text = [*line.split(maxsplit=1), ""][:2]
    match command.lower():
        case "/quit" | "/exit":
            raise EOFError
        case "/help":
            print(__doc__.strip())
        case "/clear":
            chat.reset(chat.system)
            print("A new conversation.")
        case "/regenerate":
            require(chat.turns, "nothing has been asked yet")
            return chat.turns.pop().question
        case "/system" if text:
            chat.reset("" if text == "-" else text)
            print("A new conversation.")
        case "/system":
            print(chat.system or "There is no system text.")
        case "/temp":
            set_sampling(chat, "temperature", float, text)
        case "/topk":
            set_sampling(chat, "top_k", int, text)
        case "/save":
            save(chat, text)
        case _:
            raise UserError(f"there is no {command}; /help lists the commands, // sends a text that begins with /")


def set_sampling(chat, name, number_type, text):
    """Set a sampling parameter, unless `text` is empty, and print its value."""
    if text:
        try:
            settings = chat.sampling | {name: number_type(text)}
        except ValueError:
            raise UserError(f"{name}={text}: expected a number") from None
        Request([0], **settings)  # checks the value
        chat.sampling = settings
    print(f"{name} = {chat.sampling[name]}")


def save(chat, name):
    """Write the conversation to a new file."""
    require(chat.turns, "there is nothing to save yet")
    path = Path(name or time.strftime("chat-%Y-%m-%d-%H%M%S.json")).expanduser()
    try:
        with open(path, "x", encoding="utf-8") as f:
            f.write(json.dumps({"messages": chat.messages()}, indent=2, ensure_ascii=False) + "\n")
    except OSError as e:
        raise UserError(f"cannot write {path} ({e.strerror}); choose another name") from None
    print(f"Saved as {path}.")
