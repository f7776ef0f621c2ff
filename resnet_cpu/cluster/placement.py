"""Divide the cores of one host among its ranks, and say why.

`propose` is for the launcher, before any rank exists. `apply` is for each rank, before it imports TensorFlow, which
reads its environment only once. Both take the variables from `variables`. Where the ranks of a running job sit is
described in `seats`.
"""

import dataclasses
import importlib.util
import math
import os
import platform
import re
import sys
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Tuple

from resnet_cpu.cluster import control, environment, launchers, precision
from resnet_cpu.cluster.environment import Environment
from resnet_cpu.cluster.machine import Cpu, Machine, spans
from resnet_cpu.errors import FlagError, printable

RANK_BYTES = 5.4e9  # memory of one rank of ResNet-50 at 224x224 and batch 32
_MAX_CORES_PER_RANK = 40  # the paper's authors used 24, Intel's scripts a whole NUMA domain
_MIN_CORES_PER_DOMAIN = 8  # a smaller NUMA domain gets no rank of its own if there are several
_MAX_RESERVED = 2
_CORES_PER_RESERVED = 12  # the authors reserved 2 of 24
_ALLOCATORS = ("libtcmalloc_minimal.so.4", "libtcmalloc.so.4", "libtcmalloc_minimal.so", "libtcmalloc.so")

_Core = Tuple[Cpu, ...]
_Unit = List[_Core]


class Choice(NamedTuple):
    """One decision of a placement, for people to read."""

    name: str
    value: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Placement:
    """How the cores of one host are divided among its ranks."""

    ranks_per_node: int
    cpus: Tuple[Tuple[int, ...], ...]  # for each rank: one logical CPU of each of its physical cores
    bound: bool  # whether the launcher binds ranks to their cores
    threads: int  # compute threads per rank
    reserved: int  # cores of each rank that are left to communication
    environment: Dict[str, str]  # variables for the ranks
    yield_when_idle: bool  # Open MPI gives the core away while it waits, instead of spinning on it
    choices: Tuple[Choice, ...]

    def explanation(self, leave_out: str = "") -> List[str]:
        """Return the choices, except the one named `leave_out`, with their reasons, one line each."""
        return [f"{name}: {value} ({reason})" for name, value, reason in self.choices if name != leave_out]

    def without_binding(self, reason: str) -> "Placement":
        """Return this placement for ranks that the launcher does not bind, and why."""
        choices = [c._replace(value="none", reason=reason) if c.name == "binding" else c for c in self.choices]
        return dataclasses.replace(self, bound=False, choices=tuple(choices))


def variables(threads: int, *, intel_openmp: Optional[bool] = None) -> Dict[str, str]:
    """Return the environment variables for a rank with `threads` compute threads.

    `intel_openmp`: whether the Intel extension, which brings Intel's OpenMP library, is installed. By default this is
    looked up.
    """
    found = {
        "TF_NUM_INTRAOP_THREADS": str(threads),
        # The network is a chain of operations. A second one at a time rarely has work and would compete for the cores.
        "TF_NUM_INTEROP_THREADS": "1",
        "OMP_NUM_THREADS": str(threads),
        # Do not look for GPUs, and do not let TensorFlow report at every start that it finds no CUDA.
        "CUDA_VISIBLE_DEVICES": "-1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "ITEX_CPP_MIN_LOG_LEVEL": "3",
    }
    if has_intel_openmp() if intel_openmp is None else intel_openmp:
        # By default its threads spin for 200 ms after each parallel region, on cores that reading and Horovod need.
        found["KMP_BLOCKTIME"] = "1"
        # KMP_AFFINITY is not set, and environment.settle removes it: it pins the threads that enter a parallel region,
        # and the threads they start, TensorFlow's and tf.data's, inherit that one core (measured: 6 of 17 threads on
        # CPU 0). The rank's mask keeps threads in place. The same holds for HOROVOD_THREAD_AFFINITY: a pinned thread
        # cannot make way for threads that move.
    return found


