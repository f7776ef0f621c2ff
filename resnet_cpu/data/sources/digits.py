"""scikit-learn's digits: 1,797 images of 8x8 grey pixels in 10 classes (from UCI's handwritten digits)."""

from typing import Dict, Optional

import numpy as np

from resnet_cpu.data.sources import arrays
from resnet_cpu.errors import DataError

VALIDATION = 300  # examples, the last ones
UPSCALE = 4  # to 32 pixels: a JPEG block has 8, so that strokes survive the compression


def prepare(raw_dir: Optional[str], data_dir: str) -> Dict[str, int]:
    """Write the shards of the data set to `data_dir`; return the number of examples of each split."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError("digits: scikit-learn is not installed; run pip install 'resnet_cpu[digits]'") from None
    loaded = load_digits()
    images = np.round(loaded.images * (255 / 16)).astype(np.uint8).repeat(UPSCALE, 1).repeat(UPSCALE, 2)
    splits = {
        "train": (images[:-VALIDATION], loaded.target[:-VALIDATION]),
        "validation": (images[-VALIDATION:], loaded.target[-VALIDATION:]),
    }
    return arrays.write_data_set(data_dir, "digits", "scikit-learn digits", splits, 10)
