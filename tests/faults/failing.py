"""An entry point that fails in a chosen way on rank 1, under the product's own guard.

launch/local.sh 2 python tests/faults/failing.py MODE
"""

import os
import signal
import sys
import time

from resnet_cpu.cluster import control, guard
from resnet_cpu.errors import CheckpointError, DataError

FOREVER_S = 600  # longer than any test waits


def main(argv):
    mode = argv[0]
    world = control.connect(2)
    if mode == "collective":
        world.on_rank0(lambda: (_ for _ in ()).throw(CheckpointError("everyone knows")))
    if mode == "apart":
        guard._TOGETHER_S = 1.0
        if world.rank == 1:
            raise DataError("rank 1 takes it for an error of all", collective=True)
        world.barrier()
    if world.rank == 1:
        if mode == "exception":
            raise RuntimeError("the first to fail")
        if mode == "data":
            raise DataError("shard 7: record 3: broken\nsecond line")
        if mode == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if mode == "exit":
            sys.exit(5)
        if mode == "full":
            raise OSError(28, "No space left on device", "a file")
    if mode == "watchdog":
        with guard.Watchdog(1.0) as watchdog:
            watchdog.beat()
            if world.rank == 1:
                os.kill(os.getpid(), signal.SIGSTOP)
            world.barrier()
    if mode == "fine":
        world.barrier()
        return
    time.sleep(FOREVER_S)


if __name__ == "__main__":
    guard.run(main)