def has_intel_openmp() -> bool:
    """Return whether the Intel extension for TensorFlow is installed, which loads libiomp5 with TensorFlow."""
    return importlib.util.find_spec("intel_extension_for_tensorflow") is not None


def apply(threads: int, cores: int) -> Environment:
    """Set this process's environment for `threads` compute threads (0: one per core) and return what is in force.

    Variables that the user exported are kept, except for the numbers of threads if `threads` is not 0, and those that
    would change what is computed (`environment.settle`). `cores` are the physical cores of this rank. Prints a warning
    about those, and if an exported OMP_NUM_THREADS differs from the cores. Raises FlagError if an exported number of
    threads is not a number.
    """
    reports = (
        launchers.EXPECTED_RANKS not in os.environ and control.announced()[1] == 0
    )  # else the launcher has done so
    environment.check_threads()
    if not threads and reports:
        _report_exported_threads(cores)
    for name, value in variables(threads or cores).items():
        if threads and name in environment.THREADS:
            os.environ[name] = value
        os.environ.setdefault(name, value)
    for line in environment.remarks() if reports else []:
        print(printable(line), file=sys.stderr, flush=True)
    return environment.settle()


def _report_exported_threads(cores: int) -> None:
    """Warn if an exported OMP_NUM_THREADS decides how many threads compute."""
    exported = os.environ.get("OMP_NUM_THREADS")
    if exported is None or exported.split(",")[0].strip() == str(cores):  # a list has one entry per nesting level
        return
    print(
        f"warning: OMP_NUM_THREADS={exported} is set in your environment and decides the threads of the kernels; "
        f"this rank has {cores} core{'s' * (cores != 1)}. Unset it, or give --threads",
        file=sys.stderr,
        flush=True,
    )


def allocator(root: str = "/") -> Optional[str]:
    """Return the path of tcmalloc below `root`, or None if it is not installed."""
    folders = []
    if root == "/":
        folders += os.environ.get("LD_LIBRARY_PATH", "").split(":")
        folders.append(os.path.join(os.environ.get("CONDA_PREFIX", ""), "lib"))
    system = (f"usr/lib/{platform.machine()}-linux-gnu", "usr/lib64", "usr/lib", "usr/local/lib64", "usr/local/lib")
    folders += [os.path.join(root, folder) for folder in system]
    for name in _ALLOCATORS:
        for folder in folders:
            path = os.path.join(folder, name)
            # LD_PRELOAD separates its entries by spaces and colons.
            if path.startswith("/") and not re.search(r"[\s:]", path) and os.path.isfile(path):
                return path
    return None


def suitable_ranks(machine: Machine) -> int:
    """Return how many ranks suit the machine; the network between hosts does not change this number."""
    levels, _ = _within_quota(machine)
    return len(_suitable(machine, levels)[0])


