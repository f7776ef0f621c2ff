"""The answers of `python -m resnet_cpu.simulate`: the table, the CSV and the plot of a prediction."""

import dataclasses
import re
import sys
from typing import Any, Dict, List, Tuple

from resnet_cpu.errors import DataError, FlagError
from resnet_cpu.recipe.batch import Batch
from resnet_cpu.report import plan_table, plotting, scaling_plots
from resnet_cpu.settings import Settings
from resnet_cpu.simulator import cluster as clusters
from resnet_cpu.simulator import published
from resnet_cpu.simulator.cluster import Cluster, CurvePoint, efficiency
from resnet_cpu.simulator.exchange import Step
from resnet_cpu.text import aligned, count, duration

CSV_HEADER = "nodes,ranks,global_batch_size,images_per_second,efficiency,step_s," + ",".join(
    f"{field.name}_s" if field.name != "messages" else "messages" for field in dataclasses.fields(Step)
)
BATCHES = (8, 16, 32, 64, 128)  # images of a rank, compared with each other
TARGET = 0.9  # share of the speed of one node that the paper claims to keep (arXiv 1711.04291, abstract)
PLOT = "simulate.png"


def answer(settings: Settings) -> str:
    """Return the text to print: a table, CSV, or the path of the plot that was drawn."""
    cluster = clusters.from_settings(settings)
    points, refused = clusters.curve(cluster, settings.simulate.nodes)
    left_out = left_out_lines(points, refused)
    if settings.prediction.format == "table":
        return "\n".join(table_lines(cluster, points, left_out))
    print(*left_out, sep="\n", end="\n" if left_out else "", file=sys.stderr)
    if settings.prediction.format == "csv":
        return "\n".join(csv_lines(cluster, points))
    _draw(cluster, points)
    return PLOT


def csv_lines(cluster: Cluster, points: List[CurvePoint]) -> List[str]:
    """Return the curve as CSV; times in seconds."""
    lines = [CSV_HEADER]
    for point in points:
        ranks = point.nodes * cluster.ranks_per_node
        cells = [point.nodes, ranks, point.batch.total, point.nodes * point.speed, efficiency(points[0], point)]
        lines.append(",".join(repr(cell) for cell in [*cells, point.step.total, *dataclasses.astuple(point.step)]))
    return lines


def table_lines(cluster: Cluster, points: List[CurvePoint], left_out: List[str]) -> List[str]:
    """Return all answers: the curve, its limit and the causes, the time to train, local batches, published points."""
    nodes = points[-1].nodes
    return [
        *cluster.sources,
        "",
        *_curve_lines(cluster, points),
        *left_out,
        "",
        cause_line(cluster, points),
        *_other_order_lines(cluster, points),
        "",
        _training_line(cluster, nodes),
        *plan_table.max_steps_note(cluster.settings),
        "",
        *_batch_lines(cluster, nodes),
        "",
        *published_lines(),
    ]


def left_out_lines(points: List[CurvePoint], refused: Dict[int, FlagError]) -> List[str]:
    """Return which numbers of nodes are not possible: a line if --nodes is one, then a line for each kind of reason."""
    lines = []
    last, most = points[-1].nodes, max(refused, default=0)
    if most > last:
        lines.append(f"{most:,} nodes are not possible; the answers are for {last:,}, the largest number that is")
    kinds: Dict[str, List[int]] = {}
    for nodes, error in refused.items():
        kinds.setdefault(re.sub(r"\d+", "", str(error).split("; ")[0]), []).append(nodes)
    for several in kinds.values():
        numbers = ", ".join(f"{nodes:,}" for nodes in several)
        lines.append(f"left out: {numbers}; at {several[-1]:,}: {refused[several[-1]]}")
    return lines


def _nodes(number: int) -> str:
    return "one node" if number == 1 else count(f"{number:,}", "node")


def _per_rank(batch: Batch) -> str:
    times = f" x {batch.accumulate_steps} accumulated" if batch.accumulate_steps > 1 else ""
    return f"{count(batch.per_rank, 'image')}{times} per rank"


