"""Every arm of the study of `report/border` by itself: single models, parts of ensembles, losses, calibration."""

from typing import Any, Dict, List, NamedTuple, Optional

from resnet_cpu.report import border_runs
from resnet_cpu.report.intervals import Interval, interval
from resnet_cpu.report.tables import Row, Table, cell

_LABELS = {
    "half": "one model, half of the budget",
    "one": "one model, all of the budget",
    "one_collapse": "one model, all of the budget, with a collapse",
}


class _Score(NamedTuple):
    """A column: its heading, what is scored in runs.csv, and how it is written."""

    heading: str
    what: str
    key: str
    factor: float
    digits: int


_SCORES = {
    "last": _Score("last member", "last_m:1", "top1", 100, 2),
    "last_2": _Score("last two", "last_m:2", "top1", 100, 2),
    "all": _Score("ensemble or model", "ensemble", "top1", 100, 2),
    "best_subset": _Score("best subset", "best_subset", "top1", 100, 2),
    "averaged": _Score("averaged weights", "last", "top1", 100, 2),
    "disagreement_over_error": _Score("disagreement over error", "ensemble", "disagreement", 1, 2),
    "loss": _Score("loss", "ensemble", "loss", 1, 3),
    "loss_scaled": _Score("loss, scaled", "ensemble", "loss_scaled", 1, 3),
    "ece": _Score("ECE, %", "ensemble", "ece", 100, 2),
    "ece_scaled": _Score("ECE, scaled, %", "ensemble", "ece_scaled", 100, 2),
}
_OF_ONE_MODEL = ("all", "loss", "loss_scaled", "ece", "ece_scaled")


def tables(arms: border_runs.Arms) -> Dict[str, Table]:
    """Return `border_singles`, a row for each setting, and `border_members`, one for each arm; {} without runs."""
    return {**_singles(arms), **_members(arms)}


def _singles(arms: border_runs.Arms) -> Dict[str, Table]:
    """Return the table of single models and their gain by a doubling of the budget; {} if none has both budgets."""
    names = ("setting", "images", "n", *(f"{arm}{end}" for arm in border_runs.SINGLES for end in ("", "_sd")))
    names += ("slope", "slope_low", "slope_high")
    rows: List[Row] = []
    written: Dict[str, List[str]] = {arm: [] for arm in (*border_runs.SINGLES, "slope")}
    for where in border_runs.in_order({place._replace(arm="one") for place in arms}):
        slope = border_runs.slope(arms, where)
        if not slope:
            continue
        row: Dict[str, Any] = {"setting": where.setting, "images": where.images, "n": slope.n}
        row.update(slope=slope.mean, slope_low=slope.low, slope_high=slope.high)
        by_seed = {
            arm: border_runs.scores_of(arms, where._replace(arm=arm), "ensemble", "top1") for arm in border_runs.SINGLES
        }
        seeds = set(by_seed["half"]) & set(by_seed["one"])  # those of the slope
        for arm, found in by_seed.items():
            scores = [100 * score for seed, score in found.items() if seed in seeds]
            top1 = interval(scores) if scores else None
            row[arm], row[f"{arm}_sd"] = (top1 and top1.mean, top1 and top1.sd)
            written[arm].append(_written(top1, 2, slope.n))
        written["slope"].append(slope.bounded(2))
        rows.append({key: cell(row[key]) for key in names})
    if not rows:
        return {}
    columns = [
        *border_runs.headings(rows, of_ensembles=False),
        ("n", [row["n"] for row in rows]),
        *((_LABELS[arm], written[arm]) for arm in border_runs.SINGLES),
        ("points per doubling", written["slope"]),
    ]
    note = (
        "Top-1 in %, mean ± standard deviation over the n seeds that both budgets have. Points per doubling: all of "
        "the budget minus half of it for equal seeds, with the 95 % interval of the mean (Student's t); in the "
        "repetition, these two have different weight decays."
    )
    return {"border_singles": Table(columns, note, rows, names)}


def _members(arms: border_runs.Arms) -> Dict[str, Table]:
    """Return the table of every arm by itself; {} without runs."""
    labels = {**_LABELS, **border_runs.ENSEMBLES}
    rows = [_figures(place, arms) for place in border_runs.in_order(arms) if place.arm in labels]
    if not rows:
        return {}
    note = (
        "Mean ± standard deviation over n seeds. From the last member to the averaged weights: top-1, %. The best "
        "subset was chosen on these images; the batch-norm statistics of averaged weights were recomputed. "
        "Disagreement is that of two members, error the mean of the members. Scaled: after temperature scaling. "
        f"{border_runs.origin_of(arms)}"
    )
    columns = [
        *border_runs.headings(rows, of_ensembles=False),
        ("configuration", [labels[row["arm"]] for row in rows]),
        ("n", [str(row["n"]) for row in rows]),
        *(
            (score.heading, [_written(row[name], score.digits, row["n"]) for row in rows])
            for name, score in _SCORES.items()
        ),
    ]
    names = ("setting", "images", "arm", "n", *(f"{name}{end}" for name in _SCORES for end in ("", "_sd")))
    return {"border_members": Table(columns, note, [_as_text(row) for row in rows], names)}


def _figures(place: border_runs.Place, arms: border_runs.Arms) -> Dict[str, Any]:
    """Return the row of an arm: an interval over seeds, or None, for each of _SCORES."""
    found: Dict[str, Any] = {"setting": place.setting, "images": place.images, "arm": place.arm, "n": len(arms[place])}
    for name, score in _SCORES.items():
        found[name] = None
        if not _has(place.arm, name):
            continue
        where = place._replace(arm=f"average_{place.arm}") if name == "averaged" else place
        values = border_runs.scores_of(arms, where, score.what, score.key)
        if name == "disagreement_over_error":
            values = {seed: value / (1 - border_runs.members_of(arms[place][seed])) for seed, value in values.items()}
        found[name] = interval([score.factor * value for value in values.values()]) if values else None
    return found


def _has(arm: str, name: str) -> bool:
    """Return whether a score makes sense for an arm: single models have no parts, independent networks no order."""
    if arm in _LABELS:
        return name in _OF_ONE_MODEL
    return arm != "independent" or name not in ("last", "last_2", "averaged")


def _written(value: Optional[Interval], digits: int, n: int) -> str:
    if value is None:
        return ""
    return value.spread(digits) + ("" if value.n == n else f" (n = {value.n})")


def _as_text(row: Dict[str, Any]) -> Row:
    shown = {key: cell(row[key]) for key in ("setting", "images", "arm", "n")}
    for name in _SCORES:
        shown[name], shown[f"{name}_sd"] = (cell(row[name] and getattr(row[name], part)) for part in ("mean", "sd"))
    return shown
