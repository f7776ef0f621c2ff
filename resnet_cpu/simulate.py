"""What N nodes would do, without them: `python -m resnet_cpu.simulate --flagfile=F`. No training, no TensorFlow."""

import dataclasses
import json
import os
import statistics
import sys
import zipfile
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import numpy as np

from resnet_cpu import flags
from resnet_cpu.cluster import guard
from resnet_cpu.cluster import placement as layout
from resnet_cpu.data.datasets import facts_of
from resnet_cpu.errors import CheckpointError, FlagError
from resnet_cpu.model import tensors as layers
from resnet_cpu.recipe import batch as batch_rule
from resnet_cpu.recipe.batch import Batch
from resnet_cpu.report.text import duration
from resnet_cpu.run import past_run
from resnet_cpu.run.folder import read_json, read_rows
from resnet_cpu.settings import Settings, plan
from resnet_cpu.simulator import exchange as simulator
from resnet_cpu.simulator import published as calibrate
from resnet_cpu.simulator.exchange import Exchange, Node, Step
from resnet_cpu.simulator.network import NETWORKS, Network, World, check

CSV_HEADER = "nodes,ranks,global_batch_size,images_per_second,efficiency,step_s," + ",".join(
    f"{field.name}_s" if field.name != "messages" else "messages" for field in dataclasses.fields(Step)
)
BATCHES = (8, 16, 32, 64, 128)
AIM = 0.05  # of a measured step, within which it should be predicted
KEPT = 0.9  # of one node's speed: what the paper claims to keep (arXiv 1711.04291, abstract)


class Rung(NamedTuple):
    """A number of nodes, what a step of theirs holds and how long it takes."""

    nodes: int
    batch: Batch
    step: Step

    def speed(self) -> float:
        """Return the images a second of a node."""
        return self.batch.total / self.step.total / self.nodes


class Cluster(NamedTuple):
    """What is simulated."""

    settings: Settings
    node: Node
    ranks_per_node: int
    network: Network
    exchange: Exchange
    inter_op_threads: int
    told: Tuple[str, ...]  # where the constants come from


def main(argv: List[str]) -> None:
    """Print the curve and what follows from it as a table or csv, or draw it; or hold the model against a replay."""
    values, _ = flags.parse_values(argv, "simulate")
    if values.validate:
        _validate(values.validate, values.output)
        return
    settings = flags.make_settings(values)
    cluster = _cluster(settings, values)
    rows, left_out = curve(cluster, values.nodes)
    if values.format == "csv":
        print("\n".join([CSV_HEADER, *(_csv_row(row, rows[0], cluster) for row in rows)]))
    elif values.format == "png":
        output = values.output or "simulate.png"
        _draw(cluster, rows, output)
        print(output)
    else:
        lines = [
            *cluster.told,
            "",
            *_curve_lines(cluster, rows),
            *left_out,
            "",
            *_why(cluster, rows),
            *_in_other_order(cluster, rows),
        ]
        most = rows[-1].nodes
        lines += ["", *_training_lines(cluster, most), "", *_batch_lines(cluster, most)]
        print("\n".join([*lines, "", *published_lines()]))


