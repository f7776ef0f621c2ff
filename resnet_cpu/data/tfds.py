"""Sets prepared by TensorFlow Datasets (TFDS): their folder, features and shards, from the description files alone."""

import glob
import itertools
import json
import os
import re
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

from resnet_cpu.data import array_records
from resnet_cpu.errors import DataError

PREFIX = "tfds:"  # of --dataset
IMAGENET = "imagenet2012"
_INFO, _FEATURES = "dataset_info.json", "features.json"
_MOST_SETS = 100  # folders that a message is based on
_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"


class _Features(NamedTuple):
    """The features of a set that can be images and labels, by key."""

    images: Dict[str, str]  # encoding of the images, empty if it is not recorded
    labels: Dict[str, int]  # number of classes
    others: List[str]


def folders_of(folder: str, name: str) -> List[str]:
    """Return the folders of all prepared versions of `name`, the newest last.

    `folder` may be a TFDS data_dir, the folder of the set or of its configuration, or that of a version.
    """
    if os.path.exists(os.path.join(folder, _INFO)):
        return [folder]
    below = ("", "*", os.path.join("*", "*"))  # of a version, of all versions, of all configurations
    found = [one for inside in below for one in _described(os.path.join(folder, *name.split("/")), inside)]
    if not found:
        # Two levels only where a set is expected: a folder of images may have a million files there.
        depth = 3 if os.path.basename(os.path.abspath(folder)) == name.split("/")[0] else 2
        found = [one for inside in below[1:depth] for one in _described(folder, inside)]
        found = [one for one in found if _name_in(one) == name.split("/")[0]]
    return sorted(found, key=_version)


def _described(folder: str, inside: str) -> List[str]:
    """Return the folders that match `inside` and hold a description, without preparations that were interrupted."""
    infos = glob.glob(os.path.join(glob.escape(folder), inside, _INFO))
    return [os.path.dirname(info) for info in infos if ".incomplete" not in info]


def _version(folder: str) -> Tuple[str, List[int]]:
    parent, name = os.path.split(folder)
    return parent, [int(number) for number in re.findall(r"\d+", name)]


def _name_in(folder: str) -> Optional[str]:
    try:
        return _read(os.path.join(folder, _INFO)).get("name")
    except DataError:
        return None


def sets_in(folder: str) -> List[str]:
    """Return the names of the sets among the first folders of a TFDS data_dir."""
    with os.scandir(folder) as entries:
        inner = itertools.islice((entry.name for entry in entries if entry.is_dir()), _MOST_SETS)
        return sorted(name for name in inner if _described(os.path.join(folder, name), "*"))


def describe(folder: str, name: str) -> Dict[str, Any]:
    """Describe a set prepared by TFDS: labels from 0, features and shard lengths from its description files.

    Raises DataError that names the file and the remedy.
    """
    chosen = _choose(folder, name)
    info = _read(os.path.join(chosen, _INFO))
    if info.get("name") != name.split("/")[0]:
        raise DataError(f"--data_dir={folder}: contains {info.get('name')}, not {name}; correct one of them")
    file_format = info.get("fileFormat", "tfrecord")
    if file_format == array_records.FORMAT and not array_records.available():
        raise DataError(
            f"{chosen}: has the format {file_format}; prepare it with file_format=tfrecord, or install the package "
            "array_record"
        )
    if file_format not in ("tfrecord", array_records.FORMAT):
        raise DataError(f"{chosen}: has the format {file_format}; prepare it with file_format=tfrecord")
    try:
        features = _features(chosen)
        image_key, label_key = _pair(chosen, features, _supervised_keys(info))
        splits = {split["name"]: _rows(info["name"], split, file_format) for split in info["splits"]}
    except KeyError as error:
        raise DataError(
            f"{chosen}: {error} is missing in the description files; prepare the data set with TFDS again"
        ) from None
    except (TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{chosen}: the description files are damaged ({error}); prepare the data set with TFDS again"
        ) from None
    classes = _class_names(chosen, label_key)
    return {
        "dataset": f"{PREFIX}{name}",
        "folder": chosen,
        "file_format": file_format,
        "num_classes": features.labels[label_key],
        "classes": classes if len(classes) == features.labels[label_key] else None,
        "label_base": 0,
        "image_key": image_key,
        "label_key": label_key,
        "splits": {split: rows for split, rows in splits.items() if any(row["examples"] for row in rows)},
    }


