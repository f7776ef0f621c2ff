"""Plots of many runs, from the CSV files of experiments/results, and of predictions."""

import os
from typing import Any, Dict, List, Mapping, Sequence, Tuple

from resnet_cpu.report import border_runs
from resnet_cpu.report.plotting import pyplot, save

Row = Mapping[str, str]


def draw_prediction(
    curves: Mapping[str, Tuple[Sequence[int], Sequence[float]]],
    points: Sequence[Mapping[str, Any]],
    path: str,
    title: str,
) -> None:
    """Draw efficiency over nodes: predicted curves by name, and points (`nodes`, `share`, `label`, `fitted`)."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(9, 5), constrained_layout=True)
    for number, (label, (nodes, shares)) in enumerate(curves.items()):
        axes.plot(nodes, [100 * share for share in shares], ".-", color=f"C{number}", linewidth=1, label=label)
    for number, point in enumerate(points, len(curves)):
        marker, kind = ("s", "fitted to") if point["fitted"] else ("o", "held out")
        axes.plot(point["nodes"], 100 * point["share"], marker, color=f"C{number}", label=f"{point['label']} ({kind})")
    axes.axhline(90, color="grey", linewidth=0.8, linestyle=":")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel("nodes")
    axes.set_ylabel("efficiency, % of one node")
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    save(figure, path)


def draw_validation(points: Sequence[Mapping[str, Any]], path: str, title: str) -> None:
    """Draw predicted over measured seconds of points (`measured`, `predicted`, `fitted`), with lines at +-5 %."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(6, 6), constrained_layout=True)
    for fitted, marker, label in ((True, "s", "fitted to"), (False, "o", "held out")):
        chosen = [point for point in points if point["fitted"] is fitted]
        measured, predicted = ([point[key] for point in chosen] for key in ("measured", "predicted"))
        axes.plot(measured, predicted, marker, fillstyle="none", label=f"{label}, n = {len(chosen)}")
    ends = [min(point["measured"] for point in points), max(point["measured"] for point in points)]
    for factor, style in ((1.0, "-"), (0.95, ":"), (1.05, ":")):
        axes.plot(ends, [factor * end for end in ends], color="grey", linewidth=0.8, linestyle=style)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("measured, s")
    axes.set_ylabel("predicted, s")
    axes.set_title(title, fontsize=10)
    axes.legend()
    axes.grid(alpha=0.3)
    save(figure, path)


def draw_efficiency(rows: Sequence[Row], published: Sequence[Row], path: str) -> None:
    """Draw rates and efficiencies over ranks, a line for each ladder in `rows` of an efficiency table's CSV file.

    Efficiencies of others, rows of the same kind, are drawn as hollow marks over their number of nodes.
    """
    plt = pyplot()
    figure, (rate, efficiency) = plt.subplots(1, 2, figsize=(11, 4.5), constrained_layout=True)
    ladders = dict.fromkeys(row["what"] for row in rows if row.get("images_per_second"))
    for number, label in enumerate(ladders):
        rungs = [row for row in rows if row["what"] == label]
        style: Dict[str, Any] = {"fmt": "o-", "color": f"C{number}", "capsize": 3, "label": label}
        ranks, rates = [int(row["ranks"]) for row in rungs], [float(row["images_per_second"]) for row in rungs]
        rate.errorbar(ranks, rates, [float(row["images_per_second_sd"] or 0) for row in rungs], **style)
        rate.plot(ranks, [rates[0] * count / ranks[0] for count in ranks], "--", color=f"C{number}", linewidth=1)
        values, low, high = (
            [100 * float(row[key] or row["efficiency"]) for row in rungs]  # the base has no interval
            for key in ("efficiency", "efficiency_low", "efficiency_high")
        )
        below = [max(value - end, 0.0) for value, end in zip(values, low)]
        above = [max(end - value, 0.0) for value, end in zip(values, high)]
        efficiency.errorbar(ranks, values, [below, above], **style)
    for number, row in enumerate(published):
        efficiency.plot(
            [int(row["nodes"])],
            [100 * float(row["efficiency"])],
            "sD^v<>"[number % 6],
            color="grey",
            markerfacecolor="none",
            label=f"published, nodes for ranks: {row['what']}",
        )
    for axes, title in ((rate, "images/s; dashed: ideal"), (efficiency, "efficiency, %")):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.set_xlabel("ranks")
        axes.set_ylabel(title)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False)
    rate.set_yscale("log", base=2)
    rate.yaxis.set_major_formatter("{x:.0f}")
    efficiency.axhline(100, color="grey", linestyle="--", linewidth=1)
    save(figure, path)


