"""
Command lines: flags shared by several scripts, --a-b as a spelling of --a_b, one-line errors with exit code 2.

    def build_parser(): ...; def main(argv=None): args = parse_args(build_parser(), argv); ...
    if __name__ == "__main__":
        run_script(main)
"""

import argparse
import contextlib
import errno
import functools
import io
import os
import re
import socket
import sys
import traceback

from nanochat import cluster, common
from nanochat.recipe import RECIPES


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        """Print a one-line error that points to --help, instead of argparse's usage text, and exit with code 2."""
        common.print_error(f"{message}; see python -m {self.prog} --help")
        sys.exit(2)


def make_parser(module, doc):
    """Parser for the script `module` ("scripts.base_train"). Its --help begins with `doc`, the script's docstring."""
    layout = argparse.RawDescriptionHelpFormatter
    return _Parser(prog=module, description=doc.strip(), formatter_class=layout, allow_abbrev=False)


def add_machine_flags(parser, dtype="bfloat16 where the hardware has it"):
    """Flags --device_type and --dtype. `dtype`: its default, in words."""
    parser.add_argument("--device_type", default="", help="cuda, mps or cpu (default: the first that is available)")
    parser.add_argument("-d", "--dtype", default="", help=f"float32 or bfloat16 (default: {dtype})")


def add_model_flags(parser, source=None):
    """Flag --source and those of add_checkpoint_flags(). Default `source`: None = required, "" = choose_source()."""
    default = {None: "", "": " (default: sft, else rl, else mid)"}.get(source, f" (default {source})")
    text, stages = f"stage of the model{default}", list(common.FOLDERS)
    parser.add_argument("-i", "--source", choices=stages, default=source, required=source is None, help=text)
    add_checkpoint_flags(parser)


def choose_source(args, stages):
    """Set an empty args.source to the first of `stages` with checkpoints (of --model_tag), and print it if not sft."""
    if not args.source:
        steps = f"{args.model_tag or '*'}/step_*/meta.json"
        found = (stage for stage in stages if any((common.base_dir() / common.FOLDERS[stage]).glob(steps)))
        args.source = next(found, stages[0])
        if args.source != "sft":
            common.print0(f"there is no sft model: using the {args.source} model (-i {args.source})", file=sys.stderr)


def add_checkpoint_flags(parser, **default):
    """Flags for checkpoint, device and precision. `default`: see add_machine_flags()."""
    add = parser.add_argument
    add("-g", "--model_tag", help="model to load, e.g. d20 (default: the deepest)")
    add("-s", "--step", "--model_step", type=int, help="step to load (default: the newest)")
    add_machine_flags(parser, **default)
    add("--quantize", choices=["int8"], help="int8 weights (CPU only): decoding is almost twice as fast as in bfloat16")


def add_run_flags(parser, device_batch_size, save_every=-1, recipe="reference"):
    """Flags that all training stages share, with the defaults of one stage."""
    add = parser.add_argument
    add("--run", type=wandb_run, default="dummy", help='wandb run name; "dummy" = no wandb')
    add_machine_flags(parser)
    add("--device_batch_size", type=int, default=device_batch_size, help="rows per forward pass; no effect on results")
    add("--compile", **FLAG | {"default": None}, help="torch.compile; default: in all but short runs")
    add("--recipe", choices=list(RECIPES), default=recipe, help="values of omitted flags, see nanochat/recipe.py")
    add("--embedding_lr", type=non_negative, help="learning rate of the embedding (AdamW)")
    add("--unembedding_lr", type=non_negative, help="learning rate of the output head (AdamW)")
    add("--matrix_lr", type=non_negative, help="learning rate of the blocks' matrices (Muon)")
    add("--muon_beta2", type=decay_rate, help="decay rate of NorMuon's second moment; 0 = plain Muon")
    add("--weight_decay", type=non_negative, help="weight decay of embedding and head (AdamW)")
    add("--seed", type=int, default=42, help="random seed of weights, data order and sampling")
    add("--dist_timeout", type=positive, default=10.0, help="minutes until a silent or hanging rank ends all ranks")
    add("--resume", **FLAG, help="continue from the newest intact checkpoint")
    add("--resume_from_step", type=int, default=-1, help="continue from the checkpoint of this step; -1 = off")
    add("--resume_unverified", **FLAG, help="resume a checkpoint that does not record its tokenizer and data")
    add("--plan", **FLAG, help="measure the first steps, print what the whole run needs, save nothing")
    add("--plan_for", default="", metavar="DEVICES", help="print what it needs on other devices, such as 8xH100")
    add("--save_every", type=int, default=save_every, help="steps between checkpoints; -1 = only at the end")
    add("--keep", type=int, default=0, help="number of newest checkpoints to keep; 0 = all")


