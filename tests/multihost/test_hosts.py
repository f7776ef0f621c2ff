"""Training over TCP between two hosts of the network lab, and how it ends if one of them is lost."""

import importlib.metadata
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from typing import IO, NamedTuple

import pytest
import whole_runs as runs
from conftest import OUTSIDE, ROOT, TINY_FLAGS, error_lines, lacking, last_line

from resnet_cpu.run import checkpoint

pytestmark = [pytest.mark.mpi, pytest.mark.multihost]
LAB, AGENT = (str(ROOT / "launch" / "network-lab" / name) for name in ("lab", "agent"))
WAIT_S = 240
KEEPALIVE = {"time": 4, "intvl": 1, "probes": 4}  # a daemon of Open MPI counts as lost after 8 s instead of 25
TRAIN = [sys.executable, "-m", "resnet_cpu.train", *TINY_FLAGS, "--threads=1"]


class Job(NamedTuple):
    """The launcher, and the files with the output of it and of the ranks."""

    process: subprocess.Popen
    out: IO[str]
    err: IO[str]


class Lab:
    """Two hosts, each with its own folder at the path `own`."""

    def __init__(self, own: pathlib.Path) -> None:
        self.name, self.own = f"test{os.getpid()}-", own
        keepalive = {f"OMPI_MCA_oob_tcp_keepalive_{key}": str(value) for key, value in KEEPALIVE.items()}
        self.environment = {**OUTSIDE, **keepalive, "RESNET_CPU_LAB": self.name}
        self.first, self.second = f"{self.name}1", f"{self.name}2"

    def __call__(self, *arguments, check=True) -> subprocess.CompletedProcess:
        process = subprocess.run(
            [LAB, *map(str, arguments)], env=self.environment, capture_output=True, text=True, timeout=60
        )
        assert not check or process.returncode == 0, f"{arguments}: {process.returncode}: {process.stderr}"
        return process

    def start(self, *command, hosts=None, per_host=1, agent=AGENT, launch=()) -> Job:
        """Start a command on every host, with the package's launcher on the first."""
        launch = [
            *[sys.executable, "-m", "resnet_cpu.launch", f"--hosts={hosts or f'{self.first},{self.second}'}"],
            *[f"--ranks_per_node={per_host}", *launch, "--"],
        ]
        out, err = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")  # noqa: SIM115
        process = subprocess.Popen(
            [LAB, "run", self.first, *launch, *map(str, command)],
            cwd=ROOT,
            env={**self.environment, "RESNET_CPU_LAUNCH_AGENT": str(agent)},
            stdout=out,
            stderr=err,
        )
        return Job(process, out, err)

    def run(self, *command, **more) -> subprocess.CompletedProcess:
        return ended(self.start(*command, **more))


def ended(job: Job) -> subprocess.CompletedProcess:
    """Wait for the launcher to end, like a batch script; processes on a disconnected host may keep its pipes open."""
    try:
        code = job.process.wait(timeout=WAIT_S)
    finally:
        job.process.kill()
    texts = []
    for file in (job.out, job.err):
        file.seek(0)
        texts.append(file.read())
        file.close()
    return subprocess.CompletedProcess(job.process.args, code, *texts)


@pytest.fixture(scope="module")
def lab(tmp_path_factory, tiny_data):
    lab = Lab(tmp_path_factory.mktemp("own"))
    up = lab("up", 2, "--own", lab.own, check=False)
    if up.returncode == 69:
        lacking(up.stderr.strip())
    assert up.returncode == 0, up.stderr
    try:
        for host in (lab.first, lab.second):
            lab("run", host, "cp", "-r", tiny_data, lab.own / "data")
        yield lab
    finally:
        lab("down")


@pytest.fixture(scope="module")
def unanswered(lab, tmp_path_factory):
    """Start with a host that does not exist and one that never answers; takes 20 s, while other tests run."""
    agent = tmp_path_factory.mktemp("agent") / "agent"
    agent.write_text(f'#!/bin/sh\n[ $1 != silent ] || exec sleep 120\nexec {AGENT} "$@"\n')
    agent.chmod(0o755)
    yield lab.start("true", hosts=f"{lab.first},missing,silent", agent=agent)


