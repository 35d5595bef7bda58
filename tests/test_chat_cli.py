"""The terminal chat: conversations with a scripted model, and the command line with a tiny checkpoint."""

import contextlib
import io
import json
import os
import shlex
import stat
import subprocess
import sys
from types import SimpleNamespace

import pytest
from helpers import (
    BOS,
    END,
    OUTPUT,
    OUTPUT_END,
    PYTHON,
    PYTHON_END,
    ByteTokenizer,
    ScriptedModel,
    environment,
    python_command,
    run_python,
)

from nanochat.common import UserError
from nanochat.engine import Engine
from nanochat.inference.answer import Answer
from nanochat.terminal import console, repl
from nanochat.terminal.session import Chat
from nanochat.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer, get_tokenizer
from scripts import chat_cli

SAMPLING = {"temperature": 0, "top_k": None, "seed": 1}
# The four tokens ???? are replaced by the calculator's result: <|output_start|>42<|output_end|>.
CALL = [*b"So ", PYTHON, *b"6*7", PYTHON_END, *b"????", *b"42\n", END]


def chat_with(script, source="sft", max_tokens=16, sequence_len=64, **settings):
    engine = Engine(ScriptedModel(script, sequence_len), ByteTokenizer())
    return Chat(engine, source, max_tokens, **SAMPLING | settings)


def call_calculator(sequence):
    return CALL[len(sequence) - 2]  # the prompt has two tokens: <|bos|> and a question of one letter


class FixedAnswer:
    """A script that answers every question with `answer` and records the prompts."""

    def __init__(self, answer):
        self.answer, self.prompts = [*answer.encode(), END], []
        self.position = 0  # in the answer

    def __call__(self, sequence):
        if self.position == 0:
            self.prompts.append(sequence)
        token = self.answer[self.position]
        self.position = (self.position + 1) % len(self.answer)
        return token


def joined_text(pieces):
    return "".join(piece for _, piece in pieces)


def test_prompt_contains_earlier_turns():
    script = FixedAnswer("né")
    chat = chat_with(script)
    assert joined_text(chat.ask("one")) == "né" and joined_text(chat.ask("two")) == "né"
    first = [*b"one", *"né".encode(), END]
    assert script.prompts == [[BOS, *b"one"], [BOS, *first, *b"two"]]


def test_base_model_prompt_is_only_the_question():
    script = FixedAnswer("né")
    chat = chat_with(script, source="base")
    list(chat.ask("one"))
    list(chat.ask("two"))
    assert script.prompts == [[BOS, *b"one"], [BOS, *b"two"]]


def test_oldest_turns_are_dropped_when_the_context_is_full():
    script = FixedAnswer("answer")  # a turn has 4 + 6 + 1 tokens; of the context's 64, 16 are reserved for the answer
    chat = chat_with(script)
    for i in range(20):
        assert joined_text(chat.ask(f"ask{i % 10}")) == "answer"
    turn = len("ask0answer") + 1
    assert max(map(len, script.prompts)) == 1 + 3 * turn + 4 <= 64 - 16
    assert bytes(script.prompts[-1][1:5]) == b"ask6" and bytes(script.prompts[-1][-4:]) == b"ask9"


def test_too_long_question_raises_and_leaves_the_conversation_unchanged():
    chat = chat_with(FixedAnswer("ok"))
    list(chat.ask("one"))
    before = chat.messages()
    with pytest.raises(UserError, match="the message has 200 tokens; the model's context holds 64"):
        list(chat.ask("x" * 200))
    assert chat.messages() == before and joined_text(chat.ask("two")) == "ok"


def test_partial_answers_are_complete_turns_in_the_next_prompt():
    prompts = []
    chat = chat_with(lambda sequence: prompts.append(sequence) or ord("a"), max_tokens=5)
    assert joined_text(chat.ask("one")) == "aaaaa"
    stopped = chat.ask("two")
    next(stopped), next(stopped)
    stopped.close()
    next(chat.ask("three"))
    assert prompts[-1] == [BOS, *b"oneaaaaa", END, *b"twoaa", END, *b"three"]


