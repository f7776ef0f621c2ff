"""ArrayRecord files of TFDS: the same interface as TFRecord shards, and damage is detected."""

import os

import numpy as np
import pytest
from test_tfds import described, refusal, write_set

from resnet_cpu.data import array_records, folders
from resnet_cpu.errors import DataError

COUNTS = {"train": [3, 2], "test": [2]}


def payload(split, number):
    return f"{split} {number} ".encode() * (10 + number)


@pytest.fixture
def prepared(tmp_path):
    """A set in this format, and the folder of its files."""
    module = pytest.importorskip("array_record.python.array_record_module")
    folder = write_set(tmp_path, fileFormat="array_record")
    for split, lengths in COUNTS.items():
        first = 0
        for shard, length in enumerate(lengths):
            name = f"{folder}/small-{split}.array_record-{shard:05d}-of-{len(lengths):05d}"
            writer = module.ArrayRecordWriter(name, "group_size:1")  # as TFDS writes them
            for number in range(first, first + length):
                writer.write(payload(split, number))
            writer.close()
            first += length
    return tmp_path, folder


def test_records_are_read_in_any_order(prepared):
    data_dir, folder = prepared
    folders.make_indexes(described(data_dir), str(data_dir))
    assert not [name for name in os.listdir(folder) if name.endswith(".npy")]
    data = folders.open_data(str(data_dir), "tfds:small")
    assert (data.train.examples, data.validation.examples) == (5, 2)
    assert data.train.read(np.array([4, 0, 3, 3])) == [payload("train", number) for number in (4, 0, 3, 3)]
    assert data.validation.read(np.array([1])) == [payload("test", 1)]
    path, record = data.train.locate(4)
    assert path.endswith("small-train.array_record-00001-of-00002") and record == 1
    for split in data.splits:
        split.close()


def test_sets_with_other_files_differ(prepared):
    data_dir, folder = prepared
    module = pytest.importorskip("array_record.python.array_record_module")
    before = folders.open_data(str(data_dir), "tfds:small")
    contents = before.train.content, before.validation.content
    writer = module.ArrayRecordWriter(f"{folder}/small-train.array_record-00000-of-00002", "group_size:1")
    for number in range(3):  # as many records as before
        writer.write(os.urandom(10**6) + payload("train", number))
    writer.close()
    after = folders.open_data(str(data_dir), "tfds:small")
    assert after.train.content != contents[0] and after.validation.content == contents[1]
    for data in (before, after):
        for split in data.splits:
            split.close()


def test_damage_and_missing_files_are_named(prepared):
    data_dir, folder = prepared
    path = f"{folder}/small-train.array_record-00000-of-00002"
    with open(path, "rb") as file:
        whole = file.read()
    damaged = 0
    for place in range(0, len(whole), 97):
        with open(path, "wb") as file:
            file.write(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            data = folders.open_data(str(data_dir), "tfds:small")
            found = data.train.read(np.arange(5))
            assert found == [payload("train", number) for number in range(5)]  # a byte of padding
        except DataError as error:
            assert path in str(error) and "\n" not in str(error)
            damaged += 1
    assert damaged > 2
    with open(path, "wb") as file:
        file.write(whole[: len(whole) // 2])
    assert path in refusal(data_dir)
    os.remove(path)
    assert f"{path}: shard missing" in refusal(data_dir)


def test_another_number_of_records_is_refused(prepared):
    data_dir, folder = prepared
    paths = [f"{folder}/small-train.array_record-0000{number}-of-00002" for number in (0, 1)]
    os.replace(*paths[::-1])
    with open(paths[0], "rb") as file, open(paths[1], "wb") as copy:
        copy.write(file.read())
    assert f"{paths[0]}: 2 records, but the data set's description says 3" in refusal(data_dir)


def test_without_the_package_the_remedy_is_named(tmp_path, monkeypatch):
    write_set(tmp_path, fileFormat="array_record")
    monkeypatch.setattr(array_records, "available", lambda: False)
    assert "prepare it with file_format=tfrecord, or install the package array_record" in refusal(tmp_path)


@pytest.mark.training
def test_such_files_are_verified(prepared):
    """The records here are not examples. That must be said, not that the shards are damaged."""
    from resnet_cpu.data import verification

    with pytest.raises(DataError, match="record 0: not a standard example") as refused:
        verification.verify(str(prepared[0]), "tfds:small", 2)
    assert "7 problems" in str(refused.value)