def _choose(folder: str, name: str) -> str:
    found = folders_of(folder, name)
    if not found:
        there = sets_in(folder)
        raise DataError(
            f"--data_dir={folder}: contains no {name} prepared by TFDS ({name}/VERSION/{_INFO})"
            + (f", only {', '.join(there)}; correct one of them, or" if there else ";")
            + " prepare it with tfds build on a machine with network access"
        )
    if len(found) > 1:
        kind = "versions" if len({os.path.dirname(one) for one in found}) == 1 else "configurations or versions"
        shown = ", ".join(os.path.relpath(one, folder) for one in found)
        raise DataError(
            f"--data_dir={folder}: contains {len(found)} {kind} of {name} ({shown}); name one of them, as in "
            f"--data_dir={found[-1]}"
        )
    return found[0]


def _read(path: str) -> Dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
        if not isinstance(found, dict):
            raise ValueError("not a JSON object")
        return found
    except FileNotFoundError:
        raise DataError(f"{path}: the file does not exist; copy or prepare the data set again") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable ({error}); prepare the data set with TFDS again") from None


def _features(folder: str) -> _Features:
    """Return the features from features.json, or from the files with which early versions of TFDS described a set."""
    path = os.path.join(folder, _FEATURES)
    if os.path.exists(path):
        every = _read(path)["featuresDict"]["features"]
        images = {key: row["image"].get("encodingFormat", "") for key, row in every.items() if "image" in row}
        labels = {key: int(row["classLabel"]["numClasses"]) for key, row in every.items() if "classLabel" in row}
        return _Features(images, labels, [key for key in every if key not in images and key not in labels])
    images, labels = {}, {}
    for file in sorted(os.listdir(folder)):
        if file.endswith(".image.json"):
            images[file[: -len(".image.json")]] = _read(os.path.join(folder, file)).get("encoding_format") or ""
        elif file.endswith(".labels.txt"):
            key = file[: -len(".labels.txt")]
            labels[key] = len(_class_names(folder, key))
    if not images or not labels:
        raise DataError(
            f"{path}: the file does not exist, nor do IMAGE.image.json and LABEL.labels.txt, with which early versions "
            "of TFDS described a set; prepare the data set with TFDS again"
        )
    return _Features(images, labels, [])


def _class_names(folder: str, label_key: str) -> List[str]:
    """Return the names of the classes in the order of their labels, [] if they are not recorded."""
    try:
        with open(os.path.join(folder, f"{label_key}.labels.txt"), encoding="utf-8") as file:
            return [line.strip() for line in file.read().split("\n") if line.strip()]
    except (OSError, ValueError):
        return []


def _supervised_keys(info: Dict[str, Any]) -> List[Optional[str]]:
    """Return the keys of image and label that the set names for classification, [] if it names none.

    Early versions of TFDS wrote {"input": KEY, "output": KEY}, later ones a tuple. A key is None if it stands for
    several features.
    """
    named = info.get("supervisedKeys") or {}
    if "input" in named and "output" in named:
        return [named["input"], named["output"]]
    return [item.get("featureKey") for item in named.get("tuple", {}).get("items", [])][:2]


def _pair(folder: str, features: _Features, named: List[Optional[str]]) -> Tuple[str, str]:
    """Return the keys of image and label: those that the set names, else the only ones of their kind."""
    if len(named) == 2 and named[0] in features.images and named[1] in features.labels:
        return str(named[0]), str(named[1])
    if len(features.images) == len(features.labels) == 1:
        return next(iter(features.images)), next(iter(features.labels))
    kind, found = ("image", list(features.images))
    if len(found) == 1:
        kind, found = "classLabel", list(features.labels)
    if not found:
        raise DataError(
            f"{folder}: has no feature of kind {kind}, only {', '.join(features.others) or 'none'}; an "
            "image-classification set has an image and a class label"
        )
    shown = ", ".join(str(key) for key in named) or "nothing"
    example = json.dumps({"tuple": {"items": [{"featureKey": "IMAGE"}, {"featureKey": "LABEL"}]}})
    raise DataError(
        f"{folder}: has {len(found)} features of kind {kind} ({', '.join(found)}), and supervisedKeys in {_INFO} names "
        f'{shown}; choose the pair there: "supervisedKeys": {example}'
    )


def _rows(dataset: str, split: Dict[str, Any], file_format: str) -> List[Dict[str, Any]]:
    """Return the name and the number of examples of each shard of a split."""
    lengths = [int(length) for length in split["shardLengths"]]
    count, rows = f"{len(lengths):05d}", []
    for shard, length in enumerate(lengths):
        number = f"{shard:05d}"
        parts = {
            "DATASET": dataset,
            "SPLIT": split["name"],
            "FILEFORMAT": file_format,
            "SHARD_INDEX": number,
            "NUM_SHARDS": count,
            "SHARD_X_OF_Y": f"{number}-of-{count}",
        }
        name = split.get("filepathTemplate") or _TEMPLATE
        for key, value in parts.items():
            name = name.replace("{" + key + "}", value)
        rows.append({"name": os.path.basename(name), "examples": length})
    return rows