def _cluster(settings: Settings, values: Any) -> Cluster:
    """Return what the flags describe, with a line on where each constant comes from."""
    there = past_run.ranks_per_node(values.past_run) if values.past_run else None
    ranks_per_node = flags.ranks_per_node(values) or there or 2
    if there not in (None, ranks_per_node):
        raise FlagError(
            f"--ranks_per_node={ranks_per_node}: --past_run={values.past_run} had {there} on a node, whose ranks slow "
            "each other down; leave it out, or name a run with as many"
        )
    published = calibrate.published().node
    node, told = published, ["node: Intel Caffe's on 2x Xeon 8160, fitted to published points, see below"]
    model = settings.model
    network_told = f"{model.model} of width {model.width:g} at {settings.data.image_size} pixels in {model.precision}"
    if network_told != "resnet50 of width 1 at 224 pixels in float32" and not (
        values.images_per_second or values.past_run
    ):
        raise FlagError(
            f"{network_told}: its speed is not known; give --images_per_second of one node by itself, or --past_run"
        )
    if values.ranks not in (None, values.nodes * ranks_per_node):
        raise FlagError(
            f"--ranks={values.ranks}: contradicts {values.nodes} nodes of {ranks_per_node}; leave it out, or give "
            "--nodes and --ranks_per_node"
        )
    if values.past_run and values.images_per_second:
        raise FlagError(f"--past_run={values.past_run}: contradicts --images_per_second; leave one of the two out")
    if values.images_per_second:
        node = Node(image_s=ranks_per_node / values.images_per_second, jitter=published.jitter)
        told = ["node: speed as given; jitter fitted to published points, see below"]
    if values.past_run:
        node = _past_node(values.past_run, settings)
        told = [f"node: speed and jitter of {values.past_run}"]
    constants = {} if values.network in NETWORKS else _constants(values.network)
    of = {kind: {field.name for field in dataclasses.fields(kind)} for kind in (Network, Exchange, Node)}
    known = sorted(set().union(*of.values()) - {"name"} | {"inter_op_threads"})
    for key in constants:
        if key not in known:
            raise FlagError(f"--network={values.network}: unknown key '{key}'; known are {', '.join(known)}")

    def given(kind: Any) -> Dict[str, Any]:
        return {key: value for key, value in constants.items() if key in of[kind]}

    measured = {
        "--past_run": ("image_s", "fixed_s", "batch_s", "jitter"),
        "--images_per_second": ("image_s", "batch_s"),
    }
    for flag, keys in measured.items():
        twice = [key for key in keys if key in constants and values[flag[2:]].value]
        if twice:
            raise FlagError(f"--network={values.network}: {', '.join(twice)} is told by {flag}, too; leave one out")
    base = NETWORKS.get(values.network)
    if base is None:
        for key in ("latency_s", "bandwidth"):
            if key not in constants:
                raise FlagError(f"--network={values.network}: '{key}' is missing; measure it (docs/simulate.md)")
        base = Network(values.network, constants["latency_s"], constants["bandwidth"])
        told.append(f"network: {values.network}")
    else:
        told.append(
            f"network: {base.name}, {base.bandwidth * 8 / 1e9:g} Gb/s by name; assumed: {1e6 * base.latency_s:g} us a "
            f"message, {base.memory_bandwidth / 1e9:g} GB/s a rank in memory and in adding up"
        )
    threads = int(constants.get("inter_op_threads", layout.environment(1)["TF_NUM_INTEROP_THREADS"]))
    order = "most kernels last" if threads == 1 else "layer by layer"
    told.append(f"gradients: {order}, as TensorFlow yields them with inter_op_threads={threads}")
    network = check(dataclasses.replace(base, **given(Network)))
    exchange, node = dataclasses.replace(Exchange(), **given(Exchange)), dataclasses.replace(node, **given(Node))
    return Cluster(settings, node, ranks_per_node, network, exchange, threads, tuple(told))


def _constants(path: str) -> Dict[str, Any]:
    """Return the constants of a JSON file: numbers by name, `jitter` also a list, `algorithm` a name."""
    if not os.path.exists(path):
        raise FlagError(f"--network={path}: neither a file nor one of {', '.join(NETWORKS)}")
    found = read_json(path)
    if not isinstance(found, dict):
        raise FlagError(f"--network={path}: is no JSON object; write names and numbers, as docs/simulate.md shows")
    for key, value in found.items():
        if key == "jitter" and isinstance(value, list) and value and all(_positive(time) for time in value):
            found[key] = tuple(value)
        elif key == "algorithm" and isinstance(value, str):
            continue
        elif not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
            raise FlagError(f"--network={path}: {key}={value!r} must be a number from 0 on")
    for key in ("image_s", "input_images_per_s"):
        if key in found and not found[key] > 0:
            raise FlagError(f"--network={path}: {key}={found[key]!r} must be above 0")
    if not found.get("interference", 0) < 1:
        raise FlagError(f"--network={path}: interference={found['interference']} must be a share below 1")
    return found


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and 0 < value < float("inf")


def _past_node(run_dir: str, settings: Settings) -> Node:
    """Return the speed of a past run's rank, and the jitter of its logged steps."""
    result = past_run.result(run_dir, settings.model, [settings.data.image_size])
    measured = os.path.join(run_dir, "step_times.npz")
    if os.path.exists(measured):
        return _measured_node(measured, result)
    rows = read_rows(os.path.join(run_dir, "metrics.jsonl"))
    times = [row["step_s"] for row in rows[1:] if row.get("step_s")]
    if len(times) < 3:
        raise CheckpointError(f"--past_run={run_dir}: too few rows in metrics.jsonl; log more often")
    # A row is the mean over the steps since the row before: means of k independent steps vary less by sqrt(k).
    span = statistics.median(after["step"] - before["step"] for before, after in zip(rows, rows[1:]))
    return Node(image_s=result["ranks"] / result["images_per_second"], jitter=simulator.fit_jitter(times) * span**0.5)


