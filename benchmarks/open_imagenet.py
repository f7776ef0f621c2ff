"""Time and memory that a rank needs to open a data set of the size of ImageNet: 1,281,167 records in 1,024 shards.

    python benchmarks/open_imagenet.py --rounds 7 --out benchmarks/results/open_imagenet.csv

The shards are sparse files without records, since opening reads only their sizes and indexes.
"""

import pathlib
import subprocess
import sys
import tempfile

import numpy as np
import paired

EXAMPLES = {"train": (1_281_167, 1024), "validation": (50_000, 128)}
MEAN_BYTES = 110_000

# Each measurement is a process of its own: seconds and MiB to open the set, MiB for the permutation of an epoch.
OPENER = """
import resource, sys, time
from resnet_cpu.data import folders, order
def memory():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20
before, started = memory(), time.perf_counter()
data = folders.open_data(sys.argv[1], "imagenet")
opened, seconds = memory(), time.perf_counter() - started
order.permutation(0, 0, data.train.examples)
print(seconds, opened - before, memory() - opened)
"""


def make(folder: pathlib.Path) -> None:
    """Write the sparse shards with their indexes."""
    from resnet_cpu.data import shards

    generator = np.random.Generator(np.random.Philox(0))
    for split, (examples, of) in EXAMPLES.items():
        for shard, numbers in enumerate(np.array_split(np.arange(examples), of)):
            lengths = generator.integers(MEAN_BYTES // 2, MEAN_BYTES * 3 // 2, len(numbers))
            ends = np.cumsum(lengths + 16)
            path = folder / shards.shard_name(split, shard, of)
            with open(path, "wb") as file:
                file.truncate(int(ends[-1]))
            np.save(shards.index_path(str(path)), np.concatenate([[0], ends]).astype(np.int64) + 12)


def main() -> None:
    parser = paired.parser(__doc__)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make(pathlib.Path(folder))
        rows = []
        for _ in range(arguments.rounds):
            done = subprocess.run(
                [sys.executable, "-c", OPENER, folder], check=True, capture_output=True, text=True, cwd=paired.ROOT
            )
            rows.append(dict(zip(("open_s", "index_mib", "permutation_mib"), map(float, done.stdout.split()))))
    for name in rows[0]:
        values = [row[name] for row in rows]
        print(f"{name}: median {np.median(values):.3f}, {min(values):.3f} ... {max(values):.3f}, n = {len(values)}")
    paired.write(arguments.out, rows)


if __name__ == "__main__":
    main()
