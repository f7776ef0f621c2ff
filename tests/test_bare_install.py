"""`pip install .` alone: one process trains and plans without MPI, Horovod, the Intel extension, TFDS and matplotlib.

Offline, so the packages are links to those of this environment: exactly what setup.cfg's install_requires leads to.
"""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, TINY_FLAGS, error_lines, last_line
from packaging.requirements import Requirement

pytestmark = pytest.mark.training

ABSENT = ["mpi4py", "horovod", "intel_extension_for_tensorflow", "tensorflow_datasets", "matplotlib", "sklearn"]


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(name):
    """Return the distributions that `name` needs without any extra, itself left out."""
    found, waiting = {}, [name]
    while waiting:
        for text in importlib.metadata.requires(waiting.pop()) or []:
            needed = Requirement(text)
            key = canonical(needed.name)
            if key in found or (needed.marker and not needed.marker.evaluate({"extra": ""})):
                continue
            found[key] = importlib.metadata.distribution(needed.name)
            waiting.append(needed.name)
    return list(found.values())


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """The interpreter of a virtual environment that holds this package and what it cannot do without."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    site = folder / "venv" / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    for distribution in closure("resnet_cpu"):
        for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(distribution.locate_file(top))
    source = folder / "source"
    shutil.copytree(ROOT / "resnet_cpu", source / "resnet_cpu", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    install = ["install", "-q", "--no-deps", "--no-index", "--no-build-isolation", "--target", site, source]
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", *install], check=True)
    return folder / "venv" / "bin" / "python"


def run(python, cwd, *arguments, **more):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [python, *arguments], cwd=cwd, env={**environment, **more}, capture_output=True, text=True, timeout=600
    )


def test_it_lacks_what_it_should_lack(bare, tmp_path):
    for name in ABSENT:
        assert "ModuleNotFoundError" in run(bare, tmp_path, "-c", f"import {name}").stderr, name
    code = "import resnet_cpu, tensorflow; print(resnet_cpu.__path__[0], 'itex' in open('/proc/self/maps').read())"
    path, plugin = run(bare, tmp_path, "-c", code).stdout.split()
    assert str(ROOT) not in path and plugin == "False"


def test_one_process_trains_evaluates_and_plans(bare, tmp_path, tiny_data):
    flags = [*TINY_FLAGS, f"--data_dir={tiny_data}", "--run_dir=run"]
    trained = run(bare, tmp_path, "-m", "resnet_cpu.train", *flags)
    assert trained.returncode == 0, trained.stderr
    result = json.loads(last_line(trained.stdout))
    assert result["examples"] == 21 and result["complete"]
    evaluated = run(bare, tmp_path, "-m", "resnet_cpu.evaluate", "--run_dir=run")
    assert json.loads(last_line(evaluated.stdout))["top1"] == result["top1"], evaluated.stderr
    planned = run(bare, tmp_path, "-m", "resnet_cpu.plan", *flags)
    assert planned.returncode == 0 and "16 steps" in planned.stdout, planned.stderr


def test_the_doctor_reports_what_is_missing_and_finds_one_process_whole(bare, tmp_path):
    process = run(bare, tmp_path, "-m", "resnet_cpu.doctor", "--json")
    found = {row["name"]: row for row in json.loads(last_line(process.stdout))["checks"]}
    assert found["packages"]["state"] == "ok" and "tensorflow" in found["packages"]["what"], found["packages"]
    assert found["horovod"]["state"] == "warning" and "not installed" in found["horovod"]["what"]
    assert found["ranks"]["state"] == "warning" and "mpi4py is missing" in found["ranks"]["what"]
    assert found["tensorflow"]["state"] in ("ok", "warning") and process.stderr == "", found["tensorflow"]


def test_two_ranks_without_mpi_report_what_is_missing(bare, tmp_path):
    announced = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}
    process = run(bare, tmp_path, "-m", "resnet_cpu.train", "--dataset=synthetic", "--run_dir=run", **announced)
    assert process.returncode == 64 and "mpi4py" in error_lines(process)[0], process.stderr
