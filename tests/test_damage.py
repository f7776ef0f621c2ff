"""Damaged shards and indexes: every flipped bit and every truncation is detected, and the true cause is named."""

import gzip
import os
import re
import shutil
import zlib

import numpy as np
import pytest

from resnet_cpu.data import folders, shards
from resnet_cpu.errors import DataError

FLIPS = 400
RECORDS = 12


def payloads_of(seed, lengths=None):
    generator = np.random.Generator(np.random.Philox(seed))
    lengths = generator.integers(0, 90, RECORDS) if lengths is None else lengths
    return [generator.bytes(int(length)) for length in lengths]


def write(folder, manifest=True, index=True, splits=None):
    """Write a set of one shard per split, as `prepare` does, or as TF-slim does (without manifest)."""
    os.makedirs(folder, exist_ok=True)
    splits = splits or {"train": payloads_of(1), "validation": payloads_of(2)}
    rows = {name: shards.write_split(folder, name, iter(some), len(some), 1) for name, some in splits.items()}
    if manifest:
        shards.write_manifest(folder, {"dataset": "imagenet", "num_classes": 1000, "label_base": 1, "splits": rows})
    if not index:
        for name in splits:
            os.remove(shards.index_path(os.path.join(folder, rows[name][0]["name"])))
    return os.path.join(folder, "train-00000-of-00001")


def outcome(folder):
    """Return the records of the training split, or the message of the error."""
    data = None
    try:
        data = folders.open_data(folder, "imagenet")
        return data.train.read(np.arange(data.train.examples))
    except DataError as error:
        assert "\n" not in str(error)
        return str(error)
    finally:
        for split in data.splits if data else ():
            split.close()


def content(path):
    with open(path, "rb") as file:
        return file.read()


def replace(path, new):
    with open(path, "wb") as file:
        file.write(new)


