"""The members of an ensemble in training: kept when their phase ends, scored together at the end of the run."""

from typing import Any, Callable, Dict, List, Sequence, Tuple

from resnet_cpu.cluster import guard, horovod
from resnet_cpu.cluster.control import World
from resnet_cpu.data.folders import ShardedData
from resnet_cpu.recipe import schedule
from resnet_cpu.recipe.batch import DEFAULT_BATCH_PER_RANK
from resnet_cpu.run import checkpoint
from resnet_cpu.run.writer import Writer
from resnet_cpu.settings import Settings
from resnet_cpu.training import ensemble, evaluation
from resnet_cpu.training.job import Job
from resnet_cpu.training.state import State


def keep(job: Job, state: State, name: str, writer: Writer) -> None:
    """Publish the weights of the member `name`, whose phase has just ended.

    The loop calls this before it saves the checkpoint of the same step, which waits for it: if the run is cut off in
    between, it is resumed from an earlier checkpoint and publishes the same bits again.
    """
    state.check_replicas(job.world, f"at the end of {name}")

    def begin() -> None:
        writer.finish()
        assert job.folder is not None  # on rank 0
        job.folder.check()
        path, groups = checkpoint.member_folder(job.run_dir, name), {"weights": state.arrays()["weights"]}
        info = {"step": state.step, "signature": job.signature, "phase": name}
        writer.start(lambda: checkpoint.save(path, groups, info))

    job.world.on_rank0(begin)


def scores(job: Job, step: int, beat: Callable[[], None]) -> Dict[str, Any]:
    """Return the scores of the members that are complete after `step` steps, and of their ensemble; {} without any."""
    ends = schedule.end_steps(job.phases)
    complete = [phase.name for phase in job.phases if phase.member and ends[phase.name] <= step]
    if job.data is None or not job.evaluates or not complete:
        return {}
    content = job.data.validation.content
    paths = dict(zip(complete, job.world.on_rank0(lambda: ensemble.find(job.run_dir, complete))))

    def without_predictions(beat_all: Callable[[], None]) -> List[str]:
        missing = []
        for path in paths.values():
            if not ensemble.has_predictions(path, job.settings, content=content):
                missing.append(path)
            beat_all()
        return missing

    # Predictions may have been removed, or made with other evaluation flags, since the member was evaluated.
    for path in job.world.on_rank0_with_beats(without_predictions, beat):
        make_predictions(path, job.settings, job.world, job.data, beat)

    def report(beat_all: Callable[[], None]) -> Dict[str, Any]:
        predictions = {}
        for name, path in paths.items():
            predictions[name] = ensemble.load(path)
            beat_all()
        return ensemble.report(predictions, beat_all)

    return job.world.on_rank0_with_beats(report, beat)


def make_predictions(path: str, settings: Settings, world: World, data: ShardedData, beat: Callable[[], None]) -> None:
    """Evaluate the member at `path` and save its predictions beside its weights."""
    step = evaluation.make_evaluate_step(evaluation.restored_model(settings, world, data, path))
    _, predictions = evaluation.predict(step, settings, world, data, DEFAULT_BATCH_PER_RANK, beat)
    world.on_rank0(lambda: ensemble.save(path, predictions, settings, data.validation.content))


def make_missing_predictions(members: Sequence[Tuple[str, Settings, ShardedData]], world: World) -> None:
    """Evaluate members, (folder, settings, data) each, in a job of its own, and save their predictions."""
    with guard.Watchdog(members[0][1].system.stall_timeout) as watchdog:
        horovod.start(world)
        for path, settings, data in members:
            make_predictions(path, settings, world, data, watchdog.beat)
