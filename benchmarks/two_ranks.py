"""Compare two Horovod ranks of one core each with two independent processes: the cost of coupling.

    python benchmarks/two_ranks.py --rounds 7 --out benchmarks/results/two_ranks.csv

Both sides have the same network, batch and threads: ResNet-50 at 224x224, synthetic images, one core per process. Run
it on an idle machine.
"""

import argparse
import os
import sys
import tempfile

import paired


def train_command(run_dir: str, arguments: argparse.Namespace) -> list:
    return [
        sys.executable, "-m", "resnet_cpu.train", "--dataset=synthetic", "--train_examples=100000", "--model=resnet50",
        f"--image_size={arguments.image_size}", f"--batch_size={arguments.batch_size}",
        f"--phase=main:steps={arguments.steps},lr=0.01", "--log_every_steps=1000", "--checkpoint_every_steps=0",
        "--threads=1", f"--run_dir={run_dir}",
    ]  # fmt: skip


def coupled(arguments: argparse.Namespace) -> float:
    """Return images/s of two Horovod ranks of one core each."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["launch/local.sh", 2, *train_command(f"{folder}/coupled", arguments)]
        return paired.rate_of_training(paired.start(command))


def independent(arguments: argparse.Namespace) -> float:
    """Return images/s of two processes that run at the same time, each on its own core, with the usual allocator."""
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            paired.start(
                ["taskset", "-c", core, *train_command(f"{folder}/{core}", arguments)], **paired.with_allocator()
            )
            for core in sorted(os.sched_getaffinity(0))[:2]
        ]
        return sum(paired.rate_of_training(process) for process in processes)


def main() -> None:
    parser = paired.parser(__doc__)
    parser.add_argument("--steps", type=int, default=7, help="steps per run; all but the first are timed")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch_size", type=int, default=32, help="per process")
    arguments = parser.parse_args()
    sides = {"coupled": lambda: coupled(arguments), "independent": lambda: independent(arguments)}
    paired.compare(sides, [("coupled", "independent")], arguments.rounds, arguments.out)


if __name__ == "__main__":
    main()
