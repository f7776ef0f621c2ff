"""The doctor's checks: what facts mean, with facts of other machines; and the documents that name the checks."""

import os
import re
import sys

import pytest
from conftest import ROOT

from resnet_cpu.cluster import environment, machine, tuning
from resnet_cpu.cluster.machine import Cpu, Machine, Node
from resnet_cpu.diagnosis import checks, examination, facts
from resnet_cpu.diagnosis.examination import Asked
from resnet_cpu.diagnosis.facts import Folder, Handshake
from resnet_cpu.errors import RunFolderError
from resnet_cpu.run.folder import RunFolder

GIB = 2**30
INTEL_PINS = {"numpy": "<2", "protobuf": "==4.23.4"}
REQUIRED = {"numpy": ">=1.23", "protobuf": ">=3.20.3", "tensorflow": ">=2.15.1,<2.22"}
INSTALLED = {"numpy": "1.26.4", "protobuf": "4.23.4", "tensorflow": "2.15.1"}
MPI = {"seconds": 0.5, "library": "Open MPI v4.1.4", "loaded": ["/usr/lib/libmpi.so.40"]}
TF = {"seconds": 7.0, "version": "2.15.1"}
ALL_STAGES = {"mpi": MPI, "tensorflow": TF, "horovod": {"seconds": 8.0, "loaded": ["/usr/lib/libmpi.so.40"]}}
GOOD = Handshake(0, ALL_STAGES)
HUNG = Handshake(None, {}, limit=20.0)
AVX2, AVX512, AMX = ["avx2"], ["avx2", "avx512f", "avx512bw"], ["avx2", "avx512f", "avx512bw", "amx_tile", "amx_bf16"]
DISK = Folder("/d", "ext4", 10**10, 1000)


def with_stages(*names, code=0, error="", **more):
    return Handshake(code, {name: {**ALL_STAGES[name], **more.get(name, {})} for name in names}, error, 20.0)


def horovod(version="0.28.1", built_for="2.15.1", libraries=("libmpi.so.40",), outcome=GOOD):
    return checks.horovod(version, built_for, libraries, "2.15.1", outcome)


def packages(installed=INSTALLED, stack="intel", pins=INTEL_PINS, broken=None):
    return checks.packages(installed, REQUIRED, stack, pins, broken or {})


