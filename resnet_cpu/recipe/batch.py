"""From batch sizes to learning rates: who holds how many images, and what that does to the LR."""

import math
from typing import NamedTuple, Optional

from resnet_cpu.errors import FlagError

REFERENCE_BATCH = 256  # images; the batch that `lr_per_256` speaks of (Goyal et al., arXiv 1706.02677)
DEFAULT_BATCH_PER_RANK = 32  # images; what the authors used on a socket in their recipe B
LEAST_FITTED = 8  # images at a time that --accumulate_steps=0 chooses by itself
SCALINGS = ("linear", "sqrt", "none")


def scaled_lr(lr_per_256: float, global_batch_size: int, scaling: str) -> float:
    """Return the peak LR for `global_batch_size` images from one stated per 256 images."""
    ratio = global_batch_size / REFERENCE_BATCH
    if scaling == "linear":
        return lr_per_256 * ratio
    if scaling == "sqrt":
        return lr_per_256 * math.sqrt(ratio)
    if scaling == "none":
        return lr_per_256
    raise FlagError(f"--lr_scaling={scaling}: unknown rule; use one of {', '.join(SCALINGS)}")


class Batch(NamedTuple):
    """Who holds how many images of a step."""

    per_rank: int  # images that a rank holds at a time: a micro-batch
    accumulate_steps: int  # micro-batches that a rank sums up before an update
    total: int  # images of a step: ranks * accumulate_steps * per_rank


def resolve_batch(
    batch_size: Optional[int], global_batch_size: Optional[int], ranks: int, accumulate_steps: int = 1
) -> Batch:
    """Return the batch from either flag, or from both where they agree.

    `accumulate_steps` of 0 is as many as it takes to make the global batch of micro-batches of `batch_size` images
    (default: at most DEFAULT_BATCH_PER_RANK).
    """
    if global_batch_size is None:
        per_rank, count = batch_size or DEFAULT_BATCH_PER_RANK, accumulate_steps or 1
        return Batch(per_rank, count, per_rank * count * ranks)
    told = f"--global_batch_size={global_batch_size}"
    if accumulate_steps == 0:
        accumulate_steps = _fitting(batch_size, global_batch_size, ranks)
    parts = ranks * accumulate_steps
    if global_batch_size % parts:
        of = f"{ranks} ranks" + (f" x {accumulate_steps} accumulated batches" if accumulate_steps > 1 else "")
        raise FlagError(f"{told}: not divisible by {of}; use a multiple of {parts} or another number of ranks")
    per_rank = global_batch_size // parts
    if batch_size is not None and batch_size != per_rank:
        raise FlagError(
            f"--batch_size={batch_size} (per rank) contradicts {told} on {ranks} ranks, which is {per_rank} per rank; "
            "leave one of the two out, give another, or let --accumulate_steps=0 sum up as many batches as it takes"
        )
    return Batch(per_rank, accumulate_steps, global_batch_size)


def _fitting(batch_size: Optional[int], global_batch_size: int, ranks: int) -> int:
    """Return how many micro-batches make up a rank's part of the global batch."""
    part, left = divmod(global_batch_size, ranks)
    if batch_size is None and not left:
        least = min(LEAST_FITTED, part)  # batch norm over fewer images is a choice for --batch_size to make
        sizes = range(min(DEFAULT_BATCH_PER_RANK, part), least - 1, -1)
        batch_size = next((size for size in sizes if part % size == 0), None)
    if left or batch_size is None or part % batch_size:
        raise FlagError(
            f"--global_batch_size={global_batch_size}: cannot be made of {ranks} ranks x "
            f"{batch_size or f'{LEAST_FITTED} to {DEFAULT_BATCH_PER_RANK}'} images at a time; give another "
            "--batch_size or use another number of ranks"
        )
    return part // batch_size


def check_statistics(bn_stats_batch: Optional[int], batch: Batch) -> None:
    """Raise FlagError if batch norm cannot take its statistics of `bn_stats_batch` images at a time."""
    if bn_stats_batch is not None and batch.per_rank % bn_stats_batch:
        raise FlagError(
            f"--bn_stats_batch={bn_stats_batch}: does not divide the {batch.per_rank} images that a rank holds; use a "
            "divisor of it or another --batch_size"
        )


def epochs_to_steps(epochs: float, train_examples: int, global_batch_size: int) -> int:
    """Return the steps nearest to `epochs` passes over the training examples (the one conversion there is)."""
    return round(epochs * train_examples / global_batch_size)
