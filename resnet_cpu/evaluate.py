"""Scores a run's newest checkpoint, or an ensemble: `python -m resnet_cpu.evaluate --run_dir=D [--ensemble]`."""

import functools
import os
import sys
from typing import Dict, List

from resnet_cpu import flags
from resnet_cpu.cluster import guard
from resnet_cpu.cluster import placement as layout
from resnet_cpu.errors import CheckpointError, FlagError
from resnet_cpu.run import folder as runlog
from resnet_cpu.settings import Settings


def main(argv: List[str]) -> None:
    """Evaluate with the run's own flags, later ones overriding; the last line on standard output is JSON."""
    given, _ = flags.parse_values(argv, "evaluate")
    if given.ensemble:
        _ensemble(argv, given)
        return
    if given.members:
        raise FlagError(f"--members={','.join(given.members)}: needs --ensemble; add it")
    run_dir = given.run_dir or (
        given.checkpoint and os.path.dirname(os.path.dirname(os.path.abspath(given.checkpoint)))
    )
    run_dir = flags.required(run_dir, "run_dir", "name the folder of the run to evaluate")
    settings = _settings_of(run_dir, argv)
    world = guard.connect(given.ranks, given.stall_timeout)
    layout.apply(settings.system.threads, world.cores)
    from resnet_cpu.training import opening as job

    data = job.open_data(settings, world)
    assert data is not None  # synthetic was refused above
    path, step, data = job.find_checkpoint(settings, world, data, given.checkpoint)
    from resnet_cpu.training import evaluation

    scores = evaluation.evaluate_checkpoint(settings, world, data, path, given.export)
    if world.rank == 0:
        print(runlog.json_line({**scores, "step": step, "checkpoint": path}), flush=True)


def _settings_of(run_dir: str, argv: List[str]) -> Settings:
    """Return the settings of a run with the flags of the command line over them."""
    recorded = os.path.join(run_dir, "resolved.flags")
    if not os.path.exists(recorded):
        raise CheckpointError(f"{run_dir}: no run in it (resolved.flags is missing); name a run's folder")
    values, _ = flags.parse_values([f"--flagfile={recorded}", *argv, f"--run_dir={run_dir}"], "evaluate")
    settings = flags.make_settings(values)
    if settings.data.dataset == "synthetic":
        raise FlagError("--dataset=synthetic: there is nothing to evaluate; give a --dataset and its --data_dir")
    return settings


def _ensemble(argv: List[str], given: flags.Values) -> None:
    """Score the mean of the members' probabilities; networks run only for members that have none kept."""
    if given.checkpoint:
        raise FlagError(f"--checkpoint={given.checkpoint}: contradicts --ensemble; name members with --members")
    if given.members and given.run_dir:
        raise FlagError(f"--run_dir={given.run_dir}: contradicts --members; name this run there, or leave one out")
    named = given.members or [flags.required(given.run_dir, "run_dir", "name the run, or --members")]
    if given.export and not given.export.endswith(".npz"):
        raise FlagError(f"--export={given.export}: the mean of the members' weights goes to an .npz file; name one")
    world = guard.connect(given.ranks, given.stall_timeout)
    from resnet_cpu.run import checkpoint
    from resnet_cpu.training import ensemble
    from resnet_cpu.training import opening as job

    def check() -> List[List[str]]:
        if given.export is not None:
            checkpoint.check_export(given.export)
        found = ensemble.paths_of(named)
        for path in found.values():
            job.check_model(_settings_of(ensemble.run_of(path), argv), path, ensemble.signature_of(path))
        return [list(pair) for pair in found.items()]

    paths = dict(world.on_rank0(check))
    settings: Dict[str, Settings] = {path: _settings_of(ensemble.run_of(path), argv) for path in paths.values()}
    wherever = not given["data_dir"].present
    missing = world.on_rank0(
        lambda: [path for path in paths.values() if not ensemble.is_kept(path, settings[path], wherever)]
    )
    if missing:
        layout.apply(settings[missing[0]].system.threads, world.cores)
        from resnet_cpu.training import evaluation

        members = []
        for path in missing:
            if world.rank == 0:
                print(
                    f"{path}: no predictions kept of these weights on this view; making them",
                    file=sys.stderr,
                    flush=True,
                )
            data = job.open_data(settings[path], world)
            assert data is not None  # synthetic was refused above
            signature = world.on_rank0(functools.partial(ensemble.signature_of, path))
            members.append((path, settings[path], job.as_trained(settings[path], data, signature)))
        evaluation.evaluate_members(members, world)
    result = world.on_rank0(lambda: ensemble.evaluate(paths, given.export))
    if world.rank == 0:
        print(runlog.json_line(result), flush=True)


if __name__ == "__main__":
    guard.run(main)