#: A check with its facts -> the state that it must have, and parts of its line.
JUDGED = [
    (checks.python("3.11.7", ">=3.9,<3.14"), "ok", ["3.11.7"]),
    (checks.python("3.14.0", ">=3.9,<3.14"), "problem", ["3.14.0 is outside >=3.9,<3.14", "make setup"]),
    (checks.python("3.8.19", ">=3.9,<3.14"), "problem", ["3.8.19"]),
    (packages(), "ok", ["the stack intel", "tensorflow 2.15.1"]),
    (packages(stack="", pins={}), "ok", ["without the Intel extension"]),
    (packages({**INSTALLED, "numpy": None}), "problem", ["not installed here: numpy", "activate"]),
    (packages({**INSTALLED, "tensorflow": "2.22.0"}), "problem", ["tensorflow 2.22.0 (>=2.15.1,<2.22)"]),
    (
        packages({**INSTALLED, "protobuf": "4.25.3"}),
        "warning",
        ["protobuf 4.25.3 (==4.23.4)", "requirements/intel.txt"],
    ),
    (packages(broken={"numpy": "ImportError: x"}), "problem", ["numpy (ImportError: x)"]),
    (checks.mpirun("/usr/bin/mpirun", "mpirun (Open MPI) 4.1.4\n\nmore", False, False, True), "ok", ["openmpi"]),
    (checks.mpirun(None, "", False, False, True), "problem", ["not in PATH", "module"]),
    (checks.mpirun(None, "", False, False, False), "warning", ["one process trains without it"]),
    (checks.mpirun(None, "", True, True, True), "warning", ["srun"]),
    (checks.mpirun("/x/mpirun", "my own", False, False, True), "problem", ["'my own', which is not a known MPI"]),
    (checks.ranks(GOOD), "ok", ["two ranks added a vector", "Open MPI v4.1.4", "/usr/lib/libmpi.so.40"]),
    (checks.ranks(HUNG), "problem", ["did not reach each other in 20 s", "--interface"]),
    (checks.ranks(with_stages(code=64, error="x")), "problem", ["did not start: x", "one MPI module"]),
    (checks.ranks(Handshake(0, {}, alone=True)), "warning", ["not tried"]),
    (checks.ranks(Handshake(None, {}, skipped=True)), "ok", ["--quick"]),
    (checks.tensorflow(GOOD), "ok", ["2.15.1 loads in 7.0 s"]),
    (
        checks.tensorflow(with_stages("mpi", "tensorflow", tensorflow={"error": "TypeError: Descriptors"})),
        "problem",
        ["does not load: TypeError: Descriptors"],
    ),
    (checks.tensorflow(with_stages("mpi", code=None)), "warning", ["not loaded within 20 s", "local disk"]),
    (checks.tensorflow(with_stages("mpi", code=139, error="x")), "problem", ["ended with 139: x"]),
    (checks.tensorflow(HUNG), "warning", ["two ranks did not start"]),
    (horovod(), "ok", ["0.28.1 for TensorFlow 2.15.1, with libmpi.so.40", "/usr/lib/libmpi.so.40"]),
    (horovod(version=None), "warning", ["not installed"]),
    (horovod(built_for="2.14.0"), "problem", ["for TensorFlow 2.14.0", "2.15.1 is installed"]),
    (horovod(libraries=()), "problem", ["built without MPI", "BUILD_NOTES.md"]),
    (horovod(outcome=with_stages("mpi", "tensorflow", code=-11, error="x")), "problem", ["ended with -11"]),
    (horovod(outcome=with_stages("mpi", "tensorflow", code=None)), "warning", ["not loaded within"]),
    (horovod(outcome=Handshake(0, {"tensorflow": TF}, alone=True)), "warning", ["not tried"]),
    (horovod(outcome=Handshake(None, {}, skipped=True)), "ok", ["0.28.1", "--quick"]),
    (
        horovod(outcome=with_stages(*ALL_STAGES, horovod={"loaded": ["/a/libmpi.so.40", "/b/libmpi.so.12"]})),
        "problem",
        ["two MPIs: /a/libmpi.so.40, /b/libmpi.so.12"],
    ),
    (
        horovod(outcome=with_stages(*ALL_STAGES, horovod={"error": "built without MPI"})),
        "problem",
        ["does not work: built without MPI"],
    ),
    (checks.processor("Xeon", AMX, True, 4.2), "ok", ["Xeon: avx2", "--precision=bfloat16", "4.2 times as fast"]),
    (checks.processor("Xeon", AVX512, True, 0.7), "ok", ["precision: float32", "0.7 times the speed"]),
    (checks.processor("EPYC", AVX2, True, None), "warning", ["bfloat16 is refused", "8 channels"]),
    (checks.processor("EPYC", AVX2, False, None), "ok", ["precision: float32", "no products of bfloat16"]),
    (checks.processor("", [], False, None), "warning", ["unknown: none of AVX2"]),
    (checks.cores(4, [0, 1, 2, 3], 4, None), "ok", ["4 cores, CPUs 0-3 of 4"]),
    (checks.cores(4, [0, 1, 2, 3], 4, 4.0), "ok", []),
    (checks.cores(4, [0, 1, 2, 3], 4, 1.5), "warning", ["the time of 1.5 CPUs", "limit"]),
    (checks.cores(64, [0], 1, None), "warning", ["1 core, CPUs 0 of 64", "--exclusive"]),
    (checks.threads({}, "", 2), "ok", ["none exported"]),
    (checks.threads({"OMP_NUM_THREADS": "2,1"}, "", 2), "ok", ["OMP_NUM_THREADS=2,1"]),
    (checks.threads({"TF_NUM_INTEROP_THREADS": "2"}, "", 24), "ok", []),
    (checks.threads({"OMP_NUM_THREADS": "1"}, "", 24), "warning", ["overrides the 24", "unset OMP_NUM_THREADS"]),
    (checks.threads({"OMP_THREAD_LIMIT": "256", "OMP_NUM_THREADS": "24"}, "", 24), "ok", ["OMP_THREAD_LIMIT=256"]),
    (
        checks.threads({"OMP_THREAD_LIMIT": "8", "OMP_NUM_THREADS": "24"}, "", 24),
        "warning",
        ["OMP_THREAD_LIMIT=8 in your environment overrides the 24", "unset OMP_THREAD_LIMIT"],
    ),
    (checks.threads({}, "OMP_NUM_THREADS=auto: must be a number; unset it", 24), "problem", ["OMP_NUM_THREADS=auto"]),
    (checks.memory(64 * GIB, 5.4e9), "ok", ["64.0 GiB"]),
    (checks.memory(2 * GIB, 5.4e9), "warning", ["2.0 GiB", "--batch_size"]),
    (checks.memory(0, 5.4e9), "warning", ["unknown"]),
    (checks.shared_memory("/dev/shm", (GIB, GIB), ""), "ok", ["1,024 of 1,024 MiB free"]),
    (checks.shared_memory("/dev/shm", (GIB, 0), "/dev/shm: 0 MiB free; remove files"), "problem", ["0 MiB free"]),
    (checks.shared_memory("/dev/shm", None, ""), "warning", ["is missing"]),
    (checks.placement(2, 1, "why", "/lib/tcmalloc.so"), "ok", ["2 ranks of 1 thread each: why", "/lib/tcmalloc.so"]),
    (checks.placement(1, 8, "why", None), "warning", ["1 rank of 8 threads each", "libtcmalloc-minimal4"]),
    (checks.limits(20000, None, 65536, False), "ok", ["20000 open files"]),
    (checks.limits(None, None, None, True), "ok", ["unlimited"]),
    (checks.limits(256, None, None, False), "warning", ["256 open files", "ulimit -n 4096"]),
    (checks.limits(4096, 8 * GIB, None, False), "warning", ["address space", "-v unlimited"]),
    (checks.limits(4096, None, 65536, True), "warning", ["64 KiB of locked memory", "-l unlimited"]),
    (checks.environment({}, 1), "ok", []),
    (checks.environment({"ITEX_LAYOUT_OPT": "1"}, 1), "warning", ["not obeyed", "ITEX_LAYOUT_OPT=1"]),
    (checks.environment({"RESNET_CPU_KEEP": "HOME", "HOME": "/x"}, 1), "problem", ["RESNET_CPU_KEEP: HOME"]),
    (checks.environment({"RESNET_CPU_RANKS": "2"}, 1), "problem", ["RESNET_CPU_RANKS=2", "unset"]),
    (checks.environment({"MPI4PY_RC_THREAD_LEVEL": "single"}, 1), "problem", ["MPI4PY_RC_THREAD_LEVEL"]),
    (checks.environment({"RESNET_CPU_OVERSUBSCRIBE": "1"}, 1), "warning", ["RESNET_CPU_OVERSUBSCRIBE"]),
    (checks.environment({"HOROVOD_ELASTIC": "1"}, 1), "warning", ["the launcher of Horovod"]),
    (checks.environment({}, 4), "warning", ["one of 4 ranks"]),
    (checks.mpi_parameters({}), "ok", []),
    (checks.mpi_parameters({"btl": "tcp"}), "warning", ["mca-params.conf: btl=tcp", "results may depend"]),
    (checks.clock(2026, {"/tmp": 0.0}), "ok", ["2026"]),
    (checks.clock(1970, {}), "problem", ["the year is 1970"]),
    (checks.clock(2100, {}), "problem", ["the year is 2100"]),
    (checks.clock(2026, {"/run": -90.0, "/tmp": 0.1}), "warning", ["/run by -90 s", "NTP"]),
    (checks.tmp(DISK), "ok", ["/d on ext4, 10.0 GB free"]),
    (checks.tmp(Folder("/tmp", error="cannot be written (Read-only file system)")), "problem", ["Read-only", "TMPDIR"]),
    (checks.run_dir(DISK), "ok", ["written, flushed, renamed and locked"]),
    (checks.run_dir(Folder("/d", "ext4", 10**8, 1000)), "problem", ["615 MB"]),
    (checks.run_dir(Folder("/d", "ext4", 10**10, 0)), "problem", ["new files"]),
    (checks.run_dir(Folder("/d", "nfs", 10**10, None)), "ok", ["on nfs"]),
    (checks.run_dir(Folder("/d", "lustre", 10**10, None, without_locks="not implemented")), "warning", ["heartbeat"]),
    (checks.run_dir(Folder("/d", "ext4", 10**10, 1, others="every user")), "warning", ["every user", "chmod o-w"]),
    (checks.run_dir(Folder("/d", "tmpfs", 10, 1, others="every user")), "problem", ["615 MB"]),
    (checks.run_dir(Folder("/d", "tmpfs", 10**10, 1)), "warning", ["in memory"]),
    (checks.data_dir(Folder("/d", "nfs", 1, 1, rate=500.0), 2), "ok", ["500 MB/s", "4,545 images"]),
    (checks.data_dir(Folder("/d", "nfs", 1, 1, rate=20.0), 64), "warning", ["less than 64", "launch/stage.sh"]),
    (checks.data_dir(Folder("/d", "ext4", 1, 1, rate=None), 2), "ok", ["too small"]),
    (checks.data_dir(Folder("/d", error="cannot be read (no such folder)"), 2), "problem", ["--data_dir"]),
]