def propose(
    machine: Machine,
    ranks_per_node: Optional[int] = None,
    several_hosts: bool = False,
    *,
    decided_by: str = "",
    intel_openmp: Optional[bool] = None,
    bfloat16_speed: Optional[float] = None,
) -> Placement:
    """Return a placement of `ranks_per_node` ranks on a machine, by default of as many as suit it.

    `several_hosts`: ranks also communicate over a network. `decided_by` names what asked for the number, as in
    "--ranks=4", for the error. `bfloat16_speed` is relative to float32, see `precision.known`. Raises FlagError if
    there are fewer cores than ranks.
    """
    levels, limit = _within_quota(machine)
    bound = limit is None
    choices = [] if limit is None else [limit]
    pieces, reason = _suitable(machine, levels)
    if ranks_per_node is not None and ranks_per_node != len(pieces):
        decided_by = decided_by or f"--ranks_per_node={ranks_per_node}"
        pieces, reason = _requested(machine, levels, ranks_per_node, decided_by)
    choices.append(Choice("ranks", str(len(pieces)), reason))
    smallest = min(len(piece) for piece in pieces)
    reserved = min(_MAX_RESERVED, smallest // _CORES_PER_RESERVED) if several_hosts else 0
    threads = smallest - reserved
    choices += _thread_choices(pieces, threads, reserved, several_hosts)
    choices.append(_binding_choice(pieces, bound))
    for_ranks = _with_allocator(variables(threads, intel_openmp=intel_openmp), machine)
    choices += _environment_choices(for_ranks)
    yields = reserved == 0
    choices.append(
        Choice("waiting", "yield", "a waiting Open MPI rank would spin on a core that computes what it waits for")
        if yields
        else Choice("waiting", "spin", "a core is reserved for communication, and a spinning rank answers sooner")
    )
    choices += _machine_choices(machine, bfloat16_speed)
    cpus = tuple(tuple(core[0].id for core in piece) for piece in pieces)
    return Placement(len(pieces), cpus, bound, threads, reserved, for_ranks, yields, tuple(choices))


def oversubscribed(machine: Machine, ranks: int) -> Placement:
    """Return a placement of more ranks than cores: one thread each and no binding. For tests; training is slow."""
    cpus = tuple(core[0].id for core in machine.cores())
    cores = f"{len(cpus)} core{'s' * (len(cpus) != 1)}"
    choices = (
        Choice("ranks", str(ranks), f"RESNET_CPU_OVERSUBSCRIBE=1: they take turns on {cores}; for tests, not training"),
        Choice("threads", "1", "there is less than one core per rank"),
    )
    return Placement(ranks, (cpus,) * ranks, False, 1, 0, _with_allocator(variables(1), machine), True, choices)


def _with_allocator(variables: Dict[str, str], machine: Machine) -> Dict[str, str]:
    preload = allocator(machine.root)
    return variables if preload is None else {**variables, "LD_PRELOAD": preload}


def _units(machine: Machine) -> List[Tuple[str, List[_Unit]]]:
    """Return the allowed cores grouped by NUMA domain, by socket and as one group, each level with its name."""
    levels = []
    for name, key in (("NUMA domain", lambda c: (c.socket, c.node)), ("socket", lambda c: c.socket)):
        grouped: Dict[Any, _Unit] = {}
        for core in machine.cores():
            grouped.setdefault(key(core[0]), []).append(core)
        levels.append((name, [grouped[k] for k in sorted(grouped)]))
    levels.append(("machine", [[core for unit in levels[0][1] for core in unit]]))
    return levels


def _within_quota(machine: Machine) -> Tuple[List[Tuple[str, List[_Unit]]], Optional[Choice]]:
    """Return the units, cut down to the cores whose time a cgroup grants, and the choice that says so, if any."""
    levels = _units(machine)
    domains = levels[0][1]
    cores = sum(len(unit) for unit in domains)
    if machine.quota is None or machine.quota >= cores:
        return levels, None
    granted = max(1, math.floor(machine.quota))
    largest = sorted(domains, key=len, reverse=True)
    count = next((n for n in range(1, len(largest)) if granted <= n * len(largest[n - 1])), len(largest))
    kept = [unit[: granted // count] for unit in largest[:count]]
    if sum(map(len, kept)) <= granted - count:  # a small domain holds less than an even share
        kept = [levels[-1][1][0][:granted]]
    kept.sort(key=lambda unit: unit[0][0].id)
    reason = (
        f"the cgroup grants the time of {machine.quota:g} CPUs; more threads would all be stopped for the rest of "
        "each period"
    )
    levels = [("NUMA domain", kept), ("machine", [[core for unit in kept for core in unit]])]
    return levels, Choice("cores", f"{sum(map(len, kept))} of {cores}", reason)


def _cut(unit: _Unit, pieces: int) -> List[_Unit]:
    """Return the unit's cores in contiguous pieces whose sizes differ by at most one."""
    ends = [len(unit) * i // pieces for i in range(pieces + 1)]
    return [unit[begin:end] for begin, end in zip(ends, ends[1:])]


def _fits(machine: Machine, units: List[_Unit], per_unit: int) -> bool:
    """Return whether `per_unit` ranks in each unit have enough memory, as far as the kernel reports it."""
    if machine.memory_bytes and machine.memory_bytes < per_unit * len(units) * RANK_BYTES:
        return False
    memory = {node.id: node.memory_bytes for node in machine.nodes}
    if len([node for node in machine.nodes if node.cpus]) < 2:
        return True  # one domain: its memory is the machine's, checked above
    for unit in units:
        near = [memory.get(node, 0) for node in {core[0].node for core in unit}]
        if all(near) and sum(near) < per_unit * RANK_BYTES:
            return False
    return True


def _suitable(machine: Machine, levels: List[Tuple[str, List[_Unit]]]) -> Tuple[List[_Unit], str]:
    """Return the cores of each rank, for as many ranks as suit the machine, and the reason for their number."""
    short_of_memory = False
    for name, units in levels:
        sizes = [len(unit) for unit in units]
        if len(units) > 1 and (min(sizes) < _MIN_CORES_PER_DOMAIN or 2 * min(sizes) < max(sizes)):
            continue  # too small, or so uneven that ranks with equal threads would waste cores of the larger domains
        wanted = 2 if sizes == [2] else -(-max(sizes) // _MAX_CORES_PER_RANK)
        for per_unit in range(wanted, 0, -1):
            if not _fits(machine, units, per_unit):
                short_of_memory = True
                continue
            reason = _reason_for_ranks(name, sizes, per_unit)
            if short_of_memory:
                reason += "; more ranks would not fit into memory (5.4 GB each at batch 32)"
            return [piece for unit in units for piece in _cut(unit, per_unit)], reason
    reason = (
        f"this machine or cgroup has {machine.memory_bytes / 1e9:.1f} GB, and a single rank takes 5.4 GB at batch 32: "
        "choose a smaller --batch_size, or --accumulate_steps"
    )
    return levels[-1][1], reason


def _reason_for_ranks(level: str, sizes: List[int], per_unit: int) -> str:
    cores = str(sizes[0]) if len(set(sizes)) == 1 else f"{min(sizes)} to {max(sizes)}"
    cores += " core" if cores == "1" else " cores"
    if sizes == [2] and per_unit == 2:
        return "on 2 cores, two ranks were faster than one in our benchmarks (docs/benchmarks.md)"
    if per_unit == 1 and len(sizes) == 1:
        if sizes[0] <= _MIN_CORES_PER_DOMAIN:
            return f"one rank for {cores}: it needs the least memory and waits for no other"
        if level == "machine":
            return f"one rank for the {cores}: the domains are too small or too uneven for a rank each"
        return f"one rank for the {cores} of one domain"
    if per_unit == 1:
        return f"one per {level} that has CPUs, of {cores}: its memory is local"
    return (
        f"{per_unit} per {level} of {cores}: with more than {_MAX_CORES_PER_RANK} threads a rank loses time at the "
        "barriers of the network's many small steps"
    )


def _requested(
    machine: Machine, levels: List[Tuple[str, List[_Unit]]], ranks: int, decided_by: str
) -> Tuple[List[_Unit], str]:
    """Return the cores of each of `ranks` ranks, and the reason.

    Ranks get whole units or equal parts of units, unless that would leave many cores idle.
    """
    cores = sum(len(unit) for unit in levels[-1][1])
    if not 1 <= ranks <= cores:
        limit = f" (a cgroup grants {machine.quota:g})" if machine.quota is not None else ""
        raise FlagError(
            f"{decided_by}: this process may use {cores} core{'s' * (cores != 1)} of this host{limit}, and each rank "
            f"needs one; ask for 1 to {cores} ranks per host"
        )
    for _, units in levels:
        if ranks % len(units) == 0:
            pieces = [piece for unit in units for piece in _cut(unit, ranks // len(units)) if piece]
        elif len(units) % ranks == 0:
            together = len(units) // ranks
            pieces = [sum(units[i : i + together], []) for i in range(0, len(units), together)]
        else:
            continue
        if len(pieces) == ranks and min(map(len, pieces)) >= 0.75 * (cores // ranks):
            break
    crossing = sum(len({core[0].node for core in piece}) > 1 for piece in pieces)
    reason = "requested"
    if crossing:
        reason += f"; {crossing} of them span NUMA domains, so part of their memory is remote"
    if not _fits(machine, [[core for piece in pieces for core in piece]], ranks):
        reason += "; each takes 5.4 GB at batch 32, more than this machine has: choose a smaller --batch_size"
    return pieces, reason


def _thread_choices(pieces: List[_Unit], threads: int, reserved: int, several_hosts: bool) -> List[Choice]:
    sizes = [len(piece) for piece in pieces]
    reason = "one per core"
    if max(len(core) for piece in pieces for core in piece) > 1:
        reason += ", none on hyper-threads: one thread keeps a core's vector units busy"
    if min(sizes) != max(sizes):
        reason += f"; ranks have {min(sizes)} to {max(sizes)} cores, and all wait for the slowest"
    chosen = [Choice("threads", str(threads), reason)]
    if not several_hosts:
        reason = "one host: there is no network, and messages through shared memory are short"
    elif reserved:
        reason = "a twelfth, as the authors reserved 2 of 24: for Horovod's thread, which also sums gradients"
        reason += ", and for the network's own thread" if reserved > 1 else ""
    else:
        cores = f"{min(sizes)} core{'s' * (min(sizes) > 1)}"
        reason = f"a rank has {cores}: reserving one would cost more than sharing it"
    return [*chosen, Choice("reserved cores", str(reserved), reason)]


def _binding_choice(pieces: List[_Unit], bound: bool) -> Choice:
    if not bound:
        return Choice("binding", "none", "a quota grants time, not particular CPUs: the kernel picks free ones")
    value = " | ".join(spans(core[0].id for core in piece) for piece in pieces)
    reason = "each rank has its own cores"
    if any(len(core) > 1 for piece in pieces for core in piece):
        reason += "; its mask includes their hyper-threads, for reading, decoding and the system"
    return Choice("binding", value, reason)


def _environment_choices(variables: Mapping[str, str]) -> List[Choice]:
    if "KMP_BLOCKTIME" in variables:
        reason = (
            "the Intel extension computes with Intel's OpenMP, whose threads would spin after each region; launch "
            "does not set KMP_AFFINITY, since reading threads would inherit the one core their parent is pinned to"
        )
        openmp = Choice("OpenMP", "KMP_BLOCKTIME=1", reason)
    else:
        openmp = Choice("OpenMP", "KMP_* not set", "only Intel's OpenMP reads them, and its extension is not installed")
    if "LD_PRELOAD" in variables:
        memory = Choice("allocator", variables["LD_PRELOAD"], "glibc returns large buffers to the kernel each time")
    else:
        reason = "tcmalloc was not found; the package libtcmalloc-minimal4 makes training a few percent faster"
        memory = Choice("allocator", "glibc", reason)
    return [openmp, memory]


def _machine_choices(machine: Machine, bfloat16_speed: Optional[float]) -> List[Choice]:
    has = machine.instruction_sets
    choices = [Choice("precision", *precision.advice(has, bfloat16_speed))]
    if "avx512f" in has and "avx512bw" not in has:
        choices.append(Choice("kernels", "AVX2", "oneDNN 3 needs BW, VL and DQ for its AVX-512 kernels"))
    memory_only = [node for node in machine.nodes if not node.cpus and node.memory_bytes]
    if memory_only:
        size = min(node.memory_bytes for node in memory_only) / 1e9
        reason = (
            f"{size:.0f} GB each: nothing is allocated there by default, and a rank takes 5.4 GB; if it is MCDRAM, use "
            "cache mode, or start ranks under numactl --preferred"
        )
        choices.append(Choice("memory", f"NUMA nodes {spans(n.id for n in memory_only)} have no CPUs", reason))
    return choices
