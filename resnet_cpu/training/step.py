"""One training step as one graph: forward, backward, averaged, updated."""

import dataclasses
from typing import Callable, List

import tensorflow as tf

from resnet_cpu.cluster import horovod
from resnet_cpu.optim import sgd


@dataclasses.dataclass(frozen=True)
class Knobs:
    """What the recipe sets from step to step and phase to phase."""

    learning_rate: tf.Variable
    weight_decay: tf.Variable
    momentum: tf.Variable


def make_knobs() -> Knobs:
    """Return knobs at zero, in Keras' floating-point type."""

    def knob(name: str) -> tf.Variable:
        return tf.Variable(0.0, trainable=False, dtype=tf.keras.backend.floatx(), name=name)

    return Knobs(knob("learning_rate"), knob("weight_decay"), knob("momentum"))


def make_optimizer(model: tf.keras.Model, knobs: Knobs, wd_on_bn: bool) -> tf.keras.optimizers.Optimizer:
    """Return the built optimizer whose `minimize` averages over ranks."""
    optimizer = horovod.distributed(
        sgd.SGD(knobs.learning_rate, knobs.weight_decay, knobs.momentum, sgd.without_decay(model, wd_on_bn))
    )
    optimizer.build(model.trainable_variables)
    return optimizer


def make_train_step(model: tf.keras.Model, optimizer: tf.keras.optimizers.Optimizer, knobs: Knobs) -> Callable:
    """Return a function of (images, labels, learning_rate, stop) that does one step.

    It returns [mean cross-entropy, share of ranks that were asked to stop], both over all ranks, so that what a rank
    decides from them all ranks decide.
    """
    statistics: List[tf.Variable] = model.non_trainable_variables

    @tf.function
    def train_step(images: tf.Tensor, labels: tf.Tensor, learning_rate: tf.Tensor, stop: tf.Tensor) -> tf.Tensor:
        knobs.learning_rate.assign(tf.cast(learning_rate, knobs.learning_rate.dtype))
        with tf.GradientTape() as tape:
            logits = model(images, training=True)
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
        optimizer.minimize(loss, model.trainable_variables, tape=tape)
        _average_statistics(statistics)
        return horovod.mean(tf.stack([tf.cast(loss, tf.float32), stop]), "loss_and_stop")

    return train_step


def _average_statistics(statistics: List[tf.Variable]) -> None:
    """Average batch norm's moving statistics over ranks, as one message.

    The authors' Caffe does so before each test and snapshot. Moving averages are linear, so the mean of every step is
    the mean of the end; but done in every step the state is the same on all ranks, whenever a run is cut off.
    """
    if not statistics or not horovod.active():
        return
    flat = horovod.mean(tf.concat([tf.reshape(variable, [-1]) for variable in statistics], 0), "statistics")
    parts = tf.split(flat, [variable.shape.num_elements() for variable in statistics])
    for variable, part in zip(statistics, parts):
        variable.assign(tf.reshape(part, variable.shape))
