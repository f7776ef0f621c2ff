"""The work of a training step of ResNet-50, part by part: FLOPs and bytes, as benchmarks/roofline.py defines them."""

import dataclasses
from typing import Any, Dict, List, Tuple

BYTES = {"float32": 4, "bfloat16": 2}  # of a value of an activation, and of a weight as the layers read it


@dataclasses.dataclass(frozen=True)
class Conv:
    """Convolution of the network: shapes as (height, width, channels), padding included in the input."""

    inputs: Tuple[int, int, int]
    outputs: Tuple[int, int, int]
    kernel: int
    stride: int
    padding: int  # on each side, included in `inputs`
    first: bool  # of the network: the gradient of its input is not needed
    precision: str

    @property
    def passes(self) -> Tuple[str, ...]:
        return ("forward", "kernel") if self.first else ("forward", "input", "kernel")

    def flops(self, batch: int, padding: bool = True) -> float:
        """Return the FLOPs of a pass, with or without the multiplications by padding."""
        height, width, channels = self.outputs
        taps = self.kernel**2 * height * width if padding else self._taps(0) * self._taps(1)
        return 2.0 * batch * taps * channels * self.inputs[2]

    def _taps(self, axis: int) -> int:
        """Return the number of pairs (output position, kernel position) along an axis that fall on the image."""
        image = range(self.padding, self.inputs[axis] - self.padding)
        return sum(self.stride * at + tap in image for at in range(self.outputs[axis]) for tap in range(self.kernel))

    def bytes(self, batch: int) -> float:
        """Return the bytes of a pass: input, output and kernel once, or their gradients."""
        height, width = (side - 2 * self.padding for side in self.inputs[:2])
        ins, outs = batch * height * width * self.inputs[2], batch * self.outputs[0] * self.outputs[1] * self.outputs[2]
        return BYTES[self.precision] * (ins + outs + self.kernel**2 * self.inputs[2] * self.outputs[2])


@dataclasses.dataclass(frozen=True)
class Part:
    """Part of a training step: FLOPs and bytes per batch."""

    name: str
    flops: float
    bytes: float

    def seconds(self, flops_per_s: float, bytes_per_s: float) -> float:
        return max(self.flops / flops_per_s, self.bytes / bytes_per_s)


def convolutions(model: Any, precision: str) -> List[Conv]:
    """Return the convolutions of a Keras model in the order of its layers."""
    found = []
    for layer in model.layers:
        if type(layer).__name__ == "Conv2D":
            kernel, stride = layer.kernel_size[0], layer.strides[0]
            padding = (kernel - 1) // 2
            height, width, channels = layer.input.shape[1:]
            if layer.padding == "same":  # otherwise a layer before it pads
                height, width = height + 2 * padding, width + 2 * padding
            ins, outs = (height, width, channels), tuple(layer.output.shape[1:])
            found.append(Conv(ins, outs, kernel, stride, padding, not found, precision))
    return found


def parts(model: Any, batch: int, precision: str, padding: bool = True) -> List[Part]:
    """Return the parts of a step by the definition above; without `padding`, leave out multiplications by zero."""
    found = []
    for conv in convolutions(model, precision):
        found += [
            Part(f"convolutions {conv.kernel}x{conv.kernel}, {way}", conv.flops(batch, padding), conv.bytes(batch))
            for way in conv.passes
        ]
    for layer in model.layers:
        kind = type(layer).__name__
        if kind == "InputLayer":
            continue
        size = BYTES["float32" if kind == "Dense" else precision]
        source = layer.input[0] if isinstance(layer.input, list) else layer.input
        outs, ins = (size * batch * _elements(tensor.shape) for tensor in (layer.output, source))
        if kind == "BatchNormalization":
            found += [
                Part("batch norm and ReLU, forward", 0, 3 * outs),
                Part("batch norm and ReLU, backward", 0, 5 * outs),
            ]
        elif kind == "Add":
            found += [Part("additions, forward", 0, outs), Part("additions, backward", 0, 2 * outs)]
        elif kind == "MaxPooling2D":
            found += [Part("pools", 0, ins + outs), Part("pools", 0, ins + outs + ins)]
        elif kind == "GlobalAveragePooling2D":
            found += [Part("pools", 0, ins + outs), Part("pools", 0, ins + outs)]
        elif kind == "Dense":
            weights = layer.count_params()
            found += [Part("classifier", 2.0 * ins / size * layer.units, ins + outs + size * weights)] * 3
    weights = sum(_elements(variable.shape) for variable in model.trainable_variables)
    found.append(Part("update", 0, 5.0 * BYTES["float32"] * weights))
    return found


def _elements(shape: Any) -> int:
    count = 1
    for side in shape:
        count *= side or 1  # None is the batch dimension
    return count


def summed(found: List[Part], flops_per_s: float, bytes_per_s: float) -> Dict[str, Tuple[float, float, float]]:
    """Return (GFLOP, GB, seconds at the ceilings) of the parts of each name."""
    table: Dict[str, Tuple[float, float, float]] = {}
    for part in found:
        flops, moved, seconds = table.get(part.name, (0.0, 0.0, 0.0))
        seconds += part.seconds(flops_per_s, bytes_per_s)
        table[part.name] = (flops + part.flops / 1e9, moved + part.bytes / 1e9, seconds)
    return table
