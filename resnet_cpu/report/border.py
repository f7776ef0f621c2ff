"""Where ensembles begin to pay: an ensemble beside one model of the same budget, over the amount of training data.

With G, how much better an ensemble is than its members on average, and D, how much better one model with the whole
budget is than these members, the ensemble wins if and only if G > D. docs/ensemble.md explains both.
"""

import statistics
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple

from resnet_cpu.report import border_members, border_prediction, border_runs
from resnet_cpu.report.intervals import Interval, interval
from resnet_cpu.report.tables import Row, Table, cell

_COLUMNS = (
    *("setting", "images", "arm", "n", "members", "members_sd", "ensemble", "ensemble_sd", "single", "one", "one_sd"),
    *("G", "D", "disagreement", "difference", "low", "high", "whole", "whole_low", "whole_high"),
    *("predicted", "loss_difference", "loss_low"),
    *("loss_high", "ece", "ece_scaled", "one_ece", "one_ece_scaled"),
)
_ENDS = {"": "mean", "_low": "low", "_high": "high"}


def tables(runs: Iterable[Row], predictions: Sequence[Row], decays: Sequence[Row] = ()) -> Dict[str, Table]:
    """Return the tables of the study; {} without any run.

    `border` has a row for each ensemble whose setting has a single model; the others are those of `border_prediction`
    and `border_members`.
    """
    arms = border_runs.by_place(runs, decays)
    found = (
        _figures(place, arms, predictions) for place in border_runs.in_order(arms) if place.arm in border_runs.ENSEMBLES
    )
    rows = [row for row in found if row]
    parts = {**border_prediction.tables(predictions, rows), **border_members.tables(arms)} if arms else {}
    if not rows:
        return parts
    shown = {(row["setting"], row["images"]) for row in rows}
    note = (
        "Top-1 in %, differences in points; mean ± standard deviation over n seeds. Best single model: of half of the "
        "budget, all of it, and all of it with a collapse. In brackets: 95 % interval of the mean of the paired "
        "differences (Student's t). "
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
    difference = pairs.difference
    whole = border_runs.best_single(arms, place, border_runs.WHOLE)
    over_whole = border_runs.pairs_of(place, whole, arms).difference if whole else None

    def of(rows: Dict[str, Dict[str, Row]], key: str, factor: float) -> List[float]:
        return [factor * float(rows[seed]["ensemble"][key]) for seed in seeds]

    loss = interval([mine - theirs for mine, theirs in zip(of(here, "loss_scaled", 1), of(alone, "loss_scaled", 1))])
    predicted = [
        row for row in predictions if (row["setting"], row["arm"]) == (border_runs.name_of(*place[:2]), place.arm)
    ]
    return {
        **{"setting": place.setting, "images": place.images, "arm": place.arm, "n": len(seeds), "single": single},
        **{"members": members.mean, "members_sd": members.sd},
        **{"ensemble": ensemble.mean, "ensemble_sd": ensemble.sd},
        **{"one": one.mean, "one_sd": one.sd},
        **{"G": pairs.G, "D": pairs.D},
        "disagreement": statistics.mean(of(here, "disagreement", 100)),
        **{"difference": difference.mean, "low": difference.low, "high": difference.high},
        **{f"whole{end}": over_whole and getattr(over_whole, part) for end, part in _ENDS.items()},
        "predicted": float(predicted[0]["difference"]) if predicted else None,
        **{"loss_difference": loss.mean, "loss_low": loss.low, "loss_high": loss.high},
        **{key: statistics.mean(of(here, key, 100)) for key in ("ece", "ece_scaled")},
        **{f"one_{key}": statistics.mean(of(alone, key, 100)) for key in ("ece", "ece_scaled")},
    }


def _columns(rows: Sequence[Dict[str, Any]]) -> List[Tuple[str, List[str]]]:
    def spread(row: Dict[str, Any], key: str) -> str:
        return Interval(row["n"], row[key], row[f"{key}_sd"], None, None).spread(2)

    def over_whole(row: Dict[str, Any]) -> str:
        return "" if row["whole"] is None else border_runs.difference_of(row, "whole", "whole_").bounded(2)

    def loss(row: Dict[str, Any]) -> Interval:
        return border_runs.difference_of(row, "loss_difference", "loss_")

    return [
        *border_runs.headings(rows),
        ("n", [str(row["n"]) for row in rows]),
        ("members", [spread(row, "members") for row in rows]),
        ("ensemble", [spread(row, "ensemble") for row in rows]),
        ("best single model", [spread(row, "one") for row in rows]),
        ("disagreement, %", [f"{row['disagreement']:.1f}" for row in rows]),
        ("ensemble - best single model", [border_runs.difference_of(row).bounded(2) for row in rows]),
        ("ensemble - one model of the whole budget", [over_whole(row) for row in rows]),
        ("loss of the ensemble - of the best single model, both scaled", [loss(row).bounded(3) for row in rows]),
    ]


def _as_text(row: Dict[str, Any]) -> Row:
    return {key: cell(row[key]) for key in _COLUMNS}
