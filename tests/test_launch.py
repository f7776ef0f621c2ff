"""Installing and launching: what is run and reported, with stand-ins for the machine and its programs."""

import dataclasses
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time

import psutil
import pytest
from conftest import OUTSIDE, ROOT

from resnet_cpu import launch
from resnet_cpu.cluster import launching, start
from resnet_cpu.cluster.machine import Cpu, Machine, Node, physical_cores
from resnet_cpu.diagnosis import examination
from resnet_cpu.errors import FlagError, OutputError, PeerLost

NEEDED = ["bash", "dirname", "head", "sed", "cat", "sha256sum", "sort", "timeout", "wc", "grep", "env"]


@pytest.fixture
def bare_machine(tmp_path):
    """A PATH of its own: the tools of a bare machine, and those that a test adds with `put`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in NEEDED:
        (folder / tool).symlink_to(shutil.which(tool))

    def put(name: str, script: str) -> None:
        (folder / name).write_text(f"#!{shutil.which('bash')}\n{script}\n")
        (folder / name).chmod(0o755)

    def run(command: str, *arguments: str, **more: str) -> subprocess.CompletedProcess:
        environment = {"PATH": str(folder), "HOME": str(tmp_path), "VENV": str(tmp_path / "venv"), **more}
        return subprocess.run(
            ["bash", str(ROOT / command), *arguments], env=environment, capture_output=True, text=True, timeout=60
        )

    return put, run


def test_a_missing_python_is_reported_in_one_line(bare_machine):
    put, run = bare_machine
    put("python3", "[[ $2 == 'import sys' ]] || echo 8")
    process = run("launch/install.sh")
    assert process.returncode == 1 and process.stdout == ""
    (line,) = process.stderr.splitlines()
    assert "no Python 3.9 - 3.13" in line and "PYTHON=" in line


def test_without_root_the_missing_packages_are_listed(bare_machine):
    put, run = bare_machine
    put("python3", "echo 11")
    put("id", "echo 1000")
    put("cmake", "exit 0")
    process = run("launch/install.sh")
    assert process.returncode == 1
    (line,) = process.stderr.splitlines()
    for package in ("openmpi-bin", "libopenmpi-dev", "g++"):
        assert package in line
    assert "cmake" not in line


INSTALLED = """\
if [[ "$1 $2" == "-m venv" ]]; then mkdir -p "$VENV/bin"; cp "$0" "$VENV/bin/python"; fi
echo 11
"""


@pytest.fixture
def without_compiler(bare_machine):
    """A machine with MPI, without g++, cmake, make and root, on which every call of Python succeeds."""
    put, run = bare_machine
    put("python3", INSTALLED)
    for name, script in (("id", "echo 1000"), ("mpirun", "echo mpirun 4"), ("mpicxx", "echo g++"), ("uname", "echo x")):
        put(name, script)
    put("mkdir", f'{shutil.which("mkdir")} "$@"')
    for tool in ("cp", "rm", "cut"):
        put(tool, f'{shutil.which(tool)} "$@"')
    return put, lambda: run("launch/install.sh", RAW_DIR="/raw")


def test_without_a_compiler_all_but_horovod_is_installed_and_a_warning_says_so(without_compiler, tmp_path):
    process = without_compiler[1]()
    assert process.returncode == 0, process.stderr
    warning, ready = process.stderr.splitlines()[-2:]
    assert "warning: g++ was not found" in warning and "one rank only" in warning and "ready" in ready
    again = without_compiler[1]()
    assert (again.returncode, again.stderr) == (0, "")


def test_an_mpirun_that_does_not_run_is_reported_in_one_line(without_compiler):
    """Fault: the installation ended without a word."""
    put, install = without_compiler
    put("mpirun", "echo libpmix.so.2: cannot open >&2; exit 127")
    process = install()
    (line,) = process.stderr.splitlines()
    assert process.returncode == 1 and "/mpirun does not run: libpmix.so.2: cannot open; load another" in line


def test_what_was_built_with_a_compiler_is_complete_without_it(without_compiler, tmp_path):
    without_compiler[1]()
    stamp = tmp_path / "venv" / "installed"
    stamp.write_text(stamp.read_text() + "compiled\n")
    process = without_compiler[1]()
    assert (process.returncode, process.stderr) == (0, "")
    stamp.write_text("of another lock\n")
    assert "warning" in without_compiler[1]().stderr


@pytest.mark.parametrize(
    "minor, environ, venv",
    [
        (9, {}, ".venv-intel"),
        (11, {}, ".venv-intel"),
        (11, {"STACK": "current"}, ".venv-current"),
        (12, {}, ".venv-current"),
        (13, {"PYTHON": "python3"}, ".venv-current"),
        (13, {"VENV": "/a/venv"}, "/a/venv"),
    ],
)
def test_the_stack_follows_from_the_python_unless_it_is_named(bare_machine, minor, environ, venv):
    put, run = bare_machine
    put("python3", f"echo {minor}")
    assert run("launch/install.sh", "--venv", **{"VENV": "", **environ}).stdout == f"{venv}\n"


@pytest.mark.parametrize(
    "minor, environ, part",
    [
        (12, {"STACK": "intel"}, "no Python 3.9 - 3.13 found for STACK=intel"),
        (12, {"STACK": "intel", "PYTHON": "python3"}, "PYTHON=python3 is Python 3.12, STACK=intel: intel needs"),
        (8, {"PYTHON": "python3"}, "PYTHON=python3 is Python 3.8: intel needs Python 3.9 - 3.11"),
        (11, {"STACK": "newest"}, "STACK=newest: choose intel"),
        (11, {"PYTHON": "/no/python"}, "PYTHON=/no/python does not run"),
    ],
)
def test_a_stack_or_a_python_that_does_not_fit_is_reported_in_one_line(bare_machine, minor, environ, part):
    put, run = bare_machine
    put("python3", f"echo {minor}")
    process = run("launch/install.sh", "--venv", **environ)
    assert process.returncode == 1 and process.stdout == ""
    (line,) = process.stderr.splitlines()
    assert part in line, line


@pytest.mark.parametrize("arguments", [[], ["2"], ["0", "true"], ["two", "true"], ["-1", "true"]])
def test_local_prints_its_usage(bare_machine, arguments):
    process = bare_machine[1]("launch/local.sh", *arguments)
    assert process.returncode == 64 and "usage:" in process.stderr


def test_local_passes_all_words_unchanged(bare_machine):
    put, run = bare_machine
    put("python", 'printf "<%s>" "$RESNET_CPU_OVERSUBSCRIBE" "$@"')
    process = run("launch/local.sh", "3", "python", "a b", "$(touch x)", "--", "-n")
    assert process.returncode == 0, process.stderr
    given = ["1", "-m", "resnet_cpu.launch", "--ranks=3", "--", "python", "a b", "$(touch x)", "--", "-n"]
    assert process.stdout == "".join(f"<{word}>" for word in given)


@pytest.fixture
def starts(bare_machine, monkeypatch, tmp_path):
    """Call `launch` on two cores with stand-ins in PATH; return the command line that it became."""
    put, _ = bare_machine
    put("mpirun", "echo 'mpirun (Open MPI) 4.1.4'")
    prefixes = ("SLURM", "PBS_", "LSB_", "OMP_", "TF_", "KMP_", "HOROVOD_", "LD_PRELOAD", "RESNET_CPU_")
    for name in [name for name in os.environ if name.startswith(prefixes)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(launching.machine, "read", lambda: TWO_CORES)
    monkeypatch.setattr(launching.tuning, "fastest", lambda host: None)
    lines = []
    monkeypatch.setattr(launching.os, "execvp", lambda name, line: lines.append(line))
    monkeypatch.setattr(launching.start, "follow", lines.append)

    def become(*arguments):
        launch.main(list(arguments))
        return lines[-1] if lines else None

    return become


CORES = tuple(Cpu(id=n, core=n, socket=0, node=0, cache=0, siblings=(n,)) for n in range(2))
TWO_CORES = Machine("", (), CORES, (Node(0, (0, 1), 0),), (0, 1), root="/nowhere")


def test_launch_becomes_the_launcher_and_gives_its_reasons(starts, capsys):
    line = starts("--ranks=2", "--", "cat", "$(touch x)", "--ranks=9")
    assert line[:9] == ["mpirun", "--mca", "orte_execute_quiet", "1", "-np", "2", "--map-by", "slot:PE=1", "--bind-to"]
    assert line[-3:] == ["cat", "$(touch x)", "--ranks=9"] and "RESNET_CPU_RANKS=2" in line
    printed = capsys.readouterr().err
    assert "launch: ranks: 2 (" in printed and "launch: threads: 1 (" in printed and "'$(touch x)'" in printed


def test_a_dry_run_prints_the_line_and_starts_nothing(starts, capsys):
    assert starts("--ranks=2", "--dry_run", "--", "no-such-command") is None
    assert shlex.split(capsys.readouterr().out)[:6] == ["mpirun", "--mca", "orte_execute_quiet", "1", "-np", "2"]


@pytest.mark.parametrize(
    "launcher, first",
    [
        ("openmpi", "mpirun --mca orte_execute_quiet 1 -np 4 --map-by ppr:2:node:PE=1"),
        ("intel", "env I_MPI_JOB_RESPECT_PROCESS_PLACEMENT=0 mpiexec.hydra -n 4 -ppn 2"),
        ("mpich", "mpiexec -n 4 -ppn 2"),
        ("ibrun", "env MV2_ENABLE_AFFINITY=0"),
        ("srun", "env OMPI_MCA_btl_tcp_flags=send,"),
    ],
)
def test_in_a_batch_job_every_launcher_gets_its_nodes_and_tasks(starts, monkeypatch, capsys, launcher, first):
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURMD_NODENAME": "n1"}
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    starts(f"--mpi={launcher}", "--dry_run", "--", "cat")
    line, printed = capsys.readouterr()
    assert line.startswith(first) and line.endswith(" cat\n") and "RESNET_CPU_RANKS" in line
    assert "warning" not in printed
    starts(f"--mpi={launcher}", "--ranks=2", "--dry_run", "--", "cat")  # fewer ranks fill fewer nodes
    line = capsys.readouterr().out
    assert launcher != "srun" or "--nodes=1 --ntasks=2 --ntasks-per-node=2" in line


def test_a_placement_that_does_not_fit_the_job_is_warned_of(starts, monkeypatch, capsys):
    starts("--hosts=elsewhere", "--dry_run", "--", "cat")
    assert "will run no rank" in capsys.readouterr().err
    starts(f"--hosts={socket.gethostname()}", "--dry_run", "--", "cat")
    assert "warning" not in capsys.readouterr().err
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS_PER_NODE": "1"}.items():
        monkeypatch.setenv(name, value)
    starts("--dry_run", "--", "cat")
    printed = capsys.readouterr().err
    assert "will run no rank" in printed  # as in the shell of salloc
    assert "1 tasks per node; for nodes of this type submit with --ntasks-per-node=2" in printed


def test_exported_variables_are_kept_and_reported(starts, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "9")
    assert not any(word.startswith("OMP_NUM_THREADS") for word in starts("--ranks=1", "--", "cat"))
    assert (
        "warning: OMP_NUM_THREADS=9 is set in your environment and overrides the proposed 2" in capsys.readouterr().err
    )
    monkeypatch.setenv("TF_NUM_INTRAOP_THREADS", "7")
    assert not any(word.startswith("TF_NUM_INTRAOP_THREADS") for word in starts("--ranks=1", "--", "cat"))
    assert "TF_NUM_INTRAOP_THREADS=5" in starts("--ranks=1", "--threads=5", "--", "cat")  # except for the flag


def test_a_variable_that_is_exported_and_empty_counts_as_absent(starts, monkeypatch):
    """Fault: `export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK` without --cpus-per-task was a traceback in the ranks."""
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    assert "OMP_NUM_THREADS=2" in starts("--ranks=1", "--", "cat")


@pytest.mark.parametrize(
    "exported, expected",
    [
        ("", "/lib/tc.so"),
        ("/sw/trace.so", "/lib/tc.so:/sw/trace.so"),
        ("/sw/trace.so:/lib/tc.so", "/sw/trace.so:/lib/tc.so"),
        ("/lib/tc.so /sw/trace.so", "/lib/tc.so /sw/trace.so"),
        ("/sw/lib/tc.so.4", "/lib/tc.so:/sw/lib/tc.so.4"),
    ],
)
def test_preloads_of_the_user_are_kept(starts, monkeypatch, exported, expected):
    """Fault: those of a user who preloads the allocator as well were dropped."""
    monkeypatch.setattr(launching.placement, "allocator", lambda root: "/lib/tc.so")
    monkeypatch.setenv("LD_PRELOAD", exported)
    assert f"LD_PRELOAD={expected}" in starts("--ranks=1", "--", "cat")


def test_an_exported_number_of_threads_is_reported_even_if_it_is_the_proposed_one(starts, monkeypatch, capsys):
    """Fault: it decided, and nothing reported it."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    starts("--ranks=1", "--", "cat")
    printed = capsys.readouterr().err
    assert "launch: OMP_NUM_THREADS=2 is set in your environment and is kept" in printed and "warning" not in printed


