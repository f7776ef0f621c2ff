"""The batch files under the real sbatch: one temporary Slurm on this machine, all jobs side by side."""

import contextlib
import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any, Callable, Dict, Iterator, List

import psutil
import pytest
from conftest import OUTSIDE, ROOT, TINY_FLAGS, lacking

from resnet_cpu.run import checkpoint

pytestmark = pytest.mark.slurm
LAB = str(ROOT / "launch" / "slurm-lab" / "lab.sh")
# Long enough to interrupt a run in the middle, also on a busy machine.
LONG = [*TINY_FLAGS, "--phase=main:steps=200,lr=0.05,warmup_steps=3", "--threads=1", "--data_threads=1"]
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
HOSTILE = ["; touch pwned", "$(touch pwned)", "`touch pwned`", "a\ntouch pwned", "-rf", "' touch pwned '", '" *', ""]

# Replaces python if no network is to be trained: records its arguments, and ends as DOES says.
STAND_IN = """#!/usr/bin/env bash
[[ "$1 $2" == "-m resnet_cpu.launch" ]] || exec "$REAL_PYTHON" "$@"
printf '%s\\0' "$@" >"$NOTES/${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}.${SLURM_RESTART_COUNT:-0}"
case $DOES in
  exit) exit "$CODE" ;;
  "exit with the element's number") exit "$SLURM_ARRAY_TASK_ID" ;;
  "element 1 stops once") ((SLURM_ARRAY_TASK_ID == 1 && ${SLURM_RESTART_COUNT:-0} == 0)) && exit 75 || exit 0 ;;
  "one checkpoint an attempt") mkdir -p "run/checkpoints/step-0000000$((${SLURM_RESTART_COUNT:-0} + 1))"
    ((${SLURM_RESTART_COUNT:-0} == 2)) || exit 75 ;;
  "die of USR1") ((${SLURM_RESTART_COUNT:-0} == 0)) || exit 0
    echo waiting; while :; do sleep 0.1; done ;;
  "wait for USR1") ((${SLURM_RESTART_COUNT:-0} == 0)) || exit 0
    trap 'exit 75' USR1; echo waiting; while :; do sleep 0.1; done ;;
esac
"""


class Lab:
    """A running Slurm; jobs have the names that sbatch printed."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def run(self, *command: str, cwd: pathlib.Path = ROOT, **environment: str) -> str:
        return subprocess.run(
            [LAB, "run", self.folder, *command],
            cwd=cwd,
            env={**OUTSIDE, **environment},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout.strip()

    def submit(self, cwd: pathlib.Path, *words: str, **environment: str) -> str:
        return self.run(
            "sbatch",
            "--parsable",
            *words,
            cwd=cwd,
            **{"MAX_RESTARTS": "1", **environment},
        )

    def facts(self, job: str) -> Dict[str, str]:
        """Return what Slurm reports about a job: JobState, ExitCode, Restarts ..."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def await_state(self, job: str, states: Any = frozenset(ENDED), timeout: float = 600) -> Dict[str, str]:
        facts: Dict[str, str] = {}

        def reached() -> bool:
            facts.update(self.facts(job))
            return facts["JobState"] in states

        await_true(reached, f"job {job} to be {sorted(states)}: {facts}", timeout)
        return facts


def await_true(condition: Callable[[], Any], what: str, timeout: float = 600, pause: float = 0.2) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout} s for {what}"
        time.sleep(pause)


@pytest.fixture(scope="session")
def lab():
    places = os.environ.get("PATH", "") + ":/usr/sbin"
    if os.geteuid() or not all(shutil.which(name, path=places) for name in ("slurmctld", "slurmd", "munged", "sbatch")):
        lacking("needs root and Slurm: sudo launch/slurm-lab/lab.sh install")
    with started_lab() as running:
        yield running


