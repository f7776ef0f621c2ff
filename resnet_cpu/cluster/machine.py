"""Read what the kernel reports about this machine: cores, sockets, NUMA nodes, limits and instruction sets.

Nothing else in the package reads /proc and /sys for this. No file is required: without them the machine has one socket
and one NUMA node, and each logical CPU is its own core.
"""

import dataclasses
import os
import re
from typing import Dict, FrozenSet, Iterable, List, Optional, Sequence, Set, Tuple

# The instruction sets that decide which kernels oneDNN uses, by their names in the flags of /proc/cpuinfo.
_INSTRUCTION_SETS = (
    "avx2",
    "avx512f",
    "avx512bw",  # missing on Knights Landing; oneDNN's AVX-512 kernels need it
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
)
_LEAST_CHANNELS = 8  # of a layer that the Intel extension's AVX2 kernels can train
_CPUS = "sys/devices/system/cpu"
_NODES = "sys/devices/system/node"
_MAX_CPUS = 2**16  # above the kernel's own limit of 8,192; a damaged list must not fill the memory
_UNLIMITED_BYTES = 2**60  # without a limit, cgroup v1 reports 2^63 minus one page


@dataclasses.dataclass(frozen=True)
class Cpu:
    """A logical CPU."""

    id: int
    core: int  # the lowest of its `siblings`
    socket: int  # 0, 1, ... in the order of their first CPUs
    node: int
    cache: int  # the lowest CPU that shares its last-level cache
    siblings: Tuple[int, ...]  # all hyper-threads of its core, including itself


@dataclasses.dataclass(frozen=True)
class Node:
    """A NUMA node. One without `cpus` has only memory, like MCDRAM in flat mode."""

    id: int
    cpus: Tuple[int, ...]
    memory_bytes: int  # 0: unknown


@dataclasses.dataclass(frozen=True)
class Machine:
    """A machine and the part of it that this process may use."""

    model: str
    instruction_sets: Tuple[str, ...]
    cpus: Tuple[Cpu, ...]  # those online, by id
    nodes: Tuple[Node, ...]
    allowed: Tuple[int, ...]  # ids of the CPUs that affinity and cpuset permit, never empty
    quota: Optional[float] = None  # CPU seconds per second that a cgroup grants, None: no limit
    memory_bytes: int = 0  # of the machine, or the limit of its cgroup if smaller; 0: unknown
    root: str = "/"
    restricted: bool = False  # the affinity mask leaves out cores that the cgroup permits

    @property
    def sockets(self) -> int:
        """Return the number of sockets that have CPUs."""
        return len({cpu.socket for cpu in self.cpus})

    @property
    def offered(self) -> int:
        """Return the number of cores to compute on: the allowed ones, or fewer if a cgroup limits their time."""
        cores = len(self.cores())
        return cores if self.quota is None else max(1, min(cores, int(self.quota)))

    def cores(self) -> Tuple[Tuple[Cpu, ...], ...]:
        """Return the allowed CPUs of each core, the cores ordered by socket, NUMA node and shared cache."""
        grouped: Dict[int, List[Cpu]] = {}
        permitted = set(self.allowed)
        for cpu in self.cpus:
            if cpu.id in permitted:
                grouped.setdefault(cpu.core, []).append(cpu)
        return tuple(
            tuple(cpus)
            for cpus in sorted(grouped.values(), key=lambda c: (c[0].socket, c[0].node, c[0].cache, c[0].core))
        )


def read(root: str = "/", allowed: Optional[Iterable[int]] = None) -> Machine:
    """Return the machine whose /proc and /sys lie below `root`, and the part of it that a process may use.

    `allowed` are the ids of the logical CPUs it may run on: by default the affinity mask of this process or, below
    another root, the cpuset of the cgroup.
    """
    about = _first_processor(root)
    flags = set(about.get("flags", "").split())
    cgroup = _Cgroup(root)
    if allowed is None:
        allowed = os.sched_getaffinity(0) if root == "/" else cgroup.cpuset()
    wanted = set(allowed)
    online = cpu_list(_text(root, f"{_CPUS}/online")) or _processors(root) or wanted or {0}
    usable = (wanted & online) or wanted or online
    known = online | usable
    nodes = _nodes(root, known)
    cpus = _cpus(root, known, nodes)
    permitted = (cgroup.cpuset() & online) or online
    machine = _meminfo(_text(root, "proc/meminfo"))
    limits = [limit for limit in (machine, cgroup.memory_bytes()) if limit]
    return Machine(
        model=about.get("model name", ""),
        instruction_sets=tuple(name for name in _INSTRUCTION_SETS if name in flags),
        cpus=cpus,
        nodes=nodes,
        allowed=tuple(sorted(usable)),
        quota=cgroup.quota(),
        memory_bytes=min(limits, default=0),
        root=root,
        # By cores: a job without hyper-threads may use one of the CPUs of each core.
        restricted=not _cores_of(permitted, cpus) <= _cores_of(usable, cpus),
    )


def _cores_of(ids: Iterable[int], cpus: Sequence[Cpu]) -> Set[int]:
    wanted = set(ids)
    return {cpu.core for cpu in cpus if cpu.id in wanted}


