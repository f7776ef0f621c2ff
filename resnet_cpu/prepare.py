"""Raw data to verified shards: `python -m resnet_cpu.prepare fashion_mnist --data_dir=data/fashion_mnist`."""

import json
import os
from typing import List

from resnet_cpu import commandline
from resnet_cpu.cluster import guard, machine, placement
from resnet_cpu.data import folders
from resnet_cpu.errors import FlagError
from resnet_cpu.settings import SOURCES


def main(argv: List[str]) -> None:
    """Prepare or verify; the last line on standard output is the number of examples of each split, as JSON."""
    settings = commandline.parse(argv, "prepare")
    source = settings.prepare.source
    if source not in SOURCES:
        raise FlagError(
            f"{source or 'SOURCE'}: name what to prepare, one of {', '.join(SOURCES)}, as in "
            "python -m resnet_cpu.prepare digits --data_dir=data/digits"
        )
    data_dir = commandline.required(settings.data.data_dir, "data_dir", "name the folder of the shards")
    if source == "verify":
        counts = folders.verify(data_dir, settings.data.dataset)
    else:
        placement.apply(settings.system.threads, machine.physical_cores(os.sched_getaffinity(0)))
        from resnet_cpu.data.sources import digits, fashion_mnist

        sources = {"fashion_mnist": fashion_mnist, "digits": digits}
        counts = sources[source].prepare(settings.prepare.raw_dir, data_dir)
    print(json.dumps(counts), flush=True)


if __name__ == "__main__":
    guard.run(main)
