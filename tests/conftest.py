"""Shared parts of the tests: small real data sets, and the package's commands as a user calls them."""

import os
import pathlib
import subprocess
import sys
from typing import Callable, Dict, List

from resnet_cpu.cluster import control, placement

ROOT = pathlib.Path(__file__).parent.parent
OUTSIDE = {**os.environ, "PYTHONPATH": str(ROOT)}  # what commands that the tests start are given: this very checkout
# Each of pytest-xdist's workers computes on its share of the cores: threads that wait for a core that another worker
# has spin meanwhile, and a run takes twice the processor time.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
THREADS = max(1, control.physical_cores(os.sched_getaffinity(0)) // WORKERS)
SHARE = {name: str(THREADS) for name in ("TF_NUM_INTRAOP_THREADS", "OMP_NUM_THREADS")} if WORKERS > 1 else {}
os.environ.update(SHARE)
placement.apply(0, THREADS)  # before any test module imports TensorFlow

import numpy as np  # noqa: E402
import pytest  # noqa: E402

# A network and a recipe small enough that a whole run takes seconds. Not narrower: with 4 channels, the backward pass
# of oneDNN's 1x1 convolution for AVX2 writes past its buffers, and runs crash or hang now and then.
TINY_FLAGS = [
    "--dataset=digits",
    "--model=resnet18",
    "--width=0.125",
    "--stem=small",
    "--image_size=16",
    "--global_batch_size=12",
    "--log_every_steps=1",
    "--checkpoint_every_steps=0",
    "--eval_every_epochs=0",
    "--phase=main:steps=10,lr=0.05,warmup_steps=3",
    "--phase=tail:steps=6,lr=0.01,decay=cosine,wd=5e-4,augment=light",
]


# Longest first, so that no worker is left with one of them at the end.
_FILES = ("train", "loop", "benchmark", "tree", "folders", "state", "export", "bare_install", "resnet")
_OF_RANKS = ("slurm", "multihost", "mpi")  # marks; the first one that a test has is its group
LONGEST = [*_OF_RANKS, *(f"test_{name}.py" for name in _FILES)]


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: List[pytest.Item]) -> None:
    """Keep the tests of a file on one worker, which share its fixtures; likewise those that start ranks, and first.

    Sessions of several ranks use all cores: two at a time would only wait for each other.
    """

    def group(item: pytest.Item) -> str:
        return next((name for name in _OF_RANKS if item.get_closest_marker(name)), item.path.name)

    def place(item: pytest.Item) -> int:
        return LONGEST.index(group(item)) if group(item) in LONGEST else len(LONGEST)

    items.sort(key=place)
    for item in items:
        item.add_marker(pytest.mark.xdist_group(group(item)))


def write_tiny_data(
    folder: str, train: int = 50, validation: int = 21, classes: int = 10, seed: int = 0
) -> Dict[str, int]:
    """Write a data set of grey 16x16 images with the product's own writer, several shards a split."""
    from resnet_cpu.data.sources import arrays

    generator = np.random.Generator(np.random.Philox(key=[train + 1000 * seed, validation]))

    def split(count: int):
        labels = np.arange(count) % classes
        images = generator.integers(0, 60, [count, 16, 16]) + (labels * 190 // classes)[:, None, None]
        return images.astype(np.uint8), labels

    old, arrays.EXAMPLES_PER_SHARD = arrays.EXAMPLES_PER_SHARD, 20
    try:
        return arrays.write_data_set(
            folder, "digits", "made by the tests", {"train": split(train), "validation": split(validation)}, classes
        )
    finally:
        arrays.EXAMPLES_PER_SHARD = old


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A prepared data set: 50 training examples in 3 shards, 21 for evaluation in 2. Not to be changed."""
    folder = str(tmp_path_factory.mktemp("tiny_data"))
    write_tiny_data(folder)
    return folder


@pytest.fixture(scope="session")
def finished(tiny_data: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a finished run on `tiny_data` with evaluations and plots. Not to be changed."""
    import whole_runs  # loads TensorFlow

    return whole_runs.train_and_draw(tiny_data, str(tmp_path_factory.mktemp("finished") / "run"))


@pytest.fixture(scope="session")
def run_command() -> Callable[..., subprocess.CompletedProcess]:
    """Run `python -m resnet_cpu.COMMAND ARGUMENTS` to its end, on this worker's share of the cores."""

    def run(command: str, *arguments: str, timeout: float = 600, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", f"resnet_cpu.{command}", *arguments],
            cwd=ROOT,
            env={**OUTSIDE, **SHARE, **environment},
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


def lacking(what: str) -> None:
    """Skip a test that needs something only root can install; in continuous integration, as root, fail instead."""
    if os.environ.get("CI") and os.geteuid() == 0:
        pytest.fail(f"in continuous integration this may not be skipped: {what}")
    pytest.skip(what)


def last_line(text: str) -> str:
    """Return the last line that is not empty."""
    return [line for line in text.splitlines() if line.strip()][-1]


def error_lines(process: subprocess.CompletedProcess) -> List[str]:
    """Return the lines on standard error in which the package reported an error."""
    # mpirun of Open MPI 5 writes zero bytes between the lines of ranks.
    return [line for line in process.stderr.replace("\0", "").splitlines() if line.startswith("resnet_cpu")]
