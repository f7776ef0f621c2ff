"""The simulated cluster: from settings to node, network and exchange, then to steps, the curve and training time."""

import dataclasses
import os
import statistics
import zipfile
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import numpy as np

from resnet_cpu import resolve
from resnet_cpu.cluster import placement
from resnet_cpu.data.datasets import NO_EVALUATION, facts_of
from resnet_cpu.errors import CheckpointError, FlagError
from resnet_cpu.model import tensors
from resnet_cpu.model.tensors import Gradient
from resnet_cpu.recipe import schedule
from resnet_cpu.recipe.batch import Batch, intervals
from resnet_cpu.resolve import Resolved
from resnet_cpu.run import files, past_run
from resnet_cpu.run.folder import read_json, read_rows
from resnet_cpu.settings import Settings
from resnet_cpu.simulator import exchange, published
from resnet_cpu.simulator.exchange import Exchange, Node, Step
from resnet_cpu.simulator.network import ALGORITHM_NAMES, NETWORKS, Allocation, Network

RANKS_PER_NODE = 2  # of the nodes of the fit, and where neither flags nor a past run say otherwise
DISK_BANDWIDTH = 1e9  # bytes/s at which rank 0 writes a checkpoint; assumed
KNOWN_SPEED = "resnet50 of width 1 at 224 pixels in float32"  # the network of the published figures
_FITTED = "fitted to published points, see below"
_ALWAYS_POSITIVE = ("bandwidth", "memory_bandwidth", "image_s", "input_images_per_s")
_REQUIRED = ("latency_s", "bandwidth")


class Cluster(NamedTuple):
    """Everything that a prediction depends on."""

    settings: Settings
    node: Node
    ranks_per_node: int
    network: Network
    exchange: Exchange
    inter_op_threads: int  # of TensorFlow; decides the order of gradients
    sources: Tuple[str, ...]  # a line on each: where the constants come from


class CurvePoint(NamedTuple):
    """The step of a number of nodes."""

    nodes: int
    batch: Batch
    step: Step

    @property
    def speed(self) -> float:
        """Return the images/s of one of the nodes."""
        return self.batch.total / self.step.total / self.nodes


def from_settings(settings: Settings) -> Cluster:
    """Return the cluster that the flags describe.

    Raises FlagError for flags or constants that contradict each other, CheckpointError for an unusable past run.
    """
    if settings.recipe.exchange != "float32":
        raise FlagError(
            f"--exchange={settings.recipe.exchange}: only messages in float32 are simulated; remove the flag"
        )
    name = settings.simulate.network
    constants = {} if name in NETWORKS else _read_constants(name)
    speed = settings.prediction.speed
    rate = None if speed is None else past_run.rate_of(speed)
    ranks_per_node = _ranks_per_node(settings, None if rate is not None else speed)
    node, source = _node(settings, ranks_per_node, rate, constants)
    threads = int(constants.get("inter_op_threads", placement.variables(1)["TF_NUM_INTEROP_THREADS"]))
    order = "most kernels last" if threads == 1 else "layer by layer"
    base = NETWORKS.get(name) or Network(name, constants["latency_s"], constants["bandwidth"])
    sources = (
        f"node: {source}",
        _source_of(base),
        f"gradients: {order}, as TensorFlow yields them with inter_op_threads={threads}",
    )
    return Cluster(
        settings,
        node,
        ranks_per_node,
        _with_constants(base, constants),
        _with_constants(Exchange(), constants),
        threads,
        sources,
    )


def _node(
    settings: Settings, ranks_per_node: int, rate: Optional[float], constants: Dict[str, Any]
) -> Tuple[Node, str]:
    """Return the node, with the `constants` of the file of --network, and a text on where each of its parts comes from.

    Its speed is that of --speed (`rate`, if that is a number of images/s), else that of the file, else the fitted one,
    which holds for one network and node.
    """
    speed, name, fitted = settings.prediction.speed, settings.simulate.network, published.best_fit().node
    own = [field.name for field in dataclasses.fields(Node) if field.name in constants]
    measured: Tuple[str, ...] = ()
    if speed is not None and rate is None:
        measured = ("image_s", "fixed_s", "batch_s", "jitter")
        node, parts = _node_of_run(speed, settings), [f"speed and jitter of {speed}"]
    elif rate is not None:
        measured = ("image_s", "batch_s")
        node, parts = Node(image_s=ranks_per_node / rate, jitter=fitted.jitter), ["speed as given"]
    elif "image_s" in own:
        node, parts = Node(image_s=constants["image_s"], jitter=fitted.jitter), []
    else:
        _check_known_speed(settings, ranks_per_node)
        node, parts = fitted, [f"Intel Caffe's on 2x Xeon 8160, {_FITTED}"]
    twice = [key for key in measured if key in own]
    if twice:
        raise FlagError(f"--network={name}: --speed={speed} also gives {', '.join(twice)}; remove one of the two")
    parts += [f"{', '.join(own)} of {name}"] if own else []
    parts += [f"jitter {_FITTED}"] if (rate is not None or "image_s" in own) and "jitter" not in own else []
    return _with_constants(node, constants), "; ".join(parts)


