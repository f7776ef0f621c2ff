"""What is checked inside one mpirun session: many cases a session, since starting one takes ten seconds.

    launch/local.sh RANKS python tests/mpi/worker.py OUT_DIR DATA_DIR

Each case writes what it found to OUT_DIR/CASE.json or .npz on rank 0; the tests beside this file judge it.
"""

import dataclasses
import json
import os
import sys
import time
import traceback
from unittest import mock

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from resnet_cpu.cluster import control, placement

world = control.connect(None)
placement.apply(1, world.cores)

import equality  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402
import whole_runs as runs  # noqa: E402

from resnet_cpu import flags  # noqa: E402
from resnet_cpu.bench import messages  # noqa: E402
from resnet_cpu.cluster import horovod  # noqa: E402
from resnet_cpu.data import folders as layouts  # noqa: E402
from resnet_cpu.errors import UserError  # noqa: E402
from resnet_cpu.model.resnet import resnet  # noqa: E402
from resnet_cpu.recipe.batch import resolve_batch  # noqa: E402
from resnet_cpu.scaling import steptimes as throughput  # noqa: E402
from resnet_cpu.training import evaluation, loop  # noqa: E402
from resnet_cpu.training import opening as job  # noqa: E402
from resnet_cpu.training.state import build_model  # noqa: E402

OUT, DATA = sys.argv[1:3]


def write(name, content):
    if world.rank == 0:
        with open(os.path.join(OUT, f"{name}.json"), "w") as file:
            json.dump(content, file)


def write_arrays(name, arrays):
    if world.rank == 0:
        np.savez(os.path.join(OUT, f"{name}.npz"), **arrays)


def case_control_plane():
    """Messages arrive as they were sent, in the order of the ranks; rank 0's errors are everyone's."""
    everyone = world.gather({"rank": world.rank, "text": "ä" * world.rank})
    assert everyone == [{"rank": r, "text": "ä" * r} for r in range(world.size)]
    assert world.broadcast([1, {"a": None}] if world.rank == 0 else "other") == [1, {"a": None}]

    def fail():
        raise UserError("as told")

    try:
        world.on_rank0(fail)
    except UserError as error:
        assert str(error) == "as told" and error.collective
    else:
        raise AssertionError("rank 0's error was lost")
    write("control_plane", {"ok": True})


def case_allreduce():
    """Rank r gives r: the mean is (N-1)/2, the sum N(N-1)/2, exactly."""
    mean = horovod.mean(tf.constant(float(world.rank)), "test_mean").numpy()
    total = horovod.total(tf.constant(world.rank, tf.int64), "test_total").numpy()
    write("allreduce", {"mean": float(mean), "total": int(total)})


def case_equality():
    for name in equality.CASES:
        _, per_rank = equality.BATCH, equality.BATCH // world.size
        part = slice(world.rank * per_rank, (world.rank + 1) * per_rank)
        arrays = equality.train(name, part)
        write_arrays(f"equality_{name}", arrays)


def case_without_averaging():
    """Negative control: an optimizer that is not wrapped trains another model on each rank, and that is seen."""
    original = horovod.distributed
    horovod.distributed = lambda optimizer: optimizer
    try:
        per_rank = equality.BATCH // world.size
        part = slice(world.rank * per_rank, (world.rank + 1) * per_rank)
        variables = equality.train("float64", part, as_variables=True)
        write_arrays("equality_without_averaging", {v.name: v.numpy() for v in variables})
    finally:
        horovod.distributed = original
    write("without_averaging", {"error": replicas_error(variables)})


def replicas_error(variables):
    try:
        horovod.check_replicas(world, variables, "in the test")
    except UserError as error:
        return str(error)
    return None


def case_broadcast():
    """Ranks that start from other seeds are equal after the broadcast; the control without it is caught."""
    model = resnet("resnet18", 10, width=0.0625, stem="small", seed=world.rank)
    before = replicas_error(model.variables)
    horovod.broadcast(model.variables)
    write("broadcast", {"before": before, "after": replicas_error(model.variables)})


def case_run_without_broadcast():
    """The same inside a run: it must not come to step 0."""
    originals = horovod.broadcast, loop.build_model
    horovod.broadcast = lambda variables: None
    loop.build_model = lambda settings: resnet("resnet18", 10, width=0.0625, stem="small", seed=world.rank)
    told = None
    try:
        runs.train(world, f"{DATA}/train", f"{OUT}/without_broadcast")
    except UserError as error:
        told = str(error)
    finally:
        horovod.broadcast, loop.build_model = originals
    write("run_without_broadcast", {"error": told, "rows": runs.losses(f"{OUT}/without_broadcast")})


