"""From listed images to shards: the same bytes whatever happens meanwhile, and nothing left out unsaid."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import OUTSIDE, ROOT, last_line
from raw_images import SYNSETS, encoded, folders, imagenet, pixels

from resnet_cpu.data import shards
from resnet_cpu.data.sources import conversion, listing, writing
from resnet_cpu.data.sources.image_folders import find_folder
from resnet_cpu.errors import DataError, OutputError, RunFolderError
from resnet_cpu.run import lock

pytestmark = pytest.mark.training

KEEP = conversion.Options(None, 95)


def tree_hash(folder):
    """Return the SHA-256 of every file of a data set."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.name != ".prepare.lock"
    }


def records(folder, split):
    opened = shards.open_split(str(folder), shards.read_manifest(str(folder)), split)
    found = opened.read(np.arange(opened.examples))
    opened.close()
    return found


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return folders(tmp_path_factory.mktemp("raw"), train=20)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(writing, "IMAGES_PER_SHARD", 7)


def made(raw, folder, **changed):
    options = {"seed": 0, "options": KEEP, "processes": 2, "leave_out_bad": False, **changed}
    return writing.prepare(find_folder(str(raw), None, False), str(folder), **options)


def test_all_images_are_written_once_in_a_shuffled_order(raw, tmp_path, small_shards):
    assert made(raw, tmp_path / "a") == {"train": 60, "validation": 9}
    manifest = shards.read_manifest(str(tmp_path / "a"))
    assert manifest["classes"] == ["cat", "dog", "eel"] and manifest["dataset"] == "folder"
    assert manifest["changes"] == {"BMP to JPEG": 15, "PNG to JPEG": 18}
    assert [row["examples"] for row in manifest["splits"]["train"]] == [6, 7, 7, 6, 7, 7, 6, 7, 7]
    for row in manifest["splits"]["train"]:
        assert hashlib.sha256((tmp_path / "a" / row["name"]).read_bytes()).hexdigest() == row["sha256"]
    names = [re.search(rb"(cat|dog|eel)/\d+\.\w+", record).group(0) for record in records(tmp_path / "a", "train")]
    assert len(set(names)) == 60
    classes = [name[:3] for name in names]
    assert sum(one == other for one, other in zip(classes, classes[1:])) < 35  # 57 if they were sorted
    made(raw, tmp_path / "b", seed=1)
    others = [re.search(rb"(cat|dog|eel)/\d+\.\w+", record).group(0) for record in records(tmp_path / "b", "train")]
    assert sorted(others) == sorted(names) and others != names


def test_the_bytes_do_not_depend_on_the_number_of_processes(raw, tmp_path, small_shards):
    made(raw, tmp_path / "a", processes=1)
    made(raw, tmp_path / "b", processes=3)
    assert tree_hash(tmp_path / "a") == tree_hash(tmp_path / "b")


def test_the_mean_and_deviation_are_those_of_the_training_pixels(raw, tmp_path):
    made(raw, tmp_path)
    manifest = shards.read_manifest(str(tmp_path))
    images = [conversion.convert(path.read_bytes(), KEEP, True).moments for path in (raw / "train").rglob("*.*")]
    mean = np.mean(images, 0)
    np.testing.assert_allclose(manifest["pixel_mean"], mean[:3], atol=1e-3)
    np.testing.assert_allclose(manifest["pixel_std"], np.sqrt(mean[3:] - mean[:3] ** 2), atol=1e-3)
    assert manifest["pixel_statistics_of"] == 60


def test_a_finished_set_is_left_alone_and_another_never_overwritten(raw, tmp_path, capsys):
    made(raw, tmp_path)
    before = tree_hash(tmp_path)
    assert made(raw, tmp_path) == {"train": 60, "validation": 9}
    assert "is prepared already" in capsys.readouterr().err
    with pytest.raises(DataError, match="from other files or with other flags; choose another folder"):
        made(raw, tmp_path, seed=1)
    assert tree_hash(tmp_path) == before