def physical_cores(logical: Iterable[int], root: str = "/") -> int:
    """Return the number of physical cores that the logical CPUs belong to; hyper-threads of one core count once."""
    left, cores = set(logical), 0
    while left:
        cpu = min(left)
        left -= _siblings(root, cpu)
        cores += 1
    return cores


def quota(root: str = "/") -> Optional[float]:
    """Return the CPU seconds per second that the cgroup of this process grants, or None if it sets no limit."""
    return _Cgroup(root).quota()


def processor(root: str = "/") -> Tuple[str, List[str]]:
    """Return the processor's name (empty if the kernel reports none) and its instruction sets that matter here."""
    about = _first_processor(root)
    present = about.get("flags", "").split()
    return about.get("model name", ""), [name for name in _INSTRUCTION_SETS if name in present]


def precision_problem(precision: str, instruction_sets: Sequence[str], intel_extension: bool) -> Optional[str]:
    """Return why a network of this precision cannot be computed on this processor, None if it can.

    Seen with intel-extension-for-tensorflow 2.15.0.0 on a processor without AVX-512: its convolution in bfloat16 has no
    kernel there, and the process aborts ("dnnl::error: object is not initialized").
    """
    if precision != "bfloat16" or not intel_extension or _has_avx512_kernels(instruction_sets):
        return None
    return "the Intel extension needs AVX-512 for it, which this processor does not have"


def narrow_layers_problem(channels: int, instruction_sets: Sequence[str]) -> Optional[str]:
    """Return why layers of `channels` channels need the kernels of an older processor, None if they do not.

    Seen with TensorFlow 2.21 and with intel-extension-for-tensorflow 2.15.0.0 on a processor without AVX-512: networks
    with layers of 3 to 6 channels crashed or hung, or gave other losses in each run; with 8 and more, or with oneDNN's
    kernels for SSE4.1, each run gave the same bits.
    """
    if channels >= _LEAST_CHANNELS or _has_avx512_kernels(instruction_sets):
        return None
    return (
        f"layers of {channels} channels: with fewer than {_LEAST_CHANNELS}, oneDNN's kernels for AVX2 corrupt memory; "
        "the slower ones for SSE4.1 are used (BUILD_NOTES.md)"
    )


def _has_avx512_kernels(instruction_sets: Sequence[str]) -> bool:
    """Return whether oneDNN computes with AVX-512 here: its kernels need the part BW."""
    return "avx512bw" in instruction_sets


def cpu_list(text: str) -> Set[int]:
    """Return the numbers in the kernel's list notation, such as `0-3,8`, ignoring parts that are not numbers."""
    numbers: Set[int] = set()
    for part in text.strip().split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+)(?::(\d+)/(\d+))?)?\s*", part)
        if match:
            first, last = int(match[1]), int(match[2] or match[1])
            used, group = int(match[3] or 1), int(match[4] or 1)
            if last < _MAX_CPUS:
                numbers.update(n for n in range(first, last + 1) if (n - first) % max(1, group) < used)
    return numbers


