"""Compare the fused kernels with TensorFlow's operations in the environment that is active, in turns.

    python benchmarks/fused.py --image_size 224 --batch_size 32 --rounds 7 --out benchmarks/results/fused_intel_224.csv

--fused_kernels=auto follows from such figures (docs/kernels.md). Run it on an idle machine.
"""

import paired


def main() -> None:
    parser = paired.parser(__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch_size", type=int, default=32, help="images per rank")
    parser.add_argument("--stem", default="imagenet")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup_steps", type=int, default=3, help="steps that are not timed")
    parser.add_argument("--precision", default="float32")
    arguments = parser.parse_args()
    flags = [f"--image_size={arguments.image_size}", f"--batch_size={arguments.batch_size}", f"--stem={arguments.stem}"]
    flags += [f"--timed_steps={arguments.steps}", f"--warmup_steps={arguments.warmup_steps}"]
    flags += [f"--precision={arguments.precision}"]
    sides = {
        f"{name}_{ranks}": paired.benchmark_of(ranks, *flags, f"--fused_kernels={value}")
        for ranks in arguments.ranks
        for name, value in (("fused", "yes"), ("stock", "no"))
    }
    pairs = [(f"fused_{ranks}", f"stock_{ranks}") for ranks in arguments.ranks]
    paired.compare(sides, pairs, arguments.rounds, arguments.out)


if __name__ == "__main__":
    main()
