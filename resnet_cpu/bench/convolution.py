"""Time a convolution in both precisions on the cores of this process: `python -m resnet_cpu.bench.convolution`.

Prints a line for each, its name and the number of times per second that the convolution, forward and backward, was
computed. One that aborts the process is missing. Started by `resnet_cpu.cluster.precision`.
"""

import os
import time

from resnet_cpu.cluster import control, placement

_SECONDS = 0.7  # for each precision
_SHAPE, _CHANNELS = (16, 28, 28), 128  # images of ResNet-50's second stage


def main() -> None:
    """Print the rates."""
    placement.apply(0, control.physical_cores(os.sched_getaffinity(0)))
    import tensorflow as tf

    @tf.function
    def both_ways(images: tf.Tensor, kernel: tf.Tensor) -> list:
        with tf.GradientTape() as tape:
            tape.watch([images, kernel])
            output = tf.nn.conv2d(images, kernel, 1, "SAME")
        return tape.gradient(output, [images, kernel], tf.ones_like(output))

    for name in ("float32", "bfloat16"):
        images = tf.cast(tf.random.normal([*_SHAPE, _CHANNELS]), name)
        kernel = tf.cast(tf.random.normal([3, 3, _CHANNELS, _CHANNELS]), name)
        for _ in range(2):
            both_ways(images, kernel)[1].numpy()
        started, calls = time.perf_counter(), 0
        while time.perf_counter() - started < _SECONDS:
            both_ways(images, kernel)[1].numpy()
            calls += 1
        print(name, calls / (time.perf_counter() - started), flush=True)


if __name__ == "__main__":
    main()
