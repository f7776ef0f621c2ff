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


def test_saved_arrays_are_loaded_bit_by_bit(tmp_path):
    path = save(tmp_path, 3)
    for group, arrays in GROUPS.items():
        loaded = checkpoint.load(path, group)
        assert list(loaded) == list(arrays)
        for name in arrays:
            assert loaded[name].dtype == arrays[name].dtype
            np.testing.assert_array_equal(loaded[name], arrays[name])
    assert checkpoint.newest(str(tmp_path))[1]["step"] == 3


def test_if_all_checkpoints_are_damaged_the_oldest_is_named(tmp_path):
    for step in (1, 2):
        os.truncate(os.path.join(save(tmp_path, step), "weights.npz"), 7)
    with pytest.raises(CheckpointError, match=r"all checkpoints are damaged; the oldest: .*00000001/weights\.npz"):
        checkpoint.newest(str(tmp_path))


def test_a_damaged_checkpoint_is_skipped_with_a_message(tmp_path, capfd):
    save(tmp_path, 1)
    with open(os.path.join(save(tmp_path, 2), "weights.npz"), "ab") as file:
        file.write(b"x")
    assert checkpoint.newest(str(tmp_path))[1]["step"] == 1
    assert "PASSED OVER" in capfd.readouterr().err


@pytest.mark.parametrize("content", ["", "{", "[]", '{"step": 1}', '{"files": {}, "step": "x"}'])
def test_a_folder_with_a_broken_manifest_is_not_a_checkpoint(tmp_path, content):
    path = save(tmp_path, 1)
    with open(os.path.join(path, "manifest.json"), "w") as file:
        file.write(content)
    with pytest.raises(CheckpointError, match="manifest.json"):
        checkpoint.read_manifest(path)


def test_an_interrupted_save_is_ignored_and_cleaned_up(tmp_path):
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


def test_a_kill_while_an_old_checkpoint_is_removed_leaves_no_part_of_it(tmp_path, monkeypatch):
    for step in (1, 5, 9):
        save(tmp_path, step)

    def killed(path, **options):
        if os.path.exists(path):
            os.remove(os.path.join(path, "weights.npz"))
            raise KeyboardInterrupt  # as a kill: nothing handles it

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint.shutil, "rmtree", killed)
        checkpoint.prune(str(tmp_path), 2)
    assert checkpoint.steps(str(tmp_path)) == [5, 9]
    checkpoint.prune(str(tmp_path), 2)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-00000005", "step-00000009"]


def test_prune_counts_only_whole_checkpoints_among_the_kept(tmp_path):
    """With two to keep, one of them truncated, a single whole one was left."""
    for step in (1, 5, 9, 12):
        save(tmp_path, step)
    os.truncate(os.path.join(checkpoint.folder(str(tmp_path), 12), "weights.npz"), 10)
    checkpoint.prune(str(tmp_path), 2)
    assert checkpoint.steps(str(tmp_path)) == [5, 9, 12]
    os.remove(os.path.join(checkpoint.folder(str(tmp_path), 9), "optimizer.npz"))
    checkpoint.prune(str(tmp_path), 1)
    assert checkpoint.steps(str(tmp_path)) == [5, 9, 12]


def test_prune_keeps_what_a_run_that_resumes_at_the_oldest_kept_needs(tmp_path):
    for step in (1, 5, 9, 12):
        save(tmp_path, step)
    checkpoint.prune(str(tmp_path), 2, lambda oldest: {1} if oldest == 9 else set())
    assert checkpoint.steps(str(tmp_path)) == [1, 9, 12]


@pytest.mark.parametrize("kind", ["checkpoint", "member"])
def test_a_published_folder_is_there_at_every_moment_of_a_replacement(tmp_path, monkeypatch, kind):
    """It was removed before its successor was renamed: killed in between, neither was there."""
    run_dir = str(tmp_path)
    path = checkpoint.folder(run_dir, 3) if kind == "checkpoint" else checkpoint.member_folder(run_dir, "one")
    checkpoint.save(path, GROUPS, {"step": 3, "signature": {}, "number": 1})
    calls = [(os, name) for name in ("rename", "fsync", "makedirs")] + [(checkpoint.shutil, "rmtree")]
    for number in range(40):
        left = [number]

        def killed(real, left=left):
            def call(*arguments, **options):
                left[0] -= 1
                if left[0] < 0:
                    raise KeyboardInterrupt  # as a kill: nothing in `save` handles it
                return real(*arguments, **options)

            return call

        with monkeypatch.context() as patch:
            for module, name in calls:
                patch.setattr(module, name, killed(getattr(module, name)))
            try:
                checkpoint.save(path, GROUPS, {"step": 3, "signature": {}, "number": 2})
                finished = True
            except KeyboardInterrupt:
                finished = False
        checkpoint.recover(run_dir)
        assert checkpoint.read_manifest(path)["number"] in (1, 2)
        assert checkpoint.load(path, "weights").keys() == GROUPS["weights"].keys()
        if finished:
            break
    assert finished and checkpoint.read_manifest(path)["number"] == 2
    assert os.listdir(os.path.dirname(path)) == [os.path.basename(path)]  # nothing is left behind


def test_a_failed_replacement_leaves_the_published_one(tmp_path, monkeypatch):
    path = save(tmp_path, 3)
    real = os.rename

    def rename(source, target):
        if source.endswith(f"{3:08d}.tmp"):
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OutputError, match="No space left"):
        save(tmp_path, 3)
    assert checkpoint.newest(str(tmp_path))[0] == path
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000003"]


def test_values_that_are_not_finite_are_not_saved(tmp_path):
    broken = {"weights": {"w": np.array([1.0, np.nan], np.float32)}, "optimizer": {}}
    with pytest.raises(NotFinite, match="w is not finite after step 4"):
        save(tmp_path, 4, broken)
    assert checkpoint.steps(str(tmp_path)) == []


def test_a_full_disk_leaves_the_earlier_checkpoint_intact(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write", full)
    with pytest.raises(OutputError, match="No space left"):
        save(tmp_path, 2)
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000001"]
    assert checkpoint.newest(str(tmp_path))[1]["step"] == 1


def test_a_checkpoint_is_flushed_before_it_gets_its_name(tmp_path, monkeypatch):
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
