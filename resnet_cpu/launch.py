"""Starts a command as MPI ranks: `python -m resnet_cpu.launch -- python -m resnet_cpu.train --flagfile=F`."""

import concurrent.futures
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from typing import Dict, List, Mapping, NoReturn, Optional, Sequence, Tuple

from resnet_cpu import flags
from resnet_cpu.cluster import guard, launchers, layout, topology, tuning
from resnet_cpu.errors import FlagError, OutputError, PeerLost

_ANSWER_S = 20.0  # what a host is given to answer before it counts as gone
_TUNED = ["--dataset=synthetic", "--benchmark=synthetic", "--timed_steps=1000", "--timed_seconds=40"]
_TOTAL = "total images/sec: "
_LOST_HOST = (205, 255)  # how mpirun ends then: its daemon does not answer, or what started it ended
_SHM_PER_RANK = 8 * 2**20  # bytes; Open MPI keeps 4 MiB a rank there


def main(argv: List[str]) -> None:
    """Print why and how (stderr), then become the launcher; with --dry_run only print the line (stdout)."""
    own, command = _split(argv)
    values, _ = flags.parse_values(own, "launch")
    _only_of_launch(values)
    if values.tune:
        _tune(values, command)
        return
    if not command:
        raise FlagError(
            "no command; write -- and the command after it, as in -- python -m resnet_cpu.train --flagfile=F"
        )
    machine = topology.read()
    wanted = flags.ranks_per_node(values)

    def proposed(per_node: Optional[int], several: bool) -> int:
        best = tuning.remembered(machine) if per_node is None else None
        if best is not None:
            print(f"launch: {best} ranks a node were the fastest here (--tune, {tuning.file()})", file=sys.stderr)
        return best or layout.propose(machine, per_node, several).ranks_per_node

    ranks, per_host, hosts, in_batch_job = launchers.place(os.environ, values.hosts, values.ranks, wanted, proposed)
    several = ranks > per_host or len(hosts) > 1
    shared = values.oversubscribe and per_host > machine.offered
    chosen = layout.shared(machine, per_host) if shared else layout.propose(machine, per_host, several)
    launcher = values.mpi if values.mpi != "auto" else _recognise(in_batch_job and not hosts)
    placement = launchers.Placement(
        ranks=ranks,
        per_host=per_host,
        cores=min(len(cpus) for cpus in chosen.cpus),
        cpus_per_core=max(len(core) for core in machine.cores()),
        hosts=hosts,
        in_batch_job=in_batch_job,
        bound=chosen.bound,
        yields=chosen.yield_when_idle,
        interface=values.interface,
        agent=values.launch_agent,
        as_root=os.geteuid() == 0,
    )
    environment = _without_the_users(chosen.environment)
    if values.threads:
        environment.update({name: str(values.threads) for name in layout.THREADS})
    _tell_doubts({name: value for name, value in chosen.environment.items() if name not in environment})
    _tell_elsewhere(in_batch_job, hosts)
    sizes = [len(cpus) for cpus in chosen.cpus]
    if chosen.bound and min(sizes) < max(sizes):
        print(
            f"launch: warning: ranks would have {min(sizes)} to {max(sizes)} cores; launchers give each {min(sizes)}, "
            "one after the other, so a rank may reach into its neighbour's NUMA domain",
            file=sys.stderr,
        )
    if in_batch_job and wanted is None and values.ranks is None:
        _tell_tasks(per_host, layout.propose(machine, None, several).ranks_per_node)
    if launcher == "ibrun" and wanted is not None:
        raise FlagError(
            f"--ranks_per_node={wanted}: ibrun places ranks as the batch job asks; submit with "
            f"--ntasks-per-node={wanted}"
        )
    line = launchers.line(launcher, placement, environment, os.environ, command)
    print("\n".join(f"launch: {reason}" for reason in chosen.reasons()), file=sys.stderr)
    if values.dry_run:
        print(shlex.join(line))
        return
    _check_command(command[0], line[0] if line[0] != "env" else next(word for word in line[1:] if "=" not in word))
    _check_shared_memory(per_host)
    _check_hosts(hosts, values.launch_agent)
    print(f"launch: {shlex.join(line)}", file=sys.stderr, flush=True)
    if launcher == "openmpi" and placement.several_hosts:
        _follow(line)
    os.execvp(line[0], line)


def _tell_doubts(replaced: Mapping[str, str]) -> None:
    """Say where the user's own exports stand in place of what was laid out."""
    for name, value in replaced.items():
        if os.environ[name] != value:
            print(
                f"launch: warning: {name}={os.environ[name]} is exported and stands (laid out: {value})",
                file=sys.stderr,
            )


def _tell_elsewhere(in_batch_job: bool, hosts: Sequence[str]) -> None:
    """Say where another machine than this one is laid out."""
    here = socket.gethostname()
    elsewhere = hosts and not {here, here.split(".")[0]} & {*hosts, *(host.split(".")[0] for host in hosts)}
    if elsewhere or (in_batch_job and not hosts and "SLURMD_NODENAME" not in os.environ):
        print(
            f"launch: warning: laid out for the processors of {here}, where no rank will be; start it on a host of the "
            "job where they differ",
            file=sys.stderr,
        )


def _tell_tasks(per_host: int, proposed: int) -> None:
    if per_host != proposed:
        print(
            f"launch: warning: the batch job has {per_host} tasks a node, its nodes suggest "
            f"--ntasks-per-node={proposed}",
            file=sys.stderr,
        )


