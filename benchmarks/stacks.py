"""Compare the stacks `intel` and `current` in speed: the same benchmark in two environments, in turns.

    python benchmarks/stacks.py --image_size 224 --rounds 7 --out benchmarks/results/stacks_224.csv

Needs both environments (`STACK=intel make setup`, `STACK=current make setup`) and an idle machine.
"""

import os
from typing import Callable, Dict

import paired


def main() -> None:
    parser = paired.parser(__doc__)
    parser.add_argument("--intel", default=".venv-intel", help="environment of the stack intel")
    parser.add_argument("--current", default=".venv-current", help="environment of the stack current")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch_size", type=int, default=32, help="images per rank")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--precision", default="float32")
    arguments = parser.parse_args()
    environments = {"intel": arguments.intel, "current": arguments.current}

    def side(environment: str, ranks: int) -> Callable[[], float]:
        def measure() -> float:
            flags = [f"--image_size={arguments.image_size}", f"--batch_size={arguments.batch_size}"]
            flags += [f"--timed_steps={arguments.steps}", f"--precision={arguments.precision}", "--dataset=synthetic"]
            command = ["launch/local.sh", ranks, "python", "-m", "resnet_cpu.benchmark", *flags]
            path = f"{os.path.abspath(environment)}/bin:{os.environ['PATH']}"
            return paired.rate_of_benchmark(paired.start(command, PATH=path))

        return measure

    sides: Dict[str, Callable[[], float]] = {
        f"{stack}_{ranks}": side(environment, ranks) for ranks in (1, 2) for stack, environment in environments.items()
    }
    pairs = [("current_1", "intel_1"), ("current_2", "intel_2")]
    paired.compare(sides, pairs, arguments.rounds, arguments.out)


if __name__ == "__main__":
    main()
