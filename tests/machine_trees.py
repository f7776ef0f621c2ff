"""Machines as the kernel shows them: tests/machines/*.json as /proc and /sys, and the page on their layouts.

`python tests/machine_trees.py >docs/layouts.md` writes the page.
"""

import functools
import json
import os
import pathlib
import re
import sys
import tempfile
from typing import Any, Dict, List, Optional, Set, Tuple

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from resnet_cpu.cluster import machine as topology  # noqa: E402
from resnet_cpu.cluster import placement as layout  # noqa: E402

# The order of the page: clusters first.
NAMES = (
    "stampede2_skx",
    "aws_c5_18xlarge",
    "knl_quadrant_cache",
    "knl_snc4_flat",
    "spr_8480_snc4",
    "spr_8480_one_domain",
    "epyc_7763_nps4",
    "epyc_9654_nps1",
    "epyc_9654_nps4",
    "epyc_8434p_cache_as_numa",
    "vm_2_cores",
    "container_cpuset",
    "container_quota",
)


@functools.cache
def described(name: str) -> Dict[str, Any]:
    """Return what tests/machines/NAME.json says, on top of its base."""
    own = json.loads((HERE / "machines" / f"{name}.json").read_text())
    return {**described(own["base"]), **own} if "base" in own else own


def numbers(text: str) -> Set[int]:
    """Return the CPUs of a list such as `0-3,8-14:1/2` (of these every second one)."""
    found: Set[int] = set()
    for first, last, _, every in re.findall(r"(\d+)(?:-(\d+))?(?::(\d+)/(\d+))?", text):
        found.update(range(int(first), int(last or first) + 1, int(every or 1)))
    return found


def written(cpus: Set[int]) -> str:
    """Return the CPUs as the kernel lists them: runs, never strides."""
    runs: List[Tuple[int, int]] = []
    for cpu in sorted(cpus):
        runs[-1:] = [(runs[-1][0], cpu)] if runs and runs[-1][1] == cpu - 1 else [*runs[-1:], (cpu, cpu)]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) + "\n"


def tree(machine: Dict[str, Any], root: pathlib.Path) -> None:
    """Write the machine's /proc and /sys below `root`."""
    cores, threads = machine["cores"], machine["threads_per_core"]
    siblings = [{core + cores * i for i in range(threads)} for core in range(cores)]
    if "caches" in machine:
        caches = [numbers(text) for text in machine["caches"]]
    else:
        step = machine["cores_per_cache"]
        caches = [set().union(*siblings[first : first + step]) for first in range(0, cores, step)]
    sockets = [numbers(text) for text in machine["sockets"]]
    nodes = [(numbers(node["cpus"]), int(node["gib"] * 2**20)) for node in machine["nodes"]]
    files = {
        "proc/meminfo": f"MemTotal: {int(machine.get('gib', sum(kib for _, kib in nodes) / 2**20) * 2**20):>14} kB\n",
        "proc/cpuinfo": "\n".join(
            f"processor\t: {cpu}\nvendor_id\t: {machine['vendor']}\nmodel name\t: {machine['model']}\n"
            f"flags\t\t: {machine['flags']}\npower management:\n"
            for cpu in range(cores * threads)
        ),
        "sys/devices/system/cpu/online": written(set(range(cores * threads))),
        "sys/devices/system/node/online": written(set(range(len(nodes)))),
        **machine.get("files", {}),
    }
    for place, groups in (
        ("topology/thread_siblings_list", siblings),
        ("topology/core_siblings_list", sockets),
        (f"cache/index{machine.get('cache_level', 3)}/shared_cpu_list", caches),
    ):
        for group in groups:
            text = written(group)
            files.update({f"sys/devices/system/cpu/cpu{cpu}/{place}": text for cpu in group})
    for i, (cpus, kib) in enumerate(nodes):
        files[f"sys/devices/system/node/node{i}/cpulist"] = written(cpus)
        files[f"sys/devices/system/node/node{i}/meminfo"] = f"Node {i} MemTotal:       {kib} kB\n"
        if machine["distances"]:
            files[f"sys/devices/system/node/node{i}/distance"] = " ".join(map(str, machine["distances"][i])) + "\n"
    for path, text in files.items():
        whole = root / path
        whole.parent.mkdir(parents=True, exist_ok=True)
        whole.write_text(text)


