"""The runs of the study on where ensembles begin to pay (`report/border`), by setting, arm and seed.

They are rows of runs.csv named border/SETTING-IMAGES/ARM/seed-N. `half` and `one` are single models with half of the
budget and all of it, `one_collapse` is another one with all of it. `average_ARM` has the averaged weights of ARM's
members. All other arms are ensembles.
"""

import statistics
from typing import Any, Dict, Iterable, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from resnet_cpu.report.intervals import Interval, interval
from resnet_cpu.report.tables import Column, Row, origin

PREFIX = "border/"
WHOLE = ("one", "one_collapse")  # single models that spend the whole budget
SINGLES = ("half", *WHOLE)
OWN_DECAY = "2e-3"  # of all flagfiles of the study
SETTINGS = {
    "tiny": "Tiny-ImageNet, 100 classes",
    "tuned": "Tiny-ImageNet, 100 classes, weight decay tuned with half of the budget",
    "again": "Tiny-ImageNet, 100 classes, repeated with other seeds, and 8e-3 for one model of the whole budget",
    "wide": "Tiny-ImageNet, 100 classes, twice the width",
    "heavier": "Tiny-ImageNet, 100 classes, twice the width, and 4e-3 for one model of the whole budget",
    "cifar": "CIFAR-10",
}
ENSEMBLES = {
    "late_36": "late, restarts at 36 %",
    "late_100": "late, restarts at 100 %",
    "published": "as published",
    "independent": "three independent networks",
}


class Place(NamedTuple):
    """Where a run belongs: `border/SETTING-IMAGES/ARM/seed-N`."""

    setting: str
    images: int
    arm: str


# Settings that differ from another one, with the same data and network, only in weight decays of their own.
_OTHER_DECAYS = {"tuned": "tiny", "heavier": "wide"}

Arms = Dict[Place, Dict[str, Dict[str, Row]]]  # the rows of each place by seed and by what they score


def origin_of(arms: Arms) -> str:
    """Return the end of a note: the machines and versions that all runs of this study come from."""
    return origin([row for seeds in arms.values() for rows in seeds.values() for row in rows.values()])


def by_place(runs: Iterable[Row], decays: Iterable[Row] = ()) -> Arms:
    """Return for each place the rows of each seed, by what they score.

    The settings `tuned` and `heavier` have the weight decays of `decays`, rows of decays.csv. An arm of them whose
    decay is that of its flagfile is the same run as in the setting `tiny` or `wide`, and is found in both.
    """
    found: Arms = {}
    for row in runs:
        parts = row["run"].split("/")
        if row["run"].startswith(PREFIX) and len(parts) == 4 and row["top1"]:
            try:
                place = Place(*parts_of(parts[1]), parts[2])
            except ValueError:
                continue  # a run of the user's own
            found.setdefault(place, {}).setdefault(parts[3], {})[row["what"]] = row
    for row in decays:
        setting, images = parts_of(row["setting"])
        own, other = Place(_OTHER_DECAYS.get(setting, ""), images, row["arm"]), Place(setting, images, row["arm"])
        if row["decay"] == OWN_DECAY and own in found:
            found.setdefault(other, found[own])
    return found


def in_order(places: Iterable[Place]) -> List[Place]:
    """Return places in the order of tables: settings as in SETTINGS, then numbers of images and arms."""
    names = list(SETTINGS)

    def key(place: Place) -> Tuple[int, Place]:
        return (names.index(place.setting) if place.setting in SETTINGS else len(names), place)

    return sorted(places, key=key)


def scores_of(arms: Arms, place: Place, what: str, key: str) -> Dict[str, float]:
    """Return a score of an arm by seed; of a single model, `ensemble` is that of its only member."""
    return {seed: float(rows[what][key]) for seed, rows in arms.get(place, {}).items() if what in rows}


def members_of(rows: Dict[str, Row]) -> float:
    """Return the mean top-1 of the members of an ensemble, from its rows by what they score."""
    return statistics.mean(float(row["top1"]) for what, row in rows.items() if what.startswith("member:"))


