"""Whole runs inside this process, and the files that they leave: shared by the tests of one rank and of several."""

import os
from typing import Any, Dict, List, Optional, Sequence, Tuple
from unittest import mock

import numpy as np
import pytest
from conftest import TINY_FLAGS

from resnet_cpu import commandline
from resnet_cpu.cluster import control, placement
from resnet_cpu.cluster.machine import precision_problem
from resnet_cpu.cluster.placement import has_intel_openmp
from resnet_cpu.report import plotting, run_plots
from resnet_cpu.run import checkpoint
from resnet_cpu.run.folder import read_json, read_rows
from resnet_cpu.run.provenance import instruction_sets
from resnet_cpu.training import loop, opening

# bfloat16 where this processor can compute in it.
PRECISION = "float32" if precision_problem("bfloat16", instruction_sets(), has_intel_openmp()) else "bfloat16"
# For tests about neither reading images nor scores: as many examples and classes, and each run takes a second less.
SYNTHETIC = ["--dataset=synthetic", "--data_dir=", "--train_examples=50", "--num_classes=10"]
# A recipe of four steps, for tests that need a run but not a long one.
SHORT = ["--phase=main:steps=3,lr_per_256=2,warmup_steps=2,warmup_lr=0.01", "--phase=tail:steps=1,lr=0.01"]
EVERY_EPOCH = "--eval_every_epochs=1"  # with TINY_FLAGS: after steps 5, 9, 13 and 16


def train(world: control.World, data_dir: str, run_dir: str, *more: str, draw: bool = False) -> Dict[str, Any]:
    """Train as `python -m resnet_cpu.train` does after MPI has started; draw only if `draw`. Return the result."""
    settings = commandline.parse([*TINY_FLAGS, f"--data_dir={data_dir}", f"--run_dir={run_dir}", *more])
    job = opening.open_job(settings, world, placement.apply(0, world.cores))
    try:
        with mock.patch.object(plotting, "available", lambda: draw):  # drawing takes a second per run
            return job.finished or loop.run(job)
    finally:
        if job.folder is not None:
            job.folder.close()


_finished: List[str] = []  # folder of the finished run of this process


def finished(data_dir: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the folder of a finished run with evaluations and plots, trained once per process; not to be changed."""
    if not _finished:
        folder = str(tmp_path_factory.mktemp("finished") / "run")
        original, drawn = run_plots.draw_curves, []

        def draw(*arguments: Any) -> None:
            drawn.append(os.path.exists(os.path.join(folder, "result.json")))
            original(*arguments)

        with mock.patch.object(run_plots, "draw_curves", draw):
            train(control.World(1, 0), data_dir, folder, "--eval_every_epochs=1", draw=True)
        assert drawn == [True]  # once, after the clock has stopped: not in evaluations, while all ranks wait
        _finished.append(folder)
    return _finished[0]


def final_state(run_dir: str) -> Dict[str, np.ndarray]:
    """Return every array of the newest checkpoint (weights, statistics, velocity) and its step."""
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
    """Return the names of the arrays whose bits differ."""
    assert set(one) == set(other)
    return [name for name in one if one[name].tobytes() != other[name].tobytes()]


# A small collapsed ensemble: two cycles, each followed by a collapse in a branch; 6 + 3 + 6 + 3 steps.
TREE = [
    "--experiment=collapsed_ensemble",
    "--phase=main:steps=6,lr=0.05,warmup_steps=2,decay_steps=8",
    "--phase=tail:steps=3,lr=0.02,power=2,wd=2e-4,augment=light,branch=1,member=1",
    "--phase=cycle:steps=6,lr=0.04,warmup_steps=2,warmup_lr=0.01,velocity=reset",
    "--phase=collapse:steps=3,lr=0.01,power=2,wd=2e-4,augment=light,branch=1,member=1",
]
TREE_STOPS = (8,)  # in a branch; on two ranks: in the phase that starts from the end of another one


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
    """Check that an ensemble's run that is stopped at one of `stops` and resumed gives the same bits.

    Each stop has its own folder. `whole` is the folder of the uninterrupted run, if there is one already.
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


# Steps after which a run of 10 + 6 steps is stopped: in the first phase, between the phases, in the second.
STOPS = (4, 10, 13)


def check_resume(
    world: control.World,
    data_dir: str,
    folder: str,
    *more: str,
    stops: Sequence[int] = STOPS,
    whole: Optional[str] = None,
) -> None:
    """Check that a run that is stopped and resumed at each of `stops` equals an uninterrupted one, bit for bit.

    Compared are the loss of each step and, at the end, weights, statistics, velocity and scores: a bit that was lost in
    one of the stops shows in the losses after it. `whole` is the folder of the uninterrupted run, if there is one.
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
    """Return the result.json of a finished run."""
    found = read_json(os.path.join(run_dir, "result.json"))
    assert found is not None
    return found
