"""The line that starts the ranks, for each launcher: from a placement to words. Nothing is run here.

Horovod's own launcher is never among them: its rendezvous server unpickles what it is sent (CVE-2024-10190).
"""

import dataclasses
import re
from typing import Callable, Dict, List, Mapping, Optional, Sequence, Tuple

from resnet_cpu.errors import FlagError

EXPECTED_RANKS = "RESNET_CPU_RANKS"  # tells every rank how many were asked for
# What a rank on another host is given of this shell's environment, besides what the layout sets.
_PASSED = re.compile(
    r"(PATH|LD_LIBRARY_PATH|LD_PRELOAD|PYTHONPATH|TMPDIR|(OMP|KMP|TF|ITEX|ONEDNN|DNNL|HOROVOD|MALLOC|TCMALLOC|PYTHON"
    r"|UCX|PSM2|FI|I_MPI|MPICH|MPIR|MV2|APPTAINERENV|SINGULARITYENV)_\w+)"
)
# Bridges of containers and virtual machines have the same address on every host, and lead nowhere.
_LOCAL_INTERFACES = "lo,docker0,virbr0"
# What Open MPI over several hosts is told, unless OMPI_MCA_<name> is exported.
_DAEMONS = {
    # A lost host is noticed after 25 s, not after a quarter of an hour. Only the line reaches other hosts' daemons.
    "oob_tcp_keepalive_time": "10",
    "oob_tcp_keepalive_intvl": "5",
    "oob_tcp_keepalive_probes": "3",
}
IN_PARTS = {
    # Over TCP a large message is handed over as a whole by default (`put`). A rank whose partner comes late then sends
    # all of its own before it answers, and the two messages of an exchange go one after the other: an allreduce of
    # 34 MB on 3 hosts took 4.0 times the message instead of 3.1 (docs/network_lab.md). So it goes in parts of 512 KiB.
    "btl_tcp_flags": "send,inplace,need-ack,need-csum,hetero-rdma",
    "btl_tcp_max_send_size": "524288",
}


@dataclasses.dataclass(frozen=True)
class Placement:
    """Which ranks go where."""

    ranks: int
    per_host: int
    cores: int  # physical ones a rank
    cpus_per_core: int = 1  # hyper-threads that the system shows
    hosts: Tuple[str, ...] = ()  # empty: this machine, or those of the batch job
    in_batch_job: bool = False
    bound: bool = True  # False: more ranks than cores, which then share them
    yields: bool = False  # a waiting rank gives its core away
    interface: Optional[str] = None  # network interface for TCP; None: the launcher's choice
    agent: Optional[str] = None  # what starts a process on another host instead of ssh
    as_root: bool = False

    @property
    def several_hosts(self) -> bool:
        return self.ranks > self.per_host or len(self.hosts) > 1


Line = List[str]


def line(
    launcher: str,
    placement: Placement,
    environment: Mapping[str, str],
    outside: Mapping[str, str],
    command: Sequence[str],
) -> Line:
    """Return the words that start `command` on every rank, with `environment` set there.

    `outside` is the environment of this shell, of which other hosts are given what matters.
    """
    given = {**environment, EXPECTED_RANKS: str(placement.ranks)}
    return [*LINES[launcher](placement, given, outside), *command]


def _passed(placement: Placement, environment: Mapping[str, str], outside: Mapping[str, str]) -> List[str]:
    if not placement.several_hosts:
        return []  # ranks of this machine inherit everything
    return sorted(name for name in outside if _PASSED.fullmatch(name) and name not in environment)


def _open_mpi(placement: Placement, environment: Dict[str, str], outside: Mapping[str, str]) -> Line:
    words = ["mpirun", "--quiet", "-np", str(placement.ranks)]
    if placement.hosts:
        words += ["--host", ",".join(f"{host}:{placement.per_host}" for host in placement.hosts)]
    if not placement.bound:
        words += ["--oversubscribe", "--bind-to", "none"]
    elif placement.several_hosts:
        words += ["--map-by", f"ppr:{placement.per_host}:node:PE={placement.cores}", "--bind-to", "core"]
    else:
        words += ["--map-by", f"slot:PE={placement.cores}", "--bind-to", "core"]
    if placement.yields:
        words += ["--mca", "mpi_yield_when_idle", "1"]
    if not placement.several_hosts:  # shared memory only: no network is looked for
        words += ["--mca", "btl", "self,vader", "--mca", "pml", "ob1"]
    else:
        for layer in ("btl", "oob"):
            if placement.interface:
                words += ["--mca", f"{layer}_tcp_if_include", placement.interface]
            elif not any(f"OMPI_MCA_{layer}_tcp_if_{which}" in outside for which in ("include", "exclude")):
                words += ["--mca", f"{layer}_tcp_if_exclude", _LOCAL_INTERFACES]
        for name, value in {**_DAEMONS, **IN_PARTS}.items():
            words += ["--mca", name, outside.get(f"OMPI_MCA_{name}", value)]
    if placement.agent:
        words += ["--mca", "plm_rsh_agent", placement.agent]
    if placement.as_root:
        words += ["--allow-run-as-root"]
    for name, value in environment.items():
        words += ["-x", f"{name}={value}"]
    for name in _passed(placement, environment, outside):
        words += ["-x", name]
    return words


