"""Start a command as MPI ranks: decide their hosts and cores, report why, check the hosts and become the launcher."""

import os
import shlex
import shutil
import subprocess
import sys
from typing import Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

from resnet_cpu.cluster import environment as environments
from resnet_cpu.cluster import launchers, machine, placement, start, tuning
from resnet_cpu.cluster.launchers import Distribution, RankMap
from resnet_cpu.cluster.machine import Machine
from resnet_cpu.cluster.placement import Placement
from resnet_cpu.errors import FlagError

AGENT = "RESNET_CPU_LAUNCH_AGENT"  # program that runs PROGRAM HOST COMMAND..., instead of ssh
OVERSUBSCRIBE = "RESNET_CPU_OVERSUBSCRIBE"  # 1: more ranks than cores may share them


def split(argv: Sequence[str]) -> Tuple[List[str], List[str]]:
    """Return the launcher's own flags and the command after `--`; raise FlagError if `--` was forgotten."""
    where = argv.index("--") if "--" in argv else len(argv)
    program = next((word for word in argv[:where] if not word.startswith("-")), "")
    if where == len(argv) and program and shutil.which(program):
        raise FlagError(f"{program}: write -- before the command, as in -- {program} ...")
    return list(argv[:where]), list(argv[where + 1 :])


def launch(
    command: Sequence[str],
    *,
    ranks: Optional[int],
    ranks_per_node: Optional[int],
    threads: int,
    hosts: Sequence[str],
    mpi: str,
    interface: Optional[str],
    dry_run: bool,
) -> None:
    """Report on standard error where the ranks go and why, then become the launcher; see `launch --help` for the flags.

    With `dry_run`, print the launcher's command line on standard output instead. Raises FlagError for what cannot be
    started, PeerLost for hosts that do not answer, OutputError for hosts without room in shared memory.
    """
    if not command:
        raise FlagError("no command; write it after --, as in -- python -m resnet_cpu.train --flagfile=F")
    environments.check_threads()
    host = machine.read()
    remembered = tuning.remembered(host)
    best = remembered or placement.suitable_ranks(host)
    distribution = launchers.distribute(os.environ, hosts, ranks, ranks_per_node, best)
    placed = _placement(host, distribution)
    rank_map = _rank_map(host, distribution, placed, interface)
    launcher = mpi if mpi != "auto" else _recognise(rank_map.in_batch_job and not rank_map.hosts)
    if launcher == "ibrun" and ranks_per_node is not None:
        raise FlagError(
            f"--ranks_per_node={ranks_per_node}: ibrun places ranks as the batch job asks; submit with "
            f"--ntasks-per-node={ranks_per_node}"
        )
    environment = _without_exported(placed.environment)
    if threads:
        environment.update({name: str(threads) for name in environments.THREADS})
    line = launchers.line(launcher, rank_map, environment, os.environ, command)
    if remembered and distribution.decided_by == "auto":
        _say(f"{remembered} ranks per host were the fastest on hosts of this type (--tune, {tuning.file()})")
    if distribution.decided_by.startswith("--ntasks-per-node") and ranks is None and distribution.per_host != best:
        _say(
            f"warning: the batch job has {distribution.per_host} tasks per node; for nodes of this type submit with "
            f"--ntasks-per-node={best}"
        )
    for text in [*_exported(placed.environment, environment), *_warnings(rank_map, placed), *placed.explanation()]:
        _say(text)
    if dry_run:
        print(shlex.join(line))
        return
    start.check_programs(command[0], next(word for word in line if word != "env" and "=" not in word))
    start.check_shared_memory(rank_map.per_host)
    start.check_hosts(rank_map.hosts, rank_map.per_host, rank_map.agent)
    _say(shlex.join(line))
    if launcher == "openmpi" and rank_map.several_hosts:
        start.follow(line)
    os.execvp(line[0], line)


def _say(text: str) -> None:
    print(f"launch: {text}", file=sys.stderr, flush=True)


def _placement(host: Machine, distribution: Distribution) -> Placement:
    """Return the placement of one host's ranks."""
    oversubscribe = os.environ.get(OVERSUBSCRIBE, "")
    if oversubscribe not in ("", "0", "1"):
        raise FlagError(f"{OVERSUBSCRIBE}={oversubscribe}: must be 1, or unset")
    if oversubscribe == "1" and distribution.per_host > host.offered:
        return placement.oversubscribed(host, distribution.per_host)
    several_hosts = distribution.ranks > distribution.per_host or len(distribution.hosts) > 1
    return placement.propose(host, distribution.per_host, several_hosts, decided_by=distribution.decided_by)


def _rank_map(host: Machine, distribution: Distribution, placed: Placement, interface: Optional[str]) -> RankMap:
    return RankMap(
        ranks=distribution.ranks,
        per_host=distribution.per_host,
        cores=min(len(cpus) for cpus in placed.cpus),
        cpus_per_core=max(len(core) for core in host.cores()),
        hosts=distribution.hosts,
        in_batch_job=distribution.in_batch_job,
        bound=placed.bound,
        yields=placed.yield_when_idle,
        interface=interface,
        agent=os.environ.get(AGENT) or None,
        as_root=os.geteuid() == 0,
    )


def _recognise(in_batch_job: bool) -> str:
    version = None
    if shutil.which("mpirun"):
        answer = subprocess.run(["mpirun", "--version"], capture_output=True, text=True, timeout=60)
        version = answer.stdout + answer.stderr
    return launchers.recognise(version, in_batch_job, bool(shutil.which("ibrun")), bool(shutil.which("srun")))


def _without_exported(environment: Mapping[str, str]) -> Dict[str, str]:
    """Return `environment` without variables that the user exported; an allocator goes before the user's preloads.

    One that is exported and empty counts as absent.
    """
    kept = {name: value for name, value in environment.items() if not os.environ.get(name) or name == "LD_PRELOAD"}
    exported = os.environ.get("LD_PRELOAD")
    if exported and "LD_PRELOAD" in kept and kept["LD_PRELOAD"] not in exported:
        kept["LD_PRELOAD"] += f":{exported}"
    return kept


def _exported(proposed: Mapping[str, str], set_for_ranks: Mapping[str, str]) -> Iterator[str]:
    """Yield a line for each variable of the user's environment that overrides or takes the place of a proposed one."""
    for name, value in proposed.items():
        if name in set_for_ranks:
            continue
        if os.environ[name] != value:
            yield (
                f"warning: {name}={os.environ[name]} is set in your environment and overrides the proposed {value}; "
                "unset it unless you mean it"
            )
        elif name in environments.THREADS:
            yield f"{name}={value} is set in your environment and is kept; it is also what is proposed"
    yield from environments.remarks()


def _warnings(rank_map: RankMap, placed: Placement) -> Iterator[str]:
    """Yield what may be wrong about the placement of these ranks."""
    elsewhere = rank_map.hosts and not any(map(start.is_this_host, rank_map.hosts))
    if elsewhere or (rank_map.in_batch_job and not rank_map.hosts and "SLURMD_NODENAME" not in os.environ):
        yield (
            f"warning: the placement was computed for the processors of {start.host_name()}, which will run no rank; "
            "if the hosts of the job have others, run this on one of them"
        )
    sizes = [len(cpus) for cpus in placed.cpus]
    if placed.bound and min(sizes) < max(sizes):
        yield (
            f"warning: the ranks' shares have {min(sizes)} to {max(sizes)} cores; launchers give each rank "
            f"{min(sizes)} in sequence, so a rank may extend into its neighbour's NUMA domain"
        )
