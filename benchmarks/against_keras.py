"""Compare one and two ranks with `keras.applications` and `fit`, on the same TensorFlow and the same cores.

    python benchmarks/against_keras.py --rounds 7 --out benchmarks/results/against_keras.csv

ResNet-50 at 224x224, synthetic images, batch 32 per rank and for Keras. Keras runs with the Intel extension; with the
extension and the allocator that launch/local.sh preloads; and without the extension.
"""

import pathlib
import sys
import sysconfig
import tempfile

import paired


def without_extension(folder: str) -> dict:
    """Return environment variables that hide the Intel extension and keep all other packages of this environment.

    TensorFlow loads the extension if its plug-in is in `site-packages/tensorflow-plugins`, so the base interpreter is
    given a folder with links to all other packages.
    """
    site = pathlib.Path(sysconfig.get_paths()["purelib"])
    stock = pathlib.Path(folder) / "stock"
    stock.mkdir()
    for entry in site.iterdir():
        if not entry.name.startswith(("tensorflow-plugins", "intel_extension_for_tensorflow", "tensorflow_plugins")):
            (stock / entry.name).symlink_to(entry)
    return {"PYTHONPATH": str(stock)}


def main() -> None:
    parser = paired.parser(__doc__)
    parser.add_argument("--steps", type=int, default=6, help="timed steps, after one that is not timed")
    parser.add_argument("--sides", help="sides to measure, separated by commas (default: all)")
    arguments = parser.parse_args()
    ours = [
        sys.executable, "-m", "resnet_cpu.benchmark", "--dataset=synthetic", "--batch_size=32", "--warmup_steps=1",
        f"--timed_steps={arguments.steps}",
    ]  # fmt: skip
    fit = ["benchmarks/keras_fit.py", "--steps", arguments.steps + 1]
    base_python = pathlib.Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}"

    def benchmark(command: list, **environment: str) -> float:
        return paired.rate_of_benchmark(paired.start(command, **environment))

    with tempfile.TemporaryDirectory() as folder:
        stock = without_extension(folder)
        sides = {
            "ours_1_rank": lambda: benchmark(["launch/local.sh", 1, *ours]),
            "ours_2_ranks": lambda: benchmark(["launch/local.sh", 2, *ours]),
            "ours_2_ranks_bfloat16": lambda: benchmark(["launch/local.sh", 2, *ours, "--precision=bfloat16"]),
            "keras": lambda: benchmark([sys.executable, *fit]),
            "keras_allocator": lambda: benchmark([sys.executable, *fit], **paired.with_allocator()),
            "keras_stock_tensorflow": lambda: benchmark([base_python, *fit], **stock),
        }
        chosen = arguments.sides.split(",") if arguments.sides else list(sides)
        ratios = [(side, base) for base in chosen for side in chosen if (side[:4], base[:5]) == ("ours", "keras")]
        paired.compare({name: sides[name] for name in chosen}, ratios, arguments.rounds, arguments.out)


if __name__ == "__main__":
    main()
