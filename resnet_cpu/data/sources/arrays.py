"""Write arrays of images as verified JPEG shards; read IDX files, the format of the MNIST family."""

import gzip
import struct
import sys
import zlib
from typing import Dict, Iterator, Tuple

import numpy as np
import tensorflow as tf

from resnet_cpu.data import folders, shards
from resnet_cpu.data.sources.exclusive import preparing
from resnet_cpu.errors import DataError

JPEG_QUALITY = 100  # size hardly matters for tiny images, and a lower quality is visible at 28 pixels
EXAMPLES_PER_SHARD = 8192


def read_idx(path: str) -> np.ndarray:
    """Return the uint8 array of a gzipped IDX file (magic, big-endian dimensions, bytes); DataError if damaged."""
    try:
        with gzip.open(path, "rb") as file:
            content = file.read()
    except FileNotFoundError:
        raise DataError(f"{path}: the file does not exist; set --raw_dir to the folder that contains it") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not readable as gzip ({error}); download it again") from None
    if content[:3] != b"\x00\x00\x08" or len(content) < 4 or len(content) < 4 + 4 * content[3]:
        raise DataError(f"{path}: not an IDX file of bytes; download it again")
    dimensions = struct.unpack(f">{content[3]}I", content[4 : 4 + 4 * content[3]])
    array = np.frombuffer(content, np.uint8, offset=4 + 4 * content[3])
    if array.size != np.prod(dimensions):
        raise DataError(f"{path}: {array.size} bytes where {dimensions} needs {np.prod(dimensions)}; download it again")
    return array.reshape(dimensions)


def serialized_examples(images: np.ndarray, labels: np.ndarray, name: str) -> Iterator[bytes]:
    """Yield grey images, uint8 [n, height, width], as serialized examples with JPEG; report progress under `name`."""
    _, height, width = images.shape

    def encode(image: tf.Tensor) -> tf.Tensor:
        return tf.io.encode_jpeg(image, format="grayscale", quality=JPEG_QUALITY)

    jpegs = tf.data.Dataset.from_tensor_slices(images[..., None]).map(encode, tf.data.AUTOTUNE)
    for number, (encoded, label) in enumerate(zip(jpegs.as_numpy_iterator(), labels)):
        feature = {
            "image/encoded": tf.train.Feature(bytes_list=tf.train.BytesList(value=[encoded])),
            "image/format": tf.train.Feature(bytes_list=tf.train.BytesList(value=[b"JPEG"])),
            "image/height": tf.train.Feature(int64_list=tf.train.Int64List(value=[height])),
            "image/width": tf.train.Feature(int64_list=tf.train.Int64List(value=[width])),
            "image/class/label": tf.train.Feature(int64_list=tf.train.Int64List(value=[int(label)])),
        }
        yield tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString(deterministic=True)
        if number % 10_000 == 9_999:
            print(f"prepare: {name}: {number + 1} of {len(images)} examples", file=sys.stderr, flush=True)


def write_data_set(
    folder: str, dataset: str, source: str, splits: Dict[str, Tuple[np.ndarray, np.ndarray]], num_classes: int
) -> Dict[str, int]:
    """Write grey images and labels of each split as shards with a manifest; return the examples of each split.

    Raises DataError if the folder contains another data set, RunFolderError if another process is writing to it.
    """
    with preparing(folder, dataset):
        return _write_data_set(folder, dataset, source, splits, num_classes)


def _write_data_set(
    folder: str, dataset: str, source: str, splits: Dict[str, Tuple[np.ndarray, np.ndarray]], num_classes: int
) -> Dict[str, int]:
    rows = {}
    for split, (images, labels) in splits.items():
        if labels.min() < 0 or labels.max() >= num_classes or len(images) != len(labels):
            raise DataError(f"{source}: {split}: labels do not fit {len(images)} images of {num_classes} classes")
        count = -(-len(images) // EXAMPLES_PER_SHARD)
        examples = serialized_examples(images, labels, f"{dataset} {split}")
        rows[split] = shards.write_split(folder, split, examples, len(images), count)
    pixels = splits["train"][0].astype(np.float64)
    manifest = {
        "dataset": dataset,
        "source": source,
        "num_classes": num_classes,
        "label_base": 0,
        "pixel_mean": [round(float(pixels.mean()), 4)] * 3,
        "pixel_std": [round(float(pixels.std()), 4)] * 3,
        "splits": rows,
    }
    shards.write_manifest(folder, manifest)
    return folders.check_records(folder)
