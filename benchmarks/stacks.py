"""Compare the stacks `intel` and `current` in speed: the same benchmark in two environments, in turns.

    python benchmarks/stacks.py --image_size 224 --rounds 7 --out benchmarks/results/stacks_224.csv

Needs both environments (`STACK=intel make setup`, `STACK=current make setup`) and an idle machine.
"""

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

    flags = [f"--image_size={arguments.image_size}", f"--batch_size={arguments.batch_size}"]
    flags += [f"--timed_steps={arguments.steps}", f"--precision={arguments.precision}"]
    sides = {
        f"{stack}_{ranks}": paired.benchmark_of(ranks, *flags, environment=environment)
        for ranks in (1, 2)
        for stack, environment in environments.items()
    }
    pairs = [("current_1", "intel_1"), ("current_2", "intel_2")]
    paired.compare(sides, pairs, arguments.rounds, arguments.out)


if __name__ == "__main__":
    main()