def _check_known_speed(settings: Settings, ranks_per_node: int) -> None:
    """Raise FlagError if the fitted speed does not hold for the network, or for this number of ranks on a node."""
    network = f"{settings.model.model} of width {settings.model.width:g} at {settings.data.image_size} pixels in "
    network += settings.model.precision
    if network != KNOWN_SPEED:
        raise FlagError(
            f"the speed of {network} is not known; give --speed, as images/s of one node or as the folder of a run, or "
            "image_s in the file of --network"
        )
    if ranks_per_node != RANKS_PER_NODE:
        raise FlagError(
            f"--ranks_per_node={ranks_per_node}: the fitted speed is that of nodes of {RANKS_PER_NODE} ranks; give "
            "--speed, as images/s of one node, or remove the flag"
        )


def _ranks_per_node(settings: Settings, run_dir: Optional[str]) -> int:
    """Return the ranks of a node, by flag, as in the past run `run_dir`, or the default."""
    recorded = past_run.ranks_per_node(run_dir) if run_dir else None
    ranks_per_node = settings.launch.ranks_per_node or recorded or RANKS_PER_NODE
    if recorded not in (None, ranks_per_node):
        raise FlagError(
            f"--ranks_per_node={ranks_per_node}: --speed={run_dir} had {recorded} ranks on a node, which slow each "
            "other down; remove the flag, or name a run with as many ranks per node"
        )
    nodes = settings.simulate.nodes
    if settings.system.ranks not in (None, nodes * ranks_per_node):
        raise FlagError(
            f"--ranks={settings.system.ranks}: contradicts {nodes} nodes of {ranks_per_node} ranks; remove it and give "
            "--nodes and --ranks_per_node"
        )
    return ranks_per_node


def _source_of(network: Network) -> str:
    if network.name not in NETWORKS:
        return f"network: {network.name}"
    return (
        f"network: {network.name}, {network.bandwidth * 8 / 1e9:g} Gb/s by name; assumed: "
        f"{1e6 * network.latency_s:g} us per message, {network.memory_bandwidth / 1e9:g} GB/s per rank in memory and "
        "in adding up"
    )


def _with_constants(part: Any, constants: Dict[str, Any]) -> Any:
    """Return a Network, Exchange or Node with those of the `constants` that are its fields."""
    names = {field.name for field in dataclasses.fields(part)}
    return dataclasses.replace(part, **{key: value for key, value in constants.items() if key in names})


def _read_constants(path: str) -> Dict[str, Any]:
    """Return the constants of a JSON file: numbers by name, `jitter` also a list, `algorithm` a name.

    Raises FlagError that names the file, the key and the remedy.
    """
    flag = f"--network={path}"
    if not os.path.exists(path):
        raise FlagError(f"{flag}: neither a file nor one of {', '.join(NETWORKS)}")
    constants = read_json(path)
    if not isinstance(constants, dict):
        raise FlagError(f"{flag}: not a JSON object; write names and numbers, as in docs/simulate.md")
    fields = [field.name for kind in (Network, Exchange, Node) for field in dataclasses.fields(kind)]
    known = sorted({*fields, "inter_op_threads"} - {"name"})
    for key, value in constants.items():
        if key not in known:
            raise FlagError(f"{flag}: unknown key '{key}'; known keys are {', '.join(known)}")
        if key == "algorithm":
            if value not in ALGORITHM_NAMES:
                raise FlagError(f"{flag}: algorithm={value}: unknown; use one of {', '.join(ALGORITHM_NAMES)}")
        elif key == "jitter" and isinstance(value, list) and value and all(past_run.positive(time) for time in value):
            constants[key] = tuple(value)
        elif key in _ALWAYS_POSITIVE and not past_run.positive(value):
            raise FlagError(f"{flag}: {key}={value!r} must be a number above 0")
        elif not (past_run.positive(value) or value == 0):
            raise FlagError(f"{flag}: {key}={value!r} must be a number, 0 or above")
    if constants.get("interference", 0) >= 1:
        raise FlagError(f"{flag}: interference={constants['interference']} must be a share below 1")
    for key in _REQUIRED:
        if key not in constants:
            raise FlagError(f"{flag}: '{key}' is missing; measure it (docs/simulate.md)")
    return constants


