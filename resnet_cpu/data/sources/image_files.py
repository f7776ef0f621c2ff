"""The command prepare for sets of image files: find the images, then write them or say what would be written."""

import os
from typing import Dict

from resnet_cpu.data.sources import conversion, image_folders, imagenet, writing
from resnet_cpu.data.sources.dry_run import dry_run
from resnet_cpu.data.sources.listing import Listing
from resnet_cpu.errors import FlagError
from resnet_cpu.settings import Prepare, Settings


def prepare(source: str, settings: Settings, data_dir: str, processes: int) -> Dict[str, int]:
    """Prepare `source` with `processes` processes; return the number of images of each split.

    Raises DataError for raw files that are missing, damaged or too many, FlagError for shards among the raw files.
    """
    asked = settings.prepare
    raw, shards = (os.path.realpath(folder) for folder in (asked.raw_dir or "", data_dir))
    if raw == shards:
        raise FlagError(f"--data_dir={data_dir}: is --raw_dir; name another folder for the shards")
    # In a tree that has classes at its top, a folder of shards would be taken for a class.
    flat = source == "folder" and not os.path.isdir(os.path.join(raw, "train"))
    if flat and os.path.commonpath([raw, shards]) == raw:
        raise FlagError(f"--data_dir={data_dir}: lies in --raw_dir, among its classes; name a folder outside of it")
    images, options = _find(source, asked), conversion.Options(asked.short_side, asked.jpeg_quality)
    if settings.launch.dry_run:
        return dry_run(images, data_dir, settings.recipe.seed, options, processes)
    return writing.prepare(images, data_dir, settings.recipe.seed, options, processes, asked.allow_incomplete)


def _find(source: str, asked: Prepare) -> Listing:
    assert asked.raw_dir is not None
    if source == "imagenet":
        return imagenet.find(asked.raw_dir, asked.allow_incomplete)
    if source == "tiny_imagenet":
        return image_folders.find_tiny_imagenet(asked.raw_dir, asked.allow_incomplete)
    return image_folders.find_folder(asked.raw_dir, asked.validation_share, asked.allow_incomplete)
