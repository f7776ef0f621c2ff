"""Plots as PNG: of a run folder's rows, and of a planned recipe. matplotlib is optional and loaded when needed."""

import functools
import os
import sys
from typing import Any, Dict, List, Mapping, Sequence, Tuple

_TRAIN, _EVAL, _LR = "#4c72b0", "#c44e52", "#55a868"
_PARTS = {  # of a step, as resnet_cpu.scaling.steptimes names them
    "between": "#8c8c8c",
    "data": "#ccb974",
    "compute": _TRAIN,
    "peers": _EVAL,
    "messages": "#8172b3",
}


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


@functools.cache
def available() -> bool:
    """Return whether matplotlib is there; say once if not."""
    try:
        _pyplot()
    except ImportError:
        print("plots: matplotlib is not installed, none are drawn; pip install 'resnet_cpu[plots]'", file=sys.stderr)
        return False
    return True


def draw_curves(
    metrics: Sequence[Dict[str, Any]], evaluations: Sequence[Dict[str, Any]], path: str, title: str
) -> None:
    """Draw loss, top-1 and LR over epochs from rows of metrics.jsonl and eval.jsonl."""
    plt = _pyplot()
    figure, (loss, accuracy, rate) = plt.subplots(3, 1, figsize=(8, 9), sharex=True, constrained_layout=True)
    figure.suptitle(title)
    epochs = [row["epoch"] for row in metrics]
    evaluated = [row["epoch"] for row in evaluations]
    mark = "." if len(metrics) < 3 else None
    losses = [row["loss"] for row in [*metrics, *evaluations] if row["loss"]]
    if losses and max(losses) > 100 * min(losses):
        loss.set_yscale("log")  # one bad evaluation would flatten the rest
    loss.plot(epochs, [row["loss"] for row in metrics], color=_TRAIN, marker=mark, linewidth=1, label="training batch")
    loss.plot(evaluated, [row["loss"] for row in evaluations], "o-", color=_EVAL, label="evaluation")
    loss.set_ylabel("cross-entropy")
    loss.legend()
    accuracy.plot(evaluated, [100 * row["top1"] for row in evaluations], "o-", color=_EVAL)
    if evaluations:
        accuracy.set_title(f"last {100 * evaluations[-1]['top1']:.2f} %", loc="right", fontsize=10)
    accuracy.set_ylabel("top-1, %")
    rate.plot(epochs, [row["lr"] for row in metrics], color=_LR, marker=mark)
    begins = {row.get("phase"): row["epoch"] for row in reversed(metrics)}
    for name, begin in begins.items() if len(begins) > 1 else ():
        for axes in (loss, accuracy, rate):
            axes.axvline(begin, color="grey", linewidth=0.8, linestyle=":")
        rate.text(begin, 1.01, name, transform=rate.get_xaxis_transform(), rotation=30, fontsize=8)
    rate.set_ylabel("learning rate")
    rate.set_xlabel("epoch")
    for axes in (loss, accuracy, rate):
        axes.grid(alpha=0.3)
    _save(plt, figure, path)


def draw_plan(epochs: Sequence[float], rates: Sequence[float], borders: Dict[str, float], path: str) -> None:
    """Draw the planned LR over epochs; `borders` names the epoch at which each phase starts."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(9, 4), constrained_layout=True)
    axes.plot(epochs, rates, color=_LR)
    names: List[str] = list(borders)
    for name in names:
        axes.axvline(borders[name], color="grey", linewidth=0.8, linestyle=":")
        axes.text(borders[name], 1.01, name, transform=axes.get_xaxis_transform(), rotation=30, fontsize=8)
    axes.set_xlabel("epoch")
    axes.set_ylabel("learning rate")
    axes.grid(alpha=0.3)
    _save(plt, figure, path)


def draw_prediction(
    curves: Dict[str, Tuple[Sequence[int], Sequence[float]]], points: Sequence[Dict[str, Any]], path: str, title: str
) -> None:
    """Draw efficiency over nodes: predicted curves by name, and points (`nodes`, `share`, `label`, `fitted`)."""
    plt = _pyplot()
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
    _save(plt, figure, path)


def draw_validation(points: Sequence[Dict[str, Any]], path: str, title: str) -> None:
    """Draw predicted against measured seconds (`measured`, `predicted`, `fitted`), with lines 5 % off."""
    plt = _pyplot()
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
    _save(plt, figure, path)


def draw_lr_scaling(
    evaluations: Sequence[Dict[str, Any]], published: Sequence[Dict[str, str]], path: str, title: str
) -> None:
    """Draw top-1 over epochs from rows of eval.jsonl, beside published curves (rows of published_curves.csv)."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(8, 4.5), constrained_layout=True)
    for number, name in enumerate(dict.fromkeys(row["name"] for row in published)):
        rows = [row for row in published if row["name"] == name]
        label = f"{name}: batch {int(rows[0]['global_batch_size']):,}"
        epochs, top1 = ([float(row[key]) for row in rows] for key in ("epoch", "top1_percent"))
        axes.plot(epochs, top1, color=f"C{number}", linewidth=1, label=label)
    epochs, top1 = [row["epoch"] for row in evaluations], [100 * row["top1"] for row in evaluations]
    axes.plot(epochs, top1, "o-", color=_EVAL, label=title)
    axes.set_xlabel("epoch")
    axes.set_ylabel("top-1, %")
    axes.legend()
    axes.grid(alpha=0.3)
    _save(plt, figure, path)