def test_exported_pinning_is_not_obeyed(starts, monkeypatch, capsys):
    """Fault: "KMP_AFFINITY stays unset" was printed although the user had exported it."""
    starts("--ranks=1", "--", "cat")
    assert "not obeyed" not in capsys.readouterr().err
    monkeypatch.setenv("KMP_AFFINITY", "compact")
    starts("--ranks=1", "--", "cat")
    printed = capsys.readouterr().err
    assert "not obeyed" in printed and "KMP_AFFINITY=compact, set in your environment" in printed
    assert "stays unset" not in printed


def test_the_placement_is_worked_out_once(starts, monkeypatch):
    """Fault: it was computed up to three times, in a batch job."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "1")
    calls = []
    propose = launching.placement.propose
    monkeypatch.setattr(launching.placement, "propose", lambda *a, **k: calls.append(a) or propose(*a, **k))
    starts("--mpi=openmpi", "--dry_run", "--", "cat")
    assert len(calls) == 1


def test_the_precision_is_measured_last_and_only_for_ranks_of_this_host(starts, monkeypatch, capsys):
    """Fault: TensorFlow was loaded for ten seconds before a misspelt command was reported, and within doctor's 20 s."""
    measured = []
    monkeypatch.setattr(launching.precision, "known", lambda host, extension: None)
    monkeypatch.setattr(launching.precision, "measure", lambda host, extension: measured.append(host) or 1.5)
    host = dataclasses.replace(TWO_CORES, instruction_sets=("avx512_bf16",))
    monkeypatch.setattr(launching.machine, "read", lambda: host)
    with pytest.raises(FlagError, match="no-such-command"):
        starts("--ranks=1", "--", "no-such-command")
    starts("--ranks=1", "--dry_run", "--", "cat")
    starts("--hosts=elsewhere", "--dry_run", "--", "cat")
    monkeypatch.setattr(launching.start, "check_hosts", lambda hosts, ranks, agent: None)
    starts("--hosts=elsewhere", "--", "cat")
    flags = dict(ranks_per_node=None, threads=0, hosts=[], mpi="auto", interface=None, dry_run=False)
    launching.launch(["cat"], ranks=1, **flags, measure=False)
    assert not measured and "bfloat16 may be faster: launch and doctor measure" in capsys.readouterr().err
    starts("--ranks=1", "--", "cat")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "precision: " in line]
    assert len(measured) == 1 and "1.5 times as fast here" in line
    monkeypatch.setattr(launching.machine, "read", lambda: TWO_CORES)
    starts("--ranks=1", "--", "cat")
    assert len(measured) == 1  # a processor that cannot gain from it


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["--ranks=2"], ["no command", "--"]),
        (["--ranks=2", "cat", "-n"], ["write -- before the command", "-- cat"]),
        (["--ranks=3", "--", "cat"], ["--ranks=3: ", "2 cores"]),
        (["--ranks_per_node=3", "--", "cat"], ["--ranks_per_node=3: ", "2 cores"]),
        (["--ranks_per_node=many", "--", "cat"], ["--ranks_per_node=many", "auto"]),
        (["--ranks_per_node=0", "--", "cat"], ["--ranks_per_node=0"]),
        (["--model=resnet18", "--", "cat"], ["--model", "after --"]),
        (["--", "no-such-command"], ["no-such-command", "PATH"]),
        (["--mpi=srun", "--", "cat"], ["--mpi=srun", "job of Slurm"]),
        (["--hosts=-x", "--", "cat"], ["'-x'", "host"]),
        (["--hosts=", "--", "cat"], ["--hosts=: the value is empty"]),
        (["--hosts=,", "--", "cat"], ["'' is not a host"]),
        (["--mpi=ibrun", "--hosts=a", "--", "cat"], ["ibrun", "remove --hosts"]),
        (["--dryrun", "--", "cat"], ["--dryrun", "--dry_run"]),
        (["--mpi=ibrun", "--ranks_per_node=1", "--", "cat"], ["ibrun", "--ntasks-per-node=1"]),
        (["--mpi=ibrun", "--", "cat"], ["ibrun", "PATH"]),
        (["--tune", "--ranks=2"], ["--ranks", "--tune"]),
        (["--tune", "--ranks_per_node=2"], ["--ranks_per_node", "--tune"]),
        (["--oversubscribe", "--", "cat"], ["--oversubscribe", "RESNET_CPU_OVERSUBSCRIBE=1"]),
        (["--launch_agent=x", "--", "cat"], ["--launch_agent", "RESNET_CPU_LAUNCH_AGENT"]),
    ],
)
def test_what_cannot_be_started_is_reported_in_one_line(starts, arguments, parts):
    with pytest.raises(FlagError) as caught:
        starts(*arguments)
    assert all(part in str(caught.value) for part in parts), caught.value
    assert "\n" not in str(caught.value)


