"""Evaluation that counts every example exactly once, for any number of ranks and any batch size."""

import dataclasses
import sys
from typing import Any, Callable, Dict, List, Optional, Tuple

import numpy as np
import tensorflow as tf

from resnet_cpu.cluster import guard, horovod
from resnet_cpu.cluster.control import World
from resnet_cpu.data import order, preprocess
from resnet_cpu.data.batches import check_label_base, evaluation_batches
from resnet_cpu.data.folders import ShardedData
from resnet_cpu.errors import UserError
from resnet_cpu.recipe.batch import DEFAULT_BATCH_PER_RANK
from resnet_cpu.run import checkpoint
from resnet_cpu.settings import Settings
from resnet_cpu.training import export, state
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
    """Return a function of a batch's images, labels [batch] and weights [batch] (0 for padding, else 1).

    It returns the sums int64 [examples, top-1 hits, top-5 hits], the sum of the losses, float64, and the probabilities,
    float32 [batch, classes].
    """

    @tf.function(autograph=False)
    def evaluate_step(
        images: tf.Tensor, labels: tf.Tensor, weights: tf.Tensor
    ) -> Tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        logits = tf.cast(model(images, training=False), tf.float32)
        losses = tf.cast(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits), tf.float64)
        # The rank of the label among the logits. Of equal logits the first counts, as in argmax: a network with the
        # same logit for every class is not right about all of them. One with NaN is right about none.
        own = tf.gather(logits, labels, batch_dims=1)[:, None]
        before = (logits > own) | ((logits == own) & (tf.range(logits.shape[-1], dtype=tf.int64) < labels[:, None]))
        rank = tf.reduce_sum(tf.cast(before, tf.int32), 1)
        known = tf.reduce_all(tf.math.is_finite(logits), 1)
        hits = [tf.cast((rank < k) & known, tf.int64) for k in (1, 5)]
        # A padded example has weight 0. tf.where, not a product: 0 * inf would be NaN.
        loss = tf.reduce_sum(tf.where(weights > 0, losses, 0.0))
        counts = tf.stack([tf.reduce_sum(weights), *(tf.reduce_sum(hit * weights) for hit in hits)])
        return counts, loss, tf.nn.softmax(logits)

    return evaluate_step


#: Predictions for a batch: ids int64, labels int64, probabilities float32 [batch, classes].
BatchPredictions = Tuple[np.ndarray, np.ndarray, np.ndarray]


def evaluate(
    evaluate_step: Callable,
    settings: Settings,
    world: World,
    data: ShardedData,
    batch_size: int,
    beat: Callable[[], None] = lambda: None,
    predictions: Optional[List[BatchPredictions]] = None,
) -> Score:
    """Evaluate the whole validation split over all ranks.

    Args:
        evaluate_step: of `make_evaluate_step`.
        batch_size: images per rank and batch, unless --eval_batch_size is given.
        beat: called after each batch.
        predictions: list that the predictions for this rank's examples are appended to, without padding.

    Raises:
        UserError: the examples counted are not exactly those of the split.
    """
    batch_size = settings.run.eval_batch_size or batch_size
    batches = evaluation_batches(settings, world, data, batch_size=batch_size)
    examples = data.validation.examples
    counts, loss = np.zeros(3, np.int64), 0.0
    for step, (ids, images, labels) in enumerate(batches):
        _, weights = order.evaluation_batch(step, world.rank, world.size, batch_size, examples)
        batch_counts, batch_loss, probabilities = evaluate_step(images, labels, tf.constant(weights))
        counts += batch_counts.numpy()
        loss += float(batch_loss)
        if predictions is not None:
            real = weights > 0
            predictions.append((ids[real], labels.numpy()[real], probabilities.numpy()[real]))
        beat()
    counts = horovod.total(tf.constant(counts), "evaluation_counts").numpy()
    loss = float(horovod.total(tf.constant(loss, tf.float64), "evaluation_loss"))
    if counts[0] != examples:
        raise UserError(f"evaluation counted {counts[0]} examples of {examples}", collective=True)
    return Score(int(counts[0]), int(counts[1]), int(counts[2]), loss / examples)


def predict(
    evaluate_step: Callable, settings: Settings, world: World, data: ShardedData, batch_size: int, beat: Callable
) -> Tuple[Score, Optional[Predictions]]:
    """Evaluate as `evaluate` does; on rank 0, return the predictions for all examples as well, in order of ids."""
    nothing = np.empty([0, settings.model.num_classes], np.float32)  # a rank may have had only padding
    mine: List[BatchPredictions] = [(np.empty([0], np.int64), np.empty([0], np.int64), nothing)]
    score = evaluate(evaluate_step, settings, world, data, batch_size, beat, mine)
    ids, labels, probabilities = (world.collect(np.concatenate(column)) for column in zip(*mine))
    if ids is None or labels is None or probabilities is None:
        return score, None
    places = np.argsort(ids)
    return score, Predictions(ids[places], labels[places], probabilities[places])


def restored_model(settings: Settings, world: World, data: ShardedData, path: str) -> tf.keras.Model:
    """Return the network of the settings with the weights of the checkpoint `path`, on every rank."""
    model = state.build_model(settings)
    world.on_rank0(lambda: check_label_base(settings, data))
    world.on_rank0(lambda: state.load_weights(model, path))
    horovod.broadcast(model.variables)
    return model


def evaluate_checkpoint(
    settings: Settings, world: World, data: ShardedData, path: str, export_to: Optional[str] = None
) -> Dict[str, Any]:
    """Return the scores of the weights of a checkpoint, in a job of its own; write them to `export_to` if given.

    The ranks share the images; rank 0 alone reads and writes files.
    """
    with guard.Watchdog(settings.system.stall_timeout) as watchdog:
        horovod.start(world)
        if export_to is not None:
            world.on_rank0(lambda: checkpoint.check_export(export_to))
        if world.rank == 0:
            print(f"evaluating {path} on {data.validation.examples:,} images", file=sys.stderr, flush=True)
        model = restored_model(settings, world, data, path)
        step = make_evaluate_step(model)
        score = evaluate(step, settings, world, data, DEFAULT_BATCH_PER_RANK, watchdog.beat)
        if export_to is not None:
            view, target = preprocess.make_view(settings.data, data, settings.data.image_size), export_to
            world.on_rank0(lambda: export.write(model, view, target))
    return {"examples": score.examples, "top1": score.top1, "top5": score.top5, "loss": score.loss}
