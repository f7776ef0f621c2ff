"""Timing of messages between ranks: allreduce of float32 by mpi4py and by Horovod, over message sizes.

Definitions are those of nccl-tests (doc/PERFORMANCE.md) and of OSU's osu_allreduce. The latency of a call is the mean
over ranks of the time in the call, which all enter from a barrier. For a message of S bytes on n ranks:

    algorithm bandwidth   S / latency
    bus bandwidth         algorithm bandwidth * 2 (n - 1) / n: what each rank's link carries in a ring, to be held
                          against the link's own speed, whatever n
"""

import dataclasses
import json
import math
import os
import socket
import time
from typing import Any, Callable, Dict, List, Optional

import numpy as np
import tensorflow as tf

from resnet_cpu.cluster import guard, horovod
from resnet_cpu.cluster.control import World
from resnet_cpu.errors import FlagError, UserError
from resnet_cpu.recipe import batch as batch_rule
from resnet_cpu.report import tables as results
from resnet_cpu.run.atomic import write_atomically
from resnet_cpu.settings import Settings
from resnet_cpu.training.state import build_model

LEAST_BYTES = 1024
FACTOR = 4  # from one size to the next
LEAST_CALLS = 3
_COLUMNS = (
    *("library", "bytes", "ranks", "calls", "latency_s", "latency_p10_s", "latency_p90_s"),
    *("algorithm_bandwidth_bytes_per_s", "bus_bandwidth_bytes_per_s"),
)


@dataclasses.dataclass(frozen=True)
class Message:
    """The calls with messages of one size by one library."""

    library: str
    size: int  # bytes
    ranks: int
    seconds: np.ndarray  # of each call, mean over ranks

    @property
    def latency(self) -> float:
        """Seconds of a call, the median."""
        return float(np.median(self.seconds))

    @property
    def algorithm_bandwidth(self) -> float:
        """Bytes/s."""
        return self.size / self.latency

    @property
    def bus_bandwidth(self) -> float:
        """Bytes/s."""
        return self.algorithm_bandwidth * 2 * (self.ranks - 1) / self.ranks


@dataclasses.dataclass(frozen=True)
class Timed:
    """All sizes by all libraries, the model's gradient being one of them."""

    messages: List[Message]
    gradient_bytes: int
    images: int  # of a step, all ranks
    hosts: int = 1

    @property
    def images_per_second(self) -> float:
        """Images of a step over the time in which Horovod averages a message as large as all gradients together.

        No training is faster whose messages are not hidden behind the backward pass.
        """
        mine = next(
            message for message in self.messages if (message.library, message.size) == ("horovod", self.gradient_bytes)
        )
        return self.images / mine.latency

    def network(self) -> Optional[Dict[str, float]]:
        """Return the constants of a network for `resnet_cpu.simulate`; None unless every host has one rank.

        Of mpi4py's calls: the smallest is ceil(log2 n) latencies, the largest 2 (n - 1) / n times the message at the
        bandwidth. Adding up is in both, so it costs nothing besides.
        """
        alone = [message for message in self.messages if message.library == "mpi4py"]
        small, large = min(alone, key=lambda one: one.size), max(alone, key=lambda one: one.size)
        if self.hosts != small.ranks:
            return None
        latency = small.latency / math.ceil(math.log2(small.ranks))
        return {"latency_s": latency, "bandwidth": large.bus_bandwidth, "reduce_s_per_byte": 0.0}

    def lines(self) -> List[str]:
        """Return the table that a person wants to see, and what the last line means."""
        told = [
            f"allreduce: {self.messages[0].ranks} ranks; latency: median and 10-90 % of calls, mean over ranks",
            f"{'library':<8} {'bytes':>12} {'calls':>6} {'latency, us':>12} {'10 %':>12} {'90 %':>12} "
            f"{'algorithm, GB/s':>16} {'bus, GB/s':>10}",
        ]
        for message in self.messages:
            low, high = np.percentile(message.seconds, [10, 90])
            told.append(
                f"{message.library:<8} {message.size:>12,} {len(message.seconds):>6} {1e6 * message.latency:>12.1f} "
                f"{1e6 * low:>12.1f} {1e6 * high:>12.1f} {message.algorithm_bandwidth / 1e9:>16.4f} "
                f"{message.bus_bandwidth / 1e9:>10.4f}"
            )
        return [
            *told,
            f"total images/sec below: what messages alone would allow, {self.images} images a step over Horovod's time "
            f"for the model's gradients in one message ({self.gradient_bytes:,} bytes); nothing was trained",
        ]

    def write(self, folder: str) -> str:
        """Write allreduce.csv to `folder`, and network.json where it can be told; return what was written."""
        rows = []
        for message in self.messages:
            low, high = np.percentile(message.seconds, [10, 90])
            figures = (
                *(message.library, message.size, message.ranks, len(message.seconds)),
                *(message.latency, float(low), float(high), message.algorithm_bandwidth, message.bus_bandwidth),
            )
            rows.append(dict(zip(_COLUMNS, map(results.cell, figures))))
        os.makedirs(folder, exist_ok=True)
        results.write_csv(os.path.join(folder, "allreduce.csv"), rows, _COLUMNS)
        network = self.network()
        if network is None:
            return f"in {folder}: allreduce.csv"
        write_atomically(os.path.join(folder, "network.json"), (json.dumps(network, indent=1) + "\n").encode())
        return f"in {folder}: allreduce.csv, and network.json for python -m resnet_cpu.simulate --network"


