"""Fashion-MNIST: 60,000 + 10,000 grey images of 28x28 pixels in 10 classes (Xiao et al., arXiv 1708.07747)."""

import os
from typing import Dict, Optional

from resnet_cpu.data.sources import arrays

DEBIAN_FOLDER = "/usr/share/datasets/fashion-mnist"  # of the package dataset-fashion-mnist
_FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "validation": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}


def prepare(raw_dir: Optional[str], data_dir: str) -> Dict[str, int]:
    """Write the shards of the data set to `data_dir`; return the number of examples of each split."""
    folder = raw_dir or DEBIAN_FOLDER
    splits = {
        split: (arrays.read_idx(os.path.join(folder, images)), arrays.read_idx(os.path.join(folder, labels)))
        for split, (images, labels) in _FILES.items()
    }
    return arrays.write_data_set(data_dir, "fashion_mnist", "Fashion-MNIST", splits, 10)