def test_shards_of_a_finished_set_that_are_missing_or_truncated_are_made_again(raw, tmp_path, small_shards, capsys):
    made(raw, tmp_path)
    before = tree_hash(tmp_path)
    rows = shards.read_manifest(str(tmp_path))["splits"]
    gone, cut, bare, other = (
        tmp_path / row["name"] for row in (rows["train"][1], rows["train"][3], *rows["validation"][:2])
    )
    gone.unlink()
    cut.write_bytes(cut.read_bytes()[:-7])
    (tmp_path / shards.index_path(str(bare))).unlink()
    written = other.stat().st_mtime_ns
    assert made(raw, tmp_path) == {"train": 60, "validation": 9}
    assert "3 of 11 shards are missing or have another size; they are made again" in capsys.readouterr().err
    assert tree_hash(tmp_path) == before and other.stat().st_mtime_ns == written


def test_a_shard_that_would_not_be_made_as_before_is_refused(raw, tmp_path, small_shards, monkeypatch):
    """As with another version of Pillow, which would encode other bytes."""
    made(raw, tmp_path)
    (tmp_path / shards.read_manifest(str(tmp_path))["splits"]["train"][0]["name"]).unlink()
    monkeypatch.setattr(
        writing, "_made", lambda left, *more: [(task.name, {"sha256": "other", "bad": []}) for task in left]
    )
    monkeypatch.setattr(writing.os, "remove", lambda path: None)
    with pytest.raises(DataError, match="not as before: a raw file has changed, or another version of Pillow"):
        made(raw, tmp_path)


def test_a_set_begun_with_other_flags_is_not_continued(raw, tmp_path, small_shards, monkeypatch):
    monkeypatch.setattr(writing.shards, "write_manifest", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        made(raw, tmp_path)
    monkeypatch.undo()
    with pytest.raises(DataError, match=r"was begun from other files or with other flags \(short_side\)"):
        made(raw, tmp_path, options=conversion.Options(16, 95))


def test_only_unfinished_shards_are_removed_from_the_folder(raw, tmp_path):
    """Every file with `.tmp` in its name was."""
    leftovers = ["train-00000-of-00001.tmp17", "train-00000-of-00001.index.npy.tmp17"]
    others = ["notes.tmp.txt", "train.tmp1"]
    for name in (*leftovers, *others):
        (tmp_path / name).write_text("x")
    made(raw, tmp_path)
    assert [(tmp_path / name).exists() for name in (*leftovers, *others)] == [False, False, True, True]


def test_a_second_prepare_of_the_same_folder_is_refused(raw, tmp_path):
    held = lock.FolderLock(str(tmp_path), ".prepare.lock")
    with pytest.raises(RunFolderError, match="another process is preparing this folder"):
        made(raw, tmp_path)
    held.release()


def test_too_little_space_is_said_before_anything_is_written(raw, tmp_path, monkeypatch):
    usage = writing.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda folder: usage._replace(free=1000))
    with pytest.raises(OutputError, match="GB are needed, 0.0 GB are free; make room"):
        made(raw, tmp_path)
    assert not list(tmp_path.glob("train-*"))


def test_all_bad_images_are_listed_and_may_be_left_out(tmp_path, capsys):
    raw = folders(tmp_path / "raw")
    (raw / "train" / "cat" / "1.png").write_bytes(b"<html>")
    (raw / "validation" / "eel" / "0.jpg").write_bytes(encoded()[:-200])
    with pytest.raises(
        DataError, match="2 images cannot be used, listed in .*bad_images.txt: train: cat/1.png: a web page"
    ):
        made(raw, tmp_path / "data")
    lines = (tmp_path / "data" / "bad_images.txt").read_text().splitlines()
    assert len(lines) == 2 and "validation: eel/0.jpg: damaged JPEG" in lines[1]
    assert made(raw, tmp_path / "data", leave_out_bad=True) == {"train": 17, "validation": 8}
    printed = capsys.readouterr().err
    assert "2 images cannot be used" in printed and "2 of 2 shards are finished" in printed
    assert shards.read_manifest(str(tmp_path / "data"))["left_out"] == 2


def spoilt(tmp_path):
    """Return raw images of which two were reported as bad, and the folder with all shards but no manifest."""
    raw, folder = folders(tmp_path / "raw"), tmp_path / "data"
    (raw / "train" / "cat" / "1.png").write_bytes(b"x" * len(encoded("PNG", seed=9)))
    (raw / "validation" / "eel" / "0.jpg").write_bytes(encoded()[:-200])
    with pytest.raises(DataError, match="2 images cannot be used"):
        made(raw, folder)
    return raw, folder


