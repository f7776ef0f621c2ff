"""Plots of the accuracy of many runs, from runs.csv and curves.csv: one for each claim of docs/results.md."""

import functools
import os
from typing import Any, Callable, Dict, Iterable, List, Mapping, Sequence, Tuple

from resnet_cpu.report import border_runs
from resnet_cpu.report.accuracy import FAILED
from resnet_cpu.report.intervals import Interval, interval
from resnet_cpu.report.plotting import pyplot, save
from resnet_cpu.report.tables import Row, by_seed

_FASHION = "ResNet-50 at 1/8 width, Fashion-MNIST"
_CIFAR = "ResNet-50 at 1/8 width, CIFAR-10"
_TITLES = {
    "ladder": f"{_FASHION}, 3 epochs of 60,000 images",
    "ladder_cifar": f"{_CIFAR}, 10 epochs of 50,000 images",
    "ladder_cifar_20": f"{_CIFAR}, 20 epochs of 50,000 images",
    "ladder_steps": "ResNet-50 at 1/8 width: linear rule with warm-up; numbers: images per batch",
    "ensemble": f"{_FASHION}, 20,000 images, a quarter of the published epochs",
    "ensemble_full": f"{_FASHION}, 5,000 images, all of the published epochs",
    "cycles": f"{_FASHION}, 18.1 epochs of 20,000 images",
    "border": "Ensembles of three; ResNet-50 at 1/8 width, 998,400 images in all, 100 classes of Tiny-ImageNet,\n"
    "unless said otherwise; hollow diamonds: predicted before the ensembles had finished",
    "image_size": "ResNet-50 at 1/8 width, Tiny-ImageNet, 5 epochs of 100,000 images unless said otherwise",
}
_SETTINGS = {  # of the border experiment
    "tiny": "Tiny-ImageNet, the same weight decay for all",
    "tuned": "weight decay tuned with half of the budget",
    "again": "repeated with other seeds, 8e-3 for one model",
    "wide": "twice the width, the same weight decay for all",
    "heavier": "twice the width, 4e-3 for one model",
    "cifar": "CIFAR-10, weight decay tuned with all of the budget",
}
_STYLES = {"tiny": "o-", "tuned": "s--", "again": "P--", "wide": "^:", "heavier": "X:", "cifar": "v-."}
_LADDERS = {
    "ladder": "Fashion-MNIST,\n3 epochs",
    "ladder_cifar": "CIFAR-10,\n10 epochs",
    "ladder_cifar_20": "CIFAR-10,\n20 epochs",
}
_RULES = {"linear": "linear rule, warm-up", "unscaled": "no scaling, no warm-up", "lars": "LARS, warm-up"}
_SIZES = {
    "constant": "constant size",
    "constant_again": "constant size,\nrun again",
    "constant_short": "constant size,\n70 % of the steps",
    "growing": "growing size",
    "growing_long": "growing size,\n7 epochs",
}
_CHANCE = 10.0  # %, of both data sets of the ladders
_PUBLISHED_LADDER = "haiku_"  # ids in published.csv


def draw(
    runs: Sequence[Row], curves: Sequence[Row], border: Sequence[Row], published: Sequence[Row], folder: str
) -> None:
    """Draw what has been run: rows of runs.csv, curves.csv, the CSV file of the table `border`, and published.csv."""
    last = [row for row in runs if row["what"] == "last"]
    reference = {int(row["global_batch_size"]): float(row["value"]) for row in published
                 if row["id"].startswith(_PUBLISHED_LADDER) and row["global_batch_size"]}  # fmt: skip
    drawings: Dict[str, Callable[[Any], None]] = {}
    ladders = {table: rules for table in _LADDERS if (rules := _rungs(_grouped(last, table)))}
    for table, rules in ladders.items():
        failed = _rungs(_by_arm([row for row in runs if row["what"] == FAILED], table))
        drawings[table] = functools.partial(_ladder, rules=rules, failed=failed, published=reference)
    linear = {table: rules["linear"] for table, rules in ladders.items() if len(rules.get("linear", {})) > 1}
    if len(linear) > 1:
        drawings["ladder_steps"] = functools.partial(_ladder_steps, ladders=linear)
    for table in ("ensemble", "ensemble_full"):
        arms = _grouped(runs, table)
        if any(row["what"].startswith("prefix:") for row in arms.get("cycles", [])):
            drawings[table] = functools.partial(_ensembles, arms=arms)
    for table, one in (("cycles", _cycles), ("image_size", _image_size)):
        timed = [row for row in curves if one is not _image_size or row.get("wall_seconds")]
        arms = _grouped(timed, table)
        if arms:
            drawings[table] = functools.partial(one, arms=arms)
    if border:
        _border(border, os.path.join(folder, "border.png"))
    for name, drawing in drawings.items():
        figure, axes = pyplot().subplots(figsize=(9, 5), constrained_layout=True)
        drawing(axes)
        axes.set_title(_TITLES[name], fontsize=10)
        save(figure, os.path.join(folder, f"{name}.png"))


