"""Facts of each data set that are known without reading it: sizes, classes and the usual view of its images."""

import dataclasses
import json
import os
from typing import Dict, Optional

MANIFEST = "manifest.json"  # of a folder that `prepare` wrote
NO_EVALUATION = "none"  # value of --eval_split


@dataclasses.dataclass(frozen=True)
class Facts:
    """Counts of examples and classes, and defaults for flags that depend on the data set."""

    train_examples: Optional[int]
    validation_examples: Optional[int]
    num_classes: Optional[int]
    image_size: int  # pixels, side of the input image
    eval_crop: float  # share of the short side that evaluation uses


# ImageNet: 224/256 of the short side, as in the published results; small images are evaluated whole.
DATASETS: Dict[str, Facts] = {
    "imagenet": Facts(1_281_167, 50_000, 1000, 224, 0.875),
    "tiny_imagenet": Facts(100_000, 10_000, 200, 64, 1.0),
    "folder": Facts(None, None, None, 224, 0.875),
    "fashion_mnist": Facts(60_000, 10_000, 10, 32, 1.0),
    "digits": Facts(1_497, 300, 10, 32, 1.0),
    "synthetic": Facts(1_281_167, 0, 1000, 224, 1.0),
}
# Any other prepared set, tfds:NAME: its sizes are in its files, and the number of classes is given by the user.
_TFDS = Facts(None, None, None, 224, 0.875)


def facts_of(dataset: str, data_dir: Optional[str] = None) -> Facts:
    """Return the facts of the data set of `--dataset`; those that differ from set to set, from the manifest, if any.

    A part of a known set, such as ImageNet, has its own number of examples, but the classes of the whole.
    """
    facts = DATASETS.get(dataset, _TFDS)
    if dataset == "synthetic" or data_dir is None:
        return facts
    try:
        with open(os.path.join(data_dir, MANIFEST), encoding="utf-8") as file:
            manifest = json.load(file)
        train, validation = (
            sum(row["examples"] for row in manifest["splits"].get(split, [])) for split in ("train", "validation")
        )
        return dataclasses.replace(
            facts,
            train_examples=train or facts.train_examples,  # a folder with validation images only
            validation_examples=validation,
            num_classes=facts.num_classes or int(manifest["num_classes"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return facts  # opening the data reports what is wrong with them


def normalization_of(normalization: str, dataset: str, measured: bool) -> str:
    """Return what --normalization=auto stands for, given whether the pixels of the set were measured.

    ImageNet is normalised as the authors did it, whoever wrote its shards; other sets by their own pixels, if measured.
    """
    if normalization != "auto":
        return normalization
    if dataset == "imagenet":
        return "authors"
    return "dataset" if measured else "tf"