def test_bad_images_that_were_replaced_are_read_again(tmp_path, small_shards, capsys):
    """One of the same size, one of another; the shards without a bad image are not made again."""
    raw, folder = spoilt(tmp_path)
    times = {path.name: path.stat().st_mtime_ns for path in folder.glob("*-of-*[0-9]")}
    (raw / "train" / "cat" / "1.png").write_bytes(encoded("PNG", seed=9))
    (raw / "validation" / "eel" / "0.jpg").write_bytes(encoded())
    assert made(raw, folder) == {"train": 18, "validation": 9}
    assert "3 of 5 shards are finished; continuing" in capsys.readouterr().err
    assert sum(path.stat().st_mtime_ns == times[path.name] for path in folder.glob("*-of-*[0-9]")) == 3
    assert not (folder / "bad_images.txt").exists()
    made(raw, tmp_path / "at_once")
    assert tree_hash(folder) == tree_hash(tmp_path / "at_once")


def test_other_images_than_those_reported_are_refused(tmp_path, small_shards):
    raw, folder = spoilt(tmp_path)
    (raw / "train" / "cat" / "99.jpg").write_bytes(encoded())
    with pytest.raises(DataError, match=r"was begun from other files or with other flags \(listing\)"):
        made(raw, folder)


def test_a_split_without_any_usable_image_is_refused(tmp_path):
    raw = folders(tmp_path / "raw")
    for path in (raw / "validation").rglob("*.*"):
        path.write_bytes(b"<html>")
    for _ in range(2):
        with pytest.raises(DataError, match="no image of validation can be used, so replace them"):
            made(raw, tmp_path / "data", leave_out_bad=True)
    for number, path in enumerate(sorted((raw / "validation").rglob("*.*"))):
        path.write_bytes(encoded(seed=number))
    assert made(raw, tmp_path / "data")["validation"] == 9


def test_a_file_that_became_shorter_is_named(tmp_path):
    path = tmp_path / "image.jpg"
    path.write_bytes(b"123")
    with pytest.raises(DataError, match=r"image.jpg: only 3 of 5 bytes at 0: .*restore the file"):
        listing.read_image(str(path), 0, 5)


def test_a_process_that_is_killed_ends_the_command_with_the_remedy(raw, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "_make_shard", _die)
    with pytest.raises(OutputError, match="a process that makes shards was killed, perhaps because memory ran out"):
        made(raw, tmp_path)


