"""One training step: forward, backward, summed over micro-batches, averaged over ranks, updated."""

import dataclasses
import time
from typing import Any, Callable, Iterator, List, NamedTuple, Optional, Tuple

import tensorflow as tf

from resnet_cpu import faults
from resnet_cpu.cluster import horovod
from resnet_cpu.data.batches import TrainingBatch
from resnet_cpu.optim import lars, sgd
from resnet_cpu.recipe.schedule import Rates
from resnet_cpu.settings import Recipe


@dataclasses.dataclass(frozen=True)
class _Knobs:
    """The variables that the optimizer reads in each step; the step's graph assigns them."""

    learning_rate: tf.Variable
    momentum: tf.Variable
    weight_decay: tf.Variable

    def assign(self, rates: tf.Tensor) -> None:
        """Set all three from `rates`, [learning rate, momentum, weight decay]."""
        for knob, rate in zip((self.learning_rate, self.momentum, self.weight_decay), tf.unstack(rates)):
            knob.assign(rate)


def _make_knobs() -> _Knobs:
    def knob(name: str) -> tf.Variable:
        return tf.Variable(0.0, trainable=False, dtype=tf.keras.backend.floatx(), name=name)

    return _Knobs(knob("learning_rate"), knob("momentum"), knob("weight_decay"))


def _make_optimizer(model: tf.keras.Model, knobs: _Knobs, recipe: Recipe, fused: bool) -> tf.keras.optimizers.Optimizer:
    scalars = knobs.learning_rate, knobs.weight_decay, knobs.momentum
    if recipe.optimizer == "lars":
        chosen = lars.LARS(*scalars, lars.skip_list(model), recipe.nesterov)
    else:
        chosen = sgd.SGD(*scalars, sgd.without_decay(model, recipe.wd_on_bn), recipe.nesterov, fused)
    optimizer = horovod.distributed(chosen) if recipe.exchange == "float32" else chosen
    optimizer.build(model.trainable_variables)
    return optimizer


class Outcome(NamedTuple):
    """The result of a step; `loss` and `stop` are the same on all ranks, so that all of them decide alike."""

    loss: float  # cross-entropy without smoothing, mean over all ranks
    stop: bool  # whether any rank was asked to stop
    started: float  # time.perf_counter() at the start of the step
    data_wait_s: float  # waiting for the next micro-batches
    update_s: float  # after the last gradient of this rank: messages not hidden, waiting for peers, the update
    step_s: float  # the whole step


class _Tape:
    """The tape that the optimizer asks for gradients: returns their mean over micro-batches, and the time.

    Horovod's optimizer averages them over ranks; another one receives the means by `exchange`.
    """

    def __init__(
        self,
        tape: tf.GradientTape,
        sums: List[tf.Variable],
        micro_batches: int,
        exchange: Callable[[List[tf.Tensor]], List[tf.Tensor]] = list,
    ) -> None:
        self._tape, self._sums, self._micro_batches, self._exchange = tape, sums, micro_batches, exchange
        self.finished_at = tf.constant(0.0, tf.float64)

    def gradient(self, loss: tf.Tensor, variables: List[tf.Variable], output_gradients: Optional[Any] = None) -> List:
        gradients = self._tape.gradient(loss, variables, output_gradients)
        gradients = [_mean(gradient, summed, self._micro_batches) for gradient, summed in zip(gradients, self._sums)]
        with tf.control_dependencies(gradients):
            self.finished_at = tf.timestamp()
        return self._exchange(gradients)


