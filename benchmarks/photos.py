"""Photographs in ImageNet's TF-slim layout, for benchmarks of reading: noise would not decode at the usual speed.

    python benchmarks/photos.py FOLDER [--examples 2048]

They are crops of scikit-learn's two sample photographs at random positions and scales, some flipped, of 500 x 375
pixels, as JPEG of a quality that gives 110 kB on average, the mean of ImageNet. They are written with TensorFlow's
TFRecordWriter, without any code of this package.
"""

import argparse
import os
import pathlib
from typing import Iterator

import numpy as np

WIDTH, HEIGHT = 500, 375  # ImageNet's most common shape
MEAN_BYTES = 110_000


def windows(count: int, seed: int) -> Iterator[np.ndarray]:
    """Yield `count` uint8 [HEIGHT, WIDTH, 3] views of real photographs."""
    import tensorflow as tf
    from sklearn.datasets import load_sample_images

    photographs = [image.astype(np.uint8) for image in load_sample_images().images]
    generator = np.random.Generator(np.random.Philox(seed))
    for number in range(count):
        image = photographs[number % len(photographs)]
        share = generator.uniform(0.5, 1.0)
        height, width = (int(side * share) for side in (image.shape[1] * HEIGHT / WIDTH, image.shape[1]))
        height, width = min(height, image.shape[0]), min(width, image.shape[1])
        y = generator.integers(image.shape[0] - height + 1)
        x = generator.integers(image.shape[1] - width + 1)
        window = image[y : y + height, x : x + width]
        if generator.random() < 0.5:
            window = window[:, ::-1]
        resized = tf.image.resize(window, [HEIGHT, WIDTH], method="bicubic").numpy()
        # Add sensor noise: resizing smooths the image, while a real photograph has fine grain.
        noisy = resized + generator.normal(0, 6, resized.shape)
        yield np.clip(np.round(noisy), 0, 255).astype(np.uint8)


def quality_for(images: list, mean_bytes: int) -> int:
    """Return the JPEG quality at which the mean size of the images is nearest to `mean_bytes`."""
    import tensorflow as tf

    sizes = {
        quality: np.mean([len(tf.io.encode_jpeg(image, quality=quality).numpy()) for image in images])
        for quality in range(60, 100)
    }
    return min(sizes, key=lambda quality: abs(sizes[quality] - mean_bytes))


def write(folder: pathlib.Path, examples: int, shards: int = 8, validation: int = 64, seed: int = 0) -> dict:
    """Write the data set; return its JPEG quality and the mean size of a record, bytes."""
    import tensorflow as tf

    folder.mkdir(parents=True, exist_ok=True)
    quality = quality_for(list(windows(8, seed + 1)), MEAN_BYTES)
    total = 0
    for split, count, of in (("train", examples, shards), ("validation", validation, 1)):
        images = windows(count, seed)
        for shard, numbers in enumerate(np.array_split(np.arange(count), of)):
            with tf.io.TFRecordWriter(str(folder / f"{split}-{shard:05d}-of-{of:05d}")) as writer:
                for number in numbers:
                    encoded = tf.io.encode_jpeg(next(images), quality=quality).numpy()
                    feature = {
                        "image/encoded": tf.train.Feature(bytes_list=tf.train.BytesList(value=[encoded])),
                        "image/class/label": tf.train.Feature(
                            int64_list=tf.train.Int64List(value=[1 + int(number) % 1000])
                        ),
                    }
                    record = tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString()
                    writer.write(record)
                    total += len(record)
    return {"quality": quality, "mean_bytes": total // (examples + validation)}


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--examples", type=int, default=2048)
    arguments = parser.parse_args()
    print(write(arguments.folder, arguments.examples))
