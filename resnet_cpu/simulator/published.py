"""Fits of the simulator's constants to published points and to replays; what is only predicted is kept apart."""

import csv
import dataclasses
import functools
import math
import pathlib
import statistics
from typing import Callable, Dict, List, Sequence, Tuple

import numpy as np

from resnet_cpu.errors import DataError
from resnet_cpu.model import tensors as layers
from resnet_cpu.simulator import exchange as simulator
from resnet_cpu.simulator.exchange import Exchange, Node
from resnet_cpu.simulator.network import NETWORKS, Network, World, allreduce, fused_allreduce

IMAGENET_EPOCHS, IMAGENET_EXAMPLES = 90, 1_281_167
MESSAGES = ("message", "horovod_message")  # rows of a replay that time one allreduce, by mpi4py and by Horovod
SMALL = 2**12  # bytes; of a message that tells latency
BURST = 2**17  # bytes that the network lab's shaper lets through at once after a pause
PAYLOAD = 1448 / 1514  # of a full Ethernet frame, which is what the shaper counts, TCP with time stamps carries so much
CAFFE = Exchange(cycle_s=0.0, fusion_bytes=0, negotiated=False)  # MLSL reduces each layer when it comes


@dataclasses.dataclass(frozen=True)
class Point:
    """A published or measured figure and what the model says of it."""

    name: str
    unit: str
    measured: float
    predicted: float
    fitted: bool  # whether a constant was fitted to it; False: held out

    @property
    def error(self) -> float:
        """Return the relative error of the prediction."""
        return self.predicted / self.measured - 1