def sizes(most_bytes: int, gradient_bytes: int) -> List[int]:
    """Return the message sizes, bytes: 1 kB and its multiples up to `most_bytes`, and that of the gradients."""
    found = {gradient_bytes}
    size = LEAST_BYTES
    while size <= most_bytes:
        found.add(size)
        size *= FACTOR
    return sorted(found)


def run(
    settings: Settings,
    world: World,
    most_bytes: int,
    seconds_a_size: float,
    warmup_calls: int,
    timed_calls: int,
) -> Timed:
    """Return the times of up to `timed_calls` messages of each size; raise FlagError for a single rank."""
    if world.size == 1:
        raise FlagError(
            "--benchmark=allreduce: nothing to measure, a single rank sends no messages; start two or more, as "
            "launch/local.sh 2 does"
        )
    recipe = settings.recipe
    batch = batch_rule.resolve_batch(recipe.batch_size, recipe.global_batch_size, world.size, recipe.accumulate_steps)
    with guard.Watchdog(settings.system.stall_timeout) as watchdog:
        gradients = sum(int(np.prod(variable.shape)) for variable in build_model(settings).trainable_variables)
        messages = []
        for library, sender in _SENDERS.items():
            if (
                library == "horovod"
            ):  # not before: its thread, which asks all ranks every cycle, would disturb the other
                horovod.start(world)
            for size in sizes(most_bytes, 4 * gradients):
                call = sender(world, size)
                if not (np.asarray(call()) == world.size).all():
                    raise UserError(f"--benchmark=allreduce: {library}: a sum of {size} bytes over ranks is wrong")
                seconds = _time(world, call, seconds_a_size, warmup_calls, timed_calls, watchdog.beat)
                messages.append(Message(library, size, world.size, seconds))
    return Timed(messages, 4 * gradients, batch.total, len(set(world.gather(socket.gethostname()))))


def _by_mpi(world: World, size: int) -> Callable[[], np.ndarray]:
    mine = np.ones([size // 4], np.float32)
    sums = np.empty_like(mine)

    def call() -> np.ndarray:
        world.comm.Allreduce(mine, sums)
        return sums

    return call


def _by_horovod(world: World, size: int) -> Callable[[], tf.Tensor]:
    mine = tf.ones([size // 4])
    reduce = tf.function(lambda: horovod.total(mine, f"allreduce_{size}"))
    return reduce  # back when the message is; .numpy() would add a copy


_SENDERS: Dict[str, Callable[[World, int], Callable[[], Any]]] = {"mpi4py": _by_mpi, "horovod": _by_horovod}


def _time(
    world: World,
    call: Callable[[], Any],
    seconds: float,
    warmup_calls: int,
    timed_calls: int,
    beat: Callable[[], None],
) -> np.ndarray:
    """Return the seconds of each timed call, mean over ranks; as many calls on all ranks, by the slowest's warm-up."""

    def timed(count: int) -> List[float]:
        taken = []
        for _ in range(count):
            world.barrier()
            started = time.perf_counter()
            call()
            taken.append(time.perf_counter() - started)
            beat()
        return taken

    slowest = max(world.gather(float(np.median(timed(warmup_calls)))))
    count = min(timed_calls, max(LEAST_CALLS, int(seconds / max(slowest, 1e-9))))
    return np.array(world.gather(timed(count))).mean(0)
