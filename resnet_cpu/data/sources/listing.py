"""Describe raw data: which image has which label, and where its bytes are. Nothing is decoded.

A listing of ImageNet has 1.3 million images; it is held in arrays, about 100 bytes per image.
"""

import dataclasses
import hashlib
import json
import os
import zipfile
from typing import Dict, Iterable, Iterator, List, Optional, Set, Tuple

import numpy as np

from resnet_cpu.errors import DataError
from resnet_cpu.run.atomic import naming, open_atomically

MOST_BYTES = 2**25  # of one image; the largest of ImageNet has 15 MB
MISSING = -1  # size of a file that does not exist


@dataclasses.dataclass(frozen=True)
class Table:
    """Images of a split: for each its name, its label, and the range of bytes in a file that holds it."""

    names: np.ndarray  # [n], bytes; unique, as image/filename in the shards
    labels: np.ndarray  # [n], int32, index into the classes
    files: np.ndarray  # [n], int32, index into Listing.files
    offsets: np.ndarray  # [n], int64
    sizes: np.ndarray  # [n], int64, bytes


@dataclasses.dataclass(frozen=True)
class Listing:
    """Raw data that can be prepared."""

    dataset: str  # as in --dataset
    source: str  # for people
    classes: Tuple[str, ...]
    label_base: int  # label of the first class in the shards
    files: Tuple[str, ...]  # paths
    splits: Dict[str, Table]

    def identity(self) -> str:
        """Return a SHA-256 of what will be in the shards: names, labels and sizes, but not where the files are."""
        digest = hashlib.sha256(json.dumps([self.dataset, self.classes, self.label_base]).encode())
        for split, table in sorted(self.splits.items()):
            digest.update(split.encode() + b"\0" + b"\0".join(table.names.tolist()))
            digest.update(table.labels.astype("<i4").tobytes() + table.sizes.astype("<i8").tobytes())
        return digest.hexdigest()

    def save(self, path: str) -> None:
        """Write the listing to an .npz file, for the processes that make shards."""
        arrays = {
            f"{split}/{field.name}": getattr(table, field.name)
            for split, table in self.splits.items()
            for field in dataclasses.fields(Table)
        }
        facts = {**dataclasses.asdict(dataclasses.replace(self, splits={})), "splits": list(self.splits)}
        with open_atomically(path) as file:
            np.savez(file, facts=np.frombuffer(json.dumps(facts).encode(), np.uint8), **arrays)


def load(path: str) -> Listing:
    """Return the listing that `Listing.save` wrote."""
    with np.load(path, allow_pickle=False) as arrays:
        facts = json.loads(arrays["facts"].tobytes().decode())
        splits = {
            split: Table(*(arrays[f"{split}/{field.name}"] for field in dataclasses.fields(Table)))
            for split in facts["splits"]
        }
    return Listing(**{**facts, "classes": tuple(facts["classes"]), "files": tuple(facts["files"]), "splits": splits})


def replaced(path: str, images: Listing) -> Optional[Dict[str, Set[int]]]:
    """Return the rows of each split whose images have another size than in the listing that was saved at `path`.

    None if the two differ in anything else, or if the saved one cannot be read.
    """
    try:
        before = load(path)
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        return None
    if (before.dataset, before.classes, before.label_base) != (images.dataset, images.classes, images.label_base):
        return None
    found = {}
    for split, now in images.splits.items():
        then = before.splits.get(split)
        if then is None or not (np.array_equal(then.names, now.names) and np.array_equal(then.labels, now.labels)):
            return None
        found[split] = set(np.flatnonzero(then.sizes != now.sizes).tolist())
    return found


def walk(root: str) -> Iterator[Tuple[str, List[str]]]:
    """Yield (folder, sorted names of its files) of `root` and all folders below, in order; links are followed.

    Hidden folders, such as .ipynb_checkpoints, are left out. Raises OSError for a folder that cannot be read, and
    DataError for a link to a folder that contains it.
    """

    def stop(error: OSError) -> None:
        raise error

    within = {root: {_identity(root)}}  # folder -> what it and the folders above it are, whatever links led there
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=stop):
        above = within.pop(folder)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in subfolders:
            path = os.path.join(folder, name)
            identity = _identity(path)
            if identity in above:
                raise DataError(f"{path}: a link to a folder that contains it; remove the link")
            within[path] = {*above, identity}
        yield folder, sorted(names)


def _identity(path: str) -> Tuple[int, int]:
    about = os.stat(path)
    return about.st_dev, about.st_ino


def size_of(path: str) -> int:
    """Return the size of a file in bytes, MISSING for a link to a file that does not exist."""
    try:
        return os.path.getsize(path)
    except FileNotFoundError:
        return MISSING


def unusable(name: str, size: int) -> Optional[str]:
    """Return the name of a file with the reason why its size says that it holds no image, or None."""
    if size == MISSING:
        return f"{name} (a link to a file that is missing)"
    return None if 0 < size <= MOST_BYTES else f"{name} ({size:,} bytes)"


class Collector:
    """Gathers the images of a split one by one and turns them into a table."""

    def __init__(self, split: str) -> None:
        self.split = split
        self._rows: List[Tuple[bytes, int, int, int, int]] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, name: str, label: int, file: int, offset: int, size: int) -> None:
        """Add an image: the `size` bytes at `offset` in file number `file`."""
        self._rows.append((os.fsencode(name), label, file, offset, size))

    def table(self) -> Table:
        """Return the images in the order of their names; raise DataError if two have the same name."""
        self._rows.sort()
        for row, following in zip(self._rows, self._rows[1:]):
            if row[0] == following[0]:
                raise DataError(
                    f"{self.split}: two images have the name {os.fsdecode(row[0])}; remove one of them, and check "
                    "whether an archive was unpacked twice"
                )
        columns = list(zip(*self._rows)) or [()] * 5
        types = (np.bytes_, np.int32, np.int32, np.int64, np.int64)
        return Table(*(np.array(column, kind) for column, kind in zip(columns, types)))


def shuffled(names: np.ndarray, seed: int, split: str) -> np.ndarray:
    """Return the order of the images in the shards, int64 [n]: by the SHA-256 of seed, split and name.

    The order depends on nothing else, in particular not on the version of a random-number generator.
    """
    start = f"{seed}/{split}/".encode()
    return np.argsort(np.array([hashlib.sha256(start + name).digest() for name in names.tolist()]), kind="stable")


def read_image(path: str, offset: int, size: int) -> bytes:
    """Return the bytes of an image; raise DataError if the file is shorter than it was when it was listed."""
    with naming(path), open(path, "rb", buffering=0) as file:
        encoded = os.pread(file.fileno(), size, offset)
    if len(encoded) < size:
        raise DataError(
            f"{path}: only {len(encoded)} of {size} bytes at {offset}: shorter than when prepare began; restore the "
            "file and repeat the command"
        )
    return encoded


def some(names: Iterable[str], most: int = 5, total: Optional[int] = None) -> str:
    """Return the first few names for a message, and how many more there are."""
    listed = list(names)
    total = len(listed) if total is None else total
    more = f" and {total - most:,} more" if total > most else ""
    return ", ".join(listed[:most]) + more
