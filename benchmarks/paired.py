"""Measure several programs in turns, so that a drift of the machine affects all of them and cancels in ratios."""

import argparse
import csv
import json
import os
import pathlib
import statistics
import subprocess
from typing import Callable, Dict, Iterable, List, Optional, Tuple

import numpy as np

ROOT = pathlib.Path(__file__).parent.parent
ALLOCATOR = next(iter(sorted(pathlib.Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4"))), None)
# Variables with these prefixes are not inherited, so that each side runs with its own settings only.
TUNING = (
    *("OMP_", "KMP_", "GOMP_", "MKL_", "TF_", "ITEX_", "ONEDNN_", "DNNL_"),
    *("TORCH", "OMPI_MCA_", "LD_PRELOAD", "MALLOC_"),
)

Row = Dict[str, float]


def start(command: list, **environment: str) -> subprocess.Popen:
    """Start a command in the root of the repository, with its output piped; see TUNING for its environment."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(TUNING)}
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT,
        env={**inherited, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def with_allocator() -> Dict[str, str]:
    """Return the environment variables that preload the same allocator as launch/local.sh."""
    return {"LD_PRELOAD": str(ALLOCATOR)} if ALLOCATOR else {}


def last_line(process: subprocess.Popen, seconds: float = 900) -> str:
    """Return the last line on standard output; raise SystemExit if the command fails or takes more than `seconds`."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.terminate()  # mpirun and torchrun end their ranks
        try:
            process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
        raise SystemExit(f"a run took more than {seconds:.0f} s and was ended") from None
    if process.returncode:
        raise SystemExit(f"a run failed with {process.returncode}:\n{err}")
    return out.strip().splitlines()[-1]


def rate_of_training(process: subprocess.Popen) -> float:
    """Return images/s of `resnet_cpu.train`. It excludes the first step of a phase, which traces the graph."""
    return json.loads(last_line(process))["images_per_second"]


def rate_of_benchmark(process: subprocess.Popen, seconds: float = 900) -> float:
    """Return images/s of a command whose last line is `total images/sec: X`."""
    return float(last_line(process, seconds).rpartition(" ")[2])


def benchmark_of(ranks: int, *flags: str, environment: Optional[str] = None) -> Callable[[], float]:
    """Return a side that measures images/s of `resnet_cpu.benchmark`, with the packages of a virtual `environment`."""
    path = {"PATH": f"{os.path.abspath(environment)}/bin:{os.environ['PATH']}"} if environment else {}
    command = ["launch/local.sh", ranks, "python", "-m", "resnet_cpu.benchmark", "--dataset=synthetic", *flags]
    return lambda: rate_of_benchmark(start(command, **path))


def parser(doc: Optional[str]) -> argparse.ArgumentParser:
    """Return a parser with the flags that all benchmarks share; its description is the first line of `doc`."""
    made = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    made.add_argument("--rounds", type=int, default=7)
    made.add_argument("--out", help="CSV file for the rounds")
    return made


def refuse_default_file(made: argparse.ArgumentParser, arguments: argparse.Namespace, *settings: str) -> None:
    """Exit with an error if one of `settings` is not the default while --out is: that file holds other rounds."""
    others = [name for name in settings if getattr(arguments, name) != made.get_default(name)]
    if others and arguments.out == made.get_default("out"):
        made.error(f"--{others[0]}: {arguments.out} holds rounds of the default setting; name another file with --out")


def compare(
    sides: Dict[str, Callable[[], float]], ratios: Iterable[Tuple[str, str]], rounds: int, out: Optional[str]
) -> None:
    """Measure the sides in turns, print the ratios (side, base) and write the rounds to `out`, if given."""
    rows = in_turns(sides, rounds)
    for side, base in ratios:
        print_ratio(rows, side, base)
    write(out, rows)


def in_turns(sides: Dict[str, Callable[[], float]], rounds: int) -> List[Row]:
    """Measure every side once per round, in an order that changes from round to round; print each figure."""
    names, rows = list(sides), []
    for number in range(rounds):
        row = {name: sides[name]() for name in turn(names, number)}
        rows.append({name: row[name] for name in names})
        print(f"round {number + 1}: " + ", ".join(f"{name} {row[name]:.3f}" for name in names), flush=True)
    return rows


def turn(names: List[str], number: int) -> List[str]:
    """Return the order of the sides in round `number`: rotated by one per round, every other round reversed."""
    order = names[number % len(names) :] + names[: number % len(names)]
    return order if number % 2 == 0 else order[::-1]


def interval(values: List[float], draws: int = 10_000) -> Tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of the median."""
    generator = np.random.Generator(np.random.Philox(0))
    medians = np.median(generator.choice(values, [draws, len(values)]), axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return float(low), float(high)


def print_ratio(rows: List[Row], side: str, base: str) -> None:
    """Print the median ratio with its 95 % interval, over the rounds that have both sides."""
    ratios = [row[side] / row[base] for row in rows if side in row and base in row]
    low, high = interval(ratios)
    print(
        f"{side} / {base}: median {statistics.median(ratios):.4f}, 95 % interval {low:.4f} ... {high:.4f}, "
        f"n = {len(ratios)}"
    )


def write(path: Optional[str], rows: List[Row]) -> None:
    """Write the rounds as CSV, unless the path is empty."""
    if not path:
        return
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["round", *rows[0]])
        writer.writerows([number + 1, *(f"{value:.5f}" for value in row.values())] for number, row in enumerate(rows))
