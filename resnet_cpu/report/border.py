"""Where ensembles begin to pay: an ensemble beside one model of the same budget, over the amount of training data.

With G, how much better an ensemble is than its members on average, and D, how much better one model with the whole
budget is than these members, the ensemble wins if and only if G > D. docs/ensemble.md explains both.
"""

import statistics
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple

from resnet_cpu.report import border_members, border_runs
from resnet_cpu.report.intervals import Interval, interval
from resnet_cpu.report.tables import Row, Table, cell

_COLUMNS = (
    *("setting", "images", "arm", "n", "members", "members_sd", "ensemble", "ensemble_sd", "single", "one", "one_sd"),
    *("slope", "G", "D", "disagreement", "difference", "low", "high", "predicted", "loss_difference", "loss_low"),
    *("loss_high", "ece", "ece_scaled", "one_ece", "one_ece_scaled"),
)


def tables(runs: Iterable[Row], predictions: Sequence[Row]) -> Dict[str, Table]:
    """Return the tables `border`, a row for each ensemble, and `border_members`, one for each arm; {} without any run.

    An ensemble has a row if there is a single model of its setting.
    """
    arms = border_runs.by_place(runs)
    found = (_figures(place, arms, predictions) for place in sorted(arms) if place.arm in border_runs.ENSEMBLES)
    rows = [row for row in found if row]
    parts = border_members.tables(arms)
    if not rows:
        return parts
    shown = {(row["setting"], row["images"]) for row in rows}
    note = (
        "Top-1 in %, differences in points; mean ± standard deviation over n seeds. `one model` is the better of two, "
        "with and without a collapse. In brackets: 95 % interval of the mean of the paired differences (Student's t). "
        f"{border_runs.origin_of({at: arms[at] for at in arms if (at.setting, at.images) in shown})}"
    )
    return {"border": Table(_columns(rows), note, [_as_text(row) for row in rows], _COLUMNS), **parts}


def holds(run: Row) -> bool:
    """Return whether a row of runs.csv belongs to this study."""
    return run["run"].startswith(border_runs.PREFIX)


def _figures(place: border_runs.Place, arms: border_runs.Arms, predictions: Sequence[Row]) -> Optional[Dict[str, Any]]:
    """Return the row of one ensemble, top-1 in percent; None if no seed has both the ensemble and the single model."""
    single = border_runs.best_single(arms, place)
    if single is None:
        return None
    alone, here = arms[place._replace(arm=single)], arms[place]
    pairs = border_runs.pairs_of(place, single, arms)
    seeds = pairs.seeds
    if not seeds:
        return None
    members, ensemble, one = map(interval, (pairs.members, pairs.ensemble, pairs.single))

    def of(rows: Dict[str, Dict[str, Row]], key: str, factor: float) -> List[float]:
        return [factor * float(rows[seed]["ensemble"][key]) for seed in seeds]

    loss = interval([mine - theirs for mine, theirs in zip(of(here, "loss_scaled", 1), of(alone, "loss_scaled", 1))])
    difference = interval([mine - theirs for mine, theirs in zip(pairs.ensemble, pairs.single)])
    predicted = [row for row in predictions if (row["setting"], row["arm"]) == (border_runs.name_of(place), place.arm)]
    return {
        **{"setting": place.setting, "images": place.images, "arm": place.arm, "n": len(seeds), "single": single},
        **{"members": members.mean, "members_sd": members.sd},
        **{"ensemble": ensemble.mean, "ensemble_sd": ensemble.sd},
        **{"one": one.mean, "one_sd": one.sd, "slope": border_runs.slope(arms, place)},
        "G": ensemble.mean - members.mean,
        "D": one.mean - members.mean,
        "disagreement": statistics.mean(of(here, "disagreement", 100)),
        **{"difference": difference.mean, "low": difference.low, "high": difference.high},
        "predicted": float(predicted[0]["difference"]) if predicted else None,
        **{"loss_difference": loss.mean, "loss_low": loss.low, "loss_high": loss.high},
        **{key: statistics.mean(of(here, key, 100)) for key in ("ece", "ece_scaled")},
        **{f"one_{key}": statistics.mean(of(alone, key, 100)) for key in ("ece", "ece_scaled")},
    }


def _columns(rows: Sequence[Dict[str, Any]]) -> List[Tuple[str, List[str]]]:
    def spread(row: Dict[str, Any], key: str) -> str:
        return Interval(row["n"], row[key], row[f"{key}_sd"], None, None).spread(2)

    def bounded(row: Dict[str, Any], keys: Sequence[str], digits: int) -> str:
        mean, low, high = (row[key] for key in keys)
        return Interval(row["n"], mean, None, low, high).bounded(digits)

    return [
        ("data", [border_runs.SETTINGS.get(row["setting"], row["setting"]) for row in rows]),
        ("images", [f"{row['images']:,}" for row in rows]),
        ("ensemble of three", [border_runs.ENSEMBLES[row["arm"]] for row in rows]),
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
