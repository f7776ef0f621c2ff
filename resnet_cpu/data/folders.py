"""Data folders: sets made by `prepare`, ImageNet as written by TF-slim, and sets prepared by TFDS.

All of them are reduced to one description: the shards of each split, the keys of image and label, and the label base.
Nothing is guessed: the layout determines the label base, the files the number of classes, and both are checked on the
records.
"""

import dataclasses
import hashlib
import itertools
import os
import re
import sys
from typing import Any, Dict, List, Mapping, Optional, Tuple

import numpy as np

from resnet_cpu.data import array_records, shards, tfds
from resnet_cpu.data.datasets import NO_EVALUATION, facts_of
from resnet_cpu.data.shards import Split
from resnet_cpu.errors import DataError

AUTO = "auto"  # value of --eval_split: the first of `_EVALUATION` that exists
_EVALUATION = ("validation", "test")  # splits that --eval_split=auto looks for
_SPLITS = {"train": "train", "validation": "validation", "val": "validation"}  # as in names of shards and sub-folders
_SLIM_SHARD = re.compile(
    rf"(?P<split>{'|'.join(_SPLITS)})(\.tfrecords?)?-(?P<shard>\d+)-of-(?P<total>\d+)(\.tfrecords?)?"
    r"(?P<compressed>\.(gz|zlib|zst|bz2|xz))?",
    re.IGNORECASE,
)
_LISTED = 10_000  # entries of a folder that a message is based on


@dataclasses.dataclass(frozen=True)
class ShardedData:
    """An open data set: its splits and how to read their examples. A split that it lacks has no examples."""

    train: Split
    validation: Split  # the one that is evaluated on, whatever its name
    num_classes: int
    label_base: int  # stored label of the first class
    image_key: str
    label_key: str
    pixel_mean: Optional[Tuple[float, ...]]  # RGB, of pixels 0..255; None if not measured
    pixel_std: Optional[Tuple[float, ...]]
    classes: Optional[Tuple[str, ...]] = None  # names in the order of the labels; None if not recorded
    others: Tuple[str, ...] = ()  # names of the splits that are not used

    @property
    def splits(self) -> List[Split]:
        """Return the splits that have examples."""
        return [split for split in (self.train, self.validation) if split.examples]


def describe(folder: str, dataset: str, eval_split: Optional[str] = None) -> Dict[str, Any]:
    """Return the description of `dataset` in `folder`; raise DataError that names the files looked for.

    `splits` holds the rows of `train` and of the split to evaluate on, those of them that exist; `evaluation` is the
    name of the latter, or None. Without `eval_split`, the value of the flag, a set may lack any of them.
    """
    if not os.path.isdir(folder):
        problem = "a file, not a folder" if os.path.exists(folder) else "the folder does not exist"
        raise DataError(f"--data_dir={folder}: {problem}; {_how_to_get(dataset)}")
    found = _describe(folder, dataset)
    splits = found["splits"]
    if eval_split in (None, AUTO):
        evaluation = next((name for name in _EVALUATION if name in splits), None)
        if evaluation is None and eval_split == AUTO and "expected" in found:
            raise DataError(_without_validation(folder, splits))
    elif eval_split == NO_EVALUATION:
        evaluation = None
    elif eval_split in splits:
        evaluation = eval_split
    else:
        raise DataError(
            f"--eval_split={eval_split}: {folder} has no such split, only {', '.join(splits) or 'none'}; name one of "
            f"them, or {NO_EVALUATION}"
        )
    used = {name: rows for name, rows in splits.items() if name in ("train", evaluation)}
    if not used:
        raise DataError(f"{folder}: no examples in train, validation or test; copy or prepare the data set again")
    return {**found, "splits": used, "evaluation": evaluation, "others": [name for name in splits if name not in used]}


def _describe(folder: str, dataset: str) -> Dict[str, Any]:
    if dataset.startswith(tfds.PREFIX):
        return tfds.describe(folder, dataset[len(tfds.PREFIX) :])
    if dataset == "imagenet" and not os.path.exists(os.path.join(folder, shards.MANIFEST)):
        found = _slim_shards(folder)
        if found:
            return _describe_slim(folder, found)
        if tfds.folders_of(folder, tfds.IMAGENET):
            return tfds.describe(folder, tfds.IMAGENET)
        raise DataError(
            f"--data_dir={folder}: does not contain ImageNet: neither {shards.MANIFEST}, nor train-00000-of-01024 "
            f"(TF-slim; also in train/, and with the suffix .tfrecord), nor {tfds.IMAGENET}/VERSION/dataset_info.json "
            f"(TFDS); it contains {_contents(folder)}"
        )
    manifest = shards.read_manifest(folder)
    stored = manifest.get("dataset")
    if stored != dataset:
        raise DataError(f"--data_dir={folder}: contains {stored}, not --dataset={dataset}; correct one of them")
    return manifest


