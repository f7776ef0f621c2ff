"""What coupling costs: two Horovod ranks against two processes that know nothing of each other, a core each.

    python benchmarks/two_ranks.py --pairs 7 --out benchmarks/results/two_ranks.csv

Same network, batch and threads on both sides: ResNet-50 at 224x224, synthetic images, one core a process. The two
sides alternate, so that a machine that drifts drifts for both; the figure is the median of the pairs' ratios, with a
bootstrap interval. Nothing else may run meanwhile.
"""

import argparse
import csv
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

import numpy as np

ROOT = pathlib.Path(__file__).parent.parent


def train_command(run_dir: str, steps: int, image_size: int, batch_size: int) -> list:
    return [
        sys.executable, "-m", "resnet_cpu.train", "--dataset=synthetic", "--train_examples=100000", "--model=resnet50",
        f"--image_size={image_size}", f"--batch_size={batch_size}", f"--phase=main:steps={steps},lr=0.01",
        "--log_every_steps=1000", "--checkpoint_every_steps=0", "--threads=1", f"--run_dir={run_dir}",
    ]  # fmt: skip


def rate(process: subprocess.Popen) -> float:
    """Return images/s of a finished run: its first step, which traces the graph, is never timed."""
    out, err = process.communicate(timeout=900)
    if process.returncode:
        raise SystemExit(f"a run failed with {process.returncode}:\n{err}")
    return json.loads(out.strip().splitlines()[-1])["images_per_second"]


def start(command: list, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **environment}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def coupled(folder: str, arguments: argparse.Namespace) -> float:
    run = train_command(f"{folder}/coupled", arguments.steps, arguments.image_size, arguments.batch_size)
    return rate(start(["launch/local.sh", "2", *run]))


def independent(folder: str, arguments: argparse.Namespace) -> float:
    """Two processes at the same time, each on a core of its own, with the allocator that launch/local.sh gives."""
    allocator = next(iter(sorted(pathlib.Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4"))), None)
    environment = {"LD_PRELOAD": str(allocator)} if allocator else {}
    cores = sorted(os.sched_getaffinity(0))[:2]
    runs = [
        train_command(f"{folder}/{core}", arguments.steps, arguments.image_size, arguments.batch_size) for core in cores
    ]
    processes = [start(["taskset", "-c", str(core), *run], **environment) for core, run in zip(cores, runs)]
    return sum(rate(process) for process in processes)


def bootstrap(ratios: list, draws: int = 10_000) -> tuple:
    """Return the 95 % percentile interval of the median."""
    generator = np.random.Generator(np.random.Philox(0))
    medians = np.median(generator.choice(ratios, [draws, len(ratios)]), axis=1)
    return tuple(np.percentile(medians, [2.5, 97.5]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=7, help="of a run; all but the first are timed")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch_size", type=int, default=32, help="per process")
    parser.add_argument("--out", help="CSV of the pairs")
    arguments = parser.parse_args()
    rows = []
    for pair in range(arguments.pairs):
        with tempfile.TemporaryDirectory() as folder:
            sides = {"coupled": coupled, "independent": independent}
            order = list(sides) if pair % 2 == 0 else list(reversed(sides))
            row = {name: sides[name](folder, arguments) for name in order}
        row["ratio"] = row["coupled"] / row["independent"]
        rows.append(row)
        print(
            f"pair {pair + 1}: 2 ranks {row['coupled']:.3f} img/s, 2 processes {row['independent']:.3f} img/s, "
            f"ratio {row['ratio']:.4f}",
            flush=True,
        )
    ratios = [row["ratio"] for row in rows]
    low, high = bootstrap(ratios)
    print(f"median ratio {statistics.median(ratios):.4f}, 95 % interval {low:.4f} ... {high:.4f}, n = {len(ratios)}")
    if arguments.out:
        os.makedirs(os.path.dirname(arguments.out) or ".", exist_ok=True)
        with open(arguments.out, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["pair", "coupled", "independent", "ratio"])
            writer.writeheader()
            for pair, row in enumerate(rows):
                writer.writerow({"pair": pair + 1, **{key: f"{row[key]:.5f}" for key in row}})


if __name__ == "__main__":
    main()
