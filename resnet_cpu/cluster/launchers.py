"""Write the command line that starts the ranks of a job, for each launcher. Nothing is run here.

`distribute` decides how many ranks run on which hosts; a `RankMap` adds what each rank gets there, which `placement`
decides; `line` turns it into words. Horovod's own launcher is never used: its rendezvous server unpickles what it
receives (CVE-2024-10190).
"""

import dataclasses
import re
from typing import Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from resnet_cpu.cluster import allocation
from resnet_cpu.cluster.allocation import Allocation
from resnet_cpu.errors import FlagError

EXPECTED_RANKS = "RESNET_CPU_RANKS"  # set for every rank: how many ranks were asked for
# Variables of this shell that ranks on other hosts get, besides those that the placement sets.
_PASSED = re.compile(
    r"(PATH|LD_LIBRARY_PATH|LD_PRELOAD|PYTHONPATH|TMPDIR|XLA_FLAGS|RESNET_CPU_(KEEP|KERNELS_ISA)|(OMP|GOMP|KMP|TF|ITEX"
    r"|ONEDNN|DNNL|HOROVOD|MALLOC|TCMALLOC|PYTHON|UCX|PSM2|FI|I_MPI|MPICH|MPIR|MV2|APPTAINERENV|SINGULARITYENV)_\w+)"
)
# Launchers that bind ranks to cores which the affinity mask of this process leaves out, as after taskset (seen with
# Open MPI 4.1.4 and MPICH 5.0.2). Intel MPI 2021.19 obeys the mask; srun binds ranks within its own step.
IGNORE_MASK = {"openmpi": "Open MPI", "mpich": "MPICH"}
# Bridges of containers and virtual machines have the same address on every host and do not connect hosts.
_LOCAL_INTERFACES = "lo,docker0,virbr0"
# Settings of Open MPI across several hosts, unless OMPI_MCA_<name> is exported.
_DAEMONS = {
    # Notice a lost host after 25 s instead of a quarter of an hour. Daemons on other hosts read only the command line.
    "oob_tcp_keepalive_time": "10",
    "oob_tcp_keepalive_intvl": "5",
    "oob_tcp_keepalive_probes": "3",
}
IN_PARTS = {
    # By default a large message over TCP is sent as a whole (`put`). A rank whose partner is late then sends all of its
    # own message before it answers, and the two messages of an exchange follow each other instead of overlapping: an
    # allreduce of 34 MB on 3 hosts took 4.0 times as long as the message instead of 3.1 (docs/network_lab.md). With
    # these settings messages are sent in parts of 512 KiB.
    "btl_tcp_flags": "send,inplace,need-ack,need-csum,hetero-rdma",
    "btl_tcp_max_send_size": "524288",
}


class Distribution(NamedTuple):
    """The number of ranks on each host of a job."""

    ranks: int
    per_host: int
    hosts: Tuple[str, ...]  # empty: this host, or those of the job of Slurm
    in_batch_job: bool  # of Slurm, whose nodes the launchers know; other batch systems' hosts are in `hosts`
    decided_by: str  # what decided `per_host`, as the user knows it: a flag with its value, or "auto"
    source: str  # where the hosts come from, for people
    slots: Optional[int] = None  # of each host, as the batch job says


@dataclasses.dataclass(frozen=True)
class RankMap:
    """The ranks of a job, their hosts, and what each gets there."""

    ranks: int
    per_host: int
    cores: int  # physical cores per rank
    cpus_per_core: int = 1  # hyper-threads that the system shows
    hosts: Tuple[str, ...] = ()  # empty: this host, or those of the job of Slurm
    in_batch_job: bool = False  # of Slurm
    elsewhere: bool = False  # this host gets no rank
    slots_counted: bool = False  # a batch system counts the slots of the one host, where cores are to decide
    bound: bool = True  # False: ranks share the cores of their host
    yields: bool = False  # a waiting rank gives its core away
    interface: Optional[str] = None  # network interface for TCP; None: the launcher chooses
    agent: Optional[str] = None  # program that starts a process on another host, instead of ssh
    as_root: bool = False

    @property
    def several_hosts(self) -> bool:
        return self.ranks > self.per_host or len(self.hosts) > 1

    @property
    def other_hosts(self) -> bool:
        return self.several_hosts or self.elsewhere


