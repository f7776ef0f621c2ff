"""Which layout is the fastest on hosts of this type: tried once by timing, remembered in a file of the user's.

The file is $XDG_CONFIG_HOME/resnet_cpu/layouts.json (~/.config/...), which a cluster's nodes share with the login node.
"""

import json
import os
import tempfile
from typing import Any, Dict, List, Mapping, Optional

from resnet_cpu.cluster.topology import Topology

_MOST_TRIED = 5


def file(environ: Mapping[str, str] = os.environ) -> str:
    """Return the path of what is remembered."""
    return os.path.join(environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config"), "resnet_cpu", "layouts.json")


def host_type(machine: Topology) -> str:
    """Return what hosts have in common for which one layout is the best: processor, domains, cores that may be used."""
    domains = len({core[0].node for core in machine.cores()})
    parts = [machine.model or "unknown", f"{machine.sockets} sockets", f"{domains} domains"]
    parts.append(f"{len(machine.cores())} cores")
    return ", ".join(parts if machine.quota is None else [*parts, f"quota {machine.quota:g}"])


def candidates(machine: Topology, proposed: int) -> List[int]:
    """Return the ranks a host that are worth timing, the proposal among them, at most five."""
    cores = machine.offered
    domains = len({core[0].node for core in machine.cores()})
    wanted = {1, machine.sockets, domains, 2 * domains, proposed, max(1, proposed // 2), 2 * proposed}
    near = sorted((n for n in wanted if 1 <= n <= cores), key=lambda n: (abs(n - proposed), n))
    return sorted(near[:_MOST_TRIED])


def remembered(machine: Topology, path: Optional[str] = None) -> Optional[int]:
    """Return the ranks a host that were the fastest here, None if nobody tried or the file cannot be read."""
    found = _read(path or file()).get(host_type(machine))
    ranks = found.get("ranks_per_node") if isinstance(found, dict) else None
    return ranks if isinstance(ranks, int) and 1 <= ranks <= machine.offered else None


def remember(machine: Topology, timed: Mapping[int, float], path: Optional[str] = None) -> int:
    """Keep the fastest of `timed` (ranks a host -> images/s of the host) for hosts of this type; return it."""
    path = path or file()
    best = max(timed, key=lambda ranks: timed[ranks])
    everything = _read(path)
    everything[host_type(machine)] = {
        "ranks_per_node": best,
        "images_per_second": {str(ranks): rate for ranks, rate in sorted(timed.items())},
    }
    os.makedirs(os.path.dirname(path), exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=os.path.dirname(path))
    with os.fdopen(handle, "w", encoding="utf-8") as out:
        json.dump(everything, out, indent=1, sort_keys=True)
    os.replace(temporary, path)
    return best


def _read(path: str) -> Dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as text:
            found = json.load(text)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
