"""The command line as a process: the console script, and ``python -m qvera``, also for torchrun and deepspeed."""

import atexit
import contextlib
import logging
import os
import sys


def run() -> int:
    """Run one command, and end without taking apart each module that was imported.

    With torch and transformers that takes Python 2 s of the CPU. Threads are still joined, and what libraries have
    registered for the end is still done.
    """
    code = 1  # of an error that no command reports

    def leave() -> None:
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or None
                stream.flush()
        os._exit(code)

    # Before the command imports anything, since functions for the end are called in reverse order.
    atexit.register(leave)

    from qvera.cli.main import main

    code = main()
    return code


if __name__ == "__main__":
    sys.exit(run())
