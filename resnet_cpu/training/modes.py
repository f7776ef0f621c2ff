"""Return what each mode of --experiment adds to the result of a run. Training itself is the same in every mode."""

import socket
from typing import Any, Dict

import numpy as np

from resnet_cpu.recipe.batch import REFERENCE_BATCH
from resnet_cpu.scaling import steptimes
from resnet_cpu.training.job import Job


def additions(job: Job, step_times: steptimes.StepTimes) -> Dict[str, Any]:
    """Return what the mode of the run adds to result.json; all ranks call it."""
    record = {"lr_scaling": _lr_scaling, "scaling": _scaling}.get(job.settings.run.experiment)
    return record(job, step_times) if record else {}


def _lr_scaling(job: Job, step_times: steptimes.StepTimes) -> Dict[str, Any]:
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


def _scaling(job: Job, step_times: steptimes.StepTimes) -> Dict[str, Any]:
    """Gather the step times of all ranks; return their summary and write scaling.json and step_times.npz."""
    steps, mine = step_times.kept()
    if not len(steps):  # the same on all ranks
        return {}
    hosts, times = job.world.gather(socket.gethostname()), job.world.collect(mine[None])

    def write() -> Dict[str, Any]:
        assert times is not None and job.folder is not None  # on rank 0
        found = steptimes.summary(times, job.batch.total, hosts)
        np.savez(job.folder.file("step_times.npz"), steps=steps, seconds=times, hosts=np.array(hosts))
        job.folder.write_json("scaling.json", {**found, **steptimes.per_rank(times, hosts)})
        return {key: value for key, value in found.items() if key != "block_s"}

    return {"scaling": job.world.on_rank0(write)}