def _measured_node(path: str, result: Dict[str, Any]) -> Node:
    """Return what ranks' own clocks said in a run of --experiment=scaling, without waiting for peers or messages."""
    try:
        with np.load(path, allow_pickle=False) as file:
            seconds = file["seconds"]  # [ranks, steps, (between, data, compute, after the last gradient)]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        raise CheckpointError(f"{path}: cannot be read; run the scaling run again, or remove the file") from None
    work = seconds[..., :3].sum(-1)
    each = work / work.mean(1, keepdims=True)  # a rank that is always slow is no jitter
    # After the last gradient of a lone rank there is nothing but the update.
    fixed_s = float(seconds[..., 3].mean()) if len(seconds) == 1 else 0.0
    images = result["global_batch_size"] / result["ranks"]
    return Node(image_s=float(work.mean()) / images, fixed_s=fixed_s, jitter=tuple(each.ravel().tolist()))


def _batch(settings: Settings, ranks: int) -> Batch:
    recipe = settings.recipe
    return batch_rule.resolve_batch(recipe.batch_size, recipe.global_batch_size, ranks, recipe.accumulate_steps)


def _tensors(cluster: Cluster, image_size: int) -> Tuple[layers.Layer, ...]:
    model = cluster.settings.model
    return layers.gradients(
        model.model,
        model.width,
        model.num_classes,
        model.stem,
        model.conv1_bias,
        image_size,
        model.stride_in,
        cluster.inter_op_threads,
    )


def _step(cluster: Cluster, nodes: int, batch: Batch, image_size: Optional[int] = None) -> Step:
    """Return the step of so many nodes; an image of another size takes as long as it has work."""
    usual = cluster.settings.data.image_size
    tensors = _tensors(cluster, image_size or usual)
    node = cluster.node
    if image_size and image_size != usual:
        work = [sum(tensor.backward_work for tensor in _tensors(cluster, size)) for size in (image_size, usual)]
        node = dataclasses.replace(node, image_s=node.image_s * work[0] / work[1])
    world = World(nodes, cluster.ranks_per_node)
    return simulator.step(
        tensors, batch.per_rank, node, world, cluster.network, cluster.exchange, batch.accumulate_steps
    )


def curve(cluster: Cluster, most: int) -> Tuple[List[Rung], List[str]]:
    """Return the steps of 1, 2, 4, ... nodes and `most`, and a line on those that the global batch cannot be cut for.

    Without a global batch a rank's images stay and the batch grows with the nodes; a global batch stays as it is, and
    ranks accumulate as the flags say.
    """
    rows: List[Rung] = []
    without, refused = [], None
    for nodes in [*(2**power for power in range(most.bit_length()) if 2**power < most), most]:
        try:
            batch = _batch(cluster.settings, nodes * cluster.ranks_per_node)
        except FlagError as error:
            without.append(f"{nodes:,}")
            refused = error
            continue
        rows.append(Rung(nodes, batch, _step(cluster, nodes, batch)))
    if refused is not None and not rows:
        raise refused
    told = f"left out, since the global batch cannot be cut for them: {', '.join(without)}"
    return rows, [told] if without else []


def efficiency(one: Rung, many: Rung) -> float:
    """Return the share of the speed of a node of `one` that a node of `many` keeps."""
    return many.speed() / one.speed()


def _csv_row(row: Rung, one: Rung, cluster: Cluster) -> str:
    ranks = row.nodes * cluster.ranks_per_node
    cells = [row.nodes, ranks, row.batch.total, row.nodes * row.speed(), efficiency(one, row), row.step.total]
    return ",".join(repr(cell) for cell in [*cells, *dataclasses.astuple(row.step)])


def _held(batch: Batch) -> str:
    times = f" x {batch.accumulate_steps} accumulated" if batch.accumulate_steps > 1 else ""
    return f"{batch.per_rank} images{times} a rank"


