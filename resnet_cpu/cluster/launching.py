"""Start a command as MPI ranks: decide their hosts and cores, report why, check the hosts and become the launcher."""

import os
import re
import shlex
import shutil
import sys
from typing import Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

from resnet_cpu.cluster import allocation, launchers, machine, placement, precision, start, tuning
from resnet_cpu.cluster import environment as environments
from resnet_cpu.cluster.launchers import Distribution, RankMap
from resnet_cpu.cluster.machine import Machine
from resnet_cpu.cluster.placement import Placement
from resnet_cpu.errors import FlagError, printable

AGENT = "RESNET_CPU_LAUNCH_AGENT"  # program that runs PROGRAM HOST COMMAND..., instead of ssh
OVERSUBSCRIBE = "RESNET_CPU_OVERSUBSCRIBE"  # 1: more ranks than cores may share them
_MAX_NAMED = 8  # hosts that one line names


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
    measure: bool = True,
) -> None:
    """Report on standard error where the ranks go and why, then become the launcher; see `launch --help` for the flags.

    With `dry_run`, print the launcher's command line on standard output instead. With `measure`, find out first which
    precision is faster, if this host gets ranks and that is not known. Raises FlagError for what cannot be started,
    PeerLost for hosts that do not answer, OutputError for hosts without room in shared memory.
    """
    if not command:
        raise FlagError("no command; write it after --, as in -- python -m resnet_cpu.train --flagfile=F")
    environments.check_threads()
    host = machine.read()
    tuned = tuning.fastest(host)
    best = tuned or placement.suitable_ranks(host)
    distribution = launchers.distribute(os.environ, hosts, ranks, ranks_per_node, best)
    if _slots_are_threads(host, distribution):
        _say(
            f"warning: the batch job has {distribution.slots} slots per host, more than the {host.offered} cores of "
            f"this one, so that a slot is not a rank: {best} ranks per host, as --ranks_per_node={best}"
        )
        distribution = launchers.distribute(os.environ, hosts, ranks, best, best)
    intel_extension = placement.has_intel_openmp()
    bfloat16_speed = precision.known(host, intel_extension)
    placed = _placement(host, distribution, bfloat16_speed)
    here = start.on_this_host(distribution.hosts)
    if len(here) > 1:
        raise FlagError(
            f"{distribution.source}: {' and '.join(here)} are the same host; write --hosts=NAME:SLOTS for several "
            "ranks on it"
        )
    launcher = mpi if mpi != "auto" else _recognise(distribution.in_batch_job and not distribution.hosts)
    elsewhere = _elsewhere(distribution, bool(here))
    if host.restricted and placed.bound and launcher in launchers.IGNORE_MASK and not elsewhere:
        placed = placed.without_binding(
            f"the affinity mask allows CPUs {machine.spans(host.allowed)}, which {launchers.IGNORE_MASK[launcher]} "
            "ignores when it binds ranks; so they are not bound, and share these CPUs"
        )
    rank_map = _rank_map(host, distribution, placed, interface, elsewhere)
    if launcher == "ibrun":
        _check_ibrun(hosts, ranks_per_node, distribution)
    environment = _without_exported(placed.environment)
    if threads:
        environment.update({name: str(threads) for name in environments.THREADS})
    line = launchers.line(launcher, rank_map, environment, os.environ, command)
    if tuned and distribution.decided_by == "auto":
        _say(f"{tuned} ranks per host were the fastest on hosts of this type (--tune, {tuning.file()})")
    measures = measure and bfloat16_speed is None and precision.has_units(host.instruction_sets)
    measures = measures and not (dry_run or elsewhere)
    texts = [*_exported(placed.environment, environment), *_warnings(rank_map, placed), *_slots(distribution, best)]
    for text in [*texts, _hosts(distribution), *placed.explanation(leave_out="precision" if measures else "")]:
        _say(text)
    if dry_run:
        print(shlex.join(line))
        return
    start.check_programs(command[0], next(word for word in line if word != "env" and "=" not in word))
    if not elsewhere:
        start.check_shared_memory(rank_map.per_host)
    start.check_hosts(rank_map.hosts, rank_map.per_host, rank_map.agent)
    if measures:  # only now: it takes ten seconds, which a misspelt command should not cost
        advice, reason = precision.advice(host.instruction_sets, precision.measure(host, intel_extension))
        _say(f"precision: {advice} ({reason})")
    _say(shlex.join(line))
    if launcher == "openmpi" and rank_map.other_hosts:
        start.follow(line)
    os.execvp(line[0], line)


def _say(text: str) -> None:
    print(f"launch: {printable(text)}", file=sys.stderr, flush=True)


def _slots_are_threads(host: Machine, distribution: Distribution) -> bool:
    """Return whether a batch system other than Slurm, which counts tasks, decides on more ranks than cores."""
    decides = distribution.decided_by.endswith(" of the batch job") and not distribution.in_batch_job
    return decides and distribution.per_host > host.offered and os.environ.get(OVERSUBSCRIBE) != "1"