def means_of_singles(arms: Arms, place: Place, among: Sequence[str] = SINGLES) -> Dict[str, float]:
    """Return the mean top-1, in percent, of each arm of `among` that was run in the setting of `place`.

    Means are those of the seeds that all of these have, if there are any.
    """
    scores = {arm: scores_of(arms, place._replace(arm=arm), "ensemble", "top1") for arm in among}
    found = {arm: by_seed for arm, by_seed in scores.items() if by_seed}
    shared = set.intersection(*map(set, found.values())) if found else set()
    return {arm: 100 * statistics.mean(by_seed[seed] for seed in (shared or by_seed)) for arm, by_seed in found.items()}


def best_single(arms: Arms, place: Place, among: Sequence[str] = SINGLES) -> Optional[str]:
    """Return the single model with the best mean that has a seed in common with the ensemble at `place`, or None."""
    comparable = [arm for arm in among if pairs_of(place, arm, arms).seeds]
    means = means_of_singles(arms, place, comparable)
    return max(means, key=lambda arm: means[arm]) if means else None


def slope(arms: Arms, place: Place) -> Optional[Interval]:
    """Return how many points one model gains by a doubling of the budget, from half of it to all of it, or None."""
    half, one = (scores_of(arms, place._replace(arm=arm), "ensemble", "top1") for arm in ("half", "one"))
    seeds = sorted(set(half) & set(one))
    return interval([100 * (one[seed] - half[seed]) for seed in seeds]) if seeds else None


class Pairs(NamedTuple):
    """Top-1 of an ensemble and of a single model, in percent, for each seed that has both."""

    seeds: List[str]
    members: List[float]  # means over the members
    ensemble: List[float]
    single: List[float]

    @property
    def G(self) -> float:
        """The ensemble minus its members, in points."""
        return statistics.mean(self.ensemble) - statistics.mean(self.members)

    @property
    def D(self) -> float:
        """The single model minus the members of the ensemble, in points."""
        return statistics.mean(self.single) - statistics.mean(self.members)

    @property
    def difference(self) -> Interval:
        """The ensemble minus the single model, in points."""
        return interval([mine - theirs for mine, theirs in zip(self.ensemble, self.single)])


def pairs_of(place: Place, single: str, arms: Arms) -> Pairs:
    """Return the scores of the arm of `place` and of the arm `single`, for each seed that both have."""
    alone, here = (scores_of(arms, place._replace(arm=arm), "ensemble", "top1") for arm in (single, place.arm))
    seeds = sorted(set(alone) & set(here))
    members = [100 * members_of(arms[place][seed]) for seed in seeds]
    return Pairs(seeds, members, *([100 * scores[seed] for seed in seeds] for scores in (here, alone)))


def difference_of(row: Mapping[str, Any], mean: str = "difference", prefix: str = "") -> Interval:
    """Return the ensemble minus one model from a row of the table `border`, also from its CSV file.

    `mean` and the `prefix` of `low` and `high` choose another difference of the row.
    """
    low, high = (None if row[key] in ("", None) else float(row[key]) for key in (f"{prefix}low", f"{prefix}high"))
    return Interval(int(row["n"]), float(row[mean]), None, low, high)


def headings(rows: Sequence[Mapping[str, Any]], of_ensembles: bool = True) -> List[Column]:
    """Return the first columns of a table: `setting` and `images` of its rows, and their `arm` if it is an ensemble."""
    columns = [
        ("data", [SETTINGS.get(row["setting"], row["setting"]) for row in rows]),
        ("images", [f"{int(row['images']):,}" for row in rows]),
    ]
    if of_ensembles:
        columns.append(("ensemble of three", [ENSEMBLES.get(row["arm"], row["arm"]) for row in rows]))
    return columns


def name_of(setting: str, images: int) -> str:
    """Return SETTING-IMAGES, as in the names of runs."""
    return f"{setting}-{images}"


def parts_of(name: str) -> Tuple[str, int]:
    """Return the setting and the number of images of SETTING-IMAGES; raise ValueError if it is not of this form."""
    setting, _, images = name.rpartition("-")
    if not setting or int(images) < 1:
        raise ValueError(name)
    return setting, int(images)