def _curve_lines(cluster: Cluster, rows: List[Rung]) -> List[str]:
    """Return the efficiency curve, milliseconds split into their parts."""
    settings = cluster.settings
    table = [["nodes", "ranks", "batch", "images/s", "a node", "efficiency", "step ms", "compute", "jitter"]]
    table[0] += ["allreduce", "coordinator", "input", "messages"]
    for row in rows:
        found = row.step
        parts = (found.total, found.compute, found.jitter, found.allreduce, found.coordinator, found.input)
        table.append([f"{row.nodes:,}", f"{row.nodes * cluster.ranks_per_node:,}", f"{row.batch.total:,}"])
        table[-1] += [f"{row.nodes * row.speed():,.0f}", f"{row.speed():.1f}"]
        table[-1] += [f"{100 * efficiency(rows[0], row):.1f} %"]
        table[-1] += [*(f"{1000 * part:.1f}" for part in parts), f"{found.messages}"]
    title = f"{settings.model.model}, {cluster.ranks_per_node} ranks a node, "
    if settings.recipe.global_batch_size:
        title += f"{rows[0].batch.total:,} images a step in all (strong scaling)"
    else:
        title += f"{_held(rows[0].batch)}, the batch grows with the nodes (weak scaling)"
    return [title, *_aligned(table)]


def _aligned(table: List[List[str]], to: Callable[[str, int], str] = str.rjust) -> List[str]:
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return ["  ".join(map(to, row, widths)).rstrip() for row in table]


