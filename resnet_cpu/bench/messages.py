"""Timing of messages between ranks: allreduce of float32 by mpi4py and by Horovod, over message sizes.

Definitions are those of nccl-tests (doc/PERFORMANCE.md) and of OSU's osu_allreduce. The latency of a call is the mean
over ranks of the time in the call, which all ranks enter from a barrier. For a message of S bytes on n ranks:

    algorithm bandwidth   S / latency
    bus bandwidth         algorithm bandwidth * 2 (n - 1) / n: the load of each rank's link in a ring, comparable with
                          the speed of the link for any n
"""

import dataclasses
import json
import math
import os
import socket
import sys
import time
from typing import Any, Callable, Dict, List, Optional

import numpy as np
import tensorflow as tf

from resnet_cpu.cluster import control, guard, horovod
from resnet_cpu.cluster.control import World
from resnet_cpu.errors import FlagError, UserError
from resnet_cpu.report import tables
from resnet_cpu.resolve import resolve_batch
from resnet_cpu.run.atomic import write_atomically
from resnet_cpu.settings import Settings
from resnet_cpu.training.state import build_model

LEAST_BYTES = 1024
MOST_BYTES = 256 * 2**20  # the gradients of ResNet-50 are 102 MB
FACTOR = 4  # from one size to the next
LEAST_CALLS = 3
SECONDS_PER_SIZE = 10.0  # at most, unless LEAST_CALLS take longer
_COLUMNS = (
    *("library", "bytes", "ranks", "calls", "latency_s", "latency_p10_s", "latency_p90_s"),
    *("algorithm_bandwidth_bytes_per_s", "bus_bandwidth_bytes_per_s"),
)


@dataclasses.dataclass(frozen=True)
class Message:
    """The timed calls of one library with messages of one size."""

    library: str
    size: int  # bytes
    ranks: int
    seconds: np.ndarray  # per call, mean over ranks

    @property
    def latency(self) -> float:
        """Return the median time of a call, seconds."""
        return float(np.median(self.seconds))

    @property
    def algorithm_bandwidth(self) -> float:
        """Return the bytes of the message over the latency, bytes/s."""
        return self.size / self.latency

    @property
    def bus_bandwidth(self) -> float:
        """Return the load of each rank's link in a ring, bytes/s."""
        return self.algorithm_bandwidth * 2 * (self.ranks - 1) / self.ranks


@dataclasses.dataclass(frozen=True)
class MessageTimings:
    """The timings of all sizes by all libraries; one of the sizes is that of the model's gradients."""

    messages: List[Message]
    gradient_bytes: int
    images: int  # per step, all ranks
    hosts: int = 1

    @property
    def images_per_second(self) -> float:
        """Return the images of a step over the time in which Horovod averages all gradients in one message.

        It is an upper bound on the speed of training whose messages are not hidden behind the backward pass.
        """
        of_gradients = ("horovod", self.gradient_bytes)
        return self.images / next(m.latency for m in self.messages if (m.library, m.size) == of_gradients)

    def network(self) -> Optional[Dict[str, float]]:
        """Return the constants of a network for `resnet_cpu.simulate`; None unless every host has one rank.

        From mpi4py's calls: the smallest message takes ceil(log2 n) latencies, the largest 2 (n - 1) / n times its size
        at the bandwidth. The time of the additions is part of both, so their own cost is set to zero.
        """
        plain = [message for message in self.messages if message.library == "mpi4py"]
        small, large = min(plain, key=lambda m: m.size), max(plain, key=lambda m: m.size)
        if self.hosts != small.ranks:
            return None
        latency = small.latency / math.ceil(math.log2(small.ranks))
        return {"latency_s": latency, "bandwidth": large.bus_bandwidth, "reduce_s_per_byte": 0.0}

    def lines(self) -> List[str]:
        """Return the timings as a table for people, and the meaning of the last line of the command."""
        table = [
            f"allreduce: {self.messages[0].ranks} ranks; latency: median and 10-90 % of calls, mean over ranks",
            f"{'library':<8} {'bytes':>12} {'calls':>6} {'latency, us':>12} {'10 %':>12} {'90 %':>12} "
            f"{'algorithm, GB/s':>16} {'bus, GB/s':>10}",
        ]
        for message in self.messages:
            low, high = np.percentile(message.seconds, [10, 90])
            table.append(
                f"{message.library:<8} {message.size:>12,} {len(message.seconds):>6} {1e6 * message.latency:>12.1f} "
                f"{1e6 * low:>12.1f} {1e6 * high:>12.1f} {message.algorithm_bandwidth / 1e9:>16.4f} "
                f"{message.bus_bandwidth / 1e9:>10.4f}"
            )
        return [
            *table,
            "total images/sec below: the bound that messages alone set, nothing was trained: "
            f"{self.images} images per step over Horovod's time for the model's gradients in one message "
            f"({self.gradient_bytes:,} bytes)",
        ]

    def write(self, folder: str) -> str:
        """Write allreduce.csv to `folder`, and network.json if `network` is known; return a line that lists them."""
        rows = []
        for message in self.messages:
            low, high = np.percentile(message.seconds, [10, 90])
            figures = (
                *(message.library, message.size, message.ranks, len(message.seconds)),
                *(message.latency, float(low), float(high), message.algorithm_bandwidth, message.bus_bandwidth),
            )
            rows.append(dict(zip(_COLUMNS, map(tables.cell, figures))))
        os.makedirs(folder, exist_ok=True)
        tables.write_csv(os.path.join(folder, "allreduce.csv"), rows, _COLUMNS)
        network = self.network()
        if network is None:
            return f"wrote allreduce.csv to {folder}"
        write_atomically(os.path.join(folder, "network.json"), (json.dumps(network, indent=1) + "\n").encode())
        return f"wrote allreduce.csv to {folder}, and network.json for python -m resnet_cpu.simulate --network"


