"""Scores a run's newest checkpoint: `python -m resnet_cpu.evaluate --run_dir=D`."""

import os
from typing import List

from resnet_cpu import flags
from resnet_cpu.cluster import control, guard, layout
from resnet_cpu.errors import CheckpointError, FlagError
from resnet_cpu.report import runlog


def main(argv: List[str]) -> None:
    """Evaluate with the run's own flags, later ones overriding; the last line on standard output is JSON."""
    given, _ = flags.parse_values(argv, "evaluate")
    run_dir = given.run_dir or (
        given.checkpoint and os.path.dirname(os.path.dirname(os.path.abspath(given.checkpoint)))
    )
    run_dir = flags.required(run_dir, "run_dir", "name the folder of the run to evaluate")
    recorded = os.path.join(run_dir, "resolved.flags")
    if not os.path.exists(recorded):
        raise CheckpointError(f"--run_dir={run_dir}: no run in it (resolved.flags is missing); name a run's folder")
    values, _ = flags.parse_values([f"--flagfile={recorded}", f"--run_dir={run_dir}", *argv], "evaluate")
    settings = flags.make_settings(values)
    if settings.data.dataset == "synthetic":
        raise FlagError("--dataset=synthetic: there is nothing to evaluate; give a --dataset and its --data_dir")
    world = control.connect(given.ranks)
    layout.apply(settings.system.threads, world.cores)
    from resnet_cpu.training import job

    data = job.open_data(settings, world)
    assert data is not None  # synthetic was refused above
    path, step, data = job.find_checkpoint(settings, world, data, values.checkpoint)
    from resnet_cpu.training import evaluation

    scores = evaluation.evaluate_checkpoint(settings, world, data, path, values.export)
    if world.rank == 0:
        print(runlog.json_line({**scores, "step": step, "checkpoint": path}), flush=True)


if __name__ == "__main__":
    guard.run(main)
