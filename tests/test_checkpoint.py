"""Checkpoints: absent or complete, and never accepted when a bit differs."""

import os
import shutil

import numpy as np
import pytest

from resnet_cpu.errors import CheckpointError, NotFinite, OutputError
from resnet_cpu.run import checkpoint

GROUPS = {
    "weights": {"a/kernel:0": np.arange(12, dtype=np.float32).reshape(3, 4), "a/bias:0": np.ones(4, np.float32)},
    "optimizer": {"a/kernel:0": np.zeros([3, 4], np.float32)},
}


def save(run_dir, step, groups=GROUPS):
    path = checkpoint.folder(str(run_dir), step)
    checkpoint.save(path, groups, {"step": step, "signature": {}})
    return path


def test_what_is_saved_is_loaded_bit_by_bit(tmp_path):
    path = save(tmp_path, 3)
    for group, arrays in GROUPS.items():
        loaded = checkpoint.load(path, group)
        assert list(loaded) == list(arrays)
        for name in arrays:
            assert loaded[name].dtype == arrays[name].dtype
            np.testing.assert_array_equal(loaded[name], arrays[name])
    assert checkpoint.newest(str(tmp_path))[1]["step"] == 3


@pytest.mark.parametrize("name", ["weights.npz", "optimizer.npz"])
def test_no_truncation_and_no_flipped_bit_is_accepted(tmp_path, name):
    path = save(tmp_path, 1)
    file = os.path.join(path, name)
    with open(file, "rb") as opened:
        whole = opened.read()
    generator = np.random.Generator(np.random.Philox(2))
    damaged = [whole[:cut] for cut in generator.integers(0, len(whole), 100)]
    for place in generator.integers(0, len(whole), 100):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << int(place % 8)
        damaged.append(bytes(flipped))
    for content in damaged:
        with open(file, "wb") as opened:
            opened.write(content)
        with pytest.raises(CheckpointError, match="damaged"):
            checkpoint.load(path, name[:-4])
        with pytest.raises(CheckpointError, match="no whole checkpoint"):
            checkpoint.newest(str(tmp_path))


def test_a_damaged_one_is_passed_over_loudly(tmp_path, capfd):
    save(tmp_path, 1)
    with open(os.path.join(save(tmp_path, 2), "weights.npz"), "ab") as file:
        file.write(b"x")
    assert checkpoint.newest(str(tmp_path))[1]["step"] == 1
    assert "PASSED OVER" in capfd.readouterr().err


@pytest.mark.parametrize("content", ["", "{", "[]", '{"step": 1}', '{"files": {}, "step": "x"}'])
def test_a_broken_manifest_is_no_checkpoint(tmp_path, content):
    path = save(tmp_path, 1)
    with open(os.path.join(path, "manifest.json"), "w") as file:
        file.write(content)
    with pytest.raises(CheckpointError, match="manifest.json"):
        checkpoint.read_manifest(path)


def test_a_save_that_was_cut_off_is_not_seen_and_is_cleaned_up(tmp_path):
    path = save(tmp_path, 1)
    half = checkpoint.folder(str(tmp_path), 2) + ".tmp"
    shutil.copytree(path, half)
    assert checkpoint.steps(str(tmp_path)) == [1]
    checkpoint.prune(str(tmp_path), 2)
    assert not os.path.exists(half)


def test_prune_keeps_the_newest(tmp_path):
    for step in (1, 5, 9, 12):
        save(tmp_path, step)
    checkpoint.prune(str(tmp_path), 2)
    assert checkpoint.steps(str(tmp_path)) == [9, 12]


def test_nothing_that_is_not_finite_is_saved(tmp_path):
    broken = {"weights": {"w": np.array([1.0, np.nan], np.float32)}, "optimizer": {}}
    with pytest.raises(NotFinite, match="w is not finite after step 4"):
        save(tmp_path, 4, broken)
    assert checkpoint.steps(str(tmp_path)) == []


def test_a_full_disk_leaves_the_earlier_one_whole(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write", full)
    with pytest.raises(OutputError, match="No space left"):
        save(tmp_path, 2)
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000001"]
    assert checkpoint.newest(str(tmp_path))[1]["step"] == 1


def test_the_save_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Order of (fsync, rename): every file and the folder before the rename, the parent after it."""
    happened = []
    real_sync, real_rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (happened.append(os.readlink(f"/proc/self/fd/{fd}")), real_sync(fd)))
    monkeypatch.setattr(os, "rename", lambda a, b: (happened.append("rename"), real_rename(a, b)))
    path = save(tmp_path, 7)
    temporary = path + ".tmp"
    before, after = happened[: happened.index("rename")], happened[happened.index("rename") + 1 :]
    assert set(before) == {temporary, *(f"{temporary}/{name}" for name in os.listdir(path))}
    assert before[-1] == temporary and after == [os.path.dirname(path)]


def test_differences_are_told_leaf_by_leaf():
    there = {"model": {"num_classes": 10, "width": 1.0}, "seed": 0}
    here = {"model": {"num_classes": 12, "width": 1.0}, "seed": 0, "more": 1}
    assert checkpoint.differences(there, here) == ["model.num_classes 10 there, 12 here", "more None there, 1 here"]
    with pytest.raises(CheckpointError, match="num_classes 10 there, 12 here"):
        checkpoint.check_signature("x", there, here)
    checkpoint.check_signature("x", there, dict(there))