def until_it_trains(job: Job, run_dir: pathlib.Path) -> None:
    """Wait for the first checkpoint."""
    deadline = time.monotonic() + WAIT_S
    while not checkpoint.steps(str(run_dir)):
        assert job.process.poll() is None and time.monotonic() < deadline, ended(job).stderr
        time.sleep(0.05)


LONG = ["--phase=main:steps=100000,lr=0.01,decay=constant", "--phase=tail:steps=1,lr=0.01"]


def test_two_hosts_with_a_copy_of_the_data_each_give_the_bits_of_two_ranks_on_one_host(lab, unanswered, tmp_path):
    data = f"--data_dir={lab.own / 'data'}"
    together = lab.start(*TRAIN, data, f"--run_dir={tmp_path / 'two_hosts'}")
    one = lab.start(*TRAIN, data, f"--run_dir={tmp_path / 'one_host'}", hosts=lab.first, per_host=2)
    for process in map(ended, (together, one)):
        assert process.returncode == 0, process.stderr
        assert json.loads(last_line(process.stdout))["ranks"] == 2
    record = json.loads((tmp_path / "two_hosts" / "run.json").read_text())
    assert [row["host"] for row in record["per_rank"]] == [lab.first, lab.second]
    states = [runs.final_state(str(tmp_path / name)) for name in ("two_hosts", "one_host")]
    assert not runs.differing(*states)
    assert runs.losses(str(tmp_path / "two_hosts")) == runs.losses(str(tmp_path / "one_host"))


def test_missing_or_different_data_on_one_host_is_reported_with_its_name(lab, tmp_path):
    folder = lab.own / "data"
    command = [*TRAIN, f"--data_dir={folder}", f"--run_dir={tmp_path / 'run'}"]
    lab("run", lab.second, "mv", folder, lab.own / "aside")
    missing = lab.run(*command)
    lab("run", lab.second, "cp", "-r", lab.own / "aside", folder)
    code = "from conftest import write_tiny_data; write_tiny_data('{}', train=40)"
    lab("run", lab.second, "rm", "-r", folder)
    lab("run", lab.second, "env", f"PYTHONPATH={ROOT}/tests:{ROOT}", sys.executable, "-c", code.format(folder))
    other = lab.run(*command)
    lab("run", lab.second, "rm", "-r", folder)
    lab("run", lab.second, "mv", lab.own / "aside", folder)
    assert (missing.returncode, other.returncode) == (65, 65), missing.stderr + other.stderr
    (line,) = error_lines(missing)
    assert f"rank 1 on {lab.second}: --data_dir={folder}: the folder does not exist" in line
    (line,) = error_lines(other)
    assert f"the data on host {lab.second} (rank 1) differ from those on host {lab.first} (rank 0)" in line
    assert "Traceback" not in missing.stderr + other.stderr and not (tmp_path / "run").exists()


def with_another(lab, changed, usual, run_dir) -> subprocess.CompletedProcess:
    """Train while the second host sees `changed` at the path `usual`."""
    lab("run", lab.second, "mount", "--bind", changed, usual)
    try:
        return lab.run(*TRAIN, f"--data_dir={lab.own / 'data'}", f"--run_dir={run_dir}")
    finally:
        lab("run", lab.second, "umount", usual)


def test_another_version_of_the_code_on_one_host_is_refused(lab, tmp_path):
    package = ROOT / "resnet_cpu"
    changed = tmp_path / "resnet_cpu"
    shutil.copytree(package, changed)
    (changed / "errors.py").write_text((package / "errors.py").read_text() + "# newer\n")
    process = with_another(lab, changed, package, tmp_path / "run")
    assert process.returncode == 64, process.stderr
    (line,) = error_lines(process)
    assert f"rank 1 on {lab.second} runs with other code" in line and f"rank 0 on {lab.first}" in line


def test_another_version_of_a_package_on_one_host_is_refused(lab, tmp_path):
    installed = importlib.metadata.distribution("horovod")
    record = pathlib.Path(installed.locate_file(f"horovod-{installed.version}.dist-info/METADATA"))
    changed = tmp_path / "METADATA"
    changed.write_text(record.read_text().replace(f"\nVersion: {installed.version}\n", "\nVersion: 0.27.0\n"))
    process = with_another(lab, changed, record, tmp_path / "run")
    assert process.returncode == 64, process.stderr
    (line,) = error_lines(process)
    assert f"rank 1 on {lab.second} runs with other horovod (0.27.0) than rank 0 on {lab.first}" in line
    assert not (tmp_path / "run").exists()


