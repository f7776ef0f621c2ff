"""Timing of one part alone: training steps or forward passes on images that cost nothing, or the input pipeline."""

import dataclasses
import time
from typing import Callable, List, Optional

import numpy as np
import tensorflow as tf

from resnet_cpu.cluster import guard, horovod
from resnet_cpu.cluster.control import World
from resnet_cpu.data import pipeline, synthetic
from resnet_cpu.data.layouts import ShardedData
from resnet_cpu.errors import FlagError
from resnet_cpu.recipe import batch_rule
from resnet_cpu.settings import Settings
from resnet_cpu.training import evaluation
from resnet_cpu.training.state import build_model
from resnet_cpu.training.step import make_knobs, make_optimizer, make_train_step


@dataclasses.dataclass(frozen=True)
class Timed:
    """Step times of all ranks, seconds [ranks, steps], and what a step is."""

    what: str
    step_s: np.ndarray
    batch_size: int  # images per rank
    cores: int  # of all ranks

    @property
    def images_per_second(self) -> float:
        """Images of all ranks over the time of the slowest."""
        ranks, steps = self.step_s.shape
        return ranks * steps * self.batch_size / self.step_s.sum(1).max()

    def lines(self) -> List[str]:
        """Return what a person wants to see of it."""
        ranks, steps = self.step_s.shape
        low, middle, high = np.percentile(self.step_s, [10, 50, 90]) * 1000
        return [
            f"{self.what}: {ranks} ranks x {self.batch_size} images, {steps} steps timed",
            f"step: median {middle:.2f} ms, 10-90 % {low:.2f} ... {high:.2f} ms; slowest rank "
            f"{self.step_s.sum(1).max() / self.step_s.sum(1).min():.3f} times the fastest",
            f"images/sec per core: {self.images_per_second / self.cores:.3f}",
        ]


def run(
    settings: Settings, world: World, data: Optional[ShardedData], what: str, warmup_steps: int, timed_steps: int
) -> Timed:
    """Return the times of `timed_steps` steps after `warmup_steps` that are not counted."""
    batch_size, _ = batch_rule.resolve_batch(settings.recipe.batch_size, settings.recipe.global_batch_size, world.size)
    steps = warmup_steps + timed_steps
    with guard.Watchdog(settings.system.stall_timeout) as watchdog:
        horovod.start(world)
        if what == "pipeline":
            if data is None:
                raise FlagError("--benchmark=pipeline: --dataset=synthetic reads nothing; give a --dataset", True)
            one_step = _reading(settings, world, data, batch_size, steps)
        else:
            one_step = _computing(settings, world, batch_size, steps, training=what == "synthetic")
        seconds = []
        for step in range(steps):
            started = time.perf_counter()
            one_step()
            if step >= warmup_steps:
                seconds.append(time.perf_counter() - started)
            watchdog.beat()
    return Timed(what, np.array(world.gather(seconds)), batch_size, sum(world.gather(world.cores)))


def _computing(settings: Settings, world: World, batch_size: int, steps: int, training: bool) -> Callable[[], object]:
    model = build_model(settings)
    batches = synthetic.training_batches(
        image_size=settings.data.image_size,
        num_classes=settings.model.num_classes,
        examples=max(synthetic.POOL, batch_size * world.size),
        seed=settings.recipe.seed,
        first_step=0,
        last_step=steps,
        rank=world.rank,
        ranks=world.size,
        batch_size=batch_size,
        threads=settings.data.data_threads or world.cores,
    )
    if not training:
        evaluate_step = evaluation.make_evaluate_step(model)
        weights = tf.ones([batch_size], tf.int64)
        return lambda: evaluate_step(*next(batches)[1:], weights)[0].numpy()
    knobs = make_knobs()
    train_step = make_train_step(model, make_optimizer(model, knobs, settings.recipe.wd_on_bn), knobs)
    rate, go_on = tf.constant(0.0), tf.constant(0.0)  # a rate of 0 costs the same and never diverges
    return lambda: train_step(*next(batches)[1:], rate, go_on).numpy()


def _reading(settings: Settings, world: World, data: ShardedData, batch_size: int, steps: int) -> Callable[[], object]:
    augment = settings.recipe.phases[0].values.get("augment", "full") if settings.recipe.phases else "full"
    batches = pipeline.training_batches(
        data,
        pipeline.make_view(settings.data, data, settings.data.image_size),
        augment,
        examples=settings.data.train_examples or data.train.examples,
        seed=settings.recipe.seed,
        first_step=0,
        last_step=steps,
        rank=world.rank,
        ranks=world.size,
        batch_size=batch_size,
        order_block=settings.data.order_block,
        num_classes=settings.model.num_classes,
        threads=settings.data.data_threads or world.cores,
    )
    return lambda: next(batches)
