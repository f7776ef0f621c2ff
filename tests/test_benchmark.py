"""`benchmark`: its last line, on one rank and on two, and what it refuses."""

import dataclasses
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import OUTSIDE, ROOT, TINY_FLAGS, error_lines, last_line

from resnet_cpu import commandline
from resnet_cpu.bench import messages, steps
from resnet_cpu.bench.steps import StepTimings
from resnet_cpu.cluster.control import World
from resnet_cpu.errors import FlagError

pytestmark = pytest.mark.training

TOTAL = re.compile(r"total images/sec: (\d+\.\d+)")
QUICK = ["--warmup_steps=1", "--timed_steps=4", "--global_batch_size=8"]


def test_the_rate_is_that_of_the_slowest_rank():
    timed = StepTimings("synthetic", np.array([[1.0, 1.0], [2.0, 2.0]]), 8, 2)
    assert timed.images_per_second == 2 * 2 * 8 / 4.0
    assert "slowest rank 2.000 times the fastest" in timed.lines()[1]
    assert dataclasses.replace(timed, step_s=np.ones([1, 1])).lines()[0].endswith(": 1 rank x 8 images, 1 step timed")


def test_bandwidths_of_messages_are_those_of_nccl_tests(tmp_path):
    """B = S/t * 2 (n-1) / n (nccl-tests, doc/PERFORMANCE.md); the rate is a step's images over the gradients' time."""
    sent = [
        messages.Message(library, size, 4, np.array([size / 2e9] * 3))
        for library in ("mpi4py", "horovod")
        for size in (1024, 2_000_000)
    ]
    assert sent[1].algorithm_bandwidth == pytest.approx(2e9) and sent[1].bus_bandwidth == pytest.approx(3e9)
    timed = messages.MessageTimings(sent, 2_000_000, 64)
    assert timed.images_per_second == pytest.approx(64 / 1e-3)
    assert "nothing was trained" in timed.lines()[-1] and "2,000,000 bytes" in timed.lines()[-1]
    assert timed.network() is None  # ranks on one host share its link
    network = dataclasses.replace(timed, hosts=4).network()
    assert network == {
        "latency_s": pytest.approx(1024 / 2e9 / 2),
        "bandwidth": pytest.approx(3e9),
        "reduce_s_per_byte": 0,
    }
    assert "network.json" not in timed.write(str(tmp_path / "a"))
    assert "network.json" in dataclasses.replace(timed, hosts=4).write(str(tmp_path / "b"))
    assert json.loads((tmp_path / "b" / "network.json").read_text()) == network
    assert (tmp_path / "a" / "allreduce.csv").exists() and not (tmp_path / "a" / "network.json").exists()
    assert messages.sizes(100, 5000) == [100, 1024, 4096]
    assert messages.sizes(4096)[-1] == 2**28 and len(messages.sizes(4096)) == 10


@pytest.mark.parametrize("timed", [steps, messages], ids=["steps", "messages"])
def test_a_batch_that_cannot_be_divided_is_one_error_of_all_ranks(timed):
    """Fault: each rank printed it."""
    settings = commandline.parse(["--dataset=synthetic", "--global_batch_size=13"], "benchmark")
    with pytest.raises(FlagError, match="13") as caught:
        timed.run(settings, World(2, 0))
    assert caught.value.collective


def test_one_rank_has_no_messages(run_command):
    process = run_command("benchmark", *TINY_FLAGS, *QUICK, "--benchmark=allreduce")
    assert process.returncode == 64 and "nothing to measure" in error_lines(process)[0]


@pytest.mark.parametrize("what, images", [("synthetic", 8), ("evaluation", 5), ("pipeline", 8)])
def test_last_line_on_one_rank(run_command, tiny_data, what, images):
    flags = [*TINY_FLAGS, f"--data_dir={tiny_data}", *QUICK, f"--benchmark={what}", "--eval_batch_size=5"]
    process = run_command("benchmark", *flags)
    assert process.returncode == 0, process.stderr
    assert float(TOTAL.fullmatch(last_line(process.stdout)).group(1)) > 1
    assert f"{what}: 1 rank x {images} images, 4 steps timed" in process.stderr


@pytest.mark.mpi
def test_last_line_on_two_ranks():
    process = subprocess.run(
        ["launch/local.sh", "2", sys.executable, "-m", "resnet_cpu.benchmark", *TINY_FLAGS, *QUICK],
        cwd=ROOT,
        env=OUTSIDE,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stderr
    assert TOTAL.fullmatch(last_line(process.stdout)) and process.stdout.count("\n") == 1
    assert "synthetic: 2 ranks x 4 images" in process.stderr


def test_more_examples_than_there_are_is_refused(run_command, tiny_data):
    process = run_command(
        "benchmark", *TINY_FLAGS, f"--data_dir={tiny_data}", *QUICK, "--benchmark=pipeline", "--train_examples=51"
    )
    assert process.returncode == 65 and "--train_examples=51" in error_lines(process)[0]


def test_synthetic_images_have_no_pipeline(run_command):
    process = run_command("benchmark", "--dataset=synthetic", "--benchmark=pipeline", "--image_size=32")
    assert process.returncode == 64 and "reads nothing" in error_lines(process)[0]