def _grouped(rows: Sequence[Row], table: str) -> Dict[str, List[Row]]:
    """Return the scored rows of runs TABLE/ARM/seed-N of one table, by arm."""
    return _by_arm([row for row in rows if row["top1"]], table)


def _by_arm(rows: Sequence[Row], table: str) -> Dict[str, List[Row]]:
    arms = by_seed(rows, table)
    return {arm: [row for found in seeds.values() for row in found] for arm, seeds in arms.items()}


def _by_run(rows: Iterable[Row]) -> List[List[Row]]:
    runs: Dict[str, List[Row]] = {}
    for row in rows:
        runs.setdefault(row["run"], []).append(row)
    return [runs[name] for name in sorted(runs)]


def _percent(rows: Iterable[Row]) -> List[float]:
    return [100 * float(row["top1"]) for row in rows]


def _name(axes: Any, names: Sequence[Tuple[float, str, str]]) -> None:
    """Write (text at a height of the data, text, colour) right of the axes, without overlap."""
    bottom, top = axes.get_ylim()
    names = sorted(names)
    halves = [(1 + text.count("\n")) * (top - bottom) / 38 for _, text, _ in names]
    places: List[float] = []
    used = -float("inf")
    for (height, _, _), half in zip(names, halves):  # upwards, past those below
        places.append(max(height, used + half))
        used = places[-1] + half
    free = top
    for number in reversed(range(len(names))):  # and down again if they do not fit below the title
        places[number] = min(places[number], free - halves[number])
        free = places[number] - halves[number]
    for (_, text, colour), place in zip(names, places):
        axes.annotate(text, (1.01, place), xycoords=axes.get_yaxis_transform(), color=colour, va="center")


def _rungs(arms: Mapping[str, Sequence[Row]]) -> Dict[str, Dict[int, Sequence[Row]]]:
    """Return the runs of arms RULE-BATCH by rule and batch."""
    rules: Dict[str, Dict[int, Sequence[Row]]] = {}
    for arm, rows in arms.items():
        rule, _, rung = arm.rpartition("-")
        if rung.isdigit():
            rules.setdefault(rule, {})[int(rung)] = rows
    return rules


def _ladder(
    axes: Any,
    rules: Mapping[str, Mapping[int, Sequence[Row]]],
    failed: Mapping[str, Mapping[int, Sequence[Row]]],
    published: Mapping[int, float],
) -> None:
    """Draw top-1 over the global batch: a colour for each rule, a point for each seed, a line through the means.

    Seeds whose loss was not a finite number are crosses at the bottom.
    """
    names: List[Tuple[float, str, str]] = []
    steps: Dict[int, str] = {}
    for number, (rule, rungs) in enumerate(sorted(rules.items())):
        sizes, colour = sorted(rungs), f"C{number}"
        gone = failed.get(rule, {})
        means = [interval(_percent(rungs[size])).mean for size in sizes]
        axes.plot(sizes, means, "-", color=colour)
        names.append((means[-1], _RULES.get(rule, rule), colour))
        for size in sizes:
            axes.plot([size] * len(rungs[size]), _percent(rungs[size]), "o", color=colour, markersize=4)
            steps[size] = steps.get(size) or rungs[size][0].get("steps", "")
        for size in sorted(gone):
            axes.plot(
                [size * 1.05**place for place in range(len(gone[size]))], [0] * len(gone[size]), "x", color=colour
            )
            steps.setdefault(size, "")
    shown = sorted(size for size in published if size <= max(steps))
    axes.plot(shown, [published[size] for size in shown], "D--", color="grey", markerfacecolor="none", linewidth=1)
    if shown:
        names.append((published[shown[-1]], "ImageNet, as published\n(dm-haiku)", "grey"))
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(steps))
    axes.set_xticklabels(
        [f"{size:,}" + (f"\n{int(steps[size]):,} steps" if steps[size] else "") for size in sorted(steps)]
    )
    axes.set_xlabel("global batch, images")
    axes.set_ylabel(
        "top-1, %; a point for each seed" + ("; crosses: loss not finite" if any(map(failed.get, rules)) else "")
    )
    axes.grid(alpha=0.3)
    _name(axes, names)


