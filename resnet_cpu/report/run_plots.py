"""Plots of one run, drawn from the rows and JSON files of its folder, and of a planned recipe."""

from typing import Any, Dict, Mapping, Sequence

from resnet_cpu.report.plotting import EVALUATION, RATE, TRAINING, mark_phase, pyplot, save

_PARTS = {  # of a step, see resnet_cpu.scaling.steptimes
    "between": "#8c8c8c",
    "data": "#ccb974",
    "compute": TRAINING,
    "peers": EVALUATION,
    "messages": "#8172b3",
}


def draw_curves(
    metrics: Sequence[Dict[str, Any]], evaluations: Sequence[Dict[str, Any]], path: str, title: str
) -> None:
    """Draw loss, top-1 and learning rate over epochs, from rows of metrics.jsonl and eval.jsonl."""
    plt = pyplot()
    figure, (loss, accuracy, rate) = plt.subplots(3, 1, figsize=(8, 9), sharex=True, constrained_layout=True)
    figure.suptitle(title)
    epochs = [row["epoch"] for row in metrics]
    evaluated = [row["epoch"] for row in evaluations]
    mark = "." if len(metrics) < 3 else None
    losses = [row["loss"] for row in [*metrics, *evaluations] if row["loss"]]
    if losses and max(losses) > 100 * min(losses):
        loss.set_yscale("log")  # one bad evaluation would flatten the rest
    loss.plot(
        epochs, [row["loss"] for row in metrics], color=TRAINING, marker=mark, linewidth=1, label="training batch"
    )
    loss.plot(evaluated, [row["loss"] for row in evaluations], "o-", color=EVALUATION, label="evaluation")
    loss.set_ylabel("cross-entropy")
    loss.legend()
    accuracy.plot(evaluated, [100 * row["top1"] for row in evaluations], "o-", color=EVALUATION)
    if evaluations:
        accuracy.set_title(f"last {100 * evaluations[-1]['top1']:.2f} %", loc="right", fontsize=10)
    accuracy.set_ylabel("top-1, %")
    rate.plot(epochs, [row["lr"] for row in metrics], color=RATE, marker=mark)
    starts = {row.get("phase"): row["epoch"] for row in reversed(metrics)}
    for name, start in starts.items() if len(starts) > 1 else ():
        for axes in (loss, accuracy):
            axes.axvline(start, color="grey", linewidth=0.8, linestyle=":")
        mark_phase(rate, start, name)
    rate.set_ylabel("learning rate")
    rate.set_xlabel("epoch")
    for axes in (loss, accuracy, rate):
        axes.grid(alpha=0.3)
    save(figure, path)


def draw_plan(epochs: Sequence[float], rates: Sequence[float], starts: Mapping[str, float], path: str) -> None:
    """Draw the planned learning rate over epochs; `starts` holds the epoch at which each phase starts, by name."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(9, 4), constrained_layout=True)
    axes.plot(epochs, rates, color=RATE)
    for name, epoch in starts.items():
        mark_phase(axes, epoch, name)
    axes.set_xlabel("epoch")
    axes.set_ylabel("learning rate")
    axes.grid(alpha=0.3)
    save(figure, path)


def draw_lr_scaling(
    evaluations: Sequence[Dict[str, Any]], published: Sequence[Dict[str, str]], path: str, title: str
) -> None:
    """Draw top-1 over epochs, from rows of eval.jsonl, beside published curves (rows of published_curves.csv)."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(8, 4.5), constrained_layout=True)
    for number, name in enumerate(dict.fromkeys(row["name"] for row in published)):
        rows = [row for row in published if row["name"] == name]
        label = f"{name}: batch {int(rows[0]['global_batch_size']):,}"
        epochs, top1 = ([float(row[key]) for row in rows] for key in ("epoch", "top1_percent"))
        axes.plot(epochs, top1, color=f"C{number}", linewidth=1, label=label)
    epochs, top1 = [row["epoch"] for row in evaluations], [100 * row["top1"] for row in evaluations]
    axes.plot(epochs, top1, "o-", color=EVALUATION, label=title)
    axes.set_xlabel("epoch")
    axes.set_ylabel("top-1, %")
    axes.legend()
    axes.grid(alpha=0.3)
    save(figure, path)


def draw_ensemble(members: Dict[str, Dict[str, float]], prefixes: Sequence[Dict[str, Any]], path: str) -> None:
    """Draw top-1 of each member as a bar, and of the ensembles of the first 1, 2, ... members as a line."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(8, 4.5), constrained_layout=True)
    singles = [100 * scores["top1"] for scores in members.values()]
    together = [100 * prefix["top1"] for prefix in prefixes]
    axes.bar(list(members), singles, color=TRAINING, alpha=0.6, label="member")
    axes.plot(list(members), together, "o-", color=EVALUATION, label="ensemble up to this one")
    low, high = min(singles + together), max(singles + together)
    axes.set_ylim(low - max(high - low, 0.1), high + 0.3 * max(high - low, 0.1))
    axes.set_title(f"ensemble {together[-1]:.2f} %, best member {max(singles):.2f} %", loc="right", fontsize=10)
    axes.set_ylabel("top-1, %")
    axes.legend()
    axes.grid(alpha=0.3, axis="y")
    save(figure, path)


def draw_scaling(timing: Mapping[str, Any], path: str, title: str) -> None:
    """Draw the content of a scaling.json: for each rank a histogram of its time to the last gradient, and its split."""
    plt = pyplot()
    ranks = timing["ranks"]
    numbers = [row["rank"] for row in ranks]
    height = min(3 + 0.3 * len(ranks), 12)
    figure, (histogram, parts) = plt.subplots(
        1, 2, figsize=(11, height), sharey=True, constrained_layout=True, width_ratios=(3, 2)
    )
    figure.suptitle(title)
    milliseconds = [1000 * edge for edge in timing["edges_s"]]
    borders = [number - 0.5 for number in [*numbers, len(ranks)]]
    drawn = histogram.pcolormesh(milliseconds, borders, [row["histogram"] for row in ranks], cmap="Blues")
    figure.colorbar(drawn, ax=histogram, label="steps")
    for name, mark in (("median", "o"), ("p95", "|")):
        times = [1000 * row["own_work_s"][name] for row in ranks]
        histogram.plot(times, numbers, mark, color=EVALUATION, markersize=4, linestyle="none", label=name)
    histogram.set_xlabel("from the end of the previous step to the rank's last gradient, ms")
    histogram.set_ylabel("rank")
    histogram.legend(fontsize=8)
    left = [0.0] * len(ranks)
    for name, colour in _PARTS.items():
        widths = [1000 * row["split_s"][name] for row in ranks]
        parts.barh(numbers, widths, 0.8 if len(ranks) < 64 else 1.0, left, color=colour, label=name)
        left = [start + width for start, width in zip(left, widths)]
    parts.set_xlabel("step time, ms")
    parts.legend(fontsize=8, ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, columnspacing=1)
    if len(ranks) < 20:
        histogram.set_yticks(numbers, [f"{row['rank']} ({row['host']})" for row in ranks])
    histogram.invert_yaxis()
    save(figure, path)