def draw_results(runs: Sequence[Row], curves: Sequence[Row], tables: Mapping[str, Sequence[Row]], folder: str) -> None:
    """Draw the experiments of this repository: rows of runs.csv, curves.csv and of every table's CSV file, by table."""
    for table in ("ladder", "ladder_cifar", "ladder_cifar_20"):
        _draw_ladder(
            _grouped([row for row in runs if row["what"] == "last"], table), os.path.join(folder, f"{table}.png")
        )
    for table in ("ensemble", "ensemble_full"):
        _draw_ensembles(_grouped(runs, table), os.path.join(folder, f"{table}.png"))
    _draw_cycles(curves, os.path.join(folder, "cycles.png"))
    _draw_image_size(curves, os.path.join(folder, "image_size.png"))
    if "border" in tables:
        _draw_border(tables["border"], os.path.join(folder, "border.png"))
    published = [row for rows in tables.values() for row in rows if row.get("nodes") and row["efficiency"]]
    for table, rows in tables.items():
        if any(row.get("images_per_second") for row in rows):
            draw_efficiency(rows, published, os.path.join(folder, f"{table}.png"))


def _grouped(rows: Sequence[Row], prefix: str) -> Dict[str, List[Row]]:
    """Return the rows of runs TABLE/ARM/seed-N whose table is `prefix`, by arm."""
    groups: Dict[str, List[Row]] = {}
    for row in rows:
        table, _, rest = row["run"].partition("/")
        if table == prefix and row["top1"]:
            groups.setdefault(rest.split("/")[0], []).append(row)
    return groups


def _draw_ladder(arms: Mapping[str, Sequence[Row]], path: str) -> None:
    """Draw top-1 over the global batch: a colour for each rule, a point for each seed, a line through the means."""
    rules: Dict[str, Dict[int, List[float]]] = {}
    for arm, rows in arms.items():
        rule, _, rung = arm.rpartition("-")
        if not rung.isdigit():
            continue  # a run of the user's own
        rules.setdefault(rule, {})[int(rung)] = [100 * float(row["top1"]) for row in rows]
    if not rules:
        return
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(8, 4.5), constrained_layout=True)
    for number, (rule, rungs) in enumerate(sorted(rules.items())):
        sizes, colour = sorted(rungs), f"C{number}"
        means = [sum(rungs[size]) / len(rungs[size]) for size in sizes]
        axes.plot(sizes, means, "-", color=colour)
        axes.annotate(rule, (sizes[-1], means[-1]), (8, 0), textcoords="offset points", color=colour, va="center")
        for size in sizes:
            axes.plot([size] * len(rungs[size]), rungs[size], "o", color=colour, markersize=4)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.margins(x=0.15)
    axes.set_xlabel("global batch, images")
    axes.set_ylabel("top-1, %")
    axes.grid(alpha=0.3)
    save(figure, path)


def _draw_ensembles(arms: Mapping[str, Sequence[Row]], path: str) -> None:
    """Draw top-1 over the number of members, a line for each seed, beside one model and averaged weights."""
    if "cycles" not in arms:
        return
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(8, 4.5), constrained_layout=True)
    for number, seed in enumerate(sorted({row["seed"] for row in arms["cycles"]})):
        prefixes = {
            int(row["what"].split(":")[1]): 100 * float(row["top1"])
            for row in arms["cycles"]
            if row["seed"] == seed and row["what"].startswith("prefix:")
        }
        axes.plot(
            sorted(prefixes),
            [prefixes[size] for size in sorted(prefixes)],
            "o-",
            color=f"C{number}",
            label=f"seed {seed}: first k members",
        )
        for arm, style, label in (("one_model", "--", "one model"), ("average", ":", "averaged weights")):
            for row in arms.get(arm, []):
                if row["seed"] == seed and row["what"] == "last":
                    axes.axhline(
                        100 * float(row["top1"]), color=f"C{number}", linestyle=style, label=f"seed {seed}: {label}"
                    )
    axes.set_xticks(sorted(prefixes))
    axes.set_xlabel("members in the ensemble")
    axes.set_ylabel("top-1, %")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    save(figure, path)


