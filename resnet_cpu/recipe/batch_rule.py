"""From batch sizes to learning rates: who holds how many images, and what that does to the LR."""

import math
from typing import Optional, Tuple

from resnet_cpu.errors import FlagError

REFERENCE_BATCH = 256  # images; the batch that `lr_per_256` speaks of (Goyal et al., arXiv 1706.02677)
DEFAULT_BATCH_PER_RANK = 32  # images; what the authors used on a socket in their recipe B
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


def resolve_batch(batch_size: Optional[int], global_batch_size: Optional[int], ranks: int) -> Tuple[int, int]:
    """Return (images per rank, images in all) from either flag, or from both where they agree."""
    if global_batch_size is not None:
        if global_batch_size % ranks:
            raise FlagError(
                f"--global_batch_size={global_batch_size}: not divisible by {ranks} ranks; "
                f"use a multiple of {ranks} or another number of ranks"
            )
        per_rank = global_batch_size // ranks
        if batch_size is not None and batch_size != per_rank:
            raise FlagError(
                f"--batch_size={batch_size} (per rank) contradicts --global_batch_size={global_batch_size} on {ranks} "
                f"ranks, which is {per_rank} per rank; leave one of the two out"
            )
        return per_rank, global_batch_size
    per_rank = DEFAULT_BATCH_PER_RANK if batch_size is None else batch_size
    return per_rank, per_rank * ranks


def epochs_to_steps(epochs: float, train_examples: int, global_batch_size: int) -> int:
    """Return the steps nearest to `epochs` passes over the training examples (the one conversion there is)."""
    return round(epochs * train_examples / global_batch_size)
