"""Reads questions from the terminal, a flag or a pipe, and prints answers while they are generated."""

import codecs
import contextlib
import os
import select
import sys

from nanochat.common import no_color, require

# Control characters except tab and newline. They are removed, because a model's output must not control the terminal.
CONTROL_CHARACTERS = dict.fromkeys({*range(32), *range(127, 160)} - {9, 10})
PIPE_TIMEOUT = 2.0  # seconds that `-p TEXT` waits for piped data


def load_history(path):
    """Enable line editing with the lines of earlier sessions, if Python has readline."""
    with contextlib.suppress(ImportError, OSError):
        import readline

        for line in path.read_text(encoding="utf-8", errors="replace").splitlines()[-1000:]:
            readline.add_history(line)


def append_history(path, line):
    """Append a line to the history file, which only its owner can read. Failures are ignored."""
    # Each line is written at once, because a closed terminal window may kill the process.
    with contextlib.suppress(OSError), open(path, "ab", opener=lambda path, flags: os.open(path, flags, 0o600)) as f:
        f.write(" ".join(line.splitlines()).encode("utf-8", "replace") + b"\n")


def read_line():
    """The next line of input. Raises EOFError on Ctrl-D, or on Ctrl-C twice in a row at an empty prompt."""
    exit_on_interrupt = False
    while True:
        try:
            return input("\nYou: ").strip()
        except KeyboardInterrupt:
            readline = sys.modules.get("readline")
            typed = readline and readline.get_line_buffer()  # Ctrl-C discards the typed text, as in a shell
            if exit_on_interrupt and not typed:
                raise EOFError from None
            exit_on_interrupt = not typed
            print("\n(Ctrl-C once more, or Ctrl-D, ends the conversation)" if exit_on_interrupt else "")


def has_piped_text(stdin):
    """Whether `stdin` is redirected and has data. Some parent processes leave a pipe open and never write to it."""
    if stdin.isatty():
        return False
    ready, _, _ = select.select([stdin], [], [], PIPE_TIMEOUT)
    if not ready:
        print("no data on standard input: answering without it (-p - waits for data)", file=sys.stderr)
    return bool(ready)


def read_piped(stdin):
    """All text of `stdin`: UTF-8, or UTF-16 with a byte-order mark, or in the terminal's encoding."""
    data = stdin.buffer.read()
    encodings = ["utf-16"] if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else ["utf-8", stdin.encoding]
    for encoding in encodings:
        with contextlib.suppress(UnicodeDecodeError):
            return data.decode(encoding)
    print(f"warning: standard input is not {encodings[0].upper()}; its other bytes are replaced", file=sys.stderr)
    return data.decode(encodings[0], "replace")


def read_question(prompt):
    """Piped text and `prompt`, separated by a blank line; None if there is no prompt and stdin is a terminal."""
    stdin = sys.stdin or open(os.devnull)  # sys.stdin is None if the parent process closed it
    if prompt is None and stdin.isatty():
        return None
    needs_stdin = prompt in (None, "-")
    texts = ["", "" if needs_stdin else prompt]
    with contextlib.suppress(OSError):  # stdin has no file descriptor, or is a folder
        if needs_stdin or has_piped_text(stdin):
            texts[0] = read_piped(stdin)
    texts = [text.removeprefix("\ufeff").replace("\r\n", "\n").strip() for text in texts]  # \ufeff: byte-order mark
    question = "\n\n".join(filter(None, texts))
    require(question, "the question is empty; give it with -p, or on standard input")
    return question


def print_answer(chat, question):
    """Print the answer to `question`; a terminal also shows the calculator's calls, as [expression = result]."""
    is_terminal, last_part = sys.stdout.isatty(), "text"
    dim, reset = ("", "") if no_color() else ("\x1b[2m", "\x1b[0m")
    opening = {"text": "", "python": dim + "[", "python_output": dim + "[= "}
    closing = {"text": "", "python": "]" + reset, "python_output": "]" + reset}
    try:
        for part, text in (piece for piece in chat.ask(question) if is_terminal or piece[0] == "text"):
            if text and part != last_part:
                is_result = (last_part, part) == ("python", "python_output")
                print(" = " if is_result else closing[last_part] + opening[part], end="")
                last_part = part
            print(text.translate(CONTROL_CHARACTERS) if is_terminal else text, end="", flush=True)
    finally:
        print(closing[last_part], flush=True)


def print_speed(usage):
    """Print token count, throughput and latency of an answer (see Chat.usage) to standard error."""
    speed = "[{completion_tokens} tokens, {tokens_per_second} tokens/s, first token after {first_token_seconds} s]"
    print(speed.format(**usage), file=sys.stderr)
