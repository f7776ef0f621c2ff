"""Residual networks (He et al., arXiv 1512.03385) as functional Keras models that return logits.

By default the network is the usual "v1.5" (stride in the 3x3 convolution), which is also the authors'. Layers are
named as in keras.applications, so that weights can be matched by name.
"""

import functools
import zlib
from typing import Any, Callable, Dict, NamedTuple, Optional

import tensorflow as tf

from resnet_cpu.model.ghost_batch_norm import GhostBatchNormalization
from resnet_cpu.model.kernels.batch_norm import FusedBatchNormalization
from resnet_cpu.model.kernels.convolution import SinglePixelConv2D
from resnet_cpu.settings import depths_of

layers = tf.keras.layers


def resnet(
    name: str = "resnet50",
    num_classes: int = 1000,
    *,
    width: float = 1.0,
    stem: str = "imagenet",
    stride_in: str = "3x3",
    padding: str = "symmetric",
    zero_gamma: str = "last",
    bn_momentum: float = 0.9,
    bn_epsilon: float = 1e-5,
    bn_stats_batch: Optional[int] = None,
    conv1_bias: bool = False,
    precision: str = "float32",
    fused_kernels: bool = False,
    seed: int = 0,
) -> tf.keras.Model:
    """Return a ResNet from float32 images [batch, height, width, 3] to logits [batch, num_classes].

    Args:
        name: one of `resnet_cpu.settings.DEPTHS`; FlagError otherwise.
        num_classes: length of the logits.
        width: factor on the number of channels of every layer.
        stem: `imagenet` (7x7 stride 2, pool 3x3 stride 2) or `small` (3x3 stride 1, no pool) for small images.
        stride_in: convolution of a stage's first bottleneck that has stride 2: `3x3` (v1.5) or `1x1` (v1).
        padding: of strided windows: `symmetric` ((k-1)/2 zeros on both sides, as in PyTorch and keras.applications),
            `caffe` (the same for convolutions, pooling rounded up as in the authors' Caffe) or `same` (TensorFlow's).
        zero_gamma: residual branches whose last gamma starts at zero: of `all` blocks (Goyal et al., arXiv
            1706.02677), of the `last` block of each stage (the authors' train_val.prototxt), or of `none`.
        bn_momentum: share of the moving statistics that is kept in each step.
        bn_epsilon: added to the variance.
        bn_stats_batch: number of images over which batch norm computes its statistics in training; None: all.
        conv1_bias: give the first convolution a bias, as in the authors' network.
        precision: type of activations and products; with `bfloat16` the weights, batch norm's statistics and the
            classifier stay float32 (Kalamkar et al., arXiv 1905.12322).
        fused_kernels: compute training with the operations of `resnet_cpu.model.kernels`, whose library must load:
            batch norm, addition and ReLU as one. Variables keep their names.
        seed: seed of the initial weights. They are normal with variance 2/fan_in, 2/fan_out in the first convolution
            and standard deviation 0.01 in the classifier (the authors' fillers).
    """
    blocks, bottleneck = depths_of(name)
    net = _Builder(width, stride_in, padding, bn_momentum, bn_epsilon, bn_stats_batch, precision, fused_kernels, seed)
    inputs = layers.Input([None, None, 3], name="images")
    branches = net.stem(inputs, stem, conv1_bias)
    for stage, count in enumerate(blocks):
        for block in range(count):
            branches = net.block(
                branches,
                64 * 2**stage,
                2 if stage > 0 and block == 0 else 1,
                bottleneck=bottleneck,
                project=block == 0,
                zero=zero_gamma == "all" or (zero_gamma == "last" and block == count - 1),
                last=stage == len(blocks) - 1 and block == count - 1,
                name=f"conv{stage + 2}_block{block + 1}",
            )
    x = layers.GlobalAveragePooling2D(name="avg_pool", dtype=net.dtype)(branches.main)
    initializer = tf.keras.initializers.RandomNormal(0.0, 0.01, net.seed("logits"))
    dtype = None if precision == "float32" else "float32"
    logits = layers.Dense(num_classes, kernel_initializer=initializer, dtype=dtype, name="logits")(x)
    return tf.keras.Model(inputs, logits, name=name)


def resnet50(num_classes: int = 1000, **options) -> tf.keras.Model:  # type: ignore[no-untyped-def]
    """Return the 50-layer network; for `options` see `resnet`."""
    return resnet("resnet50", num_classes, **options)


class _Inputs(NamedTuple):
    """Hold the inputs of a block's two branches: the same values, as two tensors where fused kernels make them."""

    main: tf.Tensor
    shortcut: tf.Tensor