def flips(size, seed):
    """Return `FLIPS` different bits of a file of `size` bytes, as (byte, mask)."""
    generator = np.random.Generator(np.random.Philox(seed))
    bits = generator.choice(8 * size, min(FLIPS, 8 * size), replace=False)
    return [(int(bit) // 8, 1 << int(bit) % 8) for bit in bits]


def flipped(whole, place, mask):
    return whole[:place] + bytes([whole[place] ^ mask]) + whole[place + 1 :]


LAYOUTS = {"prepared": (True, True), "slim with index": (False, True), "slim, read-only": (False, False)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_flipped_bit_of_a_shard_is_detected_and_its_record_named(tmp_path, layout):
    folder = str(tmp_path)
    path = write(folder, *LAYOUTS[layout])
    starts, whole = shards.scan(path), content(path)
    assert outcome(folder) == payloads_of(1)  # the control
    for place, mask in flips(len(whole), 3):
        replace(path, flipped(whole, place, mask))
        record = int(np.searchsorted(starts, place + 12, side="right")) - 1
        in_header = place < starts[record]
        cause = "damaged length field" if in_header else "checksum does not match"
        assert outcome(folder) == f"{path}: record {record}: {cause}; copy or prepare the shard again", (place, mask)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_truncation_is_detected_and_named(tmp_path, layout):
    folder = str(tmp_path)
    manifest, index = LAYOUTS[layout]
    path = write(folder, manifest, index)
    starts, whole = shards.scan(path), content(path)
    borders = {int(start) - 12: record for record, start in enumerate(starts)}
    for length in range(len(whole)):
        replace(path, whole[:length])
        found = outcome(folder)
        if length == 0:
            expected = ": an empty file"
        elif length not in borders:
            record = int(np.searchsorted(starts, length + 12, side="right")) - 1
            expected = f": record {record}: truncated"
        elif manifest:
            expected = rf": {borders[length]} records in {length} bytes, .* says {RECORDS} in .*: truncated"
        elif index:
            expected = rf": ends after {borders[length]} whole records, .*truncated at the border of a record"
        else:  # nothing shows it but the total, see the next test
            assert found == payloads_of(1)[: borders[length]]
            continue
        assert isinstance(found, str) and re.match(re.escape(path) + expected, found), (length, found)


def test_a_wrong_total_of_imagenet_is_a_warning(tmp_path):
    folder = str(tmp_path)
    write(folder, manifest=False)
    description, data = folders.describe(folder, "imagenet"), folders.open_data(folder, "imagenet")
    train, validation = folders.count_warnings(description, data)
    assert "12 examples in the 1 shards of train, ImageNet has 1,281,167" in train
    assert "12 examples in the 1 shards of validation, ImageNet has 50,000" in validation
    whole = {**description, "expected": {"train": 12, "validation": 12}}
    assert not folders.count_warnings(whole, data)
    assert not folders.count_warnings({"splits": description["splits"]}, data)  # a layout that records its counts


@pytest.mark.parametrize("manifest", [True, False])
def test_every_flipped_bit_of_an_index_is_blamed_on_the_index_or_does_no_harm(tmp_path, manifest):
    folder = str(tmp_path)
    path = write(folder, manifest)
    index, harmless = shards.index_path(path), 0
    whole = content(index)
    for place, mask in flips(len(whole), 4):
        replace(index, flipped(whole, place, mask))
        found = outcome(folder)
        harmless += found == payloads_of(1)
        assert found == payloads_of(1) or (
            index in found
            and "remove the" in found
            and not re.search("checksum|truncated|damaged length|copy|prepare", found)
        ), (place, mask, found)
    assert harmless < FLIPS // 10  # a few bits of NumPy's header have no meaning


@pytest.mark.parametrize("manifest", [True, False])
def test_an_index_that_belongs_to_another_shard_of_the_same_size_is_blamed(tmp_path, manifest):
    lengths = np.arange(RECORDS) * 5
    path = write(str(tmp_path / "data"), manifest, splits={"train": payloads_of(1, lengths), "validation": [b"x"]})
    other = write(str(tmp_path / "other"), splits={"train": payloads_of(5, lengths[::-1]), "validation": [b"x"]})
    assert os.path.getsize(path) == os.path.getsize(other)
    shutil.copy(other, path)
    found = outcome(str(tmp_path / "data"))
    assert "can be read, with 12 records, but its index" in found and "remove the index" in found
    os.remove(shards.index_path(path))  # the remedy
    assert outcome(str(tmp_path / "data")) == payloads_of(5, lengths[::-1])


def test_a_replaced_shard_is_distinguished_from_a_wrong_index(tmp_path):
    folder = str(tmp_path / "data")
    path = write(folder)
    other = write(str(tmp_path / "other"), splits={"train": payloads_of(6)[:5], "validation": [b"x"]})
    shutil.copy(other, path)
    assert "5 records in" in outcome(folder) and "replaced; copy or prepare the shard again" in outcome(folder)
    os.remove(os.path.join(folder, shards.MANIFEST))
    assert "with 5 records, but its index" in outcome(folder)


HTML = b"<!DOCTYPE html><html><body>403 Forbidden</body></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"
NOT_SHARDS = {
    "GZIP-compressed; .* gzip -dc < .*'?/.*train": gzip.compress,
    "ZLIB-compressed; .* rewrite each with python -c ": zlib.compress,
    "ZLIB-compressed": lambda whole: zlib.compress(whole, 1),
    "Zstandard-compressed": lambda whole: b"\x28\xb5\x2f\xfd" + whole,
    "bzip2-compressed": lambda whole: b"BZh9" + whole,
    "XZ-compressed": lambda whole: b"\xfd7zXZ\x00" + whole,
    "an HTML page": lambda whole: HTML,
    "a pointer of Git LFS": lambda whole: POINTER,
    "a text file that begins with '/annex/objects": lambda whole: b"/annex/objects/SHA256E-s1--00.tfrecord\n",
    "filled with zeros": lambda whole: bytes(len(whole)),
    "a tar archive": lambda whole: b"a".ljust(257, b"\0") + b"ustar" + whole,
    "a JPEG image": lambda whole: b"\xff\xd8\xff\xe0" + whole,
    "record 0: damaged length field": lambda whole: whole[1:],
    "record 0: truncated in its header": lambda whole: whole[:1],
}


@pytest.mark.parametrize("part", NOT_SHARDS)
@pytest.mark.parametrize("index", [True, False])
def test_what_is_not_a_shard_is_recognised(tmp_path, part, index):
    path = write(str(tmp_path), manifest=False, index=index)
    replace(path, NOT_SHARDS[part](content(path)))
    found = outcome(str(tmp_path))
    assert re.match(re.escape(path) + ": " + part, found), found


def test_the_command_that_is_named_for_a_compressed_shard_works(tmp_path):
    folder = str(tmp_path / "it's here")
    path = write(folder, manifest=False, index=False)
    for compress in (gzip.compress, zlib.compress):
        replace(path, compress(content(path)))
        _, _, command = outcome(folder).partition("rewrite each with ")
        assert os.system(command) == 0
        assert outcome(folder) == payloads_of(1)


def test_empty_and_missing_shards_are_named(tmp_path):
    folder = str(tmp_path)
    path = write(folder, manifest=False, index=False)
    replace(path, b"")
    folders.make_indexes(folders.describe(folder, "imagenet"), folder)
    assert not os.path.exists(shards.index_path(path))  # which would be wrong as soon as the shard is copied again
    assert outcome(folder) == f"{path}: an empty file; copy or prepare the shard again"
    os.remove(path)
    os.mkdir(path)
    assert outcome(folder) == f"{path}: a folder, not a shard; copy or prepare the data set again"


def test_a_shard_without_examples_that_the_manifest_lists_as_such_is_accepted(tmp_path):
    folder = str(tmp_path)
    write(folder)
    manifest = shards.read_manifest(folder)
    rows = shards.write_split(folder, "train", iter(payloads_of(1)[:2]), 2, 4)
    assert sorted(row["bytes"] for row in rows)[0] == 0
    shards.write_manifest(folder, {**manifest, "splits": {**manifest["splits"], "train": rows}})
    assert outcome(folder) == payloads_of(1)[:2]


def changed(**changes):
    return lambda row: {**row, **changes}


@pytest.mark.parametrize(
    "change, part",
    [
        (changed(name="/etc/hostname"), "lists '/etc/hostname', which is not a file below its folder"),
        (changed(name="../data/train-00000-of-00001"), "which is not a file below its folder"),
        (changed(name="a/../../b"), "which is not a file below its folder"),
        (changed(name=""), "which is not a file below its folder"),
        (changed(name="validation-00000-of-00001"), "lists validation-00000-of-00001 twice"),
        (changed(name="./validation-00000-of-00001"), "lists validation-00000-of-00001 twice"),
        (changed(name=7), "not the manifest of a data set"),
        (changed(examples="12"), "not the manifest of a data set"),
        (changed(bytes=None), "not the manifest of a data set"),
        (changed(examples=11), "12 records in .* says 11 in"),
        (changed(name="train-00000-of-00002"), "shard missing, 1 of 1"),
        (lambda row: {"name": row["name"]}, "not the manifest of a data set"),
        (lambda row: row["name"], "not the manifest of a data set"),
    ],
)
def test_bad_rows_of_a_manifest_are_refused(tmp_path, change, part):
    folder = str(tmp_path / "data")
    write(folder)
    manifest = shards.read_manifest(folder)
    rows = [change(row) for row in manifest["splits"]["train"]]
    shards.write_manifest(folder, {**manifest, "splits": {**manifest["splits"], "train": rows}})
    found = outcome(folder)
    assert re.search(part, found) and folder in found, found


@pytest.mark.parametrize(
    "changes, part",
    [
        ({"format_version": 2}, "has format 2, this version of resnet_cpu reads 1; use a newer version"),
        ({"format_version": "x"}, "not the manifest of a data set"),
        ({"num_classes": "many"}, "damaged"),
        ({"num_classes": None}, "damaged"),
        ({"pixel_mean": ["a"]}, "damaged"),
        ({"classes": ["a", "b"]}, "names 2 classes of 1000"),
        ({"dataset": "digits"}, "contains digits, not --dataset=imagenet"),
    ],
)
def test_a_manifest_that_cannot_be_understood_is_refused(tmp_path, changes, part):
    folder = str(tmp_path)
    write(folder)
    manifest = shards.read_manifest(folder)
    assert manifest["format_version"] == shards.FORMAT_VERSION
    shards.write_manifest(folder, {**manifest, **changes})
    found = outcome(folder)
    assert part in found and folder in found
    del manifest["format_version"]  # as older versions wrote it
    shards.write_atomically(os.path.join(folder, shards.MANIFEST), shards.json.dumps(manifest).encode())
    assert outcome(folder) == payloads_of(1)
