"""The terminal chat: on a model that follows a script, and as a user starts it."""

import os
import pty
import subprocess
import sys

import pytest
import test_chat_eval
from conftest import ROOT
from test_chat_eval import ByteChat
from test_engine import BOS, END, PYTHON, PYTHON_END, ScriptedModel

from nanochat.common import UserError
from nanochat.engine import Engine
from scripts import chat_cli
from scripts.chat_cli import Chat

checkpoint = test_chat_eval.checkpoint  # a fixture
SAMPLING = {"temperature": 0, "top_k": None, "seed": 1}


def chat_with(script, source="sft", max_tokens=16, sequence_len=64):
    return Chat(Engine(ScriptedModel(script, sequence_len), ByteChat()), source, max_tokens, **SAMPLING)


class Turns:
    """A script that answers every question with `answer`, and notes each prompt."""

    def __init__(self, answer):
        self.answer, self.prompts = [*answer.encode(), END], []
        self.written = 0

    def __call__(self, sequence):
        if self.written == 0:
            self.prompts.append(sequence)
        token = self.answer[self.written]
        self.written = (self.written + 1) % len(self.answer)
        return token


def text_of(pieces):
    return "".join(piece for _, piece in pieces)


def test_a_conversation_is_remembered_turn_by_turn():
    script = Turns("né")
    chat = chat_with(script)
    assert text_of(chat.ask("one")) == "né" and text_of(chat.ask("two")) == "né"
    first = [*b"one", *"né".encode(), END]
    assert script.prompts == [[BOS, *b"one"], [BOS, *first, *b"two"]]


def test_a_base_model_continues_plain_text_and_remembers_nothing():
    script = Turns("né")
    chat = chat_with(script, source="base")
    list(chat.ask("one"))
    list(chat.ask("two"))
    assert script.prompts == [[BOS, *b"one"], [BOS, *b"two"]]


def test_the_oldest_whole_turns_go_when_the_context_is_full():
    script = Turns("answer")  # a turn is 4 + 6 + 1 tokens, the context 64, and 16 stay free for the answer
    chat = chat_with(script)
    for i in range(20):
        assert text_of(chat.ask(f"ask{i % 10}")) == "answer"
    turn = len("ask0answer") + 1
    assert max(map(len, script.prompts)) == 1 + 3 * turn + 4 <= 64 - 16
    assert bytes(script.prompts[-1][1:5]) == b"ask6" and bytes(script.prompts[-1][-4:]) == b"ask9"


def test_a_message_that_cannot_fit_is_said_and_changes_nothing():
    chat = chat_with(Turns("ok"))
    list(chat.ask("one"))
    before = [list(turn) for turn in chat.turns]
    with pytest.raises(UserError, match="200 tokens; the model's context holds 64"):
        list(chat.ask("x" * 200))
    assert chat.turns == before and text_of(chat.ask("two")) == "ok"


def test_an_answer_cut_off_or_stopped_still_ends_its_turn():
    chat = chat_with(lambda sequence: ord("a"), max_tokens=5)
    assert text_of(chat.ask("one")) == "aaaaa"
    stopped = chat.ask("two")
    next(stopped), next(stopped)
    stopped.close()
    assert chat.turns == [[*b"one", *b"aaaaa", END], [*b"two", *b"aa", END]]


def test_the_terminal_dims_the_calculator_and_drops_control_characters(monkeypatch, capsys):
    tool = [*b"So \x1b[31m", PYTHON, *b"6*7", PYTHON_END, *b"????", *b"42\n", END]
    for terminal, expected in (
        (True, "So [31m\x1b[2m[6*7]\x1b[0m\x1b[2m = 42\x1b[0m42\n\n"),
        (False, "So \x1b[31m42\n\n"),
    ):
        chat = chat_with(lambda sequence: tool[len(sequence) - 2], max_tokens=40)
        monkeypatch.setattr(sys.stdout, "isatty", lambda terminal=terminal: terminal)
        chat_cli.say(chat, "q")
        assert capsys.readouterr().out == expected


def test_ctrl_c_stops_the_answer_and_not_the_program(monkeypatch, capsys):
    def script(sequence):
        if bytes(sequence[1:]) == b"goab":
            raise KeyboardInterrupt
        return ord("ab"[(len(sequence) - 3) % 2]) if len(sequence) < 8 else END

    typed = iter(["go", KeyboardInterrupt, "", "x" * 500, "clear", "hi", EOFError])

    def answer(prompt):
        value = next(typed)
        if isinstance(value, str):
            return value
        raise value

    monkeypatch.setattr("builtins.input", answer)
    chat = chat_with(script)
    chat_cli.converse(chat)
    shown = capsys.readouterr().out
    assert "Assistant: ab\n(stopped)" in shown and "500 tokens" in shown and "A new conversation." in shown
    assert len(chat.turns) == 1 and bytes(chat.turns[0][:2]) == b"hi"


# ---------------------------------------------------------------------------------------------------------------------
# As a user starts it

FLAGS = ["-m", "8", "-t", "1", "--device-type=cpu", "--dtype=float32"]


def start(*flags, **kw):
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", "scripts.chat_cli", *FLAGS, *flags], env=env, timeout=120, **kw)


def test_one_answer_from_a_flag_equals_one_from_a_pipe(checkpoint):
    piped = start(input=b"Who are you?\n", capture_output=True)
    assert (piped.returncode, piped.stderr) == (0, b"") and piped.stdout.strip()
    assert start("-p", "Who are you?", capture_output=True).stdout == piped.stdout


def test_a_conversation_in_a_terminal(checkpoint):
    master, slave = pty.openpty()
    os.write(master, b"hello\nclear\nquit\n")
    done = start(stdin=slave, stdout=subprocess.PIPE)
    os.close(slave), os.close(master)
    assert done.returncode == 0
    assert b"Assistant: " in done.stdout and b"A new conversation." in done.stdout


@pytest.mark.parametrize(
    "flags, message",
    [
        (["-p", " "], "-p is empty"),
        (["-p", "hi", "-t", "-1"], "temperature=-1"),
        (["-p", "hi", "-i", "rl"], "no rl checkpoint"),
        (["-p", "x" * 5000], "context holds 128"),
    ],
)
def test_user_errors(checkpoint, flags, message):
    with pytest.raises(UserError, match=message):
        chat_cli.main([*FLAGS, *flags])
