"""How jobs of two ranks end: at once, with the right code, reported once; and the behaviour of plain Python."""

import concurrent.futures
import socket
import subprocess
import sys

import pytest
from conftest import OUTSIDE, ROOT, TINY_FLAGS, error_lines

pytestmark = pytest.mark.mpi
WAIT_S = 300  # half as long as the other rank sleeps


def start(*command, timeout=WAIT_S):
    return subprocess.run(
        ["launch/local.sh", "2", *command], cwd=ROOT, env=OUTSIDE, capture_output=True, text=True, timeout=timeout
    )


MODES = {
    "exception": (70, "internal error"),
    "data": (65, "rank 1: shard 7: record 3: broken"),
    "collective": (66, "everyone knows"),
    "apart": (65, "rank 1: rank 1 takes it for an error of all"),
    "full": (74, "a file: No space left on device"),
    "watchdog": (76, "no step finished for 1 s"),
}
# Flags that are refused before TensorFlow is loaded: exit code and part of the message.
REFUSED = {
    "--learning_rate=1": (64, "unknown flag"),
    "--ranks=3": (64, "--ranks=3: the launcher started 2"),
    "--global_batch_size=13": (64, "not divisible by 2 ranks"),
    "--phase=main:steps=2,lr=1,warmup_steps=3": (64, "warm-up of 3 steps"),
    "--data_dir=/no/such": (65, "/no/such"),
    "--resume=must": (66, "no checkpoint"),
    "--run_dir=/proc/no/run": (73, "/proc/no/run"),
}


@pytest.fixture(scope="module")
def ended(tiny_data, tmp_path_factory):
    """The ended processes, started three at a time: most of their time is spent waiting."""
    commands = {mode: (sys.executable, "tests/faults/failing.py", mode) for mode in [*MODES, "kill", "exit", "fine"]}
    for flag in REFUSED:
        commands[flag] = tuple(tiny(tiny_data, tmp_path_factory.mktemp("ended") / "run", flag))
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        return dict(zip(commands, pool.map(lambda command: start(*command), commands.values())))


@pytest.mark.parametrize("mode", MODES)
def test_one_failing_rank_ends_the_job_with_its_code_and_is_reported_once(ended, mode):
    process, (code, part) = ended[mode], MODES[mode]
    assert process.returncode == code, process.stderr
    # A stopped rank may be woken as the job ends and report the same.
    assert (len(error_lines(process)) == 1 or mode == "watchdog") and part in error_lines(process)[0], process.stderr
    assert process.stderr.count("Traceback") == (mode == "exception")
    if mode == "exception":
        assert "RuntimeError: the first to fail" in process.stderr
    if mode == "watchdog":
        assert "Current thread" in process.stderr or "Thread 0x" in process.stderr


@pytest.mark.parametrize("mode", ["kill", "exit"])
def test_a_rank_that_is_gone_takes_the_job_with_it(ended, mode):
    assert ended[mode].returncode in (137, 5)


def test_negative_control_a_good_end_is_0(ended):
    assert ended["fine"].returncode == 0 and not error_lines(ended["fine"])


def test_negative_control_without_the_guard_the_other_rank_lives_on():
    """Plain Python: after an exception of rank 1, rank 0 runs on; here it ends itself after 6 s."""
    code = (
        "import time, sys; from mpi4py import MPI; r = MPI.COMM_WORLD.Get_rank();"
        "time.sleep(6 * (1 - r)); print('alive', r, flush=True); 1 / (1 - r)"
    )
    assert "alive 0" in start(sys.executable, "-c", code).stdout


def tiny(tiny_data, run_dir, *more):
    return [
        sys.executable,
        "-m",
        "resnet_cpu.train",
        *TINY_FLAGS,
        f"--data_dir={tiny_data}",
        f"--run_dir={run_dir}",
        *more,
    ]


def reported_once(process, code, part):
    assert process.returncode == code, process.stderr
    assert len(error_lines(process)) == 1 and part in error_lines(process)[0], process.stderr
    assert "Traceback" not in process.stderr and process.stdout == ""


@pytest.mark.parametrize("flag", REFUSED)
def test_user_errors_are_reported_once_by_all_ranks_together(ended, flag):
    reported_once(ended[flag], *REFUSED[flag])


def test_a_loss_that_is_not_finite_is_reported_once_by_all_ranks_together(tiny_data, tmp_path):
    process = start(*tiny(tiny_data, tmp_path / "run", "--phase=main:steps=10,lr=1e30,decay=constant"))
    reported_once(process, 77, "no checkpoint yet; start again")


def test_ranks_with_other_flags_are_refused(tiny_data, tmp_path):
    command = " ".join(tiny(tiny_data, tmp_path / "run", "--seed=$OMPI_COMM_WORLD_RANK"))
    process = start("bash", "-c", command)
    assert (
        process.returncode == 64
        and f"rank 1 on {socket.gethostname()} runs with other flags" in error_lines(process)[0]
    )
