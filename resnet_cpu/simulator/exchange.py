"""A training step on N nodes as a sequence of events.

Gradients become ready, are negotiated, fused and reduced; the slowest rank decides. docs/simulate.md states the model
and its formulas. Times are seconds, sizes bytes.
"""

import dataclasses
import functools
import math
from typing import Callable, List, Optional, Sequence, Tuple, Union

import numpy as np

from resnet_cpu.model import tensors
from resnet_cpu.model.tensors import Gradient
from resnet_cpu.simulator.network import Allocation, Network, fused_allreduce, message, recursive_doubling

MIB = 2**20
BACKWARD_SHARE = 2 / 3  # of the time of forward and backward; 0.69 in BUILD_NOTES.md, "Where the time goes"
Jitter = Union[float, Tuple[float, ...]]  # deviation of a lognormal, or measured step times


@dataclasses.dataclass(frozen=True)
class Exchange:
    """How gradients are exchanged. The defaults are those of Horovod 0.28.1 (operations.cc, global_state.h)."""

    cycle_s: float = 1e-3  # HOROVOD_CYCLE_TIME
    wake_s: float = 5e-5  # how late a sleeping thread wakes: Linux's timer slack (prctl(2), PR_SET_TIMERSLACK)
    fusion_bytes: int = 128 * MIB  # HOROVOD_FUSION_THRESHOLD
    cached: bool = True  # HOROVOD_CACHE_CAPACITY > 0, and all tensors seen before
    negotiated: bool = True  # False: every tensor is reduced as soon as it is ready, as MLSL does for Caffe
    request_s: float = 2e-6  # the coordinator's work on the list of requests of one rank; assumed

    @property
    def period_s(self) -> float:
        """Return the seconds between two checks for ready tensors while the thread is idle."""
        return self.cycle_s + self.wake_s if self.cycle_s else 0.0


@dataclasses.dataclass(frozen=True)
class Node:
    """How fast the ranks of a node compute and read."""

    image_s: float  # forward and backward of one image on one rank, seconds
    fixed_s: float = 0.0  # of a step, whatever the batch: the update
    batch_s: float = 0.0  # of each micro-batch, however few images it holds
    jitter: Jitter = 0.0
    interference: float = 0.0  # share of a rank's compute that is lost while it communicates
    input_images_per_s: Optional[float] = None  # read and decoded by one rank; None: never waited for


@dataclasses.dataclass(frozen=True)
class Step:
    """The seconds of a step by what they are spent on; the parts add up to `total`."""

    compute: float  # of the average rank alone: forward, backward and update
    jitter: float  # waiting for the slowest rank
    allreduce: float  # messages not hidden behind backward
    coordinator: float  # Horovod's cycles and negotiation that are not hidden
    input: float  # waiting for images
    messages: int  # number of allreduces in the step

    @property
    def total(self) -> float:
        """Return the seconds of the step."""
        return self.compute + self.jitter + self.allreduce + self.coordinator + self.input