Line = List[str]


def line(
    launcher: str,
    rank_map: RankMap,
    environment: Mapping[str, str],
    outside: Mapping[str, str],
    command: Sequence[str],
) -> Line:
    """Return the command line that starts `command` on every rank with the variables of `environment`.

    `outside` is the environment of this shell; ranks on other hosts get the variables of it that matter to them.
    """
    given = {**environment, EXPECTED_RANKS: str(rank_map.ranks)}
    return [*LINES[launcher](rank_map, given, outside), *command]


def _passed(rank_map: RankMap, environment: Mapping[str, str], outside: Mapping[str, str]) -> List[str]:
    if not rank_map.other_hosts:
        return []  # ranks on this host inherit the whole environment
    return sorted(name for name in outside if _PASSED.fullmatch(name) and name not in environment)


def _open_mpi(rank_map: RankMap, environment: Dict[str, str], outside: Mapping[str, str]) -> Line:
    # What --quiet sets in Open MPI 4; version 5 does not know that option and ignores this parameter.
    words = ["mpirun", "--mca", "orte_execute_quiet", "1", "-np", str(rank_map.ranks)]
    if rank_map.hosts:
        words += ["--host", ",".join(f"{host}:{rank_map.per_host}" for host in rank_map.hosts)]
    if not rank_map.bound:
        words += ["--oversubscribe"]
        words += ["--map-by", f"ppr:{rank_map.per_host}:node"] if rank_map.several_hosts else []
        words += ["--bind-to", "none"]
    elif rank_map.several_hosts or rank_map.slots_counted:
        words += ["--oversubscribe"] if rank_map.slots_counted else []
        words += ["--map-by", f"ppr:{rank_map.per_host}:node:PE={rank_map.cores}", "--bind-to", "core"]
    else:
        words += ["--map-by", f"slot:PE={rank_map.cores}", "--bind-to", "core"]
    if rank_map.yields:
        words += ["--mca", "mpi_yield_when_idle", "1"]
    if not rank_map.several_hosts:  # shared memory only: do not look for a network
        words += ["--mca", "btl", "self,vader", "--mca", "pml", "ob1"]
    layers = (["btl"] if rank_map.several_hosts else []) + (["oob"] if rank_map.other_hosts else [])
    for layer in layers:
        if rank_map.interface:
            words += ["--mca", f"{layer}_tcp_if_include", rank_map.interface]
        elif not any(f"OMPI_MCA_{layer}_tcp_if_{which}" in outside for which in ("include", "exclude")):
            words += ["--mca", f"{layer}_tcp_if_exclude", _LOCAL_INTERFACES]
    given = {**(_DAEMONS if rank_map.other_hosts else {}), **(IN_PARTS if rank_map.several_hosts else {})}
    for name, value in given.items():
        words += ["--mca", name, outside.get(f"OMPI_MCA_{name}", value)]
    if rank_map.agent:
        words += ["--mca", "plm_rsh_agent", rank_map.agent]
    if rank_map.as_root:
        words += ["--allow-run-as-root"]
    for name, value in environment.items():
        words += ["-x", f"{name}={value}"]
    for name in _passed(rank_map, environment, outside):
        words += ["-x", name]
    return words


def _hydra(rank_map: RankMap, environment: Dict[str, str], outside: Mapping[str, str]) -> Line:
    words = ["-n", str(rank_map.ranks), "-ppn", str(rank_map.per_host)]
    if rank_map.hosts:
        words += ["-hosts", ",".join(rank_map.hosts)]
    if rank_map.interface:
        words += ["-iface", rank_map.interface]
    if rank_map.agent:
        words += ["-launcher", "rsh", "-launcher-exec", rank_map.agent]
    for name, value in environment.items():
        words += ["-genv", name, value]
    names = _passed(rank_map, environment, outside)
    if names:
        words += ["-genvlist", ",".join(names)]
    return words


