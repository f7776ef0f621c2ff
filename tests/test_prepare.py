"""The command prepare and its sources: raw data to verified shards."""

import gzip
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import OUTSIDE, ROOT, TINY_FLAGS, last_line, write_tiny_data
from raw_images import folders

from resnet_cpu import prepare
from resnet_cpu.data.sources import arrays
from resnet_cpu.errors import DataError, FlagError, RunFolderError
from resnet_cpu.run import lock

pytestmark = pytest.mark.training


@pytest.fixture
def run(monkeypatch, capfd):
    """The command in this process, whose threads are set already; returns the last line of its output."""
    monkeypatch.setattr(prepare.placement, "apply", lambda threads, cores: {})

    def call(*arguments):
        prepare.main(list(arguments))
        return json.loads(last_line(capfd.readouterr().out))

    return call


def write_idx(folder):
    """Write four tiny files in the format of the MNIST family."""
    folder.mkdir()
    for name, shape in [
        ("train-images-idx3", (20, 8, 8)), ("train-labels-idx1", (20,)),
        ("t10k-images-idx3", (9, 8, 8)), ("t10k-labels-idx1", (9,)),
    ]:  # fmt: skip
        values = np.arange(np.prod(shape)).reshape(shape) % (10 if "labels" in name else 250)
        header = bytes([0, 0, 8, len(shape)]) + b"".join(int(n).to_bytes(4, "big") for n in shape)
        with gzip.open(folder / f"{name}-ubyte.gz", "wb") as file:
            file.write(header + values.astype(np.uint8).tobytes())
    return folder


def test_an_unknown_source_is_refused_with_those_that_exist(run, tmp_path):
    with pytest.raises(
        FlagError,
        match="fashion: name what to prepare, one of imagenet, folder, tiny_imagenet, fashion_mnist, digits, verify",
    ):
        run("fashion", f"--data_dir={tmp_path}")
    with pytest.raises(FlagError, match="SOURCE: name what to prepare"):
        run(f"--data_dir={tmp_path}")
    with pytest.raises(FlagError, match="--data_dir is missing"):
        run("digits")


@pytest.mark.parametrize(
    "words, flag",
    [
        (["digits", "--dry_run"], "--dry_run"),
        (["digits", "--raw_dir=somewhere"], "--raw_dir"),
        (["fashion_mnist", "--short_side=64"], "--short_side"),
        (["fashion_mnist", "--seed=4"], "--seed"),
        (["verify", "--allow_incomplete"], "--allow_incomplete"),
        (["imagenet", "--raw_dir=somewhere", "--validation_share=0.1"], "--validation_share"),
        (["folder", "--raw_dir=somewhere", "--dataset=tiny_imagenet"], "--dataset"),
    ],
)
def test_a_flag_that_the_source_would_ignore_is_refused(run, tmp_path, words, flag):
    """Fault: `prepare digits --dry_run` wrote the data set."""
    with pytest.raises(FlagError, match=f"{flag}: `prepare {words[0]}` does not use it; remove it"):
        run(*words, f"--data_dir={tmp_path}/set")
    assert not (tmp_path / "set").exists()


def test_missing_raw_files_are_named(run, tmp_path):
    with pytest.raises(DataError, match="train-images-idx3-ubyte.gz: the file does not exist; set --raw_dir"):
        run("fashion_mnist", f"--data_dir={tmp_path}", f"--raw_dir={tmp_path}")


def test_another_data_set_is_never_overwritten(run, tmp_path):
    write_tiny_data(str(tmp_path))  # a set named digits
    with pytest.raises(DataError, match="contains digits already"):
        run("fashion_mnist", f"--data_dir={tmp_path}", f"--raw_dir={write_idx(tmp_path / 'raw')}")
    assert run("verify", f"--data_dir={tmp_path}") == {"train": 50, "validation": 21}