class _Builder:
    """Build the parts of one network; holds the options that all of its layers share."""

    def __init__(
        self,
        width: float,
        stride_in: str,
        padding: str,
        bn_momentum: float,
        bn_epsilon: float,
        bn_stats_batch: Optional[int],
        precision: str,
        fused_kernels: bool,
        seed: int,
    ) -> None:
        self.width, self.stride_in, self.padding = width, stride_in, padding
        self.bn_momentum, self.bn_epsilon, self.base_seed = bn_momentum, bn_epsilon, seed
        self.batch_norm: Callable[..., tf.keras.layers.Layer] = layers.BatchNormalization
        if bn_stats_batch is not None:
            self.batch_norm = functools.partial(GhostBatchNormalization, bn_stats_batch)
        self.fused_kernels, self.stats_batch = fused_kernels, bn_stats_batch
        # None: Keras' default type, which is float32 outside of tests.
        self.dtype = None if precision == "float32" else f"mixed_{precision}"

    def seed(self, name: str) -> int:
        """Return a seed for the layer `name` that does not depend on the layers built before it."""
        return zlib.crc32(f"{self.base_seed}/{name}".encode())

    def channels(self, count: int) -> int:
        return max(1, round(count * self.width))

    def conv(
        self, x: tf.Tensor, channels: int, kernel: int, stride: int, name: str, fan: str = "fan_in", bias: bool = False
    ) -> tf.Tensor:
        padding = "same"
        if stride > 1 and kernel > 1 and self.padding != "same":
            # With a stride, TensorFlow's "same" pads one side more than the other.
            x = layers.ZeroPadding2D((kernel - 1) // 2, dtype=self.dtype, name=f"{name}_pad")(x)
            padding = "valid"
        initializer = tf.keras.initializers.VarianceScaling(2.0, fan, "untruncated_normal", self.seed(name))
        convolution = SinglePixelConv2D if self.fused_kernels else layers.Conv2D
        return convolution(
            channels,
            kernel,
            stride,
            padding,
            use_bias=bias,
            kernel_initializer=initializer,
            dtype=self.dtype,
            name=f"{name}_conv",
        )(x)

    def bn(self, x: tf.Tensor, name: str) -> tf.Tensor:
        """Apply batch norm that neither an addition nor a ReLU follows."""
        if self.fused_kernels:
            return self.fused(name, zero=False, relu=False)(x)
        return self.plain_bn(name, zero=False)(x)

    def activated(self, x: tf.Tensor, name: str) -> tf.Tensor:
        """Apply batch norm and ReLU."""
        if self.fused_kernels:
            return self.fused(name, zero=False)(x)
        return layers.ReLU(dtype=self.dtype, name=f"{name}_relu")(self.plain_bn(name, zero=False)(x))

    def joined(self, x: tf.Tensor, shortcut: tf.Tensor, zero: bool, last: bool, norm: str, name: str) -> _Inputs:
        """Apply the batch norm `norm` to the end of a block's main branch, add the shortcut, and apply ReLU."""
        if not self.fused_kernels:
            x = layers.Add(dtype=self.dtype, name=f"{name}_add")([shortcut, self.plain_bn(norm, zero)(x)])
            x = layers.ReLU(dtype=self.dtype, name=f"{name}_out_relu")(x)
            return _Inputs(x, x)
        if last:  # only the pooling follows
            x = self.fused(norm, zero)([x, shortcut])
            return _Inputs(x, x)
        return _Inputs(*self.fused(norm, zero, copies=2)([x, shortcut]))

    def plain_bn(self, name: str, zero: bool) -> tf.keras.layers.Layer:
        return self.batch_norm(**self.options_of_bn(name, zero))

    def fused(self, name: str, zero: bool, relu: bool = True, copies: int = 1) -> tf.keras.layers.Layer:
        return FusedBatchNormalization(relu, copies, self.stats_batch, **self.options_of_bn(name, zero))

    def options_of_bn(self, name: str, zero: bool) -> Dict[str, Any]:
        return {
            "momentum": self.bn_momentum,
            "epsilon": self.bn_epsilon,
            "gamma_initializer": "zeros" if zero else "ones",
            "dtype": self.dtype,
            "name": f"{name}_bn",
        }

    def stem(self, x: tf.Tensor, kind: str, bias: bool) -> _Inputs:
        channels = self.channels(64)
        if kind == "small":
            x = self.conv(x, channels, 3, 1, "conv1", "fan_out", bias)
            if self.fused_kernels:
                return _Inputs(*self.fused("conv1", zero=False, copies=2)(x))
            x = self.activated(x, "conv1")
            return _Inputs(x, x)
        x = self.activated(self.conv(x, channels, 7, 2, "conv1", "fan_out", bias), "conv1")
        if self.padding == "symmetric":
            # Padding with zeros equals padding with minus infinity here, since the values come from a ReLU.
            x = layers.ZeroPadding2D(1, dtype=self.dtype, name="pool1_pad")(x)
            x = layers.MaxPool2D(3, 2, "valid", dtype=self.dtype, name="pool1_pool")(x)
        else:
            # For even sizes this is Caffe's rounding up.
            x = layers.MaxPool2D(3, 2, "same", dtype=self.dtype, name="pool1_pool")(x)
        return _Inputs(x, x)

    def block(
        self,
        inputs: _Inputs,
        channels: int,
        stride: int,
        *,
        bottleneck: bool,
        project: bool,
        zero: bool,
        last: bool,
        name: str,
    ) -> _Inputs:
        """Add a residual block."""
        inner, outer = self.channels(channels), self.channels((4 if bottleneck else 1) * channels)
        shortcut = self.shortcut(inputs.shortcut, outer, stride, project, name)
        x = inputs.main
        if bottleneck:
            first, second = (stride, 1) if self.stride_in == "1x1" else (1, stride)
            x = self.activated(self.conv(x, inner, 1, first, f"{name}_1"), f"{name}_1")
            x = self.activated(self.conv(x, inner, 3, second, f"{name}_2"), f"{name}_2")
            x = self.conv(x, outer, 1, 1, f"{name}_3")
        else:
            x = self.activated(self.conv(x, outer, 3, stride, f"{name}_1"), f"{name}_1")
            x = self.conv(x, outer, 3, 1, f"{name}_2")
        return self.joined(x, shortcut, zero, last, f"{name}_3" if bottleneck else f"{name}_2", name)

    def shortcut(self, x: tf.Tensor, channels: int, stride: int, project: bool, name: str) -> tf.Tensor:
        if not project or (stride == 1 and x.shape[-1] == channels):
            return x
        return self.bn(self.conv(x, channels, 1, stride, f"{name}_0"), f"{name}_0")
