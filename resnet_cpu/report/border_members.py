"""Every arm of the study of `report/border` by itself: parts of ensembles, averaged weights, losses, calibration."""

from typing import Any, Dict, Iterable, NamedTuple, Optional

from resnet_cpu.report import border
from resnet_cpu.report.tables import Row, Table, cell

_SINGLES = {"half": "one model, half of the budget", "one": "one model", "one_collapse": "one model with a collapse"}


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
    "all": _Score("all", "ensemble", "top1", 100, 2),
    "best_subset": _Score("best subset", "best_subset", "top1", 100, 2),
    "averaged": _Score("averaged weights", "last", "top1", 100, 2),
    "disagreement_over_error": _Score("disagreement over error", "ensemble", "disagreement", 1, 2),
    "loss": _Score("loss", "ensemble", "loss", 1, 3),
    "loss_scaled": _Score("scaled", "ensemble", "loss_scaled", 1, 3),
    "ece": _Score("ECE, %", "ensemble", "ece", 100, 2),
    "ece_scaled": _Score("scaled", "ensemble", "ece_scaled", 100, 2),
}
_OF_SINGLES = ("all", "loss", "loss_scaled", "ece", "ece_scaled")


def tables(runs: Iterable[Row]) -> Dict[str, Table]:
    """Return the table `border_members`, a row for each arm of each setting; {} without such runs."""
    arms = border.by_place(runs)
    rows = [_figures(place, arms) for place in sorted(arms) if place.arm in _SINGLES or place.arm in border.ENSEMBLES]
    if not rows:
        return {}
    note = (
        "Mean ± standard deviation over n seeds; top-1 in % up to the averaged weights, whose batch-norm statistics "
        "were recomputed. The best subset was chosen on these images. Disagreement is that of two members, error the "
        f"mean of the members. Scaled: after temperature scaling. {border.origin_of(arms)}"
    )
    columns = [
        ("data", [border.SETTINGS.get(row["setting"], row["setting"]) for row in rows]),
        ("images", [f"{row['images']:,}" for row in rows]),
        ("arm", [_SINGLES.get(row["arm"]) or border.ENSEMBLES[row["arm"]] for row in rows]),
        ("n", [str(row["n"]) for row in rows]),
        *((score.heading, [_written(row[name], score) for row in rows]) for name, score in _SCORES.items()),
    ]
    names = ("setting", "images", "arm", "n", *(f"{name}{end}" for name in _SCORES for end in ("", "_sd")))
    return {"border_members": Table(columns, note, [_as_text(row) for row in rows], names)}


def _figures(place: border.Place, arms: border.Arms) -> Dict[str, Any]:
    """Return the row of an arm: an interval over seeds, or None, for each of _SCORES."""
    found: Dict[str, Any] = {"setting": place.setting, "images": place.images, "arm": place.arm, "n": len(arms[place])}
    for name, score in _SCORES.items():
        where = place._replace(arm=f"average_{place.arm}") if name == "averaged" else place
        values = border.scores_of(arms, where, score.what, score.key)
        if name == "disagreement_over_error" and place.arm not in _SINGLES:
            values = {seed: value / (1 - border.members_of(arms[place][seed])) for seed, value in values.items()}
        usable = values and (place.arm not in _SINGLES or name in _OF_SINGLES)
        found[name] = border.interval([score.factor * value for value in values.values()]) if usable else None
    return found


def _written(value: Optional[border.Interval], score: _Score) -> str:
    if value is None:
        return ""
    return f"{value.mean:.{score.digits}f}" + ("" if value.sd is None else f" ± {value.sd:.{score.digits}f}")


def _as_text(row: Dict[str, Any]) -> Row:
    shown = {key: cell(row[key]) for key in ("setting", "images", "arm", "n")}
    for name in _SCORES:
        shown[name], shown[f"{name}_sd"] = (cell(row[name] and row[name][part]) for part in (0, 1))
    return shown
