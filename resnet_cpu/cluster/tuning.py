"""Find the fastest number of ranks for hosts of this type by timing, and remember it in placements.json."""

import os
import signal
import subprocess
import sys
from typing import Collection, Dict, List, Mapping, NoReturn, Optional, Sequence

from resnet_cpu.cluster import allocation, machine, placement, precision, remembered
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
    best = _fastest_of(timed)
    print(best, flush=True)  # first: it took minutes
    print(f"launch: {_remembered(host, timed)}", file=sys.stderr, flush=True)
    if precision.has_units(host.instruction_sets):
        advice = precision.advice(host.instruction_sets, precision.measure(host, placement.has_intel_openmp()))
        print(f"launch: precision: {': '.join(advice)}", file=sys.stderr)


def _remembered(host: Machine, timed: Mapping[int, float]) -> str:
    """Remember the fastest, and return a line about it for people."""
    best = _fastest_of(timed)
    try:
        remember(host, timed)
    except OSError as error:
        return (
            f"warning: {file()}: {error.strerror}: {best} ranks per host are not remembered; give "
            f"--ranks_per_node={best}, or set XDG_CONFIG_HOME to a folder that can be written"
        )
    return f"remembered in {file()}: {remembered.host_type(host)}: {best} ranks per host"


def file() -> str:
    """Return the path of the file that keeps the results."""
    return remembered.file("placements")


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
        errors="replace",  # hosts and libraries may print in another encoding
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


def fastest(host: Machine, path: Optional[str] = None) -> Optional[int]:
    """Return the ranks per host that were the fastest on hosts of this type, or None if that is not known."""
    found = remembered.read(path or file()).get(remembered.host_type(host))
    ranks = found.get("ranks_per_node") if isinstance(found, dict) else None
    return ranks if isinstance(ranks, int) and 1 <= ranks <= host.offered else None


def _fastest_of(timed: Mapping[int, float]) -> int:
    return max(timed, key=lambda ranks: timed[ranks])


def remember(host: Machine, timed: Mapping[int, float], path: Optional[str] = None) -> None:
    """Record the fastest of `timed` (ranks per host -> images/s of the host) for hosts of this type."""
    rates = {str(ranks): rate for ranks, rate in sorted(timed.items())}
    record = {"ranks_per_node": _fastest_of(timed), "images_per_second": rates}
    remembered.add(path or file(), remembered.host_type(host), record)