def _ladder_steps(axes: Any, ladders: Mapping[str, Mapping[int, Sequence[Row]]]) -> None:
    """Draw what larger batches cost over the number of steps: top-1 minus that of the smallest batch, seed by seed."""
    axes.axhline(0, color="black", linewidth=1)
    names: List[Tuple[float, str, str]] = []
    for number, (table, rungs) in enumerate(ladders.items()):
        sizes, colour = sorted(rungs), f"C{number}"
        smallest = {row["seed"]: row for row in rungs[sizes[0]]}
        steps, losses = [], []
        for size in sizes[1:]:
            pairs = [(row, smallest[row["seed"]]) for row in rungs[size] if row["seed"] in smallest and row["steps"]]
            if pairs:
                steps.append(int(pairs[0][0]["steps"]))
                losses.append(interval([100 * (float(row["top1"]) - float(base["top1"])) for row, base in pairs]))
                axes.annotate(
                    f"{size:,}", (steps[-1], losses[-1].mean), (5, 5), textcoords="offset points", color=colour
                )
        if steps:
            _with_intervals(axes, steps, losses, colour)
            names.append((losses[0].mean, _LADDERS[table], colour))
            chance = _CHANCE - interval(_percent(rungs[sizes[0]])).mean
            axes.axhline(chance, color=colour, linestyle=":", linewidth=1)
            names.append((chance, "chance", colour))
    axes.set_xscale("log")
    least, most = axes.get_xlim()
    axes.set_xticks([2**power for power in range(4, 13)])
    axes.set_xlim(least, 1.2 * most)  # for the number beside the last point
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_minor_locator(pyplot().NullLocator())
    axes.set_xlabel("steps of the whole training")
    axes.set_ylabel("top-1 minus that of the smallest batch, points\n(95 % interval)")
    axes.grid(alpha=0.3)
    _name(axes, names)


def _ensembles(axes: Any, arms: Mapping[str, Sequence[Row]]) -> None:
    """Draw top-1 over the number of members with its interval, beside one model and the averaged weights."""
    found: Dict[int, List[Row]] = {}
    for row in arms["cycles"]:
        if row["what"].startswith("prefix:"):
            found.setdefault(int(row["what"].split(":")[1]), []).append(row)
    sizes = sorted(found)
    means = [interval(_percent(found[size])) for size in sizes]
    _with_intervals(axes, sizes, means, "C0")
    for size in sizes:
        axes.plot([size] * len(found[size]), _percent(found[size]), "o", color="C0", markersize=3, alpha=0.4)
    names = [(means[-1].mean, "ensemble of the\nfirst k members", "C0")]
    for arm, label, colour in (
        ("one_model", "one model of\nthe same budget", "C1"),
        ("average", "averaged weights\nof all members", "C2"),
    ):
        last = [row for row in arms.get(arm, []) if row["what"] == "last"]
        if last:
            score = interval(_percent(last))
            axes.axhline(score.mean, color=colour, linestyle="--")
            if score.low is not None:
                axes.axhspan(score.low, score.high, color=colour, alpha=0.12, linewidth=0)
            names.append((score.mean, label, colour))
    axes.set_xticks(sizes)
    axes.set_xlabel("members in the ensemble, k")
    axes.set_ylabel("top-1, %; mean over seeds with its 95 % interval")
    axes.grid(alpha=0.3)
    _name(axes, names)


def _with_intervals(
    axes: Any, places: Sequence[float], values: Sequence[Interval], colour: str, style: str = "o-"
) -> None:
    means = [value.mean for value in values]
    bounds = [
        [float("nan") if end is None else abs(end - value.mean) for value, end in zip(values, ends)]
        for ends in ([value.low for value in values], [value.high for value in values])
    ]
    axes.errorbar(places, means, bounds, fmt=style, color=colour, capsize=3, markersize=5)


