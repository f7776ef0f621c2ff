"""Synthetic images, which cost nothing to read: for timing, and for trying a set-up without data."""

from typing import Tuple

import numpy as np
import tensorflow as tf

from resnet_cpu.data import order

POOL = 64  # distinct images: enough that a batch is not one image repeated, few enough to stay in memory


def image_pool(image_size: int, num_classes: int) -> Tuple[np.ndarray, np.ndarray]:
    """Return (float32 [POOL, size, size, 3] of standard normal noise, int64 [POOL] labels)."""
    generator = np.random.Generator(np.random.Philox(key=[image_size, num_classes]))
    images = generator.standard_normal([POOL, image_size, image_size, 3], np.float32)
    return images, np.arange(POOL, dtype=np.int64) % num_classes


def training_set(image_size: int, share: order.Share, num_classes: int) -> tf.data.Dataset:
    """Return the micro-batches of `share` as a dataset of (images, labels); example i is image i mod POOL.

    Images are float32 [batch_size, size, size, 3], labels int64 [batch_size].
    """
    images, labels = (tf.constant(array) for array in image_pool(image_size, num_classes))

    def read(number: np.ndarray) -> np.ndarray:
        return share.batch(int(number))[0]

    def gather(number: tf.Tensor) -> Tuple[tf.Tensor, ...]:
        ids = tf.ensure_shape(tf.numpy_function(read, [number], tf.int64, stateful=False), [share.batch_size])
        return tf.gather(images, ids % POOL), tf.gather(labels, ids % POOL)

    return tf.data.Dataset.range(share.numbers.start, share.numbers.stop).map(gather)
