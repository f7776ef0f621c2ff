"""The command lines that start the ranks, against golden text, and how ranks are distributed over hosts."""

import dataclasses
import shlex

import pytest

from resnet_cpu.cluster import launchers
from resnet_cpu.cluster.launchers import RankMap
from resnet_cpu.errors import FlagError

COMMAND = ["python", "-m", "resnet_cpu.train", "--flagfile=my experiments/a.flags"]
SET = {"OMP_NUM_THREADS": "22", "LD_PRELOAD": "/usr/lib/libtcmalloc_minimal.so.4"}
OUTSIDE = {
    "PATH": "/sw/bin:/bin",
    "LD_LIBRARY_PATH": "/sw/lib",
    "KMP_BLOCKTIME": "0",
    "HOME": "/home/x",
    "SECRET_KEY": "x",
}
HERE = RankMap(ranks=2, per_host=2, cores=1, yields=True, as_root=True)
SHARED = RankMap(ranks=4, per_host=4, cores=1, bound=False, yields=True)
NODES = RankMap(ranks=8, per_host=2, cores=24, cpus_per_core=2, hosts=("n1", "n2", "n3", "n4"))
WIRED = RankMap(ranks=2, per_host=1, cores=8, hosts=("a", "b"), interface="eth1", agent="/sw/enter", yields=True)
FEW = RankMap(ranks=3, per_host=2, cores=4, cpus_per_core=2, hosts=("n1", "n2"), in_batch_job=True, bound=False)
BATCH = RankMap(ranks=128, per_host=2, cores=24, in_batch_job=True)

TRAIN = "python -m resnet_cpu.train '--flagfile=my experiments/a.flags'"
MPIRUN = "mpirun --mca orte_execute_quiet 1"
OMPI = "-x OMP_NUM_THREADS=22 -x LD_PRELOAD=/usr/lib/libtcmalloc_minimal.so.4 -x RESNET_CPU_RANKS="
HYDRA = "-genv OMP_NUM_THREADS 22 -genv LD_PRELOAD /usr/lib/libtcmalloc_minimal.so.4 -genv RESNET_CPU_RANKS "
ENV = "OMP_NUM_THREADS=22 LD_PRELOAD=/usr/lib/libtcmalloc_minimal.so.4 RESNET_CPU_RANKS="
NAMES = "-x KMP_BLOCKTIME -x LD_LIBRARY_PATH -x PATH"
LIST = "-genvlist KMP_BLOCKTIME,LD_LIBRARY_PATH,PATH"
PARTS = "OMPI_MCA_btl_tcp_flags=send,inplace,need-ack,need-csum,hetero-rdma OMPI_MCA_btl_tcp_max_send_size=524288"
BETWEEN = (
    "--mca oob_tcp_keepalive_time 10 --mca oob_tcp_keepalive_intvl 5 --mca oob_tcp_keepalive_probes 3 "
    "--mca btl_tcp_flags send,inplace,need-ack,need-csum,hetero-rdma --mca btl_tcp_max_send_size 524288"
)
AWAY = f"--mca btl_tcp_if_exclude lo,docker0,virbr0 --mca oob_tcp_if_exclude lo,docker0,virbr0 {BETWEEN}"
MV2 = "-genv MV2_ENABLE_AFFINITY 0"
INTEL = "-genv I_MPI_PIN_DOMAIN 48:compact"
HYDRA_INTEL = "env I_MPI_JOB_RESPECT_PROCESS_PLACEMENT=0 mpiexec.hydra"
SRUN = "srun --mpi=pmix --export=ALL --kill-on-bad-exit=1"
PINS = "MV2_ENABLE_AFFINITY=0 I_MPI_PIN_DOMAIN=24:compact"

