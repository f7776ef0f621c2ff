"""The trainable tensors of a ResNet as a table: names, shapes, work, and the order in which gradients come.

Plain arithmetic, without TensorFlow: what is predicted for a cluster, and replayed on one, is of the real network
(`resnet_cpu.model.resnet`; `tests/test_layers.py` holds the two together).
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
class Layer:
    """One trainable tensor and the layer it belongs to."""

    name: str  # as Keras names the variable, without ":0"
    shape: Tuple[int, ...]
    forward_flops: float  # of its layer for one image, two for a multiply-add; a layer's kernel carries them all
    backward_work: float  # what backward does from the gradient before it to its own, in FLOPs of a convolution

    @property
    def elements(self) -> int:
        """Return how many numbers it holds."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Return the size of its gradient as it is sent."""
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
) -> Tuple[Layer, ...]:
    """Return the trainable tensors in the order in which backward yields their gradients.

    That is the classifier first and the first convolution last. Where a block has a projection beside it, the gradient
    of the sum reaches both at once; TensorFlow runs what is ready in turn, so layers of the two paths alternate. With
    a single inter-op thread TensorFlow postpones kernels, see `_postponed`.

    Args:
        model, width, num_classes, stem, conv1_bias, stride_in: those of `resnet_cpu.model.resnet.resnet`.
        image_size: pixels of the square image; shapes do not depend on it, FLOPs do.
        inter_op_threads: of TensorFlow; 1, or more.

    Raises FlagError for a model that is not known.
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
    return _postponed(net.steps) if inter_op_threads == 1 else _in_turn(net.steps)


def ready_shares(tensors: Sequence[Layer]) -> Tuple[float, ...]:
    """Return, for each tensor in the order of `gradients`, the share of backward's time after which it is ready."""
    total = sum(tensor.backward_work for tensor in tensors)
    return tuple(done / total for done in itertools.accumulate(tensor.backward_work for tensor in tensors))


class _Step(NamedTuple):
    """One layer that has weights."""

    name: str
    tensors: Tuple[Tuple[str, Tuple[int, ...]], ...]  # in the order in which their gradients come
    flops: float  # forward, one image
    chain: float  # work of the gradient that goes on to the layer before; of batch norm all it does
    kernel: float  # work of the kernel's own gradient; batch norm has none


class _Walk:
    """Collects layers in the order of forward."""

    def __init__(self, width: float, size: int) -> None:
        self.width, self.size = width, size
        self.steps: List[_Step] = []

    def channels(self, count: int) -> int:
        return max(1, round(count * self.width))

    def conv(self, name: str, channels: int, inputs: int, kernel: int, stride: int, bias: bool = False) -> None:
        """Add a convolution and the batch norm that follows it."""
        size = self.size = -(-self.size // stride)
        flops = 2.0 * kernel * kernel * inputs * channels * size * size
        tensors: Tuple[Tuple[str, Tuple[int, ...]], ...] = (("kernel", (kernel, kernel, inputs, channels)),)
        if bias:
            tensors = (("bias", (channels,)), *tensors)
        chain = flops if self.steps else 0.0  # nobody asks for the gradient of the images
        self.steps.append(_Step(f"{name}_conv", tensors, flops, chain, flops))
        norm = (("beta", (channels,)), ("gamma", (channels,)))
        self.steps.append(_Step(f"{name}_bn", norm, 0.0, FLOPS_PER_ELEMENT * channels * size * size, 0.0))

    def block(
        self, name: str, inputs: int, channels: int, stride: int, project: bool, bottleneck: bool, stride_in: str
    ) -> int:
        """Add a residual block; return the channels of its output."""
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
            last_conv, last_norm, side_conv, side_norm = self.steps[-4:]
            self.steps[-4:] = [side_conv, last_conv, side_norm, last_norm]
        return outer

    def dense(self, name: str, inputs: int, outputs: int) -> None:
        """Add the classifier."""
        flops = 2.0 * inputs * outputs
        tensors = (("bias", (outputs,)), ("kernel", (inputs, outputs)))
        self.steps.append(_Step(name, tensors, flops, flops, flops))


def _in_turn(steps: Sequence[_Step]) -> Tuple[Layer, ...]:
    """Return the tensors as a backward pass yields them that finishes a layer before it goes on."""
    found: List[Layer] = []
    for step in reversed(steps):
        found += _yielded(step, step.chain + step.kernel)
    return tuple(found)


def _postponed(steps: Sequence[_Step]) -> Tuple[Layer, ...]:
    """Return the tensors as TensorFlow yields them with one inter-op thread: most kernels, so most bytes, at the end.

    Its executor goes on with the gradient of a layer's inputs and leaves that of the kernel for later, last in, first
    out. Batch norm's gradients come on the way down; the kernels of a block that has a projection come when its turn
    does, all others after the first convolution, from there up. Seen in Horovod's timelines of ResNet-50 and ResNet-18;
    with two inter-op threads and more they show the order of `_in_turn`, but for 1 % of pairs.
    """
    found: List[Layer] = []
    waiting: List[_Step] = []
    side: List[_Step] = []
    pending = 0.0  # work on the way down since a gradient was last yielded

    def take(step: _Step, work: float) -> None:
        nonlocal pending
        found.extend(_yielded(step, pending + work))
        pending = 0.0

    names = {step.name for step in steps}
    for step in reversed(steps):
        block, _, last = step.name.rpartition("_")
        if block.endswith("_0"):
            side.append(step)
        elif step.kernel:
            pending += step.chain
            waiting.append(step)
        else:
            take(step, step.chain)
        if side and step.name == f"{block[:-2]}_1_conv" and f"{block[:-2]}_0_conv" in names:
            for late in [late for late in reversed(waiting) if late.name.startswith(block[:-2])]:
                waiting.remove(late)
                take(late, late.kernel)
            norm, projection = side
            side = []
            take(norm, norm.chain)
            pending += projection.chain
            waiting.append(projection)
    for late in reversed(waiting):
        take(late, late.kernel)
    return tuple(found)


def _yielded(step: _Step, work: float) -> List[Layer]:
    """Return the tensors of a layer; its work counts with the first of them."""
    return [
        Layer(f"{step.name}/{kind}", shape, step.flops if kind == "kernel" else 0.0, 0.0 if number else work)
        for number, (kind, shape) in enumerate(step.tensors)
    ]
