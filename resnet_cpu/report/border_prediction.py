"""Predict an ensemble of the study of `report/border` from single models, before it is run; a table of these."""

import math
import os
import statistics
from typing import Any, Dict, Iterable, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from resnet_cpu.errors import DataError, FlagError
from resnet_cpu.report import border_runs
from resnet_cpu.report.intervals import fixed
from resnet_cpu.report.tables import EXPERIMENTS, NOT_RUN, Row, Table, cell, read_csv, read_if_there

FOLDER = os.path.join(EXPERIMENTS, "collapsed_ensemble", "border")
PREDICTIONS, PILOT, DECAYS = (os.path.join(FOLDER, f"{name}.csv") for name in ("predictions", "pilot", "decays"))
PREDICTED = (
    *("setting", "arm", "half", "one", "slope", "doublings"),
    *("cycles", "single", "G", "D", "difference", "from"),
)
# For an arm, the one whose figures stand in for it while it has not been run with about as many images.
_LIKE = {"late_100": "late_36", "published": "late_36"}
# Settings with the same data and network, in the order in which they replace each other; the pilot is one of them.
_SAME = {"tiny": ("tiny",), "tuned": ("tiny", "tuned")}
_REPEATED = {"again": "tuned"}  # settings with other seeds, and which setting they repeat


class _Measured(NamedTuple):
    """G, D and slope of an arm with a number of training images, in points, and where they were measured."""

    images: int
    G: float
    D: float
    slope: Optional[float]  # points per doubling of the budget
    source: str


class _Known(NamedTuple):
    """A `value` of an arm with a number of training images, in points, and where it was measured."""

    images: int
    value: float
    source: str


def predict(
    setting: str,
    arm: str,
    doublings: Mapping[str, float],
    runs: Iterable[Row],
    pilot: Sequence[Row],
    decays: Sequence[Row] = (),
) -> Row:
    """Return a row of predictions.csv for an ensemble that has not been run in `setting`, SET-IMAGES.

    D is predicted as the gain of one model per doubling of the budget, measured in this setting with `half` and `one`,
    times the doublings by which the members are behind on average, plus what the cycles lose: D minus that product
    where it is known, against `one`; plus what the best single model, of those that were run, is ahead of `one`.
    G and the loss of the cycles come from the pilot, on half of Tiny-ImageNet, and from what has been run with other
    numbers of images, linear over the logarithm of the number, also with other weight decays; for other data and
    widths, from the pilot only while nothing of theirs has been run.
    `doublings` has those of every arm. For a setting that repeats another one with other seeds, all figures are those
    that were found there.

    Raises DataError if `half` or `one` of the setting, or all figures of other settings, are missing, and if the arm
    has been run; FlagError if `setting` is none.
    """
    arms = border_runs.by_place(runs, decays)
    try:
        place = border_runs.Place(*border_runs.parts_of(setting), arm)
    except ValueError:
        raise FlagError(f"{setting!r}: not a setting; write it as tiny-10000, SET-IMAGES") from None
    if place in arms:
        raise DataError(f"border/{setting}/{arm} has been run; predict it before")
    if place.setting in _REPEATED:
        return _as_found(setting, place._replace(setting=_REPEATED[place.setting]), arms, doublings[arm])
    gain = border_runs.slope(arms, place)
    means = border_runs.means_of_singles(arms, place)
    if gain is None:
        raise DataError(f"border/{setting}: needs finished runs of half and one; run them before")
    gains, losses = [], []
    for other in (arm, *([_LIKE[arm]] if arm in _LIKE else [])):
        names = _SAME.get(place.setting, (place.setting,))
        measured = [known for name in names for known in _of_runs(border_runs.Place(name, place.images, other), arms)]
        if place.setting in _SAME or not measured:
            measured = [*_of_pilot(other, pilot), *measured]
        gains.append([_Known(known.images, known.G, known.source) for known in measured])
        losses.append(
            [
                _Known(known.images, known.D - known.slope * doublings[other], known.source)
                for known in measured
                if known.slope is not None
            ]
        )
    G, of_G = _interpolated(gains, place)
    lost, of_lost = _interpolated(losses, place)
    ahead = max(means.values()) - means["one"]
    D = gain.mean * doublings[arm] + lost + ahead
    source = f"G: {of_G}; cycles: {of_lost}"
    figures = (means["half"], means["one"], gain.mean, doublings[arm], lost, ahead, G, D, G - D)
    return _row(setting, arm, figures, source)


def _as_found(setting: str, place: border_runs.Place, arms: border_runs.Arms, doublings: float) -> Row:
    """Return the prediction that an ensemble of `setting` does what that of `place` did."""
    name, single = border_runs.name_of(*place[:2]), border_runs.best_single(arms, place)
    gain, means = border_runs.slope(arms, place), border_runs.means_of_singles(arms, place)
    pairs = border_runs.pairs_of(place, single, arms) if single else None
    if not gain or pairs is None or not pairs.seeds:
        raise DataError(f"border/{setting} repeats {name}: needs finished runs of half, one and {place.arm} there")
    ahead = max(means.values()) - means["one"]
    lost = pairs.D - gain.mean * doublings - ahead
    figures = (means["half"], means["one"], gain.mean, doublings, lost, ahead, pairs.G, pairs.D, pairs.G - pairs.D)
    return _row(setting, place.arm, figures, f"all: as found in {name}")