GOLDEN = [
    (
        "openmpi",
        HERE,
        f"{MPIRUN} -np 2 --map-by slot:PE=1 --bind-to core --mca mpi_yield_when_idle 1 --mca btl self,vader "
        f"--mca pml ob1 --allow-run-as-root {OMPI}2 {TRAIN}",
    ),
    (
        "openmpi",
        SHARED,
        f"{MPIRUN} -np 4 --oversubscribe --bind-to none --mca mpi_yield_when_idle 1 --mca btl self,vader "
        f"--mca pml ob1 {OMPI}4 {TRAIN}",
    ),
    (
        "openmpi",
        dataclasses.replace(HERE, slots_counted=True, in_batch_job=True),
        f"{MPIRUN} -np 2 --oversubscribe --map-by ppr:2:node:PE=1 --bind-to core --mca mpi_yield_when_idle 1 "
        f"--mca btl self,vader --mca pml ob1 --allow-run-as-root {OMPI}2 {TRAIN}",
    ),
    (
        "openmpi",
        dataclasses.replace(HERE, hosts=("a",), elsewhere=True),
        f"{MPIRUN} -np 2 --host a:2 --map-by slot:PE=1 --bind-to core --mca mpi_yield_when_idle 1 "
        "--mca btl self,vader --mca pml ob1 --mca oob_tcp_if_exclude lo,docker0,virbr0 --mca oob_tcp_keepalive_time 10 "
        "--mca oob_tcp_keepalive_intvl 5 --mca oob_tcp_keepalive_probes 3 --allow-run-as-root "
        f"{OMPI}2 {NAMES} {TRAIN}",
    ),
    (
        "openmpi",
        NODES,
        f"{MPIRUN} -np 8 --host n1:2,n2:2,n3:2,n4:2 --map-by ppr:2:node:PE=24 --bind-to core {AWAY} "
        f"{OMPI}8 {NAMES} {TRAIN}",
    ),
    (
        "openmpi",
        WIRED,
        f"{MPIRUN} -np 2 --host a:1,b:1 --map-by ppr:1:node:PE=8 --bind-to core --mca mpi_yield_when_idle 1 "
        "--mca btl_tcp_if_include eth1 --mca oob_tcp_if_include eth1 "
        f"{BETWEEN} --mca plm_rsh_agent /sw/enter {OMPI}2 {NAMES} {TRAIN}",
    ),
    (
        "openmpi",
        BATCH,
        f"{MPIRUN} -np 128 --map-by ppr:2:node:PE=24 --bind-to core {AWAY} {OMPI}128 {NAMES} {TRAIN}",
    ),
    ("intel", NODES, f"{HYDRA_INTEL} -n 8 -ppn 2 -hosts n1,n2,n3,n4 {INTEL} {HYDRA}8 {LIST} {TRAIN}"),
    (
        "intel",
        WIRED,
        f"{HYDRA_INTEL} -n 2 -ppn 1 -hosts a,b -iface eth1 -launcher rsh -launcher-exec /sw/enter "
        f"-genv I_MPI_THREAD_YIELD 2 -genv I_MPI_PIN_DOMAIN 8:compact {HYDRA}2 {LIST} {TRAIN}",
    ),
    (
        "intel",
        SHARED,
        f"{HYDRA_INTEL} -n 4 -ppn 4 -genv I_MPI_THREAD_YIELD 2 -genv I_MPI_PIN 0 {HYDRA}4 {TRAIN}",
    ),
    ("mpich", NODES, f"mpiexec -n 8 -ppn 2 -hosts n1,n2,n3,n4 {MV2} {HYDRA}8 {LIST} -bind-to core:24 {TRAIN}"),
    ("mpich", SHARED, f"mpiexec -n 4 -ppn 4 {MV2} {HYDRA}4 -bind-to none {TRAIN}"),
    ("ibrun", BATCH, f"env {PINS} {ENV}128 ibrun -n 128 -o 0 {TRAIN}"),
    (
        "srun",
        BATCH,
        f"env {PARTS} {ENV}128 {SRUN} --nodes=64 --ntasks=128 --ntasks-per-node=2 "
        f"--distribution=block:block --cpus-per-task=24 --cpu-bind=cores {TRAIN}",
    ),
    (
        "srun",
        FEW,
        f"env {PARTS} {ENV}3 {SRUN} --nodes=2 --ntasks=3 --ntasks-per-node=2 "
        f"--nodelist=n1,n2 --distribution=block:block --cpus-per-task=8 --overcommit --cpu-bind=none {TRAIN}",
    ),
    ("ibrun", FEW, f"env MV2_ENABLE_AFFINITY=0 I_MPI_PIN=0 {ENV}3 ibrun -n 3 -o 0 {TRAIN}"),
    (
        "mpich",
        WIRED,
        f"mpiexec -n 2 -ppn 1 -hosts a,b -iface eth1 -launcher rsh -launcher-exec /sw/enter {MV2} "
        f"{HYDRA}2 {LIST} -bind-to core:8 {TRAIN}",
    ),
    (
        "openmpi",
        FEW,
        f"{MPIRUN} -np 3 --host n1:2,n2:2 --oversubscribe --map-by ppr:2:node --bind-to none {AWAY} {OMPI}3 {NAMES} "
        f"{TRAIN}",
    ),
]  # fmt: skip