def test_system_text_precedes_the_first_question_in_the_prompt():
    script = FixedAnswer("answer")
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


def test_prompt_equals_the_tokenizers_rendering_of_the_conversation():
    specials = {name: 256 + i for i, name in enumerate(SPECIAL_TOKENS)}
    tokenizer = Tokenizer(SPLIT_PATTERN, {bytes([i]): i for i in range(256)}, specials)
    script = FixedAnswer("It is blue.")
    chat = Chat(Engine(ScriptedModel(script, sequence_len=400), tokenizer), "sft", 20, system="Be brief.", **SAMPLING)
    for question in ("What is the sky?", "And <|assistant_end|>?"):
        list(chat.ask(question))
        assert script.prompts[-1] == tokenizer.render_for_completion({"messages": chat.messages()})


def test_report_has_text_tool_steps_and_token_counts():
    chat = chat_with(call_calculator, max_tokens=40)
    list(chat.ask("q"))
    report = chat.report()
    assert report["text"] == "So 42\n" and report["finish_reason"] == "stop"
    assert report["tool_steps"] == [{"type": "calculator", "expression": "6*7", "result": "42"}]
    assert (report["prompt_tokens"], report["completion_tokens"]) == (2, len(CALL) - 1)
    assert 0 <= report["first_token_seconds"] <= report["seconds"] and report["tokens_per_second"] > 0
    short = chat_with(call_calculator, max_tokens=6)
    list(short.ask("q"))
    assert short.report()["finish_reason"] == "length"
    assert short.report()["tool_steps"] == [{"type": "calculator", "expression": "6*", "result": None}]


def test_tool_steps_agree_with_the_message_parts():
    tokens = [*b"So ", PYTHON, *b"6*7", PYTHON_END, OUTPUT, *b"42", OUTPUT_END, PYTHON, *b"1+", 0xC3]
    answer = Answer(ByteTokenizer())
    deltas = [answer.push(token, None, "length" if i == len(tokens) else None) for i, token in enumerate(tokens, 1)]
    first = {"type": "calculator", "expression": "6*7", "result": "42", "position": 3}
    second = first | {"expression": "1+\ufffd", "result": None}  # the answer ends within a character
    assert [step for delta in deltas for step in delta.get("tool_steps", [])] == answer.steps == [first, second]
    parts = [("text", "So "), ("python", "6*7"), ("python_output", "42"), ("python", "1+\ufffd")]
    assert answer.parts == [{"type": part, "text": text} for part, text in parts]
    assert answer.text == "".join(delta.get("content", "") for delta in deltas) == "So "


@pytest.mark.parametrize(
    "terminal, no_color, expected",
    [
        (True, "", "[31mSo \x1b[2m[6*7 = 42]\x1b[0m42\n\n"),
        (True, "1", "[31mSo [6*7 = 42]42\n\n"),
        (False, "", "\x1b[31mSo 42\n\n"),
    ],
)
def test_terminal_dims_calculator_calls_and_removes_control_characters(
    monkeypatch, capsys, terminal, no_color, expected
):
    answer = [*b"\x1b[31m", *CALL]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    monkeypatch.setenv("NO_COLOR", no_color)
    console.print_answer(chat_with(lambda sequence: answer[len(sequence) - 2], max_tokens=40), "q")
    assert capsys.readouterr().out == expected


# ---------------------------------------------------------------------------------------------------------------------
# Conversations


@pytest.fixture
def talk(monkeypatch, capsys, tmp_path):
    """talk(chat, "hello", KeyboardInterrupt, ...) types the lines, then Ctrl-D; returns the output after each line."""
    monkeypatch.chdir(tmp_path)
    # readline would use the real standard input of the test process.
    monkeypatch.setitem(sys.modules, "readline", None)

    def talk(chat, *lines, **settings):
        typed, outputs = iter([*lines, EOFError]), []

        def type_next(prompt):
            outputs.append(capsys.readouterr().out)
            value = next(typed)
            if isinstance(value, str):
                return value
            raise value

        monkeypatch.setattr("builtins.input", type_next)
        repl.run_repl(chat, tmp_path / "history", **settings)
        return [*outputs[1:], capsys.readouterr().out]

    return talk