def fit(errors: Callable[[np.ndarray], np.ndarray], start: Sequence[float], steps: int = 30) -> np.ndarray:
    """Return the positive parameters that make the sum of squared errors least, from `start` on (Levenberg-Marquardt).

    Raises DataError if there are fewer errors than parameters: then they are not determined.
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


def published_rows() -> Dict[str, Dict[str, str]]:
    """Return the rows of published.csv by id; each carries its source."""
    with open(pathlib.Path(__file__).with_name("published.csv"), newline="") as file:
        return {row["id"]: row for row in csv.DictReader(file)}


@dataclasses.dataclass(frozen=True)
class Published:
    """Constants fitted to published points, and every point with what the model says."""

    node: Node  # of recipe B's nodes: 2x Xeon 8160 (and of c5.18xlarge, taken to be as fast)
    points: Tuple[Point, ...]


@functools.lru_cache(maxsize=2)
def published(with_fixed: bool = True) -> Published:
    """Return the fit to recipe B and to 32 C5 nodes, and what it predicts for recipe A and 64 C5 nodes.

    Without `with_fixed` two constants are fitted to two points: a node's speed to recipe B, jitter to 32 C5 nodes. With
    it a third, a time of each batch that does not depend on its size, to a third, the DAWNBench run on 64 C5 nodes.
    """
    rows = published_rows()
    tensors = layers.gradients(conv1_bias=True)
    fitted = ["recipe_b", "c5_32", *(["c5_dawnbench"] if with_fixed else [])]

    def node_of(parameters: np.ndarray) -> Node:
        batch_s = float(parameters[2]) if with_fixed else 0.0
        return Node(image_s=float(parameters[0]), jitter=float(parameters[1]), batch_s=batch_s)

    def errors(parameters: np.ndarray) -> np.ndarray:
        node = node_of(parameters)
        return np.array([math.log(_say(rows[name], node, tensors) / float(rows[name]["value"])) for name in fitted])

    node = node_of(fit(errors, [1 / 50, 0.03, 0.05][: len(fitted)]))
    names = ["recipe_b", "c5_32", "c5_dawnbench", "recipe_a", "c5_64"]
    points = [
        Point(name, rows[name]["unit"], float(rows[name]["value"]), _say(rows[name], node, tensors), name in fitted)
        for name in names
    ]
    return Published(node, tuple(points))


def _say(row: Dict[str, str], node: Node, tensors: Sequence[layers.Layer]) -> float:
    """Return what the model says of a published row, in its unit."""
    network = NETWORKS["ena25" if row["id"].startswith("c5") else "omnipath"]
    batch, world = int(row["batch_per_rank"]), World(int(row["nodes"]), int(row["ranks_per_node"]))
    found = simulator.step(tensors, batch, node, world, network, CAFFE)
    if row["unit"] == "x":
        one = simulator.step(tensors, batch, node, World(1, world.ranks_per_node), network, CAFFE)
        return world.nodes * simulator.efficiency(one, found)
    speed = simulator.images_per_second(found, batch, world)
    if row["unit"] == "min":
        return IMAGENET_EPOCHS * IMAGENET_EXAMPLES / speed / 60
    return speed / world.nodes


@dataclasses.dataclass(frozen=True)
class ManyCores:
    """What the model says of 28 minutes on 104K cores, read as 1,536 Xeon Phi nodes."""

    minutes: Point
    speed_of_2048: Point  # what the nodes' speed was fitted to
    efficiency: float  # against one such node
    needed_images_per_s: float  # of a node, for the published minutes


def many_cores(node: Node) -> ManyCores:
    """Return the prediction for 104K cores.

    One constant, a Xeon Phi's speed, is fitted to 2,048 of them; the jitter is `node`'s, that of a fit without a fixed
    time, as there is none here.
    """
    rows = published_rows()
    tensors = layers.gradients(conv1_bias=True)
    target = rows["knl_2048"]

    def phi(parameters: np.ndarray) -> Node:
        return Node(image_s=float(parameters[0]), jitter=node.jitter)

    def errors(parameters: np.ndarray) -> np.ndarray:
        return np.array([math.log(_say(target, phi(parameters), tensors) / float(target["value"]))])

    found = phi(fit(errors, [1 / 50]))
    row = rows["paper_minutes"]
    world, batch = World(int(row["nodes"])), int(row["batch_per_rank"])
    network = NETWORKS["omnipath"]
    one, many = (simulator.step(tensors, batch, found, where, network, CAFFE) for where in (World(1), world))
    minutes = float(row["value"])
    return ManyCores(
        Point("paper_minutes", "min", minutes, _say(row, found, tensors), False),
        Point("knl_2048", "images/s/node", float(target["value"]), _say(target, found, tensors), True),
        simulator.efficiency(one, many),
        IMAGENET_EPOCHS * IMAGENET_EXAMPLES / (60 * minutes) / world.nodes,
    )


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting of a replay: real allreduces of the real tensors between hosts, compute slept through."""

    hosts: int
    ranks: int
    mbit: float  # of each host's link, each way; 0: not shaped
    model: str  # or `message`, `horovod_message`: one allreduce of `bytes`
    width: float
    image_size: int
    compute_s: float
    forward_share: float
    bytes: int
    fusion_bytes: int
    cycle_ms: float
    inter_op_threads: int = 2  # in whose order gradients come
    allreduce: str = "auto"


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a replay measured of a setting: medians over its steps, seconds."""

    step_s: float
    late_s: float = 0.0  # how much later than meant the last gradient was released, of which the network knows nothing


# The replay's names for what Open MPI is told to use, and the model's.
_ALLREDUCES = {
    "auto": "openmpi",
    "ring": "ring",
    "segmented_ring": "ring",
    "recursive_doubling": "recursive_doubling",
    "rabenseifner": "rabenseifner",
}


def read_replay(path: str) -> Dict[Setting, Measured]:
    """Return what a replay's CSV says of every setting; raise DataError for other files."""
    times: Dict[Setting, List[Tuple[float, float]]] = {}
    try:
        with open(path, newline="") as file:
            for number, row in enumerate(csv.DictReader(file), 2):
                try:
                    setting = Setting(
                        hosts=int(row["hosts"]),
                        ranks=int(row["ranks"]),
                        mbit=float(row["mbit"]),
                        model=row["model"],
                        width=float(row["width"] or 1),
                        image_size=int(row["image_size"] or 224),
                        compute_s=float(row["compute_s"] or 0),
                        forward_share=float(row["forward_share"] or 1 / 3),
                        bytes=int(float(row["bytes"])),
                        fusion_bytes=int(float(row["fusion_bytes"] or 0)),
                        cycle_ms=float(row["cycle_ms"] or 0),
                        inter_op_threads=int(row.get("inter_op_threads") or 2),
                        allreduce=row.get("allreduce") or "auto",
                    )
                    seconds, late = float(row["step_s"]), float(row.get("lateness_s") or 0)
                except KeyError as error:
                    raise DataError(f"{path}: no column {error}; give the file that the replay wrote") from None
                except (TypeError, ValueError):
                    raise DataError(f"{path}: line {number} is no row of a replay; mend or remove it") from None
                if setting.allreduce not in _ALLREDUCES:
                    raise DataError(
                        f"{path}: line {number}: allreduce {setting.allreduce} is not known; remove the line"
                    )
                if (
                    not 0 < seconds < math.inf
                    or not 0 <= late < math.inf
                    or setting.hosts < 1
                    or setting.ranks % setting.hosts
                ):
                    raise DataError(f"{path}: line {number} has times or ranks that cannot be; mend or remove it")
                times.setdefault(setting, []).append((seconds, late))
    except UnicodeDecodeError:
        raise DataError(f"{path}: is no text; give the file that the replay wrote") from None
    if not times:
        raise DataError(f"{path}: no row; give the file that the replay wrote")
    return {setting: Measured(*map(statistics.median, zip(*steps))) for setting, steps in times.items()}