@contextlib.contextmanager
def started_lab(**environment: str) -> Iterator[Lab]:
    folder = tempfile.mkdtemp(prefix="slurm-lab-")  # the path of a socket must be short
    subprocess.run([LAB, "start", folder], env={**OUTSIDE, **environment}, check=True, timeout=120)
    try:
        yield Lab(folder)
    finally:
        subprocess.run([LAB, "stop", folder], check=True, timeout=120)
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Callable[[str], pathlib.Path]:
    """Make a folder to submit from, with its own launch files that a test may change."""

    def make(name: str) -> pathlib.Path:
        folder = tmp_path_factory.mktemp(name)
        (folder / "logs").mkdir()
        (folder / "experiments").symlink_to(ROOT / "experiments")
        shutil.copytree(ROOT / "launch", folder / "launch")
        return folder

    return make


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory) -> Dict[str, str]:
    """Return the environment in which `python` is STAND_IN."""
    folder = tmp_path_factory.mktemp("stand_in")
    (folder / "bin").mkdir()
    (folder / "bin" / "python").write_text(STAND_IN)
    (folder / "bin" / "python").chmod(0o755)
    return {"VENV": str(folder), "REAL_PYTHON": sys.executable, "DOES": "exit", "CODE": "0"}


def log_of(folder: pathlib.Path, job: str) -> str:
    files = list((folder / "logs").glob(f"*-{job}.out"))
    return files[0].read_text() if files else ""


def await_log(folder: pathlib.Path, job: str, printed: str) -> None:
    await_true(lambda: printed in log_of(folder, job), f"'{printed}' in the log of job {job}")


def words_of(notes: pathlib.Path, which: str) -> List[str]:
    """Return the arguments after `--` with which the stand-in was started."""
    words = (notes / which).read_text().split("\0")[:-1]
    return words[words.index("--") + 1 :]


