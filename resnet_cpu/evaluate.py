"""Scores a run's newest checkpoint, or an ensemble: `python -m resnet_cpu.evaluate --run_dir=D [--ensemble]`."""

from typing import Any, Dict, List, Tuple

from resnet_cpu import commandline
from resnet_cpu.cluster import guard, placement
from resnet_cpu.run.folder import json_line
from resnet_cpu.settings import Settings


def main(argv: List[str]) -> None:
    """Evaluate with the flags that the run recorded and those of `argv` over them; the last line of output is JSON."""
    asked = commandline.parse(argv, "evaluate")
    rank, result = (_score_ensemble if asked.evaluate.ensemble else _score_checkpoint)(asked, argv)
    if rank == 0:
        print(json_line(result), flush=True)


def _score_checkpoint(asked: Settings, argv: List[str]) -> Tuple[int, Dict[str, Any]]:
    from resnet_cpu.training import selection  # after the flags, so that --help and their errors come at once

    settings = selection.settings_of(selection.run_to_evaluate(asked), argv)
    world = guard.connect(asked.system.ranks, asked.system.stall_timeout)
    placement.apply(settings.system.threads, world.cores)
    path, step, data = selection.find_checkpoint(settings, world, asked.evaluate.checkpoint)
    from resnet_cpu.training import evaluation  # TensorFlow reads the threads from its environment once

    scores = evaluation.evaluate_checkpoint(settings, world, data, path, asked.evaluate.export)
    return world.rank, {**scores, "step": step, "checkpoint": path}


def _score_ensemble(asked: Settings, argv: List[str]) -> Tuple[int, Dict[str, Any]]:
    from resnet_cpu.training import ensemble, selection

    named = selection.check_ensemble_flags(asked)
    world = guard.connect(asked.system.ranks, asked.system.stall_timeout)
    chosen = selection.choose_members(named, asked, argv, world)
    missing = selection.members_without_predictions(chosen, asked, world)
    if missing:
        placement.apply(missing[0].settings.system.threads, world.cores)
        from resnet_cpu.training import members

        data = selection.open_data_of(missing, world)
        members.make_missing_predictions([(*member, one) for member, one in zip(missing, data)], world)
    paths = {name: member.path for name, member in chosen.items()}
    return world.rank, world.on_rank0(lambda: ensemble.evaluate(paths, asked.evaluate.export))


if __name__ == "__main__":
    guard.run(main, reader_may_leave=True)