@pytest.mark.parametrize("launcher, rank_map, expected", GOLDEN)
def test_lines(launcher, rank_map, expected):
    line = launchers.line(launcher, rank_map, SET, OUTSIDE, COMMAND)
    assert shlex.join(line) == expected
    assert line[-len(COMMAND) :] == COMMAND  # unchanged, whatever it contains


def test_every_launcher_has_a_golden_line_and_secrets_are_not_passed():
    assert {launcher for launcher, _, _ in GOLDEN} == set(launchers.LINES)
    for launcher, rank_map, _ in GOLDEN:
        line = launchers.line(launcher, rank_map, SET, OUTSIDE, COMMAND)
        assert "SECRET_KEY" not in " ".join(line) and "horovodrun" not in line


def test_exported_settings_of_open_mpi_are_kept():
    mine = {
        "APPTAINERENV_HOST_MPI": "/m",
        "OMPI_MCA_btl_tcp_if_include": "ib0",
        "OMPI_MCA_btl_tcp_flags": "1",
        "OMPI_MCA_oob_tcp_keepalive_time": "7",
    }
    line = " ".join(launchers.line("openmpi", NODES, SET, mine, COMMAND))
    assert "btl_tcp_if" not in line and "--mca oob_tcp_if_exclude lo" in line
    assert "-x APPTAINERENV_HOST_MPI" in line  # for a container on another host
    assert "--mca btl_tcp_flags 1" in line and "oob_tcp_keepalive_time 7" in line
    assert "btl_tcp_flags" not in " ".join(launchers.line("srun", BATCH, SET, mine, COMMAND))


@pytest.mark.parametrize(
    "name", ["RESNET_CPU_KEEP", "RESNET_CPU_KERNELS_ISA", "XLA_FLAGS", "GOMP_SPINCOUNT", "ONEDNN_MAX_CPU_ISA"]
)
def test_what_decides_the_arithmetic_reaches_ranks_on_other_hosts(name):
    """Fault: RESNET_CPU_KEEP reached the ranks of this host only, so that one job computed in two precisions."""
    for launcher, passed in (("openmpi", f"-x {name}"), ("intel", f"-genvlist {name}"), ("mpich", f"-genvlist {name}")):
        assert passed in " ".join(launchers.line(launcher, NODES, SET, {name: "1"}, COMMAND))
    assert name not in " ".join(launchers.line("openmpi", HERE, SET, {name: "1"}, COMMAND))  # inherited


def test_srun_does_not_count_hyper_threads_if_the_job_excludes_them():
    threaded = dataclasses.replace(BATCH, cpus_per_core=2)
    for hint, cpus in (({}, 48), ({"SLURM_HINT": "nomultithread"}, 24)):
        assert f"--cpus-per-task={cpus}" in launchers.line("srun", threaded, SET, hint, COMMAND)


def test_srun_needs_a_batch_job():
    with pytest.raises(FlagError, match="not inside a job of Slurm"):
        launchers.line("srun", HERE, SET, OUTSIDE, COMMAND)


@pytest.mark.parametrize(
    "version, batch, ibrun, srun, expected",
    [
        ("mpirun (Open MPI) 4.1.4\n\nReport bugs to ...", False, False, False, "openmpi"),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.11 Build 20231005", True, False, True, "intel"),
        ("HYDRA build details:\n    Version:   4.0.2", False, False, False, "mpich"),
        ("mpirun (Open MPI) 4.1.4", True, True, True, "ibrun"),
        ("mpirun (Open MPI) 4.1.4", False, True, True, "openmpi"),  # ibrun needs a batch job
        (None, True, False, True, "srun"),
    ],
)
def test_the_launcher_is_recognised_by_its_version(version, batch, ibrun, srun, expected):
    assert launchers.recognise(version, batch, ibrun, srun) == expected


