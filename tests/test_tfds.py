"""Sets of TFDS from their description files, as several versions wrote them; tests/test_folders.py has real ones."""

import json
import os

import numpy as np
import pytest

from resnet_cpu.data import folders, shards, tfds
from resnet_cpu.errors import DataError

IMAGE = {"image": {"shape": {"dimensions": ["-1", "-1", "3"]}, "encodingFormat": "jpeg"}}
FEATURES = {"image": IMAGE, "label": {"classLabel": {"numClasses": "10"}}, "file_name": {"text": {}}}
COUNTS = {"train": [3, 2], "test": [2]}


def write_json(path, content):
    with open(path, "w") as file:
        json.dump(content, file)


def write_set(data_dir, path="small/1.0.0", counts=COUNTS, features=FEATURES, supervised=None, **info):
    """Write a set of shards with one byte per record; without `features`, as early versions of TFDS described it."""
    folder = os.path.join(data_dir, path)
    os.makedirs(folder)
    name, splits = path.split("/")[0], []
    for split, lengths in counts.items():
        for shard, length in enumerate(lengths):
            (row,) = shards.write_split(folder, "x", iter([b"x"] * length), length, 1)
            new = f"{name}-{split}.tfrecord-{shard:05d}-of-{len(lengths):05d}"
            os.rename(os.path.join(folder, row["name"]), os.path.join(folder, new))
            os.remove(shards.index_path(os.path.join(folder, row["name"])))
        splits.append({"name": split, "shardLengths": [str(length) for length in lengths]})
    keys = {"supervisedKeys": supervised} if supervised else {}
    write_json(f"{folder}/dataset_info.json", {"name": name, "splits": splits, **keys, **info})
    if features is not None:
        write_json(f"{folder}/features.json", {"featuresDict": {"features": features}})
    return folder


def pair(*keys):
    return {"tuple": {"items": [{"featureKey": key} for key in keys]}}


def described(data_dir, dataset="tfds:small", *eval_split):
    return folders.describe(str(data_dir), dataset, *eval_split)


