"""Raw data to verified shards: `python -m resnet_cpu.prepare imagenet --raw_dir=... --data_dir=...`."""

import json
import os
from typing import Dict, List

from resnet_cpu import commandline
from resnet_cpu.cluster import guard, machine, placement
from resnet_cpu.command_settings import SOURCES
from resnet_cpu.data.sources.unused_flags import OF_IMAGE_FILES, refuse_unused_flags
from resnet_cpu.errors import FlagError
from resnet_cpu.settings import Settings


def main(argv: List[str]) -> None:
    """Prepare or verify; the last line on standard output is the number of examples of each split, as JSON."""
    settings = commandline.parse(argv, "prepare")
    source = settings.prepare.source
    if source not in SOURCES:
        example = "python -m resnet_cpu.prepare digits --data_dir=data/digits"
        raise FlagError(f"{source or 'SOURCE'}: name what to prepare, one of {', '.join(SOURCES)}, as in {example}")
    data_dir = commandline.required(settings.data.data_dir, "data_dir", "name the folder of the shards")
    refuse_unused_flags(source, settings)
    cores = machine.physical_cores(os.sched_getaffinity(0))
    counts = (_of_image_files if source in OF_IMAGE_FILES else _with_tensorflow)(source, settings, data_dir, cores)
    print(json.dumps(counts), flush=True)


def _of_image_files(source: str, settings: Settings, data_dir: str, cores: int) -> Dict[str, int]:
    commandline.required(settings.prepare.raw_dir, "raw_dir", "name the folder of the images or archives")
    from resnet_cpu.data.sources import image_files

    return image_files.prepare(source, settings, data_dir, settings.system.threads or cores)


def _with_tensorflow(source: str, settings: Settings, data_dir: str, cores: int) -> Dict[str, int]:
    placement.apply(settings.system.threads, cores)
    from resnet_cpu.data import verification
    from resnet_cpu.data.sources import digits, fashion_mnist

    if source == "verify":
        return verification.verify(data_dir, settings.data.dataset, settings.system.threads or cores)
    return {"fashion_mnist": fashion_mnist, "digits": digits}[source].prepare(settings.prepare.raw_dir, data_dir)


if __name__ == "__main__":
    guard.run(main)