def _split(argv: Sequence[str]) -> Tuple[List[str], List[str]]:
    where = argv.index("--") if "--" in argv else len(argv)
    return list(argv[:where]), list(argv[where + 1 :])


def _only_of_launch(values: flags.Values) -> None:
    for name in values:
        if (
            values[name].present
            and name not in ("ranks", "threads", "flagfile")
            and "launch" not in flags.OF_ONE_COMMAND.get(name, "").split()
        ):
            raise FlagError(f"--{name}: belongs to the command; write it after --")


def _recognise(in_batch_job: bool) -> str:
    version = None
    if shutil.which("mpirun"):
        answer = subprocess.run(["mpirun", "--version"], capture_output=True, text=True, timeout=60)
        version = answer.stdout + answer.stderr
    return launchers.recognise(version, in_batch_job, bool(shutil.which("ibrun")), bool(shutil.which("srun")))


def _without_the_users(environment: Dict[str, str]) -> Dict[str, str]:
    """Return `environment` without what the user exported, which stands; an allocator goes before other preloads."""
    kept = {name: value for name, value in environment.items() if name not in os.environ or name == "LD_PRELOAD"}
    theirs = os.environ.get("LD_PRELOAD")
    if theirs and "LD_PRELOAD" in kept and kept["LD_PRELOAD"] not in theirs:
        kept["LD_PRELOAD"] += f":{theirs}"
    return kept


def _tune(values: flags.Values, benchmark_flags: Sequence[str]) -> None:
    """Time training with several numbers of ranks on this host; remember the fastest."""
    for name in ("ranks", "threads", "hosts", "interface", "launch_agent", "oversubscribe", "dry_run"):
        if values[name].present:
            raise FlagError(f"--{name}: has no meaning with --tune, which tries layouts of this host; leave it out")
    if values.ranks_per_node != "auto":
        raise FlagError(f"--ranks_per_node={values.ranks_per_node}: is what --tune looks for; leave it out")
    machine = topology.read()
    counts = tuning.candidates(machine, layout.propose(machine).ranks_per_node)
    print(f"launch: timing {counts} ranks on this host, about a minute and a half each", file=sys.stderr, flush=True)
    timed: Dict[int, float] = {}
    for ranks in counts:
        launch = [sys.executable, "-m", "resnet_cpu.launch", f"--mpi={values.mpi}", f"--ranks_per_node={ranks}"]
        work = [sys.executable, "-m", "resnet_cpu.benchmark", *_TUNED, *benchmark_flags]
        alone = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        process = subprocess.run([*launch, "--", *work], capture_output=True, text=True, env=alone)
        last = (process.stdout.strip().splitlines() or [""])[-1]
        if process.returncode or not last.startswith(_TOTAL):
            told = (process.stderr.strip().splitlines() or ["nothing was said"])[-1]
            print(f"launch: {ranks} ranks: failed with {process.returncode}: {told}", file=sys.stderr, flush=True)
            continue
        timed[ranks] = float(last[len(_TOTAL) :])
        print(f"launch: {ranks} ranks: {timed[ranks]:.2f} images/s", file=sys.stderr, flush=True)
    if not timed:
        raise FlagError("--tune: no layout could be timed; the lines above say why")
    best = tuning.remember(machine, timed)
    print(f"launch: remembered in {tuning.file()}: {tuning.host_type(machine)}: {best} ranks a node", file=sys.stderr)
    print(best)


def _follow(line: Sequence[str]) -> NoReturn:
    """Run Open MPI over several hosts, handing signals on; end as it ends, but tell what it does not: a lost host."""
    process: Optional[subprocess.Popen] = None
    early: List[int] = []  # signals that came while it was being started

    def hand_on(signum: int, frame: object) -> None:
        if process is None:
            early.append(signum)
        else:
            process.send_signal(signum)

    for signum in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGHUP):
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


def _check_command(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            raise FlagError(f"{program}: no such program in PATH; load its module, or activate the environment")


def _check_shared_memory(ranks: int, path: str = "/dev/shm") -> None:
    """Raise OutputError where the ranks of this host could not exchange messages: MPI would end with a bus error."""
    try:
        free = os.statvfs(path).f_bavail * os.statvfs(path).f_frsize
    except OSError:
        return
    if free < ranks * _SHM_PER_RANK:
        raise OutputError(
            f"{path}: {free / 2**20:.0f} MiB free, {ranks} ranks need {ranks * _SHM_PER_RANK / 2**20:.0f}; remove what "
            "dead jobs left there"
        )


def _check_hosts(hosts: Sequence[str], agent: Optional[str]) -> None:
    """Raise PeerLost naming every host that does not run a command within 20 s: mpirun would wait for it."""
    if not hosts:
        return
    start = [agent] if agent else ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={_ANSWER_S / 2:.0f}"]
    _check_command(start[0])

    def answer(host: str) -> Optional[str]:
        try:
            process = subprocess.run(
                [*start, host, "true"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_ANSWER_S
            )
        except subprocess.TimeoutExpired:
            return f"{host} (no answer in {_ANSWER_S:.0f} s)"
        if process.returncode == 0:
            return None
        return f"{host} ({(process.stderr.strip().splitlines() or [f'exit code {process.returncode}'])[-1]})"

    with concurrent.futures.ThreadPoolExecutor(min(64, len(hosts))) as pool:
        silent = [told for told in pool.map(answer, hosts) if told]
    if silent:
        raise PeerLost(f"hosts that do not answer: {', '.join(silent)}; leave them out of --hosts, or mend {start[0]}")


if __name__ == "__main__":
    guard.run(main)
