"""The network: exact parameter counts, logits of a reference, and the effect of each option."""

import numpy as np
import pytest
import tensorflow as tf

from resnet_cpu.errors import FlagError
from resnet_cpu.model.resnet import resnet, resnet50

pytestmark = pytest.mark.training


def counts(model):
    def total(variables):
        return sum(int(np.prod(variable.shape)) for variable in variables)

    return total(model.trainable_variables), total(model.non_trainable_variables)


def test_resnet50_has_exactly_the_published_parameters():
    """25,557,032: torchvision's resnet50; conv1's bias adds 64."""
    assert counts(resnet50()) == (25_557_032, 53_120)
    assert counts(resnet50(conv1_bias=True)) == (25_557_032 + 64, 53_120)


# torchvision's models of the same names.
@pytest.mark.parametrize(
    "name, trainable", [("resnet18", 11_689_512), ("resnet34", 21_797_672), ("resnet101", 44_549_160)]
)
def test_other_depths(name, trainable):
    assert counts(resnet(name))[0] == trainable


def test_width_scales_every_channel():
    model = resnet50(10, width=0.25)
    assert model.get_layer("conv1_conv").filters == 16
    assert model.get_layer("conv5_block3_3_conv").filters == 512


def test_logits_of_keras_applications_with_its_weights():
    """keras.applications.ResNet50 is v1 with biased convolutions; a bias before batch norm shifts its moving mean."""
    reference = tf.keras.applications.ResNet50(weights=None, classifier_activation=None)
    generator = np.random.Generator(np.random.Philox(0))
    for layer in reference.layers:
        weights = layer.get_weights()
        if isinstance(layer, tf.keras.layers.BatchNormalization):
            shape = weights[0].shape
            draw = lambda low, high: generator.uniform(low, high, shape)  # noqa: B023
            layer.set_weights([draw(0.5, 1), draw(-0.2, 0.2), draw(-0.3, 0.3), draw(0.5, 2)])
        elif isinstance(layer, tf.keras.layers.Conv2D):
            scale = (2 / np.prod(weights[0].shape[:3])) ** 0.5
            kernel = generator.standard_normal(weights[0].shape) * scale
            layer.set_weights([kernel, generator.uniform(-0.3, 0.3, weights[1].shape)])
        elif isinstance(layer, tf.keras.layers.Dense):
            layer.set_weights([generator.standard_normal(weights[0].shape) * 0.05, weights[1]])
    ours = resnet50(stride_in="1x1", bn_epsilon=1.001e-5)
    for layer in ours.layers:
        if isinstance(layer, tf.keras.layers.Conv2D):
            layer.set_weights(reference.get_layer(layer.name).get_weights()[:1])
        elif isinstance(layer, tf.keras.layers.BatchNormalization):
            gamma, beta, mean, variance = reference.get_layer(layer.name).get_weights()
            bias = reference.get_layer(layer.name.replace("_bn", "_conv")).get_weights()[1]
            layer.set_weights([gamma, beta, mean - bias, variance])
        elif isinstance(layer, tf.keras.layers.Dense):
            layer.set_weights(reference.get_layer("predictions").get_weights())
    images = generator.standard_normal([2, 224, 224, 3]).astype(np.float32)
    expected, found = reference(images).numpy(), ours(images).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    other = resnet50(stride_in="3x3", bn_epsilon=1.001e-5)  # the control: v1.5 with the same weights is another network
    other.set_weights(ours.get_weights())
    assert np.abs(other(images).numpy() - expected).max() > 1e-3 * np.abs(expected).max()


def test_the_stride_is_in_the_chosen_convolution():
    v15, v1 = resnet50(), resnet50(stride_in="1x1")
    assert v15.get_layer("conv3_block1_1_conv").strides == (1, 1)
    assert v15.get_layer("conv3_block1_2_conv").strides == (2, 2)
    assert v1.get_layer("conv3_block1_1_conv").strides == (2, 2)
    assert v1.get_layer("conv3_block1_2_conv").strides == (1, 1)
    assert v15.get_layer("conv2_block1_0_conv").strides == (1, 1)
    assert v15.get_layer("conv3_block1_0_conv").strides == (2, 2)


def test_symmetric_padding_equals_a_plain_convolution_with_zeros_on_both_sides():
    model = resnet50(10, width=0.125)
    images = np.random.Generator(np.random.Philox(3)).standard_normal([1, 9, 9, 3]).astype(np.float32)
    kernel = model.get_layer("conv1_conv").get_weights()[0]
    padded = np.pad(images, [(0, 0), (3, 3), (3, 3), (0, 0)])
    expected = np.array(
        [[np.tensordot(padded[0, 2 * y : 2 * y + 7, 2 * x : 2 * x + 7], kernel, 3) for x in range(5)] for y in range(5)]
    )
    found = tf.keras.Model(model.input, model.get_layer("conv1_conv").output)(images).numpy()[0]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    same = resnet50(10, width=0.125, padding="same")
    assert all(not isinstance(layer, tf.keras.layers.ZeroPadding2D) for layer in same.layers)