def test_ctrl_c_stops_the_answer_but_not_the_program(talk):
    def script(sequence):
        if bytes(sequence[1:]) == b"goab":
            raise KeyboardInterrupt
        return ord("ab"[(len(sequence) - 3) % 2]) if len(sequence) < 8 else END

    chat = chat_with(script)
    outputs = talk(chat, "go", KeyboardInterrupt, "", "x" * 500, "clear", "hi")
    assert outputs[0] == "\nAssistant: ab\n(stopped)\n" and "Ctrl-C once more" in outputs[1] and outputs[2] == ""
    assert "500 tokens" in outputs[3] and outputs[4] == "A new conversation.\n"
    assert [m["content"] for m in chat.messages()] == ["hi", "ababa"]


def test_ctrl_c_twice_in_a_row_ends_the_conversation(talk):
    outputs = talk(
        chat_with(FixedAnswer("ok")), KeyboardInterrupt, "one", KeyboardInterrupt, KeyboardInterrupt, "not reached"
    )
    assert len(outputs) == 4 and "ok" in outputs[1]


@pytest.mark.parametrize("word", ["quit", "EXIT", "/quit", "/exit"])
def test_quit_commands_end_the_conversation(talk, word):
    assert len(talk(chat_with(FixedAnswer("ok")), word, "not reached")) == 1


def test_slash_commands(talk):
    script = FixedAnswer("ok")
    chat = chat_with(script)
    outputs = talk(
        chat, "/regenerate", "/save", "one", "/clear", "/system", "/system Be brief.", "/system", "two", "/system -",
        "//three", "/nonsense", "/HELP", "/temp", "/temp 0.5", "/temp hot", "/temp -1", "/topk 7", "/topk 0.5", "/topk",
    )  # fmt: skip
    assert [bytes(prompt[1:]) for prompt in script.prompts] == [b"one", b"Be brief.\n\ntwo", b"/three"]
    assert outputs[0] == "nothing has been asked yet\n" and outputs[1] == "there is nothing to save yet\n"
    assert outputs[3] == outputs[5] == outputs[8] == "A new conversation.\n"
    assert outputs[4] == "There is no system text.\n" and outputs[6] == "Be brief.\n"
    assert outputs[10].startswith("there is no /nonsense; /help") and outputs[10].count("\n") == 1
    assert all(f"/{name}" in outputs[11] for name in "clear regenerate system temp topk save quit".split())
    assert outputs[12] == "temperature = 0\n" and outputs[13] == "temperature = 0.5\n"
    assert "temperature=hot: expected a number" in outputs[14] and "temperature=-1" in outputs[15]
    assert outputs[16] == outputs[18] == "top_k = 7\n" and "top_k=0.5: expected a number" in outputs[17]
    assert chat.sampling == {"temperature": 0.5, "top_k": 7, "seed": 1}


def test_base_model_refuses_system_text(talk):
    script = FixedAnswer("ok")
    outputs = talk(chat_with(script, source="base"), "/system Be brief.", "one", "/regenerate")
    assert "a base model" in outputs[0] and [bytes(p[1:]) for p in script.prompts] == [b"one", b"one"]


def test_regenerate_uses_another_seed_and_sessions_are_reproducible(talk):
    def session(seed):
        """All letters have the same probability."""
        prompts = []

        def script(sequence):
            prompts.append(bytes(t for t in sequence[1:] if t < 256))
            return list(range(ord("a"), ord("z") + 1))

        chat = chat_with(script, temperature=1, seed=seed)
        outputs = talk(chat, "one", "/regenerate", "two")
        assert [m["content"] for m in chat.messages()[::2]] == ["one", "two"]
        assert prompts[16] == b"one" and prompts[32].startswith(b"one") and prompts[32].endswith(b"two")
        return outputs[:3]

    first = session(1)
    assert len(set(first)) == 3 and session(1) == first != session(2)
    assert "(cut off after 16 tokens)" in first[0]


