"""
Fuzz the calculator and the rendering of chats with hostile text: no input may execute code or take long.

    python -m dev.bench.fuzz_text --seconds=60

Expressions are built from fragments of Python, of calculator syntax and of known attacks; conversations from the same
fragments plus special tokens. Python's audit hooks report any compile, exec, import, open or process start. Prints the
slowest input of each kind, in ms of CPU time. The exit code is 1 if anything was executed, or if an expression, or a
conversation of up to 8,192 characters, took more than 10 ms.

Needs a tokenizer in $NANOCHAT_BASE_DIR.
"""

import sys
import time
from random import Random

from nanochat.calculator import calculate
from nanochat.cli import make_parser, parse_args, run_script
from nanochat.common import UserError
from nanochat.tokenizer import SPECIAL_TOKENS, get_tokenizer

PIECES = """0 1 7 12 1,234 999,999,999 0.1 .5 5. 1e9 0x1 1_0 1j ٣ １ + - * / ** // % ( ) (( )) [ ] { } , ; : = == !=
< > ~ @ & | 'a' "b" 'strawberry' .count( 'r' ) .upper() .format .join __import__('os') .system eval( exec( open( lambda:
__class__ True None a b for in if else \\ \\x61 \\n ' "
''' # ` $ é ß 漢 🐌 \u202e \ufeff <|python_start|> <|bos|>""".split()
# Prefixes of the names of audit events.
WATCHED = ("exec", "compile", "import", "open", "os.system", "subprocess.Popen", "os.exec", "socket.connect", "ctypes")
MAX_MS = 10  # CPU time per input
MAX_CHARS = 8192  # of a conversation


def expression(rng):
    """A random text for the calculator."""
    kind = rng.randrange(4)
    if kind == 0:
        return "".join(rng.choices(PIECES, k=rng.randint(1, 80)))
    if kind == 1:  # long, deeply nested or both
        piece, n = rng.choice(PIECES), rng.randint(1, 400)
        return piece * n + rng.choice(["1", ""]) + ")" * rng.choice([0, n])
    if kind == 2:
        return "".join(map(chr, rng.choices(range(0x20, 0x3000), k=rng.randint(0, 300))))
    text = rng.choice("+-*/").join(str(rng.randint(0, 10 ** rng.randint(1, 60))) for _ in range(rng.randint(1, 40)))
    at = rng.randint(0, len(text))
    return text[:at] + rng.choice(PIECES) + text[at:]


def conversation(rng):
    """A random conversation of at most MAX_CHARS characters, some with invalid roles."""
    pieces, messages, room = [*PIECES, *SPECIAL_TOKENS, " ", "\n", "the "], [], MAX_CHARS
    if rng.random() < 0.3:
        messages.append({"role": "system", "content": "".join(rng.choices(pieces, k=rng.randint(0, 300)))})
    for i in range(rng.randint(1, 40)):
        role = ("user", "assistant")[i % 2] if rng.random() < 0.98 else rng.choice(["tool", "", None, 7])
        text = "".join(rng.choices(pieces, k=rng.randint(0, 200))) * rng.choice([1, 1, 1, 9])
        messages.append({"role": role, "content": text[:room]})
        room -= len(text[:room])
    return {"messages": messages}


def main(argv=None):
    parser = make_parser("dev.bench.fuzz_text", __doc__)
    parser.add_argument("--seconds", type=float, default=60, help="total duration (default 60)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default 0)")
    args = parse_args(parser, argv)
    tokenizer, rng = get_tokenizer(), Random(args.seed)
    executed, slowest, watching = [], {}, False

    def audit(event, details):
        if watching and event.startswith(WATCHED):
            executed.append(f"{event} {details}"[:200])

    sys.addaudithook(audit)

    def render(messages):
        try:
            tokenizer.render_for_completion(messages, 512)
        except UserError:
            pass

    start, n = time.monotonic(), 0
    while time.monotonic() - start < args.seconds:
        for kind, text, function in (("expression", expression(rng), calculate), ("chat", conversation(rng), render)):
            watching, before = True, time.process_time()
            function(text)
            ms, watching = 1000 * (time.process_time() - before), False
            slowest[kind] = max(slowest.get(kind, (0, "")), (ms, repr(text)[:300]))
        n += 1
    print(f"{n:,} inputs of each kind")
    for kind, (ms, text) in slowest.items():
        print(f"slowest {kind}: {ms:.2f} ms, {text}")
    print(f"executed: {executed or 'nothing'}")
    if executed or any(ms > MAX_MS for ms, _ in slowest.values()):
        sys.exit(1)


if __name__ == "__main__":
    run_script(main)