def _intel_pinning(rank_map: RankMap) -> Dict[str, str]:
    """Return the variables that give each rank its own contiguous domain of logical processors."""
    if not rank_map.bound:
        return {"I_MPI_PIN": "0"}
    return {"I_MPI_PIN_DOMAIN": f"{rank_map.cores * rank_map.cpus_per_core}:compact"}


def _intel_mpi(rank_map: RankMap, environment: Dict[str, str], outside: Mapping[str, str]) -> Line:
    given = {**_intel_pinning(rank_map), **environment}
    if rank_map.yields:
        given = {"I_MPI_THREAD_YIELD": "2", **given}
    # Otherwise the batch system would decide how many ranks a host gets. Intel's mpirun is a shell script, which dies
    # of SIGUSR1 without forwarding it; so start mpiexec.hydra itself.
    start = [*_env({"I_MPI_JOB_RESPECT_PROCESS_PLACEMENT": "0"}), "mpiexec.hydra"]
    return [*start, *_hydra(rank_map, given, outside)]


def _mpich(rank_map: RankMap, environment: Dict[str, str], outside: Mapping[str, str]) -> Line:
    # MVAPICH2's own pinning would put all threads of a rank on one core, and disables MPI_THREAD_MULTIPLE.
    given = {"MV2_ENABLE_AFFINITY": "0", **environment}
    binding = ["-bind-to", f"core:{rank_map.cores}"] if rank_map.bound else ["-bind-to", "none"]
    return ["mpiexec", *_hydra(rank_map, given, outside), *binding]


def _env(environment: Mapping[str, str]) -> Line:
    return ["env", *(f"{name}={value}" for name, value in environment.items())]


def _ibrun(rank_map: RankMap, environment: Dict[str, str], outside: Mapping[str, str]) -> Line:
    # ibrun places ranks as the batch job asked (--ntasks-per-node) and passes the whole environment. The site decides
    # which MPI it starts, so set the variables of both kinds of pinning.
    pinning = {"MV2_ENABLE_AFFINITY": "0", **_intel_pinning(rank_map)}
    return [*_env({**pinning, **environment}), "ibrun", "-n", str(rank_map.ranks), "-o", "0"]


def _srun(rank_map: RankMap, environment: Dict[str, str], outside: Mapping[str, str]) -> Line:
    if not rank_map.in_batch_job:
        raise FlagError("--mpi=srun: not inside a job of Slurm; submit a launch/*.sbatch file, or call salloc first")
    cpus_per_core = 1 if outside.get("SLURM_HINT") == "nomultithread" else rank_map.cpus_per_core
    # Another MPI than Open MPI ignores these.
    parts = {f"OMPI_MCA_{name}": value for name, value in IN_PARTS.items() if rank_map.several_hosts}
    return [
        *_env({**{name: value for name, value in parts.items() if name not in outside}, **environment}),
        "srun",
        "--mpi=pmix",
        "--export=ALL",  # a job submitted with --export=NONE has SLURM_EXPORT_ENV=NONE, which srun obeys
        "--kill-on-bad-exit=1",  # by default the other ranks would wait for a dead one forever
        f"--nodes={-(-rank_map.ranks // rank_map.per_host)}",  # otherwise few ranks are spread over all nodes
        f"--ntasks={rank_map.ranks}",
        f"--ntasks-per-node={rank_map.per_host}",
        *([f"--nodelist={','.join(rank_map.hosts)}"] if rank_map.hosts else []),
        "--distribution=block:block",  # neighbouring ranks on one socket; by default sockets take turns
        f"--cpus-per-task={rank_map.cores * cpus_per_core}",
        *(["--cpu-bind=cores"] if rank_map.bound else ["--overcommit", "--cpu-bind=none"]),
    ]


