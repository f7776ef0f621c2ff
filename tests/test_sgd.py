"""SGD against a few lines of numpy: Caffe's update, step by step."""

import numpy as np
import pytest
import tensorflow as tf

from resnet_cpu.model.resnet import resnet
from resnet_cpu.optim.lars import LARS
from resnet_cpu.optim.sgd import SGD, without_decay


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("dtype, rtol", [(np.float64, 1e-14), (np.float32, 1e-6)])
def test_steps_equal_caffe(dtype, rtol, nesterov):
    generator = np.random.Generator(np.random.Philox(0))
    w, b = generator.standard_normal([4, 3]).astype(dtype), generator.standard_normal([3]).astype(dtype)
    decayed, free = tf.Variable(w, name="w"), tf.Variable(b, name="b")
    scalars = [tf.Variable(0.0, dtype=dtype, trainable=False) for _ in range(3)]
    optimizer = SGD(*scalars, exclude=[free.name], nesterov=nesterov)
    optimizer.build([decayed, free])
    vw, vb = np.zeros_like(w), np.zeros_like(b)
    for lr, wd, momentum in [(0.1, 1e-2, 0.9), (0.5, 1e-2, 0.9), (0.01, 3e-2, 0.5)]:
        gw, gb = generator.standard_normal([4, 3]).astype(dtype), generator.standard_normal([3]).astype(dtype)
        for scalar, value in zip(scalars, (lr, wd, momentum)):
            scalar.assign(value)
        optimizer.apply_gradients([(tf.constant(gw), decayed), (tf.constant(gb), free)])
        step_w, step_b = lr * (gw + wd * w), lr * gb
        vw, vb = momentum * vw + step_w, momentum * vb + step_b
        if nesterov:
            w, b = w - (momentum * vw + step_w), b - (momentum * vb + step_b)
        else:
            w, b = w - vw, b - vb
        np.testing.assert_allclose(decayed.numpy(), w, rtol=rtol)
        np.testing.assert_allclose(free.numpy(), b, rtol=rtol)


def test_the_config_holds_the_variables_themselves_and_the_exclusions():
    scalars = [tf.Variable(value, trainable=False) for value in (0.1, 0.2, 0.3)]
    again = SGD.from_config(SGD(*scalars, exclude=["x:0"], nesterov=True).get_config())
    assert again.learning_rate is scalars[0] and again.decay is scalars[1] and again.momentum is scalars[2]
    assert again.exclude == ["x:0"] and again.nesterov


@pytest.mark.parametrize("optimizer", [SGD, LARS])
@pytest.mark.parametrize("option", ["clipnorm", "ema_momentum"])
def test_an_unknown_option_is_refused(optimizer, option):
    """They were swallowed: SGD(clipnorm=1.0) trained without clipping."""
    with pytest.raises(TypeError, match=option):
        optimizer(**{option: 1.0})


@pytest.mark.training
def test_without_decay_lists_only_gamma_and_beta():
    model = resnet("resnet18", 10, width=0.125)
    names = without_decay(model, wd_on_bn=False)
    assert len(names) == 2 * 20 and all("gamma" in name or "beta" in name for name in names)
    assert without_decay(model, wd_on_bn=True) == []
    biased = resnet("resnet18", 10, width=0.125, conv1_bias=True)
    assert without_decay(biased, wd_on_bn=False) == names  # biases decay, as in the authors' network
