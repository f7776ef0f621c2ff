"""Replay the communication of a training step between hosts of the network lab; needs root.

    python benchmarks/replay.py --out runs/replay.csv
    python benchmarks/replay_fit.py runs/replay.csv --reduce benchmarks/results/replay.csv

Horovod averages the real gradients of a network, in the order in which backward yields them, over TCP between two to
four hosts with links of a chosen speed. Compute is replaced by sleeps in proportion to the work of each layer, since
several hosts cannot compute at full speed on the cores of one machine. The figures therefore measure the network, not
the images/s of such a cluster. docs/network_lab.md describes the columns of the CSV.
"""

import argparse
import csv
import itertools
import os
import pathlib
import statistics
import subprocess
import sys
import time
from typing import Dict, Iterator, List, Tuple

import paired

from resnet_cpu.cluster import launchers

LAB = paired.ROOT / "launch" / "network-lab" / "lab"
RANK_PROGRAM = paired.ROOT / "benchmarks" / "replay_rank.py"
COLUMNS = [
    *("round", "hosts", "ranks", "mbit", "model", "width", "image_size", "compute_s", "forward_share", "bytes"),
    *("tensors", "fusion_bytes", "cycle_ms", "inter_op_threads", "allreduce", "step", "step_s", "lateness_s"),
]
# The numbers of Open MPI 4.1 (ompi_info --param coll tuned --level 9).
ALLREDUCES = {"auto": 0, "recursive_doubling": 3, "ring": 4, "segmented_ring": 5, "rabenseifner": 6}
SETTING = ("hosts", "model", "width", "bytes", "mbit", "compute_s")  # rows that agree in these share a median


def mpirun(hosts: int, name: str, allreduce: str, environment: Dict[str, str], command: List[str]) -> List[str]:
    """Return the command line that runs `command` on `hosts` hosts of lab `name`, one rank per host."""
    placed = [f"{name}{number}" for number in range(1, hosts + 1)]
    options = {
        "plm_rsh_agent": str(LAB.with_name("agent")),
        "btl": "self,tcp",
        "btl_tcp_if_include": "10.77.0.0/24",
        "oob_tcp_if_include": "10.77.0.0/24",
        "pml": "ob1",
        "mpi_yield_when_idle": "1",
        **launchers.IN_PARTS,
    }
    if ALLREDUCES[allreduce]:
        options["coll_tuned_use_dynamic_rules"] = "1"
        options["coll_tuned_allreduce_algorithm"] = str(ALLREDUCES[allreduce])
    return [
        *[
            str(LAB),
            "run",
            placed[0],
            "mpirun",
            "--mca",
            "orte_execute_quiet",
            "1",
            "--allow-run-as-root",
            "--host",
            ",".join(placed),
        ],
        *["-np", str(hosts), "--bind-to", "none"],
        *itertools.chain.from_iterable(("--mca", key, value) for key, value in options.items()),
        *itertools.chain.from_iterable(("-x", f"{key}={value}") for key, value in environment.items()),
        *command,
    ]


def rows_of(hosts: int, arguments: argparse.Namespace) -> Iterator[Dict[str, str]]:
    """Start a lab of `hosts` hosts and yield the rows that the ranks measure."""
    lab_environment = {**os.environ, "RESNET_CPU_LAB": arguments.lab}
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(paired.ROOT),
        "RESNET_CPU_LAB": arguments.lab,
        "HOROVOD_FUSION_THRESHOLD": str(arguments.fusion_bytes),
        "HOROVOD_CYCLE_TIME": f"{arguments.cycle_ms:g}",
        "OMP_NUM_THREADS": "1",
        **paired.with_allocator(),
    }
    passed = (
        "mbit",
        "models",
        "compute_s",
        "messages",
        "rounds",
        "seconds",
        "image_size",
        "inter_op_threads",
        "allreduce",
    )
    command = [sys.executable, str(RANK_PROGRAM), *(f"--{key}={getattr(arguments, key)}" for key in passed)]
    subprocess.run([LAB, "up", str(hosts)], check=True, env=lab_environment)
    try:
        process = subprocess.Popen(
            mpirun(hosts, arguments.lab, arguments.allreduce, environment, command),
            env=lab_environment,
            cwd=paired.ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        yield from csv.DictReader(process.stdout, fieldnames=COLUMNS)
        if process.wait(timeout=60):
            raise SystemExit(f"the ranks on {hosts} hosts failed with {process.returncode}")
    finally:
        subprocess.run([LAB, "down"], check=True, env=lab_environment)


def print_medians(rows: List[Dict[str, str]]) -> None:
    """Print the median step of each setting, with its interval and the part that compute did not hide."""
    print("hosts  model                  MB  Mbit/s  compute_s     step_s  95 % interval          exposed_s    n")
    by_setting: Dict[Tuple[str, ...], List[float]] = {}
    for row in rows:
        by_setting.setdefault(tuple(row[key] for key in SETTING), []).append(float(row["step_s"]))
    for (hosts, model, width, size, mbit, compute_s), steps in by_setting.items():
        low, high = paired.interval(steps)
        median = statistics.median(steps)
        name = model if float(width) == 1 else f"{model}:{width}"
        print(
            f"{hosts:>5}  {name:<15} {int(size) / 1e6:>8.3f}  {mbit:>6}  {float(compute_s):>9.2f}  {median:>9.6f}  "
            f"{low:.6f} ... {high:.6f}  {median - float(compute_s):>9.6f}  {len(steps):>3}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hosts", default="2,3,4")
    parser.add_argument("--mbit", default="500,1000,2500,10000", help="speeds of the links; 0: not limited")
    parser.add_argument(
        "--models", default="resnet50,resnet18,resnet50:0.5", help="networks, with :WIDTH unless it is 1"
    )
    parser.add_argument("--compute_s", default="0,0.5", help="seconds of compute per step; 0: communication alone")
    parser.add_argument("--messages", default="4096,2097152,33554432", help="bytes of single allreduces; -: none")
    parser.add_argument(
        "--rounds", type=int, default=2, help="over all speeds, models and computes, in alternating directions"
    )
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="seconds of a setting in a round; at least three steps"
    )
    parser.add_argument(
        "--image_size", type=int, default=224, help="pixels; decides the shares of the layers in compute"
    )
    parser.add_argument("--inter_op_threads", type=int, default=2, help="of TensorFlow; 1: another order of gradients")
    parser.add_argument(
        "--allreduce", choices=ALLREDUCES, default="auto", help="algorithm; auto: the choice of Open MPI"
    )
    parser.add_argument("--fusion_bytes", type=int, default=128 * 2**20, help="default: that of Horovod")
    parser.add_argument("--cycle_ms", type=float, default=1.0, help="default: that of Horovod")
    parser.add_argument("--lab", default="replay", help="name of the lab to start")
    parser.add_argument("--out", default="", help="CSV for all steps; benchmarks/replay_fit.py fits and reduces it")
    arguments = parser.parse_args()
    started, rows = time.monotonic(), []
    for hosts in map(int, arguments.hosts.split(",")):
        for row in rows_of(hosts, arguments):
            rows.append(row)
        print(f"{hosts} hosts done after {time.monotonic() - started:.0f} s", file=sys.stderr)
    if arguments.out:
        pathlib.Path(arguments.out).parent.mkdir(parents=True, exist_ok=True)
        with open(arguments.out, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    print_medians(rows)


if __name__ == "__main__":
    main()
