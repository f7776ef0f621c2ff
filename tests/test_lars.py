"""LARS against its closed form in numpy, which is also the formula of MLPerf's reference optimizer."""

import numpy as np
import pytest
import tensorflow as tf

from resnet_cpu.model.resnet import resnet
from resnet_cpu.optim import lars
from resnet_cpu.optim.lars import LARS, skip_list
from resnet_cpu.optim.sgd import SGD


def reference(w, gradient, velocity, lr, wd, momentum, eta):
    """MLPerf's: trust ratio eta*|w| / (|g| + wd*|w|) where both norms are positive, wd in the gradient."""
    weight, slope = np.linalg.norm(w), np.linalg.norm(gradient)
    trust = eta * weight / (slope + wd * weight) if weight > 0 and slope > 0 else 1.0
    velocity = momentum * velocity - lr * trust * (gradient + wd * w)
    return w + velocity, velocity


@pytest.mark.parametrize("dtype, rtol", [(np.float64, 1e-13), (np.float32, 1e-5)])
def test_three_steps_equal_the_closed_form(dtype, rtol):
    generator = np.random.Generator(np.random.Philox(3))
    arrays = [generator.standard_normal(shape).astype(dtype) for shape in ([3, 3, 2, 4], [8, 5], [5], [4])]
    arrays.append(np.zeros([3], dtype))  # of norm zero: the plain LR
    variables = [tf.Variable(array, name=f"v{number}") for number, array in enumerate(arrays)]
    scalars = [tf.Variable(0.0, dtype=dtype, trainable=False) for _ in range(3)]
    skipped = {variables[2].name, variables[3].name}
    optimizer = LARS(*scalars, exclude=sorted(skipped))
    optimizer.build(variables)
    velocities = [np.zeros_like(array) for array in arrays]
    for lr, wd, momentum in [(0.1, 1e-2, 0.9), (7.5, 1e-2, 0.9), (0.01, 3e-2, 0.5)]:
        gradients = [generator.standard_normal(array.shape).astype(dtype) for array in arrays]
        for scalar, value in zip(scalars, (lr, wd, momentum)):
            scalar.assign(value)
        optimizer.apply_gradients(zip([tf.constant(g) for g in gradients], variables))
        for number, (variable, gradient) in enumerate(zip(variables, gradients)):
            if variable.name in skipped:  # biases and batch norm: plain momentum SGD, no decay
                velocities[number] = momentum * velocities[number] - lr * gradient
                arrays[number] = arrays[number] + velocities[number]
            else:
                arrays[number], velocities[number] = reference(
                    arrays[number], gradient, velocities[number], lr, wd, momentum, 0.001
                )
            np.testing.assert_allclose(variable.numpy(), arrays[number], rtol=rtol, atol=rtol)


def test_the_trust_coefficient_is_that_of_the_reference():
    assert lars.ETA == 0.001


def test_horovod_can_rebuild_it_from_its_config():
    scalars = [tf.Variable(value, trainable=False) for value in (0.1, 0.2, 0.3)]
    again = LARS.from_config(LARS(*scalars, exclude=["x:0"]).get_config())
    assert again.learning_rate is scalars[0] and again.decay is scalars[1] and again.momentum is scalars[2]
    assert again.exclude == ["x:0"] and again.name == "LARS" and isinstance(again, SGD)


@pytest.mark.training
def test_the_skip_list_holds_batch_norm_and_biases_but_no_kernel():
    model = resnet("resnet50", 10, width=0.125, conv1_bias=True)
    names = skip_list(model)
    kept = [variable.name for variable in model.trainable_variables if variable.name not in names]
    assert len(names) == 2 * 53 + 2 and all(name.endswith("/kernel:0") for name in kept) and len(kept) == 54


def test_a_layer_moves_by_lr_times_eta_times_its_norm_for_any_gradient():
    """The purpose of LARS: without decay and momentum the relative change of a layer is lr * eta."""
    for scale in (1e-6, 1.0, 1e6):
        variable = tf.Variable(np.full([4, 4], 2.0), name="w")
        optimizer = LARS(*(tf.Variable(value, dtype=tf.float64) for value in (30.0, 0.0, 0.0)))
        optimizer.build([variable])
        optimizer.apply_gradients([(tf.constant(np.full([4, 4], scale)), variable)])
        assert np.linalg.norm(variable.numpy() - 2.0) / 8.0 == pytest.approx(0.03, rel=1e-9)
