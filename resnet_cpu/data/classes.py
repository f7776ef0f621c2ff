"""Check that labels mean the same everywhere: in all records of a set, and in the set that a network was trained on."""

import hashlib
import itertools
import json
import re
from typing import Iterable, List, NamedTuple, Optional, Sequence

import numpy as np

from resnet_cpu.data.shards import Split
from resnet_cpu.errors import DataError

SYNSET_KEY = "image/class/synset"  # WordNet id in the records of TF-slim
WORDNET_ID = re.compile(rb"n\d{8}")


class Labelled(NamedTuple):
    """The label of a record and the WordNet id beside it."""

    path: str
    record: int
    label: int  # as stored
    synset: bytes

    def __str__(self) -> str:
        return f"{self.path}: record {self.record} (label {self.label}, {self.synset.decode()})"


def labelled(split: Split, ids: np.ndarray, labels: np.ndarray, synsets: Iterable[bytes]) -> List[Labelled]:
    """Return the examples `ids` of a split with their stored labels, without those that have no WordNet id."""
    rows = zip(ids, labels.tolist(), synsets)
    return [
        Labelled(*split.locate(example), label, text) for example, label, text in rows if WORDNET_ID.fullmatch(text)
    ]


def check_order(found: Sequence[Labelled]) -> None:
    """Raise DataError that names two records which contradict each other.

    The labels of ImageNet rise with the sorted WordNet ids, and equal ids have equal labels, in training and
    evaluation alike. Labels in another order, as of Caffe's or MATLAB's lists, would be learned without any error.
    """
    rows = sorted(found, key=lambda row: (row.synset, row.label))
    for one, other in zip(rows, rows[1:]):
        if one.synset == other.synset and one.label != other.label:
            raise DataError(f"{one} and {other} contradict each other: one class has two labels; prepare the set again")
        if one.synset != other.synset and one.label >= other.label:
            raise DataError(
                f"{one} and {other} contradict each other: labels must rise with the sorted WordNet ids; prepare the "
                "set again with the usual list of classes"
            )


def digest(names: Sequence[str]) -> str:
    """Return the SHA-256 of a list of class names in the order of their labels."""
    return hashlib.sha256(json.dumps(list(names)).encode()).hexdigest()


def first_difference(trained: Optional[Sequence[str]], now: Sequence[str]) -> str:
    """Return where two different lists of classes differ first; `trained` is None if only its digest is known."""
    if trained is None:
        return "the lists of classes have other digests"
    for label, (one, other) in enumerate(itertools.zip_longest(trained, now)):
        if one != other:
            return f"class {label} was {one or 'absent'}, here it is {other or 'absent'}"
    return "the lists of classes have other digests"