@pytest.mark.parametrize("check, state, parts", JUDGED, ids=[f"{i}-{row[0].name}" for i, row in enumerate(JUDGED)])
def test_facts_are_judged_with_the_remedy(check, state, parts):
    line = check.line()
    assert check.state == state, line
    assert line.startswith(f"{state:8} {check.name}: ") and "\n" not in line
    assert all(part in line for part in parts), line
    if state == "problem":
        assert "; " in line, "a problem needs a remedy"


def test_every_check_has_facts_of_each_state_that_it_can_have():
    judged = {check.name: {state for one, state, _ in JUDGED if one.name == check.name} for check, _, _ in JUDGED}
    assert set(judged) == set(examination.CHECKS)
    for name, states in judged.items():
        assert "ok" in states and len(states) > 1, name


@pytest.mark.parametrize(
    "version, wanted, held",
    [
        ("2.15.1", ">=2.15.1,<2.22", True),
        ("2.15.0", ">=2.15.1,<2.22", False),
        ("2.22", ">=2.15.1,<2.22", False),
        ("2.22.0", ">=2.15.1,<2.22", False),
        ("2.9", "<2.10", True),
        ("1.26.4", "<2", True),
        ("2.0.0rc1", "<2", False),
        ("2.15.0.0", "==2.15", True),
        ("3.14.0b2", "<3.14", False),
        ("1.0", "!=1.0", False),
        ("1.0", "", True),
    ],
)
def test_versions_are_compared_by_their_numbers(version, wanted, held):
    assert checks.satisfies(version, wanted) == held


