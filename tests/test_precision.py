"""Which precision is advised: by a measurement on hosts of the type, by the instruction sets only without one."""

import dataclasses
import subprocess

import pytest

from resnet_cpu.cluster import machine, precision

UNITS, NONE = ["avx2", "avx512f", "avx512_bf16"], ["avx2", "avx512f"]
FASTER, FLOAT32 = "float32, or --precision=bfloat16", "float32"


@pytest.mark.parametrize(
    "instruction_sets, speed, chosen, reason",
    [
        (UNITS, 1.8, FASTER, "1.8 times as fast here"),  # AMD EPYC, Zen 5: no AMX
        (UNITS, 0.7, FLOAT32, "0.7 times the speed"),
        (UNITS, None, FLOAT32, "launch and doctor measure"),
        (NONE, None, FLOAT32, "no products of bfloat16"),
        (NONE, 0.0, FLOAT32, "cannot be computed here"),
        ([*UNITS, "amx_bf16"], None, FASTER, "docs/tuning.md"),
        ([*UNITS, "amx_bf16"], 0.9, FLOAT32, "0.9 times the speed"),  # a measurement counts more than a name
    ],
)
def test_advice(instruction_sets, speed, chosen, reason):
    found, why = precision.advice(instruction_sets, speed)
    assert found == chosen and reason in why


def test_a_warning_needs_a_reason():
    assert "0.7 times" in precision.warning(UNITS, 0.7)
    assert "no products" in precision.warning(NONE, None)
    assert precision.warning(UNITS, 1.8) is None and precision.warning(UNITS, None) is None


@pytest.mark.parametrize(
    "output, expected",
    [("float32 10.0\nbfloat16 18.0\n", 1.8), ("float32 10.0\n", 0.0), ("", None), ("a traceback of words\n", None)],
)
def test_a_measurement_is_remembered(tmp_path, monkeypatch, output, expected):
    """A process that aborts in bfloat16 has printed the line of float32."""
    path, host = str(tmp_path / "precisions.json"), machine.read()
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, output))
    assert precision.measure(host, True, path) == expected
    assert precision.known(host, True, path) == expected
    assert precision.known(host, False, path) is None  # other packages have other kernels


def test_a_home_folder_that_cannot_be_written_does_not_stop_a_launch(monkeypatch):
    output = "float32 10.0\nbfloat16 18.0\n"
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, output))
    assert precision.measure(machine.read(), True, "/proc/none/precisions.json") == 1.8


def test_hosts_are_measured_once_and_only_where_it_may_pay(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    asked = []
    monkeypatch.setattr(precision, "measure", lambda host, extension: asked.append(host))
    host = machine.read()
    precision.find_out(dataclasses.replace(host, instruction_sets=tuple(NONE)), True)
    assert not asked
    precision.find_out(dataclasses.replace(host, instruction_sets=tuple(UNITS)), True)
    assert len(asked) == 1


@pytest.mark.training
def test_the_convolution_is_timed(tmp_path):
    """Really: at least float32 has a rate, on every processor."""
    found = precision.measure(machine.read(), True, str(tmp_path / "precisions.json"))
    assert found is not None and found >= 0
