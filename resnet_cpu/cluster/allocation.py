"""Read which hosts a batch system has given to the job of this process, from the job's variables and files.

A job is never taken for a single host because its list is missing: `read` returns the hosts, or raises an error that
says how to name them.
"""

import re
from typing import Callable, Dict, List, Mapping, NamedTuple, Optional, Tuple

from resnet_cpu.errors import FlagError

HOST = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"  # ssh and mpirun would take a name that starts with a dash for an option
_SLURM = "SLURM_JOB_ID"
_TASKS = "SLURM_TASKS_PER_NODE"
_VARIABLES = re.compile(r"(SLURM|SLURMD|PBS|LSB|LS|COBALT|SGE|OAR)_.*|PE_HOSTFILE|PE")
_REMEDY = "name the hosts with --hosts=NAME:SLOTS,... (this host alone: --hosts=localhost)"


class Allocation(NamedTuple):
    """The hosts of a batch job."""

    system: str
    source: str  # the variable that lists the hosts, with its value if that is a file
    nodes: int
    hosts: Tuple[str, ...]  # empty under Slurm, whose hosts the launchers know
    slots: Optional[int]  # of each host, or of the one with the fewest; None if the job does not say
    unequal: str = ""  # the hosts with the fewest and the most slots, or Slurm's list, if the numbers differ
    left_out: str = ""  # a host of the list on which no rank is started, and why


_Counts = Dict[str, int]  # host -> slots, in the order of the list


class _System(NamedTuple):
    """A batch system whose jobs are recognised by one of the variables `marks`."""

    name: str
    marks: Tuple[str, ...]
    lists: Tuple[Tuple[str, Callable[[str], _Counts]], ...]  # a variable, and how to read it; the first one that is set
    has_launch_node: bool = False


def _of_words(text: str) -> _Counts:
    """Return the hosts of `NAME NAME ...`; each occurrence of a host is a slot."""
    return _added([(name, 1) for name in text.split()])


def _added(pairs: List[Tuple[str, int]]) -> _Counts:
    counts: _Counts = {}
    for name, slots in pairs:
        counts[name] = counts.get(name, 0) + slots
    return counts


def _of_pairs(text: str) -> _Counts:
    """Return the hosts of `NAME SLOTS NAME SLOTS ...`."""
    words = text.split()
    if len(words) % 2:
        raise ValueError
    return _added([(name, int(slots)) for name, slots in zip(words[::2], words[1::2])])


def _of_file(path: str) -> _Counts:
    """Return the hosts of a file with a line for each slot; `NAME slots=N` and `NAME:N` stand for N of them.

    PBS may add the virtual node or the job slot to a name, as in n1[0] and n1/0.
    """
    pairs = []
    for line in _lines(path):
        found = re.fullmatch(r"(\S+?)(?:\[\d+\]|/\d+)?(?:(?::|\s+slots\s*=\s*)(\d+))?(?:\s.*)?", line)
        pairs.append((found[1], int(found[2] or 1)) if found else (line, 1))
    return _added(pairs)


def _of_grid_engine(path: str) -> _Counts:
    """Return the hosts of a file with lines `NAME SLOTS QUEUE PROCESSORS`; a host may have a line for each queue."""
    return _added([(line.split()[0], int(line.split()[1])) for line in _lines(path)])


def _lines(path: str) -> List[str]:
    with open(path, encoding="utf-8") as text:
        lines = [line.split("#")[0].strip() for line in text]
    return [line for line in lines if line]


_SYSTEMS = (
    _System("PBS", ("PBS_JOBID", "PBS_NODEFILE"), (("PBS_NODEFILE", _of_file),)),
    _System(
        "LSF",
        ("LSB_JOBID", "LSB_DJOB_HOSTFILE", "LSB_MCPU_HOSTS"),
        (
            ("LSB_DJOB_HOSTFILE", _of_file),
            ("LSB_MCPU_HOSTS", _of_pairs),
            ("LSB_HOSTS", _of_words),
        ),
        has_launch_node=True,
    ),
    _System("Cobalt", ("COBALT_JOBID", "COBALT_NODEFILE"), (("COBALT_NODEFILE", _of_file),)),
    _System("Grid Engine", ("SGE_TASK_ID", "PE_HOSTFILE"), (("PE_HOSTFILE", _of_grid_engine),)),
    _System("OAR", ("OAR_JOB_ID", "OAR_NODEFILE"), (("OAR_NODEFILE", _of_file),)),
)