def sizes(gradient_bytes: int, most_bytes: int = MOST_BYTES) -> List[int]:
    """Return the message sizes, bytes, ascending: from 1 kB on by `FACTOR` up to `most_bytes`, and the gradients'."""
    found = {gradient_bytes}
    size = LEAST_BYTES
    while size <= most_bytes:
        found.add(size)
        size *= FACTOR
    return sorted(found)


def run(
    settings: Settings, world: World, most_bytes: int = MOST_BYTES, seconds_per_size: float = SECONDS_PER_SIZE
) -> MessageTimings:
    """Return the timings of up to --timed_steps messages of each size; raise FlagError for a single rank.

    On rank 0, write them to --run_dir if it is given.
    """
    if world.size == 1:
        raise FlagError(
            "--benchmark=allreduce: nothing to measure, because a single rank sends no messages; start two or more "
            "ranks, as in launch/local.sh 2"
        )
    flags = settings.benchmark
    with control.same_on_all_ranks():
        batch = resolve_batch(settings, world.size)
    with guard.Watchdog(settings.system.stall_timeout) as watchdog:
        gradients = 4 * sum(int(np.prod(variable.shape)) for variable in build_model(settings).trainable_variables)
        messages = []
        for library, sender in _SENDERS.items():
            if library == "horovod":  # only now: its thread, which polls all ranks, would disturb mpi4py's calls
                horovod.start(world)
            for size in sizes(gradients, most_bytes):
                call = sender(world, size)
                if not (np.asarray(call()) == world.size).all():
                    raise UserError(f"--benchmark=allreduce: {library}: a sum of {size} bytes over ranks is wrong")
                seconds = _time(world, call, seconds_per_size, flags.warmup_steps, flags.timed_steps, watchdog.beat)
                messages.append(Message(library, size, world.size, seconds))
    timings = MessageTimings(messages, gradients, batch.total, len(set(world.gather(socket.gethostname()))))
    folder = settings.run.run_dir
    if folder is not None:
        written = world.on_rank0(lambda: timings.write(folder))
        if world.rank == 0:
            print(written, file=sys.stderr)
    return timings


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
    return reduce  # returns when the message has arrived; .numpy() would add a copy


_SENDERS: Dict[str, Callable[[World, int], Callable[[], Any]]] = {"mpi4py": _by_mpi, "horovod": _by_horovod}


def _time(
    world: World,
    call: Callable[[], Any],
    seconds: float,
    warmup_calls: int,
    timed_calls: int,
    beat: Callable[[], None],
) -> np.ndarray:
    """Return the seconds of each timed call, mean over ranks; all ranks make the same number of calls."""

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
