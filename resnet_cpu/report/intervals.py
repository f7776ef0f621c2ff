"""Means over seeds, with their 95 % intervals."""

import math
import statistics
from typing import NamedTuple, Optional, Sequence

from resnet_cpu.text import HUGE

# Student's t: half of a 95 % interval of a mean of n values, in standard errors.
_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


class Interval(NamedTuple):
    """A mean over `n` seeds, with its standard deviation and 95 % interval (None for a single seed)."""

    n: int
    mean: float
    sd: Optional[float]
    low: Optional[float]
    high: Optional[float]

    def bounded(self, digits: int, sign: str = "+") -> str:
        """Return the mean, with its sign, and the interval, as in `+1.33 (-0.10 ... +2.77)`; sign="" for ratios."""
        mean, *ends = (value if value is None else fixed(value, digits, sign) for value in (self.mean, *self[3:]))
        return str(mean) if None in ends else f"{mean} ({ends[0]} ... {ends[1]})"

    def spread(self, digits: int) -> str:
        """Return the mean and the standard deviation, as in `22.64 ± 0.31`."""
        shape = f".{digits}f" if abs(self.mean) < HUGE else ".1e"  # the loss of a training that failed
        return f"{self.mean:{shape}}" if self.sd is None else f"{self.mean:{shape}} ± {self.sd:{shape}}"


def fixed(value: float, digits: int, sign: str = "+") -> str:
    """Return a number with its sign and `digits` digits after the point; a zero is never negative."""
    return f"{round(value, digits) + 0.0:{sign}.{digits}f}"


def interval(values: Sequence[float]) -> Interval:
    """Return the mean of `values` over seeds, with the interval of Student's t."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return Interval(1, mean, None, None, None)
    sd = statistics.stdev(values)
    half = _T[min(len(values), max(_T))] * sd / math.sqrt(len(values))
    return Interval(len(values), mean, sd, mean - half, mean + half)
