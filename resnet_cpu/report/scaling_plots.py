"""Plots of scaling: measured rates and efficiencies, and predictions of the simulator."""

import os
from typing import Any, Dict, Mapping, Sequence, Tuple

from resnet_cpu.report.plotting import pyplot, save

Row = Mapping[str, str]
_TITLES = {"scaling": "ResNet-50 at 1/8 width, Fashion-MNIST (28x28), a core for each rank"}


def draw_prediction(
    curves: Mapping[str, Tuple[Sequence[int], Sequence[float]]],
    points: Sequence[Mapping[str, Any]],
    path: str,
    title: str,
    base: str,
) -> None:
    """Draw efficiency relative to `base` over nodes: curves by name, points (`nodes`, `share`, `label`, `fitted`)."""
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
    axes.set_ylabel(f"efficiency, % of {base}")
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


def draw_efficiency(rows: Sequence[Row], published: Sequence[Row], path: str, title: str = "") -> None:
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
            label=f"published: {row['what']}",
        )
    for axes, quantity, unit in (
        (rate, "images/s; dashed: ideal", "ranks"),
        (efficiency, "efficiency, % of one rank (95 % interval)", "ranks; of published results: nodes"),
    ):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.set_xlabel(unit)
        axes.set_ylabel(quantity)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False)
    rate.set_yscale("log")
    for axis in (rate.yaxis.set_major_formatter, rate.yaxis.set_minor_formatter):
        axis("{x:,.0f}")
    efficiency.axhline(100, color="grey", linestyle="--", linewidth=1)
    figure.suptitle(title, fontsize=10)
    save(figure, path)


def draw_tables(tables: Mapping[str, Sequence[Row]], folder: str) -> None:
    """Draw every efficiency table among `tables`, rows of CSV files by name, beside published efficiencies."""
    published = [row for rows in tables.values() for row in rows if row.get("nodes") and row["efficiency"]]
    for table, rows in tables.items():
        if any(row.get("images_per_second") for row in rows):
            draw_efficiency(rows, published, os.path.join(folder, f"{table}.png"), _TITLES.get(table, ""))