def negotiation(allocation: Allocation, network: Network, exchange: Exchange, count: int) -> float:
    """Return the seconds of the negotiation of `count` tensors in one cycle.

    With the response cache it is an allreduce of one bit for each tensor and three of state (CacheCoordinator::sync).
    Without, rank 0 gathers sizes and lists, reads them one by one, then broadcasts the size of its answer and the
    answer.
    """
    if allocation.ranks == 1 or not exchange.negotiated:
        return 0.0
    if exchange.cached:
        bits = 8.0 * -(-(count + 3) // 64)
        return recursive_doubling(bits, allocation, network)
    rounds = math.ceil(math.log2(allocation.ranks))
    return 4 * rounds * message(0.0, network, allocation.nodes > 1) + (allocation.ranks - 1) * exchange.request_s


def exchange_end(
    ready: Sequence[float],
    sizes: Sequence[int],
    compute_end: float,
    cost: Callable[[float, bool], float],
    exchange: Exchange,
    negotiation_s: float,
    interference: float = 0.0,
) -> Tuple[float, List[int]]:
    """Return when the last tensor is reduced and backward has ended, and the bytes of each allreduce.

    As in RunLoopOnce, the background thread sleeps until the end of the cycle, negotiates the tensors that are ready,
    fuses them in order, reduces one buffer after the other, and only then checks again.

    Args:
        ready: when each tensor is ready on the slowest rank, ascending.
        sizes: bytes of each tensor.
        compute_end: when the slowest rank has computed everything.
        cost: function from the bytes of an allreduce, and whether tensors were fused for it, to its seconds.
        exchange: the settings of Horovod.
        negotiation_s: seconds of the negotiation in one cycle.
        interference: share of compute that is lost during messages.
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
        if done == first:  # rounding put the start of the cycle before its tensor
            done += 1
        now = start + negotiation_s
        for size, count in fuse(sizes[first:done], exchange.fusion_bytes):
            buffers.append(size)
            now += cost(size, count > 1)
        if start - lag < compute_end:
            lag += interference * min(now - start, (compute_end + lag - start) / max(1 - interference, 1e-9))
        start = max(start + exchange.period_s, now)
        end = now
    return max(end, compute_end + lag), buffers


def fuse(sizes: Sequence[int], threshold: int) -> List[Tuple[int, int]]:
    """Return (bytes, tensors) of each buffer: tensors in order, as many as fit (Controller::FuseResponses)."""
    buffers: List[Tuple[int, int]] = []
    for size in sizes:
        if buffers and buffers[-1][0] + size <= threshold:
            buffers[-1] = (buffers[-1][0] + size, buffers[-1][1] + 1)
        else:
            buffers.append((size, 1))
    return buffers


def slowest(jitter: Jitter, count: int) -> float:
    """Return the expected time of the slowest of `count` ranks, relative to the mean of one.

    A number is the deviation s of the logarithm of a lognormal of mean 1: the result is the integral of
    exp(s z - s^2 / 2) over the density of the greatest of `count` normal numbers. A tuple holds measured times: the
    result is the sum over the sorted times of x_i ((i / n)^count - ((i - 1) / n)^count), divided by their mean; it
    cannot exceed the slowest measured time.
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
    """Return a grid and the share of a normal distribution above each of its points, both of shape [6001]."""
    z = np.linspace(-12, 12, 6001)
    above = np.array([math.erfc(point / math.sqrt(2)) / 2 for point in z])
    return z, np.minimum(above, 1 - 1e-16)


def fit_jitter(step_s: Sequence[float]) -> float:
    """Return the deviation of the logarithm of two or more measured step times: the lognormal that `slowest` takes."""
    return float(np.log(np.asarray(step_s, float)).std(ddof=1))


def step(
    gradients: Sequence[Gradient],
    batch: int,
    node: Node,
    allocation: Allocation,
    network: Network,
    exchange: Exchange,
    micro_batches: int = 1,
) -> Step:
    """Return a step in which each rank computes `micro_batches` of `batch` images and sends the gradients of the last.

    Args:
        gradients: the gradients of the network in the order in which backward yields them.
        batch: images of a micro-batch on one rank.
        node: the speed of the ranks.
        allocation: the nodes and ranks of the job.
        network: the cost of messages.
        exchange: the settings of Horovod.
        micro_batches: number of micro-batches that a rank accumulates in a step.
    """
    work = micro_batches * batch * node.image_s
    stretch = slowest(node.jitter, allocation.ranks)
    shares = tensors.ready_shares(gradients)
    sizes = [gradient.bytes for gradient in gradients]
    cost = functools.partial(fused_allreduce, allocation=allocation, network=network)

    def end_and_messages(negotiation_s: float, exchange: Exchange) -> Tuple[float, int]:
        end = work * stretch
        last_s = end / micro_batches
        ready = [end - last_s * BACKWARD_SHARE * (1 - share) for share in shares]
        if allocation.ranks == 1:
            return end, 0
        last, buffers = exchange_end(ready, sizes, end, cost, exchange, negotiation_s, node.interference)
        return last, len(buffers)

    negotiation_s = negotiation(allocation, network, exchange, len(gradients))
    end, messages = end_and_messages(negotiation_s, exchange)
    # The end if negotiation took no time. Waiting for more tensors can also gain time; then the coordinator costs none.
    free = end
    if exchange.negotiated:
        free = min(end_and_messages(0.0, dataclasses.replace(exchange, cycle_s=0.0))[0], end)
    fixed_s = node.fixed_s + micro_batches * node.batch_s
    busy = end + fixed_s
    read = micro_batches * batch / node.input_images_per_s if node.input_images_per_s else 0.0
    return Step(
        compute=work + fixed_s,
        jitter=work * (stretch - 1),
        allreduce=free - work * stretch,
        coordinator=end - free,
        input=max(0.0, read - busy),
        messages=messages,
    )
