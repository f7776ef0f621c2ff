"""Return what each mode of --experiment adds to the result of a run. Training itself is the same in every mode."""

import socket
import sys
from typing import Any, Dict

import numpy as np

from resnet_cpu.recipe.batch import REFERENCE_BATCH
from resnet_cpu.scaling import steptimes
from resnet_cpu.text import count
from resnet_cpu.training.job import Job


def record(job: Job, step_times: steptimes.StepTimes) -> None:
    """Write what the mode has measured so far; all ranks call it before each checkpoint.

    After the last checkpoint no step is trained again, so the measurement must be on disk by then.
    """
    if job.settings.run.experiment == "scaling":
        _write_scaling(job, step_times)


def additions(job: Job) -> Dict[str, Any]:
    """Return what the mode of the run adds to result.json, on rank 0."""
    of_mode = {"lr_scaling": _lr_scaling, "scaling": _scaling}.get(job.settings.run.experiment)
    return of_mode(job) if of_mode else {}


def _lr_scaling(job: Job) -> Dict[str, Any]:
    """Return how the learning rate follows from the global batch."""
    recipe, first = job.settings.recipe, job.phases[0]
    return {
        "lr_scaling": {
            "rule": recipe.lr_scaling if "lr_per_256" in recipe.phases[0].values else "absolute",
            "optimizer": recipe.optimizer,
            "peak_lr": first.lr,
            "peak_lr_per_256": first.lr * REFERENCE_BATCH / job.batch.total,
            "warmup_epochs": job.epoch(first.warmup_steps),
            "weight_decay": first.wd,
        }
    }


def _write_scaling(job: Job, step_times: steptimes.StepTimes) -> None:
    """Gather the step times of all ranks and write scaling.json and step_times.npz.

    Those of an earlier attempt stay if it had as many ranks and timed more steps.
    """
    steps, mine = step_times.kept()
    if not len(steps):  # the same on all ranks
        return
    places, times = job.world.gather((socket.gethostname(), job.world.cores)), job.world.collect(mine[None])
    hosts = [host for host, _ in places]

    def write() -> None:
        assert times is not None and job.folder is not None  # on rank 0
        earlier = steptimes.read(job.run_dir, job.world.size)
        if earlier is not None and earlier["timed_steps"] > len(steps):
            return
        found = steptimes.summary(times, job.batch.total, hosts)
        np.savez(job.folder.file("step_times.npz"), steps=steps, seconds=times, hosts=np.array(hosts))
        # A later attempt may have other flags and cores, and replaces those of the run folder.
        flags = [line for line in job.settings.resolved_flags.splitlines() if line.startswith("--")]
        of_attempt = {"attempt": job.attempt, "flags": flags, "cores": sum(cores for _, cores in places)}
        job.folder.write_json("scaling.json", {**of_attempt, **found, **steptimes.per_rank(times, hosts)})

    job.world.on_rank0(write)


def _scaling(job: Job) -> Dict[str, Any]:
    """Return the summary of scaling.json, without what it holds of each rank; warn if no step was timed."""
    if job.folder is None:  # not on rank 0
        return {}
    found = steptimes.read(job.run_dir, job.world.size)
    if found is None:
        print(
            f"WARNING: --experiment=scaling: no step was timed on {count(job.world.size, 'rank')} (docs/scaling.md, "
            "timed steps); the result has no scaling. Train more steps without interruption, in another --run_dir",
            file=sys.stderr,
            flush=True,
        )
        return {}
    summary = {key: value for key, value in found.items() if key not in ("block_s", "edges_s", "flags", "cores")}
    return {"scaling": {**summary, "ranks": len(found["ranks"])}}