def _node_of_run(run_dir: str, settings: Settings) -> Node:
    """Return the speed of the ranks of a past run and the jitter of its logged steps."""
    result = past_run.result(run_dir, settings.model, [settings.data.image_size])
    node = _node_of_step_times(os.path.join(run_dir, "step_times.npz"), result)
    if node is not None:
        return node
    rows = read_rows(os.path.join(run_dir, files.METRICS))
    # Earlier attempts may have had other ranks or threads; the speed in the result is that of the last one.
    rows = [row for row in rows if row.get("attempt") == rows[-1].get("attempt")]
    times = [row["step_s"] for row in rows[1:] if row.get("step_s")]
    if len(times) < 3:
        raise CheckpointError(
            f"--speed={run_dir}: the last attempt has fewer than 4 rows in metrics.jsonl; name a run that logged more"
        )
    # A row is the mean of the steps since the previous row; the mean of k independent steps varies less, by sqrt(k).
    span = statistics.median(after["step"] - before["step"] for before, after in zip(rows, rows[1:]))
    jitter = exchange.fit_jitter(times) * span**0.5
    return Node(image_s=result["ranks"] / result["images_per_second"], jitter=jitter)


def _node_of_step_times(path: str, result: Dict[str, Any]) -> Optional[Node]:
    """Return the speed and jitter of ranks by their own clocks, in a run of --experiment=scaling.

    Waiting for peers and messages is not part of it. None for other runs, and for times of other ranks than the result.
    """
    if not os.path.exists(path):
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            seconds = file["seconds"]  # [ranks, steps, (between, data, compute, after the last gradient)]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        raise CheckpointError(f"{path}: cannot be read; repeat the scaling run, or remove the file") from None
    if len(seconds) != result["ranks"]:
        return None
    work = seconds[..., :3].sum(-1)
    jitter = work / work.mean(1, keepdims=True)  # per rank: one that is always slow does not jitter
    # After its last gradient a single rank does nothing but the update.
    fixed_s = float(seconds[..., 3].mean()) if len(seconds) == 1 else 0.0
    images = result["global_batch_size"] / result["ranks"]
    return Node(image_s=float(work.mean()) / images, fixed_s=fixed_s, jitter=tuple(jitter.ravel().tolist()))


def gradients(cluster: Cluster, image_size: int) -> Tuple[Gradient, ...]:
    """Return the gradients of the cluster's network for images of `image_size` pixels."""
    model = cluster.settings.model
    return tensors.gradients(
        model=model.model,
        width=model.width,
        num_classes=model.num_classes,
        stem=model.stem,
        conv1_bias=model.conv1_bias,
        image_size=image_size,
        stride_in=model.stride_in,
        inter_op_threads=cluster.inter_op_threads,
    )


def step_of(cluster: Cluster, nodes: int, batch: Batch, image_size: Optional[int] = None) -> Step:
    """Return the step of `nodes` nodes; the time of an image of another size is proportional to its work."""
    usual = cluster.settings.data.image_size
    size = image_size or usual
    node = cluster.node
    if size != usual:
        work, usual_work = (sum(one.backward_work for one in gradients(cluster, pixels)) for pixels in (size, usual))
        node = dataclasses.replace(node, image_s=node.image_s * work / usual_work)
    return exchange.step(
        gradients(cluster, size),
        batch.per_rank,
        node,
        Allocation(nodes, cluster.ranks_per_node),
        cluster.network,
        cluster.exchange,
        batch.accumulate_steps,
    )


def point(cluster: Cluster, nodes: int) -> CurvePoint:
    """Return the point of the curve at `nodes` nodes; raise FlagError if it is not possible there."""
    batch = resolve.resolve_batch(cluster.settings, nodes * cluster.ranks_per_node)
    return CurvePoint(nodes, batch, step_of(cluster, nodes, batch))


