"""What lies in a data folder: a set of our own making, ImageNet as TF-slim writes it, or a set that TFDS prepared.

Each comes down to one description: shards of each split, where an example keeps image and label, how labels count.
Nothing is guessed: a layout fixes the label base, its files fix the class count, and both are checked on the records.
"""

import dataclasses
import glob
import json
import os
import re
import sys
from typing import Any, Dict, List, Optional, Tuple

import numpy as np

from resnet_cpu.data import shards
from resnet_cpu.data.shards import Split
from resnet_cpu.errors import DataError

TFDS_PREFIX = "tfds:"
_IMAGENET_IN_TFDS = "imagenet2012"
_SLIM_SHARD = re.compile(r"(train|validation)-(\d{5})-of-(\d{5})")


@dataclasses.dataclass(frozen=True)
class ShardedData:
    """A data set, opened: its splits and how its examples are to be read."""

    train: Split
    validation: Split
    num_classes: int
    label_base: int  # label of the first class as stored
    image_key: str
    label_key: str
    jpeg: bool  # whether images are JPEG for certain; else any format that TensorFlow decodes
    pixel_mean: Optional[Tuple[float, ...]]  # RGB, of pixels 0..255; None where nobody has measured it
    pixel_std: Optional[Tuple[float, ...]]


def describe(folder: str, dataset: str) -> Dict[str, Any]:
    """Return the description of `dataset` in `folder`; raise DataError that tells what was looked for."""
    if not os.path.isdir(folder):
        raise DataError(f"--data_dir={folder}: no such folder; {_how_to_get(dataset)}")
    if dataset.startswith(TFDS_PREFIX):
        return _describe_tfds(folder, dataset[len(TFDS_PREFIX) :])
    if dataset == "imagenet" and not os.path.exists(os.path.join(folder, shards.MANIFEST)):
        if any(_SLIM_SHARD.fullmatch(name) for name in os.listdir(folder)):
            return _describe_slim(folder)
        if _tfds_folders(folder, _IMAGENET_IN_TFDS):
            return _describe_tfds(folder, _IMAGENET_IN_TFDS)
        raise DataError(
            f"--data_dir={folder}: no ImageNet in it: neither {shards.MANIFEST}, nor train-00000-of-01024 (TF-slim), "
            f"nor {_IMAGENET_IN_TFDS}/VERSION/dataset_info.json (TFDS)"
        )
    manifest = shards.read_manifest(folder)
    stored = manifest.get("dataset")
    if stored != dataset:
        raise DataError(f"--data_dir={folder}: holds {stored}, not --dataset={dataset}; correct one of them")
    return manifest


def _how_to_get(dataset: str) -> str:
    if dataset == "imagenet" or dataset.startswith(TFDS_PREFIX):
        return "name the folder that TF-slim or TFDS wrote"
    return f"make it with python -m resnet_cpu.prepare {dataset} --data_dir=..."


def make_indexes(description: Dict[str, Any], folder: str) -> None:
    """Put an index beside every shard that has none, where the folder can be written; tell how far it has come."""
    folder = description.get("folder", folder)
    paths = [os.path.join(folder, row["name"]) for rows in description["splits"].values() for row in rows]
    lacking = [path for path in paths if os.path.exists(path) and not os.path.exists(shards.index_path(path))]
    for number, path in enumerate(lacking):
        if number % 64 == 0:
            print(f"data: first use of {folder}: indexing shard {number + 1} of {len(lacking)}", file=sys.stderr)
        try:
            shards.write_index(path)
        except OSError as error:
            print(f"data: {folder}: indexes cannot be kept ({error.strerror}); each start scans anew", file=sys.stderr)
            return


def open_data(folder: str, dataset: str) -> ShardedData:
    """Open every split of `dataset` in `folder`; raise DataError where anything is missing or changed."""
    description = describe(folder, dataset)
    folder = description.get("folder", folder)
    try:
        return ShardedData(
            shards.open_split(folder, description, "train"),
            shards.open_split(folder, description, "validation"),
            int(description["num_classes"]),
            int(description["label_base"]),
            description.get("image_key", "image/encoded"),
            description.get("label_key", "image/class/label"),
            bool(description.get("jpeg", True)),
            _optional_tuple(description.get("pixel_mean")),
            _optional_tuple(description.get("pixel_std")),
        )
    except KeyError as error:
        raise DataError(f"{os.path.join(folder, shards.MANIFEST)}: lacks {error}; prepare the data set again") from None


def verify(folder: str, dataset: str) -> Dict[str, int]:
    """Read every record of every split with its checksum; return the examples of each split."""
    own = os.path.exists(os.path.join(folder, shards.MANIFEST))
    description = shards.read_manifest(folder) if own else describe(folder, dataset)
    make_indexes(description, folder)
    folder = description.get("folder", folder)
    counts = {}
    for name in description["splits"]:
        split = shards.open_split(folder, description, name)
        for first in range(0, split.examples, 256):
            split.read(np.arange(first, min(first + 256, split.examples)))
        counts[name] = split.examples
        split.close()
    return counts


