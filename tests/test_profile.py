"""`--profile_steps` writes times by operation, for any steps of any phase, and changes no bit of the result."""

import csv
import glob
import os

import pytest
import whole_runs as runs

from resnet_cpu.cluster import control
from resnet_cpu.report import profile

pytestmark = pytest.mark.training

ALONE = control.World(1, 0)


@pytest.fixture(scope="module")
def plain(tiny_data, tmp_path_factory):
    """The folder of a finished run without a profile."""
    folder = str(tmp_path_factory.mktemp("plain") / "run")
    runs.train(ALONE, tiny_data, folder)
    return folder


@pytest.mark.parametrize("steps, recorded", [("2,4", "2 to 4"), ("9,12", "9 to 9")])
def test_operations_of_the_steps_are_timed_and_no_bit_changes(tiny_data, plain, tmp_path, steps, recorded, capsys):
    """Step 9 is the main phase's last; the steps after it belong to another graph."""
    folder = str(tmp_path / "run")
    runs.train(ALONE, tiny_data, folder, f"--profile_steps={steps}", shared=False)
    with open(os.path.join(folder, "profile.csv"), encoding="utf-8") as file:
        rows = {row["operation"]: row for row in csv.DictReader(file)}
    gradients = rows["ResnetCpuBatchNormGrad"]
    # Of 20 layers. On a busy machine TensorFlow's profiler loses events of steps that take milliseconds.
    assert 10 <= float(gradients["calls_per_step"]) <= 20
    assert float(gradients["ms_per_step"]) > 0
    assert any("Conv2D" in name for name in rows)
    times = [float(row["ms_per_step"]) for row in rows.values()]
    assert times == sorted(times, reverse=True)
    assert glob.glob(os.path.join(folder, "tensorboard", "plugins", "profile", "*", "*.xplane.pb"))
    assert f"profile: steps {recorded}, the longest operations" in capsys.readouterr().err
    assert not runs.differing(runs.final_state(folder), runs.final_state(plain))


def test_steps_that_never_run_are_reported(tiny_data, tmp_path, capsys):
    folder = str(tmp_path / "run")
    assert runs.train(ALONE, tiny_data, folder, *runs.SYNTHETIC, "--profile_steps=90,91")["complete"]
    assert "nothing recorded, because this attempt did not run the steps of --profile_steps" in capsys.readouterr().err
    assert not os.path.exists(os.path.join(folder, "profile.csv"))


def test_a_failing_profiler_does_not_end_the_run(tiny_data, tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise RuntimeError("no profiler here")

    monkeypatch.setattr(profile, "stop", fail)
    assert runs.train(ALONE, tiny_data, str(tmp_path / "run"), *runs.SYNTHETIC, "--profile_steps=2,3")["complete"]
    assert "profile: not written (RuntimeError: no profiler here)" in capsys.readouterr().err