@pytest.mark.parametrize("version, part", [(None, "no mpirun in PATH"), ("my mpi 3", "my mpi 3"), ("", "nothing")])
def test_an_unknown_launcher_is_refused(version, part):
    with pytest.raises(FlagError, match=part):
        launchers.recognise(version, False, True, True)


JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "4"}
ONE_TASK = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS": "1"}
UNEQUAL = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_NTASKS": "8", "SLURM_TASKS_PER_NODE": "6,2"}
LSF = {"LSB_JOBID": "7", "LSB_MCPU_HOSTS": "n1 2 n2 2"}


@pytest.mark.parametrize(
    "environ, hosts, ranks, per_node, expected",
    [
        ({}, [], None, None, (4, 4, (), False)),
        ({}, [], 2, None, (2, 2, (), False)),
        ({}, [], None, 3, (3, 3, (), False)),
        ({}, ["a", "b"], None, None, (8, 4, ("a", "b"), False)),
        ({}, ["a:2", "b:2"], None, None, (4, 2, ("a", "b"), False)),
        ({}, ["a:2", "b:2"], 2, None, (2, 2, ("a",), False)),
        ({}, ["a:2", "b:2"], 2, 1, (2, 1, ("a", "b"), False)),
        ({**JOB, "SLURM_NTASKS_PER_NODE": "2"}, [], None, None, (8, 2, (), True)),
        ({**JOB, "SLURM_NTASKS": "8"}, [], None, None, (8, 2, (), True)),
        (JOB, [], None, None, (16, 4, (), True)),
        (JOB, [], None, 2, (8, 2, (), True)),
        ({**JOB, "SLURM_NTASKS_PER_NODE": "2"}, [], 1, None, (1, 1, (), True)),
        (ONE_TASK, [], None, None, (1, 1, (), True)),
        (ONE_TASK, [], 2, None, (2, 2, (), True)),  # on one host the cores decide
        (ONE_TASK, [], None, 3, (3, 3, (), True)),
        ({"SLURM_JOB_ID": "7", "SLURM_NNODES": "1"}, [], None, None, (4, 4, (), True)),
        (LSF, [], None, None, (4, 2, ("n1", "n2"), False)),
        (LSF, [], 2, None, (2, 2, ("n1",), False)),
        (LSF, [], None, 1, (2, 1, ("n1", "n2"), False)),
        (LSF, ["a:3"], None, None, (3, 3, ("a",), False)),
        (LSF, ["localhost"], None, None, (4, 4, ("localhost",), False)),
        ({"LSB_MCPU_HOSTS": "n1 1"}, [], 2, None, (2, 2, ("n1",), False)),
        ({"LSB_MCPU_HOSTS": "n1 3 n2 2"}, [], None, 2, (4, 2, ("n1", "n2"), False)),
        (JOB, ["a:2", "b:2"], None, None, (4, 2, ("a", "b"), True)),
        (UNEQUAL, [], None, 2, (4, 2, (), True)),
    ],
)
def test_ranks_are_distributed_over_hosts(environ, hosts, ranks, per_node, expected):
    assert launchers.distribute(environ, hosts, ranks, per_node, default=4)[:4] == expected


