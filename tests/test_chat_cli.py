"""The terminal chat: on a model that follows a script, and as a user starts it."""

import contextlib
import json
import os
import shlex
import stat
import subprocess
import sys
from types import SimpleNamespace

import pytest
import test_chat_eval
from conftest import ROOT
from test_engine import BOS, END, PYTHON, PYTHON_END, ByteTokenizer, ScriptedModel

from nanochat.common import UserError
from nanochat.engine import Engine
from nanochat.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer, get_tokenizer
from scripts import chat_cli
from scripts.chat_cli import Chat

checkpoint = test_chat_eval.checkpoint  # a fixture
SAMPLING = {"temperature": 0, "top_k": None, "seed": 1}


TOOL = [
    *b"So ",
    PYTHON,
    *b"6*7",
    PYTHON_END,
    *b"????",
    *b"42\n",
    END,
]  # ???? is forced: <|output_start|>42<|output_end|>


class ByteChat(ByteTokenizer):
    def render_for_completion(self, conversation, max_tokens=None):
        return [BOS, *"\n\n".join(m["content"] for m in conversation["messages"]).encode()]


def chat_with(script, source="sft", max_tokens=16, sequence_len=64, **settings):
    engine = Engine(ScriptedModel(script, sequence_len), ByteChat())
    return Chat(engine, source, max_tokens, **SAMPLING | settings)


def using_the_tool(sequence):
    return TOOL[len(sequence) - 2]  # after a question of one letter


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
    before = chat.messages()
    with pytest.raises(UserError, match="the message has 200 tokens; the model's context holds 64"):
        list(chat.ask("x" * 200))
    assert chat.messages() == before and text_of(chat.ask("two")) == "ok"


def test_an_answer_cut_off_or_stopped_still_ends_its_turn():
    prompts = []
    chat = chat_with(lambda sequence: prompts.append(sequence) or ord("a"), max_tokens=5)
    assert text_of(chat.ask("one")) == "aaaaa"
    stopped = chat.ask("two")
    next(stopped), next(stopped)
    stopped.close()
    next(chat.ask("three"))
    assert prompts[-1] == [BOS, *b"oneaaaaa", END, *b"twoaa", END, *b"three"]


def test_the_system_text_joins_the_first_question_that_the_model_sees():
    script = Turns("answer")
    chat = chat_with(script, system="Be brief.")
    for i in range(5):
        list(chat.ask(f"ask{i}"))
    assert bytes(script.prompts[0][1:]) == b"Be brief.\n\nask0"
    assert bytes(t for t in script.prompts[-1] if t < 256) == b"Be brief.\n\nask2answerask3answerask4"
    assert chat.messages()[0] == {"role": "system", "content": "Be brief."} and len(chat.messages()) == 11
    with pytest.raises(UserError, match="message and system text have 99"):
        list(chat.ask("x" * 88))
    with pytest.raises(UserError, match="a base model"):
        chat_with(script, source="base", system="Be brief.")


def test_the_prompt_equals_the_tokenizers_rendering_of_the_conversation():
    specials = {name: 256 + i for i, name in enumerate(SPECIAL_TOKENS)}
    tokenizer = Tokenizer(SPLIT_PATTERN, {bytes([i]): i for i in range(256)}, specials)
    script = Turns("It is blue.")
    chat = Chat(Engine(ScriptedModel(script, sequence_len=400), tokenizer), "sft", 20, system="Be brief.", **SAMPLING)
    for question in ("What is the sky?", "And <|assistant_end|>?"):
        list(chat.ask(question))
        assert script.prompts[-1] == tokenizer.render_for_completion({"messages": chat.messages()})


def test_a_report_counts_what_was_read_and_written():
    chat = chat_with(using_the_tool, max_tokens=40)
    list(chat.ask("q"))
    report = chat.report()
    assert report["text"] == "So 42\n" and report["finish_reason"] == "stop"
    assert report["tool_steps"] == [{"type": "calculator", "expression": "6*7", "result": "42"}]
    assert (report["prompt_tokens"], report["completion_tokens"]) == (2, len(TOOL) - 1)
    assert 0 <= report["first_token_seconds"] <= report["seconds"] and report["tokens_per_second"] > 0
    short = chat_with(using_the_tool, max_tokens=6)
    list(short.ask("q"))
    assert short.report()["finish_reason"] == "length"
    assert short.report()["tool_steps"] == [{"type": "calculator", "expression": "6*", "result": None}]


