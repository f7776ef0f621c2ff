"""The arithmetic of a step on one rank: micro-batches, ghost batch norm, label smoothing, momentum correction."""

import dataclasses
import functools
import os
import sys

import numpy as np
import pytest
import tensorflow as tf

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "mpi"))

import equality

from resnet_cpu.model.ghost_batch_norm import GhostBatchNormalization
from resnet_cpu.recipe import phases, schedule
from resnet_cpu.recipe.schedule import Rates
from resnet_cpu.training.step import TrainStep

pytestmark = pytest.mark.training


def worst(one, other):
    return max(np.linalg.norm(one[key] - other[key]) / (np.linalg.norm(other[key]) or 1) for key in other)


@pytest.fixture(scope="module")
def whole():
    return {case: equality.train(case, slice(None)) for case in equality.CASES}


@pytest.mark.parametrize("micro_batches", [2, 3, 4])
def test_micro_batches_equal_one_batch_without_batch_norm(whole, micro_batches):
    found = equality.train("float64", slice(None), micro_batches=micro_batches)
    for name, expected in whole["float64"].items():
        np.testing.assert_allclose(found[name], expected, rtol=1e-12, atol=1e-14, err_msg=name)


@pytest.mark.parametrize("parts", [2, 4])
def test_with_batch_norm_micro_batches_equal_ranks(whole, parts):
    """Each is normalised separately, as each rank's images are; statistics are averaged as over ranks."""
    found = equality.train("batch_norm", slice(None), micro_batches=parts)
    assert worst(found, equality.ghost_batches(parts)) < 1e-5
    assert worst(found, whole["batch_norm"]) > 1e-3  # negative control: not the statistics of the whole batch


@pytest.mark.parametrize("parts", [2, 4])
def test_ghost_batch_norm_equals_ranks(parts):
    layer = functools.partial(GhostBatchNormalization, equality.BATCH // parts)
    found = equality.train("batch_norm", slice(None), norm_layer=layer)
    assert worst(found, equality.ghost_batches(parts)) < 1e-5


def test_ghost_batch_norm_of_the_whole_batch_is_batch_norm(whole):
    layer = functools.partial(GhostBatchNormalization, equality.BATCH)
    assert worst(equality.train("batch_norm", slice(None), norm_layer=layer), whole["batch_norm"]) == 0


def test_every_micro_batch_beats_the_watchdog():
    class Counted(TrainStep):
        def gather(self, images, labels):
            pass

        def update(self, *arguments):
            return tf.constant([1.5, 0.0]), tf.constant(0.0)

    beats = []
    model = tf.keras.Sequential([tf.keras.layers.Dense(2, input_shape=[3])])
    step = Counted(model, equality.RECIPE, micro_batches=5)
    batches = ((number, number) for number in range(5))
    outcome = step.take(batches, Rates(0.1, 0.9, 0.0), beat=lambda: beats.append(1))
    assert (outcome.loss, outcome.stop) == (1.5, False) and len(beats) == 4


def linear(label_smoothing):
    """Take one step of a linear softmax regression at LR 1; return (inputs, labels, logits before, update, loss)."""
    generator = np.random.Generator(np.random.Philox(5))
    images, labels = generator.standard_normal([7, 2, 2, 3]).astype(np.float32), generator.integers(0, 4, 7)
    inputs = tf.keras.layers.Input([2, 2, 3])
    model = tf.keras.Model(inputs, tf.keras.layers.Dense(4, use_bias=False)(tf.keras.layers.Flatten()(inputs)))
    before, logits = model.trainable_variables[0].numpy(), model(images).numpy()
    step = TrainStep(model, dataclasses.replace(equality.RECIPE, label_smoothing=label_smoothing))
    outcome = step.take(iter([(tf.constant(images), tf.constant(labels))]), Rates(lr=1.0, momentum=0.0, wd=0.0))
    return images.reshape(7, 12), labels, logits, before - model.trainable_variables[0].numpy(), outcome.loss


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_label_smoothing_spreads_the_label_and_the_logged_loss_excludes_it(smoothing):
    inputs, labels, logits, update, loss = linear(smoothing)
    exponentials = np.exp(logits.astype(np.float64))
    probabilities = exponentials / exponentials.sum(1, keepdims=True)
    target = (1 - smoothing) * np.eye(4)[labels] + smoothing / 4
    np.testing.assert_allclose(update, inputs.T @ (probabilities - target) / 7, rtol=1e-4, atol=1e-6)
    assert loss == pytest.approx(-np.log(probabilities[np.arange(7), labels]).mean(), rel=1e-5)


def planned(*texts):
    read = phases.parse(texts)
    return phases.resolve(read, train_examples=1000, global_batch_size=10, lr_scaling="linear", image_size=8)


def test_corrected_momentum_is_an_lr_outside_the_velocity():
    """Goyal et al., equation 10: v <- m * v + g, w <- w - LR * v, as in PyTorch."""
    tree = planned("a:steps=6,lr=0.4,warmup_steps=3,warmup_lr=0.1", "b:steps=4,lr=0.05,momentum=0.8")
    gradients = np.random.Generator(np.random.Philox(2)).standard_normal(10)
    ours = other = 1.0
    inside = outside = 0.0
    for (_, phase, within, rate), gradient in zip(schedule.walk(tree), gradients):
        momentum = schedule.momentum(tree, phase, within, corrected=True)
        inside = momentum * inside + rate * gradient
        ours -= inside
        outside = phase.momentum * outside + gradient
        other -= rate * outside
        assert ours == pytest.approx(other, rel=1e-12)
        assert schedule.momentum(tree, phase, within, corrected=False) == phase.momentum


def test_corrected_momentum_with_resets_branches_and_rates_of_zero():
    tree = planned(
        "a:steps=4,lr=0.4,warmup_steps=2",
        "side:steps=2,lr=0.1,branch=1,velocity=keep",
        "fresh:steps=2,lr=0.1,velocity=reset",
        "kept:steps=2,lr=0.1,from=a",
    )
    a, side, fresh, kept = tree
    assert schedule.momentum(tree, a, 0, True) == 0.9  # no step before
    assert schedule.momentum(tree, a, 1, True) == 0.9  # the previous step had a rate of 0: the velocity is zero
    assert schedule.momentum(tree, fresh, 0, True) == 0.9
    last = schedule.learning_rate(a, 3)
    for phase in (side, kept):  # the velocity is that of a, whatever ran in between
        assert schedule.momentum(tree, phase, 0, True) == pytest.approx(0.9 * 0.1 / last)


def test_all_three_rates_take_effect_in_the_step_they_are_given_for():
    """They reach the graph by one argument; a rate that stayed from the step before would show in the weights."""
    dense = tf.keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")
    inputs = tf.keras.layers.Input([1])
    # The logits are [w * x, 0]: the gradient is known, and so is each update.
    logits = tf.keras.layers.Concatenate()([dense(inputs), tf.keras.layers.Lambda(lambda x: 0 * x)(inputs)])
    step = TrainStep(tf.keras.Model(inputs, logits), equality.RECIPE)
    weight, velocity = 1.0, 0.0
    for rates in (Rates(0.5, 0.9, 0.01), Rates(0.1, 0.5, 0.3), Rates(2.0, 0.0, 0.0)):
        step.take(iter([(tf.ones([1, 1]), tf.constant([0], tf.int64))]), rates)
        gradient = 1 / (1 + np.exp(-weight)) - 1
        velocity = rates.momentum * velocity + rates.lr * (gradient + rates.wd * weight)
        weight -= velocity
        assert float(dense.kernel[0, 0]) == pytest.approx(weight, rel=1e-5)