def test_idx_files_are_read_and_damaged_ones_named(run, tmp_path):
    raw = write_idx(tmp_path / "raw")
    found = run("fashion_mnist", f"--data_dir={tmp_path / 'data'}", f"--raw_dir={raw}")
    assert found == {"train": 20, "validation": 9}
    labels = raw / "t10k-labels-idx1-ubyte.gz"
    whole = labels.read_bytes()
    for damaged in (
        whole[:-3],
        whole[:-12] + bytes([whole[-12] ^ 255]) + whole[-11:],
        gzip.compress(b"\x00\x00\x08\x03\x00"),
        b"text",
    ):
        labels.write_bytes(damaged)
        with pytest.raises(DataError, match="t10k-labels-idx1-ubyte.gz"):
            arrays.read_idx(str(labels))


def test_digits_and_verify_as_a_user_runs_them(run_command, tmp_path):
    for source in ("digits", "verify"):
        process = run_command("prepare", source, f"--data_dir={tmp_path}")
        assert process.returncode == 0, process.stderr
        assert json.loads(last_line(process.stdout)) == {"train": 1497, "validation": 300}


def test_a_second_prepare_of_the_same_folder_is_refused(tmp_path):
    """Under several ranks all of them wrote the same temporary files."""
    held = lock.FolderLock(str(tmp_path), ".prepare.lock")
    with pytest.raises(RunFolderError, match=f"another process is preparing this folder .*pid {os.getpid()}"):
        write_tiny_data(str(tmp_path))
    assert os.listdir(tmp_path) == [".prepare.lock"]
    held.release()
    assert write_tiny_data(str(tmp_path)) == {"train": 50, "validation": 21}


PREPARE = """
import sys
sys.path.insert(0, "tests")
from conftest import write_tiny_data
from resnet_cpu.errors import RunFolderError
try:
    print(write_tiny_data(sys.argv[1], 1000))
except RunFolderError as error:
    print(error)
"""


def test_two_prepares_at_a_time_leave_a_data_set_that_verifies(run, tmp_path):
    command = [sys.executable, "-c", PREPARE, str(tmp_path)]
    processes = [
        subprocess.Popen(command, cwd=ROOT, env=OUTSIDE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for _ in range(2)
    ]
    output = [process.communicate(timeout=300)[0] for process in processes]
    assert any("1000" in text for text in output)
    assert run("verify", f"--data_dir={tmp_path}") == {"train": 1000, "validation": 21}


@pytest.mark.parametrize("place, words", [(".", "is --raw_dir; name"), ("shards", "lies in --raw_dir, among its")])
def test_shards_may_not_lie_among_the_classes(run_command, tmp_path, place, words):
    raw = folders(tmp_path) / "train"
    flags = [f"--raw_dir={raw}", f"--data_dir={raw / place}", "--validation_share=0.2"]
    process = run_command("prepare", "folder", *flags)
    assert process.returncode == 64 and words in process.stderr
    assert sorted(path.name for path in raw.iterdir()) == ["cat", "dog", "eel"]


def test_a_tree_of_images_is_prepared_verified_and_trained_on(run_command, tmp_path):
    """The number of classes comes from the prepared set."""
    raw, data = folders(tmp_path / "raw", train=12), tmp_path / "data"
    process = run_command("prepare", "folder", f"--raw_dir={raw}", f"--data_dir={data}")
    assert process.returncode == 0, process.stderr
    process = run_command("prepare", "verify", f"--data_dir={data}")
    assert json.loads(last_line(process.stdout)) == {"train": 36, "validation": 9}
    flags = ["--dataset=folder", f"--data_dir={data}", f"--run_dir={tmp_path / 'run'}", "--max_steps=2"]
    process = run_command("train", *TINY_FLAGS, *flags)
    assert process.returncode == 0, process.stderr
    assert json.loads(last_line(process.stdout))["examples"] == 9
    assert "folder: 36 training and 9 evaluation images" in process.stderr
