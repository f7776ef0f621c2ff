"""A step's mathematics on one rank: micro-batches, ghost batch norm, label smoothing, momentum correction."""

import functools
import os
import sys

import numpy as np
import pytest
import tensorflow as tf

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "mpi"))

import equality

from resnet_cpu import flags
from resnet_cpu.model.ghost_batch_norm import GhostBatchNormalization
from resnet_cpu.recipe import phases, schedule
from resnet_cpu.training import step as training_step


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
    """Each is normalised by itself, as each rank's images are, and statistics are averaged as over ranks."""
    found = equality.train("batch_norm", slice(None), micro_batches=parts)
    assert worst(found, equality.ghost_batches(parts)) < 1e-5
    assert worst(found, whole["batch_norm"]) > 1e-3  # control: it is not the statistics of the whole batch


@pytest.mark.parametrize("parts", [2, 4])
def test_ghost_batch_norm_equals_ranks(parts):
    layer = functools.partial(GhostBatchNormalization, equality.BATCH // parts)
    found = equality.train("batch_norm", slice(None), norm_layer=layer)
    assert worst(found, equality.ghost_batches(parts)) < 1e-5


def test_ghost_batch_norm_of_the_whole_batch_is_batch_norm(whole):
    layer = functools.partial(GhostBatchNormalization, equality.BATCH)
    assert worst(equality.train("batch_norm", slice(None), norm_layer=layer), whole["batch_norm"]) == 0


def test_every_micro_batch_beats_the_watchdog():
    class Counted(training_step.TrainStep):
        def gather(self, images, labels):
            pass

        def __call__(self, *arguments):
            return "outcome"

    beats = []
    model = tf.keras.Sequential([tf.keras.layers.Dense(2, input_shape=[3])])
    step = Counted(model, None, training_step.make_knobs(), accumulate_steps=5)
    batches = ((None, number, number) for number in range(5))
    assert step.take(batches, 0.1, 0.0, lambda: beats.append(1))[0] == "outcome" and len(beats) == 4


def linear(label_smoothing):
    """One step of a linear softmax regression at LR 1; return (inputs, labels, logits before, update, told loss)."""
    generator = np.random.Generator(np.random.Philox(5))
    images, labels = generator.standard_normal([7, 2, 2, 3]).astype(np.float32), generator.integers(0, 4, 7)
    inputs = tf.keras.layers.Input([2, 2, 3])
    model = tf.keras.Model(inputs, tf.keras.layers.Dense(4, use_bias=False)(tf.keras.layers.Flatten()(inputs)))
    before, logits = model.trainable_variables[0].numpy(), model(images).numpy()
    knobs = training_step.make_knobs()
    optimizer = training_step.make_optimizer(model, knobs, flags.parse([]).recipe)
    step = training_step.TrainStep(model, optimizer, knobs, label_smoothing=label_smoothing)
    outcome = step(tf.constant(images), tf.constant(labels), tf.constant(1.0), tf.constant(0.0))
    return images.reshape(7, 12), labels, logits, before - model.trainable_variables[0].numpy(), outcome.loss


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_label_smoothing_spreads_the_label_and_the_told_loss_is_without_it(smoothing):
    inputs, labels, logits, update, told = linear(smoothing)
    exponentials = np.exp(logits.astype(np.float64))
    probabilities = exponentials / exponentials.sum(1, keepdims=True)
    target = (1 - smoothing) * np.eye(4)[labels] + smoothing / 4
    np.testing.assert_allclose(update, inputs.T @ (probabilities - target) / 7, rtol=1e-4, atol=1e-6)
    assert told == pytest.approx(-np.log(probabilities[np.arange(7), labels]).mean(), rel=1e-5)


def planned(*texts):
    read = phases.parse(texts)
    return phases.plan(read, train_examples=1000, global_batch_size=10, lr_scaling="linear", image_size=8)


def test_corrected_momentum_is_an_lr_outside_the_velocity():
    """Goyal et al., equation 10: v <- m * v + g, w <- w - LR * v, which is what PyTorch does."""
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


def test_corrected_momentum_knows_resets_branches_and_rates_of_zero():
    tree = planned(
        "a:steps=4,lr=0.4,warmup_steps=2",
        "side:steps=2,lr=0.1,branch=1,velocity=keep",
        "fresh:steps=2,lr=0.1,velocity=reset",
        "kept:steps=2,lr=0.1,from=a",
    )
    a, side, fresh, kept = tree
    assert schedule.momentum(tree, a, 0, True) == 0.9  # no step before
    assert schedule.momentum(tree, a, 1, True) == 0.9  # the step before had a rate of 0: there is no velocity
    assert schedule.momentum(tree, fresh, 0, True) == 0.9
    last = schedule.learning_rate(a, 3)
    for phase in (side, kept):  # the velocity is a's, whatever ran in between
        assert schedule.momentum(tree, phase, 0, True) == pytest.approx(0.9 * 0.1 / last)