def replayed(setting: Setting, network: Network, late_s: float = 0.0) -> float:
    """Return the predicted step time of a replay's setting whose last gradient is released `late_s` late.

    Bandwidth is what links were shaped to, less headers.
    """
    network = dataclasses.replace(network, algorithm=_ALLREDUCES[setting.allreduce])
    if setting.mbit:
        network = dataclasses.replace(network, bandwidth=PAYLOAD * setting.mbit * 1e6 / 8)
    world = World(setting.hosts, setting.ranks // setting.hosts)
    if setting.model == "message":
        # What a link could have carried since the last one, its shaper lets through at once.
        if setting.mbit and setting.bytes <= SMALL:
            network = dataclasses.replace(network, bandwidth=math.inf)
        return allreduce(setting.bytes, world, network)
    exchange = Exchange(cycle_s=setting.cycle_ms / 1e3, fusion_bytes=setting.fusion_bytes)
    if setting.model == "horovod_message":
        ready, sizes = [0.0], [setting.bytes]
    else:
        tensors = layers.gradients(
            setting.model,
            setting.width,
            image_size=setting.image_size,
            inter_op_threads=setting.inter_op_threads,
        )
        sizes = [tensor.bytes for tensor in tensors]
        shares = layers.ready_shares(tensors)
        forward = setting.forward_share
        ready = [(setting.compute_s + late_s) * (forward + (1 - forward) * share) for share in shares]

    cost = functools.partial(fused_allreduce, world=world, network=network)
    negotiation_s = simulator.coordination(world, network, exchange, len(sizes))
    end = simulator.exchange_end(ready, sizes, setting.compute_s + late_s, cost, exchange, negotiation_s)[0]
    if setting.compute_s:
        return end
    # Steps follow each other. Short ones wait for the thread's next look; after a longer one it has looked at once and
    # found nothing, so that the next step waits for a whole period, in which the shaper saves up.
    if end <= exchange.period_s:
        return exchange.period_s
    return end + exchange.period_s - (min(exchange.period_s, BURST / network.bandwidth) if setting.mbit else 0.0)


@dataclasses.dataclass(frozen=True)
class Validation:
    """Replays against predictions."""

    networks: Dict[
        int, Network
    ]  # by the number of hosts: on one box they share its cores, so each has constants of its own
    rows: Tuple[Tuple[Setting, Point], ...]

    def errors(self) -> Dict[str, List[float]]:
        """Return the relative errors, without sign, of rows fitted to, of models held out and of lone messages."""
        found: Dict[str, List[float]] = {}
        for setting, point in self.rows:
            kind = "messages, held out" if setting.model in MESSAGES else "models, held out"
            found.setdefault("fitted to" if point.fitted else kind, []).append(abs(point.error))
        return found

    def of_models(self, hosts: int) -> List[float]:
        """Return the relative errors, without sign, of models held out on so many hosts."""
        return [
            abs(point.error)
            for setting, point in self.rows
            if setting.hosts == hosts and setting.model not in MESSAGES and not point.fitted
        ]


def fitted_to(settings: Sequence[Setting]) -> Tuple[List[Setting], List[Setting]]:
    """Return the settings that latency is fitted to and those that the time of a byte is; all others are held out.

    The latter are the smallest model with the least compute at the least and the greatest bandwidth, the former the
    smallest lone messages there; where there are none, both constants are fitted to the latter.
    """
    models = [setting for setting in settings if setting.model not in MESSAGES]
    if not models:
        raise DataError("a replay of no model, only of messages; replay a model at two bandwidths at least")
    least = min((setting.bytes, setting.compute_s) for setting in models)
    chosen = [setting for setting in models if (setting.bytes, setting.compute_s) == least]
    ends = {find(_mbit(setting) for setting in chosen) for find in (min, max)}
    chosen = [setting for setting in chosen if _mbit(setting) in ends]
    lone = [setting for setting in settings if setting.model == "message" and _mbit(setting) in ends]
    lone = [setting for setting in lone if setting.bytes <= SMALL]  # larger ones hardly tell latency
    smallest = min((setting.bytes for setting in lone), default=0)
    return [setting for setting in lone if setting.bytes == smallest], chosen


def _mbit(setting: Setting) -> float:
    return setting.mbit or math.inf


def _network(latency_s: float, byte_s: float) -> Network:
    return Network("replay", latency_s, 100e9 / 8, latency_s, reduce_s_per_byte=byte_s)


def fit_replay(times: Dict[Setting, Measured]) -> Network:
    """Return the network of a replay: its latency, and the time that a byte costs a host beside the link's.

    Bandwidth is not fitted: it is what the links were shaped to, less headers.
    """
    lone, chosen = fitted_to(list(times))

    def errors(network: Network, settings: Sequence[Setting]) -> np.ndarray:
        found = [(replayed(setting, network, times[setting].late_s), times[setting].step_s) for setting in settings]
        return np.array([math.log(predicted / measured) for predicted, measured in found])

    start = [1e-4, 1e-9]
    if not lone:
        return _network(*fit(lambda found: errors(_network(*found), chosen), start))
    latency_s, byte_s = start

    def of_latency(found: np.ndarray) -> np.ndarray:
        return errors(_network(float(found[0]), byte_s), lone)

    def of_byte(found: np.ndarray) -> np.ndarray:
        return errors(_network(latency_s, float(found[0])), chosen)

    for _ in range(
        4
    ):  # each hardly depends on the other: a few bytes have no weight, nor has a latency among megabytes
        latency_s = float(fit(of_latency, [latency_s])[0])
        byte_s = float(fit(of_byte, [byte_s])[0])
    return _network(latency_s, byte_s)


def validate(times: Dict[Setting, Measured]) -> Validation:
    """Return the network for each number of hosts, fitted to a few settings, and what it predicts of all."""
    networks: Dict[int, Network] = {}
    rows: List[Tuple[Setting, Point]] = []
    for hosts in sorted({setting.hosts for setting in times}):
        here = {setting: measured for setting, measured in times.items() if setting.hosts == hosts}
        networks[hosts] = fit_replay(here)
        lone, chosen = fitted_to(list(here))
        for setting, measured in here.items():
            name = f"{setting.model} x{setting.width:g}"
            if setting.model in MESSAGES:
                name = f"{setting.model} of {setting.bytes:,} bytes"
            told = f"{hosts} hosts, {f'{setting.mbit:g} Mbit/s' if setting.mbit else 'not shaped'}, {name}"
            told += "" if setting.allreduce == "auto" else f", {setting.allreduce}"
            told += "" if setting.inter_op_threads != 1 else ", kernels last"
            predicted = replayed(setting, networks[hosts], measured.late_s)
            rows.append((setting, Point(told, "s", measured.step_s, predicted, setting in lone or setting in chosen)))
    return Validation(networks, tuple(rows))
