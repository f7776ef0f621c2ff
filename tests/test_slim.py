"""Names of shards: those of TF-slim and their usual variants are found, and what does not fit is named."""

import os

import numpy as np
import pytest

from resnet_cpu.data import folders, shards
from resnet_cpu.errors import DataError

TRAIN = [f"train-0000{number}-of-00002" for number in range(2)]
VALIDATION = ["validation-00000-of-00001"]


def write(folder, names):
    """Write a shard of two records, which hold its name, to each path."""
    for name in names:
        path = os.path.join(folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        header, footer = shards.frame_around(name.encode())
        with open(path, "wb") as file:
            file.write(2 * (header + name.encode() + footer))
    return str(folder)


def opened(folder, *eval_split):
    data = folders.open_data(str(folder), "imagenet", *eval_split)
    return [
        [payload.decode() for payload in split.read(np.arange(split.examples))][::2] if split.examples else []
        for split in (data.train, data.validation)
    ]


def refusal(folder, *eval_split):
    with pytest.raises(DataError) as caught:
        folders.open_data(str(folder), "imagenet", *eval_split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "train, validation",
    [
        (TRAIN, VALIDATION),
        ([f"train/{name}" for name in TRAIN], [f"validation/{name}" for name in VALIDATION]),
        ([f"train/{name}" for name in TRAIN], ["val/val-00000-of-00001"]),
        ([f"train/{name}" for name in TRAIN], ["val/validation-00000-of-00001"]),
        ([f"Train/{name}.tfrecord" for name in TRAIN], ["VAL/val-00000-of-00001.tfrecord"]),
        ([f"{name}.tfrecord" for name in TRAIN], [f"{name}.tfrecord" for name in VALIDATION]),
        ([f"{name}.tfrecords" for name in TRAIN], [f"{name}.TFRecord" for name in VALIDATION]),
        ([name.upper() for name in TRAIN], VALIDATION),
        ([name.replace("-", ".tfrecord-", 1) for name in TRAIN], ["val.tfrecords-00000-of-00001"]),
        (["train-0-of-2", "train-1-of-2"], ["val-0-of-1"]),
        (TRAIN, [f"validation/{name}" for name in VALIDATION]),
    ],
)
def test_the_usual_variants_of_the_names_are_found(tmp_path, train, validation):
    folder = write(tmp_path, [*train, *validation])
    assert opened(folder) == [train, validation]
    description = folders.describe(folder, "imagenet")
    folders.make_indexes(description, folder)
    assert os.path.exists(shards.index_path(os.path.join(folder, train[0])))
    assert opened(folder, "auto") == [train, validation]  # indexes are not taken for shards


def test_other_files_do_not_matter(tmp_path):
    more = ["labels.txt", "train/n01440764/1.JPEG", "train-00000-of-00002.tmp12", "mytrain-00000-of-00001", "train.csv"]
    assert opened(write(tmp_path, [*TRAIN, *VALIDATION, *more])) == [TRAIN, VALIDATION]
    compressed = [f"{name}.gz" for name in TRAIN]
    assert opened(write(tmp_path, compressed)) == [TRAIN, VALIDATION]  # beside the same shards as they should be


@pytest.mark.parametrize(
    "more, parts",
    [
        (["train-00000-of-00004"], ["found of-00002 and of-00004", "train-*-of-00002: 2 files", "remove"]),
        (["train-00000-of-00002.tfrecord"], ["train-*-of-00002.tfrecord: 1 files"]),
        (["train/train-00000-of-00002"], ["train/train-*-of-00002: 1 files"]),
        (["val-00000-of-00001"], ["shards of validation must form one complete set", "val-*-of-00001: 1 files"]),
        (["train-00002-of-00002"], ["train-00002-of-00002 is not one of 00002 shards"]),
    ],
)
def test_more_than_one_set_of_shards_is_refused(tmp_path, more, parts):
    message = refusal(write(tmp_path, [*TRAIN, *VALIDATION, *more]))
    assert all(part in message for part in parts), message


def test_missing_shards_are_named_as_they_would_be(tmp_path):
    folder = write(tmp_path, [f"train/train-{number:05d}-of-00009.tfrecord" for number in (0, 8)] + VALIDATION)
    assert "7 shards missing, the first is train/train-00001-of-00009.tfrecord" in refusal(folder)


def test_a_file_is_not_a_folder(tmp_path):
    folder = write(tmp_path, TRAIN)
    assert f"--data_dir={folder}/{TRAIN[0]}: a file, not a folder" in refusal(f"{folder}/{TRAIN[0]}")


def test_compressed_shards_are_recognised_by_their_content(tmp_path):
    import gzip

    folder = write(tmp_path, [f"{name}.gz" for name in TRAIN] + VALIDATION)
    assert opened(folder)[0] == [f"{name}.gz" for name in TRAIN]  # not compressed in spite of their names
    for name in TRAIN:
        path = os.path.join(folder, f"{name}.gz")
        with open(path, "rb") as file:
            content = file.read()
        with gzip.open(path, "wb") as file:
            file.write(content)
    assert "train-00000-of-00002.gz: GZIP-compressed" in refusal(folder)


def test_imagenet_without_validation_is_only_trained_on_if_that_is_meant(tmp_path):
    folder = write(tmp_path / "train", TRAIN)
    message = refusal(folder, "auto")
    assert "contains 2 shards of train (train-00000-of-00002 ...), but none of validation" in message
    assert message.endswith("--eval_split=none") and "name the folder above" not in message
    assert opened(folder, "none") == [TRAIN, []]
    assert "has no such split, only train" in refusal(folder, "validation")
    write(tmp_path / "val", VALIDATION)
    assert f"name the folder above, --data_dir={tmp_path}" in refusal(folder, "auto")
    assert [len(names) for names in opened(tmp_path, "auto")] == [2, 1]
    assert opened(tmp_path / "val", "auto") == [[], VALIDATION]


@pytest.mark.parametrize(
    "names, part",
    [
        ([], "it contains nothing"),
        (["a.txt", "b.txt"], "it contains 2 files (a.txt, b.txt)"),
        ([f"n0144076{n}/1.JPEG" for n in range(5)], "5 folders (n01440760, n01440761, n01440762, ...)"),
        (["tiny/manifest.json", "x"], "tiny is a prepared data set"),
        (["imagenet2012-train.tfrecord-00000-of-00001"], "1 file (imagenet2012-train.tfrecord-00000-of-00001)"),
    ],
)
def test_what_a_folder_contains_instead_is_named(tmp_path, names, part):
    message = refusal(write(tmp_path, names))
    assert part in message and "neither manifest.json, nor train-00000-of-01024" in message


def test_shards_that_prepare_has_not_finished_are_refused(tmp_path):
    folder = write(tmp_path, [*TRAIN, *VALIDATION])
    os.mkdir(os.path.join(folder, shards.UNFINISHED))
    assert "prepare was interrupted, or ended with an error; repeat its command, which continues" in refusal(folder)
    os.rmdir(os.path.join(folder, shards.UNFINISHED))
    assert opened(folder) == [TRAIN, VALIDATION]