LINES: Dict[str, Callable[[RankMap, Dict[str, str], Mapping[str, str]], Line]] = {
    "openmpi": _open_mpi,
    "intel": _intel_mpi,
    "mpich": _mpich,
    "ibrun": _ibrun,
    "srun": _srun,
}


def recognise(version: Optional[str], in_batch_job: bool, has_ibrun: bool, has_srun: bool) -> str:
    """Return the launcher to use, given the output of `mpirun --version` (None: mpirun is not in PATH).

    Raises FlagError if there is no launcher, or one that is not known.
    """
    if in_batch_job and has_ibrun:
        return "ibrun"
    if version is None:
        if in_batch_job and has_srun:
            return "srun"
        raise FlagError("no mpirun in PATH; load your site's MPI module, or run make setup")
    for words, launcher in (("Open MPI", "openmpi"), ("OpenRTE", "openmpi"), ("Intel(R) MPI", "intel")):
        if words in version:
            return launcher
    if re.search("hydra|mpich|mvapich", version, re.IGNORECASE):
        return "mpich"
    first = version.strip().splitlines()[0] if version.strip() else "nothing"
    raise FlagError(f"mpirun --version prints '{first}', which is not a known MPI; choose one with --mpi=")


def distribute(
    environ: Mapping[str, str],
    hosts: Sequence[str],
    ranks: Optional[int],
    ranks_per_node: Optional[int],
    default: int,
) -> Distribution:
    """Return how many ranks run on which hosts.

    `hosts` are NAME or NAME:SLOTS. `ranks` and `ranks_per_node` are the flags, None if not given; `default` is the
    number of ranks per host if neither they nor the hosts nor the batch job decide it. Without `hosts` and outside a
    batch job all ranks run on this host. Raises FlagError if there are more ranks than slots; on a single host a
    batch job's slots do not limit the ranks, its cores do (`placement.propose`).
    """
    flag = f"--ranks_per_node={ranks_per_node}"
    job = None if hosts else allocation.read(environ)
    if hosts:
        names, slots = _with_slots(hosts)
        if slots and ranks_per_node and ranks_per_node > slots:
            raise FlagError(f"{flag}: more ranks than slots: --hosts gives {slots} slots per host; lower the number")
        given = "auto" if slots is None else f"--hosts=...:{slots}"
        asked = Distribution(0, slots or default, names, bool(environ.get("SLURM_JOB_ID")), given, "--hosts")
        count, room, unit = len(names), f"--hosts gives {_plural(len(names), 'host')}", "slot"
    elif job is not None and job.nodes > 1:
        asked = _of_job(job, ranks_per_node, default)
        count, unit = job.nodes, "task" if asked.in_batch_job else "slot"
        room = f"the batch job has {_plural(count, 'node' if asked.in_batch_job else 'host')}"
    else:
        return _on_one_host(job, ranks, ranks_per_node, default)
    if ranks_per_node:
        asked = asked._replace(per_host=ranks_per_node, decided_by=flag)
    room += f" x {_plural(asked.per_host, unit)}"
    if ranks_per_node or asked.decided_by == "auto":
        room += f" ({flag if ranks_per_node else '--ranks_per_node=auto'})"
    return _shared_out(ranks, asked, count, room)


def _of_job(job: Allocation, ranks_per_node: Optional[int], default: int) -> Distribution:
    """Return the most ranks that the hosts of a batch job hold; their number is still open."""
    slurm = job.system == "Slurm"
    if job.slots and ranks_per_node and ranks_per_node > job.slots:
        remedy = f"--ntasks-per-node={ranks_per_node}" if slurm else f"{ranks_per_node} slots per host"
        raise FlagError(
            f"--ranks_per_node={ranks_per_node}: more ranks than slots: the batch job has {job.slots} "
            f"{'tasks per node' if slurm else 'slots per host'}; submit with {remedy}"
        )
    if job.unequal and not ranks_per_node and slurm:
        raise FlagError(
            f"{job.unequal}: the nodes have unequal numbers of tasks, but all ranks wait for the fullest node; submit "
            f"with --ntasks-per-node={job.slots}, without --ntasks, or give --ranks_per_node=1, up to {job.slots}"
        )
    if job.unequal and not ranks_per_node:
        raise FlagError(
            f"{job.source}: the hosts have unequal numbers of slots ({job.unequal}), but all ranks wait for the "
            f"fullest host; give --ranks_per_node=1, up to {job.slots}, or name the hosts with --hosts=NAME:SLOTS,..."
        )
    return Distribution(0, job.slots or default, job.hosts, slurm, _decided_by(job), _source(job), job.slots)


