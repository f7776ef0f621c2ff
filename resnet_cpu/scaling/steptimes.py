"""Step times of a run: how each rank spends a step, and what all ranks together achieve.

Clocks of different hosts differ, so only durations are compared. A step ends with an allreduce, which all ranks leave
at the same time. Durations counted from the end of the previous step therefore share a common start:

    between   from the end of the previous step to the start of this one: rows of metrics.jsonl, the stop signal
    data      waiting for the next batch
    compute   forward and backward, up to this rank's last gradient; messages are sent meanwhile, on the same cores
    peers     from this rank's last gradient to that of the slowest rank
    messages  the rest: communication that the backward pass did not hide, and the update

They add up to the time from the end of one step to the end of the next, which is the same on all ranks.
"""

import os
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np

from resnet_cpu.resolve import UNTIMED_STEPS
from resnet_cpu.run.folder import read_json

PARTS = ("between", "data", "compute", "peers", "messages")
KEPT = 1000  # the latest steps that each rank remembers: 32 kB per rank, 100 MB on rank 0 for 3,000 ranks
BLOCKS = 20  # at most; consecutive steps are correlated, blocks of them much less
BINS = 30
DRAWS = 2000


def read(run_dir: str, ranks: int) -> Optional[Dict[str, Any]]:
    """Return the content of a run's scaling.json; None if it is missing, or of an attempt with other `ranks`."""
    found = read_json(os.path.join(run_dir, "scaling.json"))
    return found if found and len(found.get("ranks", [])) == ranks else None


class StepTimes:
    """Durations of this rank's latest steps, each from the end of the previous step to its own end."""

    def __init__(self) -> None:
        """Start without steps; the first `UNTIMED_STEPS` of them will not be kept."""
        self._untimed = UNTIMED_STEPS
        self._rows = np.zeros([KEPT, 4])
        self._numbers = np.zeros([KEPT], np.int64)
        self._count = 0
        self._previous_end: Optional[float] = None

    def pause(self) -> None:
        """Exclude the next step, because other work comes before it."""
        self._previous_end = None

    def add(self, step: int, started: float, data_s: float, update_s: float, step_s: float) -> None:
        """Record a step.

        `started` is in seconds of any clock. `step_s` is the whole duration, of which `data_s` was spent waiting for
        the batch and `update_s` after this rank's last gradient. The first step after the beginning or after a pause
        is not kept: it only gives the next one its start.
        """
        if self._previous_end is not None and self._untimed <= 0:
            compute_s = max(step_s - data_s - update_s, 0.0)
            row = started - self._previous_end, data_s, compute_s, step_s - data_s - compute_s
            self._rows[self._count % KEPT] = row
            self._numbers[self._count % KEPT] = step
            self._count += 1
        self._untimed -= 1
        self._previous_end = started + step_s

    def kept(self) -> Tuple[np.ndarray, np.ndarray]:
        """Return (step numbers [n], seconds [n, 4]) in order: between, data, compute, after the last gradient."""
        order = np.arange(max(self._count - KEPT, 0), self._count) % KEPT
        return self._numbers[order], self._rows[order]


def split(times: np.ndarray) -> Dict[str, np.ndarray]:
    """Return each part of `PARTS` as seconds [ranks, steps], from the kept times of all ranks [ranks, steps, 4].

    The slowest rank of a step does not wait. No rank waits longer than the time between its last gradient and its
    end: where the clocks say otherwise, the difference is noise.
    """
    between, data, compute, update = np.moveaxis(np.asarray(times, np.float64), -1, 0)
    ready = between + data + compute
    peers = np.clip(ready.max(0) - ready, 0.0, update)
    return dict(zip(PARTS, (between, data, compute, peers, update - peers)))


def own_work(parts: Dict[str, np.ndarray]) -> np.ndarray:
    """Return each rank's time from the end of the previous step to its last gradient, seconds [ranks, steps]."""
    return parts["between"] + parts["data"] + parts["compute"]


def summary(times: np.ndarray, images: int, hosts: Sequence[str]) -> Dict[str, Any]:
    """Return rate, interval, split and slowest rank of a run, as `result.json` holds them under `scaling`.

    `times` are seconds [ranks, steps, 4], `images` the global batch, `hosts` the host of each rank. The interval is the
    95 % percentile bootstrap of the rate over means of blocks of steps. `times_median` compares the slowest rank (host)
    with the median of all: the ratio of their median times to the last gradient.
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
    """Return each rank's split and the histogram of its time to the last gradient, over edges common to all ranks.

    `times` are seconds [ranks, steps, 4]. `last` is the share of steps in which the others waited for this rank. The
    outermost bins also hold the values beyond them.
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


def lines(timing: Dict[str, Any]) -> List[str]:
    """Return the lines that report a summary to the user."""
    step, rank, host = (timing[key] for key in ("step_s", "slowest_rank", "slowest_host"))
    rate = f"scaling: {timing['images_per_second']:.1f} images/s"
    if timing["interval"]:
        low, high = timing["interval"]
        rate += f" (95 % interval {low:.1f} ... {high:.1f})"
    rate += f", {timing['timed_steps']} timed steps; step time: median {1000 * step['median']:.1f} ms, "
    rate += f"10-90 % {1000 * step['p10']:.1f} ... {1000 * step['p90']:.1f} ms"
    shares = (f"{name} {100 * share:.1f} %" for name, share in shares_of(timing["split_s"]).items())
    report = [rate, f"shares of a step: {', '.join(shares)}"]
    if timing["ranks"] > 1:
        slowest = f"rank {rank['rank']} on {rank['host']}, {rank['times_median']:.3f} times the median rank"
        if timing["hosts"] > 1:
            slowest += f"; host {host['host']}, {host['times_median']:.3f} times the median host"
        report.append(f"slowest to its last gradient: {slowest}")
    return report


def shares_of(split_s: Dict[str, float]) -> Dict[str, float]:
    """Return each part's share of a step, as fractions that add up to 1."""
    whole = sum(split_s.values())
    return {name: split_s[name] / whole for name in PARTS}


def _percentiles(values: np.ndarray) -> Dict[str, float]:
    names = {"p10": 10, "median": 50, "p90": 90, "p95": 95}
    return dict(zip(names, np.percentile(values, list(names.values())).tolist()))


def rate_interval(images: int, block_s: np.ndarray) -> Optional[List[float]]:
    """Return the 95 % bootstrap interval of images/s over blocks of steps; None for a single block."""
    if len(block_s) < 2:
        return None
    draws = images / resampled_means(np.random.Generator(np.random.Philox(0)), block_s, [DRAWS])
    return [float(value) for value in np.percentile(draws, [2.5, 97.5])]


def resampled_means(generator: np.random.Generator, block_s: np.ndarray, shape: List[int]) -> np.ndarray:
    """Return means of bootstrap samples: `block_s` drawn with replacement, as an array of `shape`."""
    return generator.choice(np.asarray(block_s), [*shape, len(block_s)]).mean(-1)
