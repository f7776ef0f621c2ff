"""Compare a training step of ResNet-50 with other frameworks, on the same cores, in turns.

    benchmarks/peers/setup.sh                                                # once: an environment for each peer
    python benchmarks/peers/compare.py --rounds 2 --out benchmarks/results/peers.csv
    python benchmarks/peers/compare.py --rounds 7 --sides goals --out benchmarks/results/peers.csv     # adds rounds

224x224 synthetic images, batch 32 per process, float32, SGD with momentum and weight decay, all cores. `--image_size`,
`--batch_size` and `--precision` choose others, for all sides of a CSV. `--list` and docs/benchmarks.md describe the
settings of each side. The CSV gets a row for each measurement as soon as it is made;
the same call continues after an interruption. Ratios are taken within rounds only. Run it on an idle machine.
"""

import argparse
import csv
import dataclasses
import os
import pathlib
import statistics
import subprocess
import sys
import time
from typing import Dict, List, Tuple

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import paired  # noqa: E402

WARMUP = 2  # steps that are not timed: our second step on two ranks still allocates memory
COLUMNS = ["round", "side", "images_per_second", "seconds", "versions"]
GOALS = ["ours_1_rank", "ours_2_ranks", "pytorch", "pytorch_tcmalloc", "pytorch_ddp", "tensorflow_newest"]
GOALS += ["tensorflow_newest_tuned"]
# A peer may have several sides. All are bases; the fastest one on this machine is what counts.
BASES = {
    "ours_1_rank": ["keras_stock", "keras_intel", "tensorflow_newest", "tensorflow_newest_tuned", "pytorch",
                    "pytorch_tcmalloc", "pytorch_launcher", "pytorch_compiled", "pytorch_ddp",
                    "pytorch_ddp_compiled"],
    "ours_2_ranks": ["ours_1_rank", "horovod_defaults", "keras_stock", "keras_intel", "tensorflow_newest",
                     "tensorflow_newest_tuned", "pytorch", "pytorch_tcmalloc", "pytorch_launcher", "pytorch_compiled",
                     "pytorch_ddp", "pytorch_ddp_compiled"],
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Side:
    """Describe a command whose last line is `total images/sec: X`."""

    description: str
    command: list
    python: pathlib.Path  # interpreter of its environment
    packages: Tuple[str, ...]  # their versions are recorded
    environment: Dict[str, str] = dataclasses.field(default_factory=dict)


def all_sides(venvs: pathlib.Path, steps: int, image_size: int, batch_size: int, precision: str) -> Dict[str, Side]:
    """Return every side by name. Each times `steps` batches over all of its processes, after WARMUP steps."""
    size = [f"--image_size={image_size}", f"--batch_size={batch_size}", f"--precision={precision}"]
    half = max(2, steps // 2)
    allocator = paired.with_allocator()
    ours = [sys.executable, "-m", "resnet_cpu.benchmark", "--dataset=synthetic", *size, f"--warmup_steps={WARMUP}"]
    one, two = [*ours, f"--timed_steps={steps}"], [*ours, f"--timed_steps={half}"]
    fit = ["benchmarks/keras_fit.py", f"--steps={steps + WARMUP}", f"--warmup_steps={WARMUP}", *size]
    here = pathlib.Path(sys.executable)
    ours_packages = ("tensorflow", "intel-extension-for-tensorflow", "horovod", "mpi4py")
    mpirun = ["mpirun", *(["--allow-run-as-root"] if os.geteuid() == 0 else []), "-np", 2]
    stock, newest, torch = (
        venvs / name / "bin" / "python" for name in ("tensorflow_2_15", "tensorflow_newest", "pytorch")
    )
    train = ["benchmarks/peers/pytorch_train.py", f"--warmup_steps={WARMUP}", *size]
    torch_one, torch_packages = [*train, f"--steps={steps}"], ("torch",)
    intel_openmp = {
        "LD_PRELOAD": ":".join([str(torch.parents[1] / "lib" / "libiomp5.so"), *allocator.values()]),
        "KMP_AFFINITY": "granularity=fine,compact,1,0",
        "KMP_BLOCKTIME": "1",
        "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
    }
    inductor = str(venvs / "inductor")  # what torch.compile has compiled
    compiled = {**intel_openmp, "TORCHINDUCTOR_CACHE_DIR": inductor}
    processes = [torch, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    ddp = [*processes, *train, "--tuned", f"--steps={half}"]
    return {
        "ours_1_rank": Side("launch/local.sh 1", ["launch/local.sh", 1, *one], here, ours_packages),
        "ours_2_ranks": Side("launch/local.sh 2", ["launch/local.sh", 2, *two], here, ours_packages),
        "keras_stock": Side(
            "keras.applications and fit on TensorFlow 2.15, as installed", [stock, *fit], stock,
            ("tensorflow-cpu", "keras"),
        ),
        "keras_intel": Side(
            "the same with the Intel extension and tcmalloc", [here, *fit], here, ours_packages[:2], allocator
        ),
        "tensorflow_newest": Side(
            "keras.applications and fit, as installed (Keras 3 then uses XLA)", [newest, *fit], newest,
            ("tensorflow-cpu", "keras"),
        ),
        "tensorflow_newest_tuned": Side(
            "the same with jit_compile=False and tcmalloc", [newest, *fit, "--jit_compile=no"], newest,
            ("tensorflow-cpu", "keras"), allocator,
        ),
        "pytorch": Side("channels_last, otherwise as installed", [torch, *torch_one], torch, torch_packages),
        "pytorch_tcmalloc": Side(
            "with tcmalloc, the fused update, flushed denormals", [torch, *torch_one, "--tuned"], torch, torch_packages,
            allocator,
        ),
        "pytorch_launcher": Side(
            "also with the settings of torch.backends.xeon.run_cpu: Intel's OpenMP, bound threads",
            [torch, *torch_one, "--tuned"], torch, (*torch_packages, "intel-openmp"), intel_openmp,
        ),
        "pytorch_compiled": Side(
            "also with torch.compile (the first call compiles for minutes; later ones use a cache)",
            [torch, *torch_one, "--tuned", "--compile"], torch, (*torch_packages, "intel-openmp"), compiled,
        ),
        "pytorch_ddp": Side(
            "DistributedDataParallel over gloo, 2 processes of one core each, tcmalloc, tuned",
            ddp, torch, torch_packages, {**allocator, "OMP_NUM_THREADS": "1"},
        ),
        "pytorch_ddp_compiled": Side(
            "also with torch.compile", [*ddp, "--compile"], torch, torch_packages,
            {**allocator, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": inductor},
        ),
        "horovod_defaults": Side(
            "our step with plain mpirun -np 2: default binding and waiting of Open MPI", [*mpirun, *two], here,
            ours_packages,
        ),
    }  # fmt: skip


def versions(side: Side) -> str:
    """Return the versions of the packages of a side, as `name 1.0; name 2.0`."""
    program = "import importlib.metadata as m, sys; print('; '.join(f'{n} {m.version(n)}' for n in sys.argv[1:]))"
    done = subprocess.run([side.python, "-c", program, *side.packages], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def read(path: pathlib.Path) -> Dict[int, paired.Row]:
    """Return images/s by round and side from the file of earlier calls."""
    rounds: Dict[int, paired.Row] = {}
    if path.exists():
        with open(path, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                rounds.setdefault(int(row["round"]), {})[row["side"]] = float(row["images_per_second"])
    return rounds


def append(path: pathlib.Path, row: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with open(path, "a", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([COLUMNS, row] if new else [row])


def measure(sides: Dict[str, Side], rounds: int, out: pathlib.Path, minutes: float, limit_s: float) -> None:
    """Add rounds to `out` until `rounds` of them hold all sides, or the next one would not end within `minutes`.

    An interrupted round is kept and counts for the pairs that it has. A side that fails is reported and skipped from
    then on.
    """
    started, longest, known = time.monotonic(), 0.0, {name: versions(side) for name, side in sides.items()}
    while sides:
        done = read(out)
        missing = rounds - sum(set(sides) <= set(row) for row in done.values())
        spent = time.monotonic() - started
        if missing <= 0 or spent + longest > 60 * minutes:
            print(f"{max(missing, 0)} rounds missing, {spent:.0f} s spent", flush=True)
            return
        number = max(done, default=0) + 1
        for name in paired.turn(list(sides), number):
            before = time.monotonic()
            try:
                rate = paired.rate_of_benchmark(paired.start(sides[name].command, **sides[name].environment), limit_s)
            except (SystemExit, ValueError, OSError) as error:
                print(f"round {number}: {name} failed and is skipped from now on: {error}", file=sys.stderr, flush=True)
                del sides[name]
                continue
            seconds = time.monotonic() - before
            append(out, [number, name, f"{rate:.5f}", f"{seconds:.1f}", known[name]])
            print(f"round {number}: {name} {rate:.3f} images/s ({seconds:.0f} s)", flush=True)
        longest = max(longest, time.monotonic() - started - spent)


def report(rows: List[paired.Row]) -> None:
    """Print the median of each side with its interval, then the ratios of our sides to the others."""
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row[name] for row in rows if name in row]
        low, high = paired.interval(values)
        print(f"{name}: median {statistics.median(values):.3f} images/s, {low:.3f} ... {high:.3f}, n = {len(values)}")
    for side, bases in BASES.items():
        for base in bases:
            if any(side in row and base in row for row in rows):
                paired.print_ratio(rows, side, base)


def main() -> None:
    parser = paired.parser(__doc__)
    parser.set_defaults(out="benchmarks/results/peers.csv")
    parser.add_argument(
        "--sides", default="all", help="all, goals (those of the performance goals), or names separated by commas"
    )
    parser.add_argument("--steps", type=int, default=4, help="timed batches per run, over all of its processes")
    parser.add_argument("--minutes", type=float, default=600, help="start no round that would end later")
    parser.add_argument("--limit_s", type=float, default=300, help="longest time of one run, seconds")
    parser.add_argument("--venvs", type=pathlib.Path, default=HERE / ".venvs", help="folder that was given to setup.sh")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch_size", type=int, default=32, help="per process")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32", help="bfloat16: mixed")
    parser.add_argument("--list", action="store_true", help="describe the sides and exit")
    parser.add_argument("--report", action="store_true", help="print the results in --out and exit")
    arguments = parser.parse_args()
    venvs, out = arguments.venvs.resolve(), pathlib.Path(arguments.out)
    sides = all_sides(venvs, arguments.steps, arguments.image_size, arguments.batch_size, arguments.precision)
    if arguments.list:
        for name, side in sides.items():
            settings = " ".join(f"{key}={value}" for key, value in side.environment.items())
            print(f"{name}: {side.description}\n    {settings} {' '.join(map(str, side.command))}")
        return
    paired.refuse_default_file(parser, arguments, "image_size", "batch_size", "precision")
    if not arguments.report:
        chosen = {"all": list(sides), "goals": GOALS}.get(arguments.sides, arguments.sides.split(","))
        check(parser, sides, chosen)
        measure({name: sides[name] for name in chosen}, arguments.rounds, out, arguments.minutes, arguments.limit_s)
    report(list(read(out).values()))


def check(parser: argparse.ArgumentParser, sides: Dict[str, Side], chosen: List[str]) -> None:
    """Exit with an error message if a side is unknown, or an environment or the allocator is missing."""
    unknown = [name for name in chosen if name not in sides]
    if unknown:
        parser.error(f"--sides: unknown {', '.join(unknown)}; use some of {', '.join(sides)}")
    absent = sorted({str(sides[name].python) for name in chosen if not sides[name].python.exists()})
    if absent:
        parser.error(f"missing {', '.join(absent)}: run benchmarks/peers/setup.sh, or name its folder with --venvs")
    if not paired.ALLOCATOR:
        parser.error(
            "libtcmalloc_minimal.so.4 is missing, which several sides preload; install libtcmalloc-minimal4 (Debian)"
        )


if __name__ == "__main__":
    main()