def test_a_line_holds_no_control_characters():
    assert checks.Check("x", "ok", "a\nb\x1b[31m").line() == "ok       x: a\\nb\\x1b[31m"


def test_the_ranges_are_those_of_setup_cfg():
    python, ranges = facts.requirements()
    assert python == ">=3.9,<3.14"
    assert ranges[""]["tensorflow"] == ">=2.15.1,<2.22" and ranges[""]["tf_keras"].startswith(">=")
    assert ranges["intel"]["intel-extension-for-tensorflow"] == "==2.15.0.0" and ranges["intel"]["numpy"] == "<2"
    assert ranges["current"]["tensorflow"].startswith("==2.21")


def test_without_a_checkout_the_ranges_are_those_of_the_installed_package(tmp_path, monkeypatch):
    monkeypatch.setattr(facts, "_ROOT", str(tmp_path))
    given = ["numpy>=1.23", 'numpy<2; extra == "intel"', "tensorflow[x]==2.15.1 ; extra == 'intel'"]
    monkeypatch.setattr(facts.metadata, "requires", lambda name: given)
    monkeypatch.setattr(facts.metadata, "metadata", lambda name: {"Requires-Python": "<3.14,>=3.9"})
    assert facts.requirements() == (
        "<3.14,>=3.9",
        {"": {"numpy": ">=1.23"}, "intel": {"numpy": "<2", "tensorflow": "==2.15.1"}},
    )


