"""Where ranks and threads go on a machine, and why.

`propose` is for whoever starts ranks, `apply` for each rank before TensorFlow is imported, since that reads its
environment once; both take the environment from one place. `describe` and `doubts` are what rank 0 tells at the start.
"""

import collections
import dataclasses
import importlib.util
import math
import os
import platform
import re
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from resnet_cpu.cluster.machine import Cpu, Topology, spans
from resnet_cpu.errors import FlagError

THREADS = ("TF_NUM_INTRAOP_THREADS", "OMP_NUM_THREADS")
_RANK_BYTES = 5.4e9  # what a rank of ResNet-50 took at 224x224 and batch 32
_MOST_CORES = 40  # of a rank; the authors gave one 24, Intel's scripts a NUMA domain
_FEWEST_CORES = 8  # of a NUMA domain that gets a rank of its own, where there are several
_MOST_RESERVED = 2
_CORES_A_RESERVED_ONE = 12  # the authors kept 2 of 24
_MOST_KINDS = 4  # lines of `describe`
_MOST_RANKS = 8  # that one of its lines names
_ALLOCATORS = ("libtcmalloc_minimal.so.4", "libtcmalloc.so.4", "libtcmalloc_minimal.so", "libtcmalloc.so")

_Core = Tuple[Cpu, ...]
_Unit = List[_Core]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a machine is shared out among the ranks on it."""

    ranks_per_node: int
    cpus: Tuple[Tuple[int, ...], ...]  # of each rank: a logical CPU for each physical core
    masks: Tuple[Tuple[int, ...], ...]  # of each rank: `cpus` with those of their hyper-threads that may be used
    smt: bool  # whether `masks` hold more than one CPU of a core
    bound: bool  # whether ranks are to be bound to their `masks`
    threads: int  # compute threads of a rank
    reserved: int  # cores of each rank that are left to communication
    environment: Dict[str, str]  # for the ranks
    yield_when_idle: bool  # Open MPI's way to wait: give the core away instead of spinning on it
    precision_offer: str  # `bfloat16` where it pays, else `float32`
    choices: Tuple[Tuple[str, str, str], ...]  # what was decided, its value, why

    def reasons(self) -> List[str]:
        """Return the choices, one line each."""
        return [f"{what}: {value} ({why})" for what, value, why in self.choices]


def environment(threads: int, *, intel_openmp: Optional[bool] = None) -> Dict[str, str]:
    """Return the environment for a rank of `threads` compute threads.

    `intel_openmp`: whether the Intel extension, which brings that library, is installed; by default it is looked for.
    """
    chosen = str(threads)
    wanted = {
        "TF_NUM_INTRAOP_THREADS": chosen,
        # The network is a chain: a second operation hardly ever has anything to do, and would fight for the cores.
        "TF_NUM_INTEROP_THREADS": "1",
        "OMP_NUM_THREADS": chosen,
        "TF_ENABLE_ONEDNN_OPTS": "1",
        # No GPU is looked for, and TensorFlow does not report on every start that it finds no CUDA.
        "CUDA_VISIBLE_DEVICES": "-1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "ITEX_CPP_MIN_LOG_LEVEL": "3",
    }
    if has_intel_openmp() if intel_openmp is None else intel_openmp:
        # It spins 200 ms after each region by default: that takes the core from data threads and from Horovod's.
        wanted["KMP_BLOCKTIME"] = "1"
        # KMP_AFFINITY stays unset: it pins the threads that enter a region, and those that they start, TensorFlow's
        # own and tf.data's, inherit the one core (seen here: 6 of 17 threads on CPU 0). The rank's mask does it.
        # Nor is HOROVOD_THREAD_AFFINITY set: among threads that may move, a pinned one cannot get out of the way.
    return wanted


def has_intel_openmp() -> bool:
    """Return whether the Intel extension for TensorFlow is installed, which loads libiomp5 with TensorFlow."""
    return importlib.util.find_spec("intel_extension_for_tensorflow") is not None


def apply(threads: int, cores: int) -> Dict[str, str]:
    """Set the environment for `threads` (0: as many as the rank has `cores`); return the values in force.

    What the user exported stands, but for the threads where the flag names a number.
    """
    wanted = environment(threads or cores)
    for name, value in wanted.items():
        if threads and name in THREADS:
            os.environ[name] = value
        os.environ.setdefault(name, value)
    also = ("KMP_AFFINITY", "HOROVOD_THREAD_AFFINITY", "LD_PRELOAD")  # only of a launcher or a user
    return {name: os.environ[name] for name in (*wanted, *also) if name in os.environ}


def doubt_about(precision: str, present: Sequence[str]) -> Optional[str]:
    """Return a warning where `precision` is known not to pay on a processor with these instruction sets."""
    if precision == "bfloat16" and "amx_bf16" not in present:
        return (
            "--precision=bfloat16: this processor has no AMX, where bfloat16 was slower than float32 (BUILD_NOTES.md); "
            "compare the two with python -m resnet_cpu.benchmark"
        )
    return None


def allocator(root: str = "/") -> Optional[str]:
    """Return the path of tcmalloc below `root`, None where it is not installed."""
    folders = []
    if root == "/":
        folders += os.environ.get("LD_LIBRARY_PATH", "").split(":")
        folders.append(os.path.join(os.environ.get("CONDA_PREFIX", ""), "lib"))
    places = (f"usr/lib/{platform.machine()}-linux-gnu", "usr/lib64", "usr/lib", "usr/local/lib64", "usr/local/lib")
    folders += [os.path.join(root, place) for place in places]
    for name in _ALLOCATORS:
        for folder in folders:
            path = os.path.join(folder, name)
            # LD_PRELOAD parts its entries at spaces and colons.
            if path.startswith("/") and not re.search(r"[\s:]", path) and os.path.isfile(path):
                return path
    return None


def propose(
    topology: Topology,
    ranks_per_node: Optional[int] = None,
    several_hosts: bool = False,
    *,
    intel_openmp: Optional[bool] = None,
) -> Layout:
    """Return how to place ranks on a machine: as many as `ranks_per_node`, by default as many as suit it.

    `several_hosts`: the ranks talk over a network too. Raises FlagError if there are fewer cores than ranks.
    """
    choices: List[Tuple[str, str, str]] = []
    units, limited = _within_quota(topology, choices)
    pieces, why = _suitable(topology, units)
    if ranks_per_node is not None and ranks_per_node != len(pieces):
        pieces, why = _requested(topology, units, ranks_per_node)
    choices.append(("ranks", str(len(pieces)), why))
    bound = not limited
    least = min(len(piece) for piece in pieces)
    reserved = min(_MOST_RESERVED, least // _CORES_A_RESERVED_ONE) if several_hosts else 0
    threads = least - reserved
    _explain_threads(topology, pieces, threads, reserved, several_hosts, choices)
    cpus = tuple(tuple(core[0].id for core in piece) for piece in pieces)
    masks = tuple(tuple(sorted(cpu.id for core in piece for cpu in core)) for piece in pieces)
    smt = any(len(mask) > len(first) for mask, first in zip(masks, cpus))
    _explain_binding(cpus, smt, bound, choices)
    wanted = environment(threads, intel_openmp=intel_openmp)
    preload = allocator(topology.root)
    if preload is not None:
        wanted["LD_PRELOAD"] = preload
    _explain_environment(wanted, choices)
    yields = reserved == 0
    choices.append(
        ("waiting", "yield", "Open MPI spins while it waits, on a core that computes what it waits for")
        if yields
        else ("waiting", "spin", "a core is left to wait on, and who spins answers sooner")
    )
    precision = "bfloat16" if "amx_bf16" in topology.instruction_sets else "float32"
    _explain_kernels(topology, precision, choices)
    return Layout(len(pieces), cpus, masks, smt, bound, threads, reserved, wanted, yields, precision, tuple(choices))


def shared(topology: Topology, ranks: int) -> Layout:
    """Return how more ranks than cores share them: a thread each, bound nowhere. Right for tests, slow for training."""
    cpus = tuple(core[0].id for core in topology.cores())
    wanted = environment(1)
    preload = allocator(topology.root)
    if preload is not None:
        wanted["LD_PRELOAD"] = preload
    cores = f"{len(cpus)} core{'s' * (len(cpus) != 1)}"
    choices = (
        ("ranks", str(ranks), f"--oversubscribe: they take turns on {cores}; right for tests, slow for training"),
        ("threads", "1", "there is less than a core for each"),
    )
    masks = (topology.allowed,) * ranks
    return Layout(ranks, (cpus,) * ranks, masks, False, False, 1, 0, wanted, True, "float32", choices)


def _units(topology: Topology) -> List[Tuple[str, List[_Unit]]]:
    """Return the allowed cores by NUMA domain, by socket and as one, each with its name."""
    levels = []
    for name, key in (("NUMA domain", lambda c: (c.socket, c.node)), ("socket", lambda c: c.socket)):
        grouped: Dict[Any, _Unit] = {}
        for core in topology.cores():
            grouped.setdefault(key(core[0]), []).append(core)
        levels.append((name, [grouped[k] for k in sorted(grouped)]))
    levels.append(("machine", [[core for unit in levels[0][1] for core in unit]]))
    return levels


def _within_quota(
    topology: Topology, choices: List[Tuple[str, str, str]]
) -> Tuple[List[Tuple[str, List[_Unit]]], bool]:
    """Return the units, cut to as many cores as a cgroup grants time for, and whether it cut them."""
    levels = _units(topology)
    domains = levels[0][1]
    cores = sum(len(unit) for unit in domains)
    if topology.quota is None or topology.quota >= cores:
        return levels, False
    granted = max(1, math.floor(topology.quota))
    largest = sorted(domains, key=len, reverse=True)
    count = next((n for n in range(1, len(largest)) if granted <= n * len(largest[n - 1])), len(largest))
    kept = [unit[: granted // count] for unit in largest[:count]]
    if sum(map(len, kept)) <= granted - count:  # a small domain holds less than an even share
        kept = [levels[-1][1][0][:granted]]
    kept.sort(key=lambda unit: unit[0][0].id)
    choices.append(
        (
            "cores",
            f"{sum(map(len, kept))} of {cores}",
            f"the cgroup grants the time of {topology.quota:g} CPUs; more threads would be stopped together for the "
            "rest of each period",
        )
    )
    return [("NUMA domain", kept), ("machine", [[core for unit in kept for core in unit]])], True


def _cut(unit: _Unit, pieces: int) -> List[_Unit]:
    """Return the unit's cores in contiguous pieces whose sizes differ by one at most."""
    ends = [len(unit) * i // pieces for i in range(pieces + 1)]
    return [unit[begin:end] for begin, end in zip(ends, ends[1:])]


def _fits(topology: Topology, units: List[_Unit], each: int) -> bool:
    """Return whether `each` ranks a unit have the memory they need, as far as the kernel tells."""
    if topology.memory_bytes and topology.memory_bytes < each * len(units) * _RANK_BYTES:
        return False
    memory = {node.id: node.memory_bytes for node in topology.nodes}
    if len([node for node in topology.nodes if node.cpus]) < 2:
        return True  # said above
    for unit in units:
        near = [memory.get(node, 0) for node in {core[0].node for core in unit}]
        if all(near) and sum(near) < each * _RANK_BYTES:
            return False
    return True


def _suitable(topology: Topology, levels: List[Tuple[str, List[_Unit]]]) -> Tuple[List[_Unit], str]:
    """Return the cores of each rank, for as many ranks as suit the machine, and why so many."""
    cramped = False
    for name, units in levels:
        sizes = [len(unit) for unit in units]
        if len(units) > 1 and (min(sizes) < _FEWEST_CORES or 2 * min(sizes) < max(sizes)):
            continue  # a domain too small, or so uneven that ranks of alike threads would waste the larger
        wanted = 2 if sizes == [2] else -(-max(sizes) // _MOST_CORES)
        for each in range(wanted, 0, -1):
            if not _fits(topology, units, each):
                cramped = True
                continue
            why = _why_ranks(name, sizes, each)
            if cramped:
                why += "; more ranks would not fit into memory, at 5.4 GB each with batch 32"
            return [piece for unit in units for piece in _cut(unit, each)], why
    why = (
        f"of the {topology.memory_bytes / 1e9:.1f} GB that this machine or cgroup has, not even one rank gets the "
        "5.4 GB it takes with batch 32: choose a smaller --batch_size, or --accumulate_steps"
    )
    return levels[-1][1], why


def _why_ranks(name: str, sizes: List[int], each: int) -> str:
    cores = str(sizes[0]) if len(set(sizes)) == 1 else f"{min(sizes)} to {max(sizes)}"
    cores += " core" if cores == "1" else " cores"
    if sizes == [2] and each == 2:
        return "a core each was 1.06 times Keras' rate, one rank on both 1.04 (README.md, 2-core machine)"
    if each == 1 and len(sizes) == 1:
        if sizes[0] <= _FEWEST_CORES:
            return f"one for {cores}: least memory, and nothing to wait for"
        odd = name == "machine"
        return f"one for the {cores}" + (
            ": their domains are too small or too uneven for ranks of their own" if odd else " of one domain"
        )
    if each == 1:
        return f"one per {name} that has CPUs, of {cores}: its memory is near"
    return (
        f"{each} per {name}, of {cores}: a rank of more than {_MOST_CORES} has more threads to wait for at each of the "
        "network's many small steps"
    )


def _requested(topology: Topology, levels: List[Tuple[str, List[_Unit]]], ranks: int) -> Tuple[List[_Unit], str]:
    """Return the cores of each of `ranks` ranks, whole units or even parts of them where that wastes little; why."""
    cores = sum(len(unit) for unit in levels[-1][1])
    if not 1 <= ranks <= cores:
        limit = f" (a cgroup grants {topology.quota:g})" if topology.quota is not None else ""
        raise FlagError(
            f"--ranks_per_node={ranks}: this process may use {cores} core{'s' * (cores != 1)} here{limit}; ask for 1 "
            f"to {cores} ranks a node, or leave it at auto"
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
    why = "asked for"
    if crossing:
        why += f"; {crossing} of them span NUMA domains, with part of their memory far away"
    if not _fits(topology, [[core for piece in pieces for core in piece]], ranks):
        why += "; with batch 32 each takes 5.4 GB, more than there is: choose a smaller --batch_size"
    return pieces, why


def _explain_threads(
    topology: Topology,
    pieces: List[_Unit],
    threads: int,
    reserved: int,
    several_hosts: bool,
    choices: List[Tuple[str, str, str]],
) -> None:
    sizes = [len(piece) for piece in pieces]
    why = "one a core"
    if max(len(core) for piece in pieces for core in piece) > 1:
        why += ", none on its hyper-threads: one thread keeps a core's vector units busy"
    if min(sizes) != max(sizes):
        why += f"; ranks have {min(sizes)} to {max(sizes)} cores, and all wait for the slowest"
    choices.append(("threads", str(threads), why))
    if not several_hosts:
        why = "one host: no network, and messages in memory are short"
    elif reserved:
        why = "a twelfth, as the authors kept 2 of 24: for Horovod's thread, which also adds gradients up"
        why += ", and the network's own" if reserved > 1 else ""
    else:
        why = f"of {min(sizes)} core{'s' * (min(sizes) > 1)} none is given away: that would cost more than sharing it"
    choices.append(("reserved", str(reserved), why))


def _explain_binding(
    cpus: Sequence[Sequence[int]],
    smt: bool,
    bound: bool,
    choices: List[Tuple[str, str, str]],
) -> None:
    if not bound:
        choices.append(("binding", "none", "a quota grants time, not CPUs: the kernel knows which ones are free"))
        return
    value = " | ".join(spans(mine) for mine in cpus)
    why = "each rank on cores of its own"
    if smt:
        why += "; their hyper-threads are in its mask, for reading, decoding and the system"
    choices.append(("binding", value, why))


def _explain_environment(wanted: Mapping[str, str], choices: List[Tuple[str, str, str]]) -> None:
    if "KMP_BLOCKTIME" in wanted:
        why = (
            "the Intel extension computes on Intel's OpenMP, which would spin after each region; KMP_AFFINITY stays "
            "unset, since threads for reading would inherit the one core it pins their parent to"
        )
        choices.append(("OpenMP", "KMP_BLOCKTIME=1", why))
    else:
        choices.append(("OpenMP", "KMP_* not set", "only Intel's OpenMP reads it, and the Intel extension is missing"))
    if "LD_PRELOAD" in wanted:
        choices.append(("allocator", wanted["LD_PRELOAD"], "glibc returns large buffers to the kernel each time"))
    else:
        choices.append(
            ("allocator", "glibc", "tcmalloc was not found; libtcmalloc-minimal4 gives a few hundredths of speed")
        )


def _explain_kernels(topology: Topology, precision: str, choices: List[Tuple[str, str, str]]) -> None:
    has = topology.instruction_sets
    if precision == "bfloat16":
        choices.append(
            ("precision", "float32, or --precision=bfloat16", "with AMX more than twice the rate here, see README.md")
        )
    elif "avx512_bf16" in has:
        choices.append(("precision", "float32", "bfloat16 without AMX was slower (BUILD_NOTES.md)"))
    else:
        choices.append(("precision", "float32", "no AMX"))
    if "avx512f" in has and "avx512bw" not in has:
        choices.append(("kernels", "AVX2", "oneDNN 3 has AVX-512 kernels only for processors with BW, VL and DQ"))
    alone = [node for node in topology.nodes if not node.cpus and node.memory_bytes]
    if alone:
        size = min(node.memory_bytes for node in alone) / 1e9
        choices.append(
            (
                "memory",
                f"NUMA nodes {spans(node.id for node in alone)} have none of the CPUs",
                f"{size:.0f} GB each: nothing is placed there by itself, and a rank takes 5.4 GB; as MCDRAM it serves "
                "best in cache mode, else start ranks under numactl --preferred",
            )
        )


def describe(rows: Sequence[Mapping[str, Any]]) -> List[str]:
    """Return lines that say where all ranks sit; hosts on which ranks sit alike take one line.

    A row a rank, in the order of the ranks: `host`, `cpus` (its affinity mask), `cores`, `threads`.
    """
    alike: Dict[Any, List[str]] = {}
    for host, ranks in _by_host(rows).items():
        alike.setdefault(tuple((tuple(r["cpus"]), r["cores"], r["threads"]) for r in ranks), []).append(host)
    lines = []
    kinds = sorted(alike.items(), key=lambda kind: -len(kind[1]))
    for placed, hosts in kinds[:_MOST_KINDS]:
        many = f"{len(placed)} rank{'s' * (len(placed) != 1)}"
        where = f"host {hosts[0]}, {many}" if len(hosts) == 1 else f"{len(hosts)} hosts x {many}"
        each = sorted({(cores, threads) for _, cores, threads in placed})
        counts = " or ".join(
            f"{cores} core{'s' * (cores != 1)} and {threads} thread{'s' * (threads != 1)}" for cores, threads in each
        )
        masks = [spans(cpus) for cpus, _, _ in placed]
        if len(set(masks)) == 1 and len(masks) > 1:
            sits = f"all on CPUs {masks[0]}, unbound"
        else:
            shown = list(enumerate(masks))
            if len(shown) > _MOST_RANKS:
                shown = [*shown[: _MOST_RANKS - 1], shown[-1]]
            named = [f"rank {i} on CPUs {mask}" for i, mask in shown]
            if len(masks) > _MOST_RANKS:
                named.insert(-1, "...")
            sits = ", ".join(named).replace("rank 0 on", "rank 0 of a host on" if len(hosts) > 1 else "rank 0 on", 1)
        lines.append(f"{where}, {counts} each: {sits}")
    rest = sum(len(hosts) for _, hosts in kinds[_MOST_KINDS:])
    if rest:
        lines.append(f"and {rest} more hosts, in {len(kinds) - _MOST_KINDS} other ways")
    return lines


def doubts(rows: Sequence[Mapping[str, Any]]) -> List[str]:
    """Return what looks wrong about where ranks sit, one line each with the remedy; of `describe`'s rows.

    With `host_cpus` (online logical CPUs of the host) in the rows, CPUs that no rank may use are seen too; with `omp`
    (its OMP_NUM_THREADS), kernels that compute with other threads than TensorFlow.
    """
    found: Dict[str, List[str]] = collections.defaultdict(list)  # what -> hosts
    hosts = _by_host(rows)
    for host, ranks in hosts.items():
        used = set().union(*(rank["cpus"] for rank in ranks))
        threads = sum(rank["threads"] for rank in ranks)
        cores = min(sum(rank["cores"] for rank in ranks), len(used))
        narrow = [rank["threads"] for rank in ranks if rank["threads"] > 1 and len(rank["cpus"]) == 1]
        if narrow:
            found[
                f"{len(narrow)} of {len(ranks)} ranks are bound to one CPU and compute with {max(narrow)} threads: let "
                "the launcher bind each to as many cores (python -m resnet_cpu.launch does)"
            ].append(host)
        elif threads > cores:
            found[
                f"{len(ranks)} rank{'s' * (len(ranks) != 1)} with {threads} threads on {cores} cores: they take turns, "
                "and all wait for the slowest. Start fewer ranks, or leave --threads out"
            ].append(host)
        other = [rank for rank in ranks if rank.get("omp", rank["threads"]) != rank["threads"]]
        if other:
            found[
                f"OMP_NUM_THREADS={other[0]['omp']}, TF_NUM_INTRAOP_THREADS={other[0]['threads']}: the extension's "
                "kernels use the former, TensorFlow's the latter. Unset what you export of them, or give --threads"
            ].append(host)
        online = ranks[0].get("host_cpus")
        if online and 2 * len(used) < online and not narrow:
            found[
                f"ranks may use {len(used)} of {online} CPUs: right if the host is shared, else the launcher binds "
                "each to too few cores"
            ].append(host)
    lines = [f"{_named(names)}: {what}" for what, names in found.items()]
    counts = collections.Counter(len(ranks) for ranks in hosts.values())
    if len(counts) > 1:
        told = ", ".join(f"{ranks} on {n} host{'s' * (n != 1)}" for ranks, n in sorted(counts.items()))
        lines.append(
            f"hosts have unequal numbers of ranks ({told}): all wait for the fullest host. Start as many on each"
        )
    speeds = sorted({min(row["threads"], row["cores"]) for row in rows})
    if len(speeds) > 1:
        lines.append(
            f"ranks compute with {speeds[0]} to {speeds[-1]} threads: all wait for the slowest. Give each as many cores"
        )
    return lines


def _by_host(rows: Sequence[Mapping[str, Any]]) -> Dict[str, List[Mapping[str, Any]]]:
    hosts: Dict[str, List[Mapping[str, Any]]] = {}
    for row in rows:
        hosts.setdefault(row["host"], []).append(row)
    return hosts


def _named(hosts: Sequence[str]) -> str:
    return hosts[0] if len(hosts) == 1 else f"{hosts[0]} and {len(hosts) - 1} more hosts"
