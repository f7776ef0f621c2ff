"""Evaluation that counts every example exactly once, for any number of ranks and any batch size."""

import dataclasses
from typing import Callable, Iterator, Optional, Tuple

import numpy as np
import tensorflow as tf

from resnet_cpu.cluster import horovod
from resnet_cpu.data import order
from resnet_cpu.data.pipeline import Batch
from resnet_cpu.errors import UserError


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
    """Return a function of (images, labels, weights) that sums one batch: (int64 [count, top1, top5], float64 loss)."""

    @tf.function
    def evaluate_step(images: tf.Tensor, labels: tf.Tensor, weights: tf.Tensor) -> Tuple[tf.Tensor, tf.Tensor]:
        logits = tf.cast(model(images, training=False), tf.float32)
        losses = tf.cast(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits), tf.float64)
        classes = logits.shape[-1]
        hits = [tf.cast(tf.math.in_top_k(labels, logits, min(k, classes)), tf.int64) for k in (1, 5)]
        # A padded example has weight 0. Where, not a product: 0 * inf would be no number.
        loss = tf.reduce_sum(tf.where(weights > 0, losses, 0.0))
        return tf.stack([tf.reduce_sum(weights), *(tf.reduce_sum(hit * weights) for hit in hits)]), loss

    return evaluate_step


def evaluate(
    evaluate_step: Callable,
    batches: Iterator[Batch],
    *,
    examples: int,
    rank: int,
    ranks: int,
    batch_size: int,
    beat: Optional[Callable[[], None]] = None,
) -> Score:
    """Evaluate over all ranks; raise UserError if the examples counted are not exactly `examples`."""
    counts, loss = np.zeros(3, np.int64), 0.0
    for step, (_, images, labels) in enumerate(batches):
        _, weights = order.evaluation_batch(step, rank, ranks, batch_size, examples)
        batch_counts, batch_loss = evaluate_step(images, labels, tf.constant(weights))
        counts += batch_counts.numpy()
        loss += float(batch_loss)
        if beat is not None:
            beat()
    counts = horovod.total(tf.constant(counts), "evaluation_counts").numpy()
    loss = float(horovod.total(tf.constant(loss, tf.float64), "evaluation_loss"))
    if counts[0] != examples:
        raise UserError(f"evaluation counted {counts[0]} examples of {examples}", collective=True)
    return Score(int(counts[0]), int(counts[1]), int(counts[2]), loss / examples)