@pytest.mark.parametrize(
    "terminal, no_color, expected",
    [
        (True, "", "[31mSo \x1b[2m[6*7 = 42]\x1b[0m42\n\n"),
        (True, "1", "[31mSo [6*7 = 42]42\n\n"),
        (False, "", "\x1b[31mSo 42\n\n"),
    ],
)
def test_the_terminal_dims_the_calculator_and_drops_control_characters(
    monkeypatch, capsys, terminal, no_color, expected
):
    answer = [*b"\x1b[31m", *TOOL]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    monkeypatch.setenv("NO_COLOR", no_color)
    chat_cli.say(chat_with(lambda sequence: answer[len(sequence) - 2], max_tokens=40), "q")
    assert capsys.readouterr().out == expected


# ---------------------------------------------------------------------------------------------------------------------
# Conversations


@pytest.fixture
def talk(monkeypatch, capsys, tmp_path):
    """talk(chat, "hello", KeyboardInterrupt, ...) types these and Ctrl-D; returns what is shown after each of them."""
    monkeypatch.chdir(tmp_path)
    # Line editing would pull this process's own standard input into the test.
    monkeypatch.setitem(sys.modules, "readline", None)

    def talk(chat, *lines, **settings):
        typed, shown = iter([*lines, EOFError]), []

        def type_next(prompt):
            shown.append(capsys.readouterr().out)
            value = next(typed)
            if isinstance(value, str):
                return value
            raise value

        monkeypatch.setattr("builtins.input", type_next)
        chat_cli.converse(chat, tmp_path / "history", **settings)
        return [*shown[1:], capsys.readouterr().out]

    return talk


def test_ctrl_c_stops_the_answer_and_not_the_program(talk):
    def script(sequence):
        if bytes(sequence[1:]) == b"goab":
            raise KeyboardInterrupt
        return ord("ab"[(len(sequence) - 3) % 2]) if len(sequence) < 8 else END

    chat = chat_with(script)
    shown = talk(chat, "go", KeyboardInterrupt, "", "x" * 500, "clear", "hi")
    assert shown[0] == "\nAssistant: ab\n(stopped)\n" and "Ctrl-C once more" in shown[1] and shown[2] == ""
    assert "500 tokens" in shown[3] and shown[4] == "A new conversation.\n"
    assert [m["content"] for m in chat.messages()] == ["hi", "ababa"]


def test_ctrl_c_twice_in_a_row_leaves(talk):
    shown = talk(chat_with(Turns("ok")), KeyboardInterrupt, "one", KeyboardInterrupt, KeyboardInterrupt, "not reached")
    assert len(shown) == 4 and "ok" in shown[1]


@pytest.mark.parametrize("word", ["quit", "EXIT", "/quit", "/exit"])
def test_words_that_leave(talk, word):
    assert len(talk(chat_with(Turns("ok")), word, "not reached")) == 1


def test_commands(talk):
    script = Turns("ok")
    chat = chat_with(script)
    shown = talk(
        chat, "/regenerate", "/save", "one", "/clear", "/system", "/system Be brief.", "/system", "two", "/system -",
        "//three", "/nonsense", "/HELP", "/temp", "/temp 0.5", "/temp hot", "/temp -1", "/topk 7", "/topk 0.5", "/topk",
    )  # fmt: skip
    assert [bytes(prompt[1:]) for prompt in script.prompts] == [b"one", b"Be brief.\n\ntwo", b"/three"]
    assert shown[0] == "nothing has been asked yet\n" and shown[1] == "there is nothing to save yet\n"
    assert shown[3] == shown[5] == shown[8] == "A new conversation.\n"
    assert shown[4] == "There is no system text.\n" and shown[6] == "Be brief.\n"
    assert shown[10].startswith("there is no /nonsense; /help") and shown[10].count("\n") == 1
    assert all(f"/{name}" in shown[11] for name in "clear regenerate system temp topk save quit".split())
    assert shown[12] == "temperature = 0\n" and shown[13] == "temperature = 0.5\n"
    assert "temperature=hot: expected a number" in shown[14] and "temperature=-1" in shown[15]
    assert shown[16] == shown[18] == "top_k = 7\n" and "top_k=0.5: expected a number" in shown[17]
    assert chat.sampling == {"temperature": 0.5, "top_k": 7, "seed": 1}


