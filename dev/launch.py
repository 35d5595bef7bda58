"""
torchrun, except that a user's error ends with its one line and exit code 2, and Ctrl-C without a traceback.

    python -m dev.launch --standalone --nproc_per_node=8 -m scripts.base_train -- --depth=20

Takes torchrun's flags. torchrun itself works too; it prints its own report below the line and exits with code 1.
"""

import logging
import sys

from nanochat.cli import run_script


def main():
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    logging.disable(logging.ERROR)  # messages about the processes that torchrun stops; a crash has its own traceback
    try:
        torchrun()
    except ChildFailedError as e:
        _, failure = e.get_first_failure()
        if failure.exitcode not in (2, 130):
            raise
        sys.exit(failure.exitcode)
    except SignalException as e:
        sys.exit(128 + e.sigval)


if __name__ == "__main__":
    run_script(main)
