"""Which layout is the fastest on hosts of this type: tried once by timing, remembered in a file of the user's.

The file is $XDG_CONFIG_HOME/resnet_cpu/layouts.json (~/.config/...), which a cluster's nodes share with the login node.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from typing import Any, Dict, List, Mapping, NoReturn, Optional, Sequence

from resnet_cpu.cluster.machine import Topology

_MOST_TRIED = 5
_TIMED = ["--dataset=synthetic", "--benchmark=synthetic", "--timed_steps=1000", "--timed_seconds=40"]
_TOTAL = "total images/sec: "
_ENDING_S = 30.0  # what a launcher is given to end its ranks


class Failed(Exception):
    """A layout that could not be timed; says why."""


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


def images_per_second(ranks: int, mpi: str, benchmark_flags: Sequence[str]) -> float:
    """Return the images/s of training on this host with so many ranks, timed for 40 s; raise Failed otherwise.

    Ranks are started as any job's are, outside the batch job that this may be. They end with this process.
    """
    launch = [sys.executable, "-m", "resnet_cpu.launch", f"--mpi={mpi}", f"--ranks_per_node={ranks}"]
    work = [sys.executable, "-m", "resnet_cpu.benchmark", *_TIMED, *benchmark_flags]
    outside = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    process = subprocess.Popen(
        [*launch, "--", *work], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=outside
    )

    def end(signum: int, frame: object) -> NoReturn:
        sys.exit(128 + signum)

    ending = [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1]
    before = {signum: signal.getsignal(signum) for signum in ending}
    for signum, handler in before.items():
        if handler is not signal.SIG_IGN:  # as under nohup
            signal.signal(signum, end)
    try:
        out, err = process.communicate()
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.communicate(timeout=_ENDING_S)
            except subprocess.TimeoutExpired:
                process.kill()
        for signum, handler in before.items():
            signal.signal(signum, handler)
    last = (out.strip().splitlines() or [""])[-1]
    if process.returncode or not last.startswith(_TOTAL):
        told = (err.strip().splitlines() or ["nothing was said"])[-1]
        raise Failed(f"failed with {process.returncode}: {told}")
    return float(last[len(_TOTAL) :])


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
