"""Build /proc and /sys of the machines in tests/machines/*.json, and the page on placements for them.

`python tests/machine_trees.py >docs/placements.md` writes the page.
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

from resnet_cpu.cluster import machine, placement  # noqa: E402
from resnet_cpu.cluster.machine import Machine  # noqa: E402

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
    """Return the content of tests/machines/NAME.json, on top of that of its base."""
    own = json.loads((HERE / "machines" / f"{name}.json").read_text())
    return {**described(own["base"]), **own} if "base" in own else own


def numbers(text: str) -> Set[int]:
    """Return the CPUs of a list such as `0-3,8-14:1/2` (8-14: every second one)."""
    found: Set[int] = set()
    for first, last, _, every in re.findall(r"(\d+)(?:-(\d+))?(?::(\d+)/(\d+))?", text):
        found.update(range(int(first), int(last or first) + 1, int(every or 1)))
    return found


def written(cpus: Set[int]) -> str:
    """Return the CPUs in the kernel's notation, which has ranges but no strides."""
    runs: List[Tuple[int, int]] = []
    for cpu in sorted(cpus):
        runs[-1:] = [(runs[-1][0], cpu)] if runs and runs[-1][1] == cpu - 1 else [*runs[-1:], (cpu, cpu)]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) + "\n"


def tree(about: Dict[str, Any], root: pathlib.Path) -> None:
    """Write the machine's /proc and /sys below `root`."""
    cores, threads = about["cores"], about["threads_per_core"]
    siblings = [{core + cores * i for i in range(threads)} for core in range(cores)]
    if "caches" in about:
        caches = [numbers(text) for text in about["caches"]]
    else:
        step = about["cores_per_cache"]
        caches = [set().union(*siblings[first : first + step]) for first in range(0, cores, step)]
    sockets = [numbers(text) for text in about["sockets"]]
    nodes = [(numbers(node["cpus"]), int(node["gib"] * 2**20)) for node in about["nodes"]]
    files = {
        "proc/meminfo": f"MemTotal: {int(about.get('gib', sum(kib for _, kib in nodes) / 2**20) * 2**20):>14} kB\n",
        "proc/cpuinfo": "\n".join(
            f"processor\t: {cpu}\nvendor_id\t: {about['vendor']}\nmodel name\t: {about['model']}\n"
            f"flags\t\t: {about['flags']}\npower management:\n"
            for cpu in range(cores * threads)
        ),
        "sys/devices/system/cpu/online": written(set(range(cores * threads))),
        "sys/devices/system/node/online": written(set(range(len(nodes)))),
        **about.get("files", {}),
    }
    for place, groups in (
        ("topology/thread_siblings_list", siblings),
        ("topology/core_siblings_list", sockets),
        (f"cache/index{about.get('cache_level', 3)}/shared_cpu_list", caches),
    ):
        for group in groups:
            text = written(group)
            files.update({f"sys/devices/system/cpu/cpu{cpu}/{place}": text for cpu in group})
    for i, (cpus, kib) in enumerate(nodes):
        files[f"sys/devices/system/node/node{i}/cpulist"] = written(cpus)
        files[f"sys/devices/system/node/node{i}/meminfo"] = f"Node {i} MemTotal:       {kib} kB\n"
        if about["distances"]:
            files[f"sys/devices/system/node/node{i}/distance"] = " ".join(map(str, about["distances"][i])) + "\n"
    for path, text in files.items():
        whole = root / path
        whole.parent.mkdir(parents=True, exist_ok=True)
        whole.write_text(text)


@functools.cache
def read(name: str) -> Machine:
    """Return the machine that the package reads from the files of tests/machines/NAME.json."""
    about = described(name)
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # a thousand small files
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        tree(about, pathlib.Path(folder))
        allowed: Optional[Set[int]] = numbers(about["affinity"]) if "affinity" in about else None
        return machine.read(folder, allowed)


def propose(name: str, several_hosts: bool, ranks: Optional[int] = None) -> placement.Placement:
    """Return the placement proposed for a machine that has the Intel extension and no tcmalloc."""
    return placement.propose(read(name), ranks, several_hosts, intel_openmp=True)


