"""Whole runs inside this process, and the files that they leave: shared by the tests of one rank and of several."""

import contextlib
import os
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple
from unittest import mock

import numpy as np
import tensorflow as tf
from conftest import TINY_FLAGS

from resnet_cpu import commandline
from resnet_cpu.cluster import control, horovod, placement
from resnet_cpu.cluster.machine import precision_problem
from resnet_cpu.cluster.placement import has_intel_openmp
from resnet_cpu.report import plotting, run_plots
from resnet_cpu.run import checkpoint
from resnet_cpu.run.folder import read_json, read_rows
from resnet_cpu.run.provenance import instruction_sets
from resnet_cpu.settings import Recipe, Settings
from resnet_cpu.training import evaluation, loop, opening
from resnet_cpu.training.state import build_model
from resnet_cpu.training.step import TrainStep

# bfloat16 where this processor can compute in it.
PRECISION = "float32" if precision_problem("bfloat16", instruction_sets(), has_intel_openmp()) else "bfloat16"
# For tests about neither reading images nor scores: as many examples and classes, and each run takes a second less.
SYNTHETIC = ["--dataset=synthetic", "--data_dir=", "--train_examples=50", "--num_classes=10"]
# A recipe of four steps, for tests that need a run but not a long one.
SHORT = ["--phase=main:steps=3,lr_per_256=2,warmup_steps=2,warmup_lr=0.01", "--phase=tail:steps=1,lr=0.01"]
LONG = ["--phase=main:steps=400,lr=0.05,warmup_steps=3"]  # for runs that are stopped somewhere
EVERY_EPOCH = "--eval_every_epochs=1"  # with TINY_FLAGS: after steps 5, 9, 13 and 16


_shared: Dict[Any, Any] = {}


@contextlib.contextmanager
def shared_networks() -> Iterator[None]:
    """Build each network once per process, and trace its steps once: both take most of the time of a short run.

    Every run starts from the initial values of all variables, as a new network does. A test that has replaced the
    network or the step in the loop gets its own.
    """

    def build(settings: Settings, fused_kernels: bool) -> tf.keras.Model:
        key = ("network", repr(settings.model), settings.recipe.seed, fused_kernels, horovod.active())
        if key not in _shared:
            _shared[key] = build_model(settings, fused_kernels)
        _set_initial(_shared[key].variables, key)
        return _shared[key]

    def make_step(model: tf.keras.Model, recipe: Recipe, micro_batches: int, fused_update: bool) -> TrainStep:
        options = (
            recipe.optimizer,
            recipe.nesterov,
            recipe.wd_on_bn,
            recipe.label_smoothing,
            recipe.exchange,
            fused_update,
        )
        key = ("step", id(model), options, micro_batches)
        if key not in _shared:
            _shared[key] = TrainStep(model, recipe, micro_batches, fused_update)
        step = _shared[key]
        sums = [*step._gradient_sums, *step._statistics_sums, step._loss_sum]
        _set_initial([*step.optimizer.variables, *(summed for summed in sums if summed is not None)], key)
        return step

    def make_evaluate_step(model: tf.keras.Model) -> Any:
        key = ("evaluation", id(model))
        if key not in _shared:
            _shared[key] = original(model)
        return _shared[key]

    original = evaluation.make_evaluate_step
    if loop.build_model is not build_model or loop.TrainStep is not TrainStep:
        yield
        return
    replaced = {"build_model": build, "TrainStep": make_step}
    with mock.patch.multiple(loop, **replaced), mock.patch.object(evaluation, "make_evaluate_step", make_evaluate_step):
        yield


def _set_initial(variables: Sequence[tf.Variable], key: Any) -> None:
    """Give the variables the values that they had at the first call with this key."""
    if ("initial", key) not in _shared:
        _shared["initial", key] = [variable.numpy() for variable in variables]
    for variable, value in zip(variables, _shared["initial", key]):
        variable.assign(value)


def train(
    world: control.World, data_dir: str, run_dir: str, *more: str, draw: bool = False, shared: bool = True
) -> Dict[str, Any]:
    """Train as `python -m resnet_cpu.train` does after MPI has started; draw only if `draw`. Return the result.

    `shared`: with the network and the traced step of earlier runs in this process, if there are any. Drawing takes a
    second per run.
    """
    networks = shared_networks() if shared else contextlib.nullcontext()
    settings = commandline.parse([*TINY_FLAGS, f"--data_dir={data_dir}", f"--run_dir={run_dir}", *more])
    job = opening.open_job(settings, world, placement.apply(0, world.cores))
    try:
        with networks, mock.patch.object(plotting, "available", lambda: draw):
            return job.finished or loop.run(job)
    finally:
        if job.folder is not None:
            job.folder.close()


def train_and_draw(data_dir: str, folder: str) -> str:
    """Train a run with evaluations and plots to its end; return its folder."""
    original, drawn = run_plots.draw_curves, []

    def draw(*arguments: Any) -> None:
        drawn.append(os.path.exists(os.path.join(folder, "result.json")))
        original(*arguments)

    with mock.patch.object(run_plots, "draw_curves", draw):
        train(control.World(1, 0), data_dir, folder, "--eval_every_epochs=1", draw=True)
    assert drawn == [True]  # once, after the clock has stopped: not in evaluations, while all ranks wait
    return folder


def final_state(run_dir: str) -> Dict[str, np.ndarray]:
    """Return every array of the newest checkpoint (weights, statistics, velocity) and its step."""
    return state_after(run_dir, checkpoint.newest(run_dir)[1]["step"])


def state_after(run_dir: str, step: int) -> Dict[str, np.ndarray]:
    """Return every array of the checkpoint after `step` steps, and the step."""
    path = checkpoint.folder(run_dir, step)
    state = {
        f"{group}/{name}": array
        for group in ("weights", "optimizer")
        for name, array in checkpoint.load(path, group).items()
    }
    return {**state, "step": np.array(step)}


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
