"""From settings to who holds which images, and to a recipe in steps and learning rates."""

import dataclasses
import sys
from typing import Tuple

from resnet_cpu.errors import DataError, FlagError
from resnet_cpu.recipe import batch as batches
from resnet_cpu.recipe import phases
from resnet_cpu.recipe.batch import Batch
from resnet_cpu.recipe.phases import Phase
from resnet_cpu.settings import Settings

UNTIMED_STEPS = 10  # at the start of an attempt, in mode scaling: caches and threads settle meanwhile


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A recipe in steps and learning rates, for a number of ranks and training examples."""

    phases: Tuple[Phase, ...]
    batch: Batch


def resolve_batch(settings: Settings, ranks: int) -> Batch:
    """Return which rank holds how many images of a step; raise FlagError where they cannot be divided."""
    recipe = settings.recipe
    batch = batches.resolve_batch(recipe.batch_size, recipe.global_batch_size, ranks, recipe.accumulate_steps)
    batches.check_size(batch)
    batches.check_statistics(settings.model.bn_stats_batch, batch)
    return batch


def resolve_recipe(settings: Settings, ranks: int, train_examples: int) -> Resolved:
    """Return the recipe in steps for `ranks` ranks and `train_examples` images.

    Raises FlagError if it does not fit, DataError if there are fewer images than one step needs.
    """
    batch = resolve_batch(settings, ranks)
    if train_examples < batch.total:
        remedy = "--global_batch_size"
        if settings.recipe.global_batch_size is None:
            remedy = "--batch_size or --accumulate_steps, or use fewer ranks"
        raise DataError(
            f"{train_examples} training examples are fewer than one global batch of {batch.total}; lower {remedy}"
        )
    resolved = phases.resolve(
        settings.recipe.phases,
        train_examples=train_examples,
        global_batch_size=batch.total,
        lr_scaling=settings.recipe.lr_scaling,
        image_size=settings.data.image_size,
    )
    _check_mode(settings, resolved)
    return Resolved(resolved, batch)


def _check_mode(settings: Settings, resolved: Tuple[Phase, ...]) -> None:
    """Raise FlagError if the recipe lacks what the mode requires."""
    mode, members = settings.run.experiment, [phase.name for phase in resolved if phase.member]
    if mode == "collapsed_ensemble" and len(members) < 2:
        raise FlagError(
            f"--experiment={mode}: needs at least two members, the recipe has {len(members)}; mark phases with member=1"
        )
    steps = min(sum(phase.steps for phase in resolved), settings.run.max_steps or sys.maxsize)
    if mode == "scaling" and steps < UNTIMED_STEPS + 2:
        raise FlagError(
            f"--experiment={mode}: does not time the first {UNTIMED_STEPS} steps, but the run has only {steps}; train "
            f"for at least {UNTIMED_STEPS + 2} steps"
        )
    if mode == "lr_scaling" and not settings.run.eval_every_epochs:
        raise FlagError(f"--experiment={mode}: records top-1 over epochs; set --eval_every_epochs above 0")
