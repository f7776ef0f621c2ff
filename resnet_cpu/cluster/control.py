"""The control plane: who am I, and what do we all agree on; small JSON messages over mpi4py, no TensorFlow.

Without a launcher there is one rank, and no MPI is needed. Nothing is pickled: a message is UTF-8 JSON.
"""

import dataclasses
import json
import os
import sys
import traceback
from typing import Any, Callable, List, Mapping, Optional, Tuple

import numpy as np

from resnet_cpu.errors import BY_CODE, FlagError, UserError

# (ranks in all, my rank, ranks on my host, my rank on my host), as launchers announce them.
_LAUNCHERS = (
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_SIZE", "PMI_RANK", "MPI_LOCALNRANKS", "MPI_LOCALRANKID"),
    ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_RANK"),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_STEP_TASKS_PER_NODE", "SLURM_LOCALID"),
)


def announced(environ: Mapping[str, str] = os.environ) -> Tuple[int, int, int, int]:
    """Return (ranks, rank, ranks on this host, rank on this host) as the launcher announced them."""
    for names in _LAUNCHERS:
        if names[0] in environ and names[1] in environ:
            size, rank = int(environ[names[0]]), int(environ[names[1]])
            local = environ.get(names[2], "1")
            local_size = int(local.split("(")[0].split(",")[0])  # Slurm writes 2(x4)
            return size, rank, local_size, int(environ.get(names[3], "0"))
    return 1, 0, 1, 0


@dataclasses.dataclass(frozen=True)
class World:
    """All ranks of a job; `comm` is None where there is only one."""

    size: int
    rank: int
    comm: Any = None

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

    def on_rank0(self, work: Callable[[], Any]) -> Any:
        """Do `work` on rank 0; return its result, or raise its error, on every rank alike."""
        outcome: Any = None
        if self.rank == 0:
            try:
                outcome = {"result": work()}
            except UserError as error:
                outcome = {"code": error.exit_code, "message": str(error)}
            except Exception as error:  # the peers wait for an answer, whatever went wrong
                traceback.print_exc(file=sys.stderr)
                outcome = {"code": UserError.exit_code, "message": f"{type(error).__name__}: {error}"}
        outcome = self.broadcast(outcome)
        if "code" in outcome:
            raise BY_CODE[outcome["code"]](outcome["message"], collective=True)
        return outcome["result"]


def connect(expected: Optional[int]) -> World:
    """Start MPI if a launcher announced more than one rank; raise FlagError if it is not the world that was meant."""
    size, rank, _, _ = announced()
    if expected is not None and expected != size:
        raise FlagError(f"--ranks={expected}: the launcher started {size}; start as many, or leave --ranks out")
    if size == 1:
        return World(1, 0)
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
    return World(size, rank, MPI.COMM_WORLD.Dup())