def _decided_by(job: Allocation) -> str:
    if job.slots is None:
        return "auto"
    what = f"--ntasks-per-node={job.slots}" if job.system == "Slurm" else f"{_plural(job.slots, 'slot')} per host"
    return f"{what} of the batch job"


def _source(job: Allocation) -> str:
    return f"{job.system}, {job.source}{'; ' if job.left_out else ''}{job.left_out}"


def _on_one_host(
    job: Optional[Allocation], ranks: Optional[int], ranks_per_node: Optional[int], default: int
) -> Distribution:
    """Return the ranks of a batch job with one host, or of this host outside a batch job."""
    flag = f"--ranks_per_node={ranks_per_node}"
    if ranks and ranks_per_node and ranks > ranks_per_node:
        where = (
            "this host; name more hosts with --hosts"
            if job is None
            else "the one host of the batch job; submit it with more hosts"
        )
        raise FlagError(
            f"--ranks={ranks}: {flag} allows {ranks_per_node} on {where}, or give only one of the two flags"
        )
    slots = job.slots if job is not None else None
    count = ranks or ranks_per_node or slots or default
    decided_by = f"--ranks={ranks}" if ranks else flag if ranks_per_node else _decided_by(job) if job else "auto"
    if job is None:
        return Distribution(count, count, (), False, decided_by, "no batch job, no --hosts")
    return Distribution(count, count, job.hosts, job.system == "Slurm", decided_by, _source(job), slots)


def _with_slots(hosts: Sequence[str]) -> Tuple[Tuple[str, ...], Optional[int]]:
    names, counts = [], set()
    for host in hosts:
        match = re.fullmatch(f"({allocation.HOST})(?::([1-9][0-9]*))?", host)
        if not match:
            file = "; the hosts of a file are --hosts=$(sort -u FILE | paste -sd,)" if "/" in host else ""
            raise FlagError(f"--hosts: '{host}' is not a host; write names, or NAME:SLOTS, separated by commas{file}")
        names.append(match[1])
        counts.add(int(match[2]) if match[2] else None)
    if len(counts) > 1:
        raise FlagError(
            "--hosts: the hosts have unequal numbers of slots, but all ranks wait for the fullest host; "
            "give each the same number"
        )
    if len(set(names)) < len(names):
        raise FlagError("--hosts: a host is named twice; write NAME:SLOTS for several ranks on it")
    return tuple(names), counts.pop()


def _shared_out(ranks: Optional[int], most: Distribution, hosts: int, room: str) -> Distribution:
    """Return `ranks` ranks, evenly on as few hosts as hold them.

    Each of `hosts` hosts has room for `most.per_host` ranks; `room` says so in an error.
    """
    slots = most.per_host
    ranks = ranks or slots * hosts
    if ranks > slots * hosts:
        raise FlagError(f"--ranks={ranks}: more ranks than slots: {room}; ask for fewer ranks, or for more hosts")
    needed = -(-ranks // slots)
    if ranks % needed:
        raise FlagError(
            f"--ranks={ranks}: cannot be distributed evenly: {room}; give a multiple of {slots}, or at most {slots}"
        )
    decided_by = most.decided_by if ranks // needed == slots else f"--ranks={ranks}"
    return most._replace(ranks=ranks, per_host=ranks // needed, hosts=most.hosts[:needed], decided_by=decided_by)


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"
