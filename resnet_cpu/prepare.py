"""Raw data to verified shards: `python -m resnet_cpu.prepare fashion_mnist --data_dir=data/fashion_mnist`."""

import json
import os
from typing import List

from resnet_cpu import flags
from resnet_cpu.cluster import control, guard
from resnet_cpu.cluster import placement as layout
from resnet_cpu.data import folders as layouts
from resnet_cpu.errors import FlagError


def main(argv: List[str]) -> None:
    """Prepare or verify; the last line on standard output counts the examples of each split, as JSON."""
    values, rest = flags.parse_values(argv, "prepare", positional=1)
    source = rest[0] if rest else None
    if source not in flags.SOURCES:
        raise FlagError(
            f"{source or 'no source'}: name what to prepare, one of {', '.join(flags.SOURCES)}, as in "
            "python -m resnet_cpu.prepare digits --data_dir=data/digits"
        )
    data_dir = flags.required(values.data_dir, "data_dir", "name the folder of the shards")
    if source == "verify":
        counts = layouts.verify(data_dir, values.dataset)
    else:
        layout.apply(values.threads, control.physical_cores(os.sched_getaffinity(0)))
        from resnet_cpu.data.sources import digits, fashion_mnist

        counts = {"fashion_mnist": fashion_mnist, "digits": digits}[source].prepare(values.raw_dir, data_dir)
    print(json.dumps(counts), flush=True)


if __name__ == "__main__":
    guard.run(main)
