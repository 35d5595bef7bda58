"""
Talk to a model in the terminal.

    python -m scripts.chat_cli                            # a conversation; /help lists its commands
    python -m scripts.chat_cli -p "Why is the sky blue?"  # one answer on standard output, all else on standard error
    cat poem.txt | python -m scripts.chat_cli -p "Explain this poem."   # the piped text comes before the question
    python -m scripts.chat_cli -p - --json < question.txt               # the answer with its counts, as JSON

Reads the newest checkpoint of a stage. In a terminal the calculator's calls are shown, dimmed unless NO_COLOR is set;
elsewhere they are left out. Exit codes: 1 = it failed, 2 = a mistake in its use, 130 = Ctrl-C.
"""

import contextlib
import io
import itertools
import json
import os
import select
import stat
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from nanochat.cli import add_model_flags, make_parser, parse_args, run_script
from nanochat.common import UserError, base_dir, compute_init, no_color, well_formed
from nanochat.inference.detokenizer import Detokenizer

# What a model writes must not steer the terminal: control characters are dropped, but for tab and newline.
CONTROLS = {c: None for c in (*range(32), *range(127, 160)) if c not in (9, 10)}
PIPE_PATIENCE = 2.0  # seconds that -p TEXT waits for a pipe
HELP = """\
/clear           begin a new conversation
/regenerate      answer the last question once more, differently
/system [TEXT]   show the system text, or set it (- for none) and begin a new conversation
/temp [X]        show or set the temperature; 0 = always the likeliest token
/topk [N]        show or set from how many of the likeliest tokens to sample; 0 = from all
/save [FILE]     write the conversation as JSON
/quit            leave; so does Ctrl-D
Ctrl-C stops an answer. A text that begins with / is sent if you write //."""


def build_parser():
    parser = make_parser("scripts.chat_cli", __doc__)
    add_model_flags(parser, source="sft")
    add = parser.add_argument
    add("-p", "--prompt", help="answer this and exit; - reads standard input")
    add("--system", default="", help="system text; it joins the first question")
    add("-t", "--temperature", type=float, default=0.6, help="0 = always the likeliest token (default 0.6)")
    add("-k", "--top_k", type=int, default=50, help="sample from the k likeliest tokens, 0 = from all (default 50)")
    add("-m", "--max_tokens", type=int, default=512, help="longest answer, in tokens (default 512)")
    add("--seed", type=int, default=42, help="of the sampling; the same seed repeats a whole session (default 42)")
    add("--json", action="store_true", help="print one JSON object: text, tool_steps, counts, timing, finish_reason")
    add("-v", "--verbose", action="store_true", help="after each answer, tell its speed on standard error")
    return parser


@dataclass
class Turn:
    """A question and what became of its answer."""

    question: str
    tokens: list[int] = field(default_factory=list)  # of the answer, without the terminal one
    pieces: list[tuple] = field(default_factory=list)  # (kind, text) as they came out of Detokenizer
    usage: dict = field(default_factory=dict)  # counts and times, once the answer is complete

    def parts(self):
        """The answer as an assistant's message: [{"type": "text" | "python" | "python_output", "text"}]."""
        types = {"text": "text", "python": "python", "output": "python_output"}
        runs = itertools.groupby(self.pieces, key=lambda piece: piece[0])
        parts = [{"type": types[kind], "text": "".join(text for _, text in run)} for kind, run in runs]
        return [part for part in parts if part["text"]]


