"""One training step: forward, backward, summed over micro-batches, averaged over ranks, updated."""

import dataclasses
import time
from typing import Any, Callable, Iterator, List, NamedTuple, Optional, Tuple

import tensorflow as tf

from resnet_cpu.cluster import horovod
from resnet_cpu.data import batches as pipeline
from resnet_cpu.optim import lars, sgd
from resnet_cpu.settings import Recipe


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


def make_optimizer(model: tf.keras.Model, knobs: Knobs, recipe: Recipe) -> tf.keras.optimizers.Optimizer:
    """Return the built optimizer of the recipe, whose `minimize` averages over ranks."""
    scalars = knobs.learning_rate, knobs.weight_decay, knobs.momentum
    if recipe.optimizer == "lars":
        chosen = lars.LARS(*scalars, lars.skip_list(model), recipe.lars_eta)
    else:
        chosen = sgd.SGD(*scalars, sgd.without_decay(model, recipe.wd_on_bn))
    optimizer = horovod.distributed(chosen)
    optimizer.build(model.trainable_variables)
    return optimizer


class Outcome(NamedTuple):
    """What a step tells the loop; the first two are means over all ranks, so that all decide the same of them."""

    loss: float  # cross-entropy, without smoothing
    stop: float  # share of ranks that were asked to stop
    update_s: float  # after the last gradient of this rank: messages not hidden, waiting for peers, the update


class _Tape:
    """What Horovod's optimizer asks for gradients: gives the mean over micro-batches, and notes when it was there."""

    def __init__(self, tape: tf.GradientTape, sums: List[tf.Variable], micro_batches: int) -> None:
        self._tape, self._sums, self._micro_batches = tape, sums, micro_batches
        self.finished_at = tf.constant(0.0, tf.float64)

    def gradient(self, loss: tf.Tensor, variables: List[tf.Variable], output_gradients: Optional[Any] = None) -> List:
        gradients = self._tape.gradient(loss, variables, output_gradients)
        gradients = [_mean(gradient, summed, self._micro_batches) for gradient, summed in zip(gradients, self._sums)]
        with tf.control_dependencies(gradients):
            self.finished_at = tf.timestamp()
        return gradients


class TrainStep:
    """A step of a rank: `accumulate_steps - 1` calls of `gather`, then one of the step itself.

    Gradients, losses and batch norm's statistics of the micro-batches are averaged, as those of ranks are: a rank with
    k micro-batches computes what k ranks with one each compute.
    """

    def __init__(
        self,
        model: tf.keras.Model,
        optimizer: tf.keras.optimizers.Optimizer,
        knobs: Knobs,
        accumulate_steps: int = 1,
        label_smoothing: float = 0.0,
    ) -> None:
        self._model, self._optimizer, self._knobs = model, optimizer, knobs
        self._micro_batches, self._smoothing = accumulate_steps, label_smoothing
        self._statistics: List[tf.Variable] = model.non_trainable_variables

        def zeros(variables: List[tf.Variable]) -> List[tf.Variable]:
            return [tf.Variable(tf.zeros_like(variable), trainable=False) for variable in variables]

        gathers = accumulate_steps > 1
        self._gradient_sums: List[Any] = (
            zeros(model.trainable_variables) if gathers else [None] * len(model.trainable_variables)
        )
        self._statistics_sums: List[Any] = zeros(self._statistics) if gathers else [None] * len(self._statistics)
        self._loss_sum: Optional[tf.Variable] = tf.Variable(0.0, trainable=False) if gathers else None

    def take(
        self,
        batches: Iterator[pipeline.Batch],
        learning_rate: tf.Tensor,
        stop: tf.Tensor,
        beat: Callable[[], None] = lambda: None,
    ) -> Tuple[Outcome, float]:
        """Do a step with the next micro-batches; return its outcome and the seconds spent waiting for them.

        Calls `beat` after each micro-batch: a step of hundreds of them may take longer than a stall is allowed to.
        """
        waited = 0.0
        for left in reversed(range(self._micro_batches)):
            started = time.perf_counter()
            _, images, labels = next(batches)
            waited += time.perf_counter() - started
            if left:
                self.gather(images, labels)
                beat()
        return self(images, labels, learning_rate, stop), waited

    def __call__(self, images: tf.Tensor, labels: tf.Tensor, learning_rate: tf.Tensor, stop: tf.Tensor) -> Outcome:
        """Take the last (or only) micro-batch and update; `stop` is 1 if this rank was asked to stop."""
        means, finished_at = self._update(images, labels, learning_rate, stop)
        loss, stopping = means.numpy()
        return Outcome(float(loss), float(stopping), max(time.time() - float(finished_at), 0.0))

    @tf.function
    def gather(self, images: tf.Tensor, labels: tf.Tensor) -> None:
        """Add a micro-batch that is not the step's last: images [batch, height, width, 3], labels [batch]."""
        before = [tf.identity(variable) for variable in self._statistics]
        with tf.GradientTape() as tape:
            loss, cross_entropy = self._losses(images, labels)
        for summed, gradient in zip(self._gradient_sums, tape.gradient(loss, self._model.trainable_variables)):
            summed.assign_add(gradient)
        for summed, variable, value in zip(self._statistics_sums, self._statistics, before):
            summed.assign_add(variable)
            variable.assign(value)  # each micro-batch moves the statistics of the step before, not those of another
        assert self._loss_sum is not None
        self._loss_sum.assign_add(tf.cast(cross_entropy, tf.float32))

    @tf.function
    def _update(
        self, images: tf.Tensor, labels: tf.Tensor, learning_rate: tf.Tensor, stop: tf.Tensor
    ) -> Tuple[tf.Tensor, tf.Tensor]:
        self._knobs.learning_rate.assign(tf.cast(learning_rate, self._knobs.learning_rate.dtype))
        with tf.GradientTape() as tape:
            loss, cross_entropy = self._losses(images, labels)
        over = _Tape(tape, self._gradient_sums, self._micro_batches)
        self._optimizer.minimize(loss, self._model.trainable_variables, tape=over)
        for variable, summed in zip(self._statistics, self._statistics_sums):
            if summed is not None:
                variable.assign(_mean(variable, summed, self._micro_batches))
        _average_statistics(self._statistics)
        cross_entropy = _mean(tf.cast(cross_entropy, tf.float32), self._loss_sum, self._micro_batches)
        for summed in (*self._gradient_sums, *self._statistics_sums, self._loss_sum):
            if summed is not None:
                summed.assign(tf.zeros_like(summed))
        return horovod.mean(tf.stack([cross_entropy, stop]), "loss_and_stop"), over.finished_at

    def _losses(self, images: tf.Tensor, labels: tf.Tensor) -> Tuple[tf.Tensor, tf.Tensor]:
        """Return (what is minimised, the cross-entropy that is told): means over the micro-batch."""
        logits = self._model(images, training=True)
        told = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
        if not self._smoothing:
            return told, told
        evenly = -tf.reduce_mean(tf.nn.log_softmax(logits))
        return (1.0 - self._smoothing) * told + self._smoothing * evenly, told


def _mean(last: tf.Tensor, summed: Optional[tf.Variable], count: int) -> tf.Tensor:
    """Return the mean over `count` micro-batches: those summed up and the last one."""
    return last if summed is None else (summed + last) / count


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