def _optional_tuple(values: Optional[List[float]]) -> Optional[Tuple[float, ...]]:
    return None if values is None else tuple(values)


def _describe_slim(folder: str) -> Dict[str, Any]:
    """TF-slim's build_imagenet_data: labels 1..1000, class 0 kept for a background that has no image."""
    found: Dict[str, Dict[int, str]] = {"train": {}, "validation": {}}
    totals: Dict[str, set] = {"train": set(), "validation": set()}
    for name in os.listdir(folder):
        match = _SLIM_SHARD.fullmatch(name)
        if match:
            found[match.group(1)][int(match.group(2))] = name
            totals[match.group(1)].add(int(match.group(3)))
    splits = {}
    for split, names in found.items():
        if len(totals[split]) != 1:
            counts = " and ".join(f"of-{total:05d}" for total in sorted(totals[split])) or "none"
            raise DataError(f"--data_dir={folder}: shards of {split} must be one complete set, found {counts}")
        (total,) = totals[split]
        missing = [shards.shard_name(split, shard, total) for shard in range(total) if shard not in names]
        if missing:
            raise DataError(f"--data_dir={folder}: {len(missing)} shards missing, the first is {missing[0]}; copy them")
        splits[split] = [{"name": names[shard]} for shard in range(total)]
    return {"dataset": "imagenet", "num_classes": 1000, "label_base": 1, "splits": splits}


def _tfds_folders(folder: str, name: str) -> List[str]:
    """Return the folders of prepared versions of `name` in a TFDS data_dir, or the folder itself if it is one."""
    if os.path.exists(os.path.join(folder, "dataset_info.json")):
        return [folder]
    parent = os.path.join(glob.escape(folder), *map(glob.escape, name.split("/")))
    infos = glob.glob(os.path.join(parent, "*", "dataset_info.json"))
    infos += glob.glob(os.path.join(parent, "*", "*", "dataset_info.json"))
    return sorted(os.path.dirname(info) for info in infos)


def _describe_tfds(folder: str, name: str) -> Dict[str, Any]:
    """A set as TFDS prepares it: labels from 0, features and shard lengths as its own description files tell."""
    folders = _tfds_folders(folder, name)
    if not folders:
        raise DataError(
            f"--data_dir={folder}: no {name} prepared by TFDS in it ({name}/VERSION/dataset_info.json); prepare it "
            "with tfds build where there is a network"
        )
    if len(folders) > 1:
        raise DataError(f"--data_dir={folder}: {name} is there {len(folders)} times; name one, as {folders[-1]}")
    (chosen,) = folders
    info, features = (_read_description(os.path.join(chosen, file)) for file in ("dataset_info.json", "features.json"))
    if info.get("name") != name.split("/")[0]:
        raise DataError(f"--data_dir={folder}: holds {info.get('name')}, not {name}; correct one of them")
    if info.get("fileFormat", "tfrecord") != "tfrecord":
        raise DataError(f"{chosen}: is in format {info['fileFormat']}; prepare it with file_format=tfrecord")
    try:
        image_key, image = _only_feature(chosen, features["featuresDict"]["features"], "image")
        label_key, label = _only_feature(chosen, features["featuresDict"]["features"], "classLabel")
        by_name = {split["name"]: _tfds_rows(info, split) for split in info["splits"]}
        classes = int(label["classLabel"]["numClasses"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{chosen}: description files lack {error}; prepare the data set with TFDS again") from None
    evaluation = "validation" if "validation" in by_name else "test"
    return {
        "dataset": f"{TFDS_PREFIX}{name}",
        "folder": chosen,
        "num_classes": classes,
        "label_base": 0,
        "image_key": image_key,
        "label_key": label_key,
        "jpeg": image["image"].get("encodingFormat") == "jpeg",
        "splits": {"train": by_name.get("train", []), "validation": by_name.get(evaluation, [])},
    }


def _read_description(path: str) -> Dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable ({error}); prepare the data set with TFDS again") from None


def _only_feature(folder: str, features: Dict[str, Any], kind: str) -> Tuple[str, Dict[str, Any]]:
    found = [(key, feature) for key, feature in features.items() if kind in feature]
    if len(found) != 1:
        raise DataError(f"{folder}: has {len(found)} features of kind {kind}; an image-classification set has one")
    return found[0]


def _tfds_rows(info: Dict[str, Any], split: Dict[str, Any]) -> List[Dict[str, Any]]:
    lengths = [int(length) for length in split["shardLengths"]]
    template = split.get("filepathTemplate", "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}")
    rows = []
    for shard, length in enumerate(lengths):
        name = template.replace("{DATASET}", info["name"]).replace("{SPLIT}", split["name"])
        name = name.replace("{FILEFORMAT}", info.get("fileFormat", "tfrecord"))
        name = name.replace("{SHARD_X_OF_Y}", f"{shard:05d}-of-{len(lengths):05d}")
        rows.append({"name": os.path.basename(name), "examples": length})
    return rows
