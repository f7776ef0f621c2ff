"""The command prepare verify: read, parse and decode every record of a set, in parallel, and list all that are bad."""

import concurrent.futures
import dataclasses
import hashlib
import os
import sys
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import tensorflow as tf

from resnet_cpu.data import classes, folders, shards
from resnet_cpu.data.batches import check_image, not_an_example
from resnet_cpu.data.images import BadImage
from resnet_cpu.data.progress import Progress
from resnet_cpu.data.shards import Split
from resnet_cpu.errors import DataError, OutputError
from resnet_cpu.run.atomic import sha256_of
from resnet_cpu.text import count

_CHUNK = 64  # records that are parsed at a time
_NAME = "image/filename"


@dataclasses.dataclass
class _Found:
    """The facts that were found in one shard."""

    path: str
    examples: int = 0
    bad: List[str] = dataclasses.field(default_factory=list)  # a line for each bad record
    formats: Dict[str, int] = dataclasses.field(default_factory=dict)  # images by format, other than JPEG
    names: Dict[int, int] = dataclasses.field(default_factory=dict)  # record -> hash of file name and image
    images: List[int] = dataclasses.field(default_factory=list)  # hashes of the encoded images
    label_of: Dict[bytes, Tuple[int, int]] = dataclasses.field(default_factory=dict)  # synset -> (label, record)


class _Set(NamedTuple):
    """How to read the examples of the set."""

    folder: str
    image_key: str
    label_key: str
    label_base: int
    num_classes: int
    classes: Optional[Sequence[str]]  # in the order of their labels, if recorded
    layout: Dict[str, Any]  # of the description of the set: what `shards.open_split` needs besides the shards


def verify(folder: str, dataset: str, threads: int) -> Dict[str, int]:
    """Read, parse and decode every record in `threads` threads; return the examples of each split.

    These are all splits of a set that `prepare` wrote. Of others they are those that training and evaluation use by
    default, since the test images of ImageNet have no labels; a note names the rest. Prints a line on standard error
    for each bad record. Raises DataError at the end if there was one.
    """
    own = os.path.exists(os.path.join(folder, shards.MANIFEST))
    description = shards.read_manifest(folder) if own else folders.describe(folder, dataset)
    if not own:
        print(
            f"note: no {shards.MANIFEST}: SHA-256 and sizes of the shards are not compared", file=sys.stderr, flush=True
        )
    if description.get("others"):
        names = ", ".join(description["others"])
        print(f"note: not verified, because they are not used by default: {names}", file=sys.stderr, flush=True)
    folders.make_indexes(description, folder)
    about = _Set(
        description.get("folder", folder),
        description.get("image_key", "image/encoded"),
        description.get("label_key", "image/class/label"),
        int(description["label_base"]),
        int(description["num_classes"]),
        description.get("classes"),
        {key: description[key] for key in ("file_format",) if key in description},
    )
    todo = [(split, row) for split, rows in description["splits"].items() for row in rows]
    found: Dict[str, List[_Found]] = {split: [] for split in description["splits"]}
    progress = Progress("verify", "shards", len(todo))
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        futures = {pool.submit(_check_shard, about, split, row): split for split, row in todo}
        for future in concurrent.futures.as_completed(futures):
            result = future.result()
            found[futures[future]].append(result)
            for line in result.bad:
                print(f"bad: {line}", file=sys.stderr, flush=True)
            progress.add(1)
    remedy = "copy them again"
    if "made_of" in description:
        remedy += ", or remove them and repeat the prepare command, which makes only them"
    _conclude(folder, found, remedy)
    return {split: sum(one.examples for one in results) for split, results in found.items()}


def _conclude(folder: str, found: Dict[str, List[_Found]], remedy: str) -> None:
    """Check what concerns several shards, print a summary, and raise DataError if anything was bad.

    `remedy`: what helps against bad shards.
    """
    results = sorted((one for results in found.values() for one in results), key=lambda one: one.path)
    repeated_names = [line for one in found.values() for line in _repeated_names(one)]
    empty = [
        f"{folder}: no examples in split '{split}'"
        for split, of_split in found.items()
        if not any(one.examples or one.bad for one in of_split)
    ]
    across = [*repeated_names, *_contradictions(results), *empty]
    for line in across:
        print(f"bad: {line}", file=sys.stderr, flush=True)
    formats: Dict[str, int] = {}
    for one in results:
        for name, number in one.formats.items():
            formats[name] = formats.get(name, 0) + number
    for name, number in formats.items():
        print(f"note: {number:,} images are {name}; they are read, but more slowly than JPEG", file=sys.stderr)
    images = [np.array(one.images, np.uint64) for one in results]
    repeated = sum(map(len, images)) - len(np.unique(np.concatenate(images))) if images else 0
    if repeated:
        print(f"note: {repeated:,} images are the same, byte by byte, as an earlier one", file=sys.stderr)
    bad = [line for one in results for line in one.bad] + across
    records, all_shards = f"{sum(one.examples for one in results):,}", f"{len(results):,}"
    if bad:
        number = sum(bool(one.bad) for one in results)
        text = f"{folder}: {count(f'{len(bad):,}', 'problem')}, listed above, the first: {bad[0]}"
        raise DataError(f"{text}. Bad are {number:,} of {len(results):,} shards: {remedy}" if number else text)
    text = f"{count(records, 'record')} in {count(all_shards, 'shard')}, none of them bad"
    print(f"verify: {text}", file=sys.stderr, flush=True)