@pytest.mark.parametrize(
    "environ, hosts, ranks, per_node, parts",
    [
        ({}, ["a:2", "b:2"], 5, None, ["--ranks=5", "more ranks than slots", "2 hosts x 2 slots"]),
        ({}, ["a:2", "b:2"], 4, 1, ["--ranks=4", "more ranks than slots", "--ranks_per_node=1"]),
        ({}, ["a", "b"], 9, None, ["--ranks=9", "2 hosts x 4 slots (--ranks_per_node=auto)"]),
        ({}, ["a:2", "b:2"], None, 3, ["--ranks_per_node=3", "more ranks than slots", "2 slots"]),
        ({}, ["a:2", "b:3"], None, None, ["unequal"]),
        ({}, ["a", "a"], None, None, ["twice"]),
        ({}, ["-oProxyCommand=x"], None, None, ["is not a host"]),
        ({}, ["a;touch x"], None, None, ["is not a host"]),
        ({}, ["a:0"], None, None, ["is not a host"]),
        ({}, [], 4, 2, ["--ranks=4", "--ranks_per_node=2"]),
        ({}, ["a:2", "b:2"], 3, None, ["--ranks=3", "evenly"]),
        ({**JOB, "SLURM_NTASKS_PER_NODE": "2"}, [], 9, None, ["--ranks=9", "4 nodes x 2 tasks"]),
        ({**JOB, "SLURM_NTASKS_PER_NODE": "2"}, [], None, 3, ["--ranks_per_node=3", "--ntasks-per-node=3"]),
        (LSF, [], 5, None, ["--ranks=5", "2 hosts x 2 slots"]),
        (LSF, [], None, 3, ["--ranks_per_node=3", "2 slots per host; submit with 3 slots per host"]),
        ({"LSB_MCPU_HOSTS": "n1 3 n2 2"}, [], None, None, ["n2: 2, n1: 3", "--ranks_per_node=1, up to 2", "--hosts="]),
        ({"LSB_MCPU_HOSTS": "n1 3 n2 2"}, [], 4, None, ["unequal"]),
        (UNEQUAL, [], None, None, ["SLURM_TASKS_PER_NODE=6,2: ", "--ntasks-per-node=2", "--ranks_per_node=1, up to 2"]),
        (UNEQUAL, [], None, 3, ["--ranks_per_node=3", "2 tasks per node"]),
        ({"LSB_MCPU_HOSTS": "n1 3 n2 2"}, [], None, 3, ["--ranks_per_node=3", "2 slots"]),
        (ONE_TASK, [], 3, 2, ["--ranks=3", "--ranks_per_node=2", "one host of the batch job"]),
        ({"SLURM_JOB_ID": "7"}, [], None, None, ["SLURM_JOB_NUM_NODES", "--hosts="]),
        ({"PBS_JOBID": "7"}, [], 2, None, ["PBS_NODEFILE", "--hosts="]),
        ({}, ["/tmp/hosts"], None, None, ["'/tmp/hosts' is not a host", "$(sort -u FILE | paste -sd,)"]),
    ],
)
def test_ranks_that_cannot_be_distributed_are_refused(environ, hosts, ranks, per_node, parts):
    with pytest.raises(FlagError) as caught:
        launchers.distribute(environ, hosts, ranks, per_node, default=4)
    assert all(part in str(caught.value) for part in parts), caught.value


@pytest.mark.parametrize(
    "environ, hosts, ranks, per_node, expected",
    [
        ({}, [], None, None, "auto"),
        ({}, [], 3, None, "--ranks=3"),
        ({}, [], None, 3, "--ranks_per_node=3"),
        ({}, [], 2, 3, "--ranks=2"),
        ({}, ["a:2", "b:2"], None, None, "--hosts=...:2"),
        ({}, ["a:2", "b:2"], 1, None, "--ranks=1"),
        ({}, ["a", "b"], None, 5, "--ranks_per_node=5"),
        ({}, ["a", "b"], None, None, "auto"),
        ({**JOB, "SLURM_NTASKS_PER_NODE": "2"}, [], None, None, "--ntasks-per-node=2 of the batch job"),
        (ONE_TASK, [], None, None, "--ntasks-per-node=1 of the batch job"),
        (ONE_TASK, [], 2, None, "--ranks=2"),
        (LSF, [], None, None, "2 slots per host of the batch job"),
        (LSF, [], None, 1, "--ranks_per_node=1"),
        (JOB, [], None, None, "auto"),
    ],
)
def test_what_decided_the_number_of_ranks_is_named(environ, hosts, ranks, per_node, expected):
    """Fault: "more ranks than cores" named --ranks_per_node, which the user had not typed."""
    assert launchers.distribute(environ, hosts, ranks, per_node, default=4).decided_by == expected


@pytest.mark.parametrize(
    "environ, hosts, part",
    [
        ({}, [], "no batch job, no --hosts"),
        (JOB, ["a"], "--hosts"),
        (JOB, [], "Slurm, SLURM_JOB_NODELIST"),
        (LSF, [], "LSF, LSB_MCPU_HOSTS=n1 2 n2 2"),
        ({"LSB_MCPU_HOSTS": "batch 1 n1 2 n2 2"}, [], "; batch is left out as the launch node"),
    ],
)
def test_where_the_hosts_come_from_is_named(environ, hosts, part):
    assert part in launchers.distribute(environ, hosts, None, None, default=4).source