def convolve(x, kernel, stride, pad):
    """Return the convolution by its definition, float64 [height, width, in] -> [.., .., out], one window at a time."""
    x = np.pad(x, [(pad, pad), (pad, pad), (0, 0)])
    size = kernel.shape[0]
    rows, columns = ((side - size) // stride + 1 for side in x.shape[:2])
    return np.array(
        [
            [
                np.tensordot(x[y * stride : y * stride + size, z * stride : z * stride + size], kernel, 3)
                for z in range(columns)
            ]
            for y in range(rows)
        ]
    )


@pytest.mark.parametrize("stride_in", ["3x3", "1x1"])
def test_a_striding_block_equals_its_definition(stride_in):
    """He et al.'s bottleneck with a projection, the stride in the 3x3 convolution (v1.5) or in the first 1x1 (v1)."""
    model = resnet50(10, width=0.125, stride_in=stride_in, zero_gamma="none")
    generator = np.random.Generator(np.random.Philox(4))
    for layer in model.layers:
        if isinstance(layer, tf.keras.layers.BatchNormalization):
            shape = layer.gamma.shape
            layer.set_weights([generator.uniform(low, 2, shape) for low in (0.5, -2, -2, 0.5)])
    before, after = model.get_layer("conv2_block3_out_relu").output, model.get_layer("conv3_block1_out_relu").output
    images = generator.standard_normal([1, 9, 9, before.shape[-1]]).astype(np.float32)
    found = tf.keras.Model(before, after)(images).numpy()[0]

    def conv_bn(x, name, stride, pad=0):
        kernel = model.get_layer(f"conv3_block1_{name}_conv").get_weights()[0].astype(np.float64)
        gamma, beta, mean, variance = model.get_layer(f"conv3_block1_{name}_bn").get_weights()
        return (convolve(x, kernel, stride, pad) - mean) / np.sqrt(variance + 1e-5) * gamma + beta

    x = images[0].astype(np.float64)
    first, second = (1, 2) if stride_in == "3x3" else (2, 1)
    y = np.maximum(conv_bn(x, "1", first), 0)
    y = np.maximum(conv_bn(y, "2", second, pad=1), 0)
    expected = np.maximum(conv_bn(y, "3", 1) + conv_bn(x, "0", 2), 0)
    assert found.shape == expected.shape == (5, 5, 64)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_bfloat16_computes_the_same_network_with_float32_weights():
    full, half = (resnet50(10, width=0.25, precision=precision, seed=3) for precision in ("float32", "bfloat16"))
    assert [v.name for v in full.variables] == [v.name for v in half.variables]
    assert all(variable.dtype == tf.float32 for variable in half.variables)
    for one, other in zip(full.variables, half.variables):
        np.testing.assert_array_equal(one.numpy(), other.numpy())
    assert half.get_layer("conv4_block1_2_conv").compute_dtype == "bfloat16"
    images = np.random.Generator(np.random.Philox(3)).standard_normal([4, 64, 64, 3]).astype(np.float32)
    expected, found = full(images), half(images)
    assert found.dtype == tf.float32  # the classifier is not rounded
    error = np.abs(found.numpy() - expected.numpy()).max() / np.abs(expected.numpy()).max()
    assert 1e-5 < error < 0.05  # rounded to 8 bits, not less exact


@pytest.mark.parametrize("padding, first", [("symmetric", 1.0), ("caffe", 2.0), ("same", 2.0)])
def test_the_first_window_of_the_pool_for_each_padding(padding, first):
    """Rows 0, 1, 2 ... hold 0, 1, 2 ...: the first window covers rows 0-1 if padded in front, else 0-2."""
    model = resnet50(10, width=0.125, padding=padding)
    start = model.get_layer("conv1_relu").output
    pool = tf.keras.Model(start, model.get_layer("pool1_pool").output)
    ramp = np.broadcast_to(np.arange(8, dtype=np.float32)[None, :, None, None], [1, 8, 8, 8])
    assert pool(ramp).numpy()[0, 0, 0, 0] == first


@pytest.mark.parametrize("choice, zeros", [("all", 16), ("last", 4), ("none", 0)])
def test_zero_gamma(choice, zeros):
    gammas = [v for v in resnet50(10, width=0.125, zero_gamma=choice).trainable_variables if "gamma" in v.name]
    silent = [gamma.name for gamma in gammas if not gamma.numpy().any()]
    assert len(gammas) == 53 and len(silent) == zeros
    assert all("_3_bn" in name for name in silent)
    if choice == "last":
        assert [name.split("_3_bn")[0] for name in silent] == [
            "conv2_block3",
            "conv3_block4",
            "conv4_block6",
            "conv5_block3",
        ]


def test_initial_weights_have_the_published_variances_and_follow_the_seed():
    model = resnet50(seed=1)
    deviation = {v.name: float(v.numpy().std()) for v in model.trainable_variables if "kernel" in v.name}
    assert deviation["conv1_conv/kernel:0"] == pytest.approx((2 / (49 * 64)) ** 0.5, rel=0.03)  # fan out
    assert deviation["conv4_block2_2_conv/kernel:0"] == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.03)  # fan in
    assert deviation["logits/kernel:0"] == pytest.approx(0.01, rel=0.03)
    kernels = [
        resnet("resnet18", 10, width=0.1, seed=seed).get_layer("conv1_conv").get_weights()[0] for seed in (1, 1, 2)
    ]
    assert np.array_equal(kernels[0], kernels[1]) and not np.array_equal(kernels[0], kernels[2])


def test_batch_norm_has_the_given_constants():
    layer = resnet50(10, width=0.125, bn_momentum=0.95, bn_epsilon=3e-5).get_layer("conv4_block1_2_bn")
    assert (layer.momentum, layer.epsilon) == (0.95, 3e-5)


def test_small_stem_keeps_the_resolution():
    model = resnet("resnet18", 10, width=0.1, stem="small")
    assert model.get_layer("conv1_conv").kernel_size == (3, 3) and model.get_layer("conv1_conv").strides == (1, 1)
    assert not [layer for layer in model.layers if "pool1" in layer.name]


def test_an_unknown_model_is_refused():
    with pytest.raises(FlagError, match="resnet51"):
        resnet("resnet51")
