"""The command doctor on this machine: its lines, its JSON, its exit code, and what it does without packages or MPI."""

import json
import os
import subprocess
import sys

import pytest
from conftest import OUTSIDE, ROOT, error_lines, last_line

from resnet_cpu.diagnosis import examination, facts
from resnet_cpu.diagnosis.examination import Asked


def by_name(process):
    """Return the checks in the last line of a doctor's output, after comparing it with the lines before."""
    document = json.loads(last_line(process.stdout))
    lines = process.stdout.splitlines()[:-1]
    assert [line.split()[:2] for line in lines] == [[row["state"], f"{row['name']}:"] for row in document["checks"]]
    states = [row["state"] for row in document["checks"]]
    assert (document["problems"], document["warnings"]) == (states.count("problem"), states.count("warning"))
    assert process.returncode == int(document["problems"] > 0)
    return {row["name"]: row for row in document["checks"]}


def test_it_examines_this_machine_and_both_folders(run_command, tmp_path, tiny_data):
    run_dir = tmp_path / "runs" / "first"
    process = run_command("doctor", "--quick", "--json", f"--run_dir={run_dir}", f"--data_dir={tiny_data}")
    found = by_name(process)
    assert list(found) == list(examination.CHECKS) and not process.stderr
    for name in ("python", "packages", "run_dir", "clock", "processor"):
        assert found[name]["state"] in ("ok", "warning"), found[name]
    assert str(tmp_path) in found["run_dir"]["what"] and tiny_data in found["data_dir"]["what"]
    assert found["ranks"]["what"] == "not tried (--quick)"
    assert os.listdir(tmp_path) == []


def test_a_problem_gives_exit_code_1_and_its_remedy(run_command, tmp_path):
    process = run_command("doctor", "--quick", f"--data_dir={tmp_path / 'none'}", OMP_NUM_THREADS="auto")
    assert process.returncode == 1 and "Traceback" not in process.stderr
    problems = [line for line in process.stdout.splitlines() if line.startswith("problem")]
    assert [line.split()[1] for line in problems] == ["threads:", "data_dir:"]
    assert "must be a whole number from 1 to 65536" in problems[0] and "no such folder" in problems[1]


def test_bad_flags_are_refused_as_by_every_command(run_command):
    process = run_command("doctor", "--fast")
    assert process.returncode == 64 and process.stdout == "" and "--fast: unknown flag" in error_lines(process)[0]


def test_without_any_package_it_reports_which_are_missing():
    """-S: Python without its site-packages, as when the environment is not active."""
    process = subprocess.run(
        [sys.executable, "-S", "-m", "resnet_cpu.doctor", "--json"],
        cwd=ROOT,
        env=OUTSIDE,
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = by_name(process)
    assert process.returncode == 1 and process.stderr == ""
    assert found["packages"]["state"] == "problem"
    for name in ("absl-py", "numpy", "tensorflow"):
        assert name in found["packages"]["what"]
    assert "activate" in found["packages"]["remedy"]
    assert found["clock"]["state"] != "problem" and found["tmp"]["state"] == "ok"


def test_one_process_reports_why_tensorflow_does_not_load():
    """The program that the ranks run, by itself, as without mpirun."""
    code = (
        "import sys; sys.modules['tensorflow'] = None\nfrom resnet_cpu.diagnosis import handshake; handshake.main([])"
    )
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=OUTSIDE, capture_output=True, text=True)
    stage = json.loads(last_line(process.stdout))
    assert process.returncode == 0 and stage["stage"] == "tensorflow" and "ModuleNotFoundError" in stage["error"]


def test_ranks_that_hang_are_ended(monkeypatch, tmp_path):
    stand_in = tmp_path / "mpirun"
    stand_in.write_text(
        f"#!/bin/sh\n[ $1 = --version ] && echo 'mpirun (Open MPI) 4.1.4' && exit\necho $$ >{tmp_path}/pid\nsleep 300\n"
    )
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("SLURM_JOB_ID", "7")  # ranks are started outside the batch job
    limit = 5.0
    outcome = facts.shake_hands(limit, alone=False)
    while not (tmp_path / "pid").exists():  # a busy machine: the launcher itself was not ready by then
        limit *= 2
        assert limit < 200
        outcome = facts.shake_hands(limit, alone=False)
    assert outcome.code is None and outcome.stages == {}
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.mpi
def test_two_ranks_exchange_a_vector_over_mpi_and_horovod(monkeypatch):
    monkeypatch.setattr(examination, "HANDSHAKE_S", 300.0)
    found = {check.name: check for check in examination.examine(Asked())}
    assert found["ranks"].state == "ok" and "two ranks added a vector" in found["ranks"].what, found["ranks"]
    assert found["tensorflow"].state == "ok", found["tensorflow"]
    assert found["horovod"].state == "ok" and "two ranks added a vector" in found["horovod"].what, found["horovod"]
    assert "libmpi" in found["ranks"].what and "libmpi" in found["horovod"].what


@pytest.mark.mpi
def test_negative_control_a_launcher_of_another_mpi_is_a_problem(monkeypatch, tmp_path):
    """A launcher that starts every process as a world of its own, as mpirun of one MPI does to programs of another."""
    stand_in = tmp_path / "mpirun"
    stand_in.write_text(
        """#!/bin/bash
[[ $1 != --version ]] || { echo 'mpirun (Open MPI) 4.1.4'; exit; }
while :; do case $1 in
  -x) case $2 in *=*) export "$2" ;; esac; shift 2 ;; --oversubscribe | --allow-run-as-root) shift ;;
  --mca) shift 3 ;; -*) shift 2 ;; *) break ;; esac; done
exec "$@"
"""
    )
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(examination, "HANDSHAKE_S", 300.0)
    found = {check.name: check for check in examination.examine(Asked())}
    assert found["ranks"].state == "problem" and "2 ranks were asked for" in found["ranks"].what, found["ranks"]
    assert found["horovod"].state == "warning" and "not tried" in found["horovod"].what
