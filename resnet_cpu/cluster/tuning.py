"""Find the fastest number of ranks for hosts of this type by timing, and remember it in a file of the user.

The file is $XDG_CONFIG_HOME/resnet_cpu/placements.json (~/.config/...), which the nodes of a cluster usually share with
its login node.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from typing import Any, Collection, Dict, List, Mapping, NoReturn, Optional, Sequence

from resnet_cpu.cluster import allocation, machine, placement
from resnet_cpu.cluster.machine import Machine
from resnet_cpu.errors import FlagError

_MAX_TRIED = 5
_TIMED = ["--dataset=synthetic", "--benchmark=synthetic", "--timed_steps=20"]
_TOTAL = "total images/sec: "
_END_S = 30.0  # time for a launcher to end its ranks
_CONTRADICTS = ("ranks", "ranks_per_node", "threads", "hosts", "interface", "dry_run")


class Failed(Exception):
    """A number of ranks could not be timed; the message says why."""


def tune(mpi: str, benchmark_flags: Sequence[str], given: Collection[str]) -> None:
    """Time training with several numbers of ranks on this host; remember the fastest and print it.

    `benchmark_flags` are passed to `python -m resnet_cpu.benchmark`. `given` are the names of the flags on the command
    line. Raises FlagError if one of them contradicts --tune, or if nothing could be timed.
    """
    for name in _CONTRADICTS:
        if name in given:
            raise FlagError(
                f"--{name}: cannot be combined with --tune, which tries numbers of ranks on this host; remove it"
            )
    host = machine.read()
    counts = candidates(host, placement.suitable_ranks(host))
    print(f"launch: timing {counts} ranks on this host, about a minute and a half each", file=sys.stderr, flush=True)
    timed: Dict[int, float] = {}
    for ranks in counts:
        try:
            timed[ranks] = images_per_second(ranks, mpi, benchmark_flags)
            outcome = f"{timed[ranks]:.2f} images/s"
        except Failed as error:
            outcome = str(error)
        print(f"launch: {ranks} ranks: {outcome}", file=sys.stderr, flush=True)
    if not timed:
        raise FlagError("--tune: no number of ranks could be timed; the lines above say why")
    best = remember(host, timed)
    print(f"launch: remembered in {file()}: {host_type(host)}: {best} ranks per host", file=sys.stderr)
    print(best)


def file(environ: Mapping[str, str] = os.environ) -> str:
    """Return the path of the file that keeps the results."""
    folder = environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return os.path.join(folder, "resnet_cpu", "placements.json")


def host_type(host: Machine) -> str:
    """Return the properties for which one number of ranks is the fastest: processor, domains, permitted cores."""
    domains = len({core[0].node for core in host.cores()})
    parts = [host.model or "unknown", f"{host.sockets} sockets", f"{domains} domains"]
    parts.append(f"{len(host.cores())} cores")
    return ", ".join(parts if host.quota is None else [*parts, f"quota {host.quota:g}"])


def candidates(host: Machine, proposed: int) -> List[int]:
    """Return at most five numbers of ranks per host that are worth timing, `proposed` among them."""
    domains = len({core[0].node for core in host.cores()})
    wanted = {1, host.sockets, domains, 2 * domains, proposed, max(1, proposed // 2), 2 * proposed}
    near = sorted((n for n in wanted if 1 <= n <= host.offered), key=lambda n: (abs(n - proposed), n))
    return sorted(near[:_MAX_TRIED])


def images_per_second(ranks: int, mpi: str, benchmark_flags: Sequence[str]) -> float:
    """Return the images/s of training on this host with `ranks` ranks; raise Failed if they do not train.

    The ranks are started like those of any job, but outside the batch job that this may be. They end with this
    process.
    """
    launch = [sys.executable, "-m", "resnet_cpu.launch", f"--mpi={mpi}", f"--ranks_per_node={ranks}"]
    work = [sys.executable, "-m", "resnet_cpu.benchmark", *_TIMED, *benchmark_flags]
    for signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        if signal.getsignal(signum) is not signal.SIG_IGN:  # as under nohup
            signal.signal(signum, _exit)
    process = subprocess.Popen(
        [*launch, "--", *work],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=allocation.without(os.environ),
    )
    try:
        out, err = process.communicate()
    finally:
        if process.poll() is None:  # a signal ends this process: end the ranks first
            process.terminate()
            try:
                process.communicate(timeout=_END_S)
            except subprocess.TimeoutExpired:
                process.kill()
    last = (out.strip().splitlines() or [""])[-1]
    if process.returncode or not last.startswith(_TOTAL):
        reason = (err.strip().splitlines() or ["no message"])[-1]
        raise Failed(f"failed with exit code {process.returncode}: {reason}")
    return float(last[len(_TOTAL) :])


def _exit(signum: int, frame: object) -> NoReturn:
    sys.exit(128 + signum)


def remembered(host: Machine, path: Optional[str] = None) -> Optional[int]:
    """Return the ranks per host that were the fastest on hosts of this type, or None if that is not known."""
    found = _read(path or file()).get(host_type(host))
    ranks = found.get("ranks_per_node") if isinstance(found, dict) else None
    return ranks if isinstance(ranks, int) and 1 <= ranks <= host.offered else None


def remember(host: Machine, timed: Mapping[int, float], path: Optional[str] = None) -> int:
    """Record the fastest of `timed` (ranks per host -> images/s of the host) for hosts of this type, and return it."""
    path = path or file()
    best = max(timed, key=lambda ranks: timed[ranks])
    records = _read(path)
    records[host_type(host)] = {
        "ranks_per_node": best,
        "images_per_second": {str(ranks): rate for ranks, rate in sorted(timed.items())},
    }
    os.makedirs(os.path.dirname(path), exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=os.path.dirname(path))
    with os.fdopen(handle, "w", encoding="utf-8") as out:
        json.dump(records, out, indent=1, sort_keys=True)
    os.replace(temporary, path)
    return best


def _read(path: str) -> Dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as text:
            found = json.load(text)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
