"""Where ensembles begin to pay: an ensemble beside one model of the same budget, over the amount of training data.

With G, how much better an ensemble is than its members on average, and D, how much better one model with the whole
budget is than these members, the ensemble wins if and only if G > D. docs/ensemble.md explains both.

Runs are rows of runs.csv named border/SETTING-IMAGES/ARM/seed-N; `half` and `one` are single models with half of the
budget and all of it, `one_collapse` is another one with all of it. All other arms are ensembles. `average_ARM` has the
averaged weights of the members of an ensemble.
"""

import math
import statistics
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

from resnet_cpu.report.tables import Row, Table, cell, origin
from resnet_cpu.text import count

SINGLES = ("one", "one_collapse")
SETTINGS = {
    "tiny": "half of Tiny-ImageNet",
    "wide": "the same, twice the width",
    "cifar": "CIFAR-10",
}
ENSEMBLES = {
    "late_36": "late, restarts at 36 %",
    "late_100": "late, restarts at 100 %",
    "published": "as published",
    "independent": "three networks of a third",
}
# Student's t: half of a 95 % interval of a mean of n values, in standard errors.
_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
_COLUMNS = (
    *("setting", "images", "arm", "n", "members", "members_sd", "ensemble", "ensemble_sd", "single", "one", "one_sd"),
    *("slope", "G", "D", "disagreement", "difference", "low", "high", "predicted", "loss_difference", "loss_low"),
    *("loss_high", "ece", "ece_scaled", "one_ece", "one_ece_scaled"),
)


class Interval(NamedTuple):
    """A mean over seeds, with its standard deviation and 95 % interval (None for a single seed)."""

    mean: float
    sd: Optional[float]
    low: Optional[float]
    high: Optional[float]


