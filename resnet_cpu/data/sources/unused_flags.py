"""Flags of `prepare` that some sources would ignore."""

from resnet_cpu.command_settings import Prepare
from resnet_cpu.errors import FlagError
from resnet_cpu.settings import Recipe, Settings

_OF_IMAGES = ("short_side", "jpeg_quality", "validation_share", "allow_incomplete")


def refuse_unused_flags(source: str, settings: Settings) -> None:
    """Raise FlagError for a flag that a source other than image files would ignore, as --dry_run."""
    values = {name: (getattr(settings.prepare, name), getattr(Prepare, name)) for name in _OF_IMAGES}
    values["dry_run"] = (settings.launch.dry_run, False)
    values["seed"] = (settings.recipe.seed, Recipe.seed)
    if source != "fashion_mnist":
        values["raw_dir"] = (settings.prepare.raw_dir, None)
    for name, (value, default) in values.items():
        if value != default:
            raise FlagError(f"--{name}: `prepare {source}` does not use it; remove it")
