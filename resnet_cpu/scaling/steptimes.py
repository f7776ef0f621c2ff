"""What a rank's own clock says of its steps, and what all ranks' clocks together say of scaling.

Clocks of ranks differ, so only durations are compared. A step ends with an allreduce, which all ranks leave together;
so durations counted from the end of the step before have a common start:

    between   from the end of the step before to the start of this one: rows of metrics.jsonl, the stop signal
    data      waiting for the next batch
    compute   forward and backward, up to this rank's last gradient; messages go on beside it, on the same cores
    peers     from this rank's last gradient to that of the slowest rank
    messages  what is left: messages that the backward pass did not hide, and the update

Their sum is the time from the end of one step to the end of the next, which is the same on all ranks.
"""

import dataclasses
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from resnet_cpu.errors import DataError

PARTS = ("between", "data", "compute", "peers", "messages")
KEPT = 1000  # steps that a rank remembers, the latest; 32 kB a rank, and at 3,000 ranks 100 MB on rank 0
BLOCKS = 20  # at most; steps in a row are alike, blocks of them much less so
BINS = 30
DRAWS = 2000


class StepTimes:
    """Durations of this rank's latest steps, from the end of one to the end of the next."""

    def __init__(self, untimed: int) -> None:
        """Keep steps after the first `untimed` ones."""
        self._untimed = untimed
        self._rows = np.zeros([KEPT, 4])
        self._numbers = np.zeros([KEPT], np.int64)
        self._count = 0
        self._left: Optional[float] = None

    def pause(self) -> None:
        """Say that something else comes before the next step, which therefore does not count."""
        self._left = None

    def add(self, step: int, started: float, data_s: float, update_s: float, step_s: float) -> None:
        """Note a step: when it started, and the seconds it took, of which waiting for data and after its last gradient.

        The first step after the beginning or a pause only gives the next one its start.
        """
        if self._left is not None and self._untimed <= 0:
            compute_s = max(step_s - data_s - update_s, 0.0)
            self._rows[self._count % KEPT] = started - self._left, data_s, compute_s, step_s - data_s - compute_s
            self._numbers[self._count % KEPT] = step
            self._count += 1
        self._untimed -= 1
        self._left = started + step_s

    def kept(self) -> Tuple[np.ndarray, np.ndarray]:
        """Return (steps [n], seconds [n, 4]: between, data, compute, after the last gradient) in their order."""
        order = np.arange(max(self._count - KEPT, 0), self._count) % KEPT
        return self._numbers[order], self._rows[order]


def split(times: np.ndarray) -> Dict[str, np.ndarray]:
    """Return the parts of each step, seconds [ranks, steps], from what the ranks kept: [ranks, steps, 4].

    The slowest rank of a step waits for nobody. No rank waits longer than it was between its last gradient and its end:
    where clocks or the leaving of the allreduce say otherwise, that is noise.
    """
    between, data, compute, update = np.moveaxis(np.asarray(times, np.float64), -1, 0)
    ready = between + data + compute
    peers = np.clip(ready.max(0) - ready, 0.0, update)
    return dict(zip(PARTS, (between, data, compute, peers, update - peers)))


def own_work(parts: Dict[str, np.ndarray]) -> np.ndarray:
    """Return how long each rank's peers had to wait for its last gradient, seconds [ranks, steps]."""
    return parts["between"] + parts["data"] + parts["compute"]


def summary(times: np.ndarray, images: int, hosts: Sequence[str]) -> Dict[str, Any]:
    """Return what the steps [ranks, steps, 4] say of a run of `images` a step: rate, interval, split, the slowest.

    The rate's interval is the 95 % percentile bootstrap over means of blocks of steps. `times_median` says how much
    longer than the median of all ranks (hosts) the slowest takes to its last gradient, in the median of its steps.
    """
    parts = split(times)
    step_s = np.stack(list(parts.values())).sum(0).mean(0)
    block_s = np.array([block.mean() for block in np.array_split(step_s, min(BLOCKS, len(step_s)))])
    medians = np.median(own_work(parts), axis=1)
    rank = int(medians.argmax())
    by_host = {
        host: float(np.median(own_work(parts)[[name == host for name in hosts]])) for host in dict.fromkeys(hosts)
    }
    host = max(by_host, key=lambda name: by_host[name])
    return {
        "images_per_second": images / step_s.mean(),
        "interval": rate_interval(images, block_s),
        "images_per_second_sd": float(np.std(images / step_s, ddof=1)) if len(step_s) > 1 else None,
        "images_per_second_per_rank": images / step_s.mean() / len(times),
        "ranks": len(times),
        "timed_steps": len(step_s),
        "step_s": {"mean": float(step_s.mean()), **_percentiles(step_s)},
        "split_s": {name: float(part.mean()) for name, part in parts.items()},
        "slowest_rank": {"rank": rank, "host": hosts[rank], "times_median": medians[rank] / np.median(medians)},
        "slowest_host": {"host": host, "times_median": by_host[host] / np.median(list(by_host.values()))},
        "hosts": len(by_host),
        "block_s": [float(value) for value in block_s],
    }


