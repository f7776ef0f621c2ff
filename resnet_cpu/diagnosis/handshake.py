"""Two ranks exchange a vector over MPI, load TensorFlow, and exchange one with Horovod: what `doctor` starts.

Each stage that ends is one line of JSON on standard output of rank 0. A single process only loads TensorFlow.
`python -m resnet_cpu.diagnosis.handshake --on_two_ranks` starts two ranks of it on this host, as `launch` would.
"""

import json
import re
import sys
import time
from typing import Any, List

import numpy as np

from resnet_cpu.cluster import guard, launching, placement
from resnet_cpu.cluster.control import World
from resnet_cpu.errors import UserError


def main(argv: List[str]) -> None:
    """Run the stages; an error of MPI ends the job, one of TensorFlow or Horovod is reported as that of its stage.

    With --on_two_ranks, become the launcher of two ranks that do so.
    """
    if argv == ["--on_two_ranks"]:
        return _start_two_ranks()
    began = time.monotonic()
    world = guard.connect(None, 10.0)
    if world.comm is not None:
        total = np.empty(4, np.int64)
        world.comm.Allreduce(np.arange(4) + world.rank, total)
        _check_sum(world, total)
        library = sys.modules["mpi4py.MPI"].Get_library_version()
        name = re.split(r"[,\n\0]", library.strip())[0].strip()
        _report(world, "mpi", seconds=time.monotonic() - began, library=name, loaded=_loaded_mpi())
    placement.apply(0, world.cores)
    began = time.monotonic()
    stage = "tensorflow"
    try:
        import tensorflow as tf

        _report(world, stage, seconds=time.monotonic() - began, version=tf.__version__)
        stage = "horovod"
        from resnet_cpu.cluster import horovod

        horovod.start(world)
        if horovod.active():
            _check_sum(world, horovod.total(tf.range(4) + world.rank, "doctor").numpy())
            _report(world, stage, seconds=time.monotonic() - began, loaded=_loaded_mpi())
    except Exception as error:  # damaged packages raise anything
        reason = (str(error).strip().splitlines() or [""])[0]
        _report(world, stage, error=reason if isinstance(error, UserError) else f"{type(error).__name__}: {reason}")


def _start_two_ranks() -> None:
    launching.launch(
        [sys.executable, "-m", "resnet_cpu.diagnosis.handshake"],
        ranks=2,
        ranks_per_node=None,
        threads=0,
        hosts=[],
        mpi="auto",
        interface=None,
        dry_run=False,
        measure=False,  # the ranks have twenty seconds, of which that would take ten
    )


def _check_sum(world: World, total: Any) -> None:
    expected = world.size * np.arange(4) + world.size * (world.size - 1) // 2
    if not np.array_equal(total, expected):
        raise UserError(f"the sum of a vector over {world.size} ranks is {list(total)}, not {list(expected)}")


def _report(world: World, stage: str, **about: Any) -> None:
    if world.rank == 0:
        print(json.dumps({"stage": stage, **about}), flush=True)


def _loaded_mpi() -> List[str]:
    """Return the MPI libraries that this process has loaded."""
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as file:
        return sorted(set(re.findall(r"\S*/lib(?:mpi|mpich)\.so\S*", file.read())))


if __name__ == "__main__":
    guard.run(main)
