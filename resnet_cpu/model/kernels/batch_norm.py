"""Batch norm with the addition and the ReLU that follow it, as one operation."""

from typing import Any, List, Optional, Sequence, Union

import tensorflow as tf

from resnet_cpu.model.ghost_batch_norm import number_of_groups
from resnet_cpu.model.kernels import library


class FusedBatchNormalization(tf.keras.layers.BatchNormalization):
    """relu(batch_norm(x) + side), with one pass over memory less for each of the three.

    The variables are those of Keras' layer, with the same names. Outside training, and in types that the operation
    does not have, Keras' own operations compute the same.

    Called with images [batch, height, width, channels], or with [x, side], two tensors of that shape. It returns one
    tensor or, with `copies=2`, two that share their memory: for two consumers, whose gradients the operation adds.
    """

    def __init__(self, relu: bool = True, copies: int = 1, stats_batch: Optional[int] = None, **options: Any) -> None:
        """Args: `stats_batch`: images over which statistics are taken, see `GhostBatchNormalization`; None: all."""
        super().__init__(**options)
        self.relu, self.copies, self.stats_batch = relu, copies, stats_batch

    def build(self, input_shape: Any) -> None:
        several = isinstance(input_shape, (list, tuple)) and isinstance(input_shape[0], (list, tuple, tf.TensorShape))
        super().build(input_shape[0] if several else input_shape)
        self.input_spec = None  # Keras' is for a single input

    @tf.autograph.experimental.do_not_convert  # `training` is a Python value; converting takes seconds
    def call(
        self, inputs: Union[tf.Tensor, Sequence[tf.Tensor]], training: Optional[bool] = None, mask: Any = None
    ) -> Union[tf.Tensor, List[tf.Tensor]]:
        images, *side = inputs if isinstance(inputs, (list, tuple)) else [inputs]
        if not training:
            output = super().call(images, training=False)
            for shortcut in side:
                output = output + shortcut
            output = tf.nn.relu(output) if self.relu else output
            return output if self.copies == 1 else [output] * self.copies
        groups = 1 if self.stats_batch is None else number_of_groups(self.name, images, self.stats_batch)
        outputs, mean, variance = library.load().ops.resnet_cpu_batch_norm(
            x=images,
            gamma=self.gamma,
            beta=self.beta,
            side=side,
            copies=self.copies,
            relu=self.relu,
            groups=groups,
            epsilon=self.epsilon,
        )
        shape = tf.shape(images)
        rows = tf.cast(shape[0] // groups * shape[1] * shape[2], tf.float32)
        bessel = rows / tf.maximum(rows - 1.0, 1.0)  # as Keras does
        for moving, statistic in ((self.moving_mean, mean), (self.moving_variance, bessel * variance)):
            moving.assign_sub((moving - tf.reduce_mean(statistic, 0)) * (1.0 - self.momentum))
        return outputs[0] if self.copies == 1 else outputs

    def get_config(self) -> dict:
        return {
            **super().get_config(),
            "relu": self.relu,
            "copies": self.copies,
            "stats_batch": self.stats_batch,
        }
