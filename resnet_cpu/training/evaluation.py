"""Evaluation that counts every example exactly once, for any number of ranks and any batch size."""

import dataclasses
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np
import tensorflow as tf

from resnet_cpu.cluster import guard, horovod
from resnet_cpu.cluster.control import World
from resnet_cpu.data import batches as pipeline
from resnet_cpu.data import order
from resnet_cpu.data.folders import ShardedData
from resnet_cpu.errors import UserError
from resnet_cpu.recipe import batch as batch_rule
from resnet_cpu.run import checkpoint
from resnet_cpu.settings import Settings
from resnet_cpu.training import ensemble, export, state
from resnet_cpu.training.ensemble import Predictions


@dataclasses.dataclass(frozen=True)
class Score:
    """Counts over the whole evaluation set; `loss` is the mean cross-entropy without smoothing."""

    examples: int
    correct1: int
    correct5: int
    loss: float

    @property
    def top1(self) -> float:
        return self.correct1 / self.examples

    @property
    def top5(self) -> float:
        return self.correct5 / self.examples


def make_evaluate_step(model: tf.keras.Model) -> Callable:
    """Return a function of (images, labels, weights) that sums one batch.

    It gives (int64 [count, top1, top5], float64 loss, float32 [batch, classes] probabilities).
    """

    @tf.function
    def evaluate_step(
        images: tf.Tensor, labels: tf.Tensor, weights: tf.Tensor
    ) -> Tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        logits = tf.cast(model(images, training=False), tf.float32)
        losses = tf.cast(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits), tf.float64)
        # The rank of the label among the logits; of equal ones the first counts, as in argmax, so that a network that
        # says the same of every class is not right about all of them. One that says NaN is right about none.
        own = tf.gather(logits, labels, batch_dims=1)[:, None]
        before = (logits > own) | ((logits == own) & (tf.range(logits.shape[-1], dtype=tf.int64) < labels[:, None]))
        rank = tf.reduce_sum(tf.cast(before, tf.int32), 1)
        known = tf.reduce_all(tf.math.is_finite(logits), 1)
        hits = [tf.cast((rank < k) & known, tf.int64) for k in (1, 5)]
        # A padded example has weight 0. Where, not a product: 0 * inf would be no number.
        loss = tf.reduce_sum(tf.where(weights > 0, losses, 0.0))
        counts = tf.stack([tf.reduce_sum(weights), *(tf.reduce_sum(hit * weights) for hit in hits)])
        return counts, loss, tf.nn.softmax(logits)

    return evaluate_step


# What was said of a batch: ids int64, labels int64, probabilities float32 [batch, classes].
Said = Tuple[np.ndarray, np.ndarray, np.ndarray]


def evaluate(
    evaluate_step: Callable,
    settings: Settings,
    world: World,
    data: ShardedData,
    batch_size: int,
    beat: Callable[[], None] = lambda: None,
    said: Optional[List[Said]] = None,
) -> Score:
    """Evaluate the whole validation split over all ranks, `--eval_batch_size` or `batch_size` images each at a time.

    Calls `beat` after each batch, and adds what was said of its examples, without padding, to `said` if given. Raises
    UserError if the examples counted are not exactly those of the split.
    """
    batch_size = settings.run.eval_batch_size or batch_size
    batches = pipeline.evaluation_batches(
        data,
        pipeline.make_view(settings.data, data, settings.data.image_size),
        rank=world.rank,
        ranks=world.size,
        batch_size=batch_size,
        num_classes=settings.model.num_classes,
        threads=settings.data.data_threads or world.cores,
    )
    examples = data.validation.examples
    counts, loss = np.zeros(3, np.int64), 0.0
    for step, (ids, images, labels) in enumerate(batches):
        _, weights = order.evaluation_batch(step, world.rank, world.size, batch_size, examples)
        batch_counts, batch_loss, probabilities = evaluate_step(images, labels, tf.constant(weights))
        counts += batch_counts.numpy()
        loss += float(batch_loss)
        if said is not None:
            real = weights > 0
            said.append((ids[real], labels.numpy()[real], probabilities.numpy()[real]))
        beat()
    counts = horovod.total(tf.constant(counts), "evaluation_counts").numpy()
    loss = float(horovod.total(tf.constant(loss, tf.float64), "evaluation_loss"))
    if counts[0] != examples:
        raise UserError(f"evaluation counted {counts[0]} examples of {examples}", collective=True)
    return Score(int(counts[0]), int(counts[1]), int(counts[2]), loss / examples)


def predict(
    evaluate_step: Callable, settings: Settings, world: World, data: ShardedData, batch_size: int, beat: Callable
) -> Tuple[Score, Optional[Predictions]]:
    """Evaluate as `evaluate` does; on rank 0, return as well what was said of each example, in their order."""
    nothing = np.empty([0, settings.model.num_classes], np.float32)  # a rank may have had padding alone
    said: List[Said] = [(np.empty([0], np.int64), np.empty([0], np.int64), nothing)]
    score = evaluate(evaluate_step, settings, world, data, batch_size, beat, said)
    ids, labels, probabilities = (world.collect(np.concatenate(column)) for column in zip(*said))
    if ids is None or labels is None or probabilities is None:
        return score, None
    places = np.argsort(ids)
    return score, Predictions(ids[places], labels[places], probabilities[places])


def evaluate_members(members: Sequence[Tuple[str, Settings, ShardedData]], world: World) -> None:
    """Evaluate members (path, their settings, their data) in a job of its own; keep what they say."""
    with guard.Watchdog(members[0][1].system.stall_timeout) as watchdog:
        horovod.start(world)
        for path, settings, data in members:
            evaluate_member(path, settings, world, data, watchdog.beat)


def evaluate_member(path: str, settings: Settings, world: World, data: ShardedData, beat: Callable[[], None]) -> None:
    """Evaluate the ensemble's member at `path` and keep what it says beside its weights."""
    step = make_evaluate_step(_loaded(settings, world, data, path))
    _, predictions = predict(step, settings, world, data, batch_rule.DEFAULT_BATCH_PER_RANK, beat)
    world.on_rank0(lambda: ensemble.save(path, predictions, settings))


def _loaded(settings: Settings, world: World, data: ShardedData, path: str) -> tf.keras.Model:
    """Return the network of the settings with the weights of the checkpoint `path`, on every rank."""
    model = state.build_model(settings)
    world.on_rank0(lambda: pipeline.check_label_base(data, settings.model.num_classes))
    world.on_rank0(lambda: state.load_weights(model, path))
    horovod.broadcast(model.variables)
    return model


def evaluate_checkpoint(
    settings: Settings, world: World, data: ShardedData, path: str, export_to: Optional[str] = None
) -> Dict[str, Any]:
    """Return the scores of a checkpoint's weights; the ranks share the images, rank 0 alone reads and writes files."""
    with guard.Watchdog(settings.system.stall_timeout) as watchdog:
        horovod.start(world)
        if export_to is not None:
            world.on_rank0(lambda: checkpoint.check_export(export_to))
        model = _loaded(settings, world, data, path)
        step = make_evaluate_step(model)
        score = evaluate(step, settings, world, data, batch_rule.DEFAULT_BATCH_PER_RANK, watchdog.beat)
        if export_to is not None:
            view, target = pipeline.make_view(settings.data, data, settings.data.image_size), export_to
            world.on_rank0(lambda: export.write(model, view, target))
    return {"examples": score.examples, "top1": score.top1, "top5": score.top5, "loss": score.loss}
