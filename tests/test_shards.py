"""TFRecord shards: readable by TensorFlow, and no damage goes unseen."""

import os
import shutil

import numpy as np
import pytest
import tensorflow as tf

from resnet_cpu.data import layouts, shards
from resnet_cpu.errors import DataError


@pytest.fixture
def copy(tiny_data, tmp_path):
    """A copy of the data set that a test may damage; and its first training shard."""
    folder = str(tmp_path / "data")
    shutil.copytree(tiny_data, folder)
    return folder, os.path.join(folder, shards.read_manifest(folder)["splits"]["train"][0]["name"])


def read_all(folder):
    data = layouts.open_data(folder, "digits")
    return data.train.read(np.arange(data.train.examples))


def test_tensorflow_reads_the_same_records(tiny_data):
    names = [row["name"] for row in shards.read_manifest(tiny_data)["splits"]["train"]]
    expected = [record.numpy() for record in tf.data.TFRecordDataset([os.path.join(tiny_data, name) for name in names])]
    assert read_all(tiny_data) == expected
    assert len(expected) == 50 and len(names) == 3


def test_an_index_is_made_of_shards_that_tensorflow_wrote(tmp_path):
    path = str(tmp_path / "train-00000-of-00001")
    payloads = [bytes([i]) * (i * 7) for i in range(9)]  # the first is empty
    with tf.io.TFRecordWriter(path) as writer:
        for payload in payloads:
            writer.write(payload)
    assert shards.write_index(path) == 9
    split = shards.open_split(
        str(tmp_path),
        {"splits": {"train": [{"name": os.path.basename(path), "examples": 9, "bytes": os.path.getsize(path)}]}},
        "train",
    )
    assert split.read(np.array([8, 0, 3])) == [payloads[8], payloads[0], payloads[3]]
    assert split.locate(8) == (path, 8)


def test_every_flipped_bit_of_a_record_is_seen_and_located(copy):
    folder, path = copy
    offsets, lengths = shards.read_index(path)
    with open(path, "rb") as file:
        whole = bytearray(file.read())
    record = 2
    first, last = offsets[record] - 12, offsets[record] + lengths[record] + 4
    places = {first, first + 7, first + 8, first + 11, first + 12, last - 4, last - 1}  # length, its CRC, payload, CRC
    places |= set(np.random.Generator(np.random.Philox(1)).integers(first, last, 40).tolist())
    for place in sorted(places):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        with open(path, "wb") as file:
            file.write(damaged)
        with pytest.raises(DataError, match=f"{os.path.basename(path)}: record {record}: "):
            read_all(folder)
        with pytest.raises(DataError, match=f"record {record}: "):
            layouts.verify(folder, "digits")


def test_negative_control_the_undamaged_copy_reads(copy):
    assert layouts.verify(copy[0], "digits") == {"train": 50, "validation": 21}


def test_every_truncation_is_seen_before_anything_is_read(copy):
    folder, path = copy
    offsets, _ = shards.read_index(path)
    size = os.path.getsize(path)
    cuts = {0, 5, size - 1, *(int(offset) - 12 for offset in offsets[1:])}  # also at the borders of records
    for cut in sorted(cuts, reverse=True):
        os.truncate(path, cut)
        with pytest.raises(DataError, match=os.path.basename(path)):
            layouts.open_data(folder, "digits")


@pytest.mark.parametrize(
    "damage, part",
    [
        (lambda folder, path: shutil.rmtree(folder), "no such folder"),
        (lambda folder, path: os.remove(os.path.join(folder, "manifest.json")), "no manifest.json"),
        (lambda folder, path: os.remove(path), "shard missing"),
        (lambda folder, path: os.truncate(shards.index_path(path), 100), "unreadable index"),
        (lambda folder, path: open(os.path.join(folder, "manifest.json"), "w").close(), "JSON"),
        (lambda folder, path: shards.write_manifest(folder, {"dataset": "digits", "splits": {}}), "no examples"),
        (
            lambda folder, path: shards.write_manifest(
                folder, {**shards.read_manifest(folder), "splits": {"train": []}}
            ),
            "no examples",
        ),
    ],
)
def test_what_is_missing_is_named(copy, damage, part):
    damage(*copy)
    with pytest.raises(DataError, match=part) as caught:
        layouts.open_data(copy[0], "digits")
    assert copy[0] in str(caught.value) and "\n" not in str(caught.value)


def test_scan_names_a_damaged_length(copy):
    _, path = copy
    offsets, _ = shards.read_index(path)
    with open(path, "r+b") as file:
        file.seek(offsets[4] - 12)
        file.write(b"\xff")
    with pytest.raises(DataError, match="record 4: damaged length"):
        shards.scan(path)


def test_split_into_shards_keeps_every_example(tmp_path):
    payloads = [str(i).encode() for i in range(23)]
    rows = shards.write_split(str(tmp_path), "train", iter(payloads), 23, 4)
    assert [row["name"] for row in rows] == [f"train-{i:05d}-of-00004" for i in range(4)]
    split = shards.open_split(str(tmp_path), {"splits": {"train": rows}}, "train")
    assert split.read(np.arange(23)) == payloads
