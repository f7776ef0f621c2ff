"""The shell parts: what they run and what they say where something is missing, with stand-ins for the machine."""

import shutil
import subprocess

import pytest
from conftest import ROOT

NEEDED = ["bash", "dirname", "head", "sed", "cat", "sha256sum", "sort", "wc", "grep", "env"]


@pytest.fixture
def machine(tmp_path):
    """A PATH of our own: the tools a bare machine has, plus what a test puts there."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in NEEDED:
        (folder / tool).symlink_to(shutil.which(tool))

    def put(name: str, script: str) -> None:
        (folder / name).write_text(f"#!{shutil.which('bash')}\n{script}\n")
        (folder / name).chmod(0o755)

    def run(command: str, *arguments: str) -> subprocess.CompletedProcess:
        environment = {"PATH": str(folder), "HOME": str(tmp_path), "VENV": str(tmp_path / "venv")}
        return subprocess.run(
            ["bash", str(ROOT / command), *arguments], env=environment, capture_output=True, text=True, timeout=60
        )

    return put, run


def test_no_suitable_python_is_one_line(machine):
    put, run = machine
    put("python3", "exit 1")  # as one of another version answers
    process = run("launch/install.sh")
    assert process.returncode == 1 and process.stdout == ""
    (line,) = process.stderr.splitlines()
    assert "no Python 3.9-3.11" in line and "PYTHON=" in line


def test_without_root_the_missing_packages_are_listed(machine):
    put, run = machine
    put("python3", "exit 0")
    put("id", "echo 1000")
    put("cmake", "exit 0")
    process = run("launch/install.sh")
    assert process.returncode == 1
    (line,) = process.stderr.splitlines()
    for package in ("openmpi-bin", "libopenmpi-dev", "g++"):
        assert package in line
    assert "cmake" not in line


@pytest.mark.parametrize("arguments", [[], ["2"], ["0", "true"], ["two", "true"], ["-1", "true"]])
def test_local_says_how_it_is_used(machine, arguments):
    process = machine[1]("launch/local.sh", *arguments)
    assert process.returncode == 64 and "usage:" in process.stderr


@pytest.mark.parametrize(
    "cores, ranks, user, expected",
    [
        (8, 2, 0, ["--map-by slot:PE=4 --bind-to core", "--allow-run-as-root", "mpi_yield_when_idle 1"]),
        (4, 4, 1000, ["--map-by slot:PE=1 --bind-to core"]),
        (2, 3, 1000, ["--oversubscribe --bind-to none"]),
    ],
)
def test_local_places_ranks_on_cores(machine, cores, ranks, user, expected):
    put, run = machine
    put("mpirun", 'echo "$@"')
    put("id", f"echo {user}")
    put("nproc", f"echo {cores}")
    put("lscpu", "echo '# a comment'; for c in $(seq 0 63); do echo $c,0; echo $c,0; done")
    put("seq", "for ((i = $1; i <= $2; i++)); do echo $i; done")
    process = run("launch/local.sh", str(ranks), "python", "a b", "$(touch x)")
    assert process.returncode == 0, process.stderr
    assert f"-np {ranks}" in process.stdout and process.stdout.endswith("python a b $(touch x)\n")
    for part in expected:
        assert part in process.stdout
    assert ("--allow-run-as-root" in process.stdout) == (user == 0)
