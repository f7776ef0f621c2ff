"""A training step on N nodes, as events: gradients come, are negotiated, fused, reduced; the slowest rank counts.

What is modelled and with which formulas: docs/simulate.md. Times are seconds, sizes bytes.
"""

import dataclasses
import functools
import math
from typing import Callable, List, Optional, Sequence, Tuple, Union

import numpy as np

from resnet_cpu.errors import FlagError
from resnet_cpu.model import tensors as layers
from resnet_cpu.model.tensors import Layer
from resnet_cpu.simulator.network import Network, World, fused_allreduce, message, recursive_doubling

MIB = 2**20
DISK_BANDWIDTH = 1e9  # bytes/s at which rank 0 writes a checkpoint; assumed
BACKWARD_SHARE = 2 / 3  # of the time of forward and backward; 0.69 in BUILD_NOTES.md, "Where the time goes"
Jitter = Union[float, Tuple[float, ...]]  # deviation of a lognormal, or step times relative to their mean


@dataclasses.dataclass(frozen=True)
class Exchange:
    """How gradients are handed over. Defaults are those of Horovod 0.28.1 (operations.cc, global_state.h)."""

    cycle_s: float = 1e-3  # HOROVOD_CYCLE_TIME
    wake_s: float = 5e-5  # how late a sleeping thread wakes: Linux's timer slack (prctl(2), PR_SET_TIMERSLACK)
    fusion_bytes: int = 128 * MIB  # HOROVOD_FUSION_THRESHOLD
    cached: bool = True  # HOROVOD_CACHE_CAPACITY > 0, and all tensors seen before
    negotiated: bool = True  # False: every tensor is reduced when it comes, as MLSL does it under Caffe
    request_s: float = 2e-6  # the coordinator's work on one rank's list of requests; assumed

    @property
    def period_s(self) -> float:
        """Return the seconds from one look at what is ready to the next, where there is nothing to do."""
        return self.cycle_s + self.wake_s if self.cycle_s else 0.0


@dataclasses.dataclass(frozen=True)
class Node:
    """How fast the ranks of a node compute and read."""

    image_s: float  # forward and backward of one image on one rank, seconds
    fixed_s: float = 0.0  # of a step, whatever the batch: the update
    batch_s: float = 0.0  # of each micro-batch, however few images it holds
    jitter: Jitter = 0.0
    interference: float = 0.0  # share of a rank's compute that is lost while it communicates
    input_images_per_s: Optional[float] = None  # read and decoded by one rank; None: always in time


@dataclasses.dataclass(frozen=True)
class Step:
    """A step and what it is made of; the parts add up to `total`."""

    compute: float  # mean rank, alone: forward, backward and update
    jitter: float  # waiting for the slowest rank
    allreduce: float  # messages not hidden behind backward
    coordinator: float  # Horovod's cycles and negotiation, as far as they are not hidden
    input: float  # waiting for images
    messages: int  # allreduces a step

    @property
    def total(self) -> float:
        """Return the seconds of the step."""
        return self.compute + self.jitter + self.allreduce + self.coordinator + self.input


