"""Starting ranks: what is looked at before, so that nothing waits for what is not there; what is told at the end."""

import concurrent.futures
import os
import shutil
import signal
import subprocess
import sys
from typing import List, NoReturn, Optional, Sequence

from resnet_cpu.errors import FlagError, OutputError, PeerLost

_ANSWER_S = 20.0  # what a host is given to answer before it counts as gone
_LOST_HOST = (205, 255)  # how mpirun ends then: its daemon does not answer, or what started it ended
_SHM = "/dev/shm"
_SHM_PER_RANK = 8 * 2**20  # bytes; Open MPI keeps 4 MiB a rank there


def check_programs(*programs: str) -> None:
    """Raise FlagError for a program that PATH does not have."""
    for program in programs:
        if shutil.which(program) is None:
            raise FlagError(f"{program}: no such program in PATH; load its module, or activate the environment")


def check_shared_memory(ranks: int, path: str = _SHM) -> None:
    """Raise OutputError where the ranks of this host could not exchange messages: MPI would end with a bus error."""
    try:
        free = os.statvfs(path).f_bavail * os.statvfs(path).f_frsize
    except OSError:
        return
    if free < ranks * _SHM_PER_RANK:
        raise OutputError(_too_full(path, free, ranks))


def check_hosts(hosts: Sequence[str], ranks: int, agent: Optional[str]) -> None:
    """Look at all hosts at once, which get `ranks` ranks each.

    Raises PeerLost naming every host that does not run a command within 20 s, since mpirun would wait for it, and
    OutputError naming those without room for messages between their ranks.
    """
    if not hosts:
        return
    start = [agent] if agent else ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={_ANSWER_S / 2:.0f}"]
    check_programs(start[0])
    silent: List[str] = []
    full: List[str] = []

    def ask(host: str) -> None:
        try:
            answer = subprocess.run(
                [*start, host, f"df -Pk {_SHM}; true"],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_ANSWER_S,
            )
        except subprocess.TimeoutExpired:
            silent.append(f"{host} (no answer in {_ANSWER_S:.0f} s)")
            return
        if answer.returncode:
            told = (answer.stderr.strip().splitlines() or [f"exit code {answer.returncode}"])[-1]
            silent.append(f"{host} ({told})")
            return
        free = _available(answer.stdout)
        if free is not None and free < ranks * _SHM_PER_RANK:
            full.append(_too_full(f"{host}:{_SHM}", free, ranks))

    with concurrent.futures.ThreadPoolExecutor(min(64, len(hosts))) as pool:
        list(pool.map(ask, hosts))
    if silent:
        raise PeerLost(
            f"hosts that do not answer: {', '.join(sorted(silent))}; leave them out of --hosts, or mend {start[0]}"
        )
    if full:
        raise OutputError("; ".join(sorted(full)))


def _available(answer: str) -> Optional[int]:
    """Return the free bytes that `df -Pk` tells in its last line, None where it tells none."""
    words = (answer.strip().splitlines() or [""])[-1].split()
    return int(words[3]) * 1024 if len(words) >= 6 and words[3].isdigit() else None


def _too_full(where: str, free: int, ranks: int) -> str:
    return (
        f"{where}: {free / 2**20:.0f} MiB free, {ranks} ranks need {ranks * _SHM_PER_RANK / 2**20:.0f}; remove what "
        "dead jobs left there"
    )


def follow(line: Sequence[str]) -> NoReturn:
    """Run Open MPI over several hosts, handing signals on; end as it ends, but tell what it does not: a lost host."""
    process: Optional[subprocess.Popen] = None
    early: List[int] = []  # signals that came while it was being started

    def hand_on(signum: int, frame: object) -> None:
        if process is None:
            early.append(signum)
        else:
            process.send_signal(signum)

    for signum in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signum) is not signal.SIG_IGN:  # as under nohup
            signal.signal(signum, hand_on)
    signal.signal(signal.SIGINT, lambda signum, frame: None)  # a terminal sends that to both
    process = subprocess.Popen(line)
    for came in early:
        process.send_signal(came)
    code = process.wait()
    if code in _LOST_HOST:
        raise PeerLost(
            f"a host was lost, or could not be started (mpirun ended with {code}); start again without it: a run goes "
            "on"
        )
    sys.exit(code if code >= 0 else 128 - code)