def refusal(data_dir, dataset="tfds:small", *eval_split):
    with pytest.raises(DataError) as caught:
        folders.open_data(str(data_dir), dataset, *eval_split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


TWO_LABELS = {**FEATURES, "coarse_label": {"classLabel": {"numClasses": "20"}}}
TWO_IMAGES = {**FEATURES, "mask": IMAGE}


@pytest.mark.parametrize(
    "features, supervised, expected",
    [
        (TWO_LABELS, pair("image", "label"), ("image", "label", 10)),
        (TWO_LABELS, pair("image", "coarse_label"), ("image", "coarse_label", 20)),
        (TWO_LABELS, pair("image", "label", "file_name"), ("image", "label", 10)),  # with a weight
        (TWO_LABELS, {"input": "image", "output": "coarse_label"}, ("image", "coarse_label", 20)),  # early versions
        (TWO_IMAGES, pair("image", "label"), ("image", "label", 10)),
        (FEATURES, pair("image", "file_name"), ("image", "label", 10)),  # the only ones of their kind
        (FEATURES, None, ("image", "label", 10)),
    ],
)
def test_supervised_keys_name_image_and_label(tmp_path, features, supervised, expected):
    write_set(tmp_path, features=features, supervised=supervised)
    found = described(tmp_path)
    assert (found["image_key"], found["label_key"], found["num_classes"]) == expected
    assert found["label_base"] == 0


@pytest.mark.parametrize(
    "features, supervised, parts",
    [
        (
            TWO_LABELS,
            None,
            ["2 features of kind classLabel (label, coarse_label)", "names nothing", '"supervisedKeys": '],
        ),
        (TWO_LABELS, pair("image", "file_name"), ["names image, file_name"]),
        (TWO_LABELS, {"tuple": {"items": [{"featureKey": "image"}, {"dict": {}}]}}, ["names image, None"]),
        (TWO_IMAGES, None, ["2 features of kind image (image, mask)"]),
        ({"image": IMAGE, "label": {"tensor": {}}}, None, ["has no feature of kind classLabel, only label"]),
        ({"audio": {}, "label": FEATURES["label"]}, None, ["has no feature of kind image, only audio"]),
    ],
)
def test_an_ambiguous_or_missing_pair_is_refused_with_the_remedy(tmp_path, features, supervised, parts):
    write_set(tmp_path, features=features, supervised=supervised)
    message = refusal(tmp_path)
    assert all(part in message for part in parts), message


def test_the_remedy_for_an_ambiguous_pair_works(tmp_path):
    folder = write_set(tmp_path, features=TWO_LABELS)
    line = "{" + refusal(tmp_path).partition("choose the pair there: ")[2] + "}"
    with open(f"{folder}/dataset_info.json") as file:
        info = json.load(file)
    added = json.loads(line.replace("IMAGE", "image").replace("LABEL", "coarse_label"))
    write_json(f"{folder}/dataset_info.json", {**info, **added})
    assert described(tmp_path)["label_key"] == "coarse_label"


def test_a_set_of_an_early_version_is_read(tmp_path):
    folder = write_set(tmp_path, features=None, supervised={"input": "image", "output": "label"})
    assert "nor do IMAGE.image.json and LABEL.labels.txt" in refusal(tmp_path)
    write_json(f"{folder}/image.image.json", {"encoding_format": "png", "shape": [-1, -1, 3]})
    assert "nor do IMAGE.image.json" in refusal(tmp_path)
    with open(f"{folder}/label.labels.txt", "w") as file:
        file.write("cat\ndog\n")
    data = folders.open_data(str(tmp_path), "tfds:small")
    assert (data.image_key, data.label_key, data.num_classes) == ("image", "label", 2)
    assert data.classes == ("cat", "dog") and data.train.read(np.arange(5)) == [b"x"] * 5


def test_names_of_classes_are_those_of_the_labels(tmp_path):
    folder = write_set(tmp_path)
    assert folders.open_data(str(tmp_path), "tfds:small").classes is None
    for count, expected in [(10, tuple("abcdefghij")), (9, None)]:  # a list of another length is not that of the labels
        with open(f"{folder}/label.labels.txt", "w") as file:
            file.write("\n".join("abcdefghij"[:count]) + "\n")
        assert folders.open_data(str(tmp_path), "tfds:small").classes == expected


@pytest.mark.parametrize(
    "counts, eval_split, used",
    [
        ({"train": [3], "validation": [2], "test": [1]}, "auto", (3, 2, ("test",))),
        ({"train": [3], "validation": [2], "test": [1]}, "test", (3, 1, ("validation",))),
        ({"train": [3], "test": [1]}, "auto", (3, 1, ())),
        ({"train": [3], "test": [1]}, "none", (3, 0, ("test",))),
        ({"train": [3], "test": [1]}, "train", (3, 3, ("test",))),
        ({"train": [3]}, "auto", (3, 0, ())),
        ({"train": [3], "val": [2]}, "auto", (3, 0, ("val",))),
        ({"train": [3], "val": [2]}, "val", (3, 2, ())),
        ({"train": [3], "validation": [0]}, "auto", (3, 0, ())),  # listed, but without examples
        ({"test": [1]}, "auto", (0, 1, ())),
    ],
)
def test_the_split_to_evaluate_on_is_chosen(tmp_path, counts, eval_split, used):
    write_set(tmp_path, counts=counts)
    data = folders.open_data(str(tmp_path), "tfds:small", eval_split)
    assert (data.train.examples, data.validation.examples, data.others) == used
    assert [split.examples for split in data.splits] == [count for count in used[:2] if count]
    assert data.validation.examples == 0 or data.validation.read(np.array([0])) == [b"x"]


def test_a_split_that_is_not_there_is_refused(tmp_path):
    write_set(tmp_path)
    assert "--eval_split=dev: " in refusal(tmp_path, "tfds:small", "dev")
    assert "has no such split, only train, test" in refusal(tmp_path, "tfds:small", "dev")
    write_set(tmp_path, "empty/1.0.0", counts={"unsupervised": [3]})
    assert "no examples in train, validation or test" in refusal(tmp_path, "tfds:empty")


def test_the_folder_may_be_that_of_a_version_of_the_set_or_the_data_dir(tmp_path):
    folder = write_set(tmp_path)
    write_set(tmp_path, "other/1.0.0")
    for named in (tmp_path, tmp_path / "small", folder):
        assert described(named)["folder"] == folder
    assert "contains small, not other" in refusal(folder, "tfds:other")
    assert "contains no third" in refusal(tmp_path, "tfds:third") and "only other, small" in refusal(
        tmp_path, "tfds:third"
    )
    assert "contains no other" in refusal(tmp_path / "small", "tfds:other")


def test_the_name_may_have_a_configuration_and_a_version(tmp_path):
    one, two = (write_set(tmp_path, f"small/{name}/1.0.0") for name in ("blurred", "plain"))
    assert described(tmp_path, "tfds:small/plain")["folder"] == two
    assert described(tmp_path, "tfds:small/plain/1.0.0")["folder"] == two
    assert described(tmp_path / "small" / "blurred")["folder"] == one
    message = refusal(tmp_path)
    assert "2 configurations or versions of small (small/blurred/1.0.0, small/plain/1.0.0)" in message


def test_several_versions_are_refused_and_the_newest_is_the_example(tmp_path):
    for version in ("10.0.0", "9.1.0", "9.0.0"):
        write_set(tmp_path, f"small/{version}")
    message = refusal(tmp_path)
    assert "contains 3 versions of small (small/9.0.0, small/9.1.0, small/10.0.0)" in message
    assert message.endswith("small/10.0.0")
    assert described(message.rpartition("--data_dir=")[2])["folder"].endswith("10.0.0")


def test_an_interrupted_preparation_does_not_count(tmp_path):
    folder = write_set(tmp_path)
    write_set(tmp_path, "small/1.0.0.incompleteAB12CD")
    assert described(tmp_path)["folder"] == folder
    write_set(tmp_path, "other/1.0.0.incompleteAB12CD")
    assert "contains no other prepared by TFDS" in refusal(tmp_path, "tfds:other")
    assert tfds.sets_in(str(tmp_path)) == ["small"]


@pytest.mark.parametrize(
    "text, part",
    [
        ("", "not readable"),
        ('{"name": "small", "spl', "not readable"),
        ("[]", "not a JSON object"),
        ('{"name": "small"}', "'splits' is missing"),
        ('{"name": "small", "splits": [{"name": "train"}]}', "'shardLengths' is missing"),
        ('{"name": "small", "splits": [{"name": "train", "shardLengths": ["x"]}]}', "damaged"),
        ('{"name": "small", "splits": 7}', "damaged"),
        ('{"name": "small", "splits": [], "supervisedKeys": [1]}', "damaged"),
        ('{"splits": []}', "contains None, not small"),
        (b"\xff\xfe", "not readable"),
    ],
)
def test_a_damaged_description_is_named(tmp_path, text, part):
    folder = write_set(tmp_path)
    with open(f"{folder}/dataset_info.json", "wb") as file:
        file.write(text if isinstance(text, bytes) else text.encode())
    message = refusal(tmp_path)
    assert part in message and str(tmp_path) in message


@pytest.mark.parametrize("text", ["", "{}", '{"featuresDict": []}', '{"featuresDict": {"features": {"image": 7}}}'])
def test_damaged_features_are_named(tmp_path, text):
    folder = write_set(tmp_path)
    with open(f"{folder}/features.json", "w") as file:
        file.write(text)
    assert folder in refusal(tmp_path)


def test_missing_and_exchanged_shards_are_named(tmp_path):
    folder = write_set(tmp_path)
    first, second = (f"{folder}/small-train.tfrecord-0000{number}-of-00002" for number in range(2))
    os.rename(second, f"{folder}/kept")
    assert f"{second}: shard missing, 1 of 2" in refusal(tmp_path)
    os.rename(first, second)
    os.rename(f"{folder}/kept", first)
    assert "2 records in" in refusal(tmp_path) and "says 3" in refusal(tmp_path)


def test_the_template_of_the_names_is_obeyed(tmp_path):
    folder = write_set(tmp_path, counts={"train": [3]})
    name = "data-00000-of-00001.tfrecord"
    os.rename(f"{folder}/small-train.tfrecord-00000-of-00001", f"{folder}/{name}")
    for template in ("{SPLIT}/data-{SHARD_X_OF_Y}.{FILEFORMAT}", "data-{SHARD_INDEX}-of-{NUM_SHARDS}.tfrecord"):
        splits = [{"name": "train", "shardLengths": ["3"], "filepathTemplate": template}]
        write_json(f"{folder}/dataset_info.json", {"name": "small", "splits": splits})
        assert described(tmp_path)["splits"]["train"] == [{"name": name, "examples": 3}]


@pytest.mark.parametrize("file_format", ["riegeli", "parquet"])
def test_other_file_formats_are_refused(tmp_path, file_format):
    write_set(tmp_path, fileFormat=file_format)
    assert f"has the format {file_format}; prepare it with file_format=tfrecord" in refusal(tmp_path)


def test_sets_in_a_folder_are_listed(tmp_path):
    write_set(tmp_path)
    assert tfds.sets_in(str(tmp_path)) == ["small"] and tfds.sets_in(str(tmp_path / "small")) == []
    assert "--dataset=tfds:small reads the set small of TFDS" in refusal(tmp_path, "imagenet")


@pytest.mark.training  # verify loads TensorFlow
def test_verify_names_the_splits_that_it_leaves_out(tmp_path, capfd):
    from resnet_cpu.data import verification

    write_set(tmp_path, counts={"train": [3], "validation": [2], "test": [1]})
    with pytest.raises(DataError, match="5 problems"):  # each record is one byte
        verification.verify(str(tmp_path), "tfds:small", 1)
    assert "not verified, because they are not used by default: test" in capfd.readouterr().err