def _draw_border(rows: Sequence[Row], path: str) -> None:
    """Draw the ensemble minus one model over the training images, with intervals, beside what was predicted."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(10, 5), constrained_layout=True)
    axes.axhline(0, color="black", linewidth=1)
    arms = list(dict.fromkeys((row["setting"], row["arm"]) for row in rows))
    names: List[Tuple[float, str, str]] = []  # height, text and colour
    for number, (setting, arm) in enumerate(arms):
        line = sorted((row for row in rows if (row["setting"], row["arm"]) == (setting, arm)), key=_images)
        beside = 1.05 ** (number - (len(arms) - 1) / 2)  # side by side, so that intervals do not cover each other
        sizes, values = [beside * _images(row) for row in line], [float(row["difference"]) for row in line]
        bounds = [[abs(float(row[key] or row["difference"]) - float(row["difference"])) for row in line]
                  for key in ("low", "high")]  # fmt: skip
        colour = f"C{number}"
        axes.errorbar(sizes, values, bounds, fmt="o-", color=colour, capsize=3, markersize=5)
        predicted = [(size, float(row["predicted"])) for size, row in zip(sizes, line) if row["predicted"]]
        axes.plot(*zip(*predicted) if predicted else ([], []), "D", color=colour, markerfacecolor="none")
        where = "" if setting == "tiny" else f"; {border_runs.SETTINGS.get(setting, setting)}"
        names.append((values[-1], border_runs.ENSEMBLES[arm] + where, colour))
    axes.plot([], [], "D", color="grey", markerfacecolor="none", label="predicted before the run")
    axes.set_xscale("log")
    axes.set_xticks(sorted({_images(row) for row in rows}))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_minor_locator(plt.NullLocator())
    smallest, largest = (limit(_images(row) for row in rows) for limit in (min, max))
    axes.set_xlim(smallest / 1.4, largest * 1.25)
    least = (axes.get_ylim()[1] - axes.get_ylim()[0]) / 18  # between two names
    lowest = -float("inf")
    for height, text, colour in sorted(names):
        lowest = max(height, lowest + least)
        axes.annotate(text, (1.01, lowest), xycoords=axes.get_yaxis_transform(), color=colour, va="center")
    for height, text in ((0.98, "the ensemble is better"), (0.02, "one model is better")):
        axes.text(0.01, height, text, transform=axes.transAxes, color="grey", va="top" if height > 0.5 else "bottom")
    axes.set_xlabel("training images")
    axes.set_ylabel("top-1 of the ensemble minus one model\nof the same budget, points (95 % interval)")
    axes.legend(loc="upper right")
    axes.grid(axis="y", alpha=0.3)
    save(figure, path)


def _images(row: Row) -> int:
    return int(row["images"])


def _draw_cycles(curves: Sequence[Row], path: str) -> None:
    """Draw top-1 over epochs of the small recipe B and of a plain poly curve, a line for each seed."""
    arms = _grouped(curves, "cycles")
    if not arms:
        return
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(8, 4.5), constrained_layout=True)
    for number, (arm, rows) in enumerate(sorted(arms.items())):
        for run in sorted({row["run"] for row in rows}):
            of_run = [row for row in rows if row["run"] == run]
            label = arm if run.endswith("seed-0") else None
            epochs, top1 = ([float(row[key]) for row in of_run] for key in ("epoch", "top1"))
            axes.plot(epochs, [100 * value for value in top1], "o-", color=f"C{number}", markersize=3, label=label)
    axes.set_xlabel("epoch")
    axes.set_ylabel("top-1, %")
    axes.legend()
    axes.grid(alpha=0.3)
    save(figure, path)


def _draw_image_size(curves: Sequence[Row], path: str) -> None:
    """Draw top-1 over the time of a whole run, with constant and with growing images, a line for each seed."""
    arms = _grouped(curves, "image_size")
    if not arms:
        return
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(8, 4.5), constrained_layout=True)
    for number, (arm, rows) in enumerate(sorted(arms.items())):
        ends = []
        for run in sorted({row["run"] for row in rows}):
            of_run = sorted((row for row in rows if row["run"] == run), key=lambda row: float(row["wall_seconds"]))
            minutes, top1 = ([factor * float(row[key]) for row in of_run]
                             for key, factor in (("wall_seconds", 1 / 60), ("top1", 100)))  # fmt: skip
            axes.plot(minutes, top1, "o-", color=f"C{number}", markersize=3, linewidth=1)
            ends.append((minutes[-1], top1[-1]))
        axes.annotate(f"{arm} size", max(ends), (8, 0), textcoords="offset points", color=f"C{number}", va="center")
    axes.margins(x=0.18)
    axes.set_xlabel("minutes since the start of a run, with evaluations; a line for each seed")
    axes.set_ylabel("top-1, %")
    axes.grid(alpha=0.3)
    save(figure, path)