def test_a_base_model_takes_no_system_text(talk):
    script = Turns("ok")
    shown = talk(chat_with(script, source="base"), "/system Be brief.", "one", "/regenerate")
    assert "a base model" in shown[0] and [bytes(p[1:]) for p in script.prompts] == [b"one", b"one"]


def test_regenerate_asks_again_with_another_seed_and_a_session_repeats(talk):
    def session(seed):
        """Every letter is as likely as another."""
        prompts = []

        def script(sequence):
            prompts.append(bytes(t for t in sequence[1:] if t < 256))
            return list(range(ord("a"), ord("z") + 1))

        chat = chat_with(script, temperature=1, seed=seed)
        shown = talk(chat, "one", "/regenerate", "two")
        assert [m["content"] for m in chat.messages()[::2]] == ["one", "two"]
        assert prompts[16] == b"one" and prompts[32].startswith(b"one") and prompts[32].endswith(b"two")
        return shown[:3]

    first = session(1)
    assert len(set(first)) == 3 and session(1) == first != session(2)
    assert "(cut off after 16 tokens)" in first[0]


def test_save_writes_the_conversation_once(talk, tmp_path):
    chat = chat_with(using_the_tool, max_tokens=40, system="")
    shown = talk(chat, "q", "/save a talk.json", "/save a talk.json", "/save", "/save no/such/folder")
    assert shown[1] == "Saved as a talk.json.\n" and "(File exists); choose another name" in shown[2]
    assert "cannot write no/such/folder (No such file" in shown[4]
    named, dated = tmp_path / "a talk.json", next(tmp_path.glob("chat-20*.json"))
    assert named.read_text() == dated.read_text()
    parts = [("text", "So "), ("python", "6*7"), ("python_output", "42"), ("text", "42\n")]
    answer = {"role": "assistant", "content": [{"type": kind, "text": text} for kind, text in parts]}
    assert json.loads(named.read_text()) == {"messages": [{"role": "user", "content": "q"}, answer]}


def test_history_belongs_to_its_owner_and_its_failure_is_no_reason_to_die(talk, tmp_path):
    history = tmp_path / "history"
    before = os.umask(0)
    try:
        talk(chat_with(Turns("ok")), "one", "", "/temp", "two\nlines")
    finally:
        os.umask(before)
    assert history.read_text() == "one\n/temp\ntwo lines\n" and stat.S_IMODE(history.stat().st_mode) == 0o600
    history.unlink()
    history.mkdir()
    assert "ok" in talk(chat_with(Turns("ok")), "one")[0]