class Chat:
    """A conversation; of its turns, the model sees the newest that fit into its context as a whole."""

    def __init__(self, engine, source, max_tokens, system="", **sampling):
        self.engine, self.plain = engine, source == "base"
        self.max_tokens, self.sampling, self.asked = max_tokens, sampling, 0
        self.begin(system)

    def begin(self, system):
        """A new conversation with this system text, which joins the first question that the model sees."""
        if system and self.plain:
            raise UserError("a base model continues plain text and takes no system text; choose another stage with -i")
        self.system, self.turns = well_formed(system), []

    def ask(self, text):
        """Yield (kind, piece of text) of the answer. The turn is remembered even if the caller stops halfway."""
        engine, stream = self.engine, Detokenizer(self.engine.tokenizer)
        text = well_formed(text)  # a terminal of another encoding may send half a character
        prompt = self._prompt(text)
        turn = Turn(text)
        self.turns.append(turn)
        seed = self.sampling["seed"] + self.asked  # else the same question would always get the same answer
        self.asked += 1
        start, first, finish_reason = time.perf_counter(), None, "length"
        for (token,), _ in engine.generate(prompt, max_tokens=self.max_tokens, **self.sampling | {"seed": seed}):
            first = first or time.perf_counter() - start
            if token in engine.terminals:
                finish_reason = "stop"
                break
            turn.tokens.append(token)
            turn.pieces.append(stream.push(token))
            yield turn.pieces[-1]
        turn.pieces.append(stream.flush())
        seconds = time.perf_counter() - start
        turn.usage = {
            "prompt_tokens": len(prompt),
            "completion_tokens": len(turn.tokens),
            "seconds": round(seconds, 3),
            "first_token_seconds": round(first, 3),
            "tokens_per_second": round(len(turn.tokens) / seconds, 1),
            "finish_reason": finish_reason,
        }
        yield turn.pieces[-1]

    def _prompt(self, text):
        """Tokens of the newest turns that fit, and of the question."""
        tokenizer, context = self.engine.tokenizer, self.engine.model.config.sequence_len
        bos = tokenizer.get_bos_token_id()
        if self.plain:
            return [bos, *tokenizer.encode(text)]

        def render(question, system=""):
            messages = [{"role": "system", "content": system}] if system else []
            return tokenizer.render_for_completion({"messages": [*messages, {"role": "user", "content": question}]})[1:]

        prompt, later = render(text, self.system), render(text)
        if len(prompt) + 1 >= context:
            what = "message and system text have" if self.system else "the message has"
            raise UserError(f"{what} {len(prompt):,} tokens; the model's context holds {context:,}: shorten it")
        room = min(self.max_tokens, context // 2)
        for turn in reversed(self.turns):
            later = [*turn.tokens, self.engine.assistant_end, *later]
            longer = render(turn.question, self.system) + later
            if 1 + len(longer) + room > context:
                break
            prompt, later = longer, render(turn.question) + later
        return [bos, *prompt]

    def messages(self):
        """The whole conversation, in the form that the tokenizer and the tasks have it."""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns:
            parts = turn.parts()
            if all(part["type"] == "text" for part in parts):
                parts = "".join(part["text"] for part in parts)
            messages += [{"role": "user", "content": turn.question}, {"role": "assistant", "content": parts}]
        return messages

    def report(self):
        """The last answer as --json prints it."""
        parts, steps = self.turns[-1].parts(), []
        for part in parts:
            if part["type"] == "python":
                steps.append({"type": "calculator", "expression": part["text"], "result": None})
            elif part["type"] == "python_output" and steps:
                steps[-1]["result"] = part["text"]
        text = "".join(part["text"] for part in parts if part["type"] == "text")
        return {"text": text, "tool_steps": steps, **self.turns[-1].usage}


# ---------------------------------------------------------------------------------------------------------------------
# In the terminal


def say(chat, text):
    """Print the answer to `text` as it comes; in a terminal with the calculator's part, as [expression = result]."""
    terminal, shown = sys.stdout.isatty(), "text"
    dim, reset = ("", "") if no_color() else ("\x1b[2m", "\x1b[0m")
    opening = {"text": "", "python": dim + "[", "output": dim + "[= "}
    closing = {"text": "", "python": "]" + reset, "output": "]" + reset}
    try:
        with contextlib.closing(chat.ask(text)) as answer:
            for kind, piece in answer:
                if not terminal:
                    print(piece if kind == "text" else "", end="", flush=True)
                    continue
                if kind != shown and piece:
                    inside = (shown, kind) == ("python", "output")
                    print(" = " if inside else closing[shown] + opening[kind], end="")
                    shown = kind
                print(piece.translate(CONTROLS), end="", flush=True)
    finally:
        print(closing[shown], flush=True)


def tell_speed(usage):
    count, rate, first = usage["completion_tokens"], usage["tokens_per_second"], usage["first_token_seconds"]
    print(f"[{count} tokens, {rate} tokens/s, the first after {first} s]", file=sys.stderr)


def load_history(path):
    """Line editing with the lines of earlier sessions, where Python has readline."""
    with contextlib.suppress(ImportError, OSError):
        import readline

        for line in path.read_text(encoding="utf-8", errors="replace").splitlines()[-1000:]:
            readline.add_history(line)


def remember(path, line):
    """Append to the history at once, for a window that is closed leaves no time; only its owner may read the file."""
    with contextlib.suppress(OSError):
        with open(path, "ab", opener=lambda path, flags: os.open(path, flags, 0o600)) as f:
            f.write(" ".join(line.splitlines()).encode("utf-8", "replace") + b"\n")


def read_line():
    """What the user types. Raises EOFError when they leave: Ctrl-D, or Ctrl-C twice in a row at the empty prompt."""
    leaving = False
    while True:
        try:
            return input("\nYou: ").strip()
        except KeyboardInterrupt:
            readline = sys.modules.get("readline")
            typed = readline and readline.get_line_buffer()  # is dropped, as in a shell
            if leaving and not typed:
                raise EOFError from None
            leaving = not typed
            print("\n(Ctrl-C once more, or Ctrl-D, ends the conversation)" if leaving else "")


def converse(chat, history, verbose=False):
    """Answer questions and obey commands until the user leaves."""
    load_history(history)
    print("/help lists the commands, Ctrl-C stops an answer, Ctrl-D ends the conversation.")
    while True:
        try:
            line = read_line()
            if line:
                remember(history, line)
            if question := obey(chat, line):
                print("\nAssistant: ", end="", flush=True)
                say(chat, question)
                usage = chat.turns[-1].usage
                if usage["finish_reason"] == "length":
                    print(f"(cut off after {usage['completion_tokens']} tokens)")
                if verbose:
                    tell_speed(usage)
        except KeyboardInterrupt:
            print("(stopped)")
        except UserError as e:
            print(e)
        except EOFError:
            print()
            return


def obey(chat, line):
    """The question to ask: the line itself, or what its command makes of it; None when there is none."""
    if line.lower() in ("quit", "exit", "clear"):
        line = "/" + line
    if not line.startswith("/"):
        return line
    if line.startswith("//"):
        return line[1:]
    command, text = [*line.split(maxsplit=1), ""][:2]
    match command.lower():
        case "/quit" | "/exit":
            raise EOFError
        case "/help":
            print(HELP)
        case "/clear":
            chat.begin(chat.system)
            print("A new conversation.")
        case "/regenerate":
            if not chat.turns:
                raise UserError("nothing has been asked yet")
            return chat.turns.pop().question
        case "/system" if text:
            chat.begin("" if text == "-" else text)
            print("A new conversation.")
        case "/system":
            print(chat.system or "There is no system text.")
        case "/temp":
            change(chat.sampling, "temperature", float, text)
        case "/topk":
            change(chat.sampling, "top_k", int, text)
        case "/save":
            save(chat, text)
        case _:
            raise UserError(f"there is no {command}; /help lists the commands, // sends a text that begins with /")
    return None


def change(sampling, name, kind, text):
    """Set sampling[name] to what the user typed, if anything, and tell what it is."""
    from nanochat.engine import Request

    if text:
        try:
            value = kind(text)
        except ValueError:
            raise UserError(f"{name}={text}: expected a number") from None
        Request([0], **sampling | {name: value})  # refuses what makes no sense
        sampling[name] = value
    print(f"{name} = {sampling[name]}")


def save(chat, name):
    """Write the conversation to a file that is not there yet."""
    if not chat.turns:
        raise UserError("there is nothing to save yet")
    path = Path(name or time.strftime("chat-%Y-%m-%d-%H%M%S.json")).expanduser()
    try:
        with open(path, "x", encoding="utf-8") as f:
            f.write(json.dumps({"messages": chat.messages()}, indent=2, ensure_ascii=False) + "\n")
    except OSError as e:
        raise UserError(f"cannot write {path} ({e.strerror}); choose another name") from None
    print(f"Saved as {path}.")


# ---------------------------------------------------------------------------------------------------------------------
# From the command line


def is_piped(stdin):
    """Whether somebody sends something. Programs that start this one may leave a pipe open and write nothing to it."""
    mode = os.fstat(stdin.fileno()).st_mode
    if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
        if select.select([stdin], [], [], PIPE_PATIENCE)[0]:
            return True
        print("nothing comes from standard input: answering without it (-p - waits for it)", file=sys.stderr)
    return stat.S_ISREG(mode)


def read_question(prompt):
    """What is piped in and then `prompt`, a blank line between; None when there is no prompt, but a terminal."""
    stdin = sys.stdin or io.StringIO()  # None when the caller closed it
    if prompt is None and stdin.isatty():
        return None
    texts = []
    with contextlib.suppress(OSError):  # no file at all
        if prompt in (None, "-") or is_piped(stdin):
            texts.append(stdin.read())
    if prompt not in (None, "-"):
        texts.append(prompt)
    question = "\n\n".join(text.strip() for text in texts if text.strip())
    if not question:
        raise UserError("the question is empty; give it with -p, or on standard input")
    return question


def main(argv=None):
    args = parse_args(build_parser(), argv)
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):  # what a terminal cannot show or send is no reason to die
            stream.reconfigure(errors="replace")
    question = read_question(args.prompt)
    if question is None:
        if args.json:
            raise UserError("--json prints a single answer: give the question with -p, or on standard input")
        print(f"Loading the {args.source} model ...", flush=True)

    from nanochat.checkpoint_manager import load_model
    from nanochat.engine import Engine, Request

    sampling = {"temperature": args.temperature, "top_k": args.top_k, "seed": args.seed}
    Request([0], args.max_tokens, **sampling)  # a wrong setting is said at once
    compute = compute_init(args.device_type, args.dtype, args.seed)
    model, tokenizer, meta = load_model(args.source, compute, args.model_tag, args.step, quantize=args.quantize)
    of_turns_before = 2 * model.config.sequence_len
    engine = Engine(model, tokenizer, compute, prefix_tokens=of_turns_before)
    chat = Chat(engine, args.source, args.max_tokens, args.system, **sampling)
    if question is None:
        print(f"{meta['model_tag']}, step {meta['step']}.", end=" ")
        return converse(chat, base_dir() / "chat_history", args.verbose)
    if args.json:
        for _ in chat.ask(question):
            pass
        loaded = {"source": args.source, "tag": meta["model_tag"], "step": meta["step"]}
        print(json.dumps(chat.report() | {"model": loaded}), flush=True)
    else:
        say(chat, question)
    if args.verbose:
        tell_speed(chat.turns[-1].usage)


if __name__ == "__main__":
    run_script(main)