def _how_to_get(dataset: str) -> str:
    if dataset.startswith(tfds.PREFIX):
        return "name the folder that TFDS has written"
    if dataset == "imagenet":
        return "name the folder of its shards; python -m resnet_cpu.prepare imagenet makes them from the raw archives"
    return f"create it with python -m resnet_cpu.prepare {dataset} --data_dir=..."


def _contents(folder: str) -> str:
    """Return what a folder contains, in a few words for a message."""
    with os.scandir(folder) as listing:
        entries = sorted(itertools.islice(listing, _LISTED), key=lambda entry: entry.name)
    inner = [entry.name for entry in entries if entry.is_dir()]
    files = [entry.name for entry in entries if entry.name not in inner]
    parts = []
    for kind, names in (("folder", inner), ("file", files)):
        if names:
            more = ", ..." if len(names) > 3 else ""
            parts.append(f"{len(names)} {kind}{'s' * (len(names) > 1)} ({', '.join(names[:3])}{more})")
    hints = [
        f"{os.path.join(folder, name)} is a prepared data set"
        for name in inner
        if os.path.exists(os.path.join(folder, name, shards.MANIFEST))
    ]
    hints += [f"--dataset={tfds.PREFIX}{name} reads the set {name} of TFDS" for name in tfds.sets_in(folder)]
    return "; ".join([" and ".join(parts) or "nothing", *hints[:3]])


def make_indexes(description: Dict[str, Any], folder: str) -> None:
    """Write the missing indexes of shards, if the folder can be written, and report progress."""
    if description.get("file_format") == array_records.FORMAT:
        return  # such files have an index inside
    folder = description.get("folder", folder)
    paths = [os.path.join(folder, row["name"]) for rows in description["splits"].values() for row in rows]
    # Of an empty file there is nothing to index; `open_data` refuses it.
    there = [path for path in paths if os.path.isfile(path) and os.path.getsize(path)]
    missing = [path for path in there if not os.path.exists(shards.index_path(path))]
    closed = [path for path in map(shards.index_path, there) if os.path.exists(path) and not os.access(path, os.R_OK)]
    if closed:
        print(
            f"data: {closed[0]}: no permission to read this index, {len(closed)} in all; every start will scan their "
            "shards again (ask their owner for chmod a+r)",
            file=sys.stderr,
        )
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


def open_data(folder: str, dataset: str, eval_split: Optional[str] = None) -> ShardedData:
    """Open the splits of `dataset` in `folder`, see `describe`; raise DataError if anything is missing or changed."""
    description = describe(folder, dataset, eval_split)
    folder = description.get("folder", folder)
    path = os.path.join(folder, shards.MANIFEST)
    try:
        num_classes, label_base = int(description["num_classes"]), int(description["label_base"])
        mean, deviation = (_optional_tuple(description.get(key)) for key in ("pixel_mean", "pixel_std"))
        classes = None if description.get("classes") is None else tuple(map(str, description["classes"]))
    except KeyError as error:
        raise DataError(f"{path}: has no {error}; prepare the data set again") from None
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: damaged ({error}); prepare the data set again") from None
    if classes is not None and len(classes) != num_classes:
        raise DataError(f"{path}: names {len(classes)} classes of {num_classes}; prepare the data set again")
    train, validation = (
        shards.open_split(folder, description, name) if name in description["splits"] else shards.NO_SPLIT
        for name in ("train", description["evaluation"])
    )
    return ShardedData(
        train,
        validation,
        num_classes,
        label_base,
        description.get("image_key", "image/encoded"),
        description.get("label_key", "image/class/label"),
        mean,
        deviation,
        classes,
        tuple(description["others"]),
    )


def count_warnings(description: Mapping[str, Any], data: ShardedData) -> List[str]:
    """Return a warning for each split whose number of examples is known to be another one.

    TF-slim writes no counts: a shard that ends at the border of a record is only noticed by the total.
    """
    found = []
    names = {"train": data.train, "validation": data.validation}
    for name, expected in description.get("expected", {}).items():
        split = names[name]
        if name in description["splits"] and split.examples != expected:
            found.append(
                f"{os.path.dirname(split.paths[0])}: {split.examples:,} examples in the {len(split.paths)} shards of "
                f"{name}, ImageNet has {expected:,}; unless this is a subset on purpose, shards end too early or do "
                "not belong there: copy the data set again"
            )
    return found


def without_evaluation(folder: Optional[str], data: ShardedData) -> str:
    """Return the warning for a data set that happens to have no split to evaluate on."""
    others = f"; it has {', '.join(data.others)}, which --eval_split=NAME would choose" if data.others else ""
    return (
        f"--data_dir={folder}: has neither a validation nor a test split{others}; nothing is evaluated, and "
        f"result.json will have no accuracy (--eval_split={NO_EVALUATION} leaves out this warning)"
    )