def _curve_lines(cluster: Cluster, points: List[CurvePoint]) -> List[str]:
    """Return the efficiency curve, with the milliseconds of a step split into their parts."""
    settings = cluster.settings
    table = [["nodes", "ranks", "batch", "images/s", "per node", "efficiency", "step ms", "compute", "jitter"]]
    table[0] += ["allreduce", "coordinator", "input", "messages"]
    for point in points:
        step = point.step
        parts = (step.total, step.compute, step.jitter, step.allreduce, step.coordinator, step.input)
        table.append(
            [
                f"{point.nodes:,}",
                f"{point.nodes * cluster.ranks_per_node:,}",
                f"{point.batch.total:,}",
                f"{point.nodes * point.speed:,.0f}",
                f"{point.speed:.1f}",
                f"{100 * efficiency(points[0], point):.1f} %",
                *(f"{1000 * part:.1f}" for part in parts),
                f"{step.messages}",
            ]
        )
    title = f"{settings.model.model}, {count(cluster.ranks_per_node, 'rank')} per node, "
    if settings.recipe.global_batch_size:
        title += f"{points[0].batch.total:,} images a step in all (strong scaling)"
    else:
        title += f"{_per_rank(points[0].batch)}, the batch grows with the nodes (weak scaling)"
    if points[0].nodes > 1:
        title += f"; efficiency relative to {_nodes(points[0].nodes)}"
    return [title, *aligned(table)]


def cause_line(cluster: Cluster, points: List[CurvePoint]) -> str:
    """Return where efficiency first falls below the target, and the shares of that step that cause it."""
    one = points[0]
    below = clusters.first_below(cluster, points, TARGET)
    point = below or points[-1]
    # The additional seconds of each part, compared with a step of the first point on as many images per node.
    scale = point.batch.total / point.nodes / (one.batch.total / one.nodes)
    parts = {part: part for part in ("jitter", "allreduce", "coordinator", "input")}
    parts["compute"] = "the update and other costs of a step or micro-batch that do not depend on its images"
    lost = [(getattr(point.step, part) - scale * getattr(one.step, part), text) for part, text in parts.items()]
    shares = sorted(((extra / point.step.total, text) for extra, text in lost), reverse=True)
    causes = ", ".join(f"{text} {100 * share:.1f} %" for share, text in shares if share > 5e-4) or "nothing"
    where = "below {:.0f} % at {}" if below else "above {:.0f} % up to {}"
    where = where.format(100 * TARGET, _nodes(point.nodes))
    return f"efficiency is {where}; extra time compared with {_nodes(one.nodes)}, as shares of that step: {causes}"


def _other_order_lines(cluster: Cluster, points: List[CurvePoint]) -> List[str]:
    """Return the efficiency if TensorFlow yielded gradients layer by layer, where it does not."""
    if cluster.inter_op_threads != 1:
        return []
    other = cluster._replace(inter_op_threads=2)
    ends = (points[0], points[-1])
    one, many = (end._replace(step=clusters.step_of(other, end.nodes, end.batch)) for end in ends)
    return [
        f"efficiency on {_nodes(many.nodes)}: {100 * efficiency(*ends):.1f} %; it would be "
        f"{100 * efficiency(one, many):.1f} % if gradients came layer by layer (inter_op_threads=2)"
    ]


def _training_line(cluster: Cluster, nodes: int) -> str:
    """Return the time and the node-hours of the recipe on `nodes` nodes."""
    settings = cluster.settings
    examples = clusters.train_examples(settings)
    if not settings.recipe.phases:
        return "time to train: not known without a --phase; give a --flagfile"
    if not examples:
        return f"time to train: not known, since the size of {settings.data.dataset} is not; give --train_examples"
    try:
        seconds = clusters.training_seconds(cluster, nodes, examples)
    except DataError:
        return f"time to train: a step on {_nodes(nodes)} has more than the {examples:,} images of the data set"
    parts = ", ".join(f"{name} {duration(part)}" for name, part in seconds.items())
    total = sum(seconds.values())
    return (
        f"the recipe on {_nodes(nodes)}: {duration(total)}, {total * nodes / 3600:,.1f} node-hours ({parts}; start and "
        "first step not included)"
    )


