"""Starts a command as MPI ranks: `python -m resnet_cpu.launch -- python -m resnet_cpu.train --flagfile=F`."""

import os
import shlex
import shutil
import socket
import subprocess
import sys
from typing import Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

from resnet_cpu import flags
from resnet_cpu.cluster import guard, launchers, start, tuning
from resnet_cpu.cluster import machine as topology
from resnet_cpu.cluster import placement as layout
from resnet_cpu.errors import FlagError


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
    chosen, placement = _laid_out(values, machine)
    launcher = values.mpi if values.mpi != "auto" else _recognise(placement.in_batch_job and not placement.hosts)
    if launcher == "ibrun" and values.ranks_per_node != "auto":
        raise FlagError(
            f"--ranks_per_node={values.ranks_per_node}: ibrun places ranks as the batch job asks; submit with "
            f"--ntasks-per-node={values.ranks_per_node}"
        )
    environment = _without_the_users(chosen.environment)
    if values.threads:
        environment.update({name: str(values.threads) for name in layout.THREADS})
    line = launchers.line(launcher, placement, environment, os.environ, command)
    kept = {name: value for name, value in chosen.environment.items() if name not in environment}
    told = [*_doubts(values, machine, chosen, placement, kept), *chosen.reasons()]
    print("\n".join(f"launch: {one}" for one in told), file=sys.stderr)
    if values.dry_run:
        print(shlex.join(line))
        return
    start.check_programs(command[0], next(word for word in line if word != "env" and "=" not in word))
    start.check_shared_memory(placement.per_host)
    start.check_hosts(placement.hosts, placement.per_host, placement.agent)
    print(f"launch: {shlex.join(line)}", file=sys.stderr, flush=True)
    if launcher == "openmpi" and placement.several_hosts:
        start.follow(line)
    os.execvp(line[0], line)


def _laid_out(values: flags.Values, machine: topology.Topology) -> Tuple[layout.Layout, launchers.Placement]:
    """Return what a host's ranks are given, and which ranks go where."""

    def proposed(per_node: Optional[int], several: bool) -> int:
        best = tuning.remembered(machine) if per_node is None else None
        if best is not None:
            print(f"launch: {best} ranks a node were the fastest here (--tune, {tuning.file()})", file=sys.stderr)
        return best or layout.propose(machine, per_node, several).ranks_per_node

    wanted = flags.ranks_per_node(values)
    ranks, per_host, hosts, in_batch_job = launchers.place(os.environ, values.hosts, values.ranks, wanted, proposed)
    if values.oversubscribe and per_host > machine.offered:
        chosen = layout.shared(machine, per_host)
    else:
        chosen = layout.propose(machine, per_host, ranks > per_host or len(hosts) > 1)
    return chosen, launchers.Placement(
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


def _doubts(
    values: flags.Values,
    machine: topology.Topology,
    chosen: layout.Layout,
    placement: launchers.Placement,
    kept: Mapping[str, str],
) -> Iterator[str]:
    """Yield warnings; `kept` is what was laid out where the user's own export stands."""
    for name, value in kept.items():
        if os.environ[name] != value:
            yield f"warning: {name}={os.environ[name]} is exported and stands (laid out: {value}); unset it if in doubt"
    here, hosts = socket.gethostname(), placement.hosts
    elsewhere = hosts and not {here, here.split(".")[0]} & {*hosts, *(host.split(".")[0] for host in hosts)}
    if elsewhere or (placement.in_batch_job and not hosts and "SLURMD_NODENAME" not in os.environ):
        yield (
            f"warning: laid out for the processors of {here}, where no rank will be; start it on a host of the job "
            "where they differ"
        )
    sizes = [len(cpus) for cpus in chosen.cpus]
    if chosen.bound and min(sizes) < max(sizes):
        yield (
            f"warning: ranks would have {min(sizes)} to {max(sizes)} cores; launchers give each {min(sizes)}, one "
            "after the other, so a rank may reach into its neighbour's NUMA domain"
        )
    if placement.in_batch_job and values.ranks_per_node == "auto" and values.ranks is None:
        suggested = layout.propose(machine, None, placement.several_hosts).ranks_per_node
        if placement.per_host != suggested:
            yield (
                f"warning: the batch job has {placement.per_host} tasks a node, its nodes suggest "
                f"--ntasks-per-node={suggested}"
            )


def _split(argv: Sequence[str]) -> Tuple[List[str], List[str]]:
    where = argv.index("--") if "--" in argv else len(argv)
    program = next((word for word in argv[:where] if not word.startswith("-")), "")
    if where == len(argv) and program and shutil.which(program):
        raise FlagError(f"{program}: write -- before the command, as in -- {program} ...")
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
    """Time training with several numbers of ranks on this host; remember the fastest and print it."""
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
        try:
            timed[ranks] = tuning.images_per_second(ranks, values.mpi, benchmark_flags)
            told = f"{timed[ranks]:.2f} images/s"
        except tuning.Failed as failed:
            told = str(failed)
        print(f"launch: {ranks} ranks: {told}", file=sys.stderr, flush=True)
    if not timed:
        raise FlagError("--tune: no layout could be timed; the lines above say why")
    best = tuning.remember(machine, timed)
    print(f"launch: remembered in {tuning.file()}: {tuning.host_type(machine)}: {best} ranks a node", file=sys.stderr)
    print(best)


if __name__ == "__main__":
    guard.run(main)
