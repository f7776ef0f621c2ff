"""Check a job's hosts before its ranks are started, so that no launcher waits for one that is missing; run mpirun.

`follow` runs mpirun over several hosts and reports a lost host with an exit code of its own.
"""

import concurrent.futures
import os
import shutil
import signal
import socket
import subprocess
import sys
from typing import Any, List, NoReturn, Optional, Sequence, Tuple

from resnet_cpu.errors import FlagError, OutputError, PeerLost

_ANSWER_S = 20.0  # a host that does not answer within this time counts as lost
_VERSION_S = 60.0  # for a program to print its version; it may lie on a slow file system
_AT_ONCE = 64  # hosts that are asked at the same time
# Exit codes of mpirun that say that a host was lost: its daemon does not answer, or the program that started the daemon
# ended. A command may also end with the second.
_NO_ANSWER, _NOT_STARTED = 205, 255
_SHM = "/dev/shm"
_SHM_PER_RANK = 8 * 2**20  # bytes; Open MPI uses 4 MiB per rank there


def check_programs(*programs: str) -> None:
    """Raise FlagError for a program that is not in PATH."""
    for program in programs:
        if shutil.which(program) is None:
            raise FlagError(f"{program}: no such program in PATH; load its module, or activate the environment")


def version_of(program: str, patience: float = _VERSION_S) -> str:
    """Return what `PROGRAM --version` prints; raise FlagError if it cannot be run, or does not end in time."""
    try:
        answer = subprocess.run(
            [program, "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=patience,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = error.strerror if isinstance(error, OSError) else f"does not answer to --version in {patience:g} s"
        raise FlagError(
            f"{program}: {reason}; load another MPI module, or name the launcher, as in python -m resnet_cpu.launch "
            "--mpi=srun"
        ) from None
    return answer.stdout + answer.stderr


def check_shared_memory(ranks: int, path: str = _SHM) -> None:
    """Raise OutputError if this host's shared memory is too small for `ranks` ranks: MPI would die of a bus error."""
    try:
        free = os.statvfs(path).f_bavail * os.statvfs(path).f_frsize
    except OSError:
        return
    if free < ranks * _SHM_PER_RANK:
        raise OutputError(_too_full(path, free, ranks))


def host_name() -> str:
    """Return the name of this host."""
    return socket.gethostname()


def is_this_host(name: str) -> bool:
    """Return whether `name` is this host: its name with or without the domain, or whatever leads to its addresses."""
    name, own = name.lower(), host_name().lower()
    if name == own or (("." not in name or "." not in own) and name.split(".")[0] == own.split(".")[0]):
        return True
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError):
        return False
    return any(_is_own_address(family, address) for family, _, _, _, address in found)


def _is_own_address(family: int, address: Any) -> bool:
    """Return whether an address, as `socket.getaddrinfo` gives it, belongs to this host: only those can be bound."""
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind(address)
    except OSError:
        return False
    return True


def on_this_host(hosts: Sequence[str]) -> List[str]:
    """Return those of `hosts` that are this host."""
    if not hosts:
        return []
    with concurrent.futures.ThreadPoolExecutor(min(_AT_ONCE, len(hosts))) as pool:  # a name server may be slow
        return [host for host, here in zip(hosts, pool.map(is_this_host, hosts)) if here]


def check_hosts(hosts: Sequence[str], ranks: int, agent: Optional[str]) -> None:
    """Check all hosts at once, each of which gets `ranks` ranks, by running a command there.

    `agent` is the program that does so, by default ssh; this host needs none. Raises PeerLost naming every host that
    does not answer within 20 s, since mpirun would wait for it, and OutputError naming those whose shared memory is
    too full.
    """
    here = on_this_host(hosts)
    others = [host for host in hosts if host not in here]
    if not others:
        return
    remote = [agent] if agent else ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={_ANSWER_S / 2:.0f}"]
    check_programs(remote[0])
    with concurrent.futures.ThreadPoolExecutor(min(_AT_ONCE, len(others))) as pool:
        problems = [problem for problem in pool.map(lambda host: _problem(remote, host, ranks), others) if problem]
    lost = sorted(text for kind, text in problems if kind is PeerLost)
    if lost:
        raise PeerLost(
            f"hosts that do not answer: {', '.join(lost)}; leave them out with --hosts, or repair {remote[0]} access "
            "(RESNET_CPU_LAUNCH_AGENT names another program)"
        )
    if problems:
        raise OutputError("; ".join(sorted(text for _, text in problems)))


def _problem(remote: Sequence[str], host: str, ranks: int) -> Optional[Tuple[type, str]]:
    """Return the error's class and text if `host` cannot run `ranks` ranks, else None."""
    try:
        answer = subprocess.run(
            [*remote, host, f"df -Pk {_SHM}; true"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",  # a host may greet in another encoding
            timeout=_ANSWER_S,
        )
    except subprocess.TimeoutExpired:
        return PeerLost, f"{host} (no answer in {_ANSWER_S:.0f} s)"
    if answer.returncode:
        reason = (answer.stderr.strip().splitlines() or [f"exit code {answer.returncode}"])[-1]
        return PeerLost, f"{host} ({reason})"
    free = _available(answer.stdout)
    if free is not None and free < ranks * _SHM_PER_RANK:
        return OutputError, _too_full(f"{host}:{_SHM}", free, ranks)
    return None


def _available(answer: str) -> Optional[int]:
    """Return the free bytes in the last line of `df -Pk`, or None if it has none."""
    words = (answer.strip().splitlines() or [""])[-1].split()
    return int(words[3]) * 1024 if len(words) >= 6 and words[3].isdigit() else None


def _too_full(where: str, free: int, ranks: int) -> str:
    return (
        f"{where}: {free / 2**20:.0f} MiB free, {ranks} ranks need {ranks * _SHM_PER_RANK / 2**20:.0f}; remove the "
        "files that dead jobs left there"
    )


def follow(line: Sequence[str]) -> NoReturn:
    """Run mpirun of Open MPI over several hosts, forward signals to it, and exit with its code.

    Raises PeerLost if its code says that it lost a host.
    """
    process: Optional[subprocess.Popen] = None
    early: List[int] = []  # signals that arrived before the process existed

    def forward(signum: int, frame: object) -> None:
        if process is None:
            early.append(signum)
        else:
            process.send_signal(signum)

    for signum in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signum) is not signal.SIG_IGN:  # as under nohup
            signal.signal(signum, forward)
    signal.signal(signal.SIGINT, lambda signum, frame: None)  # a terminal sends it to both processes
    process = subprocess.Popen(line)
    for arrived in early:
        process.send_signal(arrived)
    code = process.wait()
    if code in (_NO_ANSWER, _NOT_STARTED):
        or_command = ", or the command ended with that code" if code == _NOT_STARTED else ""
        raise PeerLost(
            f"a host was lost, or could not be started{or_command} (mpirun ended with {code}); run the same command "
            "again, without the host if one was lost"
        )
    sys.exit(code if code >= 0 else 128 - code)
