"""The simulator's prediction of each setting of a replay, beside what benchmarks/replay.py measured.

    python benchmarks/replay_fit.py benchmarks/results/replay.csv [--plot FILE.png]

For each number of hosts a latency and the time that a byte costs a host are fitted to a few settings; all others are
held out and predicted (docs/simulate.md). Prints each setting, a summary, and as the last line the constants as JSON.

    python benchmarks/replay_fit.py runs/replay.csv --reduce benchmarks/results/replay.csv

writes one row for each setting of a file of single steps: medians, 10 and 90 % of the step times, and their number n.
Both files can be fitted; the result is the same.
"""

import argparse
import csv
import dataclasses
import functools
import json
import math
import os
import statistics
import sys
from typing import Dict, List, NamedTuple, Sequence, Tuple

import numpy as np

from resnet_cpu.cluster import guard
from resnet_cpu.errors import DataError
from resnet_cpu.model import tensors
from resnet_cpu.report import plotting, scaling_plots
from resnet_cpu.simulator import exchange
from resnet_cpu.simulator.exchange import Exchange
from resnet_cpu.simulator.network import Allocation, Network, allreduce, fused_allreduce
from resnet_cpu.simulator.published import Comparison, fit
from resnet_cpu.text import aligned

AIM = 0.05  # relative error of a predicted step
MESSAGES = ("message", "horovod_message")  # models whose step is one allreduce, by mpi4py and by Horovod
SMALL = 2**12  # bytes; the time of larger messages hardly depends on latency
BURST = 2**17  # bytes that the traffic shaper of the network lab lets through at once after a pause
PAYLOAD = 1448 / 1514  # share of a full Ethernet frame, which the shaper counts, that carries data (TCP, time stamps)
#: The replay's names for Open MPI's algorithms -> those of the simulator.
ALGORITHMS = {
    "auto": "openmpi",
    "ring": "ring",
    "segmented_ring": "ring",
    "recursive_doubling": "recursive_doubling",
    "rabenseifner": "rabenseifner",
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """A setting of a replay: real allreduces of the real gradients between hosts, while compute is slept through."""

    hosts: int
    ranks: int
    mbit: float  # of the link of each host in each direction; 0: not limited
    model: str  # a network, or `message`, `horovod_message`: one allreduce of `bytes`
    width: float
    image_size: int
    compute_s: float
    forward_share: float
    bytes: int
    fusion_bytes: int
    cycle_ms: float
    inter_op_threads: int = 2  # of the TensorFlow whose order of gradients is replayed
    allreduce: str = "auto"

    @property
    def speed(self) -> float:
        """Return the speed of the links in Mbit/s, infinite if not limited."""
        return self.mbit or math.inf

    @property
    def label(self) -> str:
        """Return the setting as text."""
        parts = [f"{self.hosts} hosts", f"{self.mbit:g} Mbit/s" if self.mbit else "not limited"]
        is_message = self.model in MESSAGES
        parts.append(f"{self.model} of {self.bytes:,} bytes" if is_message else f"{self.model} x{self.width:g}")
        parts += [] if self.allreduce == "auto" else [self.allreduce]
        parts += ["kernels last"] if self.inter_op_threads == 1 else []
        return ", ".join(parts)


class Measured(NamedTuple):
    """Measurements of a setting over its steps: medians in seconds, 10 and 90 % of the step times, number of steps."""

    step_s: float
    late_s: float = 0.0  # how much later than planned the last gradient was released; not caused by the network
    p10_s: float = 0.0
    p90_s: float = 0.0
    n: int = 1


@dataclasses.dataclass(frozen=True)
class Validation:
    """Measured steps beside predicted ones."""

    networks: Dict[int, Network]  # by the number of hosts: they share the cores of one machine, so constants differ
    rows: Tuple[Tuple[Setting, Comparison], ...]

    def errors(self) -> Dict[str, List[float]]:
        """Return the absolute relative errors of settings fitted to, of held-out models and of held-out messages."""
        found: Dict[str, List[float]] = {}
        for setting, point in self.rows:
            held_out = "messages, held out" if setting.model in MESSAGES else "models, held out"
            found.setdefault("fitted to" if point.fitted else held_out, []).append(abs(point.error))
        return found

    def errors_of_models(self, hosts: int) -> List[float]:
        """Return the absolute relative errors of held-out models on `hosts` hosts."""
        return [
            abs(point.error)
            for setting, point in self.rows
            if setting.hosts == hosts and setting.model not in MESSAGES and not point.fitted
        ]


def read_replay(path: str) -> Dict[Setting, Measured]:
    """Return the measurements of each setting in a CSV of single steps, or of one row for each setting.

    Raises DataError for other files.
    """
    rows: Dict[Setting, List[Tuple[float, float]]] = {}
    reduced: Dict[Setting, Measured] = {}
    try:
        with open(path, newline="", encoding="utf-8") as file:
            for line, row in enumerate(csv.DictReader(file), 2):
                setting, seconds, late = _parse(row, path, line)
                rows.setdefault(setting, []).append((seconds, late))
                if row.get("n"):
                    reduced[setting] = Measured(seconds, late, float(row["p10_s"]), float(row["p90_s"]), int(row["n"]))
    except UnicodeDecodeError:
        raise DataError(f"{path}: not a text file; give the CSV of benchmarks/replay.py") from None
    if not rows:
        raise DataError(f"{path}: contains no rows; give the CSV of benchmarks/replay.py")
    return reduced or {setting: _measured(steps) for setting, steps in rows.items()}


def _parse(row: Dict[str, str], path: str, line: int) -> Tuple[Setting, float, float]:
    """Return setting, seconds and lateness of a row; raise DataError for impossible values."""
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
        raise DataError(f"{path}: column {error} is missing; give the CSV of benchmarks/replay.py") from None
    except (TypeError, ValueError):
        raise DataError(f"{path}: line {line} cannot be read; correct or remove it") from None
    if setting.allreduce not in ALGORITHMS:
        raise DataError(f"{path}: line {line}: allreduce {setting.allreduce} is not known; remove the line")
    possible = 0 < seconds < math.inf and 0 <= late < math.inf
    if not possible or setting.hosts < 1 or setting.ranks % setting.hosts:
        raise DataError(f"{path}: line {line} has impossible times or ranks; correct or remove it")
    return setting, seconds, late


def _measured(steps: Sequence[Tuple[float, float]]) -> Measured:
    seconds, late = zip(*steps)
    low, high = np.percentile(seconds, [10, 90])
    return Measured(statistics.median(seconds), statistics.median(late), float(low), float(high), len(steps))


def write_reduced(path: str, measured: Dict[Setting, Measured]) -> None:
    """Write a CSV of one row for each setting; `read_replay` returns exactly `measured` from it."""
    names = [field.name for field in dataclasses.fields(Setting)]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*names, "n", "step_s", "p10_s", "p90_s", "lateness_s"])
        for setting, found in measured.items():
            cells = [str(cell).removesuffix(".0") for cell in dataclasses.astuple(setting)]
            ends = (f"{found.p10_s:.6f}", f"{found.p90_s:.6f}")
            writer.writerow([*cells, found.n, repr(found.step_s), *ends, repr(found.late_s)])