def _hydra(placement: Placement, environment: Dict[str, str], outside: Mapping[str, str]) -> Line:
    words = ["-n", str(placement.ranks), "-ppn", str(placement.per_host)]
    if placement.hosts:
        words += ["-hosts", ",".join(placement.hosts)]
    if placement.interface:
        words += ["-iface", placement.interface]
    if placement.agent:
        words += ["-launcher", "rsh", "-launcher-exec", placement.agent]
    for name, value in environment.items():
        words += ["-genv", name, value]
    names = _passed(placement, environment, outside)
    if names:
        words += ["-genvlist", ",".join(names)]
    return words


def _intel_pinning(placement: Placement) -> Dict[str, str]:
    """Return a domain of so many logical processors a rank, one after the other."""
    if not placement.bound:
        return {"I_MPI_PIN": "0"}
    return {"I_MPI_PIN_DOMAIN": f"{placement.cores * placement.cpus_per_core}:compact"}


def _intel_mpi(placement: Placement, environment: Dict[str, str], outside: Mapping[str, str]) -> Line:
    given = {**_intel_pinning(placement), **environment}
    if placement.yields:
        given = {"I_MPI_THREAD_YIELD": "2", **given}
    # The batch system would otherwise decide how many go on a host. Not mpirun: that is a shell, which USR1 ends before
    # it could hand it on.
    start = [*_env({"I_MPI_JOB_RESPECT_PROCESS_PLACEMENT": "0"}), "mpiexec.hydra"]
    return [*start, *_hydra(placement, given, outside)]


def _mpich(placement: Placement, environment: Dict[str, str], outside: Mapping[str, str]) -> Line:
    # MVAPICH2's own pinning would put all threads of a rank on one core, and takes MPI_THREAD_MULTIPLE away.
    given = {"MV2_ENABLE_AFFINITY": "0", **environment}
    binding = ["-bind-to", f"core:{placement.cores}"] if placement.bound else ["-bind-to", "none"]
    return ["mpiexec", *_hydra(placement, given, outside), *binding]


def _env(environment: Mapping[str, str]) -> Line:
    return ["env", *(f"{name}={value}" for name, value in environment.items())]


def _ibrun(placement: Placement, environment: Dict[str, str], outside: Mapping[str, str]) -> Line:
    # ibrun places ranks as the batch job asked (--ntasks-per-node) and passes the whole environment; which MPI is below
    # is the site's matter, so both kinds of pinning are told.
    pinning = {"MV2_ENABLE_AFFINITY": "0", **_intel_pinning(placement)}
    return [*_env({**pinning, **environment}), "ibrun", "-n", str(placement.ranks), "-o", "0"]


def _srun(placement: Placement, environment: Dict[str, str], outside: Mapping[str, str]) -> Line:
    if not placement.in_batch_job:
        raise FlagError("--mpi=srun: not inside a batch job; submit a launch/*.sbatch file, or call salloc first")
    cpus_per_core = 1 if outside.get("SLURM_HINT") == "nomultithread" else placement.cpus_per_core
    # Where the MPI below is another, nobody reads them.
    parts = {f"OMPI_MCA_{name}": value for name, value in IN_PARTS.items() if placement.several_hosts}
    return [
        *_env({**{name: value for name, value in parts.items() if name not in outside}, **environment}),
        "srun",
        "--mpi=pmix",
        "--kill-on-bad-exit=1",  # by default the other ranks would wait for a dead one for ever
        f"--nodes={-(-placement.ranks // placement.per_host)}",  # else few ranks are spread over all nodes of the job
        f"--ntasks={placement.ranks}",
        f"--ntasks-per-node={placement.per_host}",
        *([f"--nodelist={','.join(placement.hosts)}"] if placement.hosts else []),
        "--distribution=block:block",  # neighbouring ranks on one socket; by default sockets take turns
        f"--cpus-per-task={placement.cores * cpus_per_core}",
        *(["--cpu-bind=cores"] if placement.bound else ["--overcommit", "--cpu-bind=none"]),
    ]


LINES: Dict[str, Callable[[Placement, Dict[str, str], Mapping[str, str]], Line]] = {
    "openmpi": _open_mpi,
    "intel": _intel_mpi,
    "mpich": _mpich,
    "ibrun": _ibrun,
    "srun": _srun,
}


