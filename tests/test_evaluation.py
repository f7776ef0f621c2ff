"""Scores against numpy, and the scores of a network that has learned nothing."""

import numpy as np
import pytest
import tensorflow as tf
import whole_runs as runs

from resnet_cpu import commandline
from resnet_cpu.cluster.control import World
from resnet_cpu.data import batches, folders, order
from resnet_cpu.training import evaluation
from resnet_cpu.training.state import build_model

pytestmark = pytest.mark.training


def numpy_scores(logits, labels):
    """Return (top-1, top-5, mean cross-entropy) by sorting; of equal logits the first class wins."""
    places = np.argsort(-logits, axis=1, kind="stable")
    logits = logits.astype(np.float64)
    log_sum = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1)
    loss = (log_sum - logits[np.arange(len(labels)), labels]).mean()
    return (places[:, 0] == labels).sum(), (places[:, :5] == labels[:, None]).any(1).sum(), loss


def test_a_whole_evaluation_equals_numpy(tiny_data):
    settings = commandline.parse([*runs.TINY_FLAGS, "--seed=5", "--eval_batch_size=8"])
    model, data = build_model(settings), folders.open_data(tiny_data, "digits")
    score = evaluation.evaluate(evaluation.make_evaluate_step(model), settings, World(1, 0), data, 8)
    logits, labels = [], []
    found = batches.evaluation_batches(settings, World(1, 0), data, batch_size=8)
    for step, (_, images, batch_labels) in enumerate(found):
        keep = order.evaluation_batch(step, 0, 1, 8, 21)[1] > 0
        logits.append(model(images, training=False).numpy()[keep])
        labels.append(batch_labels.numpy()[keep])
    top1, top5, loss = numpy_scores(np.concatenate(logits), np.concatenate(labels))
    assert (score.examples, score.correct1, score.correct5) == (21, top1, top5)
    assert score.loss == pytest.approx(loss, rel=1e-6)
    assert 0 < score.correct5 < 21  # neither trivially right nor wrong


def identity_step(classes):
    inputs = tf.keras.layers.Input([classes])
    return evaluation.make_evaluate_step(tf.keras.Model(inputs, tf.keras.layers.Activation("linear")(inputs)))


def test_random_logits_equal_numpy_with_ties_and_padding():
    generator = np.random.Generator(np.random.Philox(4))
    logits = generator.integers(0, 6, [400, 12]).astype(np.float32)  # many ties
    labels, weights = generator.integers(0, 12, 400), generator.integers(0, 2, 400)
    counts, loss, _ = identity_step(12)(tf.constant(logits), tf.constant(labels), tf.constant(weights))
    top1, top5, mean = numpy_scores(logits[weights > 0], labels[weights > 0])
    assert counts.numpy().tolist() == [weights.sum(), top1, top5]
    assert float(loss) == pytest.approx(mean * weights.sum(), rel=1e-6)


def test_the_same_logit_for_every_class_is_guessing_and_not_a_number_is_wrong():
    labels = tf.constant(np.arange(10))
    ones = tf.constant(np.ones(10, np.int64))
    counts, loss, _ = identity_step(10)(tf.zeros([10, 10]), labels, ones)
    assert counts.numpy().tolist() == [10, 1, 5]
    assert float(loss) == pytest.approx(10 * np.log(10))
    counts, *_ = identity_step(10)(tf.fill([10, 10], np.nan), labels, ones)
    assert counts.numpy().tolist() == [10, 0, 0]


def test_padding_that_blows_up_does_not_reach_the_loss():
    logits = tf.constant([[0.0, 0.0], [np.inf, -np.inf]])
    counts, loss, _ = identity_step(2)(logits, tf.constant([0, 1], tf.int64), tf.constant([1, 0], tf.int64))
    assert counts.numpy().tolist() == [1, 1, 1] and float(loss) == pytest.approx(np.log(2))
