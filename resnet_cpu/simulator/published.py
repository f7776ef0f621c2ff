"""Fits of the simulator's constants to published figures; figures that are only predicted are kept apart.

The figures are data: published.csv gives for each the cluster, the network, the source, and a column for each fit that
says whether a constant is `fitted` to it or it is `held out`.
"""

import csv
import dataclasses
import functools
import math
import pathlib
from typing import Callable, Dict, Optional, Sequence, Tuple

import numpy as np

from resnet_cpu.errors import DataError
from resnet_cpu.model import tensors
from resnet_cpu.simulator import exchange
from resnet_cpu.simulator.exchange import Exchange, Node, Step
from resnet_cpu.simulator.network import NETWORKS, Allocation

IMAGENET_EPOCHS, IMAGENET_EXAMPLES = 90, 1_281_167
#: How the libraries of the published runs exchange gradients, by the column `exchange`.
EXCHANGES = {
    "caffe": Exchange(cycle_s=0.0, fusion_bytes=0, negotiated=False),  # MLSL reduces each layer as soon as it is ready
    "horovod": Exchange(),
}
#: The constants of `Node` that a fit finds, with the values from which it starts. The names are columns of the CSV.
FITS = {
    "two_constants": {"image_s": 1 / 50, "jitter": 0.03},
    "three_constants": {"image_s": 1 / 50, "jitter": 0.03, "batch_s": 0.05},
    "many_cores": {"image_s": 1 / 50},
}
FITTED, HELD_OUT = "fitted", "held out"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A published or measured figure beside the prediction of the model."""

    name: str
    unit: str
    measured: float
    predicted: float
    fitted: bool  # whether a constant was fitted to it; False: held out

    @property
    def error(self) -> float:
        """Return the relative error of the prediction."""
        return self.predicted / self.measured - 1


@dataclasses.dataclass(frozen=True)
class Fit:
    """The constants of a fit, and each figure that it was fitted to or that was held out."""

    node: Node
    comparisons: Tuple[Comparison, ...]


@dataclasses.dataclass(frozen=True)
class ManyCores:
    """The prediction for 28 minutes on 104K cores, read as 1,536 Xeon Phi nodes."""

    minutes: Comparison
    efficiency: float  # relative to one such node
    needed_images_per_s: float  # of a node, for the published minutes


def fit(errors: Callable[[np.ndarray], np.ndarray], start: Sequence[float], steps: int = 30) -> np.ndarray:
    """Return the positive parameters that minimise the sum of squared errors (Levenberg-Marquardt).

    Args:
        errors: function from parameters [n] to errors [m].
        start: positive parameters [n] to start from.
        steps: maximal number of iterations.

    Raises DataError for fewer errors than parameters, which do not determine them.
    """
    logs = np.log(np.asarray(start, float))
    found = errors(np.exp(logs))
    if len(found) < len(logs):
        raise DataError(f"{len(logs)} constants cannot be fitted to {len(found)} points; measure more settings")
    damping = 1e-3
    for _ in range(steps):
        slopes = np.array([(errors(np.exp(logs + shift)) - found) / 1e-4 for shift in 1e-4 * np.eye(len(logs))]).T
        normal = slopes.T @ slopes
        while damping < 1e9:
            move = -np.linalg.solve(
                normal + damping * (np.diag(np.diag(normal)) + 1e-12 * np.eye(len(logs))), slopes.T @ found
            )
            tried_logs = logs + np.clip(move, -1.0, 1.0)
            tried = errors(np.exp(tried_logs))
            if tried @ tried < found @ found:
                break
            damping *= 10
        else:
            return np.exp(logs)
        gained = found @ found - tried @ tried
        logs, found, damping = tried_logs, tried, max(damping / 10, 1e-9)
        if gained < 1e-16:
            break
    return np.exp(logs)


def rows() -> Dict[str, Dict[str, str]]:
    """Return the rows of published.csv by id, in their order."""
    with open(pathlib.Path(__file__).with_name("published.csv"), newline="", encoding="utf-8") as file:
        return {row["id"]: row for row in csv.DictReader(file)}


@functools.lru_cache(maxsize=len(FITS))
def best_fit(name: str = "three_constants", jitter: Optional[float] = None) -> Fit:
    """Return a fit of FITS, with its predictions of the figures that it used and of those held out.

    `two_constants` fits the speed of a node to recipe B and jitter to 32 C5 nodes. `three_constants` also fits a time
    of each batch, whatever its size, to the DAWNBench run on 64 C5 nodes. Nodes of both clusters (2x Xeon 8160, C5) are
    taken to be equally fast. `many_cores` fits the speed of a Xeon Phi node, for a given `jitter`.
    """
    chosen = [row for row in rows().values() if row[name]]
    targets = [row for row in chosen if row[name] == FITTED]
    constants = FITS[name]

    def node_of(parameters: np.ndarray) -> Node:
        given = dict(zip(constants, map(float, parameters)))
        return Node(**given) if jitter is None else Node(jitter=jitter, **given)

    def errors(parameters: np.ndarray) -> np.ndarray:
        node = node_of(parameters)
        return np.array([math.log(_predict(row, node) / float(row["value"])) for row in targets])

    node = node_of(fit(errors, list(constants.values())))
    comparisons = [
        Comparison(row["id"], row["unit"], float(row["value"]), _predict(row, node), row[name] == FITTED)
        for row in chosen
    ]
    return Fit(node, tuple(comparisons))


def many_cores() -> ManyCores:
    """Return the prediction for 104K cores, with the speed of a Xeon Phi node fitted to 2,048 of them.

    The jitter is that of the fit with two constants: neither of the two fits has a time of each batch.
    """
    jitter = best_fit("two_constants").node.jitter
    assert isinstance(jitter, float)
    found = best_fit("many_cores", jitter)
    minutes = next(point for point in found.comparisons if not point.fitted)
    row = rows()[minutes.name]
    one, many = (_step(row, found.node, nodes) for nodes in (1, int(row["nodes"])))
    needed = IMAGENET_EPOCHS * IMAGENET_EXAMPLES / (60 * minutes.measured) / int(row["nodes"])
    return ManyCores(minutes, one.total / many.total, needed)


def _step(row: Dict[str, str], node: Node, nodes: int) -> Step:
    """Return a step of a published row's job on this number of nodes."""
    gradients = tensors.gradients(conv1_bias=True)
    allocation, network = Allocation(nodes, int(row["ranks_per_node"])), NETWORKS[row["network"]]
    return exchange.step(gradients, int(row["batch_per_rank"]), node, allocation, network, EXCHANGES[row["exchange"]])


def _predict(row: Dict[str, str], node: Node) -> float:
    """Return the prediction of a published row, in its unit."""
    nodes = int(row["nodes"])
    step = _step(row, node, nodes)
    if row["unit"] == "x":
        return nodes * (_step(row, node, 1).total / step.total)
    speed = int(row["batch_per_rank"]) * (nodes * int(row["ranks_per_node"])) / step.total
    if row["unit"] == "min":
        return IMAGENET_EPOCHS * IMAGENET_EXAMPLES / speed / 60
    return speed / nodes