def _first_below(cluster: Cluster, rows: List[Rung]) -> Optional[Rung]:
    """Return where less than KEPT is left for the first time, to 2 % of the nodes; None if that is nowhere.

    Efficiency is taken to fall between two rows of the curve. It does not where ranks past a power of two cost a
    butterfly's messages more, and a global batch cannot be cut for any number of nodes: there it is the row itself.
    """
    smooth = cluster.network.algorithm in ("best", "ring", "hierarchical")

    below = next((number for number, row in enumerate(rows) if efficiency(rows[0], row) < KEPT), None)
    if not below:
        return None
    low, high = rows[below - 1], rows[below]
    between = smooth and not cluster.settings.recipe.global_batch_size
    while between and high.nodes - low.nodes > max(1, low.nodes // 50):
        nodes = (low.nodes + high.nodes) // 2
        batch = _batch(cluster.settings, nodes * cluster.ranks_per_node)
        middle = Rung(nodes, batch, _step(cluster, nodes, batch))
        low, high = (low, middle) if efficiency(rows[0], middle) < KEPT else (middle, high)
    return high


def _why(cluster: Cluster, rows: List[Rung]) -> List[str]:
    """Return where less than KEPT is left for the first time, and what takes it."""
    one = rows[0]
    below = _first_below(cluster, rows)
    row = below or rows[-1]
    # What a step of `row` spends more on a part than the base does on as many images.
    scale = row.batch.total / row.nodes / (one.batch.total / one.nodes)
    named = {part: part for part in ("jitter", "allreduce", "coordinator", "input")}
    named["compute"] = "the update and what else a step costs whatever its batch"
    lost = [(getattr(row.step, part) - scale * getattr(one.step, part), what) for part, what in named.items()]
    shares = sorted(((extra / row.step.total, what) for extra, what in lost), reverse=True)
    told = ", ".join(f"{what} {100 * share:.1f} %" for share, what in shares if share > 5e-4) or "nothing"
    nodes = f"{row.nodes:,} node{'s' if row.nodes > 1 else ''}"
    if below:
        return [f"below {100 * KEPT:.0f} % at {nodes}; of the step there, beyond one node's: {told}"]
    return [f"above {100 * KEPT:.0f} % up to {nodes}; of the step there, beyond one node's: {told}"]


def _in_other_order(cluster: Cluster, rows: List[Rung]) -> List[str]:
    """Return what would be left if TensorFlow yielded gradients layer by layer, where it does not."""
    if cluster.inter_op_threads != 1:
        return []
    other = cluster._replace(inter_op_threads=2)
    one, many = (row._replace(step=_step(other, row.nodes, row.batch)) for row in (rows[0], rows[-1]))
    share, here = (100 * efficiency(*ends) for ends in ((one, many), (rows[0], rows[-1])))
    return [f"at {many.nodes:,}: {here:.1f} %; {share:.1f} % if gradients came layer by layer (inter_op_threads=2)"]


def _training_lines(cluster: Cluster, nodes: int) -> List[str]:
    """Return time and node-hours of the recipe on `nodes` nodes."""
    settings = cluster.settings
    examples = settings.data.train_examples or facts_of(settings.data.dataset).train_examples
    if not settings.recipe.phases:
        return ["no --phase given, so no time to train: give a --flagfile"]
    if not examples:
        return [f"the size of {settings.data.dataset} is not known, so no time to train: give --train_examples"]
    seconds = training_seconds(cluster, nodes, examples)
    told = ", ".join(f"{what} {duration(part)}" for what, part in seconds.items())
    total = sum(seconds.values())
    return [
        f"the recipe on {nodes:,} nodes: {duration(total)}, {total * nodes / 3600:,.1f} node-hours ({told}; start and "
        "first step not counted)"
    ]


def training_seconds(cluster: Cluster, nodes: int, examples: int) -> Dict[str, float]:
    """Return the seconds of a recipe by what they are spent on: `training`, `evaluation`, `checkpoints`."""
    settings, ranks = cluster.settings, nodes * cluster.ranks_per_node
    planned = plan(settings, ranks, examples)
    training, steps = 0.0, 0
    found: Dict[int, float] = {}
    for phase in planned.phases:
        if phase.image_size not in found:
            found[phase.image_size] = _step(cluster, nodes, planned.batch, phase.image_size).total
        training += phase.steps * found[phase.image_size]
        steps += phase.steps
    run, evaluations = settings.run, 0.0
    if run.eval_every_epochs:
        evaluations = steps * planned.batch.total / examples / run.eval_every_epochs
    held = run.eval_batch_size or planned.batch.per_rank
    rounds = -(-(facts_of(settings.data.dataset).validation_examples or 0) // (ranks * held))
    forward_s = (1 - simulator.BACKWARD_SHARE) * cluster.node.image_s
    saved = steps / run.checkpoint_every_steps if run.checkpoint_every_steps else len(planned.phases)
    weights = sum(tensor.bytes for tensor in _tensors(cluster, settings.data.image_size))
    return {
        "training": training,
        "evaluation": evaluations * rounds * held * forward_s,
        "checkpoints": saved * 2 * weights / simulator.DISK_BANDWIDTH,
    }


def _batch_lines(cluster: Cluster, nodes: int) -> List[str]:
    """Return what the local batch does: at so many nodes, and for a global batch that stays."""
    settings = cluster.settings
    fixed = _batch(settings, nodes * cluster.ranks_per_node).total
    examples = settings.data.train_examples or facts_of(settings.data.dataset).train_examples or 0
    table = [["images a rank", "batch", "images/s", "efficiency", "|", "nodes", "epoch s", "node-h an epoch"]]

    def of(count: int, held: int) -> Rung:
        batch = Batch(held, 1, held * count * cluster.ranks_per_node)
        return Rung(count, batch, _step(cluster, count, batch))

    for held in BATCHES:
        many = of(nodes, held)
        share = 100 * efficiency(of(1, held), many)
        row = [str(held), f"{many.batch.total:,}", f"{nodes * many.speed():,.0f}", f"{share:.1f} %", "|"]
        few, left = divmod(fixed, held * cluster.ranks_per_node)
        if left or not few:
            table.append([*row, "-", "-", "-"])
            continue
        seconds = examples / (few * of(few, held).speed())
        table.append([*row, f"{few:,}", f"{seconds:.1f}", f"{seconds * few / 3600:.2f}"])
    return [f"local batch: on {nodes:,} nodes | for a global batch of {fixed:,}", *_aligned(table)]


def published_lines() -> List[str]:
    """Return what the model says of published points: those it was fitted to and those it was not, with errors."""
    lines = ["published points (Intel Caffe with MLSL, no Horovod)"]
    rows = calibrate.published_rows()
    fits = {False: calibrate.published(False), True: calibrate.published(True)}
    said = {
        False: "two constants, two points (speed, jitter)",
        True: "a third, a fixed time a batch, and a third point (DAWNBench)",
    }
    for with_fixed, fit in fits.items():
        node = fit.node
        assert isinstance(node.jitter, float)
        lines.append(
            f"  {said[with_fixed]}: {1000 * node.image_s:.2f} ms an image and rank, jitter {100 * node.jitter:.2f} %"
            + (f", {1000 * node.batch_s:.0f} ms a batch" if with_fixed else "")
        )
        table = [["", "published", "model", "error", "", ""]]
        for point in fit.points:
            kind = "fitted to" if point.fitted else "held out"
            measured, predicted = f"{point.measured:.4g} {point.unit}", f"{point.predicted:.4g}"
            table.append(
                [point.name, measured, predicted, f"{100 * point.error:+.1f} %", kind, rows[point.name]["what"]]
            )
        lines += ["    " + line for line in _aligned(table, str.ljust)]
    many = calibrate.many_cores(fits[False].node)
    lines.append(
        f"  104K cores, read as 1,536 Xeon Phi of 68 cores with 16 images each, speed fitted to 2,048 of them: "
        f"{many.minutes.predicted:.1f} min for 90 epochs (published {many.minutes.measured:g}, error "
        f"{100 * many.minutes.error:+.1f} %), efficiency {100 * many.efficiency:.1f} % of one node"
    )
    lines.append(
        f"  for {many.minutes.measured:g} min each of the 1,536 would have to do {many.needed_images_per_s:.1f} "
        f"images/s, a step of {1000 * 16 / many.needed_images_per_s:.0f} ms, the slowest of them included"
    )
    return lines


def _draw(cluster: Cluster, rows: List[Rung], path: str) -> None:
    plots = _plots()
    model = cluster.settings.model.model
    told = f"{model}, {_held(rows[0].batch)}, {cluster.ranks_per_node} ranks a node, {cluster.network.name}"
    curves = {"this": _shares(rows)}
    for threads, label in ((1, "most kernels' gradients last"), (2, "gradients layer by layer")):
        other = cluster._replace(inter_op_threads=threads)
        if threads != cluster.inter_op_threads:
            curves[f"if {label}"] = _shares(curve(other, rows[-1].nodes)[0])
    points = []
    for point in calibrate.published().points:
        row = calibrate.published_rows()[point.name]
        if point.unit == "x":
            nodes = int(row["nodes"])
            points.append(
                {"nodes": nodes, "share": point.measured / nodes, "label": point.name, "fitted": point.fitted}
            )
    plots.draw_prediction(curves, points, path, told)


def _shares(rows: List[Rung]) -> Tuple[List[int], List[float]]:
    return [row.nodes for row in rows], [efficiency(rows[0], row) for row in rows]


def _plots() -> Any:
    from resnet_cpu.report import run_plots as plots

    if not plots.available():
        raise FlagError("a plot was asked for, and matplotlib is not installed; pip install matplotlib")
    return plots


def _validate(path: str, output: Optional[str]) -> None:
    """Print measured and predicted steps of a replay, the constants as JSON, and draw them where --output is given."""
    found = calibrate.validate(calibrate.read_replay(path))
    table = [["", "compute s", "measured s", "predicted s", "error", ""]]
    for setting, point in found.rows:
        kind = "fitted to" if point.fitted else "held out"
        table.append([point.name, f"{setting.compute_s:g}", f"{point.measured:.4f}", f"{point.predicted:.4f}"])
        table[-1] += [f"{100 * point.error:+.1f} %", kind]
    print("\n".join(_aligned(table, str.ljust)))
    for label, errors in found.errors().items():
        median, largest = 100 * statistics.median(errors), 100 * max(errors)
        print(f"{label}: {len(errors)} settings, median error {median:.1f} %, largest {largest:.1f} %")
    for hosts in found.networks:
        errors = found.of_models(hosts)
        if errors:
            near = sum(error <= AIM for error in errors)
            print(
                f"models, held out, {hosts} hosts: {near} of {len(errors)} within {100 * AIM:g} %, median error "
                f"{100 * statistics.median(errors):.1f} %, largest {100 * max(errors):.1f} %"
            )
    if output:
        points = [dataclasses.asdict(point) for _, point in found.rows]
        _plots().draw_validation(points, output, os.path.basename(path))
        print(output, file=sys.stderr)
    # Without a bandwidth: that was the links', not the network's to be predicted.
    measured = ("latency_s", "memory_latency_s", "reduce_s_per_byte")
    constants = {
        hosts: {**{key: getattr(network, key) for key in measured}, "algorithm": "openmpi"}
        for hosts, network in found.networks.items()
    }
    print(json.dumps(constants))


if __name__ == "__main__":
    guard.run(main)