def per_rank(times: np.ndarray, hosts: Sequence[str]) -> Dict[str, Any]:
    """Return the histograms of each rank's time to its last gradient, over edges that all share, and its split.

    `last` is the share of steps in which the others waited for this rank. The outermost bins hold what lies beyond.
    """
    parts = split(times)
    work = own_work(parts)
    low, high = np.percentile(work, [0, 99.5])
    edges = np.linspace(low, max(high, low + 1e-6), BINS + 1)
    last = np.bincount(work.argmax(0), minlength=len(work)) / work.shape[1]
    return {
        "edges_s": edges.tolist(),
        "ranks": [
            {
                "rank": rank,
                "host": hosts[rank],
                "own_work_s": _percentiles(work[rank]),
                "last": float(last[rank]),
                "split_s": {name: float(part[rank].mean()) for name, part in parts.items()},
                "histogram": np.histogram(np.clip(work[rank], edges[0], edges[-1]), edges)[0].tolist(),
            }
            for rank in range(len(work))
        ],
    }


def lines(found: Dict[str, Any]) -> List[str]:
    """Return what a person wants to see of a summary."""
    step, shares, rank, host = (found[key] for key in ("step_s", "split_s", "slowest_rank", "slowest_host"))
    low, high = found["interval"] or (None, None)
    told = [
        f"scaling: {found['images_per_second']:.1f} images/s"
        + ("" if low is None else f" (95 % interval {low:.1f} ... {high:.1f})")
        + f", {found['timed_steps']} steps timed; a step: median {1000 * step['median']:.1f} ms, "
        f"10-90 % {1000 * step['p10']:.1f} ... {1000 * step['p90']:.1f} ms",
        "of a step: " + ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares_of(shares).items()),
    ]
    if found["ranks"] > 1:
        slowest = f"rank {rank['rank']} on {rank['host']}, {rank['times_median']:.3f} times the median rank"
        if found["hosts"] > 1:
            slowest += f"; host {host['host']}, {host['times_median']:.3f} times the median host"
        told.append(f"slowest to its last gradient: {slowest}")
    return told


def shares_of(split_s: Dict[str, float]) -> Dict[str, float]:
    """Return each part's share of a step."""
    whole = sum(split_s.values())
    return {name: split_s[name] / whole for name in PARTS}


def _percentiles(values: np.ndarray) -> Dict[str, float]:
    names = {"p10": 10, "median": 50, "p90": 90, "p95": 95}
    return dict(zip(names, np.percentile(values, list(names.values())).tolist()))


def rate_interval(images: int, block_s: np.ndarray) -> Optional[List[float]]:
    """Return the 95 % bootstrap interval of images/s over blocks of steps; None for a single block."""
    if len(block_s) < 2:
        return None
    draws = images / _means(np.random.Generator(np.random.Philox(0)), block_s, [DRAWS])
    return [float(value) for value in np.percentile(draws, [2.5, 97.5])]


def _means(generator: np.random.Generator, block_s: np.ndarray, shape: List[int]) -> np.ndarray:
    """Return means of `block_s` drawn anew with replacement, of `shape`."""
    return generator.choice(np.asarray(block_s), [*shape, len(block_s)]).mean(-1)


# --- ladders -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Run:
    """A run as a rung of a ladder. Runs of one `batch` were made together, so their ratios are those of one machine."""

    name: str
    batch: str
    ranks: int
    hosts: int
    images: int  # of a step, all ranks
    block_s: Tuple[float, ...]  # seconds of a step, means of blocks of steps
    split_s: Dict[str, float]
    alike: Dict[str, str]  # what runs must have in common to be compared

    @property
    def rate(self) -> float:
        return self.images / float(np.mean(self.block_s))


