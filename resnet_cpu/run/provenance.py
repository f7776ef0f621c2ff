"""Provenance: the versions, machine and code that a result depends on.

Environment variables are recorded from an allow-list only.
"""

import functools
import hashlib
import os
import platform
import resource
import socket
import sys
from typing import Any, Dict, List, Optional

from resnet_cpu.cluster import machine
from resnet_cpu.cluster.environment import Environment, version

_PACKAGES = ("tensorflow", "intel-extension-for-tensorflow", "horovod", "mpi4py", "numpy", "keras", "tf_keras")
_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def of_job() -> Dict[str, Any]:
    """Return the part that all ranks share."""
    return {"versions": versions(), "python": sys.version.split()[0], "code": code_digest(), "git": git_id()}


def of_rank(found: Environment) -> Dict[str, Any]:
    """Return host, processor and cores of this rank, and what other programs set for it."""
    here = machine.read()
    return {
        "host": socket.gethostname(),
        "cpu": here.model or platform.machine(),
        "instruction_sets": list(here.instruction_sets),
        "topology": {
            "sockets": here.sockets,
            "numa_domains": sum(bool(node.cpus) for node in here.nodes),
            "threads_per_core": max(len(cpu.siblings) for cpu in here.cpus),
            "quota": here.quota,
        },
        "cores": sorted(os.sched_getaffinity(0)),
        "host_cores": os.cpu_count(),
        "memory_gib": round(here.memory_bytes / 2**30, 1),
        "environment": found.variables,
        "environment_ignored": found.ignored,
        "mpi_parameters": found.mpi_parameters,
    }


def versions() -> Dict[str, Optional[str]]:
    """Return the versions of the packages that affect speed and results, None for one that is not installed."""
    return {name: version(name) for name in _PACKAGES}


@functools.cache
def code_digest() -> str:
    """Return a digest of this package's sources."""
    digest = hashlib.sha256()
    package = os.path.join(_ROOT, "resnet_cpu")
    for folder, folders, names in os.walk(package):
        folders.sort()
        for name in sorted(names):
            if name.endswith((".py", ".cc", ".h")):
                with open(os.path.join(folder, name), "rb") as file:
                    digest.update(name.encode() + b"\0" + file.read())
    return digest.hexdigest()[:12]


def git_id() -> Optional[str]:
    """Return the commit that is checked out, None outside a checkout.

    It is read from files, since forking git is not safe under MPI.
    """
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
    """Return the instruction sets of this processor that affect which kernels run, as Linux names them."""
    return machine.processor()[1]


def peak_memory_gib() -> float:
    """Return the peak memory of this process, GiB."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)