def curve(cluster: Cluster, most: int) -> Tuple[List[CurvePoint], Dict[int, FlagError]]:
    """Return the points at 1, 2, 4, ... and `most` nodes, and the reason for each of these that is not possible.

    Without a global batch the images of a rank are constant and the batch grows with the nodes. A global batch is
    constant, ranks accumulate as the flags say, and the largest possible number of nodes between two powers of two is
    added to the points. Raises FlagError if no number of nodes is possible.
    """
    usual = {*(2**power for power in range(most.bit_length())), most}
    total, ranks = cluster.settings.recipe.global_batch_size or 0, cluster.ranks_per_node
    divisors = {nodes for nodes in range(1, min(most, total // ranks) + 1) if total % (nodes * ranks) == 0}
    batches: Dict[int, Batch] = {}
    refused: Dict[int, FlagError] = {}
    for nodes in sorted(usual | divisors):
        try:
            batches[nodes] = resolve.resolve_batch(cluster.settings, nodes * ranks)
        except FlagError as error:
            refused[nodes] = error
    if not batches:
        raise refused[most]
    largest = {nodes.bit_length(): nodes for nodes in batches}
    chosen = [nodes for nodes in batches if nodes in usual or nodes == largest[nodes.bit_length()]]
    points = [CurvePoint(nodes, batches[nodes], step_of(cluster, nodes, batches[nodes])) for nodes in chosen]
    return points, {nodes: error for nodes, error in refused.items() if nodes in usual}


def efficiency(one: CurvePoint, many: CurvePoint) -> float:
    """Return the speed of a node at `many` relative to that of a node at `one`."""
    return many.speed / one.speed


def first_below(cluster: Cluster, points: List[CurvePoint], share: float) -> Optional[CurvePoint]:
    """Return the first point with an efficiency below `share`, to 2 % of the nodes; None if there is not any.

    Between two points of the curve efficiency is assumed to fall. It does not where the algorithm is a butterfly, which
    costs more on a number of ranks that is not a power of two, and a global batch is only possible on some numbers of
    nodes: in these cases the result is one of `points`.
    """
    below = next((number for number, one in enumerate(points) if efficiency(points[0], one) < share), None)
    if not below:
        return None
    low, high = points[below - 1], points[below]
    falling = cluster.network.algorithm in ("best", "ring", "hierarchical")
    between = falling and not cluster.settings.recipe.global_batch_size
    while between and high.nodes - low.nodes > max(1, low.nodes // 50):
        middle = point(cluster, (low.nodes + high.nodes) // 2)
        low, high = (low, middle) if efficiency(points[0], middle) < share else (middle, high)
    return high


def train_examples(settings: Settings) -> Optional[int]:
    """Return the number of training examples, by flag or of the data set; None if it is not known."""
    return settings.data.train_examples or facts_of(settings.data.dataset, settings.data.data_dir).train_examples


def due(settings: Settings, resolved: Resolved, examples: int) -> Tuple[int, int]:
    """Return how many evaluations and checkpoints fall due in the whole recipe, as `training.job` decides it."""
    run, ends = settings.run, schedule.end_steps(resolved.phases)
    steps = schedule.total_steps(resolved.phases)

    def passes(step: int) -> int:
        return intervals(step * resolved.batch.total, examples, run.eval_every_epochs)

    results = {ends[name] for name in schedule.results(resolved.phases)}
    evaluations = min(steps, passes(steps)) + sum(passes(step) == passes(step - 1) for step in results)
    every = run.checkpoint_every_steps or steps
    checkpoints = steps // every + sum(step % every != 0 for step in ends.values())
    return 0 if settings.data.eval_split == NO_EVALUATION else evaluations, checkpoints


def training_seconds(cluster: Cluster, nodes: int, examples: int) -> Dict[str, float]:
    """Return the seconds of the recipe on `nodes` nodes by what they are spent on.

    Keys: `training`, `evaluation` (a forward pass; the last batch is padded) and `checkpoints`.
    """
    settings, ranks = cluster.settings, nodes * cluster.ranks_per_node
    resolved = resolve.resolve_recipe(settings, ranks, examples)
    sizes = {phase.image_size for phase in resolved.phases}
    step_s = {size: step_of(cluster, nodes, resolved.batch, size).total for size in sizes}
    evaluations, checkpoints = due(settings, resolved, examples)
    per_rank = settings.run.eval_batch_size or resolved.batch.per_rank
    batches = -(
        -(facts_of(settings.data.dataset, settings.data.data_dir).validation_examples or 0) // (ranks * per_rank)
    )
    forward_s = (1 - exchange.BACKWARD_SHARE) * cluster.node.image_s
    weights = sum(gradient.bytes for gradient in gradients(cluster, settings.data.image_size))
    return {
        "training": sum(phase.steps * step_s[phase.image_size] for phase in resolved.phases),
        "evaluation": evaluations * batches * per_rank * forward_s,
        "checkpoints": checkpoints * 2 * weights / DISK_BANDWIDTH,
    }