@pytest.fixture(scope="session")
def jobs(lab, site, stand_in, tiny_data, tmp_path_factory):
    """Submit all jobs at once; return folder, job and notes of each."""
    started: Dict[str, Any] = {}

    def start(name: str, *words: str, where: Any = None, does: str = "", **environment: str) -> None:
        folder = where or site(name)
        notes = tmp_path_factory.mktemp("notes")
        if does:
            environment = {**stand_in, "DOES": does, "NOTES": str(notes), **environment}
        else:
            environment = {"VENV": str(pathlib.Path(sys.executable).parent.parent), **environment}
        started[name] = folder, lab.submit(folder, *words, **environment), notes

    data = f"--data_dir={tiny_data}"
    local = tmp_path_factory.mktemp("local")
    start("limited", "launch/train.sbatch", *LONG, data, "--run_dir=run")
    start("whole", "--job-name=; touch pwned $(touch pwned)", "launch/train.sbatch", *LONG, data, f"--run_dir={WHOLE}")
    endless = "--phase=main:steps=1000000,lr=0.05"
    often = "--checkpoint_every_steps=5"
    staged = ["--hold", "--ntasks-per-node=1", "launch/stage.sbatch", tiny_data, *LONG, endless, often, "--run_dir=run"]
    start("cancelled", *staged, LOCAL_DISK=str(local))
    damaged = tmp_path_factory.mktemp("damaged")
    shutil.copytree(tiny_data, damaged, dirs_exist_ok=True)
    shard = min(path for path in damaged.glob("train-*") if path.suffix != ".index")
    content = bytearray(shard.read_bytes())
    content[200] ^= 1
    shard.write_bytes(bytes(content))
    start("damaged", "launch/stage.sbatch", str(damaged), *LONG, "--run_dir=run", LOCAL_DISK=str(local))
    start("missing", "--job-name=-rf", "launch/train.sbatch", *LONG, "--data_dir=$(touch pwned)", "--run_dir=-rf")
    start("newline", "launch/train.sbatch", *LONG, data, "--run_dir=run\ntouch pwned")

    start("cap", "launch/train.sbatch", "--run_dir=run", does="exit", CODE="76")
    start("progress", "launch/train.sbatch", "--run_dir=run", does="one checkpoint an attempt", MAX_RESTARTS="0")
    start("codes", f"--array={','.join(map(str, CODES))}", "launch/train.sbatch", does="exit with the element's number")
    requeued = f"--array={','.join(map(str, REQUEUED))}"
    start("requeued", requeued, "launch/train.sbatch", does="exit with the element's number", MAX_RESTARTS="0")
    start("stopped", "launch/train.sbatch", "--run_dir=run", does="wait for USR1")
    start("early", "launch/train.sbatch", "--run_dir=run", does="die of USR1")
    deaf = site("deaf")
    spoil(deaf / "launch" / "batch.sh", 'kill -s "$1" -- "$child" 2>/dev/null || true', "true")
    start("deaf", "launch/train.sbatch", "--run_dir=run", where=deaf, does="wait for USR1")
    start("words", "launch/train.sbatch", *HOSTILE, does="exit")
    unquoted = site("unquoted")
    spoil(unquoted / "launch" / "batch.sh", '[@]}"} "$@"\n', '[@]}"} "$@"; for word; do eval "$word" || true; done\n')
    start("unquoted", "launch/train.sbatch", *HOSTILE, where=unquoted, does="exit")
    rungs = ["--array=0-1", "launch/lr_scaling.sbatch", data, "--model=resnet18"]
    start("lr_scaling", *rungs, does="element 1 stops once", RUNGS="64 128")
    start("scaling", "--array=0-2", "--nodes=1", "launch/scaling.sbatch", "--seed=1", does="exit", RUNGS="1 2")
    start("collapsed_ensemble", "launch/collapsed_ensemble.sbatch", data, does="exit")
    start("evaluate", "launch/evaluate.sbatch", "--run_dir=my run", does="exit", RANK_PREFIX="nice -n 5")
    start("benchmark", "launch/benchmark.sbatch", "--benchmark=allreduce", does="exit")
    start("prepare", "launch/prepare.sbatch", "verify", "--dataset=digits", data)
    for name in ("stopped", "early", "deaf"):
        folder, job, _ = started[name]
        await_log(folder, job, "waiting")
        lab.run("scancel", "--signal=USR1", "--batch", job)
    return started


WHOLE = "$(touch pwned); touch pwned"
REQUEUED = [74, 75, 76, 137]
CODES = [1, 64, 65, 66, 70, 73, 77, 138, 139, 143]


def spoil(file: pathlib.Path, old: str, new: str) -> None:
    text = file.read_text()
    assert text.count(old) == 1, old
    file.write_text(text.replace(old, new))


def ranks_of(run_dir: str, cwd: pathlib.Path) -> List[psutil.Process]:
    """Return the processes that train in `run_dir`, seen from `cwd`."""
    found = []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
            trains = "python" in os.path.basename(words[0]) and "resnet_cpu.train" in words
            if trains and f"--run_dir={run_dir}" in words and process.cwd() == str(cwd):
                found.append(process)
        except (psutil.Error, IndexError):
            pass
    return found


@pytest.fixture(scope="session")
def held(lab, jobs):
    """Suspend the ranks of the job that will meet its time limit, and move the limit near; return the ranks."""
    folder, job, _ = jobs["limited"]
    metrics = folder / "run" / "metrics.jsonl"
    await_true(lambda: metrics.exists() and metrics.read_text().count("\n") > 3, "steps", pause=0.005)
    ranks = ranks_of("run", folder)
    for rank in ranks:
        rank.send_signal(signal.SIGSTOP)
    assert len(ranks) == 2
    lab.run("scontrol", "update", f"JobId={job}", "EndTime=now+5minutes")  # the five minutes of --signal=B:USR1@300
    return ranks