class Rung(NamedTuple):
    """What the runs of so many ranks came to, against the base of their own batches."""

    ranks: int
    hosts: int
    images: int  # of a step
    runs: int
    rate: float  # images/s, mean over runs
    rate_sd: Optional[float]  # over runs
    times: float  # the base's rate, mean over batches
    efficiency: float  # times / (ranks / ranks of the base)
    interval: Optional[Tuple[float, float]]  # 95 %, of the efficiency; None for the base itself
    shares: Dict[str, float]  # of a step


def kind(runs: Sequence[Run]) -> str:
    """Return `weak` (as many images a rank on every rung), `strong` (as many in all), or `` for a single rung.

    Raises DataError for a ladder that is neither.
    """
    if len({run.ranks for run in runs}) == 1 and len({run.images for run in runs}) == 1:
        return ""
    if len({run.images / run.ranks for run in runs}) == 1:
        return "weak"
    if len({run.images for run in runs}) == 1:
        return "strong"
    sizes = ", ".join(f"{run.name}: {run.images} on {run.ranks}" for run in runs)
    raise DataError(f"neither images a rank nor images a step are the same in all runs of a ladder ({sizes})")


def ladder(runs: Sequence[Run]) -> List[Rung]:
    """Return the rungs of a ladder, the fewest ranks first: the base.

    Efficiency is the mean over batches of rate(N) / rate(base) * ranks(base) / N; a rate is compared only with the base
    of its own batch. Its interval is the 95 % percentile bootstrap over batches and, in them, over blocks of steps.
    Raises DataError for runs that are not alike, for a batch without the base, and for one that holds a rung twice.
    """
    _check_comparable(runs)
    kind(runs)
    fewest = min(run.ranks for run in runs)
    bases = {run.batch: run for run in runs if run.ranks == fewest}
    rungs = []
    for ranks in sorted({run.ranks for run in runs}):
        here = [run for run in runs if run.ranks == ranks]
        for run in here:
            if run.batch not in bases:
                raise DataError(
                    f"{run.name}: no run on {fewest} ranks, the base, in its batch {run.batch or '.'}; run it again "
                    "with the others, or take the run out"
                )
        rates = [run.rate for run in here]
        times = float(np.mean([run.rate / bases[run.batch].rate for run in here]))
        factor = fewest / ranks
        interval = None if ranks == fewest else _ratio_interval([(run, bases[run.batch]) for run in here])
        rungs.append(
            Rung(
                ranks=ranks,
                hosts=here[0].hosts,
                images=here[0].images,
                runs=len(here),
                rate=float(np.mean(rates)),
                rate_sd=float(np.std(rates, ddof=1)) if len(rates) > 1 else None,
                times=times,
                efficiency=times * factor,
                interval=interval and (interval[0] * factor, interval[1] * factor),
                shares={
                    name: float(np.mean([shares_of(run.split_s)[name] for run in here])) for name in here[0].split_s
                },
            )
        )
    return rungs


def _check_comparable(runs: Sequence[Run]) -> None:
    for key in runs[0].alike:
        if len({run.alike[key] for run in runs}) > 1:
            told = ", ".join(f"{run.name}: {run.alike[key]}" for run in runs)
            raise DataError(f"the runs of a ladder differ in {key} ({told}); keep others in folders of their own")
    seen = set()
    for run in runs:
        if (run.batch, run.ranks) in seen:
            raise DataError(
                f"{run.name}: a second run on {run.ranks} ranks in batch {run.batch or '.'}; keep repetitions in "
                "folders of their own, each with its base"
            )
        seen.add((run.batch, run.ranks))
    if len({(run.ranks, run.hosts) for run in runs}) > len({run.ranks for run in runs}):
        told = ", ".join(f"{run.name}: {run.ranks} on {run.hosts}" for run in runs)
        raise DataError(f"as many ranks on other numbers of hosts in one ladder ({told}); keep them apart")


def _ratio_interval(pairs: Sequence[Tuple[Run, Run]]) -> Tuple[float, float]:
    """Return the 95 % interval of the mean over `pairs` (run, its base) of their rates' ratio."""
    generator, count = np.random.Generator(np.random.Philox(0)), len(pairs)
    ratios = np.stack(
        [
            (run.images / _means(generator, np.array(run.block_s), [DRAWS, count]))
            / (base.images / _means(generator, np.array(base.block_s), [DRAWS, count]))
            for run, base in pairs
        ]
    )
    chosen = generator.integers(0, count, [1, DRAWS, count])
    low, high = np.percentile(np.take_along_axis(ratios, chosen, 0)[0].mean(1), [2.5, 97.5])
    return float(low), float(high)