def test_a_disconnected_host_ends_the_job_and_the_other_continues_alone_from_the_checkpoint(lab, tmp_path):
    """The watchdog reports first, then Open MPI notices the lost host. Nothing else would: no message arrives."""
    run_dir = tmp_path / "run"
    command = [*TRAIN, f"--data_dir={lab.own / 'data'}", f"--run_dir={run_dir}", *LONG, "--checkpoint_every_steps=3"]
    process = lab.start(*command, "--stall_timeout=4")
    try:
        until_it_trains(process, run_dir)
        lab("cut", lab.second)
        lost = ended(process)
    finally:
        lab("restore", lab.second)
        lab("kill", lab.second)
    assert lost.returncode == 76, lost.stderr
    assert "no step finished for 4 s" in error_lines(lost)[0]
    reached = max(checkpoint.steps(str(run_dir)))
    alone = subprocess.run(
        [LAB, "run", lab.first, *command, "--resume=must", f"--max_steps={reached + 3}"],
        cwd=ROOT,
        env=lab.environment,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )
    assert alone.returncode == 0, alone.stderr
    result = json.loads(last_line(alone.stdout))
    assert (result["steps"], result["ranks"]) == (reached + 3, 1)


def test_a_host_that_fails_ends_the_job_at_once(lab, tmp_path):
    run_dir = tmp_path / "run"
    process = lab.start(
        *TRAIN, f"--data_dir={lab.own / 'data'}", f"--run_dir={run_dir}", *LONG, "--checkpoint_every_steps=3"
    )
    until_it_trains(process, run_dir)
    lab("kill", lab.second)
    gone = ended(process)  # long before the stall timeout of ten minutes
    assert gone.returncode == 76 and "a host was lost" in gone.stderr, gone.stderr
    assert checkpoint.newest(str(run_dir)) is not None


def test_unusable_interfaces_are_excluded_or_reported(lab, tmp_path):
    """docker0 is excluded by the launcher; others are reported, and the user names the right one."""
    command = [*TRAIN, "--data_dir=/no/such", f"--run_dir={tmp_path / 'run'}", "--stall_timeout=3"]
    lab("decoy", "docker0")
    left_out = lab.run(*command)
    lab("decoy", "br-4f2a")
    lost = lab.run(*command)
    named = lab.run(*command, launch=["--interface=lan0"])
    assert (left_out.returncode, lost.returncode, named.returncode) == (65, 76, 65), lost.stderr
    (line,) = error_lines(lost)
    assert "the ranks did not reach each other in 10 s" in line and "--interface=NAME" in line
    assert all("/no/such" in error_lines(reached)[0] for reached in (left_out, named))


def test_negative_control_open_mpi_alone_uses_the_unusable_interface(lab, tmp_path):
    code = "from mpi4py import MPI; MPI.COMM_WORLD.barrier(); print('through')"

    def through(seconds, *interface):
        command = ["mpirun", "--allow-run-as-root", "--host", f"{lab.first},{lab.second}", *interface]
        command += ["--mca", "plm_rsh_agent", AGENT, "-x", "PATH", sys.executable, "-c", code]
        return lab("run", lab.first, "timeout", seconds, *command, check=False)

    lab("decoy", "docker1")
    try:
        named = through(50, "--mca", "btl_tcp_if_include", "lan0", "--mca", "oob_tcp_if_include", "lan0")
        assert named.returncode == 0 and "through" in named.stdout, named.stderr
        alone = through(15)
        assert alone.returncode == 124 and "through" not in alone.stdout, alone.stderr
    finally:
        for host in (lab.first, lab.second):
            lab("run", host, "ip", "link", "delete", "docker1")


def test_all_hosts_that_do_not_answer_are_named_before_the_start(lab, unanswered):
    process = ended(unanswered)
    assert process.returncode == 76 and process.stdout == "", process.stderr
    (line,) = error_lines(process)
    assert f"missing (network-lab: no host missing in lab {lab.name}" in line and "silent (no answer in 20 s)" in line
    assert f"{lab.first} (" not in line
