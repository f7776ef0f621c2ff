"""What a result depends on: versions, machine, code. Collected from an allow-list; no environment is dumped."""

import functools
import hashlib
import os
import platform
import resource
import socket
import sys
from importlib import metadata
from typing import Any, Dict, List, Optional

import psutil

from resnet_cpu.cluster import machine as topology

_PACKAGES = ("tensorflow", "intel-extension-for-tensorflow", "horovod", "mpi4py", "numpy", "keras")
_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def of_job() -> Dict[str, Any]:
    """Return what all ranks share."""
    return {"versions": versions(), "python": sys.version.split()[0], "code": code_digest(), "git": git_id()}


def of_rank(threads: Dict[str, str]) -> Dict[str, Any]:
    """Return where this rank sits; `threads` is the environment that the layout set."""
    machine = topology.read()
    return {
        "host": socket.gethostname(),
        "cpu": machine.model or platform.machine(),
        "instruction_sets": list(machine.instruction_sets),
        "topology": {
            "sockets": machine.sockets,
            "numa_domains": sum(bool(node.cpus) for node in machine.nodes),
            "threads_per_core": max(len(cpu.siblings) for cpu in machine.cpus),
            "quota": machine.quota,
        },
        "cores": sorted(os.sched_getaffinity(0)),
        "host_cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "environment": threads,
    }


def versions() -> Dict[str, Optional[str]]:
    """Return the versions of the packages that decide speed and results, None where one is not installed."""
    found: Dict[str, Optional[str]] = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


@functools.cache
def code_digest() -> str:
    """Return a digest of this package's sources."""
    digest = hashlib.sha256()
    package = os.path.join(_ROOT, "resnet_cpu")
    for folder, folders, names in os.walk(package):
        folders.sort()
        for name in sorted(names):
            if name.endswith(".py"):
                with open(os.path.join(folder, name), "rb") as file:
                    digest.update(name.encode() + b"\0" + file.read())
    return digest.hexdigest()[:12]


def git_id() -> Optional[str]:
    """Return the commit that is checked out, None outside a checkout; read from files, since MPI forbids a fork."""
    git = os.path.join(_ROOT, ".git")
    try:
        with open(os.path.join(git, "HEAD"), encoding="ascii") as file:
            head = file.read().strip()
        if not head.startswith("ref: "):
            return head
        reference = head[len("ref: ") :]
        loose = os.path.join(git, reference)
        if os.path.exists(loose):
            with open(loose, encoding="ascii") as file:
                return file.read().strip()
        with open(os.path.join(git, "packed-refs"), encoding="ascii") as file:
            for line in file:
                if line.rstrip().endswith(" " + reference):
                    return line.split()[0]
    except OSError:
        pass
    return None


def instruction_sets() -> List[str]:
    """Return those of this processor that decide which kernels run, as the kernel names them."""
    return topology.processor()[1]


def peak_memory_gib() -> float:
    """Return the most memory this process has held, GiB."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)
