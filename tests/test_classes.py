"""Lists of classes: contradictory records are named, and so is the first difference of two lists."""

import numpy as np
import pytest

from resnet_cpu.data import classes, shards
from resnet_cpu.errors import DataError

WORDNET_IDS = [b"n01440764", b"n01443537", b"n01484850", b"n02099601", b"n15075141"]


@pytest.fixture
def split(tmp_path):
    rows = shards.write_split(str(tmp_path), "train", iter([b"x"] * 10), 10, 2)
    found = shards.open_split(str(tmp_path), {"splits": {"train": rows}}, "train")
    yield found
    found.close()


def labelled(split, labels, synsets):
    return classes.labelled(split, np.arange(len(labels)), np.array(labels), synsets)


@pytest.mark.parametrize("base", [0, 1])
def test_labels_that_rise_with_the_sorted_ids_are_accepted(split, base):
    order = [3, 0, 4, 2, 1, 0, 3]
    found = labelled(split, [place + base for place in order], [WORDNET_IDS[place] for place in order])
    assert len(found) == 7
    classes.check_order(found)
    classes.check_order(found + labelled(split, [base], [WORDNET_IDS[0]]))
    classes.check_order([])


@pytest.mark.parametrize(
    "labels, places, part",
    [
        ([0, 2, 1], [0, 1, 2], "labels must rise with the sorted WordNet ids"),  # two classes exchanged
        ([4, 3, 2, 1, 0], [0, 1, 2, 3, 4], "labels must rise"),
        ([0, 1, 1], [0, 1, 2], "labels must rise"),  # two classes with one label
        ([0, 1, 1, 2], [0, 1, 2, 3], "labels must rise"),
        ([0, 1, 2], [0, 1, 1], "one class has two labels"),  # as of other label bases in the two splits
    ],
)
def test_contradictions_name_both_records(split, labels, places, part):
    with pytest.raises(DataError, match=part) as caught:
        classes.check_order(labelled(split, labels, [WORDNET_IDS[place] for place in places]))
    assert str(caught.value).count("-of-00002: record ") == 2 and "\n" not in str(caught.value)


def test_training_and_evaluation_are_compared(split):
    train = labelled(split, [1, 2], WORDNET_IDS[:2])
    classes.check_order(train)
    with pytest.raises(DataError, match=r"record 0 \(label 0, n01440764\) .*\(label 1, n01440764\)"):
        classes.check_order(train + labelled(split, [0, 1], WORDNET_IDS[:2]))


def test_records_without_a_wordnet_id_are_not_compared(split):
    assert labelled(split, [1, 1, 1], [b"", b"n0", b"dog"]) == []


def test_the_first_difference_of_two_lists_is_named():
    difference = classes.first_difference
    assert difference(["cat", "dog"], ["cat", "fox"]) == "class 1 was dog, here it is fox"
    assert difference(["cat"], ["cat", "fox"]) == "class 1 was absent, here it is fox"
    assert difference(["cat", "dog"], ["cat"]) == "class 1 was dog, here it is absent"
    assert "digests" in difference(None, ["cat"])
    assert classes.digest(["cat", "dog"]) != classes.digest(["dog", "cat"]) != classes.digest(["catdog"])
