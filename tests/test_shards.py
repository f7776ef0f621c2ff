"""TFRecord shards: readable by TensorFlow, and every damage is detected."""

import json
import os
import shutil
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import tensorflow as tf
from conftest import OUTSIDE, ROOT

from resnet_cpu.data import folders, shards
from resnet_cpu.errors import DataError


@pytest.fixture
def copy(tiny_data, tmp_path):
    """A copy of the data set, for a test to damage, and its first training shard."""
    folder = str(tmp_path / "data")
    shutil.copytree(tiny_data, folder)
    return folder, os.path.join(folder, shards.read_manifest(folder)["splits"]["train"][0]["name"])


def read_all(folder):
    data = folders.open_data(folder, "digits")
    return data.train.read(np.arange(data.train.examples))


def test_tensorflow_reads_the_same_records(tiny_data):
    names = [row["name"] for row in shards.read_manifest(tiny_data)["splits"]["train"]]
    expected = [record.numpy() for record in tf.data.TFRecordDataset([os.path.join(tiny_data, name) for name in names])]
    assert read_all(tiny_data) == expected
    assert len(expected) == 50 and len(names) == 3


def test_shards_written_by_tensorflow_can_be_indexed(tmp_path):
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


def test_every_flipped_bit_of_a_record_is_detected_and_located(copy):
    folder, path = copy
    starts = shards.read_index(path)
    with open(path, "rb") as file:
        whole = bytearray(file.read())
    record = 2
    first, last = starts[record] - 12, starts[record + 1] - 12
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
            folders.check_records(folder)


def test_negative_control_the_undamaged_copy_reads(copy):
    assert folders.check_records(copy[0]) == {"train": 50, "validation": 21}


def test_every_truncation_is_detected_before_records_are_read(copy):
    folder, path = copy
    starts = shards.read_index(path)
    size = os.path.getsize(path)
    cuts = {0, 5, size - 1, *(int(start) - 12 for start in starts[1:-1])}  # also at the borders of records
    for cut in sorted(cuts, reverse=True):
        os.truncate(path, cut)
        with pytest.raises(DataError, match=os.path.basename(path)):
            folders.open_data(folder, "digits")


@pytest.mark.parametrize(
    "damage, part",
    [
        (lambda folder, path: shutil.rmtree(folder), "does not exist"),
        (lambda folder, path: os.remove(os.path.join(folder, "manifest.json")), "no manifest.json"),
        (lambda folder, path: os.remove(path), "shard missing"),
        (lambda folder, path: os.truncate(shards.index_path(path), 100), "unreadable index"),
        (lambda folder, path: os.truncate(shards.index_path(path), 0), "unreadable index"),
        (lambda folder, path: np.save(shards.index_path(path), np.zeros([3, 2])), "unreadable index"),
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
def test_missing_and_broken_files_are_named(copy, damage, part):
    damage(*copy)
    with pytest.raises(DataError, match=part) as caught:
        folders.open_data(copy[0], "digits")
    assert copy[0] in str(caught.value) and "\n" not in str(caught.value)


def test_scan_names_a_damaged_length(copy):
    _, path = copy
    starts = shards.read_index(path)
    with open(path, "r+b") as file:
        file.seek(starts[4] - 12)
        file.write(b"\xff")
    with pytest.raises(DataError, match="record 4: damaged length"):
        shards.scan(path)


def test_writing_shards_keeps_every_example(tmp_path):
    payloads = [str(i).encode() for i in range(23)]
    rows = shards.write_split(str(tmp_path), "train", iter(payloads), 23, 4)
    assert [row["name"] for row in rows] == [f"train-{i:05d}-of-00004" for i in range(4)]
    split = shards.open_split(str(tmp_path), {"splits": {"train": rows}}, "train")
    assert split.read(np.arange(23)) == payloads


def test_two_writers_of_a_shard_use_different_temporary_files(tmp_path, monkeypatch):
    """Two prepare processes, as under srun -n 2, wrote into the same temporary file."""
    seen = []
    real = os.replace
    monkeypatch.setattr(shards.os, "replace", lambda a, b: (seen.append(a), real(a, b)))
    for pid in (111, 222):
        with monkeypatch.context() as patch:
            patch.setattr(shards.os, "getpid", lambda pid=pid: pid)
            shards.write_split(str(tmp_path), "train", iter([b"x"]), 1, 1)
    shard = [os.path.basename(path) for path in seen if ".index" not in path]
    assert shard == ["train-00000-of-00001.tmp111", "train-00000-of-00001.tmp222"]


@pytest.fixture
def large(tmp_path):
    """A split of 1,281,167 records in sparse files: opening needs only sizes and indexes."""
    records, of = 1_281_167, 64
    rows = []
    for shard, numbers in enumerate(np.array_split(np.arange(records), of)):
        path = tmp_path / shards.shard_name("train", shard, of)
        starts = 12 + np.arange(len(numbers) + 1, dtype=np.int64) * 110_016
        with open(path, "wb") as file:
            file.truncate(int(starts[-1]) - 12)
        np.save(shards.index_path(str(path)), starts)
        rows.append({"name": path.name, "examples": len(numbers), "bytes": int(starts[-1]) - 12})
    return str(tmp_path), {"splits": {"train": rows}}


def test_the_memory_of_an_open_split_does_not_grow_with_its_records(large):
    """The indexes are memory-mapped: what numpy allocates for 1.28 million records depends on the shards alone."""
    tracemalloc.start()
    split = shards.open_split(*large, "train")
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert split.examples == 1_281_167 and held < 300_000
    assert split.locate(1_281_166)[1] == 1_281_167 // 64 - 1
    tracemalloc.start()  # the control: indexes read into memory would be noticed
    whole = [np.array(starts) for starts in split.starts]
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(whole) == 64 and held > 10_000_000


LIMITED = """
import json, resource, sys
from resnet_cpu.data import shards
folder, rows, soft, hard = sys.argv[1], json.load(open(sys.argv[1] + "/rows.json")), *map(int, sys.argv[2:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
split = shards.open_split(folder, {"splits": {"train": rows}}, "train")
print(len(set(map(bytes, split.read(__import__("numpy").arange(split.examples))))))
"""


def test_more_shards_than_the_limit_of_open_files(tmp_path):
    """600 shards under a limit of 300: a map and a descriptor each, far more than the reserve for other files."""
    rows = shards.write_split(str(tmp_path), "train", (str(i).encode() for i in range(600)), 600, 600)
    (tmp_path / "rows.json").write_text(json.dumps(rows))

    def run(soft, hard):
        command = [sys.executable, "-c", LIMITED, str(tmp_path), str(soft), str(hard)]
        return subprocess.run(command, cwd=ROOT, env=OUTSIDE, capture_output=True, text=True, timeout=300)

    allowed = run(300, 3000)
    assert allowed.stdout.split() == ["600"], allowed.stderr
    refused = run(300, 400)
    assert "DataError" in refused.stderr and "open files, the limit is 400" in refused.stderr


def test_an_index_may_be_read_by_whoever_may_read_its_shard(tmp_path):
    path = str(tmp_path / "train-00000-of-00001")
    before = os.umask(0o077)
    try:
        shards.write_shard(path, iter([b"record"]))
        assert os.stat(shards.index_path(path)).st_mode & 0o777 == 0o600
        os.chmod(path, 0o644)
        shards.write_index(path)
    finally:
        os.umask(before)
    assert os.stat(shards.index_path(path)).st_mode & 0o777 == 0o644
