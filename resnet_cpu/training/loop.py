"""The training loop: phases in their order, one step at a time."""

import os
import sys
import time
from typing import Any, Dict, List

import numpy as np

from resnet_cpu import faults
from resnet_cpu.cluster import guard, horovod
from resnet_cpu.data.batches import check_label_base, training_batches
from resnet_cpu.errors import CheckpointError, NotFinite, StopRequested
from resnet_cpu.model.kernels import library
from resnet_cpu.recipe import schedule
from resnet_cpu.recipe.schedule import Rates, Span
from resnet_cpu.run import checkpoint, provenance
from resnet_cpu.run.atomic import sha256_of
from resnet_cpu.run.writer import Writer
from resnet_cpu.scaling.steptimes import StepTimes
from resnet_cpu.training import ensemble, evaluation, members, modes
from resnet_cpu.training.job import Job
from resnet_cpu.training.report import AnyReport, open_report
from resnet_cpu.training.state import State, build_model, take_over
from resnet_cpu.training.step import TrainStep


def run(job: Job) -> Dict[str, Any]:
    """Train to the end of the recipe (or --max_steps); return the result, which rank 0 has also written."""
    report = open_report(job)
    try:
        with guard.Watchdog(job.settings.system.stall_timeout) as watchdog, Writer() as writer:
            horovod.start(job.world)
            result = train(job, report, watchdog, writer)
        report.finish(result)
        return result
    except StopRequested:
        report.draw()
        raise
    except NotFinite as error:
        report.not_finite(str(error))
        raise
    finally:
        report.close()


def train(job: Job, report: AnyReport, watchdog: guard.Watchdog, writer: Writer) -> Dict[str, Any]:
    """Run the steps that are left of a run; return its result.

    All ranks execute the same lines: they differ in their share of the images and in the report, which is silent on
    all but rank 0. After a step comes first what must not be lost (member, checkpoint), then a stop that was
    requested, and only then the evaluation, which may take long. If a run is cut off before an evaluation that was
    due, the next attempt makes up for it. A checkpoint is written while training continues; a stop and the end of a
    phase wait for it. If writing fails, all ranks stop after the next step, and raise the error instead of saving.
    """
    recipe, world = job.settings.recipe, job.world
    fused_kernels, kernels = library.agree(job.settings, world)
    model = build_model(job.settings, fused_kernels)
    train_step = TrainStep(model, recipe, job.batch.accumulate_steps, fused_kernels)
    evaluate_step = evaluation.make_evaluate_step(model)
    state = State(model, train_step.optimizer)
    step_times = StepTimes()

    start(job, state, report, kernels)
    if state.step and job.evaluation_due(state.step) and not job.evaluated:
        evaluate(job, state, evaluate_step, report, watchdog)
    watchdog.expect_first_step()  # the evaluation above has beaten the watchdog already
    for span in schedule.spans(job.phases, state.step, job.last_step):
        enter(span, job, state, report)
        batches = training_batches(
            job.settings,
            world,
            job.data,
            examples=job.train_examples,
            batch=job.batch,
            first_step=span.steps.start,
            last_step=span.steps.stop,
            augment=span.phase.augment,
            image_size=span.phase.image_size,
        )
        step_times.pause()
        for step in span.steps:
            rates = schedule.rates(job.phases, span.phase, step - span.phase_first, recipe.momentum_correction)
            report.before(step)
            faults.point("step")
            stop = guard.stop_requested() or writer.failed
            outcome = train_step.take(batches, rates, stop, watchdog.beat)
            state.step = step + 1
            watchdog.beat()
            check_loss(outcome.loss, span, rates, job, state, writer)
            step_times.add(step, outcome.started, outcome.data_wait_s, outcome.update_s, outcome.step_s)
            report.step(step, span, rates, outcome)
            member = job.member_due(state.step)
            if member is not None:
                members.keep(job, state, member, writer)
            if outcome.stop or job.checkpoint_due(state.step):
                modes.record(job, step_times)
                save(job, state, report, writer, kernels, wait=outcome.stop or step == span.steps[-1])
                watchdog.beat()
                step_times.pause()
            # At the very end there is nothing left to stop but an evaluation.
            if outcome.stop and (state.step < job.last_step or job.evaluation_due(state.step)):
                raise StopRequested(
                    f"stopped on request after step {state.step}, checkpoint written; run the same command again to "
                    "continue",
                    collective=True,
                )
            if job.evaluation_due(state.step):
                evaluate(job, state, evaluate_step, report, watchdog)
                step_times.pause()
    additions = {**modes.additions(job), **members.scores(job, state.step, watchdog.beat)}
    return world.on_rank0(lambda: report.result(state.step, additions))


def start(job: Job, state: State, report: AnyReport, kernels: List[str]) -> None:
    """Set the state to that of the agreed checkpoint, of --init_from, or leave it as initialised, on all ranks."""
    data, saved = job.data, None
    if job.resume_from is not None:
        saved = _restore(job, state, job.resume_from)
        state.step = state.saved_step = saved["step"]
    else:
        if job.init_from is not None:
            job.world.on_rank0(lambda: _initialise_from(job, state))
        if data is not None:
            job.world.on_rank0(lambda: check_label_base(job.settings, data))
    horovod.broadcast(state.variables)
    state.check_replicas(job.world, f"before step {state.step}")
    parameters = sum(int(np.prod(variable.shape)) for variable in state.model.trainable_variables)
    report.announce(parameters, kernels, state.step, saved)


