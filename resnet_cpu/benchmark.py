"""Times training, reading, the forward pass or messages: `python -m resnet_cpu.benchmark --flagfile=F`."""

import sys
from typing import List, Union

from resnet_cpu import flags
from resnet_cpu.cluster import guard
from resnet_cpu.cluster import placement as layout


def main(argv: List[str]) -> None:
    """Time the chosen part; the last line on standard output is `total images/sec: X`, over all ranks.

    Of allreduce it is what the messages alone would allow (`messages.Timed.images_per_second`).
    """
    values, _ = flags.parse_values(argv, "benchmark")
    settings = flags.make_settings(values)
    world = guard.connect(settings.system.ranks, settings.system.stall_timeout)
    layout.apply(settings.system.threads, world.cores)
    from resnet_cpu.training import opening as job

    data = job.open_data(settings, world) if values.benchmark == "pipeline" else None
    from resnet_cpu.bench import messages
    from resnet_cpu.bench import steps as timing

    timed: Union[messages.Timed, timing.Timed]
    steps = values.warmup_steps, values.timed_steps
    if values.benchmark == "allreduce":
        sent = messages.run(settings, world, values.most_bytes, values.timed_seconds or 10.0, *steps)
        folder = settings.run.run_dir
        if folder is not None:
            told = world.on_rank0(lambda: sent.write(folder))
            if world.rank == 0:
                print(told, file=sys.stderr)
        timed = sent
    else:
        timed = timing.run(settings, world, data, values.benchmark, *steps, values.timed_seconds)
    if world.rank == 0:
        print("\n".join(timed.lines()), file=sys.stderr)
        print(f"total images/sec: {timed.images_per_second:.3f}", flush=True)


if __name__ == "__main__":
    guard.run(main)