def test_an_mpirun_that_hangs_or_cannot_run_is_reported(starts, bare_machine, tmp_path):
    """Fault: a traceback."""
    bare_machine[0]("mpirun", "while :; do :; done")
    path = str(tmp_path / "bin" / "mpirun")
    with pytest.raises(FlagError, match=f"{path}: does not answer to --version in 0.2 s; .* --mpi="):
        start.version_of(path, 0.2)
    (tmp_path / "bin" / "mpirun").write_bytes(b"\x7fELF")
    with pytest.raises(FlagError, match=f"{path}: Exec format error; "):
        starts("--ranks=1", "--", "cat")
    found = examination.CHECKS["mpirun"](examination.Asked())
    assert found.state == "problem" and "Exec format error" in found.what


def test_oversubscribed_ranks_are_not_bound(starts, monkeypatch):
    monkeypatch.setenv("RESNET_CPU_OVERSUBSCRIBE", "1")
    line = starts("--ranks=3", "--", "cat")
    assert line[6:9] == ["--oversubscribe", "--bind-to", "none"] and "OMP_NUM_THREADS=1" in line
    assert "--oversubscribe" not in starts("--ranks=2", "--", "cat")  # two ranks fit
    monkeypatch.setenv("RESNET_CPU_OVERSUBSCRIBE", "yes")
    with pytest.raises(FlagError, match="RESNET_CPU_OVERSUBSCRIBE=yes: must be 1"):
        starts("--ranks=3", "--", "cat")


