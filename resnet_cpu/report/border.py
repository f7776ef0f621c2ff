"""Where ensembles begin to pay: an ensemble beside one model of the same budget, over the amount of training data.

With G, how much better an ensemble is than its members on average, and D, how much better one model with the whole
budget is than these members, the ensemble wins if and only if G > D. docs/ensemble.md explains both.
"""

import statistics
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple

from resnet_cpu.report import border_members, border_runs
from resnet_cpu.report.intervals import Interval, fixed, interval
from resnet_cpu.report.tables import NOT_RUN, Row, Table, cell

_COLUMNS = (
    *("setting", "images", "arm", "n", "members", "members_sd", "ensemble", "ensemble_sd", "single", "one", "one_sd"),
    *("G", "D", "disagreement", "difference", "low", "high", "predicted", "loss_difference", "loss_low"),
    *("loss_high", "ece", "ece_scaled", "one_ece", "one_ece_scaled"),
)
_PREDICTED_COLUMNS = (
    *("setting", "images", "arm", "doublings", "G_predicted", "G", "D_predicted", "D"),
    *("difference_predicted", "difference", "low", "high"),
)


def tables(runs: Iterable[Row], predictions: Sequence[Row]) -> Dict[str, Table]:
    """Return the tables of the study; {} without any run.

    `border` has a row for each ensemble whose setting has a single model, `border_predicted` one for each prediction;
    `border_singles` and `border_members` are those of `border_members`.
    """
    arms = border_runs.by_place(runs)
    found = (_figures(place, arms, predictions) for place in sorted(arms) if place.arm in border_runs.ENSEMBLES)
    rows = [row for row in found if row]
    parts = {**_predicted(predictions, rows), **border_members.tables(arms)} if arms else {}
    if not rows:
        return parts
    shown = {(row["setting"], row["images"]) for row in rows}
    note = (
        "Top-1 in %, differences in points; mean ± standard deviation over n seeds. `one model` is the best of three: "
        "half of the budget, all of it, all of it with a collapse. In brackets: 95 % interval of the mean of the "
        "paired differences (Student's t). "
        f"{border_runs.origin_of({at: arms[at] for at in arms if (at.setting, at.images) in shown})}"
    )
    return {"border": Table(_columns(rows), note, [_as_text(row, _COLUMNS) for row in rows], _COLUMNS), **parts}


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
    predicted = [
        row for row in predictions if (row["setting"], row["arm"]) == (border_runs.name_of(*place[:2]), place.arm)
    ]
    return {
        **{"setting": place.setting, "images": place.images, "arm": place.arm, "n": len(seeds), "single": single},
        **{"members": members.mean, "members_sd": members.sd},
        **{"ensemble": ensemble.mean, "ensemble_sd": ensemble.sd},
        **{"one": one.mean, "one_sd": one.sd},
        "G": ensemble.mean - members.mean,
        "D": one.mean - members.mean,
        "disagreement": statistics.mean(of(here, "disagreement", 100)),
        **{"difference": difference.mean, "low": difference.low, "high": difference.high},
        "predicted": float(predicted[0]["difference"]) if predicted else None,
        **{"loss_difference": loss.mean, "loss_low": loss.low, "loss_high": loss.high},
        **{key: statistics.mean(of(here, key, 100)) for key in ("ece", "ece_scaled")},
        **{f"one_{key}": statistics.mean(of(alone, key, 100)) for key in ("ece", "ece_scaled")},
    }


def _predicted(predictions: Sequence[Row], rows: Sequence[Dict[str, Any]]) -> Dict[str, Table]:
    """Return the table `border_predicted`: rows of predictions.csv beside what was found; {} without predictions."""
    if not predictions:
        return {}
    shown: List[Dict[str, Any]] = []
    found = {(border_runs.name_of(row["setting"], row["images"]), row["arm"]): row for row in rows}
    for prediction in predictions:
        setting, images = border_runs.parts_of(prediction["setting"])
        outcome = found.get((prediction["setting"], prediction["arm"]), {})
        figures: Dict[str, Optional[float]] = {}
        figures.update({f"{key}_predicted": float(prediction[key]) for key in ("G", "D", "difference")})
        figures.update({key: outcome.get(key) for key in ("G", "D", "difference", "low", "high", "n")})
        behind = float(prediction["doublings"])
        shown.append({"setting": setting, "images": images, "arm": prediction["arm"], "doublings": behind, **figures})
    titles = {"G": "G", "D": "D", "difference": "ensemble - one model"}
    columns = [
        ("data", [border_runs.SETTINGS.get(row["setting"], row["setting"]) for row in shown]),
        ("images", [f"{row['images']:,}" for row in shown]),
        ("ensemble of three", [border_runs.ENSEMBLES.get(row["arm"], row["arm"]) for row in shown]),
        ("doublings behind", [f"{row['doublings']:.2f}" for row in shown]),
    ]
    for key, title in titles.items():
        columns.append((f"{title}, predicted", [fixed(row[f"{key}_predicted"], 2) for row in shown]))
        columns.append((f"{title}, found", [_outcome(row, key) for row in shown]))
    note = (
        "In points, over the seeds of the row. Predicted: from the single models with as many images, before the "
        "ensembles had finished. Doublings behind: log2 of the whole budget over what a member has seen, on average."
    )
    return {
        "border_predicted": Table(
            columns, note, [_as_text(row, _PREDICTED_COLUMNS) for row in shown], _PREDICTED_COLUMNS
        )
    }


def _outcome(row: Dict[str, Any], key: str) -> str:
    if row[key] is None:
        return NOT_RUN
    if key != "difference":
        return fixed(row[key], 2)
    return Interval(row["n"], row[key], None, row["low"], row["high"]).bounded(2)


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
        ("disagreement, %", [f"{row['disagreement']:.1f}" for row in rows]),
        ("ensemble - one model", [bounded(row, ("difference", "low", "high"), 2) for row in rows]),
        (
            "loss of the ensemble - of one model, both scaled",
            [bounded(row, ("loss_difference", "loss_low", "loss_high"), 3) for row in rows],
        ),
    ]


def _as_text(row: Dict[str, Any], names: Sequence[str]) -> Row:
    return {key: cell(row[key]) for key in names}