MOUNTS = r"""22 27 0:21 / /proc rw - proc proc rw
27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
40 27 0:44 / /scratch rw - lustre mds@o2ib:/s rw,flock
41 27 0:45 / /my\040disk rw - xfs /dev/sdb rw
42 27 0:46 / /scratch/x rw - nfs4 server:/x rw
43 27 0:47 / /scratch/x rw - tmpfs none rw
"""


@pytest.mark.parametrize(
    "path, kind",
    [
        ("/home/me", "ext4"),
        ("/scratch/run", "lustre"),
        ("/scratchy", "ext4"),
        ("/my disk/run", "xfs"),
        ("/scratch/x/run", "tmpfs"),
    ],
)
def test_the_file_system_of_a_folder_is_that_of_its_mount(tmp_path, path, kind):
    (tmp_path / "mountinfo").write_text(MOUNTS)
    assert facts.file_system(path, str(tmp_path / "mountinfo")) == kind
    assert facts.file_system(path, str(tmp_path / "none")) == "unknown"


def test_a_folder_is_tried_and_left_as_it_was(tmp_path):
    found = facts.written_folder(str(tmp_path))
    assert (found.path, found.error, found.without_locks, found.others) == (str(tmp_path), "", "", "")
    assert found.free > 0 and abs(found.ahead) < 2 and found.kind == facts.file_system(str(tmp_path))
    assert os.listdir(tmp_path) == []
    above = facts.written_folder(str(tmp_path / "not" / "there"))
    assert above.path == str(tmp_path) and os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_reported():
    assert "cannot be written" in facts.written_folder("/proc/self").error


