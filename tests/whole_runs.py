"""Whole runs inside this process, and what they leave: shared by the tests of one rank and of several."""

import os
from typing import Any, Dict, List, Optional, Sequence, Tuple
from unittest import mock

import numpy as np
from conftest import TINY_FLAGS

from resnet_cpu import flags
from resnet_cpu.cluster import control
from resnet_cpu.cluster import placement as layout
from resnet_cpu.report import plotting
from resnet_cpu.run import checkpoint
from resnet_cpu.run.folder import read_json, read_rows
from resnet_cpu.training import loop
from resnet_cpu.training import opening as job

# Where neither reading images nor scoring is the subject: as many examples and classes, a second less of each run.
SYNTHETIC = ["--dataset=synthetic", "--data_dir=", "--train_examples=50", "--num_classes=10"]


def train(world: control.World, data_dir: str, run_dir: str, *more: str, draw: bool = False) -> Dict[str, Any]:
    """Train as `python -m resnet_cpu.train` does after MPI is up, drawing only if asked to; return the result."""
    settings = flags.parse([*TINY_FLAGS, f"--data_dir={data_dir}", f"--run_dir={run_dir}", *more])
    opened = job.open_job(settings, world, layout.apply(0, world.cores))
    try:
        with mock.patch.object(plotting, "available", lambda: draw):  # drawing takes a second a run
            return opened.finished or loop.run(opened)
    finally:
        if opened.folder is not None:
            opened.folder.close()


def final_state(run_dir: str) -> Dict[str, np.ndarray]:
    """Return every array of the newest checkpoint: weights, statistics, velocity."""
    path, manifest = checkpoint.newest(run_dir)
    state = {
        f"{group}/{name}": array
        for group in ("weights", "optimizer")
        for name, array in checkpoint.load(path, group).items()
    }
    return {**state, "step": np.array(manifest["step"])}


def losses(run_dir: str) -> List[Tuple[int, float, float]]:
    """Return (step, loss, LR) of every step."""
    return [(row["step"], row["loss"], row["lr"]) for row in read_rows(os.path.join(run_dir, "metrics.jsonl"))]


def differing(one: Dict[str, np.ndarray], other: Dict[str, np.ndarray]) -> List[str]:
    """Return the names of the arrays that are not the same bits."""
    assert set(one) == set(other)
    return [name for name in one if one[name].tobytes() != other[name].tobytes()]


# A small collapsed ensemble: two cycles, each collapsed in a branch; 6 + 3 + 6 + 3 steps.
TREE = [
    "--experiment=collapsed_ensemble",
    "--phase=main:steps=6,lr=0.05,warmup_steps=2,decay_steps=8",
    "--phase=tail:steps=3,lr=0.02,power=2,wd=2e-4,augment=light,branch=1,member=1",
    "--phase=cycle:steps=6,lr=0.04,warmup_steps=2,warmup_lr=0.01,velocity=reset",
    "--phase=collapse:steps=3,lr=0.01,power=2,wd=2e-4,augment=light,branch=1,member=1",
]
TREE_STOPS = (8,)  # in a branch; on two ranks: in the phase that starts elsewhere


def members(run_dir: str) -> Dict[str, np.ndarray]:
    """Return every array of every member: weights, statistics and predictions."""
    found = {}
    for name in sorted(os.listdir(os.path.join(run_dir, "members"))):
        path = checkpoint.member_folder(run_dir, name)
        groups = {"weights": path, "predictions": os.path.join(path, "predictions")}
        for group, folder in groups.items():
            found.update({f"{name}/{group}/{key}": array for key, array in checkpoint.load(folder, group).items()})
    return found


def check_tree(
    world: control.World, data_dir: str, folder: str, stops: Sequence[int] = TREE_STOPS, whole: Optional[str] = None
) -> None:
    """Stop and resume an ensemble's run at each of `stops`, each in a folder of its own; members are the same bits.

    `whole` names the uninterrupted run's folder, where there is one already.
    """
    if whole is None:
        whole = f"{folder}/whole"
        train(world, data_dir, whole, *TREE)
    world.barrier()
    expected = _result(whole)
    assert expected["complete"] and expected["steps"] == 18 and set(expected["members"]) == {"tail", "collapse"}
    for stop in stops:
        run_dir = f"{folder}/stop{stop}"
        part = train(world, data_dir, run_dir, *TREE, f"--max_steps={stop}")
        assert not part["complete"] and len(part.get("members", {})) == (stop >= 9)
        rest = train(world, data_dir, run_dir, *TREE, "--resume=must")
        world.barrier()
        assert not differing(members(run_dir), members(whole)), stop
        assert not differing(final_state(run_dir), final_state(whole)), stop
        assert losses(run_dir) == losses(whole), stop
        assert (rest["members"], rest["ensemble"]) == (expected["members"], expected["ensemble"])


# Where a run of 10 + 6 steps is stopped before it is resumed: in the first phase, at the border, in the second.
STOPS = (4, 10, 13)


def check_resume(
    world: control.World,
    data_dir: str,
    folder: str,
    *more: str,
    stops: Sequence[int] = STOPS,
    whole: Optional[str] = None,
) -> None:
    """Stop and resume one run at each of `stops`; it equals the uninterrupted one, in each step and at its end.

    So do weights, velocity, statistics and scores at the end: a bit that one of the resumptions lost shows in the loss
    of the steps after it. `whole` names the uninterrupted run's folder, where there is one already.
    """
    if whole is None:
        whole = f"{folder}/whole"
        train(world, data_dir, whole, *more)
    world.barrier()
    expected = _result(whole)
    assert expected["complete"] and expected["steps"] == 16
    run_dir, resume = f"{folder}/stopped", "never"
    for stop in stops:
        part = train(world, data_dir, run_dir, *more, f"--max_steps={stop}", f"--resume={resume}")
        assert not part["complete"] and part["steps"] == stop
        resume = "must"
    rest = train(world, data_dir, run_dir, *more, f"--resume={resume}")
    assert rest["complete"]
    world.barrier()
    assert losses(run_dir) == losses(whole)
    assert not differing(final_state(run_dir), final_state(whole))
    assert [rest[key] for key in ("top1", "top5", "loss")] == [expected[key] for key in ("top1", "top5", "loss")]


def _result(run_dir: str) -> Dict[str, Any]:
    """Return what a finished run wrote."""
    found = read_json(os.path.join(run_dir, "result.json"))
    assert found is not None
    return found
