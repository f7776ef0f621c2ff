"""The order of examples: a pure function of (seed, step, global batch).

Position p of one endless stream holds example permutation(seed, p div M)[p mod M]; step t reads the positions
t*GB ... (t+1)*GB - 1, rank r its slice of them. So there is no shuffle buffer and no iterator state: resuming needs
only the step number, any number of ranks reads the same examples in step t, and no example is dropped at an epoch
border.
"""

import dataclasses
import functools
from typing import Tuple

import numpy as np


@functools.lru_cache(maxsize=2)  # a batch spans at most two epochs, since M < GB is refused
def permutation(seed: int, epoch: int, examples: int) -> np.ndarray:
    """Return the order of epoch `epoch`, int64 [examples]."""
    order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(examples)
    order.flags.writeable = False
    return order


def stream(seed: int, first: int, count: int, examples: int) -> Tuple[np.ndarray, np.ndarray]:
    """Return (example ids, their epochs), int64 [count] each, of `count` positions of the stream from `first`."""
    positions = np.arange(first, first + count)
    epochs = positions // examples
    within = positions % examples
    ids = np.empty(count, np.int64)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        ids[chosen] = permutation(seed, int(epoch), examples)[within[chosen]]
    return ids, epochs


@dataclasses.dataclass(frozen=True)
class Share:
    """The examples of one rank: its slice of the global batch of each step first_step ... last_step - 1.

    The slice is divided into `micro_batches` parts: k micro-batches of a rank are what k ranks would read.
    """

    seed: int
    examples: int  # in an epoch
    batch_size: int  # images of a micro-batch
    first_step: int
    last_step: int
    rank: int = 0
    ranks: int = 1
    micro_batches: int = 1  # per step

    @property
    def numbers(self) -> range:
        """The numbers of the micro-batches, counted from that of step 0."""
        return range(self.first_step * self.micro_batches, self.last_step * self.micro_batches)

    def batch(self, number: int) -> Tuple[np.ndarray, np.ndarray]:
        """Return (example ids, their epochs), int64 [batch_size] each, of micro-batch `number`."""
        step, part = divmod(number, self.micro_batches)
        first = ((step * self.ranks + self.rank) * self.micro_batches + part) * self.batch_size
        return stream(self.seed, first, self.batch_size, self.examples)


def _mix(state: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014)."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def draws(seed: int, epochs: np.ndarray, ids: np.ndarray, count: int) -> np.ndarray:
    """Return float32 [examples, count] uniform in [0, 1): the random numbers of each example in its epoch.

    They depend only on (seed, epoch, example id), so an augmentation is the same on any rank, batch and thread.
    """
    golden = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is intended
        key = _mix(np.full(len(ids), seed, np.uint64) + golden)
        key = _mix((key ^ epochs.astype(np.uint64)) + golden)
        key = _mix((key ^ ids.astype(np.uint64)) + golden)
        bits = _mix(key[:, None] + golden * np.arange(1, count + 1, dtype=np.uint64))
    return ((bits >> np.uint64(40)).astype(np.float64) * 2.0**-24).astype(np.float32)


def evaluation_steps(ranks: int, batch_size: int, examples: int) -> int:
    """Return the number of batches that every rank evaluates, the last ones padded."""
    return -(-examples // (ranks * batch_size))


def evaluation_batch(step: int, rank: int, ranks: int, batch_size: int, examples: int) -> Tuple[np.ndarray, np.ndarray]:
    """Return (example ids, weights) of one evaluation batch; padding repeats the last example with weight 0."""
    positions = (step * ranks + rank) * batch_size + np.arange(batch_size)
    return np.minimum(positions, examples - 1), (positions < examples).astype(np.int64)
