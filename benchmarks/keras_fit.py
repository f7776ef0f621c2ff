"""Time `keras.applications.ResNet50` with `fit`, the usual starting point. Last line `total images/sec: X`.

python benchmarks/keras_fit.py [--steps 7] [--batch_size 32] [--image_size 224] [--jit_compile=no]
"""

import argparse
import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import tensorflow as tf


class EndTimes(tf.keras.callbacks.Callback):
    """Record the time at which each step ended, in seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list = []

    def on_train_batch_end(self, batch: int, logs: object = None) -> None:
        self.times.append(time.perf_counter())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=7, help="all but the first --warmup_steps are timed")
    parser.add_argument("--warmup_steps", type=int, default=1)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument(
        "--jit_compile", choices=["auto", "no"], default="auto", help="auto: Keras 3 decides whether to use XLA"
    )
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32", help="bfloat16: mixed")
    arguments = parser.parse_args()
    if arguments.precision == "bfloat16":
        tf.keras.mixed_precision.set_global_policy("mixed_bfloat16")
    size = arguments.image_size
    model = tf.keras.applications.ResNet50(weights=None, input_shape=[size, size, 3])
    optimizer = tf.keras.optimizers.SGD(0.01, momentum=0.9, weight_decay=1e-4)
    choice = {"jit_compile": False} if arguments.jit_compile == "no" else {}
    model.compile(optimizer, tf.keras.losses.SparseCategoricalCrossentropy(), **choice)
    images = tf.random.normal([arguments.batch_size, size, size, 3])
    labels = tf.random.uniform([arguments.batch_size], 0, 1000, tf.int64)
    data = tf.data.Dataset.from_tensors((images, labels)).repeat()
    ends = EndTimes()
    model.fit(data, steps_per_epoch=arguments.steps, callbacks=[ends], verbose=0)
    timed, seconds = arguments.steps - arguments.warmup_steps, ends.times[-1] - ends.times[arguments.warmup_steps - 1]
    print(f"total images/sec: {timed * arguments.batch_size / seconds:.3f}")


if __name__ == "__main__":
    main()
