"""Trees of image files: one folder per class, or the layout of Tiny-ImageNet."""

import hashlib
import os
import sys
from typing import Iterator, List, Optional, Sequence, Tuple

from resnet_cpu.data.sources.listing import Collector, Listing, size_of, some, unusable, walk
from resnet_cpu.errors import DataError, FlagError

_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp")
_OTHER_IMAGES = (".webp", ".tif", ".tiff", ".avif", ".heic", ".heif", ".jp2", ".jxl", ".ppm", ".pgm")  # cannot be read
_VALIDATION = ("validation", "val", "valid", "test")  # in this order, if a tree has several of them
_LIKE_SPLITS = ("train", "training", "testing", *_VALIDATION)
_ANNOTATIONS = "val_annotations.txt"  # of Tiny-ImageNet


def find_folder(raw_dir: str, validation_share: Optional[float], allow_incomplete: bool) -> Listing:
    """Return the images of `raw_dir`: train/CLASS/... and validation/CLASS/..., or CLASS/... to be split by a hash.

    Raises DataError if classes are missing, or files cannot be images, unless `allow_incomplete`.
    """
    train_at = os.path.join(existing(raw_dir), "train")
    validation_at = next((path for name in _VALIDATION if os.path.isdir(path := os.path.join(raw_dir, name))), None)
    if not os.path.isdir(train_at):
        if validation_share is None:
            raise DataError(
                f"--raw_dir={raw_dir}: contains no folder train; it must have train/CLASS/... and validation/CLASS/... "
                "(or val, test), or give --validation_share=0.1 to split one tree of classes"
            )
        train_at, validation_at = raw_dir, None
        classes = _classes(raw_dir)
        like_splits = [name for name in classes if name.lower() in _LIKE_SPLITS]
        if len(like_splits) > 1:
            raise DataError(
                f"--raw_dir={raw_dir}: has folders that are named like splits, not like classes "
                f"({some(like_splits)}); name them train and validation"
            )
    elif validation_at is not None and validation_share is not None:
        raise FlagError(f"--validation_share: {raw_dir} has {os.path.basename(validation_at)} already; remove the flag")
    elif validation_at is None and validation_share is None:
        raise DataError(
            f"--raw_dir={raw_dir}: contains none of {', '.join(_VALIDATION)}; add one, or give --validation_share=0.1"
        )
    tree = _Tree(_classes(train_at))
    if validation_at is None:
        assert validation_share is not None
        tree.add_split(train_at, lambda name: "validation" if _share_of(name) < validation_share else "train")
    else:
        others = sorted(set(_classes(validation_at)) - set(tree.classes))
        if others:
            raise DataError(
                f"{validation_at}: has {len(others)} classes that {train_at} does not have: {some(others)}; both must "
                "have the same names"
            )
        tree.add_split(train_at, lambda name: "train")
        tree.add_split(validation_at, lambda name: "validation")
    return tree.listing("folder", raw_dir, f"images of {os.path.basename(os.path.abspath(raw_dir))}", allow_incomplete)


def find_tiny_imagenet(raw_dir: str, allow_incomplete: bool) -> Listing:
    """Return the images of Tiny-ImageNet: train/SYNSET/images/..., val/images/... and val/val_annotations.txt."""
    inner = os.path.join(existing(raw_dir), "tiny-imagenet-200")
    root = inner if os.path.isdir(inner) else raw_dir
    train_at, validation_at = os.path.join(root, "train"), os.path.join(root, "val")
    annotations = os.path.join(validation_at, _ANNOTATIONS)
    if not os.path.isdir(train_at) or not os.path.exists(annotations):
        raise DataError(f"--raw_dir={raw_dir}: not Tiny-ImageNet: it has folders train and val, and val/{_ANNOTATIONS}")
    tree = _Tree(_classes(train_at))
    tree.add_split(train_at, lambda name: "train")
    with open(annotations, encoding="utf-8", errors="replace") as file:
        rows = [line.split()[:2] for line in file if line.strip()]
    for number, row in enumerate(rows, 1):
        path = os.path.join(validation_at, "images", row[0])
        if len(row) < 2 or row[1] not in tree.classes:
            raise DataError(f"{annotations}: line {number}: names no class of {train_at}; take the file again")
        if not os.path.exists(path):
            raise DataError(f"{path}: is missing, {_ANNOTATIONS} names it in line {number}; unpack the set again")
        tree.add("validation", row[0], row[1], path)
    return tree.listing("tiny_imagenet", raw_dir, "Tiny-ImageNet-200", allow_incomplete)


