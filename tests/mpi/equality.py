"""Five steps on fixed examples, computed by N ranks together, and on one rank by other means."""

import contextlib
import dataclasses
import functools

import numpy as np
import tensorflow as tf

from resnet_cpu import commandline
from resnet_cpu.model.kernels.batch_norm import FusedBatchNormalization
from resnet_cpu.optim.sgd import SGD
from resnet_cpu.recipe.schedule import Rates
from resnet_cpu.training.step import TrainStep

BATCH, STEPS = 24, 5
RECIPE = commandline.parse([]).recipe
CASES = ("float64", "float32", "batch_norm", "fused", "bfloat16_exchange")
RATES = Rates(lr=0.05, momentum=0.9, wd=1e-3)


@contextlib.contextmanager
def floatx(name):
    old = tf.keras.backend.floatx()
    tf.keras.backend.set_floatx(name)
    try:
        yield
    finally:
        tf.keras.backend.set_floatx(old)


def network(batch_norm, norm_layer=tf.keras.layers.BatchNormalization):
    """Return three small layers with biases, so that decay and its exclusions have an effect."""
    layers, seeds = tf.keras.layers, iter(range(10))

    def init():
        return tf.keras.initializers.GlorotUniform(next(seeds))

    x = inputs = layers.Input([8, 8, 3])
    # A bias before batch norm has a gradient of rounding errors only.
    x = layers.Conv2D(6, 3, 2, "same", use_bias=not batch_norm, kernel_initializer=init(), name="c1")(x)
    if batch_norm:
        x = norm_layer(momentum=0.8, name="bn1")(x)
    x = layers.ReLU()(x)
    x = layers.Conv2D(8, 3, 2, "same", use_bias=not batch_norm, kernel_initializer=init(), name="c2")(x)
    if batch_norm:
        x = norm_layer(momentum=0.8, name="bn2")(x)
    x = layers.GlobalAveragePooling2D()(layers.ReLU()(x))
    return tf.keras.Model(inputs, layers.Dense(5, kernel_initializer=init(), name="out")(x))


def examples(step, dtype):
    generator = np.random.Generator(np.random.Philox(key=[7, step]))
    return generator.standard_normal([BATCH, 8, 8, 3]).astype(dtype), generator.integers(0, 5, BATCH)


def train(case, part, as_variables=False, micro_batches=1, norm_layer=tf.keras.layers.BatchNormalization):
    """Return the model's arrays after five of our training steps on the slice `part` of each global batch."""
    dtype = "float64" if case == "float64" else "float32"
    with floatx(dtype):
        fused = case == "fused"
        if fused:
            norm_layer = functools.partial(FusedBatchNormalization, False)
        model = network(case in ("batch_norm", "fused"), norm_layer)
        recipe = dataclasses.replace(RECIPE, exchange="bfloat16" if case == "bfloat16_exchange" else "float32")
        train_step = TrainStep(model, recipe, micro_batches, fused)
        for step in range(STEPS):
            images, labels = (np.split(array[part], micro_batches) for array in examples(step, dtype))
            batches = ((tf.constant(x), tf.constant(y)) for x, y in zip(images, labels))
            train_step.take(batches, RATES)
    variables = [*model.variables, *train_step.optimizer.velocities]
    if as_variables:
        return variables
    return named(variables)


def named(variables):
    # Velocities follow the weights, in the order of the trainable ones; the numbers make the names unique.
    return {f"{number:02d} {variable.name}": variable.numpy() for number, variable in enumerate(variables)}


def ghost_batches(ranks):
    """Return the arrays of the batch-norm case computed by one process: one micro-batch per rank, averaged by numpy."""
    model = network(True)
    exclude = [v.name for layer in model.layers if "bn" in layer.name for v in layer.trainable_variables]
    optimizer = SGD(RATES.lr, RATES.wd, RATES.momentum, exclude)
    optimizer.build(model.trainable_variables)
    per_rank = BATCH // ranks
    for step in range(STEPS):
        images, labels = examples(step, "float32")
        before = [v.numpy() for v in model.non_trainable_variables]
        gradients, statistics = [], []
        for rank in range(ranks):
            for variable, value in zip(model.non_trainable_variables, before):
                variable.assign(value)
            part = slice(rank * per_rank, (rank + 1) * per_rank)
            with tf.GradientTape() as tape:
                logits = model(images[part], training=True)
                loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels[part], logits))
            gradients.append(tape.gradient(loss, model.trainable_variables))
            statistics.append([v.numpy() for v in model.non_trainable_variables])
        for variable, values in zip(model.non_trainable_variables, zip(*statistics)):
            variable.assign(np.mean(values, 0))
        mean = [tf.add_n(list(column)) / ranks for column in zip(*gradients)]
        optimizer.apply_gradients(zip(mean, model.trainable_variables))
    return named([*model.variables, *optimizer.velocities])
