"""Faults on purpose: only where and when the variable asks for one, and nothing at all without it."""

import subprocess
import sys

import pytest
from conftest import OUTSIDE, ROOT

from resnet_cpu import faults
from resnet_cpu.errors import FlagError


def ask(monkeypatch, text, rank=0):
    monkeypatch.setattr(faults, "_asked", text)
    monkeypatch.setattr(faults, "_fault", None)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", str(rank))


def test_without_the_variable_nothing_is_called(monkeypatch):
    assert not faults._asked  # the environment of the tests does not have it
    monkeypatch.setattr(faults, "_Fault", lambda text: pytest.fail("a fault was made"))
    monkeypatch.setattr(faults.os, "write", lambda *arguments: pytest.fail("something was written"))
    value = object()
    assert faults.point("step") is None and faults.point("batch", value) is value


def test_a_fault_happens_at_its_stage_the_nth_time_and_once(monkeypatch, capfd):
    ask(monkeypatch, "0:checkpoints:file:2:full")
    faults.point("checkpoints:file")
    faults.point("checkpoints:folder")
    with pytest.raises(OSError, match="No space left on device"):
        faults.point("checkpoints:file")
    faults.point("checkpoints:file")
    assert capfd.readouterr().err == "\nfault: 0:checkpoints:file:2:full at checkpoints:file\n"


def test_a_pattern_names_several_stages(monkeypatch):
    ask(monkeypatch, "0:*:*:readonly")
    faults.point("step")
    with pytest.raises(OSError, match="Read-only file system"):
        faults.point("members:folder")


def test_other_ranks_meet_no_fault(monkeypatch):
    ask(monkeypatch, "1:step:exception")
    faults.point("step")
    ask(monkeypatch, "1:step:exception", rank=1)
    with pytest.raises(RuntimeError, match="RESNET_CPU_FAULT at step"):
        faults.point("step")


def test_nan_spoils_the_value_once(monkeypatch):
    ask(monkeypatch, "0:batch:2:nan")
    values = [faults.point("batch", 1.0) for _ in range(3)]
    assert values[0] == values[2] == 1.0 and values[1] != values[1]


def test_a_slow_rank_stays_slow(monkeypatch):
    ask(monkeypatch, "0:step:2:slow")
    slept = []
    monkeypatch.setattr(faults.time, "sleep", slept.append)
    for _ in range(4):
        faults.point("step")
    assert slept == [faults.SLOW_S] * 3


@pytest.mark.parametrize("kind, code", [("kill", -9), ("term", -15), ("exit", faults.EXIT_CODE), ("kill@0.1", -9)])
def test_a_process_ends_as_asked(kind, code):
    """With a delay it ends while it does something else."""
    program = "import time; from resnet_cpu import faults; faults.point('step'); time.sleep(600)"
    environment = {**OUTSIDE, faults.VARIABLE: f"0:step:{kind}"}
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, timeout=60)
    assert ended.returncode == code


@pytest.mark.parametrize("text", ["kill", "0:step", "0:step:melt", "x:step:kill", "0:step:nan@1", "0:step:kill@x"])
def test_a_wrong_value_is_refused(monkeypatch, text):
    ask(monkeypatch, text)
    with pytest.raises(FlagError, match="not RANK:STAGE"):
        faults.point("step")