def interval(values: Sequence[float]) -> Interval:
    """Return the mean of `values` over seeds, with the interval of Student's t."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return Interval(mean, None, None, None)
    sd = statistics.stdev(values)
    half = _T[min(len(values), max(_T))] * sd / math.sqrt(len(values))
    return Interval(mean, sd, mean - half, mean + half)


class Place(NamedTuple):
    """Where a run belongs: `border/SETTING-IMAGES/ARM/seed-N`."""

    setting: str
    images: int
    arm: str


Arms = Dict[Place, Dict[str, Dict[str, Row]]]  # the rows of each place by seed and by what they score


def tables(runs: Iterable[Row], predictions: Sequence[Row]) -> Dict[str, Table]:
    """Return the table `border`, a row for each setting, number of images and ensemble; {} without such runs."""
    arms = by_place(runs)
    found = (_figures(place, arms, predictions) for place in sorted(arms) if place.arm in ENSEMBLES)
    rows = [row for row in found if row]
    if not rows:
        return {}
    note = (
        "Top-1 in %, differences in points; mean ± standard deviation over n seeds. `one model` is the better of two, "
        "with and without a collapse. In brackets: 95 % interval of the mean of the paired differences (Student's t). "
        f"{origin_of(arms)}"
    )
    return {"border": Table(_columns(rows), note, [_as_text(row) for row in rows], _COLUMNS)}


def origin_of(arms: Arms) -> str:
    """Return the end of a note: the machines and versions that all runs of this study come from."""
    used = [row for seeds in arms.values() for rows in seeds.values() for row in rows.values()]
    machines = [f"{row['cpu']}, {count(row['ranks'], 'rank')}, {count(row['cores'], 'core')}" for row in used]
    return origin(used, machines)


def holds(run: Row) -> bool:
    """Return whether a row of runs.csv belongs to this study."""
    return run["run"].startswith("border/")


def by_place(runs: Iterable[Row]) -> Arms:
    """Return for each place the rows of each seed, by what they score."""
    found: Arms = {}
    for row in runs:
        parts = row["run"].split("/")
        if holds(row) and len(parts) == 4:
            setting, _, images = parts[1].rpartition("-")
            if not images.isdigit():
                continue  # a run of the user's own
            found.setdefault(Place(setting, int(images), parts[2]), {}).setdefault(parts[3], {})[row["what"]] = row
    return found


def scores_of(arms: Arms, place: Place, what: str, key: str) -> Dict[str, float]:
    """Return a score of an arm by seed; of a single model, `ensemble` is that of its only member."""
    return {seed: float(rows[what][key]) for seed, rows in arms.get(place, {}).items() if what in rows}


def members_of(rows: Dict[str, Row]) -> float:
    """Return the mean top-1 of the members of an ensemble, from its rows by what they score."""
    return statistics.mean(float(row["top1"]) for what, row in rows.items() if what.startswith("member:"))


def best_single(arms: Arms, place: Place) -> Optional[str]:
    """Return the arm of SINGLES with the best mean in the setting of `place`; None if none was run."""
    means = {}
    for arm in SINGLES:
        scores = scores_of(arms, place._replace(arm=arm), "ensemble", "top1")
        if scores:
            means[arm] = statistics.mean(scores.values())
    return max(means, key=lambda arm: means[arm]) if means else None


def slope(arms: Arms, place: Place) -> Optional[float]:
    """Return how many points one model gains by a doubling of the budget, from half of it to all of it."""
    half, one = (scores_of(arms, place._replace(arm=arm), "ensemble", "top1") for arm in ("half", "one"))
    seeds = sorted(set(half) & set(one))
    return 100 * statistics.mean(one[seed] - half[seed] for seed in seeds) if seeds else None


class Pairs(NamedTuple):
    """Top-1 of an ensemble and of a single model, in percent, for each seed that has both."""

    seeds: List[str]
    members: List[float]  # means over the members
    ensemble: List[float]
    single: List[float]


def pairs_of(place: Place, single: str, arms: Arms) -> Pairs:
    alone, here = (scores_of(arms, place._replace(arm=arm), "ensemble", "top1") for arm in (single, place.arm))
    seeds = sorted(set(alone) & set(here))
    members = [100 * members_of(arms[place][seed]) for seed in seeds]
    return Pairs(seeds, members, *([100 * scores[seed] for seed in seeds] for scores in (here, alone)))


def _figures(place: Place, arms: Arms, predictions: Sequence[Row]) -> Optional[Dict[str, Any]]:
    """Return the row of one ensemble, top-1 in percent; None if no seed has both the ensemble and the single model."""
    single = best_single(arms, place)
    if single is None:
        return None
    alone, here = arms[place._replace(arm=single)], arms[place]
    seeds, members, ensemble, one = pairs_of(place, single, arms)
    if not seeds:
        return None

    def of(rows: Dict[str, Dict[str, Row]], key: str, factor: float) -> List[float]:
        return [factor * float(rows[seed]["ensemble"][key]) for seed in seeds]

    loss = [mine - theirs for mine, theirs in zip(of(here, "loss_scaled", 1), of(alone, "loss_scaled", 1))]
    difference = interval([mine - theirs for mine, theirs in zip(ensemble, one)])
    predicted = [row for row in predictions if (row["setting"], row["arm"]) == (name_of(place), place.arm)]
    return {
        **{"setting": place.setting, "images": place.images, "arm": place.arm, "n": len(seeds), "single": single},
        **{"members": statistics.mean(members), "members_sd": interval(members).sd},
        **{"ensemble": statistics.mean(ensemble), "ensemble_sd": interval(ensemble).sd},
        **{"one": statistics.mean(one), "one_sd": interval(one).sd, "slope": slope(arms, place)},
        "G": statistics.mean(ensemble) - statistics.mean(members),
        "D": statistics.mean(one) - statistics.mean(members),
        "disagreement": statistics.mean(of(here, "disagreement", 100)),
        **{"difference": difference.mean, "low": difference.low, "high": difference.high},
        "predicted": float(predicted[0]["difference"]) if predicted else None,
        **dict(zip(("loss_difference", "loss_low", "loss_high"), (interval(loss)[i] for i in (0, 2, 3)))),
        **{key: statistics.mean(of(here, key, 100)) for key in ("ece", "ece_scaled")},
        **{f"one_{key}": statistics.mean(of(alone, key, 100)) for key in ("ece", "ece_scaled")},
    }


def name_of(place: Place) -> str:
    return f"{place.setting}-{place.images}"


def _columns(rows: Sequence[Dict[str, Any]]) -> List[Tuple[str, List[str]]]:
    def spread(row: Dict[str, Any], key: str) -> str:
        sd = row[f"{key}_sd"]
        return f"{row[key]:.2f}" + ("" if sd is None else f" ± {sd:.2f}")

    def bounded(row: Dict[str, Any], keys: Sequence[str], digits: int) -> str:
        mean, low, high = (row[key] for key in keys)
        return f"{mean:+.{digits}f}" + ("" if low is None else f" ({low:+.{digits}f} ... {high:+.{digits}f})")

    return [
        ("data", [SETTINGS.get(row["setting"], row["setting"]) for row in rows]),
        ("images", [f"{row['images']:,}" for row in rows]),
        ("ensemble of three", [ENSEMBLES[row["arm"]] for row in rows]),
        ("n", [str(row["n"]) for row in rows]),
        ("members", [spread(row, "members") for row in rows]),
        ("ensemble", [spread(row, "ensemble") for row in rows]),
        ("one model", [spread(row, "one") for row in rows]),
        ("points per doubling", ["" if row["slope"] is None else f"{row['slope']:+.2f}" for row in rows]),
        ("G", [f"{row['G']:.2f}" for row in rows]),
        ("D", [f"{row['D']:.2f}" for row in rows]),
        ("disagreement, %", [f"{row['disagreement']:.1f}" for row in rows]),
        ("ensemble - one model", [bounded(row, ("difference", "low", "high"), 2) for row in rows]),
        ("predicted", ["" if row["predicted"] is None else f"{row['predicted']:+.2f}" for row in rows]),
        (
            "loss of the ensemble - of one model, both scaled",
            [bounded(row, ("loss_difference", "loss_low", "loss_high"), 3) for row in rows],
        ),
    ]


def _as_text(row: Dict[str, Any]) -> Row:
    return {key: cell(row[key]) for key in _COLUMNS}