@pytest.mark.parametrize("launcher, binding", [("openmpi", "--bind-to none"), ("mpich", "-bind-to none")])
def test_ranks_stay_within_the_mask_of_this_process(starts, monkeypatch, capsys, launcher, binding):
    """Fault: after taskset, the ranks were bound to cores that it had left out."""
    starts(f"--mpi={launcher}", "--ranks=1", "--dry_run", "--", "cat")
    line, report = capsys.readouterr()
    assert "-to none" not in line and "binding: 0-1 (" in report  # negative control
    restricted = dataclasses.replace(TWO_CORES, allowed=(1,), restricted=True)
    monkeypatch.setattr(launching.machine, "read", lambda: restricted)
    starts(f"--mpi={launcher}", "--ranks=1", "--dry_run", "--", "cat")
    line, report = capsys.readouterr()
    assert binding in line and "binding: none (the affinity mask allows CPUs 1, which " in report
    starts(f"--mpi={launcher}", "--hosts=elsewhere:1", "--dry_run", "--", "cat")
    assert "-to none" not in capsys.readouterr().out
    starts("--mpi=intel", "--ranks=1", "--dry_run", "--", "cat")
    assert "I_MPI_PIN_DOMAIN 1:compact" in capsys.readouterr().out  # which obeys the mask


