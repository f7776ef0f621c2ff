"""Examine this machine: collect the facts, judge them, and print one line per check.

Modules that need NumPy are imported by the checks that use them, so that a missing package is a finding.
"""

import dataclasses
import datetime
import functools
import json
import os
import platform
import resource
import shutil
import tempfile
from typing import Any, Callable, Dict, Iterator, Optional

from resnet_cpu.cluster import environment, machine, start
from resnet_cpu.diagnosis import checks, facts
from resnet_cpu.diagnosis.checks import Check
from resnet_cpu.diagnosis.facts import Folder, Handshake
from resnet_cpu.errors import FlagError, OutputError

HANDSHAKE_S = 20.0  # for all of it: MPI's start, and loading TensorFlow on both ranks
_SHM = "/dev/shm"


@dataclasses.dataclass
class Asked:
    """The folders to examine, and the facts that several checks use."""

    run_dir: Optional[str] = None
    data_dir: Optional[str] = None
    quick: bool = False  # start no ranks

    @functools.cached_property
    def host(self) -> machine.Machine:
        return machine.read()

    @functools.cached_property
    def tuned(self) -> Optional[int]:
        from resnet_cpu.cluster import tuning

        return tuning.fastest(self.host)

    @functools.cached_property
    def proposed(self) -> Any:  # a Placement, whose module needs NumPy
        from resnet_cpu.cluster import placement

        return placement.propose(self.host, self.tuned, decided_by="--tune")

    @functools.cached_property
    def outcome(self) -> Handshake:
        if self.quick:
            return Handshake(None, {}, skipped=True)
        alone = shutil.which("mpirun") is None or environment.version("mpi4py") is None
        return facts.shake_hands(HANDSHAKE_S, alone)

    @functools.cached_property
    def tmp(self) -> Folder:
        try:
            return facts.written_folder(tempfile.gettempdir())
        except OSError as error:  # none of the usual folders can be written
            return Folder(os.environ.get("TMPDIR", "/tmp"), error=error.strerror or str(error))

    @functools.cached_property
    def run_folder(self) -> Optional[Folder]:
        return None if self.run_dir is None else facts.run_folder(self.run_dir)


def _python(asked: Asked) -> Check:
    return checks.python(platform.python_version(), facts.requirements()[0])


def _packages(asked: Asked) -> Check:
    ranges = facts.requirements()[1]
    stack = facts.stack()
    pinned = ranges.get(stack, {}) if stack else {}
    installed = {name: environment.version(name) for name in {**ranges[""], **pinned}}
    return checks.packages(installed, ranges[""], stack, pinned, facts.broken())


def _mpirun(asked: Asked) -> Check:
    try:
        path, printed = facts.mpirun()
    except FlagError as error:
        return Check("mpirun", "problem", str(error))
    in_batch_job = "SLURM_JOB_ID" in os.environ
    has_srun, has_horovod = shutil.which("srun") is not None, environment.version("horovod") is not None
    return checks.mpirun(path, printed, in_batch_job, has_srun, has_horovod)


def _ranks(asked: Asked) -> Check:
    return checks.ranks(asked.outcome)


def _tensorflow(asked: Asked) -> Check:
    return checks.tensorflow(asked.outcome)


def _horovod(asked: Asked) -> Check:
    return checks.horovod(*facts.horovod_build(), environment.version("tensorflow"), asked.outcome)


def _processor(asked: Asked) -> Check:
    from resnet_cpu.cluster import placement, precision

    host, has_extension = asked.host, placement.has_intel_openmp()
    find_out = precision.known if asked.outcome.skipped else precision.find_out
    return checks.processor(
        host.model or platform.machine(), host.instruction_sets, has_extension, find_out(host, has_extension)
    )


def _cores(asked: Asked) -> Check:
    host = asked.host
    return checks.cores(len(host.cpus), host.allowed, len(host.cores()), host.quota)


def _threads(asked: Asked) -> Check:
    exported = {name: os.environ[name] for name in environment.NUMBERS_OF_THREADS if os.environ.get(name)}
    try:
        environment.check_threads(dict(os.environ))
        refused = ""
    except FlagError as error:
        refused = str(error)
    return checks.threads(exported, refused, asked.proposed.threads)