def test_a_folder_that_train_refuses_is_reported(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").touch()
    reasons = {
        "/": "is the root of the file system",
        "data": "is a data set or a checkpoint",
        "file": "is not a folder",
        "file/below/it": f"{tmp_path}/file is not a folder",
    }
    for name, reason in reasons.items():
        assert facts.run_folder(str(tmp_path / name)).error == reason
        with pytest.raises(RunFolderError, match=reason):
            RunFolder(str(tmp_path / name))
    assert facts.run_folder(str(tmp_path / "new" / "run")).error == ""  # negative control


def test_a_file_system_without_locks_is_reported(tmp_path, monkeypatch):
    def refuse(file, operation):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(facts.fcntl, "flock", refuse)
    assert facts.written_folder(str(tmp_path)).without_locks == "Function not implemented"


def test_a_folder_that_others_may_write_to_is_reported(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    folder.chmod(0o777)
    assert "every user" in facts.written_folder(str(folder)).others
    assert facts.written_folder(str(folder / "new")).others == ""  # it will be created with other rights
    folder.chmod(0o775)
    assert facts.written_folder(str(folder)).others == ""


def test_reading_is_timed(tmp_path):
    (tmp_path / "small").write_bytes(b"x")
    assert facts.read_folder(str(tmp_path)).rate is None
    (tmp_path / "shard").write_bytes(bytes(2**21))
    (tmp_path / "link").symlink_to("nowhere")  # fault: one such link, and the folder could not be read
    assert facts.read_folder(str(tmp_path)).rate > 0
    assert "no such folder" in facts.read_folder(str(tmp_path / "none")).error
    (tmp_path / "empty").mkdir()
    assert facts.read_folder(str(tmp_path / "empty")).error == "holds no file"


def test_a_check_that_fails_is_a_finding(monkeypatch):
    def fail(asked):
        raise RuntimeError("surprise")

    monkeypatch.setitem(examination.CHECKS, "clock", fail)
    found = {check.name: check for check in examination.examine(Asked(quick=True))}
    assert found["clock"].state == "warning" and "RuntimeError: surprise" in found["clock"].what
    assert set(found) == set(examination.CHECKS) - {"run_dir", "data_dir"}  # which were not named


def test_threads_are_compared_with_those_of_the_number_of_ranks_that_was_tuned(monkeypatch):
    """Fault: OMP_NUM_THREADS=8, the threads of the ranks that launch would start, was said to override 16."""
    cpus = tuple(Cpu(id=n, core=n, socket=0, node=0, cache=0, siblings=(n,)) for n in range(16))
    host = Machine("", (), cpus, (Node(0, tuple(range(16)), 0),), tuple(range(16)), root="/nowhere")
    monkeypatch.setattr(machine, "read", lambda: host)
    for name in environment.NUMBERS_OF_THREADS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    for fastest, state in ((2, "ok"), (None, "warning")):
        monkeypatch.setattr(tuning, "fastest", lambda host, fastest=fastest: fastest)
        assert examination.CHECKS["threads"](Asked()).state == state


def test_only_a_problem_gives_exit_code_1(monkeypatch, capsys):
    for state, code in (("ok", 0), ("warning", 0), ("problem", 1)):
        monkeypatch.setattr(examination, "CHECKS", {"x": lambda asked, state=state: checks.Check("x", state, "y")})
        assert examination.report(Asked(), False) == code
    assert capsys.readouterr().out.splitlines() == ["ok       x: y", "warning  x: y", "problem  x: y"]


def test_the_cause_is_the_line_of_this_package_or_the_last_one():
    assert facts._cause("launch: x\nresnet_cpu: bad flag\nmpirun: ended\n") == "resnet_cpu: bad flag"
    assert facts._cause("a\nb\n\n") == "b" and facts._cause("") == "no message"


@pytest.mark.parametrize(
    "job",
    [
        {"SLURM_JOB_ID": "7", "SLURMD_NODENAME": "n1"},
        {"PBS_NODEFILE": "/x"},
        {"LSB_JOBID": "7"},
        {"COBALT_NODEFILE": "/x"},
        {"SGE_TASK_ID": "1", "PE_HOSTFILE": "/x"},
        {"OAR_JOB_ID": "7", "OAR_NODEFILE": "/x"},
        {"OMPI_COMM_WORLD_SIZE": "2", "PMI_RANK": "0", "PMIX_RANK": "0", "RESNET_CPU_RANKS": "2"},
    ],
    ids=lambda job: next(iter(job)),
)
def test_the_two_ranks_run_outside_every_job(job):
    """Fault: in jobs of Grid Engine, OAR and Cobalt their hosts were taken."""
    assert facts.outside_jobs({**job, "PATH": "/bin"}) == {"PATH": "/bin"}


def test_a_package_that_does_not_load_is_found(monkeypatch):
    monkeypatch.setitem(sys.modules, "numpy", None)
    assert "numpy" in facts.broken() and "absl" not in facts.broken()


#: Documents whose tables say which check finds a symptom, as in `doctor: ranks`.
TABLES = ("BUILD_NOTES.md", "docs/troubleshooting.md", "docs/launch.md", "docs/stacks.md", "docs/doctor.md")


def named(text):
    return set(re.findall(r"`doctor: ([a-z_]+)`", text))


def test_the_checks_that_documents_name_exist():
    texts = {page: (ROOT / page).read_text(encoding="utf-8") for page in TABLES}
    for page, text in texts.items():
        assert named(text) <= set(examination.CHECKS), page
    assert len(named(texts["BUILD_NOTES.md"])) > 5 and len(named(texts["docs/troubleshooting.md"])) > 5
    assert named("| `doctor: no_such_check` |") - set(examination.CHECKS)  # negative control


def test_the_page_of_the_doctor_lists_every_check():
    rows = re.findall(r"^\| `([a-z_]+)` \|", (ROOT / "docs" / "doctor.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert rows == list(examination.CHECKS)
