"""The checks inside one mpirun session: many cases per session, since starting one takes ten seconds.

    launch/local.sh RANKS python tests/mpi/worker.py OUT_DIR DATA_DIR

Each case writes its findings to OUT_DIR/CASE.json or .npz on rank 0; the tests beside this file judge them.
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
THREADS = placement.apply(1, world.cores)

import equality  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402
import whole_runs as runs  # noqa: E402

from resnet_cpu import commandline  # noqa: E402
from resnet_cpu.bench import messages  # noqa: E402
from resnet_cpu.cluster import horovod  # noqa: E402
from resnet_cpu.data import folders  # noqa: E402
from resnet_cpu.errors import UserError  # noqa: E402
from resnet_cpu.model.resnet import resnet  # noqa: E402
from resnet_cpu.recipe.batch import resolve_batch  # noqa: E402
from resnet_cpu.scaling import steptimes  # noqa: E402
from resnet_cpu.training import evaluation, loop, opening, selection  # noqa: E402
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
    """Messages arrive as they were sent, in the order of the ranks; errors of rank 0 are raised by all."""
    gathered = world.gather({"rank": world.rank, "text": "ä" * world.rank})
    assert gathered == [{"rank": r, "text": "ä" * r} for r in range(world.size)]
    assert world.broadcast([1, {"a": None}] if world.rank == 0 else "other") == [1, {"a": None}]

    def fail():
        raise UserError("an error of rank 0")

    try:
        world.on_rank0(fail)
    except UserError as error:
        assert str(error) == "an error of rank 0" and error.collective
    else:
        raise AssertionError("rank 0's error was lost")
    beats = []  # of this rank's watchdog, while rank 0 works
    long_work = [lambda beat: [beat(), beat(), 7][-1], lambda: beats.append(1)]
    assert world.on_rank0_with_beats(*long_work) == 7 and len(beats) == 2
    write("control_plane", {"ok": True})


def case_allreduce():
    """Rank r contributes r: the mean is (N-1)/2, the sum N(N-1)/2, exactly."""
    mean = horovod.mean(tf.constant(float(world.rank)), "test_mean").numpy()
    total = horovod.total(tf.constant(world.rank, tf.int64), "test_total").numpy()
    write("allreduce", {"mean": float(mean), "total": int(total)})


def case_equality():
    for name in equality.CASES:
        _, per_rank = equality.BATCH, equality.BATCH // world.size
        part = slice(world.rank * per_rank, (world.rank + 1) * per_rank)
        variables = equality.train(name, part, as_variables=True)
        horovod.check_replicas(world, variables, name)
        write_arrays(f"equality_{name}", equality.named(variables))


def case_exchange():
    """Means by bfloat16 are the float32 means of rounded values, rounded; parts are filled from the last tensor on."""
    shapes = [[3], [horovod._PART // 2 + 1, 2], [1], [2, 5]]

    def tensors(rank):
        generator = np.random.Generator(np.random.Philox(key=[7, rank]))
        return [tf.constant(generator.standard_normal(shape), tf.float32) for shape in shapes]

    def rounded(values):
        return tf.cast(tf.cast(values, tf.bfloat16), tf.float32)

    means = tf.function(horovod.means_by_bfloat16)(tensors(world.rank))
    all_ranks = zip(*(tensors(rank) for rank in range(world.size)))
    wanted = [rounded(tf.reduce_mean(tf.stack([rounded(each) for each in values]), 0)) for values in all_ranks]
    assert [mean.shape for mean in means] == [value.shape for value in wanted]
    wrong = [int(tf.reduce_sum(tf.cast(mean != value, tf.int32))) for mean, value in zip(means, wanted)]
    write("exchange", {"wrong": wrong, "parts": horovod._parts([tensor.shape.num_elements() for tensor in means])})


def case_without_averaging():
    """Negative control: an optimizer that is not wrapped trains a different model on each rank, which is detected."""
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
    """Ranks that start from different seeds are equal after the broadcast; without it they are detected."""
    model = resnet("resnet18", 10, width=0.125, stem="small", seed=world.rank)
    before = replicas_error(model.variables)
    horovod.broadcast(model.variables)
    write("broadcast", {"before": before, "after": replicas_error(model.variables)})


def case_run_without_broadcast():
    """The same inside a run, which must not reach step 0."""
    originals = horovod.broadcast, loop.build_model
    horovod.broadcast = lambda variables: None
    loop.build_model = lambda settings, fused_kernels: resnet(
        "resnet18", 10, width=0.125, stem="small", seed=world.rank
    )
    message = None
    try:
        runs.train(world, f"{DATA}/train", f"{OUT}/without_broadcast")
    except UserError as error:
        message = str(error)
    finally:
        horovod.broadcast, loop.build_model = originals
    write("run_without_broadcast", {"error": message, "rows": runs.losses(f"{OUT}/without_broadcast")})


def case_evaluation():
    """Counts for each pair of examples and batch size on these ranks, from real shards."""
    found = {}
    settings = commandline.parse([*runs.TINY_FLAGS, "--seed=3"])
    model = build_model(settings)
    step = evaluation.make_evaluate_step(model)
    for examples in (1, 7, 50, 101):
        data = folders.open_data(f"{DATA}/{examples}", "digits")
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
    """A collapsed ensemble that is cut off in a phase which does not start from the end of the one before it."""
    runs.check_tree(world, f"{DATA}/train", f"{OUT}/tree", stops=(11,))
    write("tree", {"ok": True})


def case_run_state():
    """A run of the tiny recipe, to be compared between sessions with different numbers of ranks."""
    runs.train(world, f"{DATA}/train", f"{OUT}/run")
    result = resolve_batch(None, 12, world.size)
    write("run_state", {"batch": [result.per_rank, result.total]})


def case_long():
    """The beginning of a long run with many checkpoints, to be compared with one that is stopped at any step."""
    more = ["--max_steps=120", "--checkpoint_every_steps=10", "--keep_checkpoints=20"]
    runs.train(world, f"{DATA}/train", f"{OUT}/long", *runs.LONG, *more)


def case_what_rank_0_does_alone():
    """Initial weights, a profile and an export, in bfloat16 if possible: the other ranks wait while rank 0 works."""
    more = [
        f"--init_from={OUT}/run",
        "--profile_steps=1,2",
        f"--precision={runs.PRECISION}",
        "--phase=tail:steps=1,lr=0.01",
    ]
    result = runs.train(world, f"{DATA}/train", f"{OUT}/alone", *more)
    settings = commandline.parse([*runs.TINY_FLAGS, f"--data_dir={DATA}/train", f"--run_dir={OUT}/alone"])
    path, step, data = selection.find_checkpoint(settings, world, None)
    scores = evaluation.evaluate_checkpoint(settings, world, data, path, f"{OUT}/alone.npz")
    refused = None
    try:
        evaluation.evaluate_checkpoint(settings, world, data, path, f"{OUT}/alone.npz")
    except UserError as error:
        refused = [str(error), error.collective]
    found = {"result": result, "scores": scores, "step": step, "refused": refused}
    write("what_rank_0_does_alone", found)


def case_opening():
    """All ranks agree on the job, the digest of the initial weights included; rank 0 alone holds the folder."""
    flags = [f"--data_dir={DATA}/train", f"--run_dir={OUT}/opened", f"--init_from={OUT}/run"]
    job = opening.open_job(commandline.parse([*runs.TINY_FLAGS, *flags]), world, THREADS)
    held = world.gather(job.folder is not None)
    if job.folder is not None:
        job.folder.close()
    write("opening", {"signatures": world.gather(job.signature), "held": held})


def case_scaling():
    """Step times of a run in which rank 1 is delayed before each step."""

    class Delayed(steptimes.StepTimes):
        def add(self, *arguments, **keywords):
            super().add(*arguments, **keywords)
            if world.rank == 1:
                time.sleep(DELAY_S)

    with mock.patch.object(loop, "StepTimes", Delayed):
        result = runs.train(world, f"{DATA}/train", f"{OUT}/scaling", "--experiment=scaling")
    write("scaling", result["scaling"])


def case_messages():
    flags = [*runs.TINY_FLAGS, "--warmup_steps=1", "--timed_steps=5", f"--run_dir={OUT}/messages"]
    timings = messages.run(commandline.parse(flags, "benchmark"), world, most_bytes=4096, seconds_per_size=0.05)
    rate, lines = timings.images_per_second, timings.lines()
    write("messages", {"gradients": timings.gradient_bytes, "rate": rate, "lines": lines})


DELAY_S = 0.1  # a tiny step takes a fifth of that
ALL = ["control_plane", "allreduce", "exchange", "equality", "evaluation"]
CASES = {
    2: [
        *ALL,
        "without_averaging",
        "broadcast",
        "run_without_broadcast",
        "run_state",
        "resume",
        "tree",
        "long",
        "what_rank_0_does_alone",
        "opening",
        "scaling",
        "messages",
    ],
    3: ALL,
    4: ["allreduce", "exchange", "equality"],
}

horovod.start(world)
for name in CASES[world.size]:
    try:
        globals()[f"case_{name}"]()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        world.comm.Abort(1)
