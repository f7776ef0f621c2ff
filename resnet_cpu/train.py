"""Runs an experiment: `python -m resnet_cpu.train --flagfile=experiments/quickstart.flags`."""

import sys
from typing import Any, Dict, List

from resnet_cpu import commandline
from resnet_cpu.cluster import guard, placement
from resnet_cpu.run.folder import json_line


def main(argv: List[str]) -> None:
    """Train; the last line on standard output is the result as JSON (rank 0)."""
    settings = commandline.parse(argv, "train")
    guard.catch_stop_signals()  # before the slow imports: a batch system's signal may come at any time
    world = guard.connect(settings.system.ranks, settings.system.stall_timeout)
    environment = placement.apply(settings.system.threads, world.cores)
    from resnet_cpu.training import opening  # after the flags, so that --help and their errors come at once

    job = opening.open_job(settings, world, environment)
    result = job.finished
    if result is not None and world.rank == 0:
        print(f"{job.run_dir} {_nothing_left(result)}", file=sys.stderr)
    if result is None:
        # TensorFlow takes 5 s to load and reads its environment once: after `apply`, and after the early errors.
        from resnet_cpu.training import loop

        result = loop.run(job)
    if world.rank == 0:
        print(json_line(result), flush=True)


def _nothing_left(result: Dict[str, Any]) -> str:
    if result["complete"]:
        return "holds the finished run; for another run choose another --run_dir"
    return f"has reached --max_steps={result['steps']} already; raise or remove that flag to continue"


if __name__ == "__main__":
    guard.run(main)
