"""Batch norm over a part of the batch at a time, as Intel's Caffe recipes ask for with `bn_stats_batch_size`."""

from typing import Any, List, Optional

import tensorflow as tf


class GhostBatchNormalization(tf.keras.layers.BatchNormalization):
    """Batch normalisation whose statistics are of `stats_batch` images each (Hoffer et al., arXiv 1705.08741).

    Images [batch, height, width, channels] are normalised in groups of `stats_batch` in their order; the moving
    statistics take the mean over the groups, as they do over ranks. So one rank of N groups computes what N ranks of a
    group each compute. `batch` must be a multiple of `stats_batch`.
    """

    def __init__(self, stats_batch: int, **options: Any) -> None:
        super().__init__(**options)
        self.stats_batch = stats_batch

    def call(self, inputs: tf.Tensor, training: Optional[bool] = None, mask: Any = None) -> tf.Tensor:
        if not training or inputs.shape[0] in (None, self.stats_batch):
            return super().call(inputs, training=training)
        outputs: List[tf.Tensor] = []
        means: List[tf.Tensor] = []
        variances: List[tf.Tensor] = []
        for group in tf.split(inputs, inputs.shape[0] // self.stats_batch):
            # The fused kernel that Keras calls for a whole batch; its variance has Bessel's correction.
            output, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
                x=group, scale=self.gamma, offset=self.beta, mean=[], variance=[], epsilon=self.epsilon
            )
            outputs.append(output)
            means.append(mean)
            variances.append(variance)
        for moving, seen in ((self.moving_mean, means), (self.moving_variance, variances)):
            mean_of_groups = tf.cast(tf.add_n(seen) / len(seen), moving.dtype)
            moving.assign_sub((moving - mean_of_groups) * (1.0 - self.momentum))
        return tf.concat(outputs, 0)

    def get_config(self) -> dict:
        return {**super().get_config(), "stats_batch": self.stats_batch}