def read(environ: Mapping[str, str]) -> Optional[Allocation]:
    """Return the hosts of the batch job, None outside one.

    Raises FlagError, which names --hosts, if the job's list of hosts is missing or cannot be read.
    """
    if environ.get(_SLURM):
        return _of_slurm(environ)
    for system in _SYSTEMS:
        if any(environ.get(mark) for mark in system.marks):
            return _of_system(system, environ)
    return None


def in_job(environ: Mapping[str, str]) -> bool:
    """Return whether this process belongs to a job of a batch system."""
    return any(environ.get(mark) for mark in (_SLURM, *(mark for system in _SYSTEMS for mark in system.marks)))


def without(environ: Mapping[str, str]) -> Dict[str, str]:
    """Return `environ` without the variables of batch jobs."""
    return {name: value for name, value in environ.items() if not _VARIABLES.fullmatch(name)}


def _of_slurm(environ: Mapping[str, str]) -> Allocation:
    nodes = _number(environ, "SLURM_JOB_NUM_NODES") or _number(environ, "SLURM_NNODES")
    if not nodes:
        raise FlagError(
            f"{_SLURM}={environ[_SLURM]} is set, but SLURM_JOB_NUM_NODES is not: the nodes of this job of "
            f"Slurm are unknown; {_REMEDY}"
        )
    tasks, slots = _number(environ, "SLURM_NTASKS"), _number(environ, "SLURM_NTASKS_PER_NODE")
    listed = environ.get(_TASKS, "")
    counts = _task_counts(listed) if tasks or slots else []  # otherwise Slurm counts the processors there
    if len(counts) == nodes and tasks in (None, sum(counts)):
        unequal = f"{_TASKS}={listed}" if min(counts) < max(counts) else ""
        return Allocation("Slurm", "SLURM_JOB_NODELIST", nodes, (), min(counts), unequal)
    if tasks and tasks % nodes == 0:  # with --ntasks, --ntasks-per-node is only the most that a node may get
        slots = tasks // nodes
    return Allocation("Slurm", "SLURM_JOB_NODELIST", nodes, (), slots)


def _task_counts(listed: str) -> List[int]:
    """Return the tasks of each node of a list such as `4(x2),3`; no number if it is written in another way."""
    counts: List[int] = []
    for part in listed.split(","):
        found = re.fullmatch(r"\s*([1-9][0-9]{0,5})(?:\(x([1-9][0-9]{0,5})\))?\s*", part)
        if not found:
            return []
        counts += [int(found[1])] * int(found[2] or 1)
    return counts


def _number(environ: Mapping[str, str], name: str) -> Optional[int]:
    found = environ.get(name, "").strip()
    return int(found) if re.fullmatch("[0-9]+", found) and int(found) else None


def _of_system(system: _System, environ: Mapping[str, str]) -> Allocation:
    variables = [name for name, _ in system.lists]
    found = next(((name, read) for name, read in system.lists if environ.get(name, "").strip()), None)
    if found is None:
        mark = next(mark for mark in system.marks if environ.get(mark))
        raise FlagError(
            f"{mark}={environ[mark]} is set, but {' or '.join(variables)} is not: the hosts of this job of "
            f"{system.name} are unknown; {_REMEDY}"
        )
    name, reader = found
    source = f"{name}={environ[name].strip()}"
    try:
        counts = reader(environ[name].strip())
    except OSError as error:
        raise FlagError(f"{source}: {error.strerror}; {_REMEDY}") from None
    except (ValueError, IndexError):
        raise FlagError(f"{source}: not a list of hosts as {system.name} writes it; {_REMEDY}") from None
    wrong = next((host for host in counts if not re.fullmatch(HOST, host)), None)
    if wrong is not None:
        raise FlagError(f"{source}: {wrong!r} is not the name of a host; {_REMEDY}")
    if not counts or not all(counts.values()):
        raise FlagError(f"{source}: {'a host without slots' if counts else 'no host is listed'}; {_REMEDY}")
    return _of_counts(system, source, counts)


def _of_counts(system: _System, source: str, counts: _Counts) -> Allocation:
    left_out = ""
    launch_node, *others = counts
    if system.has_launch_node and counts[launch_node] == 1 and others and counts[others[0]] > 1:
        # A cluster may run the job's script on a host of its own, which LSF lists first, with one slot.
        left_out = f"{launch_node} is left out as the launch node: it is listed first, with one slot"
        counts = {name: counts[name] for name in others}
    fewest, most = (pick(counts, key=lambda name: counts[name]) for pick in (min, max))
    unequal = f"{fewest}: {counts[fewest]}, {most}: {counts[most]}" if counts[fewest] < counts[most] else ""
    return Allocation(system.name, source, len(counts), tuple(counts), counts[fewest], unequal, left_out)