def test_scancel_leaves_a_checkpoint_of_a_run_on_staged_data(lab, jobs, held):
    folder, job, _ = jobs["cancelled"]
    lab.run("scontrol", "release", job)  # now that the ranks of another job are idle
    await_true(lambda: checkpoint.steps(str(folder / "run")) if (folder / "run").exists() else 0, "a checkpoint")
    lab.run("scancel", job)
    facts = lab.await_state(job)
    log = log_of(folder, job)
    assert (facts["JobState"], facts["Restarts"]) == ("CANCELLED", "0"), log
    path, manifest = checkpoint.newest(str(folder / "run"))
    assert manifest["step"] > 0 and checkpoint.load(path, "weights")
    assert "checked in" in log and "not submitted again: cancelled" in log
    (used,) = [line for line in (folder / "run" / "resolved.flags").read_text().splitlines() if "data_dir" in line]
    assert pathlib.Path(used.split("=", 1)[1], ".checked").exists()


def test_a_job_stopped_by_its_time_limit_requeues_itself_and_ends_with_the_same_bits(lab, jobs, held):
    """Slurm itself sends the signal before its time limit, up to 30 s after `held`."""
    import whole_runs as runs

    folder, job, _ = jobs["limited"]
    await_log(folder, job, "USR1: time is nearly up")
    for rank in held:
        rank.send_signal(signal.SIGCONT)
    lab.await_state(job, {"PENDING", *ENDED})
    lab.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")  # the full time again, for the second attempt

    facts = lab.await_state(job)
    log = log_of(folder, job)
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), log
    for printed in ("ended with 75, newest checkpoint: step", "attempt 2, 1 nodes", "continues from step"):
        assert printed in log, log
    whole_folder, whole_job, _ = jobs["whole"]
    assert lab.await_state(whole_job)["JobState"] == "COMPLETED", log_of(whole_folder, whole_job)
    one, other = str(folder / "run"), str(whole_folder / WHOLE)
    stopped_after = [row for row in runs.read_rows(str(folder / "run" / "metrics.jsonl")) if row["attempt"] == 1][-1][
        "step"
    ] + 1
    assert 3 < stopped_after < 206
    assert not runs.differing(runs.final_state(one), runs.final_state(other))
    assert runs.losses(one) == runs.losses(other)


def test_train_finishes_on_two_tasks_whatever_the_names_of_job_and_folder(lab, jobs):
    folder, job, _ = jobs["whole"]
    assert lab.await_state(job)["JobState"] == "COMPLETED", log_of(folder, job)
    result = json.loads((folder / WHOLE / "result.json").read_text())
    assert result["complete"] and result["ranks"] == 2 and result["steps"] == 206
    assert not list(folder.rglob("pwned*"))


@pytest.mark.parametrize("name, code, printed", [
    ("damaged", 65, "could not be verified"),
    ("missing", 65, "the folder does not exist"),
    ("newline", 64, "contains a newline"),
])  # fmt: skip
def test_a_failing_job_reports_why_and_is_not_requeued(lab, jobs, name, code, printed):
    folder, job, _ = jobs[name]
    facts = lab.await_state(job)
    log = log_of(folder, job)
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", f"{code}:0", "0"), log
    assert printed in log and "not submitted again: another attempt would end the same way" in log
    assert not list(folder.rglob("pwned*"))


def test_negative_control_other_codes_are_not_requeued(lab, jobs):
    folder, job, _ = jobs["codes"]
    for code in CODES:
        facts = lab.await_state(f"{job}_{code}")
        assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", f"{code}:0", "0")


def test_io_errors_stops_and_lost_peers_are_requeued_with_a_cap(lab, jobs):
    folder, job, _ = jobs["requeued"]
    for code in REQUEUED:
        facts = lab.await_state(f"{job}_{code}")
        assert (facts["JobState"], facts["Restarts"]) == ("FAILED", "0")
        assert "no new checkpoint in 1 attempts in a row" in log_of(folder, facts["JobId"])