def test_save_writes_the_conversation_and_never_overwrites(talk, tmp_path):
    chat = chat_with(call_calculator, max_tokens=40, system="")
    outputs = talk(chat, "q", "/save a talk.json", "/save a talk.json", "/save", "/save no/such/folder")
    assert outputs[1] == "Saved as a talk.json.\n" and "(File exists); choose another name" in outputs[2]
    assert "cannot write no/such/folder (No such file" in outputs[4]
    named, dated = tmp_path / "a talk.json", next(tmp_path.glob("chat-20*.json"))
    assert named.read_text() == dated.read_text()
    parts = [("text", "So "), ("python", "6*7"), ("python_output", "42"), ("text", "42\n")]
    answer = {"role": "assistant", "content": [{"type": kind, "text": text} for kind, text in parts]}
    assert json.loads(named.read_text()) == {"messages": [{"role": "user", "content": "q"}, answer]}


def test_history_is_private_and_its_failure_is_ignored(talk, tmp_path):
    history = tmp_path / "history"
    before = os.umask(0)
    try:
        talk(chat_with(FixedAnswer("ok")), "one", "", "/temp", "two\nlines")
    finally:
        os.umask(before)
    assert history.read_text() == "one\n/temp\ntwo lines\n" and stat.S_IMODE(history.stat().st_mode) == 0o600
    history.unlink()
    history.mkdir()
    assert "ok" in talk(chat_with(FixedAnswer("ok")), "one")[0]