def coordination(world: World, network: Network, exchange: Exchange, tensors: int) -> float:
    """Return the seconds of one cycle's negotiation.

    With the response cache: an allreduce of one bit a tensor and three of state (CacheCoordinator::sync). Without:
    sizes and lists gathered by rank 0, which reads them one by one, then the answer's size and the answer broadcast.
    """
    if world.ranks == 1 or not exchange.negotiated:
        return 0.0
    if exchange.cached:
        bits = 8.0 * -(-(tensors + 3) // 64)
        return recursive_doubling(bits, world, network)
    rounds = math.ceil(math.log2(world.ranks))
    return 4 * rounds * message(0.0, network, world.nodes > 1) + (world.ranks - 1) * exchange.request_s


def exchange_end(
    ready: Sequence[float],
    sizes: Sequence[int],
    compute_end: float,
    cost: Callable[[float, bool], float],
    exchange: Exchange,
    negotiation_s: float,
    interference: float = 0.0,
) -> Tuple[float, List[int]]:
    """Return when the last tensor is reduced and backward is done, and the bytes of each allreduce.

    Args:
        ready: when each tensor is there on the slowest rank, rising.
        compute_end: when that rank has computed all.
        cost: seconds of an allreduce of so many bytes, fused or not.
        interference: share of compute lost while messages are under way.

    As in RunLoopOnce: the background thread sleeps to the end of the cycle, negotiates what is there, fuses it in
    order, reduces one buffer after the other, and only then looks again.
    """
    done, lag, start = 0, 0.0, 0.0
    buffers: List[int] = []
    period = max(exchange.period_s, negotiation_s)
    while done < len(ready):
        wait = ready[done] + lag - start
        if wait > 0:
            start += math.ceil(wait / period - 1e-9) * period if period else wait
        first = done
        while done < len(ready) and ready[done] + lag <= start + 1e-12:
            done += 1
        if done == first:  # a cycle's start that rounding put before its tensor
            done += 1
        now = start + negotiation_s
        for size, count in fused(sizes[first:done], exchange.fusion_bytes):
            buffers.append(size)
            now += cost(size, count > 1)
        if start - lag < compute_end:
            lag += interference * min(now - start, (compute_end + lag - start) / max(1 - interference, 1e-9))
        start = max(start + exchange.period_s, now)
        end = now
    return max(end, compute_end + lag), buffers


def fused(sizes: Sequence[int], threshold: int) -> List[Tuple[int, int]]:
    """Return (bytes, tensors) of each buffer: tensors in order, as many as fit (Controller::FuseResponses)."""
    buffers: List[Tuple[int, int]] = []
    for size in sizes:
        if buffers and buffers[-1][0] + size <= threshold:
            buffers[-1] = (buffers[-1][0] + size, buffers[-1][1] + 1)
        else:
            buffers.append((size, 1))
    return buffers


def slowest(jitter: Jitter, count: int) -> float:
    """Return the expected time of the slowest of `count` ranks, of a mean of 1.

    A number is the deviation s of the logarithm of a lognormal of mean 1: the integral of exp(s z - s^2 / 2) over the
    density of the greatest of `count` normal numbers. A tuple holds measured times: sum over the sorted ones of
    x_i ((i / n)^count - ((i - 1) / n)^count), over their mean; it cannot exceed the slowest that was seen.
    """
    if isinstance(jitter, tuple):
        times = np.sort(np.asarray(jitter, float))
        shares = (np.arange(len(times) + 1) / len(times)) ** count
        return float(times @ np.diff(shares) / times.mean())
    if count == 1 or jitter == 0:
        return 1.0
    z, above = _normal()
    greatest = np.exp(count * np.log1p(-above))
    times = np.exp(jitter * z - jitter**2 / 2)
    return float((times[1:] + times[:-1]) / 2 @ np.diff(greatest))


@functools.lru_cache(maxsize=1)
def _normal() -> Tuple[np.ndarray, np.ndarray]:
    """Return a grid and the share of a normal distribution above each of its points."""
    z = np.linspace(-12, 12, 6001)
    above = np.array([math.erfc(point / math.sqrt(2)) / 2 for point in z])
    return z, np.minimum(above, 1 - 1e-16)


def fit_jitter(step_s: Sequence[float]) -> float:
    """Return the deviation of the logarithm of measured step times, the lognormal that `slowest` takes."""
    times = np.asarray(step_s, float)
    if len(times) < 2 or not (times > 0).all():
        raise FlagError("jitter needs two step times at least, all above 0; log more steps")
    return float(np.log(times).std(ddof=1))


def step(
    tensors: Sequence[Layer],
    batch: int,
    node: Node,
    world: World,
    network: Network,
    exchange: Exchange,
    micro_batches: int = 1,
) -> Step:
    """Return the step of `world` with `micro_batches` of `batch` images a rank; the last one's gradients are sent."""
    work = micro_batches * batch * node.image_s
    stretch = slowest(node.jitter, world.ranks)
    shares = layers.ready_shares(tensors)
    sizes = [tensor.bytes for tensor in tensors]

    cost = functools.partial(fused_allreduce, world=world, network=network)

    def run(negotiation_s: float, handed: Exchange) -> Tuple[float, int]:
        end = work * stretch
        last_s = end / micro_batches
        ready = [end - last_s * BACKWARD_SHARE * (1 - share) for share in shares]
        if world.ranks == 1:
            return end, 0
        last, buffers = exchange_end(ready, sizes, end, cost, handed, negotiation_s, node.interference)
        return last, len(buffers)

    negotiation_s = coordination(world, network, exchange, len(tensors))
    whole, messages = run(negotiation_s, exchange)
    # What would be left if negotiating took no time; waiting for more tensors can also pay, then nothing is lost by it.
    without = min(run(0.0, dataclasses.replace(exchange, cycle_s=0.0))[0], whole) if exchange.negotiated else whole
    slow = work * (stretch - 1)
    fixed_s = node.fixed_s + micro_batches * node.batch_s
    busy = whole + fixed_s
    read = micro_batches * batch / node.input_images_per_s if node.input_images_per_s else 0.0
    return Step(
        compute=work + fixed_s,
        jitter=slow,
        allreduce=without - work * stretch,
        coordinator=whole - without,
        input=max(0.0, read - busy),
        messages=messages,
    )


def efficiency(one: Step, many: Step) -> float:
    """Return the share of `one`'s speed that a node keeps in `many`, at the same batch a rank."""
    return one.total / many.total


def images_per_second(found: Step, batch: int, world: World) -> float:
    """Return the images a second of all ranks."""
    return batch * world.ranks / found.total