def predict(setting: Setting, network: Network, late_s: float = 0.0) -> float:
    """Return the predicted seconds of a step whose last gradient is released `late_s` late.

    The bandwidth is the speed that links were limited to, less headers.
    """
    network = dataclasses.replace(network, algorithm=ALGORITHMS[setting.allreduce])
    if setting.mbit:
        network = dataclasses.replace(network, bandwidth=PAYLOAD * setting.mbit * 1e6 / 8)
    allocation = Allocation(setting.hosts, setting.ranks // setting.hosts)
    if setting.model == "message":
        # After a pause the shaper lets a small message through at once.
        if setting.mbit and setting.bytes <= SMALL:
            network = dataclasses.replace(network, bandwidth=math.inf)
        return allreduce(setting.bytes, allocation, network)
    horovod = Exchange(cycle_s=setting.cycle_ms / 1e3, fusion_bytes=setting.fusion_bytes)
    compute_end = setting.compute_s + late_s
    if setting.model == "horovod_message":
        ready, sizes = [0.0], [setting.bytes]
    else:
        gradients = tensors.gradients(
            setting.model,
            setting.width,
            image_size=setting.image_size,
            inter_op_threads=setting.inter_op_threads,
        )
        sizes = [gradient.bytes for gradient in gradients]
        forward = setting.forward_share
        ready = [compute_end * (forward + (1 - forward) * share) for share in tensors.ready_shares(gradients)]
    cost = functools.partial(fused_allreduce, allocation=allocation, network=network)
    negotiation_s = exchange.negotiation(allocation, network, horovod, len(sizes))
    end = exchange.exchange_end(ready, sizes, compute_end, cost, horovod, negotiation_s)[0]
    if setting.compute_s:
        return end
    # Without compute, steps follow immediately. Short ones wait for the next check of Horovod's thread. After a longer
    # one the thread has checked once in vain, so the next step waits for a whole period, during which the shaper
    # accumulates a burst.
    if end <= horovod.period_s:
        return horovod.period_s
    saved = min(horovod.period_s, BURST / network.bandwidth) if setting.mbit else 0.0
    return end + horovod.period_s - saved


def fitted_to(settings: Sequence[Setting]) -> Tuple[List[Setting], List[Setting]]:
    """Return the settings that latency is fitted to and those that the time of a byte is; all others are held out.

    The latter are the smallest model with the least compute at the smallest and the greatest bandwidth, the former the
    smallest single messages there. Without such messages both constants are fitted to the latter.
    """
    models = [setting for setting in settings if setting.model not in MESSAGES]
    if not models:
        raise DataError("the replay has only messages and no model; replay a model at two bandwidths or more")
    least = min((setting.bytes, setting.compute_s) for setting in models)
    smallest_model = [setting for setting in models if (setting.bytes, setting.compute_s) == least]
    ends = {choose(setting.speed for setting in smallest_model) for choose in (min, max)}
    small = [setting for setting in settings if setting.model == "message" and setting.bytes <= SMALL]
    small = [setting for setting in small if setting.speed in ends]
    size = min((setting.bytes for setting in small), default=0)
    return (
        [setting for setting in small if setting.bytes == size],
        [setting for setting in smallest_model if setting.speed in ends],
    )


def fit_network(measured: Dict[Setting, Measured]) -> Network:
    """Return the network of a replay: its latency, and the time that a byte costs a host in addition to the link's.

    Bandwidth is not fitted: it is the speed that links were limited to, less headers.
    """
    messages, models = fitted_to(list(measured))

    def errors(network: Network, settings: Sequence[Setting]) -> np.ndarray:
        pairs = [(predict(one, network, measured[one].late_s), measured[one].step_s) for one in settings]
        return np.array([math.log(predicted / seconds) for predicted, seconds in pairs])

    latency_s, byte_s = start = (1e-4, 1e-9)
    if not messages:
        return _network(*fit(lambda found: errors(_network(*found), models), start))

    def errors_of_latency(found: np.ndarray) -> np.ndarray:
        return errors(_network(float(found[0]), byte_s), messages)

    def errors_of_byte(found: np.ndarray) -> np.ndarray:
        return errors(_network(latency_s, float(found[0])), models)

    # In turns, since each hardly depends on the other: neither does a few bytes' time matter, nor latency in megabytes.
    for _ in range(4):
        latency_s = float(fit(errors_of_latency, [latency_s])[0])
        byte_s = float(fit(errors_of_byte, [byte_s])[0])
    return _network(latency_s, byte_s)


def _network(latency_s: float, byte_s: float) -> Network:
    return Network("replay", latency_s, 100e9 / 8, latency_s, reduce_s_per_byte=byte_s)


def validate(measured: Dict[Setting, Measured]) -> Validation:
    """Return the network for each number of hosts, fitted to a few settings, and the prediction of every setting."""
    networks: Dict[int, Network] = {}
    rows: List[Tuple[Setting, Comparison]] = []
    for hosts in sorted({setting.hosts for setting in measured}):
        chosen = {setting: found for setting, found in measured.items() if setting.hosts == hosts}
        networks[hosts] = fit_network(chosen)
        messages, models = fitted_to(list(chosen))
        for setting, found in chosen.items():
            predicted = predict(setting, networks[hosts], found.late_s)
            fitted = setting in messages or setting in models
            rows.append((setting, Comparison(setting.label, "s", found.step_s, predicted, fitted)))
    return Validation(networks, tuple(rows))


def lines(found: Validation) -> List[str]:
    """Return the table of all settings, the summary, and the constants as JSON."""
    table = [["", "compute s", "measured s", "predicted s", "error", ""]]
    for setting, point in found.rows:
        kind = "fitted to" if point.fitted else "held out"
        table.append([point.name, f"{setting.compute_s:g}", f"{point.measured:.4f}", f"{point.predicted:.4f}"])
        table[-1] += [f"{100 * point.error:+.1f} %", kind]
    text = aligned(table, str.ljust)
    for label, errors in found.errors().items():
        median, largest = 100 * statistics.median(errors), 100 * max(errors)
        text.append(f"{label}: {len(errors)} settings, median error {median:.1f} %, largest {largest:.1f} %")
    for hosts in found.networks:
        errors = found.errors_of_models(hosts)
        if errors:
            near = sum(error <= AIM for error in errors)
            text.append(
                f"models, held out, {hosts} hosts: {near} of {len(errors)} within {100 * AIM:g} %, median error "
                f"{100 * statistics.median(errors):.1f} %, largest {100 * max(errors):.1f} %"
            )
    # Without a bandwidth: it was that of the links, not that of the network to predict.
    names = ("latency_s", "memory_latency_s", "reduce_s_per_byte")
    constants = {
        hosts: {**{name: getattr(network, name) for name in names}, "algorithm": "openmpi"}
        for hosts, network in found.networks.items()
    }
    return [*text, json.dumps(constants)]


def draw(found: Validation, path: str, title: str) -> None:
    """Draw predicted over measured seconds."""
    if not plotting.available():
        raise SystemExit("--plot: matplotlib is not installed; pip install matplotlib")
    scaling_plots.draw_validation([dataclasses.asdict(point) for _, point in found.rows], path, title)
    print(path, file=sys.stderr)


def main(argv: List[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("replay", help="CSV of benchmarks/replay.py, or its reduced form")
    parser.add_argument("--reduce", metavar="FILE", help="write one row for each setting to FILE, and fit nothing")
    parser.add_argument("--plot", metavar="FILE.png", help="draw predicted over measured seconds")
    arguments = parser.parse_args(argv)
    measured = read_replay(arguments.replay)
    if arguments.reduce:
        write_reduced(arguments.reduce, measured)
        return
    found = validate(measured)
    print("\n".join(lines(found)))
    if arguments.plot:
        draw(found, arguments.plot, os.path.basename(arguments.replay))


if __name__ == "__main__":
    guard.run(main)