def spans(numbers: Iterable[int]) -> str:
    """Return `numbers` in the kernel's list notation, such as `0-3,8`, or `0-46:2` if they have a stride."""
    ordered = sorted(set(numbers))
    if len(ordered) > 2 and ordered[1] - ordered[0] > 1:
        step = ordered[1] - ordered[0]
        if all(after - before == step for before, after in zip(ordered, ordered[1:])):
            return f"{ordered[0]}-{ordered[-1]}:{step}"
    parts: List[List[int]] = []
    for number in ordered:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def _text(root: str, path: str) -> str:
    """Return the text of a small file, or an empty string if it cannot be read."""
    try:
        with open(os.path.join(root, path), encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def _number(text: str, default: int) -> int:
    try:
        return int(text.strip())
    except ValueError:
        return default


def _first_processor(root: str) -> Dict[str, str]:
    """Return the entry of the first processor in /proc/cpuinfo; reading all of it is slow on many cores."""
    found: Dict[str, str] = {}
    try:
        with open(os.path.join(root, "proc/cpuinfo"), encoding="utf-8", errors="replace") as file:
            for line in file:
                key, colon, value = line.partition(":")
                if not colon and found:
                    break
                found.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    return found


def _processors(root: str) -> Set[int]:
    return {int(n) for n in re.findall(r"^processor\s*:\s*(\d+)", _text(root, "proc/cpuinfo"), re.MULTILINE)}


def _siblings(root: str, cpu: int) -> Set[int]:
    return cpu_list(_text(root, f"{_CPUS}/cpu{cpu}/topology/thread_siblings_list")) | {cpu}


def _groups(root: str, known: Set[int], paths: Sequence[str]) -> Dict[int, Tuple[int, ...]]:
    """Return for each CPU the CPUs of its group, from the first of `paths` that lists it.

    Reads one file per group, not per CPU: three files for each of 256 CPUs would take tens of milliseconds.
    """
    found: Dict[int, Tuple[int, ...]] = {}
    for cpu in sorted(known):
        if cpu in found:
            continue
        lists = (cpu_list(_text(root, f"{_CPUS}/cpu{cpu}/{path}")) for path in paths)
        together = next((group for group in lists if cpu in group), {cpu})
        members = tuple(sorted(other for other in together & known if other not in found))
        for member in members:
            found[member] = members
    return found


def _nodes(root: str, known: Set[int]) -> Tuple[Node, ...]:
    ids = sorted(cpu_list(_text(root, f"{_NODES}/online")))
    left, nodes = set(known), []
    for node in ids:
        folder = f"{_NODES}/node{node}"
        mine = cpu_list(_text(root, f"{folder}/cpulist")) & left
        left -= mine
        nodes.append(Node(node, tuple(sorted(mine)), _meminfo(_text(root, f"{folder}/meminfo"))))
    if left:  # no node lists them
        where = next((i for i, node in enumerate(nodes) if node.cpus), 0)
        if not nodes:
            nodes = [Node(0, (), _meminfo(_text(root, "proc/meminfo")))]
        nodes[where] = dataclasses.replace(nodes[where], cpus=tuple(sorted(left | set(nodes[where].cpus))))
    return tuple(nodes)


def _meminfo(text: str) -> int:
    match = re.search(r"MemTotal:\s*(\d+)\s*kB", text)
    return int(match[1]) * 1024 if match else 0


def _cpus(root: str, known: Set[int], nodes: Sequence[Node]) -> Tuple[Cpu, ...]:
    cores = _groups(root, known, ("topology/thread_siblings_list", "topology/core_cpus_list"))
    packages = _groups(root, known, ("topology/core_siblings_list", "topology/package_cpus_list"))
    caches = _groups(root, known, ("cache/index3/shared_cpu_list", "cache/index2/shared_cpu_list"))
    node_of = {cpu: node.id for node in nodes for cpu in node.cpus}
    if all(len(group) == 1 for group in packages.values()):
        packages = {cpu: tuple(sorted(known)) for cpu in known}  # nothing is known about sockets: assume one
    sockets = {first: i for i, first in enumerate(sorted({group[0] for group in packages.values()}))}
    return tuple(
        Cpu(cpu, cores[cpu][0], sockets[packages[cpu][0]], node_of[cpu], caches[cpu][0], cores[cpu])
        for cpu in sorted(known)
    )


class _Cgroup:
    """The limits of this process's control groups, versions 1 and 2, including those of their parents."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.folders: Dict[str, List[str]] = {}  # controller ("" for version 2) -> folders, innermost first
        for line in _text(root, "proc/self/cgroup").splitlines():
            number, _, rest = line.partition(":")
            controllers, _, path = rest.partition(":")
            if number == "0" and not controllers:
                self.folders[""] = _levels(path, ("sys/fs/cgroup", "sys/fs/cgroup/unified"))
            for controller in filter(None, controllers.split(",")):
                mounts = (f"sys/fs/cgroup/{controllers}", f"sys/fs/cgroup/{controller}")
                self.folders[controller] = _levels(path, dict.fromkeys(mounts))

    def _values(self, controller: str, name: str) -> List[str]:
        found = (_text(self.root, f"{folder}/{name}").strip() for folder in self.folders.get(controller, []))
        return [text for text in found if text]

    def quota(self) -> Optional[float]:
        """Return the granted CPU seconds per second, or None without a limit."""
        shares = []
        for text in self._values("", "cpu.max"):
            words = text.split()
            granted, period = _number(words[0], 0), _number(words[-1], 100000)
            if granted > 0 and period > 0:
                shares.append(granted / period)
        for folder in self.folders.get("cpu", []):
            granted = _number(_text(self.root, f"{folder}/cpu.cfs_quota_us"), 0)
            period = _number(_text(self.root, f"{folder}/cpu.cfs_period_us"), 100000)
            if granted > 0 and period > 0:
                shares.append(granted / period)
        return min(shares, default=None)

    def cpuset(self) -> FrozenSet[int]:
        """Return the CPUs of the innermost cpuset that lists any; empty without a limit."""
        names = (("", "cpuset.cpus.effective"), ("cpuset", "cpuset.effective_cpus"), ("cpuset", "cpuset.cpus"))
        for controller, name in names:
            for text in self._values(controller, name):
                return frozenset(cpu_list(text))
        return frozenset()

    def memory_bytes(self) -> int:
        """Return the memory limit, or 0 without one."""
        limits = [
            _number(text, 0)
            for text in self._values("", "memory.max") + self._values("memory", "memory.limit_in_bytes")
        ]
        return min((limit for limit in limits if 0 < limit < _UNLIMITED_BYTES), default=0)


def _levels(path: str, mounts: Iterable[str]) -> List[str]:
    """Return the folders of a control group and its parents below each mount, innermost first.

    In a container the path may be that of the host, of which only the mount point is visible.
    """
    parts = [part for part in path.split("/") if part]
    if ".." in parts:
        parts = []
    return ["/".join([mount, *parts[:depth]]) for depth in range(len(parts), -1, -1) for mount in mounts]