def digest(data: ShardedData) -> str:
    """Return a digest of everything that is known without reading records, to compare the copies of several hosts."""
    about = (data.num_classes, data.label_base, data.classes, data.pixel_mean, data.pixel_std)
    parts = (repr(about), data.train.content, data.validation.content)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def check_records(folder: str) -> Dict[str, int]:
    """Read every record of a set that `prepare` wrote with its checksum; return the examples of each split."""
    description, counts = shards.read_manifest(folder), {}
    for name in description["splits"]:
        split = shards.open_split(folder, description, name)
        for first in range(0, split.examples, 256):
            split.read(np.arange(first, min(first + 256, split.examples)))
        counts[name] = split.examples
        split.close()
    return counts


def _optional_tuple(values: Optional[List[float]]) -> Optional[Tuple[float, ...]]:
    return None if values is None else tuple(map(float, values))


# --- TF-slim ---------------------------------------------------------------------------------------------------------

#: split -> pattern of the names, such as train/train-*-of-01024 -> number -> name, relative to the data folder
_SlimShards = Dict[str, Dict[str, Dict[int, str]]]


def _slim_shards(folder: str) -> _SlimShards:
    """Return the shards with names as those of TF-slim, in `folder` and in its sub-folders named like a split."""
    found: _SlimShards = {}
    inner = [name for name in sorted(os.listdir(folder)) if name.lower() in _SPLITS]
    for place in ["", *(name for name in inner if os.path.isdir(os.path.join(folder, name)))]:
        for name in os.listdir(os.path.join(folder, place)):
            match = _SLIM_SHARD.fullmatch(name)
            if match:
                pattern = os.path.join(place, f"{name[: match.start('shard')]}*{name[match.end('shard') :]}")
                numbers = found.setdefault(_SPLITS[match["split"].lower()], {}).setdefault(pattern, {})
                numbers[int(match["shard"])] = os.path.join(place, name)
    return found


def _describe_slim(folder: str, found: _SlimShards) -> Dict[str, Any]:
    """Describe what TF-slim's build_imagenet_data writes: labels 1..1000, with 0 reserved for an unused background."""
    splits = {name: _complete_set(folder, name, found[name]) for name in ("train", "validation") if name in found}
    if os.path.isdir(os.path.join(folder, shards.UNFINISHED)):
        raise DataError(
            f"--data_dir={folder}: prepare was interrupted, or ended with an error; repeat its command, which "
            f"continues, or remove {shards.UNFINISHED} there if these shards are of another source"
        )
    facts = facts_of("imagenet")
    return {
        "dataset": "imagenet",
        "num_classes": 1000,
        "label_base": 1,
        "splits": splits,
        "expected": {"train": facts.train_examples, "validation": facts.validation_examples},
    }


def _complete_set(folder: str, split: str, patterns: Mapping[str, Mapping[int, str]]) -> List[Dict[str, Any]]:
    """Return the rows of the one complete set of shards of a split; raise DataError for several or missing ones."""
    matches = {pattern: _SLIM_SHARD.fullmatch(os.path.basename(pattern).replace("*", "0")) for pattern in patterns}
    plain = [pattern for pattern, match in matches.items() if match and not match["compressed"]]
    chosen = sorted(plain or patterns)
    totals = [match["total"] for match in (matches[pattern] for pattern in chosen) if match]
    if len(chosen) != 1:
        shown = ", ".join(f"{pattern}: {len(patterns[pattern])} files" for pattern in chosen)
        raise DataError(
            f"--data_dir={folder}: shards of {split} must form one complete set, found "
            f"{' and '.join(f'of-{total}' for total in totals)} ({shown}); remove those that do not belong to it"
        )
    (pattern,), (total,), names = chosen, totals, patterns[chosen[0]]
    missing = [shard for shard in range(int(total)) if shard not in names]
    if missing:
        first = pattern.replace("*", f"{missing[0]:0{len(total)}d}")
        begun = os.path.isdir(os.path.join(folder, shards.UNFINISHED))
        remedy = "prepare was interrupted: repeat its command, which continues" if begun else "copy them"
        raise DataError(f"--data_dir={folder}: {len(missing)} shards missing, the first is {first}; {remedy}")
    if len(names) != int(total):
        raise DataError(f"--data_dir={folder}: {names[max(names)]} is not one of {total} shards; remove it")
    return [{"name": names[shard]} for shard in range(int(total))]


def _without_validation(folder: str, splits: Mapping[str, List]) -> str:
    """Return the message for ImageNet without shards of validation, which are usually elsewhere, not absent."""
    parent = os.path.dirname(os.path.abspath(folder))
    above = os.path.basename(os.path.abspath(folder)).lower() in _SPLITS and "validation" in _slim_shards(parent)
    rows = splits.get("train", [])
    return (
        f"--data_dir={folder}: contains {len(rows)} shards of train ({rows[0]['name']} ...), but none of validation "
        f"(validation-00000-of-00128); {f'name the folder above, --data_dir={parent}' if above else 'copy them'}, or "
        "train without evaluation: --eval_split=none"
    )
