"""Gains of ensembles over their members, and of one model over these members, in all studies (docs/ensemble.md)."""

import statistics
from typing import Any, Dict, List, Sequence, Tuple

from resnet_cpu.report import border_runs
from resnet_cpu.report.intervals import fixed, interval
from resnet_cpu.report.tables import Row, Table, cell

# Studies of one ensemble and one model, TABLE/cycles/seed-N and TABLE/one_model/seed-N of runs.csv: data and images.
_PAIRED = {
    "ensemble": ("Fashion-MNIST, a quarter of the published epochs", 20000),
    "ensemble_full": ("Fashion-MNIST, all of the published epochs", 5000),
}
_COLUMNS = ("data", "images", "arm", "n", "G", "D", "difference", "low", "high")


def tables(runs: Sequence[Row], border: Sequence[Row]) -> Dict[str, Table]:
    """Return the table `gains` from rows of runs.csv and of the CSV file of the table `border`; {} without ensembles.

    Top-1 in points: G is the ensemble minus the mean of its members, D the one model minus the mean of the members.
    """
    rows = [row for name, where in _PAIRED.items() for row in _of_pair(runs, name, *where)]
    for row in border:
        data = border_runs.SETTINGS.get(row["setting"], row["setting"])
        rows.append({**{key: row[key] for key in _COLUMNS if key != "data"}, "data": data})
    if not rows:
        return {}
    columns: List[Tuple[str, List[str]]] = [
        ("data", [row["data"] for row in rows]),
        ("images", [f"{int(row['images']):,}" for row in rows]),
        ("ensemble of three", [border_runs.ENSEMBLES.get(row["arm"], row["arm"]) for row in rows]),
        ("n", [row["n"] for row in rows]),
        ("G", [fixed(float(row["G"]), 2) for row in rows]),
        ("D", [fixed(float(row["D"]), 2) for row in rows]),
        ("G - D (95 % interval)", [border_runs.difference_of(row).bounded(2) for row in rows]),
    ]
    return {"gains": Table(columns, "Points of top-1, means over n seeds.", rows, _COLUMNS)}


def _of_pair(runs: Sequence[Row], name: str, data: str, images: int) -> List[Row]:
    cycles: Dict[str, Dict[str, Row]] = {}
    singles: Dict[str, float] = {}
    for row in runs:
        if row["run"].startswith(f"{name}/cycles/"):
            cycles.setdefault(row["seed"], {})[row["what"]] = row
        elif row["run"].startswith(f"{name}/one_model/") and row["what"] == "last":
            singles[row["seed"]] = 100 * float(row["top1"])
    seeds = sorted(seed for seed, rows in cycles.items() if "ensemble" in rows and seed in singles)
    if not seeds:
        return []
    members = [100 * border_runs.members_of(cycles[seed]) for seed in seeds]
    ensemble, one = [100 * float(cycles[seed]["ensemble"]["top1"]) for seed in seeds], [singles[seed] for seed in seeds]
    difference = interval([mine - theirs for mine, theirs in zip(ensemble, one)])
    found: Dict[str, Any] = {
        **{"data": data, "images": images, "arm": "published", "n": len(seeds)},
        "G": statistics.mean(ensemble) - statistics.mean(members),
        "D": statistics.mean(one) - statistics.mean(members),
        **{"difference": difference.mean, "low": difference.low, "high": difference.high},
    }
    return [{key: cell(found[key]) for key in _COLUMNS}]
