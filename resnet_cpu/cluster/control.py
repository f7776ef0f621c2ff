"""The control plane: the number of ranks, and what they agree on. Small JSON messages over mpi4py; no TensorFlow.

Without a launcher there is one rank, and MPI is not needed. Nothing is pickled: a message is UTF-8 JSON.
"""

import contextlib
import dataclasses
import json
import os
import re
import socket
import sys
import traceback
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Tuple

import numpy as np

from resnet_cpu.cluster.launchers import EXPECTED_RANKS
from resnet_cpu.cluster.machine import physical_cores, quota
from resnet_cpu.errors import BY_CODE, FlagError, OutputError, UserError

# Environment variables in which launchers announce (number of ranks, rank of this process).
_LAUNCHERS = (
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("PMI_SIZE", "PMI_RANK"),  # Intel MPI, MPICH
    ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),  # srun; a batch script itself does not have the first
)
_TERMINAL = "SLURM_PTY_PORT"  # of a step that srun --pty started
_OF_MPIEXEC = "MPI_LOCALNRANKS"  # of MPICH and Intel MPI; Slurm sets PMI_SIZE and PMI_RANK without it


def announced(environ: Mapping[str, str] = os.environ) -> Tuple[int, int]:
    """Return (ranks, rank) as the launcher announced them; (1, 0) without a launcher.

    A process that was started from the shell of `srun --pty` has the variables of that shell's step, but is not a
    rank of it: only a process that srun itself started is.
    """
    started = EXPECTED_RANKS in environ or environ.get("SLURM_TASK_PID") == str(os.getpid())
    typed = _TERMINAL in environ and not started
    of_the_step = ("SLURM_PROCID",) if _OF_MPIEXEC in environ else ("SLURM_PROCID", "PMI_RANK")
    for size, rank in _LAUNCHERS:
        given = all(re.fullmatch("[0-9]+", environ.get(name, "")) for name in (size, rank))
        if given and not (typed and rank in of_the_step):
            return int(environ[size]), int(environ[rank])
    return 1, 0


def several_hosts(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether Open MPI started ranks on other hosts as well."""
    local = environ.get("OMPI_COMM_WORLD_LOCAL_SIZE")
    return local is not None and int(local) < announced(environ)[0]


@contextlib.contextmanager
def same_on_all_ranks() -> Iterator[None]:
    """Mark errors of the enclosed code as collective: it depends only on what all ranks share, so all raise them."""
    try:
        yield
    except UserError as error:
        error.collective = True
        raise


@dataclasses.dataclass(frozen=True)
class World:
    """All ranks of a job; `comm` is None if there is only one."""

    size: int
    rank: int
    comm: Any = None
    cores: int = 1  # physical cores that belong to this rank

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        if self.comm is not None:
            self.comm.Barrier()

    def broadcast(self, message: Any) -> Any:
        """Return rank 0's message (any JSON value) on every rank."""
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
        """Return the concatenated rows of all ranks' arrays, in the order of the ranks, on rank 0; None on the others.

        The arrays have the same dtype and the same shape except in the first dimension.
        """
        if self.comm is None:
            return rows
        counts = [count * int(np.prod(rows.shape[1:])) for count in self.gather(len(rows))]
        rows = np.ascontiguousarray(rows)
        if self.rank != 0:
            self.comm.Gatherv(rows, None, root=0)
            return None
        collected = np.empty([sum(counts)], rows.dtype)
        self.comm.Gatherv(rows, [collected, counts], root=0)
        return collected.reshape(-1, *rows.shape[1:])

    def on_rank0(self, work: Callable[[], Any]) -> Any:
        """Call `work` on rank 0; return its result (any JSON value), or raise its error, on every rank."""
        return self.on_rank0_with_beats(lambda beat: work(), lambda: None)

    def on_rank0_with_beats(self, work: Callable[[Callable[[], None]], Any], beat: Callable[[], None]) -> Any:
        """Call `work` on rank 0 as `on_rank0` does; each time that `work` calls its argument, all ranks call `beat`.

        For work that may take longer than the stall timeout: the waiting ranks' watchdogs need the beats as well.
        """

        def beat_all() -> None:
            self.broadcast({"beat": True})
            beat()

        if self.rank == 0:
            outcome = self.broadcast(_outcome_of(lambda: work(beat_all)))
        else:
            outcome = self.broadcast(None)
            while "beat" in outcome:
                beat()
                outcome = self.broadcast(None)
        if "code" in outcome:
            raise BY_CODE[outcome["code"]](outcome["message"], collective=True)
        return outcome["result"]

    def on_all(self, work: Callable[[], Any]) -> Any:
        """Call `work` on every rank; return its own result, or raise the first rank's error, on every rank.

        The error names the rank, its host and the number of other ranks with an error: a thousand nodes report once.
        """
        result, failure = None, None
        try:
            result = work()
        except UserError as error:
            failure = {"code": error.exit_code, "message": str(error)}
        except OSError as error:
            failure = {"code": OutputError.exit_code, "message": describe_os_error(error)}
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


def _outcome_of(work: Callable[[], Any]) -> Dict[str, Any]:
    """Return the result of `work`, or its error, as a message to the other ranks, which wait for one in any case."""
    try:
        return {"result": work()}
    except UserError as error:
        return {"code": error.exit_code, "message": str(error)}
    except OSError as error:
        return {"code": OutputError.exit_code, "message": describe_os_error(error)}
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        return {"code": UserError.exit_code, "message": f"{type(error).__name__}: {error}"}


def describe_os_error(error: OSError) -> str:
    """Return an error of the file system as one line with the remedy."""
    reason, where = error.strerror or error, error.filename or "a file or standard output"
    return f"{where}: {reason}; check its permissions and the free space, then run again"


def connect(expected: Optional[int]) -> World:
    """Return the world; start MPI if a launcher announced several ranks. Raise FlagError if it is not as expected."""
    size, rank = announced()
    mask = sorted(os.sched_getaffinity(0))
    if expected is not None and expected != size:
        raise FlagError(f"--ranks={expected}: the launcher started {size}; start {expected}, or remove --ranks")
    asked = os.environ.get(EXPECTED_RANKS)
    if asked and asked != str(size):
        raise FlagError(
            f"{asked} ranks were asked for, this process is one of {size}: the launcher belongs to another MPI, or not "
            "all ranks were started; choose the launcher with python -m resnet_cpu.launch --mpi=..., and see "
            "BUILD_NOTES.md"
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
        raise FlagError("MPI started without MPI_THREAD_MULTIPLE, which Horovod needs; unset MPI4PY_RC_THREAD_LEVEL")
    # A separate communicator, so that these messages cannot be mixed up with Horovod's.
    comm = MPI.COMM_WORLD.Dup()
    host = socket.gethostname()
    masks = [other for name, other in World(size, rank, comm).gather([host, mask]) if name == host]
    return World(size, rank, comm, share_of_cores(mask, masks, quota()))


def share_of_cores(mask: List[int], masks: List[List[int]], granted: Optional[float] = None) -> int:
    """Return the number of cores of a rank with affinity `mask`; `masks` are those of all ranks on its host.

    Bound ranks have disjoint masks; ranks with overlapping masks share the cores evenly. `granted` is the CPU time
    that a cgroup grants to all of them, in CPUs (None: no limit).
    """
    sharing = [other for other in masks if set(other) & set(mask)]
    share = physical_cores(mask if len(sharing) <= 1 else set().union(*sharing)) // max(1, len(sharing))
    if granted is not None:
        share = min(share, int(granted / len(masks)))
    return max(1, share)