def _border(rows: Sequence[Row], path: str) -> None:
    """Draw the ensembles minus one model over the training images, with intervals, beside what was predicted."""
    kinds = [arm for arm in border_runs.ENSEMBLES if any(row["arm"] == arm for row in rows)]
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    figure, grid = pyplot().subplots(
        2, 2, figsize=(10, 7.5), sharex=True, sharey=True, squeeze=False, constrained_layout=True
    )
    for axes, arm in zip(grid.flat, kinds):
        axes.axhline(0, color="black", linewidth=1)
        axes.set_title(border_runs.ENSEMBLES[arm], fontsize=10)
        for number, setting in enumerate(settings):
            line = sorted((row for row in rows if (row["setting"], row["arm"]) == (setting, arm)), key=_images)
            if not line:
                continue
            beside = 1.07 ** (
                number - (len(settings) - 1) / 2
            )  # side by side, so that intervals do not cover each other
            sizes, colour = [beside * _images(row) for row in line], f"C{number}"
            values = [border_runs.difference_of(row) for row in line]
            _with_intervals(axes, sizes, values, colour, _STYLES.get(setting, "x-"))
            predicted = [(size, float(row["predicted"])) for size, row in zip(sizes, line) if row["predicted"]]
            axes.plot(*zip(*predicted) if predicted else ([], []), "D", color=colour, markerfacecolor="none", zorder=4)
        for height, text in ((0.98, "the ensemble is better"), (0.02, "one model is better")):
            place = {"transform": axes.transAxes, "va": "top" if height > 0.5 else "bottom"}
            axes.text(0.01, height, text, color="grey", fontsize=8, **place)
        axes.grid(axis="y", alpha=0.3)
    for axes in grid[-1]:
        axes.set_xlabel("training images")
    axes = grid[0, 0]
    axes.set_xscale("log")
    axes.set_xticks(sorted({_images(row) for row in rows}))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_minor_locator(pyplot().NullLocator())
    axes.margins(x=0.08, y=0.1)  # for the texts above and below the intervals
    for unused in grid.flat[len(kinds) :]:
        unused.set_visible(False)
    names = [_SETTINGS.get(setting, setting) for setting in settings]
    marks = [pyplot().Line2D([], [], color=f"C{n}", marker=_STYLES.get(s, "x-")[0]) for n, s in enumerate(settings)]
    figure.legend(marks, names, loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    figure.suptitle(_TITLES["border"], fontsize=10)
    figure.supylabel(
        "top-1: ensemble minus best single model of at most the same budget, points (95 % interval)", fontsize=10
    )
    save(figure, path)


def _images(row: Row) -> int:
    return int(row["images"])


def _cycles(axes: Any, arms: Mapping[str, Sequence[Row]]) -> None:
    """Draw top-1 over epochs of the small recipe B and of one poly curve: the mean, and a thin line for each seed."""
    labels = {"poly": "one poly curve", "recipe_b": "recipe B: cycles\nand collapse"}
    names = []
    for number, (arm, rows) in enumerate(sorted(arms.items())):
        by_epoch: Dict[float, List[Row]] = {}
        for run in _by_run(rows):
            axes.plot(
                [float(row["epoch"]) for row in run], _percent(run), "-", color=f"C{number}", linewidth=0.8, alpha=0.4
            )
            for row in run:
                by_epoch.setdefault(float(row["epoch"]), []).append(row)
        epochs = sorted(by_epoch)
        means = [interval(_percent(by_epoch[epoch])).mean for epoch in epochs]
        axes.plot(epochs, means, "o-", color=f"C{number}", markersize=4)
        names.append((means[-1], labels.get(arm, arm), f"C{number}"))
    axes.set_xlabel("epoch")
    axes.set_ylabel("top-1, %; mean over seeds (thin lines: each seed)")
    axes.grid(alpha=0.3)
    _name(axes, names)


def _image_size(axes: Any, arms: Mapping[str, Sequence[Row]]) -> None:
    """Draw top-1 over the time of a whole run, with constant and with growing images, a line for each seed."""
    names: List[Tuple[float, str, str]] = []
    for number, (arm, rows) in enumerate(sorted(arms.items())):
        ends = []
        for run in _by_run(rows):
            minutes = [float(row["wall_seconds"]) / 60 for row in run]
            axes.plot(minutes, _percent(run), "o-", color=f"C{number}", markersize=3, linewidth=1)
            ends.append(_percent(run)[-1])
        names.append((interval(ends).mean, _SIZES.get(arm, arm), f"C{number}"))
    axes.set_xlabel("minutes since the start of a run, with evaluations")
    axes.set_ylabel("top-1, %; a line for each seed")
    axes.grid(alpha=0.3)
    _name(axes, names)