def _memory(asked: Asked) -> Check:
    from resnet_cpu.cluster import placement

    return checks.memory(asked.host.memory_bytes, placement.RANK_BYTES)


def _shared_memory(asked: Asked) -> Check:
    from resnet_cpu.cluster import placement

    try:
        about = os.statvfs(_SHM)
    except OSError:
        return checks.shared_memory(_SHM, None, "")
    try:
        start.check_shared_memory(placement.suitable_ranks(asked.host), _SHM)
        refused = ""
    except OutputError as error:
        refused = str(error)
    return checks.shared_memory(_SHM, (about.f_blocks * about.f_frsize, about.f_bavail * about.f_frsize), refused)


def _placement(asked: Asked) -> Check:
    from resnet_cpu.cluster import placement, tuning

    proposed = asked.proposed
    reason = next(choice.reason for choice in proposed.choices if choice.name == "ranks")
    if asked.tuned:
        reason = f"the fastest with launch --tune, {tuning.file()}"
    return checks.placement(proposed.ranks_per_node, proposed.threads, reason, placement.allocator())


def _limits(asked: Asked) -> Check:
    soft = [
        resource.getrlimit(name)[0] for name in (resource.RLIMIT_NOFILE, resource.RLIMIT_AS, resource.RLIMIT_MEMLOCK)
    ]
    files, memory, locked = (None if limit == resource.RLIM_INFINITY else limit for limit in soft)
    fabric = any(os.path.isdir(path) and os.listdir(path) for path in ("/sys/class/infiniband", "/sys/class/hfi1"))
    return checks.limits(files, memory, locked, fabric)


def _environment(asked: Asked) -> Check:
    from resnet_cpu.cluster import control

    return checks.environment(os.environ, control.announced()[0])


def _mpi_parameters(asked: Asked) -> Check:
    return checks.mpi_parameters(environment.mpi_parameters())


def _clock(asked: Asked) -> Check:
    folders = [folder for folder in (asked.tmp, asked.run_folder) if folder is not None and folder.ahead is not None]
    offsets = {folder.path: folder.ahead or 0.0 for folder in folders}
    return checks.clock(datetime.datetime.now().year, offsets)


def _tmp(asked: Asked) -> Check:
    return checks.tmp(asked.tmp)


def _run_dir(asked: Asked) -> Optional[Check]:
    return None if asked.run_folder is None else checks.run_dir(asked.run_folder)


def _data_dir(asked: Asked) -> Optional[Check]:
    return None if asked.data_dir is None else checks.data_dir(facts.read_folder(asked.data_dir), asked.host.offered)


#: name -> check, in the order in which they are printed; None where there is nothing to check.
CHECKS: Dict[str, Callable[[Asked], Optional[Check]]] = {
    "python": _python,
    "packages": _packages,
    "mpirun": _mpirun,
    "ranks": _ranks,
    "tensorflow": _tensorflow,
    "horovod": _horovod,
    "processor": _processor,
    "cores": _cores,
    "threads": _threads,
    "memory": _memory,
    "shared_memory": _shared_memory,
    "placement": _placement,
    "limits": _limits,
    "environment": _environment,
    "mpi_parameters": _mpi_parameters,
    "clock": _clock,
    "tmp": _tmp,
    "run_dir": _run_dir,
    "data_dir": _data_dir,
}


def can_start() -> bool:
    """Return whether the packages load that every other command needs."""
    return not facts.broken()


def examine(asked: Asked) -> Iterator[Check]:
    """Yield the checks one by one; one that fails is a finding as well."""
    for name, check in CHECKS.items():
        try:
            found = check(asked)
        except Exception as error:  # whatever this machine has in store
            found = Check(name, "warning", f"could not be checked ({type(error).__name__}: {error})")
        if found is not None:
            yield found


def report(asked: Asked, as_json: bool) -> int:
    """Print a line per check as soon as it is known, and all as JSON in the last line if wanted.

    Returns the exit code: 1 if there is a problem.
    """
    found = []
    for check in examine(asked):
        print(check.line(), flush=True)
        found.append(check)
    if as_json:
        print(json.dumps(checks.summary(found)), flush=True)
    return int(any(check.state == "problem" for check in found))
