"""The batch: images per rank, micro-batches and the global batch, and how the learning rate scales with it."""

import math
from fractions import Fraction
from typing import NamedTuple, Optional

from resnet_cpu.errors import FlagError

REFERENCE_BATCH = 256  # images; the batch of `lr_per_256` (Goyal et al., arXiv 1706.02677)
DEFAULT_BATCH_PER_RANK = 32  # images; what the authors used on a socket in their recipe B
LEAST_FITTED = 8  # images per micro-batch that --accumulate_steps=0 chooses on its own
MOST_PER_RANK = 2**16  # images at a time: more exhaust the memory
SCALINGS = ("linear", "sqrt", "none")


def scaled_lr(lr_per_256: float, global_batch_size: int, scaling: str) -> float:
    """Return the peak LR for `global_batch_size` images from one given per 256 images."""
    ratio = global_batch_size / REFERENCE_BATCH
    if scaling == "linear":
        return lr_per_256 * ratio
    if scaling == "sqrt":
        return lr_per_256 * math.sqrt(ratio)
    if scaling == "none":
        return lr_per_256
    raise FlagError(f"--lr_scaling={scaling}: unknown rule; use one of {', '.join(SCALINGS)}")


class Batch(NamedTuple):
    """How the images of a step are divided among ranks and micro-batches."""

    per_rank: int  # images of a micro-batch
    accumulate_steps: int  # micro-batches of a rank in one update
    total: int  # images of a step: ranks * accumulate_steps * per_rank


def resolve_batch(
    batch_size: Optional[int], global_batch_size: Optional[int], ranks: int, accumulate_steps: int = 1
) -> Batch:
    """Return the batch from either size, or from both if they agree; raise FlagError otherwise.

    With `accumulate_steps` of 0 the number of micro-batches is chosen so that micro-batches of `batch_size` images
    (default: at most DEFAULT_BATCH_PER_RANK) make up the global batch.
    """
    if global_batch_size is None:
        per_rank, count = batch_size or DEFAULT_BATCH_PER_RANK, accumulate_steps or 1
        return Batch(per_rank, count, per_rank * count * ranks)
    flag = f"--global_batch_size={global_batch_size}"
    parts = ranks * (accumulate_steps or 1)
    if global_batch_size % parts:
        parts_text = f"{ranks} ranks" + (f" x {accumulate_steps} accumulated batches" if accumulate_steps > 1 else "")
        other = _ranks_that_fit(batch_size, global_batch_size, ranks, accumulate_steps)
        remedy = f"use {other}{', or ' if other else ''}a multiple of {parts} as the global batch"
        raise FlagError(f"{flag}: not divisible by {parts_text}; {remedy}")
    if accumulate_steps == 0:
        accumulate_steps = _fitting(batch_size, global_batch_size, ranks)
    per_rank = global_batch_size // (ranks * accumulate_steps)
    if batch_size is not None and batch_size != per_rank:
        raise FlagError(
            f"--batch_size={batch_size} (per rank) contradicts {flag} on {ranks} ranks, which is {per_rank} per rank; "
            "remove one of the two, correct it, or set --accumulate_steps=0 to use as many micro-batches as needed"
        )
    return Batch(per_rank, accumulate_steps, global_batch_size)


def _fitting(batch_size: Optional[int], global_batch_size: int, ranks: int) -> int:
    """Return the number of micro-batches that make up a rank's part of the global batch, which `ranks` divide."""
    part = global_batch_size // ranks
    size = _micro_batch(batch_size, part)
    if size is None:
        sizes = batch_size or f"{LEAST_FITTED} to {DEFAULT_BATCH_PER_RANK}"
        other = _ranks_that_fit(batch_size, global_batch_size, ranks, 0)
        raise FlagError(
            f"--global_batch_size={global_batch_size}: cannot be divided into {ranks} ranks x {sizes} images at a "
            f"time; give another --batch_size{f', or use {other}' if other else ''}"
        )
    return part // size


def _micro_batch(batch_size: Optional[int], part: int) -> Optional[int]:
    """Return how many images at a time make up the `part` of a rank, `batch_size` if given; None if none does."""
    least = min(LEAST_FITTED, part)  # batch norm over fewer images only if --batch_size asks for it
    sizes = range(min(DEFAULT_BATCH_PER_RANK, part), least - 1, -1) if batch_size is None else [batch_size]
    return next((size for size in sizes if part % size == 0), None)


def _ranks_that_fit(batch_size: Optional[int], global_batch_size: int, ranks: int, accumulate_steps: int) -> str:
    """Return the numbers of ranks next to `ranks`, below and above, on which the batch can be resolved; or nothing."""

    def fits(number: int) -> bool:
        part, rest = divmod(global_batch_size, number * (accumulate_steps or 1))
        if rest:
            return False
        if not accumulate_steps:
            return _micro_batch(batch_size, part) is not None
        return batch_size in (None, part) and part <= MOST_PER_RANK

    most = min(4 * ranks, global_batch_size)
    below = next((number for number in range(min(ranks - 1, most), 0, -1) if fits(number)), None)
    above = next((number for number in range(ranks + 1, most + 1) if fits(number)), None)
    found = [str(number) for number in (below, above) if number is not None]
    return f"{' or '.join(found)} rank{'s' * (found != ['1'])}" if found else ""


def check_size(batch: Batch) -> None:
    """Raise FlagError if a rank would hold more images at a time than can be meant."""
    if batch.per_rank > MOST_PER_RANK:
        raise FlagError(
            f"--global_batch_size={batch.total}: {batch.per_rank:,} images per rank at a time, at most "
            f"{MOST_PER_RANK:,} are allowed; use more ranks, or --accumulate_steps=0"
        )


def check_statistics(bn_stats_batch: Optional[int], batch: Batch) -> None:
    """Raise FlagError if `bn_stats_batch` images, over which batch norm takes statistics, do not divide the batch."""
    if bn_stats_batch is not None and batch.per_rank % bn_stats_batch:
        raise FlagError(
            f"--bn_stats_batch={bn_stats_batch}: does not divide the {batch.per_rank} images of a rank's batch; use a "
            "divisor or another --batch_size"
        )


def epochs_to_steps(epochs: float, train_examples: int, global_batch_size: int) -> int:
    """Return the steps nearest to `epochs` passes over the training examples (the only such conversion)."""
    return round(epochs * train_examples / global_batch_size)


def intervals(images: int, train_examples: int, epochs: float) -> int:
    """Return how often `epochs` passes over the training examples are completed after `images` images; 0 for no epochs.

    In fractions: as floats, 0.3 // 0.1 is 2.
    """
    interval = Fraction(str(epochs)) * train_examples
    return images // interval if interval else 0