def _placement(host: Machine, distribution: Distribution, bfloat16_speed: Optional[float]) -> Placement:
    """Return the placement of one host's ranks."""
    oversubscribe = os.environ.get(OVERSUBSCRIBE, "")
    if oversubscribe not in ("", "0", "1"):
        raise FlagError(f"{OVERSUBSCRIBE}={oversubscribe}: must be 1, or unset")
    if oversubscribe == "1" and distribution.per_host > host.offered:
        return placement.oversubscribed(host, distribution.per_host)
    several_hosts = distribution.ranks > distribution.per_host or len(distribution.hosts) > 1
    return placement.propose(
        host,
        distribution.per_host,
        several_hosts,
        decided_by=distribution.decided_by,
        bfloat16_speed=bfloat16_speed,
    )


def _elsewhere(distribution: Distribution, here: bool) -> bool:
    """Return whether this host gets no rank; `here`: it is one of the hosts that are listed."""
    # Slurm's nodes are not listed; the shell of salloc may run on another host.
    outside = distribution.in_batch_job and "SLURMD_NODENAME" not in os.environ
    return not here if distribution.hosts else outside


def _rank_map(
    host: Machine, distribution: Distribution, placed: Placement, interface: Optional[str], elsewhere: bool
) -> RankMap:
    """Return the map of the ranks; `elsewhere`: this host gets none of them."""
    one_host = distribution.ranks == distribution.per_host
    return RankMap(
        ranks=distribution.ranks,
        per_host=distribution.per_host,
        cores=min(len(cpus) for cpus in placed.cpus),
        cpus_per_core=max(len(core) for core in host.cores()),
        hosts=distribution.hosts,
        in_batch_job=distribution.in_batch_job,
        elsewhere=elsewhere,
        slots_counted=one_host and allocation.in_job(os.environ),
        bound=placed.bound,
        yields=placed.yield_when_idle,
        interface=interface,
        agent=os.environ.get(AGENT) or None,
        as_root=os.geteuid() == 0,
    )


def _check_ibrun(hosts: Sequence[str], ranks_per_node: Optional[int], distribution: Distribution) -> None:
    """Raise FlagError for what ibrun would not obey."""
    if hosts:
        raise FlagError("--mpi=ibrun: takes its hosts from the batch job; remove --hosts, or choose another launcher")
    if ranks_per_node is not None or (distribution.slots and distribution.per_host > distribution.slots):
        asked = f"--ranks_per_node={ranks_per_node}" if ranks_per_node else distribution.decided_by
        raise FlagError(
            f"{asked}: ibrun places ranks as the batch job asks; submit with --ntasks-per-node={distribution.per_host}"
        )


def _recognise(in_batch_job: bool) -> str:
    path = shutil.which("mpirun")
    version = start.version_of(path) if path else None
    return launchers.recognise(version, in_batch_job, bool(shutil.which("ibrun")), bool(shutil.which("srun")))


def _without_exported(environment: Mapping[str, str]) -> Dict[str, str]:
    """Return `environment` without variables that the user exported; an allocator goes before the user's preloads.

    One that is exported and empty counts as absent.
    """
    kept = {name: value for name, value in environment.items() if not os.environ.get(name) or name == "LD_PRELOAD"}
    exported = os.environ.get("LD_PRELOAD")
    if exported and "LD_PRELOAD" in kept:
        preloaded = kept["LD_PRELOAD"] in re.split(r"[\s:]+", exported)
        kept["LD_PRELOAD"] = exported if preloaded else f"{kept['LD_PRELOAD']}:{exported}"
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


def _hosts(distribution: Distribution) -> str:
    """Return the line that says on which hosts ranks are started, and where these hosts come from."""
    count = distribution.ranks // distribution.per_host
    if distribution.hosts:
        named = ", ".join(distribution.hosts[:_MAX_NAMED])
        named += f" and {count - _MAX_NAMED} more" if count > _MAX_NAMED else ""
    elif distribution.in_batch_job:
        nodes = os.environ.get("SLURM_JOB_NODELIST")
        named = f"{count} node{'s' * (count != 1)}{f' of {nodes}' if nodes else ''}"
    else:
        named = f"this one, {start.host_name()}"
    return f"hosts: {named} ({distribution.source})"


def _slots(distribution: Distribution, best: int) -> Iterator[str]:
    """Yield a warning if the slots of a batch job are not the number of ranks that suits hosts of this type."""
    slots = distribution.per_host
    if not distribution.decided_by.endswith(" of the batch job") or slots == best:
        return
    given = f"give --ranks_per_node={best}"
    on_one_host = distribution.ranks == slots  # whose cores decide
    if distribution.in_batch_job:
        remedy = f"submit with --ntasks-per-node={best}{f', or {given}' if on_one_host or slots > best else ''}"
        yield f"warning: the batch job has {slots} tasks per node; for nodes of this type {remedy}"
    else:
        remedy = given if on_one_host or slots > best else f"submit with {best} slots per host"
        yield f"warning: the batch job has {slots} slots per host; for hosts of this type {remedy}"


def _warnings(rank_map: RankMap, placed: Placement) -> Iterator[str]:
    """Yield what may be wrong about the placement of these ranks."""
    if rank_map.elsewhere:
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
