"""Gains of ensembles over their members, and of one model over these members, in all studies (docs/ensemble.md)."""

from typing import Dict, List, Sequence

from resnet_cpu.report import border_runs
from resnet_cpu.report.intervals import fixed
from resnet_cpu.report.tables import Row, Table, by_seed, cell

# Studies of one ensemble and one model, TABLE/cycles/seed-N and TABLE/one_model/seed-N of runs.csv: data and images.
_PAIRED = {
    "ensemble": ("Fashion-MNIST, a quarter of the published epochs", 20000),
    "ensemble_full": ("Fashion-MNIST, all of the published epochs", 5000),
}
_COLUMNS = ("setting", "images", "arm", "n", "G", "D", "difference", "low", "high")


def tables(runs: Sequence[Row], border: Sequence[Row]) -> Dict[str, Table]:
    """Return the table `gains` from rows of runs.csv and of the CSV file of the table `border`; {} without ensembles.

    Top-1 in points: G is the ensemble minus the mean of its members, D the one model minus the mean of the members.
    """
    rows = [row for name, where in _PAIRED.items() for row in _of_pair(runs, name, *where)]
    rows += [{key: row[key] for key in _COLUMNS} for row in border]
    if not rows:
        return {}
    columns = [
        *border_runs.headings(rows),
        ("n", [row["n"] for row in rows]),
        ("G", [fixed(float(row["G"]), 2) for row in rows]),
        ("D", [fixed(float(row["D"]), 2) for row in rows]),
        ("G - D (95 % interval)", [border_runs.difference_of(row).bounded(2) for row in rows]),
    ]
    return {"gains": Table(columns, "Points of top-1, means over n seeds.", rows, _COLUMNS)}


def _of_pair(runs: Sequence[Row], name: str, data: str, images: int) -> List[Row]:
    """Return the row of a study whose runs are NAME/cycles/seed-N and NAME/one_model/seed-N, if both have been run."""
    arms = by_seed(runs, name)
    cycles, singles = (
        {seed: {row["what"]: row for row in rows} for seed, rows in arms.get(arm, {}).items()}
        for arm in ("cycles", "one_model")
    )
    seeds = sorted(seed for seed in cycles if "ensemble" in cycles[seed] and "last" in singles.get(seed, {}))
    if not seeds:
        return []
    pairs = border_runs.Pairs(
        seeds,
        [100 * border_runs.members_of(cycles[seed]) for seed in seeds],
        [100 * float(cycles[seed]["ensemble"]["top1"]) for seed in seeds],
        [100 * float(singles[seed]["last"]["top1"]) for seed in seeds],
    )
    _, mean, _, low, high = pairs.difference
    values = (data, images, "published", len(seeds), pairs.G, pairs.D, mean, low, high)
    return [{key: cell(value) for key, value in zip(_COLUMNS, values)}]