def add_source_flags(parser, checkpoint):
    """Flags of mid_train and chat_sft: `checkpoint` (in words) to start from, task mixture, own conversations."""
    add, corpora = parser.add_argument, ("", "public", "pocket")
    add("--model_tag", help=f"folder name of {checkpoint} (default: the deepest)")
    add("--step", type=int, help=f"step of {checkpoint} (default: the newest)")
    add("--corpus", "--data", default="", choices=corpora, help="task mixture; empty = the checkpoint's corpus")
    own = "your conversations, see tasks/customjson.py; :3 = three times per epoch; may be repeated"
    add("--conversations", action="append", metavar="FILE[:WEIGHT]", help=own)
    add("--bpe_dropout", type=share, default=0.0, help="share of merges left out in the users' messages")
    add("--conversations_only", **FLAG, help="train on --conversations alone, without the mixture")


def listen(host, port):
    """A listening socket. Raises UserError if the port is taken, or `host` is not an address of this machine."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # asyncio sets TCP_NODELAY only then
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen()
    except (OSError, OverflowError) as e:
        raise common.UserError(f"cannot listen at {host}:{port} ({e}); set another --host or --port") from e
    return sock


def server_url(sock):
    """The address of a listening socket, for a browser on this machine."""
    host, port = sock.getsockname()[:2]
    return f"http://{'localhost' if host in ('127.0.0.1', '0.0.0.0', '::1', '::') else host}:{port}"


def wandb_run(name):
    """argparse type of --run. Unless the name is "dummy", rank 0 logs in to wandb, so before any work."""
    if name == "dummy" or not common.is_rank0():
        return name
    try:
        from unittest import mock

        import wandb

        with mock.patch("sys.stdin", io.StringIO()):  # so that wandb does not ask
            wandb.login(verify=True)
    except Exception as e:  # not installed, no login, no connection
        problem = (str(e) or repr(e)).split("\n")[0].rstrip(".")
        raise argparse.ArgumentTypeError(f"{name}: {problem}; or set WANDB_MODE=offline, or leave --run out") from None
    return name


def non_negative(text, lowest=0, highest=sys.float_info.max, expected="at least 0"):
    """argparse type of numbers from `lowest` to `highest`; an error names the number and what is `expected`."""
    with contextlib.suppress(ValueError):
        if lowest <= float(text) <= highest:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text}: expected {expected}")


# More argparse types
share = functools.partial(non_negative, highest=1, expected="a share, 0 to 1")
decay_rate = functools.partial(non_negative, highest=1 - 1e-6, expected="at least 0 and below 1")
path = os.path.expanduser  # a file or folder: the shell leaves "~" as it is in --flag=~/x
positive = functools.partial(non_negative, lowest=1e-9, expected="more than 0")


def boolean(text):
    """argparse type for `--x`, `--x=1`, `--x=0`; use with add_argument(**FLAG)."""
    values = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is not 0 or 1")
    return values[text.lower()]


FLAG = dict(type=boolean, nargs="?", const=True, default=False)


def parse_args(parser, argv=None):
    """
    Parsed flags. Dashes in the names of flags become underscores; values are unchanged.

    Flags without a default take the value of the recipe, if it has one.
    """
    argv = sys.argv[1:] if argv is None else argv
    argv = argv[argv[:1] == ["--"] :]  # torchrun's separator, which some versions of Python leave in place
    args = parser.parse_args([re.sub(r"(?<=^--)\w[\w-]*", lambda m: m[0].replace("-", "_"), a) for a in argv])
    for flag, value in RECIPES.get(getattr(args, "recipe", None), {}).items():
        if getattr(args, flag, value) is None:
            setattr(args, flag, value)
    return args


def run_script(main):
    """Run main(). Exit code: 0 = success, 2 = an error of the user (prints one line), 130 = Ctrl-C."""
    common.set_library_defaults()
    _prepare_streams()
    try:
        main()
        cluster.compute_cleanup()
        sys.stdout.flush()
    except SystemExit as e:  # --help, a wrong flag, or a run stopped by a signal
        _exit(e.code or 0)
    except BrokenPipeError:  # `... | head` closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _exit(1)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        _exit(130)
    except Exception as e:
        message = cluster.explain(e) or user_message(e)
        cluster.announce(message or f"{type(e).__name__}: {e}")
        if message:
            _exit(2, message)
        common.record_error(str(e), traceback.format_exc())
        raise


def user_message(error):
    """One line about an error that the user can remedy, None for other errors."""
    if isinstance(error, common.UserError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        return f"the Python package {error.name} is not installed here; {common.ENVIRONMENT_HINT}"
    if isinstance(error, OSError) and (error.filename or error.errno == errno.ENOSPC):
        return f"{error.filename or 'cannot write the output'}: {error.strerror}"
    if isinstance(error, MemoryError) or re.search("out of memory|can't allocate memory", str(error)):
        return "out of memory; lower --device_batch_size, which does not change the result, or use a smaller model"
    return None


def _prepare_streams():
    """Characters that an output's encoding lacks become "?"; streams that the parent closed become os.devnull."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _exit(code, error=None):
    """Print `error` and exit, without cleanup: a failed rank must not wait in a collective or for its loader thread."""
    with contextlib.suppress(OSError):  # the disk is full
        sys.stdout.flush()
    if error:
        common.print_error(error)
    sys.stderr.flush()
    os._exit(code)