def page() -> str:
    """Return the text of docs/placements.md."""
    lines = [HEAD.strip(), ""]
    lines += [
        "| machine | cores of its NUMA domains | ranks per node | threads per rank in a cluster + cores reserved for "
        "communication | threads per rank on a single host | bfloat16 suggested |",
        "|---|---|---|---|---|---|",
    ]
    for name in NAMES:
        cluster, alone = propose(name, True), propose(name, False)
        bfloat16 = (
            "yes" if "bfloat16" in {choice.name: choice.value for choice in cluster.choices}["precision"] else "no"
        )
        lines.append(
            f"| {described(name)['title']} | {domains(read(name))} | {cluster.ranks_per_node} | "
            f"{cluster.threads} + {cluster.reserved} | {alone.threads} | {bfloat16} |"
        )
    lines += ["", RULES.strip(), "", "What `launch` prints on each machine, as a node of a cluster:"]
    for name in NAMES:
        about = described(name)
        lines += ["", f"## {about['title'][0].upper()}{about['title'][1:]}", ""]
        lines += ["| choice | value | reason |", "|---|---|---|"]
        for choice, value, reason in propose(name, True).choices:
            if choice not in SAME_EVERYWHERE:
                lines.append(f"| {choice} | {value.replace(' | ', ' / ')} | {reason} |")
        lines += ["", f"Source: {'; '.join(about['source'])}. Reconstructed: {about['reconstructed']}."]
    return "\n".join(lines) + "\n"


def domains(host: Machine) -> str:
    """Return the numbers of cores of the NUMA domains, such as `2 x 24`."""
    sizes: Dict[int, int] = {}
    for core in host.cores():
        sizes[core[0].node] = sizes.get(core[0].node, 0) + 1
    counts = sorted(sizes.values(), reverse=True)
    return " + ".join(f"{counts.count(size)} x {size}" for size in sorted(set(counts), reverse=True))


SAME_EVERYWHERE = ("OpenMP", "allocator")  # these choices do not depend on the machine
HEAD = """
# Placements

How `--ranks_per_node=auto` divides the cores of different machines among ranks, and why. `make docs` generates this
page from the machines described in `tests/machines/`, each with its sources; a test keeps the page and the code in
agreement.

These proposals follow rules. Only the 2-core VM has been measured. `python -m resnet_cpu.launch --tune` times several
numbers of ranks on your machine.
"""
RULES = """
The rules:

- **Ranks.** One per NUMA domain that has CPUs, so that a rank's memory is local. If domains have fewer than 8 cores or
  are very uneven: one per socket, else one per machine. A rank gets at most 40 cores; larger domains are divided among
  several ranks. Each rank needs 5.4 GB (ResNet-50, 224x224, batch 32), checked per domain and against a cgroup's
  limit. On two cores: two ranks of one core each (measured).
- **Threads.** One per physical core, the same number for all ranks, since all wait for the slowest. A cgroup's quota
  is respected.
- **Cores reserved for communication.** On several hosts a twelfth of a rank's cores, at most 2: the authors reserved 2
  of 24. For KNL, TACC recommends leaving 2 to 4 of 68 cores free and running at least 2 ranks per node
  ([Cornell's page](https://cvw.cac.cornell.edu/case-study-opt/context/architecture)). If no core is reserved, Open MPI
  yields the core while it waits.
- **Binding.** Each rank is bound to its cores and their hyper-threads. Within a quota ranks are not bound: a quota
  grants time, not particular CPUs.
- **Threads within a rank** are not pinned. `KMP_AFFINITY` pins the threads that enter a parallel region, and the
  threads that these start (TensorFlow's and tf.data's) inherit that one core: with it, 6 of 17 threads of a training
  process could use CPU 0 only (2-core VM). `HOROVOD_THREAD_AFFINITY` is not set either: a pinned thread cannot make way
  for threads that move. `KMP_BLOCKTIME=1` is set if the Intel extension, and with it Intel's OpenMP, is installed.
- **Allocator.** tcmalloc, if it is found.
- **Precision.** float32 is the default. bfloat16 is suggested if the processor has AMX.
"""


if __name__ == "__main__":
    print(page(), end="")