def draw_ensemble(members: Dict[str, Dict[str, float]], prefixes: Sequence[Dict[str, Any]], path: str) -> None:
    """Draw top-1 of each member as a bar, and of the ensemble of the first k members as a line."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(8, 4.5), constrained_layout=True)
    singles = [100 * scores["top1"] for scores in members.values()]
    together = [100 * prefix["top1"] for prefix in prefixes]
    axes.bar(list(members), singles, color=_TRAIN, alpha=0.6, label="member")
    axes.plot(list(members), together, "o-", color=_EVAL, label="ensemble up to this one")
    low, high = min(singles + together), max(singles + together)
    axes.set_ylim(low - max(high - low, 0.1), high + 0.3 * max(high - low, 0.1))
    axes.set_title(f"ensemble {together[-1]:.2f} %, best member {max(singles):.2f} %", loc="right", fontsize=10)
    axes.set_ylabel("top-1, %")
    axes.legend()
    axes.grid(alpha=0.3, axis="y")
    _save(plt, figure, path)


def draw_scaling(found: Dict[str, Any], path: str, title: str) -> None:
    """Draw a scaling.json: histograms of each rank's time to its last gradient, and what its steps consist of."""
    plt = _pyplot()
    ranks = found["ranks"]
    numbers = [row["rank"] for row in ranks]
    height = min(3 + 0.3 * len(ranks), 12)
    figure, (histogram, parts) = plt.subplots(
        1, 2, figsize=(11, height), sharey=True, constrained_layout=True, width_ratios=(3, 2)
    )
    figure.suptitle(title)
    milliseconds = [1000 * edge for edge in found["edges_s"]]
    borders = [number - 0.5 for number in [*numbers, len(ranks)]]
    drawn = histogram.pcolormesh(milliseconds, borders, [row["histogram"] for row in ranks], cmap="Blues")
    figure.colorbar(drawn, ax=histogram, label="steps")
    for name, mark in (("median", "o"), ("p95", "|")):
        times = [1000 * row["own_work_s"][name] for row in ranks]
        histogram.plot(times, numbers, mark, color=_EVAL, markersize=4, linestyle="none", label=name)
    histogram.set_xlabel("from the end of the step before to the rank's last gradient, ms")
    histogram.set_ylabel("rank")
    histogram.legend(fontsize=8)
    left = [0.0] * len(ranks)
    for name, colour in _PARTS.items():
        widths = [1000 * row["split_s"][name] for row in ranks]
        parts.barh(numbers, widths, 0.8 if len(ranks) < 64 else 1.0, left, color=colour, label=name)
        left = [begin + width for begin, width in zip(left, widths)]
    parts.set_xlabel("a step, ms")
    parts.legend(fontsize=8, ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, columnspacing=1)
    if len(ranks) < 20:
        histogram.set_yticks(numbers, [f"{row['rank']} ({row['host']})" for row in ranks])
    histogram.invert_yaxis()
    _save(plt, figure, path)


