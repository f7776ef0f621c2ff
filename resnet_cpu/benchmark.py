"""Times training, reading, the forward pass or messages: `python -m resnet_cpu.benchmark --flagfile=F`."""

import sys
from typing import List, Union

from resnet_cpu import commandline
from resnet_cpu.cluster import guard, placement
from resnet_cpu.training import agreement


def main(argv: List[str]) -> None:
    """Time the chosen part; the last line on standard output is `total images/sec: X`, over all ranks.

    For allreduce it is the bound that messages alone set (`messages.MessageTimings.images_per_second`).
    """
    settings = commandline.parse(argv, "benchmark")
    world = guard.connect(settings.system.ranks, settings.system.stall_timeout)
    placement.apply(settings.system.threads, world.cores)
    agreement.check_same_everywhere(settings, world)
    from resnet_cpu.bench import messages, steps  # TensorFlow reads the threads from its environment once

    timings: Union[messages.MessageTimings, steps.StepTimings]
    timings = (messages if settings.benchmark.benchmark == "allreduce" else steps).run(settings, world)
    if world.rank == 0:
        print("\n".join(timings.lines()), file=sys.stderr)
        print(f"total images/sec: {timings.images_per_second:.3f}", flush=True)


if __name__ == "__main__":
    guard.run(main, reader_may_leave=True)
