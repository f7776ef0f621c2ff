"""The gradients of a ResNet as a table: names, shapes, work, and the order in which backward yields them.

Plain arithmetic, without TensorFlow. The simulator and benchmarks/replay.py thus use the tensors of the real network,
`resnet_cpu.model.resnet`; tests/test_tensors.py checks that the two agree.
"""

import dataclasses
import functools
import itertools
import math
from typing import List, NamedTuple, Sequence, Tuple

from resnet_cpu.settings import depths_of

BYTES_PER_WEIGHT = 4  # float32, whatever the activations are
# Batch norm, ReLU and additions do little arithmetic and move much memory. For an element of a convolution's output
# their backward takes as long as 400 FLOPs of a convolution's (BUILD_NOTES.md, "Where the time goes", float32: 266 + 91
# + 85 ms for 32 images of 11.1 million elements each, beside 787 GFLOP of convolutions in 2,443 ms).
FLOPS_PER_ELEMENT = 400.0


@dataclasses.dataclass(frozen=True)
class Gradient:
    """The gradient of one trainable tensor."""

    name: str  # of the Keras variable, without ":0"
    shape: Tuple[int, ...]
    backward_work: float  # of backward between the previous gradient and this one, in FLOPs of a convolution

    @property
    def elements(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Return the size of the message that carries it."""
        return BYTES_PER_WEIGHT * self.elements


@functools.lru_cache(maxsize=64)
def gradients(
    model: str = "resnet50",
    width: float = 1.0,
    num_classes: int = 1000,
    stem: str = "imagenet",
    conv1_bias: bool = False,
    image_size: int = 224,
    stride_in: str = "3x3",
    inter_op_threads: int = 2,
) -> Tuple[Gradient, ...]:
    """Return the gradients in the order in which backward yields them.

    The classifier comes first and the first convolution last. Where a block has a projection, the gradient of the sum
    reaches both paths at the same time; TensorFlow runs ready operations in turn, so layers of the two paths alternate.
    With a single inter-op thread TensorFlow postpones kernels, see `_postponed`.

    Args:
        model, width, num_classes, stem, conv1_bias, stride_in: arguments of `resnet_cpu.model.resnet.resnet`.
        image_size: pixels of the square image; work depends on it, shapes do not.
        inter_op_threads: of TensorFlow; all numbers above 1 give the same order.

    Raises FlagError for an unknown model.
    """
    blocks, bottleneck = depths_of(model)
    net = _Walk(width, image_size)
    net.conv("conv1", net.channels(64), 3, 7 if stem == "imagenet" else 3, 2 if stem == "imagenet" else 1, conv1_bias)
    if stem == "imagenet":
        net.size = (net.size + 1) // 2
    last = net.channels(64)
    for stage, count in enumerate(blocks):
        for block in range(count):
            stride = 2 if stage > 0 and block == 0 else 1
            name = f"conv{stage + 2}_block{block + 1}"
            last = net.block(name, last, 64 * 2**stage, stride, block == 0, bottleneck, stride_in)
    net.dense("logits", last, num_classes)
    return _postponed(net.layers) if inter_op_threads == 1 else _in_turn(net.layers)


def ready_shares(gradients: Sequence[Gradient]) -> Tuple[float, ...]:
    """Return, for each gradient in its order, the share of the time of backward after which it is ready."""
    total = sum(gradient.backward_work for gradient in gradients)
    return tuple(done / total for done in itertools.accumulate(gradient.backward_work for gradient in gradients))


class _Layer(NamedTuple):
    """One layer that has weights."""

    name: str
    tensors: Tuple[Tuple[str, Tuple[int, ...]], ...]  # (kind, shape) in the order of their gradients
    input_work: float  # of the gradient of the layer's inputs; of batch norm the work of all its gradients
    kernel_work: float  # of the gradient of the kernel; 0 for batch norm


class _Walk:
    """Collect the layers in the order of forward."""

    def __init__(self, width: float, size: int) -> None:
        self.width, self.size = width, size
        self.layers: List[_Layer] = []

    def channels(self, count: int) -> int:
        return max(1, round(count * self.width))

    def conv(self, name: str, channels: int, inputs: int, kernel: int, stride: int, bias: bool = False) -> None:
        """Add a convolution and the batch norm that follows it."""
        size = self.size = -(-self.size // stride)
        flops = 2.0 * kernel * kernel * inputs * channels * size * size
        tensors: Tuple[Tuple[str, Tuple[int, ...]], ...] = (("kernel", (kernel, kernel, inputs, channels)),)
        if bias:
            tensors = (("bias", (channels,)), *tensors)
        input_work = flops if self.layers else 0.0  # the gradient of the images is not computed
        self.layers.append(_Layer(f"{name}_conv", tensors, input_work, flops))
        norm = (("beta", (channels,)), ("gamma", (channels,)))
        self.layers.append(_Layer(f"{name}_bn", norm, FLOPS_PER_ELEMENT * channels * size * size, 0.0))

    def block(
        self, name: str, inputs: int, channels: int, stride: int, project: bool, bottleneck: bool, stride_in: str
    ) -> int:
        """Add a residual block and return the number of channels of its output."""
        entry = self.size
        inner, outer = self.channels(channels), self.channels((4 if bottleneck else 1) * channels)
        if bottleneck:
            first, second = (stride, 1) if stride_in == "1x1" else (1, stride)
            self.conv(f"{name}_1", inner, inputs, 1, first)
            self.conv(f"{name}_2", inner, inner, 3, second)
            self.conv(f"{name}_3", outer, inner, 1, 1)
        else:
            self.conv(f"{name}_1", outer, inputs, 3, stride)
            self.conv(f"{name}_2", outer, outer, 3, 1)
        if project and (stride != 1 or inputs != outer):
            out = self.size
            self.size = entry
            self.conv(f"{name}_0", outer, inputs, 1, stride)
            assert self.size == out
            last_conv, last_norm, side_conv, side_norm = self.layers[-4:]
            self.layers[-4:] = [side_conv, last_conv, side_norm, last_norm]
        return outer

    def dense(self, name: str, inputs: int, outputs: int) -> None:
        """Add the classifier."""
        flops = 2.0 * inputs * outputs
        tensors = (("bias", (outputs,)), ("kernel", (inputs, outputs)))
        self.layers.append(_Layer(name, tensors, flops, flops))


def _in_turn(layers: Sequence[_Layer]) -> Tuple[Gradient, ...]:
    """Return the gradients of a backward pass that finishes each layer before it starts the next."""
    found: List[Gradient] = []
    for layer in reversed(layers):
        found += _gradients_of(layer, layer.input_work + layer.kernel_work)
    return tuple(found)


def _postponed(layers: Sequence[_Layer]) -> Tuple[Gradient, ...]:
    """Return the gradients in the order of TensorFlow with one inter-op thread: most kernels, so most bytes, last.

    The executor continues with the gradient of a layer's inputs and postpones that of the kernel, last in, first out.
    Gradients of batch norm come during the way from the classifier to the first convolution. Kernels of a block with a
    projection come when the block is finished, all others after the first convolution, in the order of forward. This
    order was read from Horovod's timelines of ResNet-50 and ResNet-18. With two or more inter-op threads the timelines
    show the order of `_in_turn`, except for 1 % of pairs.
    """
    found: List[Gradient] = []
    waiting: List[_Layer] = []
    projection_layers: List[_Layer] = []
    pending = 0.0  # work since the last gradient

    def finish(layer: _Layer, work: float) -> None:
        nonlocal pending
        found.extend(_gradients_of(layer, pending + work))
        pending = 0.0

    names = {layer.name for layer in layers}
    for layer in reversed(layers):
        prefix = layer.name.rpartition("_")[0]
        block = prefix[:-2]
        if prefix.endswith("_0"):
            projection_layers.append(layer)
        elif layer.kernel_work:
            pending += layer.input_work
            waiting.append(layer)
        else:
            finish(layer, layer.input_work)
        if projection_layers and layer.name == f"{block}_1_conv" and f"{block}_0_conv" in names:
            for late in [late for late in reversed(waiting) if late.name.startswith(f"{block}_")]:
                waiting.remove(late)
                finish(late, late.kernel_work)
            norm, projection = projection_layers
            projection_layers = []
            finish(norm, norm.input_work)
            pending += projection.input_work
            waiting.append(projection)
    for late in reversed(waiting):
        finish(late, late.kernel_work)
    return tuple(found)


def _gradients_of(layer: _Layer, work: float) -> List[Gradient]:
    """Return the gradients of a layer; its work counts with the first of them."""
    return [
        Gradient(f"{layer.name}/{kind}", shape, 0.0 if number else work)
        for number, (kind, shape) in enumerate(layer.tensors)
    ]