def test_verbose_prints_the_speed_on_standard_error(monkeypatch, tmp_path, capsys):
    typed = iter(["hi", "quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    monkeypatch.setitem(sys.modules, "readline", None)
    repl.run_repl(chat_with(FixedAnswer("ok")), tmp_path / "history", verbose=True)
    output = capsys.readouterr()
    assert output.err.startswith("[2 tokens, ") and "tokens/s" in output.err and "tokens/s" not in output.out


# ---------------------------------------------------------------------------------------------------------------------
# The command line

FLAGS = ["-m", "8", "-t", "1", "--device-type=cpu", "--dtype=float32"]
COMMAND = ["-m", "scripts.chat_cli", *FLAGS]


def run_chat_cli(*flags, **options):
    return run_python(*COMMAND, *flags, env=environment(TERM="dumb"), check=False, text=False, **options)


@pytest.mark.slow
def test_question_from_flag_and_from_pipe_get_the_same_answer(sft_checkpoint):
    """Standard output has only the answer; warnings go to standard error."""
    piped = run_chat_cli(input=b"Who are you?\n")
    assert (piped.returncode, piped.stderr) == (0, b"") and piped.stdout.strip()
    newer = sft_checkpoint / "chatsft_checkpoints" / "d1" / "step_000009"
    newer.mkdir()
    flag = run_chat_cli("-p", "Who are you?", "-v", stdin=subprocess.DEVNULL)
    assert flag.stdout == piped.stdout
    assert flag.stderr.startswith(b"warning: ") and b"tokens/s" in flag.stderr


def test_json_has_the_answer_and_token_counts(sft_checkpoint, monkeypatch, capsys):
    flags = [*FLAGS, "-p", "Who are you?"]
    chat_cli.main(flags)
    answer = capsys.readouterr().out
    chat_cli.main([*flags, "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["text"] + "\n" == answer and report["tool_steps"] == []
    assert report["model"] == {"source": "sft", "tag": "d1", "step": 3}
    prompt = get_tokenizer().render_for_completion({"messages": [{"role": "user", "content": "Who are you?"}]})
    assert report["prompt_tokens"] == len(prompt) and 0 < report["completion_tokens"] <= 8
    assert report["finish_reason"] in ("stop", "length")


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
def test_piped_text_comes_before_the_flag(tmp_path, monkeypatch, flag, piped, expected):
    (tmp_path / "piped").write_text(piped)
    with open(tmp_path / "piped") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert console.read_question(flag) == expected


@pytest.mark.parametrize(
    "data, encoding, expected",
    [
        ("\ufeffWho\r\nare you?\r\n".encode(), "utf-8", "Who\nare you?"),
        ("Größe?".encode("utf-16"), "utf-8", "Größe?"),
        ("Größe?".encode("latin-1"), "latin-1", "Größe?"),
        ("Größe?".encode(), "ascii", "Größe?"),
        ("Größe?".encode("latin-1"), "utf-8", "Gr\ufffd\ufffde?"),
    ],
)
def test_encodings_of_piped_text(monkeypatch, capsys, data, encoding, expected):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding=encoding))
    assert console.read_question("-") == expected
    assert ("is not UTF-8" in capsys.readouterr().err) == ("\ufffd" in expected)


def test_byte_order_mark_of_a_flag_is_removed(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert console.read_question("\ufeffHi\r\nthere") == "Hi\nthere"


@pytest.mark.parametrize("flag", [None, "-", " "])
@pytest.mark.parametrize("closed", [True, False])
def test_empty_question_is_refused(monkeypatch, flag, closed):
    with contextlib.nullcontext() if closed else open(os.devnull) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        with pytest.raises(UserError, match="the question is empty"):
            console.read_question(flag)


@pytest.mark.parametrize("typed, prompts", [("", 2), ("half a line", 3)])
def test_ctrl_c_twice_at_an_empty_prompt_raises_eof_error(typed, prompts, monkeypatch, capsys):
    lines = iter([typed, "", ""])

    def interrupted(prompt):
        line = next(lines)
        monkeypatch.setitem(sys.modules, "readline", SimpleNamespace(get_line_buffer=lambda: line))
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    with pytest.raises(EOFError):
        console.read_line()
    assert len(list(lines)) == 3 - prompts and capsys.readouterr().out.count("once more") == 1


def test_ctrl_c_during_a_single_answer():
    program = """if True:
        import signal
        from nanochat.cli import run_script
        from nanochat.terminal import console
        signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
        class Chat:
            def ask(self, text):
                yield "text", "Hello"
                signal.raise_signal(signal.SIGINT)
                yield "text", "never"
        run_script(lambda: console.print_answer(Chat(), "q"))
    """
    done = run_python("-c", program, env=environment(TERM="dumb"), check=False, text=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"Hello\n", b"\ninterrupted\n")


@pytest.mark.slow
def test_closed_output_pipe_ends_the_program_silently(sft_checkpoint):
    pipe = f"set -o pipefail; {shlex.join(python_command(*COMMAND))} -m 100 -p Who | true"
    done = subprocess.run(["bash", "-c", pipe], env=environment(TERM="dumb"), capture_output=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (1, b"", b"")


def test_wrong_flag_prints_one_line_and_exits_with_2():
    done = run_chat_cli("-k", "many", stdin=subprocess.DEVNULL)
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
def test_user_errors(sft_checkpoint, flags, message):
    with pytest.raises(UserError, match=message):
        chat_cli.main([*FLAGS, *flags])


def test_json_requires_a_question(monkeypatch):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    with pytest.raises(UserError, match="--json prints a single answer"):
        chat_cli.main(["--json"])


def test_silent_pipe_does_not_block_a_prompt(monkeypatch, capsys):
    monkeypatch.setattr(console, "PIPE_TIMEOUT", 0.05)
    reader, writer = os.pipe()
    with open(reader) as stdin, open(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert console.read_question("why?") == "why?"
        assert "no data on standard input" in capsys.readouterr().err
        pipe.write("a poem")
        pipe.close()
        assert console.read_question("why?") == "a poem\n\nwhy?"