def enter(span: Span, job: Job, state: State, report: AnyReport) -> None:
    """At the start of a phase, set the state to the end of its parent, which need not be the phase before it."""
    if span.steps.start != span.phase_first:
        return  # resumed inside the phase
    ends = schedule.end_steps(job.phases)
    parent = span.phase.parent
    if parent is not None and ends[parent] != span.phase_first:
        _restore(job, state, checkpoint.folder(job.run_dir, ends[parent]))
        horovod.broadcast(state.variables)
        report.say(f"{span.phase.name} starts from the end of {parent}")
    if span.phase.velocity == "reset":
        state.reset_slots()


def check_loss(loss: float, span: Span, rates: Rates, job: Job, state: State, writer: Writer) -> None:
    """Raise NotFinite, on all ranks alike, if the loss of the last step is not finite."""
    if np.isfinite(loss):
        return
    job.world.on_rank0(writer.finish)  # the message names the last checkpoint
    saved = "no checkpoint yet" if state.saved_step is None else f"last checkpoint after step {state.saved_step}"
    raise NotFinite(
        f"loss is {loss} in step {state.step - 1} (phase {span.phase.name}, LR {rates.lr:g}), {saved}; start again in "
        "another --run_dir with a lower LR or a longer warm-up",
        collective=True,
    )


def save(job: Job, state: State, report: AnyReport, writer: Writer, kernels: List[str], wait: bool) -> None:
    """Begin to publish a checkpoint from rank 0, or do so to the end if `wait`.

    Every rank learns whether the one before, or with `wait` this one, was published.
    """
    state.check_replicas(job.world, f"after step {state.step}")

    def begin() -> None:
        writer.finish()  # before the copy: memory for one is enough
        path, groups = checkpoint.folder(job.run_dir, state.step), state.arrays()
        info = {
            "step": state.step,
            "signature": job.signature,
            "layout": job.grouping,
            "attempt": job.attempt,
            **report.times(),
            "versions": provenance.versions(),
            "kernels": kernels[job.world.rank],
        }
        writer.start(lambda: publish(job, path, groups, info))

    job.world.on_rank0(begin)
    if wait:
        job.world.on_rank0(writer.finish)
    state.saved_step = state.step
    report.saved(
        job.world.gather({"peak_memory_gib": provenance.peak_memory_gib(), "bad_records": job.skipped_records()})
    )


def publish(job: Job, path: str, groups: Dict[str, checkpoint.Arrays], info: Dict[str, Any]) -> None:
    """Publish a checkpoint on rank 0 and then remove those that it replaces."""
    assert job.folder is not None  # on rank 0
    job.folder.check()
    checkpoint.save(path, groups, info)
    keep = job.settings.run.keep_checkpoints
    checkpoint.prune(job.run_dir, keep, lambda oldest: schedule.still_needed(job.phases, oldest))


def evaluate(job: Job, state: State, evaluate_step: Any, report: AnyReport, watchdog: guard.Watchdog) -> None:
    """Evaluate on all ranks and record the score; at the end of a member's phase, keep its predictions as well."""
    assert job.data is not None  # Job.evaluation_due
    started = time.perf_counter()
    faults.point("evaluation")
    inputs = evaluate_step, job.settings, job.world, job.data, job.batch.per_rank, watchdog.beat
    member = job.member_due(state.step)
    if member is None:
        score = evaluation.evaluate(*inputs)
    else:
        score, predictions = evaluation.predict(*inputs)
        path, content = checkpoint.member_folder(job.run_dir, member), job.data.validation.content
        job.world.on_rank0(lambda: ensemble.save(path, predictions, job.settings, content))
    state.check_replicas(job.world, f"after step {state.step}")
    report.evaluation(state.step, score, time.perf_counter() - started)


def _restore(job: Job, state: State, path: str) -> Dict[str, Any]:
    """Set rank 0's state from the checkpoint `path`; return its manifest on all ranks."""

    def restore() -> Dict[str, Any]:
        state.restore(path)
        return checkpoint.read_manifest(path)

    return job.world.on_rank0(restore)


def _initialise_from(job: Job, state: State) -> None:
    """Take the weights of --init_from; write a line per array to init_from.txt and print a summary."""
    assert job.init_from is not None and job.folder is not None
    path, file = job.init_from["path"], job.init_from["file"]
    if not os.path.isfile(file) or sha256_of(file) != job.init_from["sha256"]:
        raise CheckpointError(
            f"--init_from={path}: {file} was changed or removed after this run began; choose another --run_dir"
        )
    taken, initial, lines = take_over(state.model, file)
    job.folder.write_text("init_from.txt", "\n".join(lines) + "\n")
    print(
        f"--init_from={path}: {taken} arrays taken"
        + (f"; as initialised: {', '.join(initial)}" if initial else "")
        + f"; a line per array in {job.folder.file('init_from.txt')}",
        file=sys.stderr,
        flush=True,
    )
