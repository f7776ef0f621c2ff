"""The watchdog: it ends a job that is stalled, and no job that was only suspended."""

import signal
import subprocess
import sys
import time

import pytest
from conftest import OUTSIDE, ROOT

pytestmark = pytest.mark.training

STALL_S, STEP_S = 1.0, 4.5
# A step that takes STEP_S by the clock. The main thread computes without another beat, so that nothing depends on
# which thread wakes first.
CODE = f"""
import time
from resnet_cpu.cluster import guard
with guard.Watchdog({STALL_S}) as watchdog:
    watchdog.beat()
    began = time.monotonic()
    print("began", flush=True)
    while time.monotonic() - began < {STEP_S}:
        time.sleep(0.01)
    print("finished", flush=True)
"""


@pytest.fixture(scope="module")
def ended():
    """Exit code, output and errors of the step, run as it is and suspended for all but half a second of it."""
    processes = {
        kind: subprocess.Popen(
            [sys.executable, "-c", CODE],
            cwd=ROOT,
            env=OUTSIDE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for kind in ("suspended", "running")
    }
    assert processes["suspended"].stdout.readline() == "began\n"
    processes["suspended"].send_signal(signal.SIGSTOP)
    time.sleep(STEP_S - STALL_S / 2)
    processes["suspended"].send_signal(signal.SIGCONT)
    return {kind: (*process.communicate(timeout=60), process.returncode) for kind, process in processes.items()}


def test_a_suspended_job_is_not_taken_for_a_stalled_one(ended):
    """As by scontrol suspend or a paused virtual machine: the time does not count, and the job continues."""
    out, err, code = ended["suspended"]
    assert (code, out) == (0, "finished\n") and not err


def test_negative_control_a_stalled_job_is_ended(ended):
    out, err, code = ended["running"]
    assert code == 76 and "finished" not in out and "no step finished for 1 s" in err and "Thread 0x" in err