def _batch_lines(cluster: Cluster, nodes: int) -> List[str]:
    """Return a comparison of local batches: on `nodes` nodes, and for a constant global batch."""
    settings, ranks_per_node = cluster.settings, cluster.ranks_per_node
    total = clusters.point(cluster, nodes).batch.total
    examples = clusters.train_examples(settings)
    table = [["images per rank", "batch", "images/s", "efficiency", "|", "nodes", "epoch s", "node-h per epoch"]]

    def point(count: int, per_rank: int) -> CurvePoint:
        batch = Batch(per_rank, 1, per_rank * count * ranks_per_node)
        return CurvePoint(count, batch, clusters.step_of(cluster, count, batch))

    for per_rank in BATCHES:
        many = point(nodes, per_rank)
        share = 100 * efficiency(point(1, per_rank), many)
        row = [str(per_rank), f"{many.batch.total:,}", f"{nodes * many.speed:,.0f}", f"{share:.1f} %", "|"]
        few, rest = divmod(total, per_rank * ranks_per_node)
        if rest or not few:
            table.append([*row, "-", "-", "-"])
            continue
        seconds = examples / (few * point(few, per_rank).speed) if examples else None
        shown = ["-", "-"] if seconds is None else [f"{seconds:.1f}", f"{seconds * few / 3600:.2f}"]
        table.append([*row, f"{few:,}", *shown])
    base = ", relative to one node with as many images per rank" if nodes > 1 else ""
    return [f"local batch: on {_nodes(nodes)}{base} | for a global batch of {total:,}", *aligned(table)]


def published_lines() -> List[str]:
    """Return the published figures, those that a fit used and those held out, beside the predictions, with errors."""
    lines = ["published points (of Intel Caffe with MLSL, if not named otherwise)"]
    rows = published.rows()
    titles = {
        "two_constants": "two constants, two points (speed, jitter)",
        "three_constants": "a third, a fixed time per batch, and a third point (DAWNBench)",
    }
    for name, title in titles.items():
        fit = published.best_fit(name)
        node = fit.node
        assert isinstance(node.jitter, float)
        lines.append(
            f"  {title}: {1000 * node.image_s:.2f} ms per image and rank, jitter {100 * node.jitter:.2f} %"
            + (f", {1000 * node.batch_s:.0f} ms per batch" if node.batch_s else "")
        )
        table = [["", "published", "model", "error", "", ""]]
        for point in fit.comparisons:
            measured, predicted = f"{point.measured:.4g} {point.unit}", f"{point.predicted:.4g}"
            kind = "fitted to" if point.fitted else "held out"
            table.append(
                [point.name, measured, predicted, f"{100 * point.error:+.1f} %", kind, rows[point.name]["what"]]
            )
        lines += ["    " + line for line in aligned(table, str.ljust)]
    many = published.many_cores()
    lines.append(
        f"  104K cores, read as 1,536 Xeon Phi of 68 cores with 16 images each, speed fitted to 2,048 of them: "
        f"{many.minutes.predicted:.1f} min for 90 epochs (published {many.minutes.measured:g}, error "
        f"{100 * many.minutes.error:+.1f} %), efficiency {100 * many.efficiency:.1f} % of one node"
    )
    lines.append(
        f"  for {many.minutes.measured:g} min each of the 1,536 has to reach {many.needed_images_per_s:.1f} images/s, "
        f"a step of {1000 * 16 / many.needed_images_per_s:.0f} ms, including the slowest of them"
    )
    return lines


def plot_data(
    cluster: Cluster, points: List[CurvePoint]
) -> Tuple[Dict[str, Tuple[List[int], List[float]]], List[Dict[str, Any]], str]:
    """Return curves by name (nodes, efficiency), published speed-ups (`nodes share label fitted`), and the title."""
    curves = {"this": _shares(points)}
    for threads, label in ((1, "most kernels' gradients last"), (2, "gradients layer by layer")):
        if threads != cluster.inter_op_threads:
            other = cluster._replace(inter_op_threads=threads)
            curves[f"if {label}"] = _shares(clusters.curve(other, points[-1].nodes)[0])
    rows = published.rows()
    speed_ups = []
    for point in published.best_fit().comparisons:
        if point.unit == "x" and points[0].nodes == 1:  # they are relative to one node
            nodes = int(rows[point.name]["nodes"])
            share = point.measured / nodes
            speed_ups.append({"nodes": nodes, "share": share, "label": point.name, "fitted": point.fitted})
    ranks = count(cluster.ranks_per_node, "rank")
    title = f"{cluster.settings.model.model}, {_per_rank(points[0].batch)}, {ranks} per node, {cluster.network.name}"
    return curves, speed_ups, title


def _shares(points: List[CurvePoint]) -> Tuple[List[int], List[float]]:
    return [point.nodes for point in points], [efficiency(points[0], point) for point in points]


def _draw(cluster: Cluster, points: List[CurvePoint]) -> None:
    """Draw the curve to PLOT; raise FlagError without matplotlib."""
    plotting.require()
    curves, speed_ups, title = plot_data(cluster, points)
    scaling_plots.draw_prediction(curves, speed_ups, PLOT, title, _nodes(points[0].nodes))
