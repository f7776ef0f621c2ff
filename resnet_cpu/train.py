"""Runs an experiment: `python -m resnet_cpu.train --flagfile=experiments/quickstart.flags`."""

from typing import List

from resnet_cpu import flags
from resnet_cpu.cluster import guard
from resnet_cpu.cluster import placement as layout
from resnet_cpu.run import folder as runlog


def main(argv: List[str]) -> None:
    """Train; the last line on standard output is the result as JSON (rank 0)."""
    settings = flags.parse(argv)
    guard.catch_stop_signals()  # before the slow imports: a batch system's signal may come at any time
    world = guard.connect(settings.system.ranks, settings.system.stall_timeout)
    threads = layout.apply(settings.system.threads, world.cores)
    from resnet_cpu.training import opening as job

    opened = job.open_job(settings, world, threads)
    result = opened.finished
    if result is None:
        # TensorFlow takes 5 s to load and reads its environment once: after the layout, after the early errors.
        from resnet_cpu.training import loop

        result = loop.run(opened)
    if world.rank == 0:
        print(runlog.json_line(result), flush=True)


if __name__ == "__main__":
    guard.run(main)