class TrainStep:
    """A step of a rank: `micro_batches - 1` calls of `gather`, then one of `update`.

    Gradients, losses and batch norm's statistics are averaged over micro-batches exactly as they are averaged over
    ranks: a rank with k micro-batches computes what k ranks with one each compute.
    """

    def __init__(
        self, model: tf.keras.Model, recipe: Recipe, micro_batches: int = 1, fused_update: bool = False
    ) -> None:
        """Build the recipe's optimizer for `model`, with `micro_batches` batches per update on this rank.

        `fused_update`: momentum SGD updates all weights in one operation, see `resnet_cpu.optim.sgd.SGD`.
        """
        self._model, self._micro_batches, self._smoothing = model, micro_batches, recipe.label_smoothing
        self._exchange = horovod.means_by_bfloat16 if recipe.exchange == "bfloat16" else list
        self._knobs = _make_knobs()
        self.optimizer = _make_optimizer(model, self._knobs, recipe, fused_update)
        self._statistics: List[tf.Variable] = model.non_trainable_variables

        def zeros(variables: List[tf.Variable]) -> List[tf.Variable]:
            return [tf.Variable(tf.zeros_like(variable), trainable=False) for variable in variables]

        gathers = micro_batches > 1
        self._gradient_sums: List[Any] = (
            zeros(model.trainable_variables) if gathers else [None] * len(model.trainable_variables)
        )
        self._statistics_sums: List[Any] = zeros(self._statistics) if gathers else [None] * len(self._statistics)
        self._loss_sum: Optional[tf.Variable] = tf.Variable(0.0, trainable=False) if gathers else None

    def take(
        self,
        batches: Iterator[TrainingBatch],
        rates: Rates,
        stop: bool = False,
        beat: Callable[[], None] = lambda: None,
    ) -> Outcome:
        """Do a step with the next micro-batches at these rates; `stop`: whether this rank was asked to stop.

        Calls `beat` after each micro-batch: a step of hundreds of them may take longer than the stall timeout.
        """
        started, waited = time.perf_counter(), 0.0
        for left in reversed(range(self._micro_batches)):
            asked = time.perf_counter()
            images, labels = next(batches)
            images = faults.point("batch", images)
            waited += time.perf_counter() - asked
            if left:
                self.gather(images, labels)
                beat()
        knobs = tf.constant([rates.lr, rates.momentum, rates.wd], tf.keras.backend.floatx())
        means, gradients_at = self.update(images, labels, knobs, tf.constant(float(stop)))
        loss, stopping = means.numpy()
        update_s = max(time.time() - float(gradients_at), 0.0)
        return Outcome(float(loss), stopping > 0, started, waited, update_s, time.perf_counter() - started)

    @tf.function(autograph=False)
    def gather(self, images: tf.Tensor, labels: tf.Tensor) -> None:
        """Add a micro-batch that is not the step's last: images [batch, height, width, 3], labels [batch]."""
        before = [tf.identity(variable) for variable in self._statistics]
        with tf.GradientTape() as tape:
            loss, cross_entropy = self._losses(images, labels)
        for summed, gradient in zip(self._gradient_sums, tape.gradient(loss, self._model.trainable_variables)):
            summed.assign_add(gradient)
        for summed, variable, value in zip(self._statistics_sums, self._statistics, before):
            summed.assign_add(variable)
            variable.assign(value)  # each micro-batch starts from the statistics of the step before
        assert self._loss_sum is not None
        self._loss_sum.assign_add(tf.cast(cross_entropy, tf.float32))

    @tf.function(autograph=False)
    def update(
        self, images: tf.Tensor, labels: tf.Tensor, rates: tf.Tensor, stop: tf.Tensor
    ) -> Tuple[tf.Tensor, tf.Tensor]:
        """Take the last (or only) micro-batch and update the weights.

        `rates` is [learning rate, momentum, weight decay]; `stop` is 1 if this rank was asked to stop, else 0. Returns
        float32 [loss, stop], means over all ranks, and the time of the last gradient, seconds since the epoch.
        """
        self._knobs.assign(rates)
        with tf.GradientTape() as tape:
            loss, cross_entropy = self._losses(images, labels)
        over = _Tape(tape, self._gradient_sums, self._micro_batches, self._exchange)
        self.optimizer.minimize(loss, self._model.trainable_variables, tape=over)
        for variable, summed in zip(self._statistics, self._statistics_sums):
            if summed is not None:
                variable.assign(_mean(variable, summed, self._micro_batches))
        cross_entropy = _mean(tf.cast(cross_entropy, tf.float32), self._loss_sum, self._micro_batches)
        means = _average(self._statistics, cross_entropy, stop)
        for summed in (*self._gradient_sums, *self._statistics_sums, self._loss_sum):
            if summed is not None:
                summed.assign(tf.zeros_like(summed))
        return means, over.finished_at

    def _losses(self, images: tf.Tensor, labels: tf.Tensor) -> Tuple[tf.Tensor, tf.Tensor]:
        """Return (the loss to minimise, the cross-entropy to report): means over the micro-batch."""
        logits = self._model(images, training=True)
        cross_entropy = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
        if not self._smoothing:
            return cross_entropy, cross_entropy
        uniform = -tf.reduce_mean(tf.nn.log_softmax(logits))
        return (1.0 - self._smoothing) * cross_entropy + self._smoothing * uniform, cross_entropy


def _mean(last: tf.Tensor, summed: Optional[tf.Variable], count: int) -> tf.Tensor:
    """Return the mean over `count` micro-batches: those already summed and the last one."""
    return last if summed is None else (summed + last) / count


def _average(statistics: List[tf.Variable], loss: tf.Tensor, stop: tf.Tensor) -> tf.Tensor:
    """Average batch norm's moving statistics, the loss and `stop` over ranks in one message; return [loss, stop].

    The authors' Caffe averages statistics before each test and snapshot. Moving averages are linear, so averaging in
    every step gives the same statistics at the end; and the state is the same on all ranks whenever a run is cut off.
    """
    pair = tf.stack([loss, stop])
    if not horovod.active():
        return pair
    kind = statistics[0].dtype if statistics else pair.dtype
    *means, last = horovod.means_in_one_message([*statistics, tf.cast(pair, kind)], "statistics_loss_and_stop")
    for variable, value in zip(statistics, means):
        variable.assign(value)
    return tf.cast(last, pair.dtype)
