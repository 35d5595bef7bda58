"""
Flags and exits that all scripts share: --a-b and --a_b are the same flag, a user's mistake is one line, exit code 2.

    def build_parser(): ...; def main(argv=None): args = parse_args(build_parser(), argv); ...
    if __name__ == "__main__":
        run_script(main)
"""

import argparse
import os
import re
import sys

from nanochat.common import UserError, compute_cleanup, is_rank0


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        """One line, and where to read more, instead of argparse's page of usage."""
        if is_rank0():
            print(f"error: {message}; see python -m {self.prog} --help", file=sys.stderr)
        sys.exit(2)


def make_parser(module, doc):
    """A parser for the script `module` ("scripts.base_train") whose --help opens with the script's own docstring."""
    return _Parser(
        prog=module,
        description=doc.strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_model_flags(parser, source=None):
    """--source, with `source` as the default stage (None = required), and the flags of add_checkpoint_flags()."""
    text = "stage of the model" + (f" (default {source})" if source else "")
    stages = ["base", "mid", "sft", "rl"]
    parser.add_argument("-i", "--source", choices=stages, default=source, required=not source, help=text)
    add_checkpoint_flags(parser)


def add_checkpoint_flags(parser, dtype="what the device multiplies natively"):
    """Flags that choose a stage's checkpoint, the device and the precision; `dtype` describes the default precision."""
    add = parser.add_argument
    add("-g", "--model_tag", help="model to load, e.g. d20 (default: the deepest)")
    add("-s", "--step", "--model_step", type=int, help="step to load (default: the newest)")
    add("--device_type", default="", help="cuda, mps or cpu (default: the first available)")
    add("-d", "--dtype", default="", help=f"float32 or bfloat16 (default: {dtype})")
    add("--quantize", choices=["int8"], help="on a CPU, round weights to int8: decoding takes half of bfloat16's time")


def boolean(text):
    """argparse type for `--x`, `--x=1`, `--x=0`; use with add_argument(type=boolean, nargs="?", const=True)."""
    values = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is not 0 or 1")
    return values[text.lower()]


def parse_args(parser, argv=None):
    """Parse; only a flag's name is touched (dashes become underscores), never its value."""
    argv = sys.argv[1:] if argv is None else argv
    name = re.compile(r"(?<=^--)\w[\w-]*")
    return parser.parse_args([name.sub(lambda m: m[0].replace("-", "_"), a) for a in argv])


def run_script(main):
    """Run a script's main(): 0 when it ends, 2 and one line for a user's mistake, 130 for Ctrl-C."""
    try:
        main()
        compute_cleanup()
    except SystemExit as e:  # --help, a wrong flag, or a run that was asked to stop
        _exit(e.code or 0)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.stderr.flush()
        _exit(2)
    except BrokenPipeError:  # `... | head` closed our output
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _exit(1)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        _exit(130)


def _exit(code):
    """End now: a rank that failed must not wait in a collective, nor a thread of the loader keep the process alive."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
