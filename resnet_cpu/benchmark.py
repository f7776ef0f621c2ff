"""Times training, reading or the forward pass: `python -m resnet_cpu.benchmark --flagfile=F`."""

import sys
from typing import List

from resnet_cpu import flags
from resnet_cpu.cluster import control, guard, layout


def main(argv: List[str]) -> None:
    """Time the chosen part; the last line on standard output is `total images/sec: X`, over all ranks."""
    values, _ = flags.parse_values(argv, "benchmark")
    settings = flags.make_settings(values)
    world = control.connect(settings.system.ranks)
    layout.apply(settings.system.threads, world.cores)
    from resnet_cpu.training import job

    data = job.open_data(settings, world) if values.benchmark == "pipeline" else None
    from resnet_cpu.training import timing

    timed = timing.run(settings, world, data, values.benchmark, values.warmup_steps, values.timed_steps)
    if world.rank == 0:
        print("\n".join(timed.lines()), file=sys.stderr)
        print(f"total images/sec: {timed.images_per_second:.3f}", flush=True)


if __name__ == "__main__":
    guard.run(main)
