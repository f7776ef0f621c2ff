"""Predict the ensembles of a setting before they are run, from its single models; add rows to predictions.csv.

    ONLY=border/tiny-10000/half make reproduce; ONLY=border/tiny-10000/one make reproduce
    python -m resnet_cpu.tables --runs=runs/reproduce
    python experiments/collapsed_ensemble/border/predict.py tiny-10000 late_36 late_100     # then commit, and run these

How: `resnet_cpu.report.border_prediction.predict`.
"""

import argparse
import math
import os
from typing import List

from resnet_cpu import commandline
from resnet_cpu.cluster import guard
from resnet_cpu.errors import DataError, FlagError
from resnet_cpu.recipe import schedule
from resnet_cpu.report import accuracy, border_prediction, tables
from resnet_cpu.resolve import resolve_recipe

ENSEMBLES = ("late_36", "late_100", "published")


def doublings(arm: str) -> float:
    """Return by how many doublings of the budget the members of an arm are behind one model, on average."""
    settings = commandline.parse(
        [f"--flagfile={os.path.join(border_prediction.FOLDER, arm)}.flags", "--train_examples=10000"]
    )
    shares = schedule.budgets(resolve_recipe(settings, 1, 10000).phases)
    return sum(-math.log2(share) for share in shares.values()) / len(shares)


def main(argv: List[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("setting", help="SET-IMAGES, such as tiny-10000")
    parser.add_argument("arms", nargs="*", help=f"ensembles to predict (default: {', '.join(ENSEMBLES)})")
    arguments = parser.parse_args(argv)
    setting, arms = arguments.setting, arguments.arms or ENSEMBLES
    unknown = [arm for arm in arms if arm not in ENSEMBLES]
    if unknown:
        raise FlagError(f"{unknown[0]}: not an ensemble of this study; name some of {', '.join(ENSEMBLES)}")
    predicted, decays = border_prediction.read()
    twice = sorted({row["arm"] for row in predicted if row["setting"] == setting} & set(arms))
    if twice:
        raise DataError(
            f"{border_prediction.PREDICTIONS}: has predictions of {', '.join(twice)} in {setting}; none is made twice"
        )
    runs, pilot = accuracy.read_runs(), border_prediction.read_pilot()
    behind = {arm: doublings(arm) for arm in ENSEMBLES}
    rows = [border_prediction.predict(setting, arm, behind, runs, pilot, decays) for arm in arms]
    for row in rows:
        print(f"{setting}/{row['arm']}: G {row['G']}, D {row['D']}, ensemble - one model {row['difference']} points")
    tables.write_csv(border_prediction.PREDICTIONS, [*predicted, *rows], border_prediction.PREDICTED)


if __name__ == "__main__":
    guard.run(main)
