"""Flags of `prepare` that some sources would ignore."""

from typing import Any, Dict, Tuple

from resnet_cpu.command_settings import Prepare
from resnet_cpu.errors import FlagError
from resnet_cpu.settings import Data, Recipe, Settings

OF_IMAGE_FILES = ("imagenet", "folder", "tiny_imagenet")
_OF_IMAGES = ("short_side", "jpeg_quality", "allow_incomplete")


def refuse_unused_flags(source: str, settings: Settings) -> None:
    """Raise FlagError for a flag that `source` would ignore."""
    values: Dict[str, Tuple[Any, Any]] = {}  # flag -> value and default
    if source != "folder":
        values["validation_share"] = (settings.prepare.validation_share, Prepare.validation_share)
    if source not in OF_IMAGE_FILES:
        values.update({name: (getattr(settings.prepare, name), getattr(Prepare, name)) for name in _OF_IMAGES})
        values["dry_run"] = (settings.launch.dry_run, False)
        values["seed"] = (settings.recipe.seed, Recipe.seed)
    if source not in (*OF_IMAGE_FILES, "fashion_mnist"):
        values["raw_dir"] = (settings.prepare.raw_dir, None)
    if source not in ("verify", settings.data.dataset):
        values["dataset"] = (settings.data.dataset, Data.dataset)
    for name, (value, default) in values.items():
        if value != default:
            raise FlagError(f"--{name}: `prepare {source}` does not use it; remove it")