@pytest.mark.mpi
@pytest.mark.skipif(physical_cores(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_a_rank_really_stays_within_the_mask():
    last = max(os.sched_getaffinity(0))
    command = [sys.executable, "-m", "resnet_cpu.launch", "--ranks=1", "--", "grep", "Cpus_allowed_list"]
    process = subprocess.run(
        ["taskset", "-c", str(last), *command, "/proc/self/status"],
        cwd=ROOT,
        env=OUTSIDE,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.stdout.split()[-1:] == [str(last)], process.stderr


def test_hosts_that_do_not_answer_or_are_full_are_named_before_the_start(starts, bare_machine, monkeypatch, tmp_path):
    put, _ = bare_machine
    put(
        "enter",
        'case $1 in good*) eval "$2" ;; full) echo "$2" >asked; echo "tmpfs 65536 65436 100 99% /dev/shm" ;; '
        'slow) while :; do :; done ;; polite) printf "\\344\\n" ;; *) echo "no way there" >&2; exit 9 ;; esac',
    )
    put("df", "exit 1")  # no /dev/shm there
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RESNET_CPU_LAUNCH_AGENT", "enter")
    assert "good1:1,good2:1" in starts("--hosts=good1:1,good2:1", "--", "cat")
    put("df", "echo Filesystem; echo tmpfs 65536 0 65536 0% /dev/shm")
    assert "good1:1,good2:1" in starts("--hosts=good1:1,good2:1", "--", "cat")
    assert "polite:1" in starts("--hosts=polite:1", "--", "cat")  # fault: a banner in Latin-1 was a traceback
    with pytest.raises(OutputError) as caught:
        starts("--hosts=good1:1,full:1", "--", "cat")
    assert "full:/dev/shm: 0 MiB free, 1 ranks need 8" in str(caught.value) and "good1" not in str(caught.value)
    assert "df -Pk /dev/shm" in (tmp_path / "asked").read_text()
    monkeypatch.setattr(start, "_ANSWER_S", 0.5)
    with pytest.raises(PeerLost) as caught:
        starts("--hosts=good1,bad,slow", "--ranks_per_node=1", "--", "cat")
    assert "bad (no way there)" in str(caught.value) and "slow (no answer in" in str(caught.value)
    assert "good1" not in str(caught.value)


def test_the_hosts_of_a_batch_job_are_started_and_reported(starts, monkeypatch, capsys, tmp_path):
    """Fault: in a job of PBS or LSF with four nodes the ranks were started on one, silently."""
    (tmp_path / "nodes").write_text("".join(f"n{i}\nn{i}\n" for i in range(1, 13)))
    monkeypatch.setenv("PBS_JOBID", "1.server")
    monkeypatch.setenv("PBS_NODEFILE", str(tmp_path / "nodes"))
    starts("--mpi=openmpi", "--dry_run", "--", "cat")
    line, report = capsys.readouterr()
    assert "-np 24 --host n1:2,n2:2,n3:2," in line and "--map-by ppr:2:node:PE=1" in line
    assert f"n7, n8 and 4 more (PBS, PBS_NODEFILE={tmp_path}/nodes)" in report
    starts("--mpi=openmpi", "--ranks=4", "--dry_run", "--", "cat")
    line, report = capsys.readouterr()
    assert "-np 4 --host n1:2,n2:2 " in line and "launch: hosts: n1, n2 (PBS, " in report
    starts("--mpi=openmpi", "--hosts=localhost:2", "--dry_run", "--", "cat")  # whatever the batch system says
    line, report = capsys.readouterr()
    assert "--host localhost:2 " in line and "launch: hosts: localhost (--hosts)" in report
    monkeypatch.delenv("PBS_NODEFILE")
    with pytest.raises(FlagError, match="--hosts=NAME:SLOTS"):
        starts("--ranks=2", "--", "cat")
    monkeypatch.delenv("PBS_JOBID")
    starts("--mpi=openmpi", "--dry_run", "--", "cat")  # negative control
    assert f"launch: hosts: this one, {socket.gethostname()} (no batch job, no --hosts)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "hosts, remedy", [("n1 8 n2 8", "give --ranks_per_node=2"), ("n1 1 n2 1", "submit with 2 slots per host")]
)
def test_slots_that_do_not_suit_the_hosts_are_warned_of(starts, monkeypatch, capsys, hosts, remedy):
    """Many batch systems count each core as a slot."""
    monkeypatch.setenv("RESNET_CPU_OVERSUBSCRIBE", "1")  # the stand-in has two cores
    monkeypatch.setenv("LSB_MCPU_HOSTS", hosts)
    starts("--dry_run", "--", "cat")
    assert f"slots per host; for hosts of this type {remedy}" in capsys.readouterr().err
    monkeypatch.setenv("LSB_MCPU_HOSTS", "n1 2 n2 2")  # negative control
    starts("--dry_run", "--", "cat")
    assert "slots per host;" not in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--ranks=2", "--ranks_per_node=2"])
def test_on_one_node_the_cores_decide_and_not_the_tasks(starts, monkeypatch, flag):
    """Fault: in an interactive job of one task with two CPUs two ranks were refused."""
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_NTASKS": "1"}.items():
        monkeypatch.setenv(name, value)
    line = starts("--mpi=openmpi", flag, "--", "cat")
    assert line[4:6] == ["-np", "2"] and "--oversubscribe" in line and "ppr:2:node:PE=1" in line and "core" in line
    with pytest.raises(FlagError, match="2 cores"):
        starts("--mpi=openmpi", flag.replace("=2", "=3"), "--", "cat")
    with pytest.raises(FlagError, match="ibrun places ranks as the batch job asks"):
        starts("--mpi=ibrun", flag, "--", "cat")
    for name in ("SLURM_NNODES", "SLURM_NTASKS"):
        monkeypatch.setenv(name, "2")
    with pytest.raises(FlagError, match="more ranks than slots"):  # negative control
        starts("--mpi=openmpi", flag.replace("=2", "=3"), "--", "cat")


def test_more_slots_than_cores_are_not_ranks(starts, monkeypatch, capsys):
    """Some batch systems count hardware threads."""
    monkeypatch.setenv("LSB_MCPU_HOSTS", "n1 4 n2 4")
    starts("--mpi=openmpi", "--dry_run", "--", "cat")
    line, report = capsys.readouterr()
    assert "-np 4 --host n1:2,n2:2 " in line
    assert "4 slots per host, more than the 2 cores of this one" in report and "--ranks_per_node=2" in report
    with pytest.raises(FlagError, match="2 cores"):  # negative control: what was asked for is not changed
        starts("--mpi=openmpi", "--ranks_per_node=4", "--", "cat")


def own_address():
    """Return an address of this host that is not that of the loopback interface, else of that one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            return "127.0.0.1"
        return probe.getsockname()[0]


@pytest.mark.parametrize(
    "name", ["localhost", "127.0.0.1", "127.0.1.1", "here", "here.cluster", "HERE", socket.gethostname(), own_address()]
)
def test_this_host_needs_no_ssh(starts, monkeypatch, capsys, name):
    """Fault: a host was reached by ssh to itself. Negative control: another host still needs it."""
    monkeypatch.setattr(start.socket, "gethostname", lambda: "here.cluster")
    assert f"{name}:1" in starts(f"--hosts={name}:1", "--", "cat")  # there is no ssh in PATH
    assert "will run no rank" not in capsys.readouterr().err
    with pytest.raises(FlagError, match="ssh: no such program"):
        starts(f"--hosts={name}:1,there:1", "--", "cat")
    with pytest.raises(FlagError, match="ssh: no such program"):
        starts("--hosts=here.elsewhere:1", "--", "cat")
    with pytest.raises(FlagError, match="ssh: no such program"):
        starts("--hosts=192.0.2.1:1", "--", "cat")  # an address that is never given to a host
    if name != "localhost":
        with pytest.raises(FlagError, match=f"localhost and {name} are the same host"):
            starts(f"--hosts=localhost:1,{name}:1", "--", "cat")


@pytest.mark.parametrize("name", ["TF_NUM_INTRAOP_THREADS", "OMP_NUM_THREADS", "TF_NUM_INTEROP_THREADS"])
def test_a_number_of_threads_that_is_none_is_refused_before_the_start(starts, monkeypatch, name):
    monkeypatch.setenv(name, "auto")
    with pytest.raises(FlagError, match=f"{name}=auto: must be a whole number"):
        starts("--ranks=1", "--", "cat")
    monkeypatch.setenv(name, " 1 ")
    assert starts("--ranks=1", "--", "cat")


def test_shared_memory_of_a_host_without_ranks_does_not_matter(starts, monkeypatch):
    """Fault: a full /dev/shm of a login node stopped a job on other nodes."""

    def full(ranks):
        raise OutputError("/dev/shm: 0 MiB free")

    monkeypatch.setattr(start, "check_shared_memory", full)
    monkeypatch.setattr(start, "check_hosts", lambda hosts, ranks, agent: None)
    assert starts("--hosts=elsewhere:1", "--", "cat")
    with pytest.raises(OutputError):  # negative control
        starts("--ranks=1", "--", "cat")


def test_full_shared_memory_is_reported(monkeypatch, tmp_path):
    class Full:
        f_bavail, f_frsize = 10, 4096

    start.check_shared_memory(2, str(tmp_path))  # a folder with room
    monkeypatch.setattr(start.os, "statvfs", lambda path: Full)
    with pytest.raises(OutputError, match="dead jobs"):
        start.check_shared_memory(2, str(tmp_path))


def stand_in_for_mpirun(folder, says):
    """Return an environment whose mpirun runs the branch of `says` for its number of ranks, in its own process."""
    folder.mkdir()
    program = folder / "mpirun"
    program.write_text(
        f"""#!{shutil.which("bash")}
[ "$1" != --version ] || {{ echo "mpirun (Open MPI) 4.1.4"; exit; }}
while [ "$1" != -np ]; do shift; done
case $2 in {says} esac
"""
    )
    program.chmod(0o755)
    return {**OUTSIDE, "PATH": f"{folder}:{os.environ['PATH']}", "XDG_CONFIG_HOME": str(folder)}


def tune(environment, **more):
    command = [sys.executable, "-m", "resnet_cpu.launch", "--tune", "--mpi=openmpi", "--", "--image_size=64"]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more
    )


def test_tuning_times_numbers_of_ranks_and_later_starts_use_the_fastest(tmp_path):
    says = r'1) printf "\344\n" >&2; echo "total images/sec: 9.5" ;; *) echo broken >&2; exit 3 ;;'
    environment = stand_in_for_mpirun(tmp_path / "bin", says)
    process = tune(environment)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and out == "1\n", err
    assert "1 ranks: 9.50 images/s" in err and "resnet_cpu/placements.json" in err
    assert "timing [1] ranks" in err or " ranks: failed with exit code 3: broken" in err
    command = [sys.executable, "-m", "resnet_cpu.launch", "--mpi=openmpi", "--dry_run", "--", "true"]
    later = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert " -np 1 " in later.stdout and "1 ranks per host were the fastest" in later.stderr


def test_tuning_that_fails_or_is_ended_remembers_no_placement(tmp_path):
    process = tune(stand_in_for_mpirun(tmp_path / "none", "*) exit 3 ;;"))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 64 and out == "" and "no number of ranks could be timed" in err
    folder = tmp_path / "slow"
    sleeps = f"*) echo $$ >{folder}/pid.new; mv {folder}/pid.new {folder}/pid; exec sleep 60 ;;"
    process = tune(stand_in_for_mpirun(folder, sleeps))
    deadline = time.monotonic() + 60
    while not (folder / "pid").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    process.terminate()
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and out == ""
    for folder in (tmp_path / "none", tmp_path / "slow"):
        # The precision that was timed before is remembered.
        assert {path.name for path in (folder / "resnet_cpu").glob("*")} <= {"precisions.json"}
    assert not psutil.pid_exists(int((folder / "pid").read_text()))


@pytest.mark.parametrize(
    "announced, message",
    [
        ("", "2 ranks were asked for, this process is one of 1: the launcher belongs to another MPI"),
        ("export PMI_SIZE=2 PMI_RANK=0;", "sees 1: launcher and mpi4py belong to different MPIs"),
    ],
)
def test_a_launcher_that_starts_worlds_of_one_is_reported(tmp_path, announced, message):
    """mpirun of one MPI does this to programs of another: every process is a job of its own."""
    pytest.importorskip("mpi4py")
    alone = """while :; do case $1 in
    -x) case $2 in *=*) export "$2" ;; esac; shift 2 ;; --oversubscribe | --allow-run-as-root) shift ;;
    --mca) shift 3 ;; -*) shift 2 ;; *) break ;; esac; done;"""
    environment = stand_in_for_mpirun(tmp_path / "bin", f'2) shift 2; {alone} {announced} exec "$@" ;;')
    command = [sys.executable, "-m", "resnet_cpu.launch", "--mpi=openmpi", "--ranks=2", "--"]
    command += [sys.executable, "-m", "resnet_cpu.train", "--flagfile=experiments/smoke.flags"]
    process = subprocess.run(
        [*command, f"--run_dir={tmp_path / 'run'}"],
        cwd=ROOT,
        env={**environment, "RESNET_CPU_OVERSUBSCRIBE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    errors = [line for line in process.stderr.splitlines() if line.startswith("resnet_cpu:")]
    assert process.returncode == 64 and process.stdout == "" and len(errors) == 1 and message in errors[0], (
        process.stderr
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "script, expected, message",
    [
        ("exit 0", 0, ""),
        ("exit 75", 75, ""),
        ("exit 205", 76, "a host was lost, or could not be started"),
        ("exit 255", 76, "a host was lost, or could not be started, or the command ended with that code (mpirun ended"),
        ("kill -9 $$", 137, ""),
        ("trap 'exit 75' USR1; kill -USR1 $PPID; while :; do sleep 0.01; done", 75, ""),
    ],
)
def test_over_several_hosts_signals_are_forwarded_and_a_lost_host_is_reported(script, expected, message):
    program = (
        f"import sys; from resnet_cpu.cluster import guard, start; "
        f"guard.run(lambda _: start.follow(['bash', '-c', {script!r}]))"
    )
    process = subprocess.run([sys.executable, "-c", program], env=OUTSIDE, capture_output=True, text=True, timeout=60)
    assert process.returncode == expected and message in process.stderr
    assert bool(process.stderr) == bool(message)