class _Tree:
    """Images found so far, in classes that are known beforehand."""

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = {name: label for label, name in enumerate(classes)}
        self._files: List[str] = []
        self._splits = {split: Collector(split) for split in ("train", "validation")}
        self._ignored: List[str] = []
        self._unusable: List[str] = []
        self._other_images: List[str] = []

    def add_split(self, root: str, split_of) -> None:  # type: ignore[no-untyped-def]
        """Add all images below `root`, with `split_of` a function from the name CLASS/... to a split."""
        for name, path in _files(root):
            if path.lower().endswith(_SUFFIXES):
                self.add(split_of(name), name, name.split("/")[0], path)
            elif path.lower().endswith(_OTHER_IMAGES):
                self._other_images.append(path)
            else:
                self._ignored.append(path)

    def add(self, split: str, name: str, in_class: str, path: str) -> None:
        size = size_of(path)
        fault = unusable(path, size)
        if fault is not None:
            self._unusable.append(fault)
            return
        self._splits[split].add(name, self.classes[in_class], len(self._files), 0, size)
        self._files.append(path)

    def listing(self, dataset: str, raw_dir: str, source: str, allow_incomplete: bool) -> Listing:
        """Return the listing; raise DataError if a class or a split has no images, or files are unusable."""
        tables = {split: collector.table() for split, collector in self._splits.items()}
        if self._ignored:
            print(
                f"prepare: ignored {len(self._ignored):,} files that are not images: {some(self._ignored, 3)}",
                file=sys.stderr,
            )
        names = list(self.classes)
        problems = []
        if self._unusable:
            problems.append(f"{len(self._unusable):,} files are empty, too large or missing: {some(self._unusable)}")
        if self._other_images:
            problems.append(
                f"{len(self._other_images):,} images are of a format that is not read, convert them to JPEG: "
                f"{some(self._other_images)}"
            )
        for split, table in tables.items():
            if not len(table.names):
                raise DataError(f"--raw_dir={raw_dir}: no images for {split}; images end in {', '.join(_SUFFIXES)}")
            empty = sorted(set(range(len(names))) - set(table.labels.tolist()))
            if empty:
                problems.append(
                    f"{len(empty):,} classes have no images for {split}: {some(names[label] for label in empty)}"
                )
        text = f"--raw_dir={raw_dir}: {'; '.join(problems)}"
        if problems and not allow_incomplete:
            raise DataError(f"{text}; complete the files, or prepare what is there with --allow_incomplete")
        if problems:
            print(f"WARNING: {text}", file=sys.stderr, flush=True)
        if len(names) < 2:
            raise DataError(f"--raw_dir={raw_dir}: only {len(names)} class; there must be one folder for each class")
        return Listing(dataset, source, tuple(names), 0, tuple(self._files), tables)


def existing(raw_dir: str) -> str:
    """Return --raw_dir; raise DataError unless it is a folder."""
    if not os.path.isdir(raw_dir):
        problem = "is a file; name the folder that holds it" if os.path.exists(raw_dir) else "the folder does not exist"
        raise DataError(f"--raw_dir={raw_dir}: {problem}")
    return raw_dir


def _classes(root: str) -> List[str]:
    """Return the names of the class folders, sorted; their numbers in this order are the labels."""
    with os.scandir(root) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _files(root: str) -> Iterator[Tuple[str, str]]:
    """Yield (name as CLASS/..., path) of all files in the class folders below `root`, without hidden ones."""
    for in_class in _classes(root):
        for folder, names in walk(os.path.join(root, in_class)):
            for name in names:
                path = os.path.join(folder, name)
                if not name.startswith("."):
                    yield os.path.relpath(path, root).replace(os.sep, "/"), path


def _share_of(name: str) -> float:
    """Return a number in [0, 1) that depends on the name only: adding images does not move others."""
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8], "big") / 2**64
