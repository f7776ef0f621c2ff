"""Run as a rank of benchmarks/replay.py; rank 0 sets the speed of the links and prints the rows."""

import argparse
import dataclasses
import functools
import os
import pathlib
import socket
import statistics
import subprocess
import sys
import time
from typing import Callable, List, Tuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf
from mpi4py import MPI

from resnet_cpu.cluster import control
from resnet_cpu.model import tensors
from resnet_cpu.model.tensors import Gradient

LAB = pathlib.Path(__file__).parent.parent / "launch" / "network-lab" / "lab"
FORWARD_SHARE = 1 / 3  # backward computes each product twice: for the inputs and for the weights
MESSAGE_S = 0.3
MOST_STEPS = 200  # of a setting in a round
WARM_UP_STEPS = 2  # for Horovod's first negotiation of all names, and for TCP to adapt to the new speed


def release_shares(gradients: Tuple[Gradient, ...]) -> List[float]:
    """Return when each gradient is ready, as a share of the compute of a step: after forward and part of backward."""
    return [FORWARD_SHARE + (1 - FORWARD_SHARE) * share for share in tensors.ready_shares(gradients)]


class Replay:
    """The graph of a step of one network: each gradient is released at its time and averaged by Horovod."""

    def __init__(self, name: str, gradients: Tuple[Gradient, ...]) -> None:
        self._shares = release_shares(gradients)
        self._start = self._compute_s = self._lateness_s = 0.0
        graph = tf.Graph()
        with graph.as_default():
            mine = [
                tf.compat.v1.get_variable(
                    f"gradient{number}", gradient.shape, initializer=tf.constant_initializer(hvd.rank())
                )
                for number, gradient in enumerate(gradients)
            ]
            released, averaged = tf.no_op(), []
            for number, (gradient, share) in enumerate(zip(gradients, self._shares)):
                # A gradient that takes no work, such as the second of batch norm, is released with the previous one.
                if number == 0 or share != self._shares[number - 1]:
                    with tf.control_dependencies([released]):
                        released = tf.numpy_function(self._sleep_until, [tf.constant(share, tf.float64)], tf.float64)
                with tf.control_dependencies([released]):
                    tensor = tf.identity(mine[number])
                averaged.append(hvd.allreduce(tensor, op=hvd.Average, name=f"{name}.{number}.{gradient.name}"))
            self._step = tf.group(averaged)
            farthest = tf.reduce_max([tf.reduce_max(tf.abs(tensor - (hvd.size() - 1) / 2)) for tensor in averaged])
            # As in training, operations run one after the other while Horovod's thread communicates. The second thread
            # enqueues a gradient while the first one sleeps.
            config = tf.compat.v1.ConfigProto(inter_op_parallelism_threads=2, intra_op_parallelism_threads=1)
            # TensorFlow's graph optimizer would drop allreduces whose results are not used.
            config.graph_options.rewrite_options.disable_meta_optimizer = True
            self._session = tf.compat.v1.Session(config=config)
            self._session.run(tf.compat.v1.global_variables_initializer())
        graph.finalize()
        if self._session.run(farthest) > 1e-6:
            raise SystemExit(f"replay: {name}: the averages of {hvd.size()} ranks' gradients are wrong")

    def _sleep_until(self, share: np.ndarray) -> np.ndarray:
        left = self._start + float(share) * self._compute_s - time.perf_counter()
        if left > 0:
            time.sleep(left)
        self._lateness_s = time.perf_counter() - self._start - float(share) * self._compute_s
        return share

    def step(self, compute_s: float) -> float:
        """Replay one step; return how late its compute ended, in seconds."""
        self._compute_s = compute_s
        self._start = time.perf_counter()
        self._session.run(self._step)
        return self._lateness_s


def timed(comm: MPI.Comm, work: Callable[[], float], seconds: float) -> List[Tuple[float, float]]:
    """Repeat `work` on all ranks for about `seconds`, at least three and at most MOST_STEPS times.

    Returns for each repeat its seconds and the result of `work`, both of the slowest rank.
    """
    slowest: List[Tuple[float, float]] = []
    for repeat in range(-WARM_UP_STEPS, MOST_STEPS):
        comm.Barrier()
        start = time.perf_counter()
        late = work()
        mine = np.array([time.perf_counter() - start, late])
        comm.Allreduce(MPI.IN_PLACE, mine, MPI.MAX)  # the same on all ranks, so all stop after the same repeat
        if repeat >= 0:
            slowest.append((float(mine[0]), float(mine[1])))
        if len(slowest) >= 3 and sum(taken for taken, _ in slowest) >= seconds:
            break
    return slowest


@dataclasses.dataclass(frozen=True)
class Case:
    """A unit of repeated work: the step of a network, or one message."""

    model: str
    width: float
    image_size: int
    bytes: int
    tensors: int
    compute_s: float
    through_horovod: bool
    seconds: float
    work: Callable[[], float]  # returns how late compute ended, in seconds


