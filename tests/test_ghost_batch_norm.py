"""Batch norm over groups of images, against batch norm of each group alone."""

import numpy as np
import pytest
import tensorflow as tf

from resnet_cpu.model.ghost_batch_norm import GhostBatchNormalization

IMAGES = np.random.Generator(np.random.Philox(5)).standard_normal([6, 4, 4, 3]).astype(np.float32)


def plain(images):
    return tf.keras.layers.BatchNormalization(epsilon=1e-5)(images, training=True).numpy()


def test_each_group_is_normalised_alone():
    found = GhostBatchNormalization(2, epsilon=1e-5)(IMAGES, training=True).numpy()
    expected = np.concatenate([plain(group) for group in np.split(IMAGES, 3)])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(found - plain(IMAGES)).max() > 1e-2  # the control: statistics of the whole batch are others


def test_an_unknown_batch_size_is_an_error_in_training():
    """It used to fall back to the statistics of the whole batch without a message."""
    layer = GhostBatchNormalization(2, name="norm")
    layer.build([None, 4, 4, 3])

    @tf.function(input_signature=[tf.TensorSpec([None, 4, 4, 3])])
    def train(images):
        return layer(images, training=True)

    with pytest.raises(ValueError, match="norm: statistics over 2 images need a batch size that is known"):
        train(IMAGES)


def test_negative_control_an_unknown_batch_size_is_fine_outside_training():
    layer = GhostBatchNormalization(2)
    layer.build([None, 4, 4, 3])

    @tf.function(input_signature=[tf.TensorSpec([None, 4, 4, 3])])
    def evaluate(images):
        return layer(images, training=False)

    np.testing.assert_allclose(evaluate(IMAGES), layer(IMAGES, training=False), rtol=1e-6)
