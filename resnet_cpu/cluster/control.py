"""The control plane: who am I, and what do we all agree on; small JSON messages over mpi4py, no TensorFlow.

Without a launcher there is one rank, and no MPI is needed. Nothing is pickled: a message is UTF-8 JSON.
"""

import contextlib
import dataclasses
import json
import os
import socket
import sys
import traceback
from typing import Any, Callable, Iterator, List, Mapping, Optional, Tuple

import numpy as np

from resnet_cpu.cluster.launchers import EXPECTED_RANKS
from resnet_cpu.cluster.machine import physical_cores, quota
from resnet_cpu.errors import BY_CODE, FlagError, OutputError, UserError

# (ranks in all, my rank), as launchers announce them.
_LAUNCHERS = (
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("PMI_SIZE", "PMI_RANK"),  # Intel MPI, MPICH
    ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),  # of srun; in a batch script itself the first is not set
)


def announced(environ: Mapping[str, str] = os.environ) -> Tuple[int, int]:
    """Return (ranks, rank) as the launcher announced them; (1, 0) without a launcher."""
    for size, rank in _LAUNCHERS:
        if size in environ and rank in environ:
            return int(environ[size]), int(environ[rank])
    return 1, 0


def several_hosts(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether Open MPI started ranks on other hosts than this one, too."""
    local = environ.get("OMPI_COMM_WORLD_LOCAL_SIZE")
    return local is not None and int(local) < announced(environ)[0]


@contextlib.contextmanager
def everyone_alike() -> Iterator[None]:
    """Around what depends only on what all ranks share: its errors are raised by all of them, and told once."""
    try:
        yield
    except UserError as error:
        error.collective = True
        raise


@dataclasses.dataclass(frozen=True)
class World:
    """All ranks of a job; `comm` is None where there is only one."""

    size: int
    rank: int
    comm: Any = None
    cores: int = 1  # physical ones that this rank may count as its own

    def barrier(self) -> None:
        if self.comm is not None:
            self.comm.Barrier()

    def broadcast(self, message: Any) -> Any:
        """Return rank 0's message (anything JSON can hold) on every rank."""
        if self.comm is None:
            return message
        data = np.frombuffer(json.dumps(message).encode() if self.rank == 0 else b"", np.uint8)
        length = np.array([len(data)], np.int64)
        self.comm.Bcast(length, root=0)
        buffer = data.copy() if self.rank == 0 else np.empty(length[0], np.uint8)
        self.comm.Bcast(buffer, root=0)
        return json.loads(buffer.tobytes())

    def gather(self, message: Any) -> List[Any]:
        """Return every rank's message, in the order of the ranks, on every rank."""
        if self.comm is None:
            return [message]
        data = np.frombuffer(json.dumps(message).encode(), np.uint8)
        lengths = np.empty(self.size, np.int64)
        self.comm.Allgather(np.array([len(data)], np.int64), lengths)
        buffer = np.empty(int(lengths.sum()), np.uint8)
        self.comm.Allgatherv(data, [buffer, lengths])
        ends = np.cumsum(lengths)
        return [json.loads(buffer[end - length : end].tobytes()) for end, length in zip(ends, lengths)]

    def collect(self, rows: np.ndarray) -> Optional[np.ndarray]:
        """Return the rows of all ranks' arrays, in the order of the ranks, on rank 0; None on the others.

        The arrays agree in dtype and in all but the first dimension.
        """
        if self.comm is None:
            return rows
        counts = [count * int(np.prod(rows.shape[1:])) for count in self.gather(len(rows))]
        rows = np.ascontiguousarray(rows)
        if self.rank != 0:
            self.comm.Gatherv(rows, None, root=0)
            return None
        everyone = np.empty([sum(counts)], rows.dtype)
        self.comm.Gatherv(rows, [everyone, counts], root=0)
        return everyone.reshape(-1, *rows.shape[1:])

    def on_rank0(self, work: Callable[[], Any]) -> Any:
        """Do `work` on rank 0; return its result, or raise its error, on every rank alike."""
        outcome: Any = None
        if self.rank == 0:
            try:
                outcome = {"result": work()}
            except UserError as error:
                outcome = {"code": error.exit_code, "message": str(error)}
            except OSError as error:
                outcome = {"code": OutputError.exit_code, "message": told_of_file(error)}
            except Exception as error:  # the peers wait for an answer, whatever went wrong
                traceback.print_exc(file=sys.stderr)
                outcome = {"code": UserError.exit_code, "message": f"{type(error).__name__}: {error}"}
        outcome = self.broadcast(outcome)
        if "code" in outcome:
            raise BY_CODE[outcome["code"]](outcome["message"], collective=True)
        return outcome["result"]

    def on_all(self, work: Callable[[], Any]) -> Any:
        """Do `work` on every rank; return its own result, or raise the first rank's error, on every rank alike.

        The error names the rank and its host, and how many more have one: a thousand nodes tell it once.
        """
        result, failure = None, None
        try:
            result = work()
        except UserError as error:
            failure = {"code": error.exit_code, "message": str(error)}
        except OSError as error:
            failure = {"code": OutputError.exit_code, "message": told_of_file(error)}
        failures = [
            (rank, host, failure)
            for rank, (host, failure) in enumerate(self.gather([socket.gethostname(), failure]))
            if failure
        ]
        if failures:
            rank, host, first = failures[0]
            where = f"rank {rank} on {host}: " if self.size > 1 else ""
            others = f" (and {len(failures) - 1} more ranks)" if len(failures) > 1 else ""
            raise BY_CODE[first["code"]](f"{where}{first['message']}{others}", collective=True)
        return result


def told_of_file(error: OSError) -> str:
    """Return one line on an error of the file system."""
    return f"{error.filename or 'I/O'}: {error.strerror or error}; check its rights and the free space, then run again"


def connect(expected: Optional[int]) -> World:
    """Start MPI if a launcher announced more than one rank; raise FlagError if it is not the world that was meant."""
    size, rank = announced()
    mask = sorted(os.sched_getaffinity(0))
    if expected is not None and expected != size:
        raise FlagError(f"--ranks={expected}: the launcher started {size}; start as many, or leave --ranks out")
    asked = os.environ.get(EXPECTED_RANKS)
    if asked is not None and asked != str(size):
        raise FlagError(
            f"{asked} ranks were asked for, this process is one of {size}: the launcher belongs to another MPI, or not "
            "all were started; choose with python -m resnet_cpu.launch --mpi=..., and see BUILD_NOTES.md"
        )
    if size == 1:
        return World(1, 0, None, share_of_cores(mask, [mask], quota()))
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise FlagError(f"{size} ranks were started, but mpi4py does not load ({error}); see BUILD_NOTES.md") from None
    if MPI.COMM_WORLD.Get_size() != size:
        raise FlagError(
            f"the launcher started {size} ranks, but this MPI ({MPI.get_vendor()[0]}) sees "
            f"{MPI.COMM_WORLD.Get_size()}: launcher and mpi4py belong to different MPIs; see BUILD_NOTES.md"
        )
    if MPI.Query_thread() != MPI.THREAD_MULTIPLE:
        raise FlagError("MPI came up without MPI_THREAD_MULTIPLE, which Horovod needs; unset MPI4PY_RC_THREAD_LEVEL")
    # A communicator of our own: these messages never meet Horovod's.
    comm = MPI.COMM_WORLD.Dup()
    host = socket.gethostname()
    masks = [other for name, other in World(size, rank, comm).gather([host, mask]) if name == host]
    return World(size, rank, comm, share_of_cores(mask, masks, quota()))


def share_of_cores(mask: List[int], masks: List[List[int]], granted: Optional[float] = None) -> int:
    """Return the cores of a rank with affinity `mask` among all ranks' `masks` on its host.

    Ranks that the launcher bound have masks of their own; where masks overlap the ranks share their cores evenly.
    `granted`: CPUs' worth of time that a cgroup leaves to all of them, None: no limit.
    """
    sharing = [other for other in masks if set(other) & set(mask)]
    share = physical_cores(mask if len(sharing) <= 1 else set().union(*sharing)) // max(1, len(sharing))
    if granted is not None:
        share = min(share, int(granted / len(masks)))
    return max(1, share)
