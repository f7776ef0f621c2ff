"""Scaling ladders: runs of one experiment on growing numbers of ranks, and their efficiency."""

import dataclasses
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from resnet_cpu.errors import DataError
from resnet_cpu.scaling.steptimes import DRAWS, resampled_means, shares_of


@dataclasses.dataclass(frozen=True)
class LadderRun:
    """One run of a ladder. Runs of one `batch` were made together, so their ratios are those of one machine."""

    name: str
    batch: str
    ranks: int
    hosts: int
    images: int  # global batch
    block_s: Tuple[float, ...]  # step time, seconds: means over blocks of steps
    split_s: Dict[str, float]  # step time by part, seconds
    conditions: Dict[str, str]  # must be equal for runs to be compared, such as code and processor

    @property
    def rate(self) -> float:
        """Return images/s."""
        return self.images / float(np.mean(self.block_s))


class Rung(NamedTuple):
    """The runs on one number of ranks, compared with the base runs of their own batches."""

    ranks: int
    hosts: int
    images: int  # global batch
    runs: int
    rate: float  # images/s, mean over runs
    rate_sd: Optional[float]  # standard deviation over runs; None for a single run
    speedup: float  # rate / rate of the base, mean over batches
    efficiency: float  # speedup / (ranks / ranks of the base)
    interval: Optional[Tuple[float, float]]  # 95 % interval of the efficiency; None for the base itself
    shares: Dict[str, float]  # of a step, by part


def kind(runs: Sequence[LadderRun]) -> str:
    """Return `weak` (constant images per rank), `strong` (constant global batch), or an empty string for one rung.

    Raises DataError for a ladder that is neither.
    """
    if len({run.ranks for run in runs}) == 1 and len({run.images for run in runs}) == 1:
        return ""
    if len({run.images / run.ranks for run in runs}) == 1:
        return "weak"
    if len({run.images for run in runs}) == 1:
        return "strong"
    sizes = ", ".join(f"{run.name}: {run.images} on {run.ranks}" for run in runs)
    raise DataError(
        f"the runs of this ladder have neither the same images per rank nor the same global batch ({sizes}); "
        "move the runs that do not belong to it to other folders"
    )


def ladder(runs: Sequence[LadderRun]) -> List[Rung]:
    """Return the rungs of a ladder, fewest ranks first: the base.

    Efficiency is the mean over batches of rate(N) / rate(base) * ranks(base) / N. A rate is compared only with the base
    of its own batch. Its interval is the 95 % percentile bootstrap over batches and, within them, over blocks of steps.
    Raises DataError for runs under different conditions, for a batch without a base, and for a batch with two runs on
    the same number of ranks.
    """
    _check_comparable(runs)
    kind(runs)
    fewest = min(run.ranks for run in runs)
    bases = {run.batch: run for run in runs if run.ranks == fewest}
    for run in runs:
        if run.batch not in bases:
            raise DataError(
                f"{run.name}: its batch {run.batch or '.'} has no run on {fewest} ranks, the base; repeat it together "
                "with its base, or remove it"
            )
    numbers = sorted({run.ranks for run in runs})
    return [_rung([(run, bases[run.batch]) for run in runs if run.ranks == ranks]) for ranks in numbers]


def _rung(pairs: Sequence[Tuple[LadderRun, LadderRun]]) -> Rung:
    """Return the rung of `pairs` (run, its base), all on the same number of ranks."""
    first, base = pairs[0]
    rates = [run.rate for run, _ in pairs]
    speedup = float(np.mean([run.rate / base.rate for run, base in pairs]))
    factor = base.ranks / first.ranks
    interval = None if first.ranks == base.ranks else _ratio_interval(pairs)
    return Rung(
        ranks=first.ranks,
        hosts=first.hosts,
        images=first.images,
        runs=len(pairs),
        rate=float(np.mean(rates)),
        rate_sd=float(np.std(rates, ddof=1)) if len(rates) > 1 else None,
        speedup=speedup,
        efficiency=speedup * factor,
        interval=interval and (interval[0] * factor, interval[1] * factor),
        shares={name: float(np.mean([shares_of(run.split_s)[name] for run, _ in pairs])) for name in first.split_s},
    )


def _check_comparable(runs: Sequence[LadderRun]) -> None:
    for key in runs[0].conditions:
        if len({run.conditions[key] for run in runs}) > 1:
            values = ", ".join(f"{run.name}: {run.conditions[key]}" for run in runs)
            raise DataError(f"the runs of a ladder differ in {key} ({values}); move the others to separate folders")
    seen = set()
    for run in runs:
        if (run.batch, run.ranks) in seen:
            raise DataError(
                f"{run.name}: a second run on {run.ranks} ranks in batch {run.batch or '.'}; put each repetition into "
                "its own folder, together with its base"
            )
        seen.add((run.batch, run.ranks))
    if len({(run.ranks, run.hosts) for run in runs}) > len({run.ranks for run in runs}):
        places = ", ".join(f"{run.name}: {run.ranks} on {run.hosts}" for run in runs)
        raise DataError(
            f"runs of a ladder have the same number of ranks on different numbers of hosts ({places}); move the others "
            "to separate folders"
        )


def _ratio_interval(pairs: Sequence[Tuple[LadderRun, LadderRun]]) -> Tuple[float, float]:
    """Return the 95 % interval of the mean over `pairs` (run, its base) of the ratio of their rates."""
    generator, count = np.random.Generator(np.random.Philox(0)), len(pairs)
    ratios = np.stack(
        [
            (run.images / resampled_means(generator, np.array(run.block_s), [DRAWS, count]))
            / (base.images / resampled_means(generator, np.array(base.block_s), [DRAWS, count]))
            for run, base in pairs
        ]
    )
    chosen = generator.integers(0, count, [1, DRAWS, count])
    low, high = np.percentile(np.take_along_axis(ratios, chosen, 0)[0].mean(1), [2.5, 97.5])
    return float(low), float(high)
