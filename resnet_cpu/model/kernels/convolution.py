"""Convolutions whose output is a single pixel, as matrix products."""

from typing import Optional, Tuple

import tensorflow as tf


class SinglePixelConv2D(tf.keras.layers.Conv2D):
    """Keras' convolution, computed as a matrix product in training where its output is one pixel.

    That is the last stage of a ResNet on 32x32 pixels. oneDNN's kernels for convolutions then spend most of the time
    on rearranging weights, and on the parts of the kernel that see nothing but padding: with 64 images, a 3x3
    convolution of 512 channels takes 52 ms forward and backward, the product 6.5 ms (one core of an AMD EPYC VM with
    AVX2, TensorFlow 2.15.1 with the Intel extension, minimum of 8).

    Images and kernel must have the orders [batch, height, width, channels] and [height, width, inputs, outputs].
    """

    @tf.autograph.experimental.do_not_convert  # `training` is a Python value; converting takes seconds
    def call(self, inputs: tf.Tensor, training: Optional[bool] = None) -> tf.Tensor:
        height, width = (self._seen(axis, inputs.shape[1 + axis]) if training else None for axis in (0, 1))
        if height is None or width is None:
            return super().call(inputs)
        # The part of the kernel that sees pixels, and these pixels.
        kernel = self.kernel if self._sees_all(height, width) else self.kernel[height[0], width[0]]
        pixels = inputs[:, height[1], width[1]]
        size = kernel.shape[0] * kernel.shape[1] * kernel.shape[2]
        product = tf.matmul(tf.reshape(pixels, [-1, size]), tf.reshape(kernel, [size, self.filters]))
        if self.use_bias:
            product = tf.nn.bias_add(product, self.bias)
        return tf.reshape(product, [-1, 1, 1, self.filters])

    def _seen(self, axis: int, size: Optional[int]) -> Optional[Tuple[slice, slice]]:
        """Return which part of the kernel sees which pixels along an axis, if the output has one pixel, else None."""
        length, stride = self.kernel_size[axis], self.strides[axis]
        if size is None or size < 1:
            return None
        if self.padding == "valid":
            single = length <= size < length + stride
            return (slice(0, length), slice(0, length)) if single else None
        if size > stride:
            return None
        before = max(length - size, 0) // 2  # of the padding
        end = min(length, before + size)
        return slice(before, end), slice(0, end - before)

    def _sees_all(self, *seen: Tuple[slice, slice]) -> bool:
        return all(part == slice(0, length) for (part, _), length in zip(seen, self.kernel_size))
