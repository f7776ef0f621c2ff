"""Data folders: sets made by `prepare`, ImageNet as written by TF-slim, and sets prepared by TFDS.

All of them are reduced to one description: the shards of each split, the keys of image and label, and the label base.
Nothing is guessed: the layout determines the label base, the files the number of classes, and both are checked on the
records.
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
    """An open data set: its splits and how to read their examples."""

    train: Split
    validation: Split
    num_classes: int
    label_base: int  # stored label of the first class
    image_key: str
    label_key: str
    jpeg: bool  # whether all images are JPEG; else any format that TensorFlow decodes
    pixel_mean: Optional[Tuple[float, ...]]  # RGB, of pixels 0..255; None if not measured
    pixel_std: Optional[Tuple[float, ...]]


def describe(folder: str, dataset: str) -> Dict[str, Any]:
    """Return the description of `dataset` in `folder`; raise DataError that names the files looked for."""
    if not os.path.isdir(folder):
        raise DataError(f"--data_dir={folder}: the folder does not exist; {_how_to_get(dataset)}")
    if dataset.startswith(TFDS_PREFIX):
        return _describe_tfds(folder, dataset[len(TFDS_PREFIX) :])
    if dataset == "imagenet" and not os.path.exists(os.path.join(folder, shards.MANIFEST)):
        if any(_SLIM_SHARD.fullmatch(name) for name in os.listdir(folder)):
            return _describe_slim(folder)
        if _tfds_folders(folder, _IMAGENET_IN_TFDS):
            return _describe_tfds(folder, _IMAGENET_IN_TFDS)
        raise DataError(
            f"--data_dir={folder}: does not contain ImageNet: neither {shards.MANIFEST}, nor train-00000-of-01024 "
            f"(TF-slim), nor {_IMAGENET_IN_TFDS}/VERSION/dataset_info.json (TFDS)"
        )
    manifest = shards.read_manifest(folder)
    stored = manifest.get("dataset")
    if stored != dataset:
        raise DataError(f"--data_dir={folder}: contains {stored}, not --dataset={dataset}; correct one of them")
    return manifest


def _how_to_get(dataset: str) -> str:
    if dataset == "imagenet" or dataset.startswith(TFDS_PREFIX):
        return "name the folder that TF-slim or TFDS has written"
    return f"create it with python -m resnet_cpu.prepare {dataset} --data_dir=..."


def make_indexes(description: Dict[str, Any], folder: str) -> None:
    """Write the missing indexes of shards, if the folder can be written, and report progress."""
    folder = description.get("folder", folder)
    paths = [os.path.join(folder, row["name"]) for rows in description["splits"].values() for row in rows]
    missing = [path for path in paths if os.path.exists(path) and not os.path.exists(shards.index_path(path))]
    for number, path in enumerate(missing):
        if number % 64 == 0:
            print(f"data: first use of {folder}: indexing shard {number + 1} of {len(missing)}", file=sys.stderr)
        try:
            shards.write_index(path)
        except OSError as error:
            print(
                f"data: {folder}: cannot write indexes ({error.strerror}); every start will scan the shards again",
                file=sys.stderr,
            )
            return


def open_data(folder: str, dataset: str) -> ShardedData:
    """Open every split of `dataset` in `folder`; raise DataError if anything is missing or changed."""
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
        raise DataError(
            f"{os.path.join(folder, shards.MANIFEST)}: has no {error}; prepare the data set again"
        ) from None


def verify(folder: str, dataset: str) -> Dict[str, int]:
    """Read every record of every split with its checksum; return the number of examples of each split."""
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
    """Describe what TF-slim's build_imagenet_data writes: labels 1..1000, with 0 reserved for an unused background."""
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
            raise DataError(f"--data_dir={folder}: shards of {split} must form one complete set, found {counts}")
        (total,) = totals[split]
        missing = [shards.shard_name(split, shard, total) for shard in range(total) if shard not in names]
        if missing:
            raise DataError(f"--data_dir={folder}: {len(missing)} shards missing, the first is {missing[0]}; copy them")
        splits[split] = [{"name": names[shard]} for shard in range(total)]
    return {"dataset": "imagenet", "num_classes": 1000, "label_base": 1, "splits": splits}


def _tfds_folders(folder: str, name: str) -> List[str]:
    """Return the folders of all prepared versions of `name` in a TFDS data_dir; `folder` itself if it is one."""
    if os.path.exists(os.path.join(folder, "dataset_info.json")):
        return [folder]
    parent = os.path.join(glob.escape(folder), *map(glob.escape, name.split("/")))
    infos = glob.glob(os.path.join(parent, "*", "dataset_info.json"))
    infos += glob.glob(os.path.join(parent, "*", "*", "dataset_info.json"))
    return sorted(os.path.dirname(info) for info in infos)


def _describe_tfds(folder: str, name: str) -> Dict[str, Any]:
    """Describe a set prepared by TFDS: labels from 0, features and shard lengths from its description files."""
    folders = _tfds_folders(folder, name)
    if not folders:
        raise DataError(
            f"--data_dir={folder}: contains no {name} prepared by TFDS ({name}/VERSION/dataset_info.json); prepare it "
            "with tfds build on a machine with network access"
        )
    if len(folders) > 1:
        raise DataError(
            f"--data_dir={folder}: contains {len(folders)} versions of {name}; name one of them, as {folders[-1]}"
        )
    (chosen,) = folders
    info, features = (_read_description(os.path.join(chosen, file)) for file in ("dataset_info.json", "features.json"))
    if info.get("name") != name.split("/")[0]:
        raise DataError(f"--data_dir={folder}: contains {info.get('name')}, not {name}; correct one of them")
    if info.get("fileFormat", "tfrecord") != "tfrecord":
        raise DataError(f"{chosen}: has the format {info['fileFormat']}; prepare it with file_format=tfrecord")
    try:
        image_key, image = _only_feature(chosen, features["featuresDict"]["features"], "image")
        label_key, label = _only_feature(chosen, features["featuresDict"]["features"], "classLabel")
        by_name = {split["name"]: _tfds_rows(info, split) for split in info["splits"]}
        classes = int(label["classLabel"]["numClasses"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{chosen}: {error} is missing in the description files; prepare the data set with TFDS again"
        ) from None
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
        raise DataError(
            f"{folder}: has {len(found)} features of kind {kind}; an image-classification set has exactly one"
        )
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