def case_evaluation():
    """Counts over (examples, batch) on this many ranks, from real shards."""
    found = {}
    settings = flags.parse([*runs.TINY_FLAGS, "--seed=3"])
    model = build_model(settings)
    step = evaluation.make_evaluate_step(model)
    for examples in (1, 7, 50, 101):
        data = layouts.open_data(f"{DATA}/{examples}", "digits")
        for batch in (1, 8, 64):
            score = evaluation.evaluate(step, settings, world, data, batch)
            found[f"{examples}/{batch}"] = [score.examples, score.correct1, score.correct5, score.loss]
        _, predictions = evaluation.predict(step, settings, world, data, 8, lambda: None)
        if world.rank == 0:
            write_arrays(f"predictions_{examples}", dataclasses.asdict(predictions))
    write("evaluation", found)


def case_resume():
    runs.check_resume(world, f"{DATA}/train", f"{OUT}/resume", whole=f"{OUT}/run")  # that of case_run_state
    write("resume", {"ok": True})


def case_tree():
    """A collapsed ensemble cut off in the phase that starts elsewhere than the one before it ended."""
    runs.check_tree(world, f"{DATA}/train", f"{OUT}/tree", stops=(11,))
    write("tree", {"ok": True})


def case_run_state():
    """One run of the tiny recipe, to be compared between sessions of other rank counts."""
    runs.train(world, f"{DATA}/train", f"{OUT}/run")
    result = resolve_batch(None, 12, world.size)
    write("run_state", {"batch": [result.per_rank, result.total]})


def case_what_rank_0_does_alone():
    """Weights taken over, a profile, an export, in bfloat16: the other ranks wait where rank 0 works."""
    more = [f"--init_from={OUT}/run", "--profile_steps=1,2", "--precision=bfloat16", "--phase=tail:steps=1,lr=0.01"]
    result = runs.train(world, f"{DATA}/train", f"{OUT}/alone", *more)
    settings = flags.parse([*runs.TINY_FLAGS, f"--run_dir={OUT}/alone"])
    data = layouts.open_data(f"{DATA}/train", "digits")
    path, step, data = job.find_checkpoint(settings, world, data, None)
    scores = evaluation.evaluate_checkpoint(settings, world, data, path, f"{OUT}/alone.npz")
    told = None
    try:
        evaluation.evaluate_checkpoint(settings, world, data, path, f"{OUT}/alone.npz")
    except UserError as error:
        told = [str(error), error.collective]
    write("what_rank_0_does_alone", {"result": result, "scores": scores, "step": step, "told": told})


def case_scaling():
    """Step times of a run in which rank 1 is held up before each step, and one in which nobody is."""

    class Held(throughput.StepTimes):
        def add(self, *arguments, **keywords):
            super().add(*arguments, **keywords)
            if world.rank == 1:
                time.sleep(HELD_S)

    more = ["--experiment=scaling", "--untimed_steps=2"]
    with mock.patch.object(throughput, "StepTimes", Held):
        held = runs.train(world, f"{DATA}/train", f"{OUT}/scaling", *more)
    write("scaling", held["scaling"])


def case_messages():
    settings = flags.parse([*runs.TINY_FLAGS])
    timed = messages.run(settings, world, 4096, 0.05, 1, 5)
    if world.rank == 0:
        timed.write(f"{OUT}/messages")
    world.barrier()
    write("messages", {"gradients": timed.gradient_bytes, "rate": timed.images_per_second, "told": timed.lines()})


HELD_S = 0.1  # a tiny step takes a fifth of that
ALL = ["control_plane", "allreduce", "equality", "evaluation"]
CASES = {
    2: [
        *ALL,
        "without_averaging",
        "broadcast",
        "run_without_broadcast",
        "run_state",
        "resume",
        "tree",
        "what_rank_0_does_alone",
        "scaling",
        "messages",
    ],
    3: ALL,
    4: ["allreduce", "equality"],
}

horovod.start(world)
for name in CASES[world.size]:
    try:
        globals()[f"case_{name}"]()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        world.comm.Abort(1)