def _die(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_listing_is_kept_without_loss(raw, tmp_path):
    found = find_folder(str(raw), None, False)
    found.save(str(tmp_path / "listing.npz"))
    again = listing.load(str(tmp_path / "listing.npz"))
    assert again.identity() == found.identity() and again.files == found.files
    moved = listing.Listing(**{**found.__dict__, "files": tuple("/elsewhere" + file for file in found.files)})
    assert moved.identity() == found.identity()
    other = listing.Listing(**{**found.__dict__, "classes": ("cat", "eel", "dog")})
    assert other.identity() != found.identity()


# --- as a user runs it -----------------------------------------------------------------------------------------------


def command(raw, data, *flags):
    words = [sys.executable, "-m", "resnet_cpu.prepare", "imagenet", f"--raw_dir={raw}", f"--data_dir={data}"]
    return [*words, "--allow_incomplete", "--threads=2", *flags]


def start(*arguments):
    return subprocess.Popen(
        command(*arguments), cwd=ROOT, env=OUTSIDE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imagenet")
    imagenet(folder, classes=40, per_class=6, validation=60)
    return folder


def alive(data):
    """Return the processes that prepare `data`."""
    found = subprocess.run(["pgrep", "-f", f"data_dir={data}"], capture_output=True, text=True)
    return found.stdout.split()


def test_killed_at_any_moment_it_continues_to_the_same_bytes(archives, tmp_path):
    whole = start(archives, tmp_path / "whole")
    out, errors = whole.communicate(timeout=120)
    assert whole.returncode == 0, errors
    assert json.loads(last_line(out)) == {"train": 240, "validation": 60}
    random = np.random.default_rng(0)
    kills, data = 0, tmp_path / "killed"
    while True:
        process = start(archives, data)
        # First as soon as it has written anything, however fast this machine is, then at random instants.
        deadline = time.monotonic() + (random.uniform(0.3, 3.0) if kills else 0)
        while process.poll() is None and (time.monotonic() < deadline or not any(data.rglob("*"))):
            time.sleep(0.005)
        if process.poll() is not None or kills >= 4:
            out, errors = process.communicate(timeout=120)
            break
        process.kill()
        process.communicate()
        kills += 1
    assert process.returncode == 0, errors
    assert kills and tree_hash(data) == tree_hash(tmp_path / "whole")
    assert not [pid for pid in alive(data)]


def test_a_dry_run_says_what_and_how_long_and_writes_nothing(archives, tmp_path):
    process = start(archives, tmp_path / "data", "--dry_run")
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and json.loads(last_line(out)) == {"train": 240, "validation": 60}
    assert "240 images would become 240 shards" in errors and "nothing was written" in errors
    assert not (tmp_path / "data").exists()


def test_without_the_flag_an_incomplete_set_is_refused_in_one_line(archives, tmp_path, run_command):
    process = run_command("prepare", "imagenet", f"--raw_dir={archives}", f"--data_dir={tmp_path / 'data'}")
    assert process.returncode == 65 and len(process.stderr.strip().splitlines()) == 1
    assert "40 classes where it has 1,000 (960 missing)" in process.stderr
    process = run_command("prepare", "imagenet", f"--data_dir={tmp_path / 'data'}")
    assert process.returncode == 64 and "--raw_dir is missing" in process.stderr


def test_the_shards_are_those_of_tf_slim(archives, tmp_path):
    """Names, labels 1 to 1000 in the order of the sorted synsets, file names, and JPEGs whose bytes are kept."""
    import tensorflow as tf

    process = start(archives, tmp_path)
    process.communicate(timeout=120)
    features = {
        "image/encoded": tf.io.FixedLenFeature([], tf.string),
        "image/class/label": tf.io.FixedLenFeature([], tf.int64),
        "image/class/synset": tf.io.FixedLenFeature([], tf.string),
        "image/filename": tf.io.FixedLenFeature([], tf.string),
        "image/height": tf.io.FixedLenFeature([], tf.int64),
        "image/channels": tf.io.FixedLenFeature([], tf.int64),
    }
    parsed = tf.io.parse_example(records(tmp_path, "train"), features)
    for synset, label, name in zip(
        *(parsed[f"image/{key}"].numpy() for key in ("class/synset", "class/label", "filename"))
    ):
        assert name.startswith(synset) and SYNSETS[label - 1].encode() == synset
    assert all(image.startswith(b"\xff\xd8") for image in parsed["image/encoded"].numpy())
    assert sorted(set(parsed["image/channels"].numpy())) == [1, 3]
    changes = shards.read_manifest(str(tmp_path))["changes"]
    assert changes == {"BMP to JPEG": 1, "CMYK to RGB": 1, "GIF to JPEG": 1, "PNG to JPEG": 1}
    dataset = tf.data.TFRecordDataset(sorted(str(path) for path in tmp_path.glob("train-*-of-00240")))
    assert sum(1 for _ in dataset) == 240  # TensorFlow reads them, too


def test_pixels_of_the_fixture_are_not_noise():
    assert len(encoded()) < pixels().size / 2


def test_an_archive_of_the_real_shape_has_the_real_number_of_shards(tmp_path):
    """A thousand classes, odd files among them; a listing of two archives, one of them an archive of archives."""
    imagenet(tmp_path / "raw", classes=1000, per_class=2, validation=200)
    process = start(tmp_path / "raw", tmp_path / "data")
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert json.loads(last_line(out)) == {"train": 2000, "validation": 200}
    manifest = shards.read_manifest(str(tmp_path / "data"))
    assert [len(manifest["splits"][split]) for split in ("train", "validation")] == [1024, 128]
    assert manifest["classes"] == SYNSETS and manifest["num_classes"] == 1000
    assert {row["examples"] for row in manifest["splits"]["train"]} == {1, 2}
