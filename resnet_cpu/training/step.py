"""One training step as one graph: forward, backward, averaged, updated."""

import dataclasses
import time
from typing import Any, Callable, List, NamedTuple, Optional

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


class Outcome(NamedTuple):
    """What a step tells the loop; the first two are means over all ranks, so that all decide the same of them."""

    loss: float  # cross-entropy
    stop: float  # share of ranks that were asked to stop
    update_s: float  # after the last gradient of this rank: messages not hidden, waiting for peers, the update


class _TimedTape:
    """A gradient tape that notes when the last gradient was there: Horovod's optimizer asks it, then sends."""

    def __init__(self, tape: tf.GradientTape) -> None:
        self._tape, self.finished_at = tape, tf.constant(0.0, tf.float64)

    def gradient(self, loss: tf.Tensor, variables: List[tf.Variable], output_gradients: Optional[Any] = None) -> List:
        gradients = self._tape.gradient(loss, variables, output_gradients)
        with tf.control_dependencies(gradients):
            self.finished_at = tf.timestamp()
        return gradients


def make_train_step(model: tf.keras.Model, optimizer: tf.keras.optimizers.Optimizer, knobs: Knobs) -> Callable:
    """Return a function of (images, labels, learning_rate, stop) that does one step and returns its Outcome."""
    statistics: List[tf.Variable] = model.non_trainable_variables

    @tf.function
    def graph(images: tf.Tensor, labels: tf.Tensor, learning_rate: tf.Tensor, stop: tf.Tensor) -> List[tf.Tensor]:
        knobs.learning_rate.assign(tf.cast(learning_rate, knobs.learning_rate.dtype))
        with tf.GradientTape() as tape:
            logits = model(images, training=True)
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
        timed = _TimedTape(tape)
        optimizer.minimize(loss, model.trainable_variables, tape=timed)
        _average_statistics(statistics)
        return [horovod.mean(tf.stack([tf.cast(loss, tf.float32), stop]), "loss_and_stop"), timed.finished_at]

    def train_step(images: tf.Tensor, labels: tf.Tensor, learning_rate: tf.Tensor, stop: tf.Tensor) -> Outcome:
        means, finished_at = graph(images, labels, learning_rate, stop)
        loss, stopping = means.numpy()
        return Outcome(float(loss), float(stopping), max(time.time() - float(finished_at), 0.0))

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
