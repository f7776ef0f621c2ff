"""The command prepare verify: every record is read, parsed and decoded, and all bad ones are listed."""

import json
import re
import struct

import pytest
from conftest import last_line
from raw_images import SYNSETS, encoded

from resnet_cpu.data import shards, verification
from resnet_cpu.data.sources.serialization import serialize
from resnet_cpu.errors import DataError

pytestmark = pytest.mark.training


def example(number=0, image=None, **changed):
    """Return an example as in ImageNet's shards."""
    features = {
        "image/encoded": encoded(seed=number) if image is None else image,
        "image/class/label": number + 1,
        "image/class/synset": SYNSETS[number].encode(),
        "image/filename": f"{SYNSETS[number]}_{number}.JPEG".encode(),
    }
    features.update({f"image/{name.replace('_', '/')}": value for name, value in changed.items()})
    return serialize({name: value for name, value in features.items() if value is not None})


def write(folder, train, validation=None, manifest=None):
    """Write an ImageNet of two training shards and one of validation; with a manifest if one is given."""
    folder.mkdir(exist_ok=True)
    splits = {"train": train, "validation": validation or [example(9)]}
    rows = {
        split: shards.write_split(str(folder), split, iter(examples), len(examples), 2 if split == "train" else 1)
        for split, examples in splits.items()
    }
    if manifest is not None:
        facts = {"dataset": "imagenet", "num_classes": 1000, "label_base": 1, "splits": rows}
        shards.write_manifest(str(folder), {**facts, **manifest})
    return folder


GOOD = [example(number) for number in range(8)]


def listed(folder, capsys):
    """Return the lines about bad records of a set that is refused, without the folder."""
    with pytest.raises(DataError) as refused:
        verification.verify(str(folder), "imagenet", 2)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("bad: ")]
    assert re.search(f": {len(lines)} problems?, listed above", str(refused.value))
    return sorted(line[len("bad: ") :].replace(f"{folder}/", "") for line in lines)


def test_a_good_set_passes_with_its_counts(tmp_path, capsys):
    assert verification.verify(str(write(tmp_path, GOOD)), "imagenet", 2) == {"train": 8, "validation": 1}
    printed = capsys.readouterr().err
    assert "bad: " not in printed and "9 records in 3 shards, none of them bad" in printed
    assert "note: no manifest.json: SHA-256 and sizes of the shards are not compared" in printed


def test_all_bad_records_are_listed_with_their_reasons(tmp_path, capsys):
    bomb = encoded()
    at = bomb.index(b"\xff\xc0") + 5
    bomb = bomb[:at] + struct.pack(">HH", 50_000, 50_000) + bomb[at + 4 :]
    bad = [
        example(10, encoded()[:-300]),
        example(11, b""),
        example(12, b"<!DOCTYPE html>"),
        example(13, class_label=1001),
        example(14, class_label=None),
        b"no example at all",
        example(16, bomb),
    ]
    lines = listed(write(tmp_path, GOOD + bad), capsys)
    assert [re.sub(r" \(.*", "", line) for line in lines] == [
        "train-00001-of-00002: record 1: damaged JPEG",
        "train-00001-of-00002: record 2: empty, 0 bytes",
        "train-00001-of-00002: record 3: a web page, not an image",
        "train-00001-of-00002: record 4: label 1001 is outside the 1000 classes 1..1000",
        "train-00001-of-00002: record 5: not a standard example",
        "train-00001-of-00002: record 6: not a standard example",
        "train-00001-of-00002: record 7: JPEG of 50000 x 50000 pixels, above the limit of 16,384 a side and 67 million "
        "in all",
    ]


def test_images_of_other_formats_are_good_but_mentioned(tmp_path, capsys):
    folder = write(tmp_path, [*GOOD, example(10, encoded("PNG")), example(11, encoded("GIF"))])
    assert verification.verify(str(folder), "imagenet", 2)["train"] == 10
    errors = capsys.readouterr().err
    assert "note: 1 images are PNG" in errors and "note: 1 images are GIF" in errors


def test_examples_that_occur_twice_are_listed(tmp_path, capsys):
    lines = listed(write(tmp_path, [*GOOD, GOOD[2]]), capsys)
    assert lines == ["train-00001-of-00002: record 4: the same image as record 2 of train-00000-of-00002"]
    folder = write(tmp_path / "unnamed", [example(number, filename=None) for number in range(2)], [GOOD[0]])
    assert verification.verify(str(folder), "imagenet", 2)["train"] == 2  # the same bytes, two names


def test_a_class_with_two_labels_is_listed(tmp_path, capsys):
    lines = listed(write(tmp_path, GOOD, [example(5, class_label=7, filename=b"other.JPEG")]), capsys)
    assert len(lines) == 1
    assert f"class {SYNSETS[5]} has the label 7, but 6 in record 1 of" in lines[0]


def test_a_label_that_contradicts_the_list_of_classes_is_listed(tmp_path, capsys):
    folder = write(tmp_path, [*GOOD, example(5, class_label=8, filename=b"other.JPEG")], manifest={"classes": SYNSETS})
    (line,) = listed(folder, capsys)
    assert f"class {SYNSETS[5]} has the label 8, which is that of {SYNSETS[7]} in the list of classes" in line


def test_damage_to_a_shard_is_listed_and_the_others_are_still_checked(tmp_path, capsys):
    folder = write(tmp_path, [*GOOD[:7], example(10, b"")], manifest={})
    path = folder / "train-00000-of-00002"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    lines = listed(folder, capsys)
    assert any("train-00000-of-00002: its SHA-256 is not that of the manifest" in line for line in lines)
    assert any(re.match(r"train-00000-of-00002: record \d: .*checksum", line) for line in lines)
    assert "train-00001-of-00002: record 3: empty, 0 bytes" in lines
    (folder / "train-00001-of-00002").unlink()
    assert "train-00001-of-00002: missing" in listed(folder, capsys)


def test_as_a_user_runs_it(run_command, tmp_path):
    process = run_command("prepare", "verify", f"--data_dir={write(tmp_path / 'good', GOOD)}")
    assert process.returncode == 0 and json.loads(last_line(process.stdout)) == {"train": 8, "validation": 1}
    process = run_command("prepare", "verify", f"--data_dir={write(tmp_path / 'bad', [*GOOD, example(8, b'')])}")
    assert process.returncode == 65 and "Traceback" not in process.stderr
    assert "bad: " in process.stderr and "1 problem, listed above" in process.stderr
    assert "Bad are 1 of 3 shards: copy them again" in process.stderr


def test_a_shard_without_examples_is_good(tmp_path):
    rows = [example(number) for number in range(3)]
    folder = write(tmp_path, rows, manifest={})
    assert verification.verify(str(folder), "imagenet", 2) == {"train": 3, "validation": 1}
    row = shards.write_shard(str(folder / "train-00002-of-00003"), iter([]))
    manifest = shards.read_manifest(str(folder))
    manifest["splits"]["train"].append(row)
    shards.write_manifest(str(folder), manifest)
    assert verification.verify(str(folder), "imagenet", 2) == {"train": 3, "validation": 1}
    manifest["splits"].update(train=manifest["splits"]["train"][:-1], validation=[row])
    shards.write_manifest(str(folder), manifest)
    with pytest.raises(DataError, match="no examples in split 'validation'"):
        verification.verify(str(folder), "imagenet", 2)
