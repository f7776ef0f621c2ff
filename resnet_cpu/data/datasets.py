"""What is known of each data set without reading it: sizes, classes and the view that suits its images."""

import dataclasses
from typing import Dict, Optional


@dataclasses.dataclass(frozen=True)
class Facts:
    """Counts of examples and classes, and defaults for flags that depend on the data set."""

    train_examples: Optional[int]
    validation_examples: Optional[int]
    num_classes: Optional[int]
    image_size: int  # pixels, of the image that the network sees
    eval_crop: float  # share of the short side that evaluation looks at


# ImageNet: 224/256 of the short side, the view of the published results; small images are looked at whole.
DATASETS: Dict[str, Facts] = {
    "imagenet": Facts(1_281_167, 50_000, 1000, 224, 0.875),
    "fashion_mnist": Facts(60_000, 10_000, 10, 32, 1.0),
    "digits": Facts(1_497, 300, 10, 32, 1.0),
    "synthetic": Facts(1_281_167, 0, 1000, 224, 1.0),
}
# Any other prepared set, named tfds:NAME: its files know its sizes, and its user its classes.
_TFDS = Facts(None, None, None, 224, 0.875)


def facts_of(dataset: str) -> Facts:
    """Return what is known of a data set that `--dataset` names."""
    return DATASETS.get(dataset, _TFDS)
