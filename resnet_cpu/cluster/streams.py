"""Replace standard streams that are closed, as by `>&-` or by some services that start jobs.

Otherwise `print` fails, and the next file that is opened becomes standard output: what TensorFlow or MPI print would be
written into a shard or a checkpoint.
"""

import os
import sys

_STREAMS = ("stdin", "stdout", "stderr")  # by their numbers


def open_closed() -> None:
    """Open each closed standard stream of this process, and of the programs that it becomes or starts, on /dev/null."""
    closed = [(number, name) for number, name in enumerate(_STREAMS) if getattr(sys, name) is None]
    for number, _ in closed:
        try:
            os.fstat(number)  # a file that was opened since may have taken the number
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            os.dup2(opened, number)
            os.set_inheritable(number, True)
            if opened != number:
                os.close(opened)
    for number, name in closed:
        setattr(sys, name, open(os.devnull, "w" if number else "r"))  # noqa: SIM115
