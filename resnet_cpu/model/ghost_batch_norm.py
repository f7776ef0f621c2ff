"""Batch norm with statistics over parts of the batch, as `bn_stats_batch_size` of Intel's Caffe."""

from typing import Any, List, Optional

import tensorflow as tf


class GhostBatchNormalization(tf.keras.layers.BatchNormalization):
    """Batch normalisation with statistics over `stats_batch` images each (Hoffer et al., arXiv 1705.08741).

    In training, images [batch, height, width, channels] are normalised in consecutive groups of `stats_batch`, and the
    moving statistics are updated with the mean over the groups. So a rank with N groups computes the same as N ranks
    with one group each. The batch dimension must be static and a multiple of `stats_batch`; ValueError otherwise.
    """

    def __init__(self, stats_batch: int, **options: Any) -> None:
        super().__init__(**options)
        self.stats_batch = stats_batch

    @tf.autograph.experimental.do_not_convert  # `training` is a Python value; converting takes seconds
    def call(self, inputs: tf.Tensor, training: Optional[bool] = None, mask: Any = None) -> tf.Tensor:
        groups = number_of_groups(self.name, inputs, self.stats_batch) if training else 1
        if groups == 1:
            return super().call(inputs, training=training)
        outputs: List[tf.Tensor] = []
        means: List[tf.Tensor] = []
        variances: List[tf.Tensor] = []
        for group in tf.split(inputs, groups):
            # The fused kernel that Keras uses for a whole batch; its variance has Bessel's correction.
            output, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
                x=group, scale=self.gamma, offset=self.beta, mean=[], variance=[], epsilon=self.epsilon
            )
            outputs.append(output)
            means.append(mean)
            variances.append(variance)
        for moving, found in ((self.moving_mean, means), (self.moving_variance, variances)):
            mean_of_groups = tf.cast(tf.add_n(found) / groups, moving.dtype)
            moving.assign_sub((moving - mean_of_groups) * (1.0 - self.momentum))
        return tf.concat(outputs, 0)

    def get_config(self) -> dict:
        return {**super().get_config(), "stats_batch": self.stats_batch}


def number_of_groups(name: str, images: tf.Tensor, stats_batch: int) -> int:
    """Return how many groups of `stats_batch` the layer `name` makes of images; ValueError if their number varies."""
    if images.shape[0] is None:
        raise ValueError(
            f"{name}: statistics over {stats_batch} images need a batch size that is known when the graph is traced; "
            "batch with drop_remainder=True or set the shape of the images"
        )
    return images.shape[0] // stats_batch
