"""
Serve a model: OpenAI's API, and a page to chat with it.

    python -m scripts.chat_web                                          # then open http://localhost:8000
    python -m scripts.chat_web -n 8 --host=0.0.0.0 --api_key=SECRET     # one model per GPU, open to other machines

Loads the newest sft checkpoint, or else of rl, mid or base. On Ctrl-C or SIGTERM, running answers have
--shutdown_timeout seconds to finish.
"""

import re

from nanochat.cli import add_model_flags, choose_source, listen, make_parser, parse_args, run_script, server_url
from nanochat.common import require, server_api_key

# Smallest and largest value of each numeric flag.
LIMITS = dict(num_gpus=(1, 1024), num_workers=(1, 1024), max_rows=(1, 4096), max_queue=(0, 10**6), top_k=(0, 10**6))
LIMITS |= dict(temperature=(0, 2), max_tokens=(1, 10**6), prefix_tokens=(0, 10**9))
LIMITS |= dict(request_timeout=(0.1, 10**6), shutdown_timeout=(0, 10**6))


def build_parser():
    parser = make_parser("scripts.chat_web", __doc__)
    add_model_flags(parser, source="")
    add = parser.add_argument
    add("-n", "--num_gpus", type=int, default=1, help="GPUs to use, with one model on each (default 1)")
    add("--num_workers", type=int, help="models to load, each in its own process (default: --num_gpus)")
    add("-t", "--temperature", type=float, default=0.8, help="for requests that do not set it (default 0.8)")
    add("-k", "--top_k", type=int, default=50, help="for requests that do not set it (default 50)")
    add("-m", "--max_tokens", type=int, default=512, help="for requests that do not set it (default 512)")
    add("--overflow", choices=["error", "truncate"], default="error", help="reject long conversations or cut old turns")
    add("-p", "--port", type=int, default=8000, help="0 = any free port (default 8000)")
    add("--host", default="127.0.0.1", help="0.0.0.0 = reachable from other machines; set --api_key too")
    add("--api_key", default=server_api_key(), help="key that clients must send (default: NANOCHAT_API_KEY, or none)")
    add("--cors", nargs="*", help="origins of websites that may call the server (default: those on this machine)")
    add("--max_rows", type=int, default=32, help="answers in a batch, per model (default 32)")
    add("--max_queue", type=int, default=64, help="answers that may wait, per model; more get status 429 (default 64)")
    add("--prefix_tokens", type=int, default=8192, help="size of the prefix cache, per model (default 8192; 0 = off)")
    add("--request_timeout", type=float, default=600, help="seconds until an unfinished answer fails (default 600)")
    add("--shutdown_timeout", type=int, default=3, help="seconds that answers have to finish at the end (default 3)")
    return parser


def main(argv=None):
    args = parse_args(build_parser(), argv)
    for flag, (low, high) in LIMITS.items():
        value = getattr(args, flag)
        require(value is None or low <= value <= high, f"--{flag}={value}: give {low} to {high:,}")  # nan fails too
    can_be_sent = args.api_key is None or re.fullmatch("[!-~]+", args.api_key)  # other keys fit into no HTTP header
    require(can_be_sent, "--api_key (or NANOCHAT_API_KEY): expected ASCII characters without spaces, at least one")
    for origin in args.cors or []:
        form = "expected * or an origin such as https://example.com, without a path"
        require(re.fullmatch(r"\*|null|[\w-]+://[^/]+", origin), f"--cors={origin}: {form}")
    args.num_workers = args.num_workers or args.num_gpus
    choose_source(args, ("sft", "rl", "mid", "base"))

    import uvicorn

    from nanochat.serve.app import create_app

    app, sock = create_app(args), listen(args.host, args.port)
    print(f"open {server_url(sock)} (API: {server_url(sock)}/v1); the model is loading", flush=True)
    if sock.getsockname()[0] not in ("127.0.0.1", "::1") and not args.api_key:
        print("warning: other machines can reach this server, and it needs no --api_key", flush=True)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=args.shutdown_timeout, ws="none")
    server = uvicorn.Server(config)
    app.state.stop = lambda: setattr(server, "should_exit", True)
    server.run(sockets=[sock])
    worker = app.state.service.workers[0]
    require(worker.model or not worker.error, worker.error)  # loading failed


if __name__ == "__main__":
    run_script(main)