@functools.cache
def read(name: str) -> topology.Topology:
    """Return what the package reads of a machine of tests/machines."""
    machine = described(name)
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # a thousand small files
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        tree(machine, pathlib.Path(folder))
        allowed: Optional[Set[int]] = numbers(machine["affinity"]) if "affinity" in machine else None
        return topology.read(folder, allowed)


def propose(name: str, several_hosts: bool, ranks: Optional[int] = None) -> layout.Layout:
    """Return the proposal for a machine that has the Intel extension and no tcmalloc."""
    return layout.propose(read(name), ranks, several_hosts, intel_openmp=True)


def page() -> str:
    """Return docs/layouts.md."""
    lines = [HEAD.strip(), ""]
    lines += [
        "| machine | cores of its NUMA domains | ranks a node | threads of a rank in a cluster, and cores left to "
        "communication | threads of a rank, one host | precision on offer |",
        "|---|---|---|---|---|---|",
    ]
    for name in NAMES:
        cluster, alone = propose(name, True), propose(name, False)
        lines.append(
            f"| {described(name)['title']} | {domains(read(name))} | {cluster.ranks_per_node} | "
            f"{cluster.threads} + {cluster.reserved} | {alone.threads} | {cluster.precision_offer} |"
        )
    lines += ["", RULES.strip(), "", "What `launch` says on each, as a node of a cluster:"]
    for name in NAMES:
        machine = described(name)
        lines += ["", f"## {machine['title'][0].upper()}{machine['title'][1:]}", ""]
        lines += ["| what | value | why |", "|---|---|---|"]
        for what, value, why in propose(name, True).choices:
            if what not in ALIKE:
                lines.append(f"| {what} | {value.replace(' | ', ' / ')} | {why} |")
        lines += ["", f"Source: {'; '.join(machine['source'])}. Reconstructed: {machine['reconstructed']}."]
    return "\n".join(lines) + "\n"


def domains(machine: topology.Topology) -> str:
    """Return how many cores each NUMA domain offers, such as `2 x 24`."""
    sizes: Dict[int, int] = {}
    for core in machine.cores():
        sizes[core[0].node] = sizes.get(core[0].node, 0) + 1
    counts = sorted(sizes.values(), reverse=True)
    return " + ".join(f"{counts.count(size)} x {size}" for size in sorted(set(counts), reverse=True))


ALIKE = ("OpenMP", "allocator")  # do not depend on the machine
HEAD = """
# Layouts

Where `--ranks_per_node=auto` puts ranks and threads on machines of several kinds, and why. `make docs` writes this page
from the machines described in `tests/machines/`, which name their sources; a test holds page and code together.

These are proposals by rule. Only the 2-core VM has been measured; on a machine of yours
`python -m resnet_cpu.launch --tune` times a few layouts.
"""
RULES = """
The rules:

- **Ranks.** One per NUMA domain that has CPUs: a rank's memory is then near. Where domains have fewer than 8 cores or
  are very uneven, one per socket, else one per machine. A rank has at most 40 cores: of larger domains several ranks
  share one. Each needs 5.4 GB (ResNet-50, 224x224, batch 32), counted per domain and against a cgroup's limit. On two
  cores two ranks of one core each: measured.
- **Threads.** One per physical core, the same number for all ranks, since all wait for the slowest. A cgroup's quota
  counts.
- **Cores left to communication.** On several hosts a twelfth of a rank's cores, at most 2: the authors kept 2 of 24.
  For KNL, TACC advises to leave 2 to 4 of 68 cores free and to run at least 2 ranks a node
  ([Cornell's page](https://cvw.cac.cornell.edu/case-study-opt/context/architecture)). Where none is left, Open MPI
  yields while it waits.
- **Binding.** Each rank to its cores and their hyper-threads. Within a quota to nothing: it grants time, not CPUs.
- **Threads within a rank** are not pinned. `KMP_AFFINITY` pins the threads that enter a parallel region, and
  TensorFlow's and tf.data's threads, which these start, inherit the one core: with it 6 of 17 threads of a training
  process had CPU 0 only (2-core VM). Among threads that may move, Horovod's may too: `HOROVOD_THREAD_AFFINITY` stays
  unset. `KMP_BLOCKTIME=1` is set where the Intel extension, and so Intel's OpenMP, is installed.
- **Allocator.** tcmalloc where it is found.
- **Precision.** bfloat16 is on offer where the processor has AMX. float32 stays the default.
"""


if __name__ == "__main__":
    print(page(), end="")