def test_a_job_without_progress_is_requeued_only_up_to_the_cap(lab, jobs):
    folder, job, notes = jobs["cap"]
    facts = lab.await_state(job)
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "76:0", "1"), log_of(folder, job)
    assert "no new checkpoint in 2 attempts in a row" in log_of(folder, job) and len(list(notes.iterdir())) == 2


def test_a_job_with_progress_is_requeued_without_a_cap(lab, jobs):
    folder, job, _ = jobs["progress"]
    facts = lab.await_state(job)
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "2"), log_of(folder, job)


@pytest.mark.parametrize(
    "name, state, restarts", [("stopped", "COMPLETED", "1"), ("early", "COMPLETED", "1"), ("deaf", "CANCELLED", "0")]
)
def test_usr1_is_forwarded_and_a_shell_that_does_not_forward_it_is_found(lab, jobs, name, state, restarts):
    """`early`: ranks without a handler yet die of it. `deaf`, the negative control: only scancel ends that job."""
    folder, job, _ = jobs[name]
    await_log(folder, job, "USR1: time is nearly up")
    if name == "deaf":
        lab.run("scancel", job)
    facts = lab.await_state(job)
    assert (facts["JobState"], facts["Restarts"]) == (state, restarts), log_of(folder, job)


def test_hostile_flags_arrive_as_words_and_are_not_executed(lab, jobs):
    folder, job, notes = jobs["words"]
    assert lab.await_state(job)["JobState"] == "COMPLETED", log_of(folder, job)
    assert words_of(notes, f"{job}.0") == ["python", "-m", "resnet_cpu.train", *HOSTILE]
    assert not list(folder.rglob("pwned*"))


def test_negative_control_an_unquoted_batch_file_is_found(lab, jobs):
    folder, job, _ = jobs["unquoted"]
    lab.await_state(job)
    assert list(folder.rglob("pwned*"))


def test_the_lr_scaling_ladder_is_an_array_whose_elements_restart_alone(lab, jobs):
    folder, job, notes = jobs["lr_scaling"]
    for element, (rung, restarts) in enumerate([("64", "0"), ("128", "1")]):
        facts = lab.await_state(f"{job}_{element}")
        assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", restarts), log_of(folder, f"{job}_{element}")
        words = words_of(notes, f"{element}.{restarts}")
        assert words[3] == "--flagfile=experiments/lr_scaling/ladder.flags" and "--model=resnet18" in words
        assert words[-2:] == [f"--global_batch_size={rung}", f"--run_dir=runs/lr_scaling/batch-{rung}"]


def test_the_scaling_ladder_is_an_array_of_ranks_with_one_folder(lab, jobs):
    folder, job, notes = jobs["scaling"]
    for element, rung in enumerate(["1", "2"]):
        assert lab.await_state(f"{job}_{element}")["JobState"] == "COMPLETED"
        printed = (notes / f"{element}.0").read_text().split("\0")
        assert f"--ranks={rung}" in printed[: printed.index("--")]
        assert words_of(notes, f"{element}.0")[-2:] == ["--seed=1", f"--run_dir=runs/scaling-{job}/ranks-{rung}"]
    beyond = lab.await_state(f"{job}_2")
    assert beyond["ExitCode"] == "64:0" and "--array=0-1: RUNGS are 1 2" in log_of(folder, f"{job}_2")


def test_the_other_batch_files(lab, jobs):
    folder, job, notes = jobs["collapsed_ensemble"]
    assert lab.await_state(job)["JobState"] == "COMPLETED", log_of(folder, job)
    assert words_of(notes, f"{job}.0")[3] == "--flagfile=experiments/collapsed_ensemble/ce_of_b.flags"
    folder, job, notes = jobs["evaluate"]
    assert lab.await_state(job)["JobState"] == "COMPLETED", log_of(folder, job)
    assert words_of(notes, f"{job}.0") == ["nice", "-n", "5", "python", "-m", "resnet_cpu.evaluate", "--run_dir=my run"]
    folder, job, notes = jobs["benchmark"]
    assert lab.await_state(job)["JobState"] == "COMPLETED", log_of(folder, job)
    assert words_of(notes, f"{job}.0") == ["python", "-m", "resnet_cpu.benchmark", "--benchmark=allreduce"]
    folder, job, _ = jobs["prepare"]
    assert lab.await_state(job)["JobState"] == "COMPLETED", log_of(folder, job)
    assert '{"train": 50, "validation": 21}' in log_of(folder, job)


