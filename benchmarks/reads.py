"""Random reads through the index, with checksums, against TensorFlow's TFRecordDataset, sequential and with checksums.

    taskset -c 0 python benchmarks/reads.py --rounds 7 --out benchmarks/results/reads.csv

Records of 110 kB (photos.py) from the page cache, one core, batches of 32: the cost of the reader itself.
"""

import os
import pathlib
import tempfile
import time

import numpy as np
import paired
import photos

BATCH = 32


def main() -> None:
    parser = paired.parser(__doc__)
    parser.add_argument("--examples", type=int, default=1024)
    parser.add_argument("--passes", type=int, default=5, help="over the records, in one measurement")
    arguments = parser.parse_args()
    import tensorflow as tf

    from resnet_cpu.data import folders

    with tempfile.TemporaryDirectory() as folder:
        data_dir = pathlib.Path(folder)
        print(f"records: {photos.write(data_dir, arguments.examples)}", flush=True)
        folders.make_indexes(folders.describe(str(data_dir), "imagenet"), str(data_dir))
        split = folders.open_data(str(data_dir), "imagenet").train
        shards = sorted(str(path) for path in data_dir.glob("train-*-of-*") if path.suffix != ".npy")
        generator = np.random.Generator(np.random.Philox(0))

        def ours() -> float:
            started = time.perf_counter()
            for _ in range(arguments.passes):
                for ids in np.array_split(generator.permutation(split.examples), split.examples // BATCH):
                    split.read(ids)
            return arguments.passes * split.examples / (time.perf_counter() - started)

        def tensorflow() -> float:
            dataset = tf.data.TFRecordDataset(shards).batch(BATCH)
            started = time.perf_counter()
            for _ in range(arguments.passes):
                for _ in dataset:
                    pass
            return arguments.passes * split.examples / (time.perf_counter() - started)

        sides = {"random_by_index": ours, "tfrecorddataset_in_order": tensorflow}
        for side in sides.values():
            side()
        paired.compare(sides, [("random_by_index", "tfrecorddataset_in_order")], arguments.rounds, arguments.out)


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    main()
