"""
Serve a model: OpenAI's API, and a page to talk to it.

    python -m scripts.chat_web                          # then open http://localhost:8000
    python -m scripts.chat_web -n 8 --host=0.0.0.0 --api_key=SECRET     # one model per GPU, for others too

Reads the newest checkpoint of a stage. Ctrl-C or SIGTERM lets answers finish for --shutdown_timeout seconds.
"""

import socket
from dataclasses import fields

from nanochat.cli import add_model_flags, make_parser, parse_args, run_script
from nanochat.common import UserError, server_api_key

BOUNDS = {
    **{"num_gpus": (1, 1024), "num_workers": (1, 1024), "max_rows": (1, 4096), "max_queue": (0, 1_000_000)},
    **{"temperature": (0, 2), "top_k": (0, 1_000_000), "max_tokens": (1, 1_000_000), "prefix_tokens": (0, 10**9)},
    **{"request_timeout": (0.1, 10**6), "shutdown_timeout": (0, 10**6)},
}


def build_parser():
    parser = make_parser("scripts.chat_web", __doc__)
    add_model_flags(parser, source="sft")
    add = parser.add_argument
    add("-n", "--num_gpus", type=int, default=1, help="GPUs to use, a model on each (default 1)")
    add("--num_workers", type=int, help="models to load where there is no GPU (default 1)")
    add("-t", "--temperature", type=float, default=0.8, help="of requests that do not say (default 0.8)")
    add("-k", "--top_k", type=int, default=50, help="of requests that do not say (default 50)")
    add("-m", "--max_tokens", type=int, default=512, help="longest answer of requests that do not say (default 512)")
    add("--overflow", choices=["error", "truncate"], default="error", help="conversations too long: oldest turns go?")
    add("-p", "--port", type=int, default=8000)
    add("--host", default="127.0.0.1", help="0.0.0.0 = reachable by others; give them an --api_key then")
    add("--api_key", default=server_api_key(), help="wanted of every client (or NANOCHAT_API_KEY)")
    add("--cors", nargs="*", help="other sites whose pages may use this server (default: those of this machine)")
    add("--max_rows", type=int, default=32, help="answers in a batch, per model (default 32)")
    add("--max_queue", type=int, default=64, help="answers that may wait, per model; more get 429 (default 64)")
    add("--prefix_tokens", type=int, default=8192, help="tokens kept of conversations for their next turns, per model")
    add("--request_timeout", type=float, default=600, help="seconds an answer may take (default 600)")
    add("--shutdown_timeout", type=int, default=3, help="seconds that answers have to finish at the end (default 3)")
    return parser


def listen(host, port):
    """A bound socket. Raises UserError when the port is taken, or the host is not this machine's."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # asyncio sets TCP_NODELAY only then
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
    except (OSError, OverflowError) as e:
        raise UserError(f"cannot listen at {host}:{port} ({e}); give another --host or --port") from e
    return sock


def main(argv=None):
    args = parse_args(build_parser(), argv)
    for flag, (least, most) in BOUNDS.items():
        value = getattr(args, flag)
        if value is not None and not least <= value <= most:  # nan is outside, too
            raise UserError(f"--{flag}={value}: give {least} to {most:,}")
    args.num_workers = args.num_workers or args.num_gpus

    import uvicorn

    from nanochat.serve.app import create_app
    from nanochat.serve.worker import ServeOptions

    app = create_app(ServeOptions(**{field.name: getattr(args, field.name) for field in fields(ServeOptions)}))
    sock = listen(args.host, args.port)
    host, port = sock.getsockname()[:2]
    shown = "localhost" if host in ("127.0.0.1", "0.0.0.0", "::1", "::") else host
    print(f"open http://{shown}:{port} (API: http://{shown}:{port}/v1); the model is loading", flush=True)
    if host not in ("127.0.0.1", "::1") and not args.api_key:
        print("warning: others can reach this server, and it asks for no --api_key", flush=True)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=args.shutdown_timeout, ws="none")
    server = uvicorn.Server(config)
    app.state.stop = lambda: setattr(server, "should_exit", True)
    server.run(sockets=[sock])
    worker = app.state.service.workers[0]
    if worker.error and not worker.model:
        raise UserError(worker.error)


if __name__ == "__main__":
    run_script(main)