def test_two_nodes_that_share_a_disk_share_one_copy(lab, site, stand_in, tiny_data, tmp_path):
    """One task per node copies the data; both labs run side by side."""
    folder = site("two_nodes")
    with started_lab(LAB_NODES="2") as other:
        words = ["--nodes=2", "--ntasks-per-node=1", "launch/stage.sbatch", tiny_data, "--dataset=digits"]
        job = other.submit(folder, *words, LOCAL_DISK=str(tmp_path), NOTES=str(tmp_path), **stand_in)
        assert other.await_state(job)["JobState"] == "COMPLETED", log_of(folder, job)
        folders_of_jobs = ["squeue", "--states=all", "--noheader", "--format=%Z"]
        assert str(folder) in other.run(*folders_of_jobs).splitlines()
        assert str(folder) not in lab.run(*folders_of_jobs).splitlines()
    log = log_of(folder, job)
    assert log.count("checked in") == 1 and log.count("is already there") == 1, log
    assert words_of(tmp_path, f"{job}.0")[-1].startswith(f"--data_dir={tmp_path}/resnet_cpu-0/data-")


def test_a_second_start_changes_nothing(lab):
    before = lab.run("scontrol", "show", "config")
    subprocess.run([LAB, "start", lab.folder], check=True, timeout=60)
    kept = [line for line in before.splitlines() if "SlurmctldPort" in line or "BOOT_TIME" in line]
    assert len(kept) == 2 and set(kept) <= set(lab.run("scontrol", "show", "config").splitlines())


def test_the_lab_listens_only_on_this_machine(lab):
    daemons = {int(file.read_text()) for file in pathlib.Path(lab.folder).glob("*.pid")}
    found = [c for c in psutil.net_connections("inet") if c.pid in daemons and c.status == psutil.CONN_LISTEN]
    assert len(daemons) == 3 and found and {c.laddr.ip for c in found} == {"127.0.0.1"}


def test_an_interactive_job_of_one_task_starts_as_many_ranks_as_its_cores_hold(lab):
    """Fault: `--ranks=2` was refused in `salloc --ntasks=1 --cpus-per-task=2`."""
    program = "from resnet_cpu.cluster import control; print(control.connect(2).size)"
    job = ["salloc", "--quiet", "--ntasks=1", "--cpus-per-task=2"]
    launch = [sys.executable, "-m", "resnet_cpu.launch", "--mpi=openmpi"]
    for flags in (["--ranks=2"], ["--ranks_per_node=2"], ["--hosts=localhost:2"]):
        sizes = lab.run(*job, *launch, *flags, "--", sys.executable, "-c", program)
        assert "".join(sizes.split()) == "22", flags  # mpirun may join the lines


def test_a_command_in_the_terminal_of_a_step_of_two_tasks_is_one_rank(lab):
    """Fault: it was reported that launcher and mpi4py belong to different MPIs."""
    script = (
        'import os; from resnet_cpu.cluster import control; print(control.announced(), "SLURM_PTY_PORT" in os.environ)'
    )
    typed = f"{shlex.quote(sys.executable)} -c {shlex.quote(script)}"
    for command, expected in ((f"{typed}; true", "(1, 0) True"), (f"exec {typed}", "(2, 0) True")):
        step = shlex.join(["srun", "--pty", "--ntasks=2", "bash", "-c", command])
        assert expected in lab.run("script", "--quiet", "--return", "--command", step, "/dev/null")
