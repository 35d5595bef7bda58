"""
Talk to a model in the terminal.

    python -m scripts.chat_cli                          # a conversation; quit, exit or Ctrl-D ends it
    python -m scripts.chat_cli -p "Why is the sky blue?"     # one answer on standard output
    echo "Why is the sky blue?" | python -m scripts.chat_cli

Reads the newest checkpoint of a stage. In a terminal the calculator's calls are shown dimmed; elsewhere left out.
"""

import contextlib
import io
import sys

from nanochat.cli import make_parser, parse_args, run
from nanochat.common import UserError, compute_init

DIM, RESET = "\x1b[2m", "\x1b[0m"
# What stands around a part of an answer in a terminal.
AROUND = {"text": ("", ""), "python": (DIM + "[", "]" + RESET), "output": (DIM + " = ", RESET)}
# What a model writes must not steer the terminal: control characters are dropped, but for tab and newline.
CONTROLS = {c: None for c in (*range(32), *range(127, 160)) if c not in (9, 10)}


def build_parser():
    parser = make_parser("scripts.chat_cli", __doc__)
    add = parser.add_argument
    add("-i", "--source", default="sft", choices=["base", "mid", "sft", "rl"], help="stage; base continues plain text")
    add("-g", "--model_tag", help="model to load, e.g. d20 (default: the deepest)")
    add("-s", "--step", type=int, help="step to load (default: the newest)")
    add("-p", "--prompt", help="answer this and exit")
    add("-t", "--temperature", type=float, default=0.6, help="0 = always the likeliest token (default 0.6)")
    add("-k", "--top_k", type=int, default=50, help="sample from the k likeliest tokens, 0 = from all (default 50)")
    add("-m", "--max_tokens", type=int, default=512, help="longest answer, in tokens (default 512)")
    add("--seed", type=int, default=42, help="of the sampling (default 42)")
    add("--device_type", default="", help="cuda, mps or cpu (default: the first one there is)")
    add("-d", "--dtype", default="", help="float32 or bfloat16 (default: what the device multiplies natively)")
    return parser


class Chat:
    """A conversation, kept as the tokens of whole turns; the oldest are dropped where the context is too small."""

    def __init__(self, engine, source, max_tokens, **sampling):
        self.engine, self.plain = engine, source == "base"
        self.max_tokens, self.sampling = max_tokens, sampling
        self.turns, self.asked = [], 0

    def ask(self, text):
        """Yield (kind, piece of text) of the answer. The turn is remembered even if the caller stops halfway."""
        from nanochat.engine import TextStream

        engine, stream, answer = self.engine, TextStream(self.engine.tokenizer), []
        prompt = self._prompt(text.encode("utf-8", "replace").decode("utf-8"))
        seed = self.sampling["seed"] + self.asked  # else the same question would always get the same answer
        self.asked += 1
        try:
            for (token,), _ in engine.generate(prompt, max_tokens=self.max_tokens, **self.sampling | {"seed": seed}):
                if token in engine.terminals:
                    break
                answer.append(token)
                yield stream.push(token)
            yield stream.flush()
        finally:
            if not self.plain:
                self.turns[-1] += [*answer, engine.assistant_end]

    def _prompt(self, text):
        """Tokens of the conversation so far and the question, without the turns that no longer fit."""
        tokenizer, context = self.engine.tokenizer, self.engine.model.config.sequence_len
        bos = tokenizer.get_bos_token_id()
        if self.plain:
            return [bos, *tokenizer.encode(text)]
        question = tokenizer.render_for_completion({"messages": [{"role": "user", "content": text}]})[1:]
        if len(question) + 1 >= context:
            raise UserError(
                f"the message has {len(question):,} tokens; the model's context holds {context:,}: shorten it"
            )
        turns = [*self.turns, question]
        room = min(self.max_tokens, context // 2)
        while len(turns) > 1 and 1 + sum(map(len, turns)) + room > context:
            del turns[0]
        self.turns = turns
        return [bos, *(token for turn in turns for token in turn)]


def say(chat, text):
    """Print the answer to `text` as it comes."""
    terminal, shown = sys.stdout.isatty(), "text"
    try:
        with contextlib.closing(chat.ask(text)) as answer:
            for kind, piece in answer:
                if not terminal:
                    print(piece if kind == "text" else "", end="", flush=True)
                    continue
                if kind != shown and piece:
                    print(AROUND[shown][1] + AROUND[kind][0], end="")
                    shown = kind
                print(piece.translate(CONTROLS), end="", flush=True)
    finally:
        print(AROUND[shown][1] if terminal else "", flush=True)


def converse(chat):
    """Read questions and answer them until the user leaves."""
    with contextlib.suppress(ImportError):  # line editing and history, where Python has it
        import readline  # noqa: F401
    print("quit or Ctrl-D ends the conversation, clear starts a new one, Ctrl-C stops an answer.")
    while True:
        try:
            text = input("\nYou: ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(quit or Ctrl-D ends the conversation)")
            continue
        if text.lower() in ("quit", "exit"):
            return
        if text.lower() == "clear":
            chat.turns = []
            print("A new conversation.")
        elif text:
            print("\nAssistant: ", end="", flush=True)
            try:
                say(chat, text)
            except KeyboardInterrupt:
                print("(stopped)")
            except UserError as e:
                print(e)


def main(argv=None):
    args = parse_args(build_parser(), argv)
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):  # what a terminal cannot show or send is no reason to die
            stream.reconfigure(errors="replace")
    prompt = args.prompt
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read()
        if not prompt.strip():
            return
    if prompt is not None and not prompt.strip():
        raise UserError("-p is empty; give it a question")

    from nanochat.checkpoint_manager import load_model
    from nanochat.engine import Engine, Request

    sampling = {"temperature": args.temperature, "top_k": args.top_k, "seed": args.seed}
    Request([0], args.max_tokens, **sampling)  # a wrong setting is said at once
    compute = compute_init(args.device_type, args.dtype, args.seed)
    model, tokenizer, _ = load_model(args.source, compute, args.model_tag, args.step)
    chat = Chat(Engine(model, tokenizer, compute), args.source, args.max_tokens, **sampling)
    if prompt is not None:
        say(chat, prompt.strip())
    else:
        converse(chat)


if __name__ == "__main__":
    run(main)