def cases_of_networks(models: str, image_size: int, threads: int, computes: List[float], seconds: float) -> List[Case]:
    cases = []
    for model in models.split(","):
        name, _, width = model.partition(":")
        gradients = tensors.gradients(name, width=float(width or 1), image_size=image_size, inter_op_threads=threads)
        size = sum(gradient.bytes for gradient in gradients)
        replay = Replay(model.replace(":", "_"), gradients)
        for compute_s in computes:
            work = functools.partial(replay.step, compute_s)
            network = (name, float(width or 1), image_size, size, len(gradients))
            cases.append(Case(*network, compute_s, True, seconds, work))
    return cases


def cases_by_mpi(comm: MPI.Comm, sizes: List[int]) -> List[Case]:
    def by_mpi(sent: np.ndarray, received: np.ndarray) -> float:
        comm.Allreduce(sent, received)
        return 0.0

    cases = []
    for size in sizes:
        mine = np.zeros(size // 4, np.float32)
        work = functools.partial(by_mpi, mine, np.empty_like(mine))
        cases.append(Case("message", 1.0, 0, size, 1, 0.0, False, MESSAGE_S, work))
    return cases


def cases_by_horovod(sizes: List[int]) -> List[Case]:
    def by_horovod(sent: tf.Tensor, name: str) -> float:
        hvd.allreduce(sent, op=hvd.Sum, name=name)
        return 0.0

    cases = []
    for size in sizes:
        work = functools.partial(by_horovod, tf.zeros([size // 4]), f"message.{size}")
        cases.append(Case("horovod_message", 1.0, 0, size, 1, 0.0, True, MESSAGE_S, work))
    return cases


def write(
    turn: int, hosts: int, mbit: int, threads: int, allreduce: str, case: Case, repeats: List[Tuple[float, float]]
) -> None:
    fusion = (
        [os.environ["HOROVOD_FUSION_THRESHOLD"], os.environ["HOROVOD_CYCLE_TIME"]] if case.through_horovod else ["", ""]
    )
    setting = [turn, hosts, hosts, mbit, case.model, f"{case.width:g}", case.image_size, f"{case.compute_s:g}"]
    for number, (step_s, lateness_s) in enumerate(repeats):
        row = [*setting, f"{FORWARD_SHARE:.6f}", case.bytes, case.tensors, *fusion, threads, allreduce, number]
        print(*row, f"{step_s:.6f}", f"{lateness_s:.6f}", sep=",", flush=True)
    median = statistics.median(step_s for step_s, _ in repeats)
    print(
        f"replay: round {turn}: {hosts} hosts, {mbit} Mbit/s: {case.model} x{case.width:g}, {case.bytes} bytes, "
        f"compute {case.compute_s:g} s: {median:.4f} s",
        file=sys.stderr,
        flush=True,
    )


def shape(comm: MPI.Comm, mbit: int) -> None:
    """Set the speed of all links at the same time."""
    if comm.rank == 0:
        subprocess.run([LAB, "shape", str(mbit)], check=True)
    comm.Barrier()


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("mbit", "models", "compute_s", "messages", "allreduce"):
        parser.add_argument(f"--{name}")
    for name in ("rounds", "image_size", "inter_op_threads"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--seconds", type=float)
    arguments = parser.parse_args()
    world = control.connect(None)
    comm = world.comm
    if comm is None or len(set(world.gather(socket.gethostname()))) != world.size:
        raise SystemExit("replay: needs two or more hosts with one rank each; use benchmarks/replay.py")
    computes = [float(compute_s) for compute_s in arguments.compute_s.split(",")]
    sizes = [] if arguments.messages == "-" else [int(size) for size in arguments.messages.split(",")]
    speeds = [int(mbit) for mbit in arguments.mbit.split(",")]

    def measure(cases: List[Case]) -> None:
        for turn in range(1, arguments.rounds + 1):
            # In alternating directions, so that a drift of the machine does not favour the first.
            direction = 1 if turn % 2 else -1
            for mbit in speeds[::direction]:
                shape(comm, mbit)
                for case in cases[::direction]:
                    repeats = timed(comm, case.work, case.seconds)
                    if comm.rank == 0:
                        write(turn, comm.size, mbit, arguments.inter_op_threads, arguments.allreduce, case, repeats)

    # Before Horovod starts: its thread communicates in every cycle and delays the messages of MPI.
    measure(cases_by_mpi(comm, sizes))
    hvd.init()
    networks = arguments.models, arguments.image_size, arguments.inter_op_threads, computes, arguments.seconds
    measure([*cases_by_horovod(sizes), *cases_of_networks(*networks)])
    hvd.shutdown()


if __name__ == "__main__":
    main()
