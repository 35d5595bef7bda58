"""
Chat with a model in the terminal.

    python -m scripts.chat_cli                            # a conversation; /help lists its commands
    python -m scripts.chat_cli -p "Why is the sky blue?"  # one answer on standard output, messages on standard error
    cat poem.txt | python -m scripts.chat_cli -p "Explain this poem."   # the piped text comes before the question
    python -m scripts.chat_cli -p - --json < question.txt               # the answer with token counts, as JSON

Loads the newest sft checkpoint, or else of rl, mid or base. In a terminal, calculator calls are shown, dimmed unless
NO_COLOR is set; pipes and files get only the text. Exit codes: 1 = failure, 2 = user error, 130 = Ctrl-C.
"""

import json

from nanochat.cli import add_model_flags, choose_source, make_parser, parse_args, run_script
from nanochat.cluster import compute_init
from nanochat.common import base_dir, require
from nanochat.terminal.console import print_answer, print_speed, read_question


def build_parser():
    parser = make_parser("scripts.chat_cli", __doc__)
    add_model_flags(parser, source="")
    add = parser.add_argument
    add("-p", "--prompt", help="answer this question and exit; - reads standard input")
    add("--system", default="", help="system text, prepended to the first question")
    add("-t", "--temperature", type=float, default=0.6, help="sampling temperature; 0 = greedy (default 0.6)")
    add("-k", "--top_k", type=int, default=50, help="sample from the k likeliest tokens, 0 = from all (default 50)")
    add("-m", "--max_tokens", type=int, default=512, help="maximum length of an answer, in tokens (default 512)")
    add("--seed", type=int, default=42, help="sampling seed; the same seed repeats a whole session (default 42)")
    add("--json", action="store_true", help="print one JSON object: text, tool_steps, counts, timing, finish_reason")
    add("-v", "--verbose", action="store_true", help="print the speed of each answer on standard error")
    return parser


def main(argv=None):
    args = parse_args(build_parser(), argv)
    choose_source(args, ("sft", "rl", "mid", "base"))
    question = read_question(args.prompt)
    if question is None:
        require(not args.json, "--json prints a single answer: give the question with -p, or on standard input")
        print(f"Loading the {args.source} model ...", flush=True)

    from nanochat.checkpoint_manager import load_model
    from nanochat.engine import Engine, Request
    from nanochat.terminal import repl, session

    sampling = {"temperature": args.temperature, "top_k": args.top_k, "seed": args.seed}
    Request([0], args.max_tokens, **sampling)  # checks the settings before the model is loaded
    compute = compute_init(args.device_type, args.dtype, args.seed)
    model, tokenizer, meta = load_model(args.source, compute, "eval", args.model_tag, args.step, quantize=args.quantize)
    # With earlier turns in the prefix cache, only a prompt's new tokens are prefilled.
    engine = Engine(model, tokenizer, compute, prefix_tokens=2 * model.config.sequence_len)
    chat = session.Chat(engine, meta.get("stage", args.source), args.max_tokens, args.system, **sampling)
    if question is None:
        print(f"{meta['model_tag']}, step {meta['step']}.", end=" ")
        return repl.run_repl(chat, base_dir() / "chat_history", args.verbose)
    if args.json:
        list(chat.ask(question))
        loaded = {"source": args.source, "tag": meta["model_tag"], "step": meta["step"]}
        print(json.dumps(chat.report() | {"model": loaded}), flush=True)
    else:
        print_answer(chat, question)
    if args.verbose:
        print_speed(chat.usage)


if __name__ == "__main__":
    run_script(main)
