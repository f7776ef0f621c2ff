"""Facts of each data set that are known without reading it: sizes, classes and the usual view of its images."""

import dataclasses
from typing import Dict, Optional


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
    "fashion_mnist": Facts(60_000, 10_000, 10, 32, 1.0),
    "digits": Facts(1_497, 300, 10, 32, 1.0),
    "synthetic": Facts(1_281_167, 0, 1000, 224, 1.0),
}
# Any other prepared set, tfds:NAME: its sizes are in its files, and the number of classes is given by the user.
_TFDS = Facts(None, None, None, 224, 0.875)


def facts_of(dataset: str) -> Facts:
    """Return the facts of the data set of `--dataset`."""
    return DATASETS.get(dataset, _TFDS)