def _row(setting: str, arm: str, figures: Sequence[float], source: str) -> Row:
    return {key: cell(value) for key, value in zip(PREDICTED, (setting, arm, *figures, source))}


def _of_pilot(arm: str, pilot: Sequence[Row]) -> List[_Measured]:
    found = []
    for row in pilot:
        if row["arm"] == arm:
            members = statistics.mean(map(float, row["members"].split("/")))
            one = float(row["one"])
            gain = one - float(row["half"]) if row["half"] else None
            found.append(_Measured(int(row["images"]), float(row["ensemble"]) - members, one - members, gain, "pilot"))
    return found


def _of_runs(place: border_runs.Place, arms: border_runs.Arms) -> List[_Measured]:
    found = []
    for other in arms:
        if (other.setting, other.arm) == (place.setting, place.arm):
            pairs = border_runs.pairs_of(other, "one", arms)
            if pairs.seeds:
                gain, source = border_runs.slope(arms, other), border_runs.name_of(*other[:2])
                found.append(_Measured(other.images, pairs.G, pairs.D, gain and gain.mean, source))
    return found


def _interpolated(candidates: Sequence[Sequence[_Known]], place: border_runs.Place) -> Tuple[float, str]:
    """Return a value at the images of `place`, linear over the logarithm between neighbours, and where it comes from.

    Of the candidates, the one with the nearest number of images counts, the first of equals. Beyond its ends the value
    is that of the end. What was run replaces the pilot.
    """

    def away(size: int) -> float:
        return abs(math.log(size / place.images))

    usable = [{known.images: known for known in each} for each in candidates if each]
    if not usable:
        raise DataError(f"nothing is known of {place.arm}; add it to {PILOT}, or run another number of images first")
    known = min(usable, key=lambda each: min(map(away, each)))
    below, above = [size for size in known if size <= place.images], [size for size in known if size >= place.images]
    low = max(below) if below else min(above)
    high = min(above) if above else low
    source = " and ".join(f"{known[size].source} at {size:,}" for size in sorted({low, high}))
    if low == high:
        return known[low].value, source
    share = math.log(place.images / low) / math.log(high / low)
    return (1 - share) * known[low].value + share * known[high].value, source


def tables(predictions: Sequence[Row], found: Sequence[Mapping[str, Any]]) -> Dict[str, Table]:
    """Return the table `border_predicted`: rows of predictions.csv beside those of the table `border`; {} without any.

    Raises DataError for a prediction of something that is not SET-IMAGES.
    """
    if not predictions:
        return {}
    outcomes = {(border_runs.name_of(row["setting"], row["images"]), row["arm"]): row for row in found}
    rows: List[Dict[str, Any]] = []
    for prediction in predictions:
        try:
            setting, images = border_runs.parts_of(prediction["setting"])
        except ValueError:
            raise DataError(f"{PREDICTIONS}: {prediction['setting']!r}: write it as tiny-10000, SET-IMAGES") from None
        outcome = outcomes.get((prediction["setting"], prediction["arm"]), {})
        rows.append(
            {
                **{"setting": setting, "images": images, "arm": prediction["arm"]},
                "doublings": float(prediction["doublings"]),
                **{f"{key}_predicted": float(prediction[key]) for key in ("G", "D", "difference")},
                **{key: outcome.get(key) for key in ("G", "D", "difference", "low", "high", "n")},
            }
        )
    columns = [
        *border_runs.headings(rows),
        ("doublings behind", [f"{row['doublings']:.2f}" for row in rows]),
    ]
    for key, title in {"G": "G", "D": "D", "difference": "ensemble - best single model"}.items():
        columns.append((f"{title}, predicted", [fixed(row[f"{key}_predicted"], 2) for row in rows]))
        columns.append((f"{title}, found", [_outcome(row, key) for row in rows]))
    note = (
        "In points, over the seeds of the row. Predicted: from the single models with as many images, before the "
        "ensembles had finished; for the repetition, what was found before. Doublings behind: "
        "log2 of the whole budget over what a member has seen, on average."
    )
    names = (
        *("setting", "images", "arm", "doublings", "G_predicted", "G", "D_predicted", "D"),
        *("difference_predicted", "difference", "low", "high"),
    )
    texts = [{key: cell(row[key]) for key in names} for row in rows]
    return {"border_predicted": Table(columns, note, texts, names)}


def _outcome(row: Mapping[str, Any], key: str) -> str:
    if row[key] is None:
        return NOT_RUN
    return border_runs.difference_of(row).bounded(2) if key == "difference" else fixed(row[key], 2)


def read_pilot() -> List[Row]:
    """Return the rows of pilot.csv."""
    texts = ("arm", "members", "source")
    return read_csv(PILOT, ("images", "ensemble", "one", "half", *texts), texts)


def read() -> Tuple[List[Row], List[Row]]:
    """Return the rows of predictions.csv and of decays.csv; none if a file does not exist."""
    predictions = read_if_there(PREDICTIONS, PREDICTED, ("setting", "arm", "from"))
    return predictions, read_if_there(DECAYS, ("setting", "arm", "decay"), ("setting", "arm"))
