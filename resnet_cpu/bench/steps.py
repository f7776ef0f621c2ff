"""Timing of one part alone: training steps or forward passes on synthetic images, or the input pipeline."""

import dataclasses
import time
from typing import Callable, Iterator, List, Optional, Tuple

import numpy as np
import tensorflow as tf

from resnet_cpu.cluster import control, guard, horovod
from resnet_cpu.cluster.control import World
from resnet_cpu.data import synthetic
from resnet_cpu.data.batches import TrainingBatch, training_batches
from resnet_cpu.data.folders import ShardedData
from resnet_cpu.errors import FlagError
from resnet_cpu.model.kernels import library
from resnet_cpu.recipe.batch import Batch
from resnet_cpu.recipe.schedule import Rates
from resnet_cpu.resolve import resolve_batch
from resnet_cpu.settings import Settings
from resnet_cpu.text import count
from resnet_cpu.training import evaluation, opening
from resnet_cpu.training.state import build_model
from resnet_cpu.training.step import TrainStep


@dataclasses.dataclass(frozen=True)
class StepTimings:
    """Step times of all ranks, seconds [ranks, steps], and what a step is."""

    what: str
    step_s: np.ndarray
    batch_size: int  # images per rank
    cores: int  # of all ranks
    update_s: Optional[np.ndarray] = None  # part of it after the last gradient, [ranks, steps]; of training only

    @property
    def images_per_second(self) -> float:
        """Return the images of all ranks over the time of the slowest rank."""
        ranks, steps = self.step_s.shape
        return ranks * steps * self.batch_size / self.step_s.sum(1).max()

    def lines(self) -> List[str]:
        """Return a summary for people."""
        ranks, steps = self.step_s.shape
        low, middle, high = np.percentile(self.step_s, [10, 50, 90]) * 1000
        split = []
        if self.update_s is not None:
            share = 100 * self.update_s.sum() / self.step_s.sum()
            split = [f"of a step: {share:.1f} % after the last gradient (messages not hidden, peers, update)"]
        return [
            f"{self.what}: {count(ranks, 'rank')} x {count(self.batch_size, 'image')}, {count(steps, 'step')} timed",
            f"step: median {middle:.2f} ms, 10-90 % {low:.2f} ... {high:.2f} ms; slowest rank "
            f"{self.step_s.sum(1).max() / self.step_s.sum(1).min():.3f} times the fastest",
            *split,
            f"images/sec per core: {self.images_per_second / self.cores:.3f}",
        ]


def run(settings: Settings, world: World) -> StepTimings:
    """Return the times of --timed_steps steps of --benchmark, after --warmup_steps that are not timed."""
    flags = settings.benchmark
    with control.same_on_all_ranks():
        batch = resolve_batch(settings, world.size)
    if flags.benchmark == "evaluation":
        size = settings.run.eval_batch_size or batch.per_rank
        batch = Batch(size, 1, size * world.size)
    data = opening.open_data(settings, world) if flags.benchmark == "pipeline" else None
    steps = flags.warmup_steps + flags.timed_steps
    with guard.Watchdog(settings.system.stall_timeout) as watchdog:
        horovod.start(world)
        if flags.benchmark == "pipeline":
            if data is None:
                raise FlagError("--benchmark=pipeline: --dataset=synthetic reads nothing; give a --dataset", True)
            one_step = _reading(settings, world, data, batch, steps)
        elif flags.benchmark == "synthetic":
            one_step = _training(settings, world, batch, steps)
        else:
            one_step = _forward(settings, world, batch, steps)
        seconds, updates = [], []
        for step in range(steps):
            started = time.perf_counter()
            update_s = one_step()
            if step >= flags.warmup_steps:
                seconds.append(time.perf_counter() - started)
                updates.append(update_s)
            watchdog.beat()
    return StepTimings(
        flags.benchmark,
        np.array(world.gather(seconds)),
        batch.per_rank * batch.accumulate_steps,
        sum(world.gather(world.cores)),
        np.array(world.gather(updates)) if flags.benchmark == "synthetic" else None,
    )


STILL = Rates(0.0, 0.0, 0.0)  # a step at these costs as much as any other, and never diverges


def synthetic_training(
    settings: Settings, world: World, batch: Batch, steps: int
) -> Tuple[TrainStep, Iterator[TrainingBatch]]:
    """Return a new model's training step, and synthetic batches for `steps` of them."""
    fused, _ = library.agree(settings, world)
    train_step = TrainStep(build_model(settings, fused), settings.recipe, batch.accumulate_steps, fused)
    return train_step, _synthetic_batches(settings, world, batch, steps)


def _training(settings: Settings, world: World, batch: Batch, steps: int) -> Callable[[], Optional[float]]:
    train_step, batches = synthetic_training(settings, world, batch, steps)

    def train() -> float:
        return train_step.take(batches, STILL).update_s

    return train


def _forward(settings: Settings, world: World, batch: Batch, steps: int) -> Callable[[], Optional[float]]:
    evaluate_step = evaluation.make_evaluate_step(build_model(settings))
    batches = _synthetic_batches(settings, world, batch, steps)
    weights = tf.ones([batch.per_rank], tf.int64)

    def forward() -> None:
        evaluate_step(*next(batches), weights)[0].numpy()

    return forward


def _synthetic_batches(settings: Settings, world: World, batch: Batch, steps: int) -> Iterator[TrainingBatch]:
    return training_batches(
        settings,
        world,
        None,
        examples=max(synthetic.POOL, batch.total),
        batch=batch,
        first_step=0,
        last_step=steps,
        augment="none",
        image_size=settings.data.image_size,
    )


def _reading(
    settings: Settings, world: World, data: ShardedData, batch: Batch, steps: int
) -> Callable[[], Optional[float]]:
    with control.same_on_all_ranks():
        examples = opening.examples(settings, data)[0]
    batches = training_batches(
        settings,
        world,
        data,
        examples=examples,
        batch=batch,
        first_step=0,
        last_step=steps,
        augment=settings.recipe.phases[0].values.get("augment", "full") if settings.recipe.phases else "full",
        image_size=settings.data.image_size,
    )

    def read() -> None:
        for _ in range(batch.accumulate_steps):
            next(batches)

    return read