def recognise(version: Optional[str], in_batch_job: bool, has_ibrun: bool, has_srun: bool) -> str:
    """Return the launcher to use, from what `mpirun --version` printed (None: there is no mpirun)."""
    if in_batch_job and has_ibrun:
        return "ibrun"
    if version is None:
        if in_batch_job and has_srun:
            return "srun"
        raise FlagError("no mpirun in PATH; load your site's MPI module, or set up with make setup")
    for words, launcher in (("Open MPI", "openmpi"), ("OpenRTE", "openmpi"), ("Intel(R) MPI", "intel")):
        if words in version:
            return launcher
    if re.search("hydra|mpich|mvapich", version, re.IGNORECASE):
        return "mpich"
    first = version.strip().splitlines()[0] if version.strip() else "nothing"
    raise FlagError(f"mpirun --version says '{first}', which is no MPI known here; choose with --mpi=")


def place(
    environ: Mapping[str, str],
    hosts: Sequence[str],
    ranks: Optional[int],
    per_node: Optional[int],
    proposed: Callable[[Optional[int], bool], int],
) -> Tuple[int, int, Tuple[str, ...], bool]:
    """Return (ranks, ranks a host, hosts, whether inside a batch job).

    `hosts` are NAME or NAME:SLOTS. `proposed(wanted or None, several hosts)` returns the ranks a host that the layout
    proposes. Without hosts and outside a batch job all ranks are of this machine. Raises FlagError for more ranks than
    there are slots.
    """
    if hosts:
        names, slots = _with_slots(hosts)
        most = per_node or slots or proposed(None, len(names) > 1)
        if slots and per_node and per_node > slots:
            raise FlagError(f"--ranks_per_node={per_node}: --hosts gives {slots} slots a host; lower it")
        what = f"--hosts gives {len(names)} hosts x {most} slots"
        return _shared_out(ranks, most, names, len(names), what, "SLURM_JOB_ID" in environ)
    if "SLURM_JOB_ID" in environ and ("SLURM_JOB_NUM_NODES" in environ or "SLURM_NNODES" in environ):
        nodes = int(environ.get("SLURM_JOB_NUM_NODES") or environ["SLURM_NNODES"])
        asked = _tasks_per_node(environ, nodes)
        if asked and per_node and per_node > asked:
            raise FlagError(
                f"--ranks_per_node={per_node}: the batch job has {asked} tasks a node; submit with "
                f"--ntasks-per-node={per_node}"
            )
        most = per_node or asked or proposed(None, nodes > 1)
        return _shared_out(ranks, most, (), nodes, f"the batch job has {nodes} nodes x {most} tasks", True)
    if ranks and per_node and ranks > per_node:
        raise FlagError(
            f"--ranks={ranks}: --ranks_per_node={per_node} and one host give {per_node}; name --hosts, or leave one out"
        )
    count = ranks or per_node or proposed(None, False)
    return count, count, (), False


def _with_slots(hosts: Sequence[str]) -> Tuple[Tuple[str, ...], Optional[int]]:
    names, counts = [], set()
    for host in hosts:
        # A name that starts with a dash would be taken for an option by ssh and by mpirun.
        found = re.fullmatch(r"([A-Za-z0-9_][A-Za-z0-9_.-]*)(?::([1-9][0-9]*))?", host)
        if not found:
            raise FlagError(f"--hosts: '{host}' is no host; write names, or NAME:SLOTS, separated by commas")
        names.append(found[1])
        counts.add(int(found[2]) if found[2] else None)
    if len(counts) > 1:
        raise FlagError(
            "--hosts: the hosts have unequal slots; the ranks of a step would wait for each other: make them equal"
        )
    if len(set(names)) < len(names):
        raise FlagError("--hosts: a host is named twice; write NAME:SLOTS for more ranks on it")
    return tuple(names), counts.pop()


def _tasks_per_node(environ: Mapping[str, str], nodes: int) -> Optional[int]:
    if environ.get("SLURM_NTASKS_PER_NODE", "").isdigit():
        return int(environ["SLURM_NTASKS_PER_NODE"])
    if environ.get("SLURM_NTASKS", "").isdigit() and int(environ["SLURM_NTASKS"]) % nodes == 0:
        return int(environ["SLURM_NTASKS"]) // nodes
    return None


def _shared_out(
    ranks: Optional[int], per_host: int, names: Tuple[str, ...], hosts: int, what: str, in_batch_job: bool
) -> Tuple[int, int, Tuple[str, ...], bool]:
    ranks = ranks or per_host * hosts
    if ranks > per_host * hosts:
        raise FlagError(f"--ranks={ranks}: more ranks than slots: {what}; ask for fewer, or for more hosts")
    needed = -(-ranks // per_host)
    if ranks % needed:
        raise FlagError(
            f"--ranks={ranks}: do not share out evenly, {what}; take a multiple of {per_host}, or up to {per_host}"
        )
    return ranks, ranks // needed, names[:needed], in_batch_job
