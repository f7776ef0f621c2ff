"""Timing of one part alone: training steps or forward passes on images that cost nothing, or the input pipeline."""

import dataclasses
import time
from typing import Callable, List, Optional

import numpy as np
import tensorflow as tf

from resnet_cpu.cluster import guard, horovod
from resnet_cpu.cluster.control import World
from resnet_cpu.data import synthetic
from resnet_cpu.data.folders import ShardedData
from resnet_cpu.errors import FlagError
from resnet_cpu.recipe import batch as batch_rule
from resnet_cpu.settings import Settings
from resnet_cpu.training import evaluation
from resnet_cpu.training import opening as job
from resnet_cpu.training.batches import training_batches
from resnet_cpu.training.state import build_model
from resnet_cpu.training.step import TrainStep, make_knobs, make_optimizer


@dataclasses.dataclass(frozen=True)
class Timed:
    """Step times of all ranks, seconds [ranks, steps], and what a step is."""

    what: str
    step_s: np.ndarray
    batch_size: int  # images per rank
    cores: int  # of all ranks
    update_s: Optional[np.ndarray] = None  # of it after the last gradient, seconds [ranks, steps]; of training only

    @property
    def images_per_second(self) -> float:
        """Images of all ranks over the time of the slowest."""
        ranks, steps = self.step_s.shape
        return ranks * steps * self.batch_size / self.step_s.sum(1).max()

    def lines(self) -> List[str]:
        """Return what a person wants to see of it."""
        ranks, steps = self.step_s.shape
        low, middle, high = np.percentile(self.step_s, [10, 50, 90]) * 1000
        split = []
        if self.update_s is not None:
            share = 100 * self.update_s.sum() / self.step_s.sum()
            split = [f"of a step: {share:.1f} % after the last gradient (messages not hidden, peers, update)"]
        return [
            f"{self.what}: {ranks} ranks x {self.batch_size} images, {steps} steps timed",
            f"step: median {middle:.2f} ms, 10-90 % {low:.2f} ... {high:.2f} ms; slowest rank "
            f"{self.step_s.sum(1).max() / self.step_s.sum(1).min():.3f} times the fastest",
            *split,
            f"images/sec per core: {self.images_per_second / self.cores:.3f}",
        ]


def run(
    settings: Settings,
    world: World,
    data: Optional[ShardedData],
    what: str,
    warmup_steps: int,
    timed_steps: int,
    timed_seconds: Optional[float] = None,
) -> Timed:
    """Return the times of `timed_steps` steps after `warmup_steps` that are not counted.

    Past `timed_seconds` timing ends with fewer steps, two at least, after the same one on all ranks.
    """
    recipe = settings.recipe
    batch = batch_rule.resolve_batch(recipe.batch_size, recipe.global_batch_size, world.size, recipe.accumulate_steps)
    batch_rule.check_statistics(settings.model.bn_stats_batch, batch)
    steps = warmup_steps + timed_steps
    with guard.Watchdog(settings.system.stall_timeout) as watchdog:
        horovod.start(world)
        if what == "pipeline":
            if data is None:
                raise FlagError("--benchmark=pipeline: --dataset=synthetic reads nothing; give a --dataset", True)
            one_step = _reading(settings, world, data, batch, steps)
        else:
            one_step = _computing(settings, world, batch, steps, training=what == "synthetic")
        seconds, updates = [], []
        for step in range(steps):
            started = time.perf_counter()
            update_s = one_step()
            if step >= warmup_steps:
                seconds.append(time.perf_counter() - started)
                updates.append(update_s)
            watchdog.beat()
            if timed_seconds is not None and len(seconds) >= 2 and world.broadcast(sum(seconds) > timed_seconds):
                break
    return Timed(
        what,
        np.array(world.gather(seconds)),
        batch.per_rank * batch.accumulate_steps,
        sum(world.gather(world.cores)),
        np.array(world.gather(updates)) if what == "synthetic" else None,
    )


def _computing(
    settings: Settings, world: World, batch: batch_rule.Batch, steps: int, training: bool
) -> Callable[[], Optional[float]]:
    model = build_model(settings)
    batches = training_batches(
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
    if not training:
        evaluate_step = evaluation.make_evaluate_step(model)
        weights = tf.ones([batch.per_rank], tf.int64)

        def forward() -> None:
            for _ in range(batch.accumulate_steps):
                evaluate_step(*next(batches)[1:], weights)[0].numpy()

        return forward
    knobs = make_knobs()
    optimizer = make_optimizer(model, knobs, settings.recipe)
    train_step = TrainStep(model, optimizer, knobs, batch.accumulate_steps, settings.recipe.label_smoothing)
    rate, go_on = tf.constant(0.0), tf.constant(0.0)  # a rate of 0 costs the same and never diverges

    def train() -> float:
        return train_step.take(batches, rate, go_on)[0].update_s

    return train


def _reading(
    settings: Settings, world: World, data: ShardedData, batch: batch_rule.Batch, steps: int
) -> Callable[[], Optional[float]]:
    batches = training_batches(
        settings,
        world,
        data,
        examples=job.examples(settings, data)[0],
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