def test_verbose_tells_the_speed_on_standard_error(monkeypatch, tmp_path, capsys):
    typed = iter(["hi", "quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    monkeypatch.setitem(sys.modules, "readline", None)
    chat_cli.converse(chat_with(Turns("ok")), tmp_path / "history", verbose=True)
    shown = capsys.readouterr()
    assert shown.err.startswith("[2 tokens, ") and "tokens/s" in shown.err and "tokens/s" not in shown.out


# ---------------------------------------------------------------------------------------------------------------------
# As a user starts it

FLAGS = ["-m", "8", "-t", "1", "--device-type=cpu", "--dtype=float32"]
COMMAND = [sys.executable, "-m", "scripts.chat_cli", *FLAGS]


def environment():
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TERM": "dumb"}


def start(*flags, **kw):
    return subprocess.run([*COMMAND, *flags], env=environment(), capture_output=True, timeout=120, **kw)


def test_one_answer_from_a_flag_equals_one_from_a_pipe(checkpoint):
    """Only the answer is on standard output, also where there is something to warn of."""
    piped = start(input=b"Who are you?\n")
    assert (piped.returncode, piped.stderr) == (0, b"") and piped.stdout.strip()
    newer = checkpoint / "chatsft_checkpoints" / "d1" / "step_000009"
    newer.mkdir()
    flag = start("-p", "Who are you?", "-v", stdin=subprocess.DEVNULL)
    assert flag.stdout == piped.stdout
    assert flag.stderr.startswith(b"warning: ") and b"tokens/s" in flag.stderr


def test_json_has_the_answer_and_its_counts(checkpoint, monkeypatch, capsys):
    flags = [*FLAGS, "-p", "Who are you?"]
    chat_cli.main(flags)
    answer = capsys.readouterr().out
    chat_cli.main([*flags, "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert shown["text"] + "\n" == answer and shown["tool_steps"] == []
    assert shown["model"] == {"source": "sft", "tag": "d1", "step": 3}
    prompt = get_tokenizer().render_for_completion({"messages": [{"role": "user", "content": "Who are you?"}]})
    assert shown["prompt_tokens"] == len(prompt) and 0 < shown["completion_tokens"] <= 8
    assert shown["finish_reason"] in ("stop", "length")


@pytest.mark.parametrize(
    "flag, piped, expected",
    [
        ("explain", "a file\n", "a file\n\nexplain"),
        ("-", "a file\n", "a file"),
        (None, "a file\n", "a file"),
        ("explain", "", "explain"),
        ("", "a file\n", "a file"),
    ],
)
def test_what_is_piped_in_comes_before_the_flag(tmp_path, monkeypatch, flag, piped, expected):
    (tmp_path / "piped").write_text(piped)
    with open(tmp_path / "piped") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert chat_cli.read_question(flag) == expected


@pytest.mark.parametrize("flag", [None, "-", " "])
@pytest.mark.parametrize("closed", [True, False])
def test_no_question_at_all(monkeypatch, flag, closed):
    with contextlib.nullcontext() if closed else open(os.devnull) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        with pytest.raises(UserError, match="the question is empty"):
            chat_cli.read_question(flag)


@pytest.mark.parametrize("typed, prompts", [("", 2), ("half a line", 3)])
def test_ctrl_c_twice_at_the_empty_prompt_leaves(typed, prompts, monkeypatch, capsys):
    lines = iter([typed, "", ""])

    def interrupted(prompt):
        line = next(lines)
        monkeypatch.setitem(sys.modules, "readline", SimpleNamespace(get_line_buffer=lambda: line))
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    with pytest.raises(EOFError):
        chat_cli.read_line()
    assert len(list(lines)) == 3 - prompts and capsys.readouterr().out.count("once more") == 1


def test_ctrl_c_while_one_answer_is_made():
    program = """if True:
        import signal
        from nanochat.cli import run_script
        from scripts import chat_cli
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
        class Chat:
            def ask(self, text):
                yield "text", "Hello"
                signal.raise_signal(signal.SIGINT)
                yield "text", "never"
        run_script(lambda: chat_cli.say(Chat(), "q"))
    """
    done = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"Hello\n", b"\ninterrupted\n")


def test_a_reader_that_leaves_ends_it_quietly(checkpoint):
    pipe = f"set -o pipefail; {shlex.join(COMMAND)} -m 100 -p Who | true"
    done = subprocess.run(["bash", "-c", pipe], env=environment(), capture_output=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (1, b"", b"")


def test_a_wrong_flag_is_one_line_and_exit_code_2():
    done = start("-k", "many", stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout, done.stderr.count(b"\n")) == (2, b"", 1)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["-p", " "], "the question is empty"),
        (["-p", "hi", "-t", "-1"], "temperature=-1"),
        (["-p", "hi", "-i", "rl"], "no rl checkpoint in .*; make one with `python -m scripts.chat_rl`"),
        (["-p", "x" * 5000], "context holds 128"),
        (["-p", "hi", "-i", "base", "--system", "Be brief."], "no base checkpoint"),
    ],
)
def test_user_errors(checkpoint, flags, message):
    with pytest.raises(UserError, match=message):
        chat_cli.main([*FLAGS, *flags])


def test_json_is_for_a_single_answer(monkeypatch):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    with pytest.raises(UserError, match="--json prints a single answer"):
        chat_cli.main(["--json"])


def test_a_pipe_that_nobody_writes_to_does_not_hold_up_a_prompt(monkeypatch, capsys):
    monkeypatch.setattr(chat_cli, "PIPE_PATIENCE", 0.05)
    reader, writer = os.pipe()
    with open(reader) as stdin, open(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert chat_cli.read_question("why?") == "why?"
        assert "nothing comes from standard input" in capsys.readouterr().err
        pipe.write("a poem")
        pipe.close()
        assert chat_cli.read_question("why?") == "a poem\n\nwhy?"