def draw_efficiency(
    ladders: Mapping[str, Sequence[Any]], published: Sequence[Tuple[str, int, float]], path: str
) -> None:
    """Draw rates and efficiencies of ladders (rungs of resnet_cpu.scaling.steptimes) over ranks.

    `published` are (label, nodes, efficiency as a fraction) of others: kept apart as hollow marks, over nodes.
    """
    plt = _pyplot()
    figure, (rate, efficiency) = plt.subplots(1, 2, figsize=(11, 4.5), constrained_layout=True)
    for number, (label, rungs) in enumerate(ladders.items()):
        ranks, rates = [rung.ranks for rung in rungs], [rung.rate for rung in rungs]
        rate.errorbar(
            ranks, rates, [rung.rate_sd or 0 for rung in rungs], fmt="o-", color=f"C{number}", capsize=3, label=label
        )
        ideal = [rates[0] * count / ranks[0] for count in ranks]
        rate.plot(ranks, ideal, "--", color=f"C{number}", linewidth=1)
        values = [100 * rung.efficiency for rung in rungs]
        reach = [[0.0] * len(rungs), [0.0] * len(rungs)]
        for position, rung in enumerate(rungs):
            if rung.interval is not None:
                low, high = (100 * end for end in rung.interval)
                reach[0][position] = max(values[position] - low, 0.0)
                reach[1][position] = max(high - values[position], 0.0)
        efficiency.errorbar(ranks, values, reach, fmt="o-", color=f"C{number}", capsize=3, label=label)
    for number, (label, nodes, value) in enumerate(published):
        mark = "sD^v<>"[number % 6]
        efficiency.plot(
            [nodes],
            [100 * value],
            mark,
            color="grey",
            markerfacecolor="none",
            label=f"published, nodes for ranks: {label}",
        )
    for axes, what in ((rate, "images/s; dashed: ideal"), (efficiency, "efficiency, %")):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.set_xlabel("ranks")
        axes.set_ylabel(what)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False)
    rate.set_yscale("log", base=2)
    rate.yaxis.set_major_formatter("{x:.0f}")
    efficiency.axhline(100, color="grey", linestyle="--", linewidth=1)
    _save(plt, figure, path)


def draw_results(runs: Sequence[Dict[str, str]], curves: Sequence[Dict[str, str]], folder: str) -> None:
    """Draw the repository's own experiments from rows of runs.csv and curves.csv."""
    _draw_ladder(runs, os.path.join(folder, "ladder.png"))
    for table in ("ensemble", "ensemble_full"):
        _draw_ensembles(_grouped(runs, table), os.path.join(folder, f"{table}.png"))
    _draw_cycles(curves, os.path.join(folder, "cycles.png"))


def _grouped(rows: Sequence[Dict[str, str]], prefix: str) -> Dict[str, List[Dict[str, str]]]:
    """Return the rows of runs TABLE/ARM/seed-N whose table is `prefix`, by arm."""
    groups: Dict[str, List[Dict[str, str]]] = {}
    for row in rows:
        table, _, rest = row["run"].partition("/")
        if table == prefix and row["top1"]:
            groups.setdefault(rest.split("/")[0], []).append(row)
    return groups


def _draw_ladder(runs: Sequence[Dict[str, str]], path: str) -> None:
    """Draw top-1 over the global batch, a point a seed and a line through the means, a colour a rule."""
    arms = _grouped([row for row in runs if row["what"] == "last"], "ladder")
    rules: Dict[str, Dict[int, List[float]]] = {}
    for arm, rows in arms.items():
        rule, _, rung = arm.rpartition("-")
        if not rung.isdigit():
            continue  # a run of somebody's own
        rules.setdefault(rule, {})[int(rung)] = [100 * float(row["top1"]) for row in rows]
    if not rules:
        return
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(8, 4.5), constrained_layout=True)
    for number, (rule, rungs) in enumerate(sorted(rules.items())):
        sizes, colour = sorted(rungs), f"C{number}"
        axes.plot(sizes, [sum(rungs[size]) / len(rungs[size]) for size in sizes], "-", color=colour, label=rule)
        for size in sizes:
            axes.plot([size] * len(rungs[size]), rungs[size], "o", color=colour, markersize=4)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("global batch, images")
    axes.set_ylabel("top-1, %")
    axes.legend()
    axes.grid(alpha=0.3)
    _save(plt, figure, path)


def _draw_ensembles(arms: Dict[str, List[Dict[str, str]]], path: str) -> None:
    """Draw top-1 over the number of members, a line a seed, beside one model and averaged weights."""
    if "cycles" not in arms:
        return
    plt = _pyplot()
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
    _save(plt, figure, path)


def _draw_cycles(curves: Sequence[Dict[str, str]], path: str) -> None:
    """Draw top-1 over epochs of recipe B's twin and of the plain poly curve, a line a seed."""
    arms = _grouped(curves, "cycles")
    if not arms:
        return
    plt = _pyplot()
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
    _save(plt, figure, path)


def _save(plt: Any, figure: Any, path: str) -> None:
    temporary = f"{path}.tmp.png"
    figure.savefig(temporary, dpi=110)
    plt.close(figure)
    os.replace(temporary, path)