def _repeated_names(results: List[_Found]) -> List[str]:
    """Return a line for each image of a split that occurs twice: with the same name and the same bytes."""
    seen: Dict[int, Tuple[str, int]] = {}
    lines = []
    for one in sorted(results, key=lambda one: one.path):
        for record, name in one.names.items():
            if name in seen:
                path, earlier = seen[name]
                lines.append(f"{one.path}: record {record}: the same image as record {earlier} of {path}")
            else:
                seen[name] = one.path, record
    return lines


def _contradictions(results: List[_Found]) -> List[str]:
    """Return a line for each class that has another label than in an earlier shard."""
    seen: Dict[bytes, Tuple[int, str, int]] = {}
    lines = []
    for one in results:
        for synset, (label, record) in one.label_of.items():
            known, path, earlier = seen.setdefault(synset, (label, one.path, record))
            if known != label:
                lines.append(
                    f"{one.path}: record {record}: class {_text(synset)} has the label {label}, but {known} in record "
                    f"{earlier} of {path}: the shards belong to different sets"
                )
    return lines


def _check_shard(about: _Set, split: str, row: Dict[str, Any]) -> _Found:
    """Check one shard: its SHA-256 where the manifest has it, and every record."""
    found = _Found(os.path.join(about.folder, row["name"]))
    if not os.path.exists(found.path):
        found.bad.append(f"{found.path}: missing")
        return found
    try:
        opened = shards.open_split(about.folder, {**about.layout, "splits": {split: [row]}}, split, empty=True)
    except DataError as error:
        found.bad.append(str(error))
        return found
    try:
        if row.get("sha256") not in (None, sha256_of(found.path)):
            found.bad.append(f"{found.path}: its SHA-256 is not that of the manifest: changed or replaced")
        for first in range(0, opened.examples, _CHUNK):
            _check_records(about, opened, range(first, min(first + _CHUNK, opened.examples)), found)
    except OutputError as error:
        found.bad.append(str(error))
    finally:
        opened.close()
    found.examples = opened.examples
    return found


def _features(about: _Set) -> Dict[str, tf.io.FixedLenFeature]:
    return {
        about.image_key: tf.io.FixedLenFeature([], tf.string),
        about.label_key: tf.io.FixedLenFeature([], tf.int64),
        _NAME: tf.io.FixedLenFeature([], tf.string, ""),
        classes.SYNSET_KEY: tf.io.FixedLenFeature([], tf.string, ""),
    }


def _check_records(about: _Set, opened: Split, records: range, found: _Found) -> None:
    payloads, kept = [], []
    for record in records:
        try:
            payloads.append(opened.read(np.array([record]))[0])
            kept.append(record)
        except DataError as error:
            found.bad.append(str(error))
    examples = _parsed(about, payloads)
    for record, example in zip(kept, examples):
        reason = example if isinstance(example, str) else _check_example(about, example, record, found)
        if reason:
            found.bad.append(f"{found.path}: record {record}: {reason}")


def _parsed(about: _Set, payloads: List[bytes]) -> List[Any]:
    """Return the features of each example, or the reason why they cannot be read."""
    if not payloads:
        return []
    try:
        columns = tf.io.parse_example(payloads, _features(about))
        arrays = {key: column.numpy() for key, column in columns.items()}
        return [{key: array[i] for key, array in arrays.items()} for i in range(len(payloads))]
    except tf.errors.OpError as error:
        if len(payloads) > 1:
            return [one for payload in payloads for one in _parsed(about, [payload])]
        return [not_an_example(error)]


def _check_example(about: _Set, example: Dict[str, Any], record: int, found: _Found) -> Optional[str]:
    """Return what is wrong with an example, None if nothing is; note what is compared across shards."""
    encoded, label = example[about.image_key], int(example[about.label_key])
    last = about.label_base + about.num_classes - 1
    if not about.label_base <= label <= last:
        return f"label {label} is outside the {about.num_classes} classes {about.label_base}..{last}"
    synset = example[classes.SYNSET_KEY]
    if synset and about.classes is not None and os.fsencode(about.classes[label - about.label_base]) != synset:
        of_label = about.classes[label - about.label_base]
        return f"class {_text(synset)} has the label {label}, which is that of {of_label} in the list of classes"
    if classes.WORDNET_ID.fullmatch(synset):
        known, earlier = found.label_of.setdefault(synset, (label, record))
        if known != label:
            return f"class {_text(synset)} has the label {label}, but {known} in record {earlier}"
    if example[_NAME]:
        found.names[record] = _hash(example[_NAME] + b"\0" + encoded)
    found.images.append(_hash(encoded))
    try:
        header = check_image(encoded)
    except BadImage as error:
        return str(error)
    if header.format != "JPEG":
        found.formats[header.format] = found.formats.get(header.format, 0) + 1
    return None


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _text(synset: bytes) -> str:
    return synset.decode(errors="replace")
