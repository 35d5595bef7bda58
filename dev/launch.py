"""
torchrun, except that the last thing printed is the failed rank's error; a user's error is one line and exit code 2.

    python -m dev.launch --standalone --nproc_per_node=8 -m scripts.base_train -- --depth=20

Takes torchrun's flags. torchrun itself works too; it prints its own report below the error and exits with code 1.
"""

import logging
import signal
import sys

from nanochat.cli import run_script
from nanochat.common import print_error


def main():
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    logging.disable(logging.ERROR)  # messages about the processes that torchrun stops; a crash has its own traceback
    try:
        torchrun()
    except ChildFailedError as e:
        rank, failure = e.get_first_failure()
        if failure.exitcode >= 0:  # it has said why
            sys.exit(failure.exitcode)
        hint = "; the machine may be out of memory" if failure.exitcode == -signal.SIGKILL else ""
        print_error(f"rank {rank} was ended by {signal.Signals(-failure.exitcode).name}{hint}")
        sys.exit(128 - failure.exitcode)
    except SignalException as e:
        sys.exit(128 + e.sigval)


if __name__ == "__main__":
    run_script(main)
