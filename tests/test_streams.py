"""Commands with standard streams that are closed or lead to a full device."""

import json
import subprocess
import sys

import pytest
from conftest import OUTSIDE, ROOT, TINY_FLAGS, error_lines

PLAN = "-m resnet_cpu.plan --dataset=synthetic --train_examples=64 --num_classes=3 --phase=main:steps=1,lr=1"
# Opens a file as a run does, and writes to the numbers of the standard streams as TensorFlow and MPI do.
WRITER = """
import os, sys
from resnet_cpu.cluster import guard
def main(argv):
    with open("kept", "w") as file:
        for number in (1, 2):
            os.write(number, b"from a library")
        print("printed")
        print("printed", file=sys.stderr)
        sys.stdin.read()
        file.write("own")
    os.system("echo from a child; echo from a child >&2")
guard.run(main)
"""


def shell(script, folder, **more):
    return subprocess.run(
        ["bash", "-c", f'python="{sys.executable}"; {script}'],
        cwd=folder,
        env={**OUTSIDE, **more},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=300,
    )


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_what_is_printed_with_closed_streams_gets_into_no_file(tmp_path, closed):
    """Fault: exit code 1, and nothing was trained."""
    (tmp_path / "writer.py").write_text(WRITER)
    process = shell(f'"$python" writer.py {closed}', tmp_path)
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "kept").read_text() == "own"
    assert ("printed" in process.stdout, "printed" in process.stderr) == (
        " >&-" not in f" {closed}",
        "2>&-" not in closed,
    )


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_commands_work_with_closed_streams(closed):
    assert shell(f'"$python" {PLAN} {closed}', ROOT).returncode == 0
    wrong = shell(f'"$python" {PLAN} --batch_size=0 {closed}', ROOT)  # negative control
    assert wrong.returncode == 64 and len(error_lines(wrong)) == ("2>&-" not in closed)


def test_a_full_device_is_an_io_error_and_hides_no_other():
    """Fault: with standard error on a full disk the exit code was 1."""
    full = shell(f'"$python" {PLAN} >/dev/full', ROOT)
    assert full.returncode == 74 and len(error_lines(full)) == 1 and "No space left" in full.stderr
    assert "Traceback" not in full.stderr
    assert shell(f'"$python" {PLAN} --batch_size=0 2>/dev/full', ROOT).returncode == 64
    assert shell('"$python" -m resnet_cpu.launch --dry_run -- true 2>/dev/full', ROOT).returncode == 74


@pytest.mark.training
@pytest.mark.parametrize("closed", [">&-", "2>&-"])
def test_a_run_with_closed_streams_is_complete(tmp_path, tiny_data, closed):
    flags = " ".join(f"'{flag}'" for flag in [*TINY_FLAGS, f"--data_dir={tiny_data}", "--max_steps=2"])
    process = shell(f'"$python" -m resnet_cpu.train {flags} --run_dir={tmp_path}/run {closed}', ROOT)
    assert process.returncode == 0, process.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 2
    assert "Traceback" not in process.stderr + process.stdout


@pytest.mark.parametrize("may_leave, code", [(True, 0), (False, 74)])
def test_when_the_reader_of_a_pipe_leaves(tmp_path, may_leave, code):
    """Fault: a training whose log was piped into a reader that ended was reported as done."""
    (tmp_path / "main.py").write_text(
        "import sys\nfrom resnet_cpu.cluster import guard\n"
        "def main(argv):\n    for _ in range(100000):\n        print('a line', file=sys.stderr)\n"
        f"guard.run(main, reader_may_leave={may_leave})\n"
    )
    process = shell('"$python" main.py 2>&1 | head -1; exit "${PIPESTATUS[0]}"', tmp_path)
    assert process.returncode == code and process.stdout == "a line\n"
