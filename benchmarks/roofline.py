"""Compare our training step of ResNet-50 with the upper bound that this machine's arithmetic and memory set.

    launch/local.sh 1 python benchmarks/roofline.py --rounds 7 --out benchmarks/results/roofline.csv

The definition was fixed before the first measurement. One process on all cores, 224x224, batch 32, float32; with
--precision=bfloat16 all but the classifier and the update moves half the bytes, and the ceilings are those of bfloat16.

- Compute ceiling: the fastest of a fixed set of convolutions (3x3 and 1x1, forward, no padding) and a product of
  matrices of 4096 x 4096, with the same kernels and threads as our step. A rate is FLOPs (two per multiply-add) over
  the mean time of the calls that fit in half a second. The fastest has the highest median over the rounds.
- Memory ceiling: the fastest of STREAM copy and triad (benchmarks/stream.cpp), with ordinary and non-temporal stores,
  on arrays of the size of the largest activation and of 1 GiB; chosen in the same way.
- Each of the three passes of a convolution (forward, gradient of its input, gradient of its kernel; the first
  convolution does not need the second) takes the longer of two times: its FLOPs at the compute ceiling and its bytes
  at the memory ceiling. The same holds for the classifier. FLOPs are counted as usual (4.1 G multiply-adds forward),
  including padding. Bytes count each of input, kernel and output, or their gradients, once.
- All other parts take their bytes at the memory ceiling: the fewest that must be moved if tensors between layers are
  in memory and elementwise operations are fused with their neighbours. Batch norm needs the statistics of the whole
  batch: forward reads the input twice and writes once; backward reads input and gradient twice and writes once. The
  ReLU after it is free in both directions. An addition reads the shortcut; backward reads the sum, for its ReLU, and
  one of the two gradients that meet where the shortcut starts. Max pooling reads and writes; backward reads input and
  gradient and writes. Average pooling reads; backward writes. The update reads weight, gradient and velocity and
  writes weight and velocity.
- The bound is the batch size over the sum of these times. Parts do not overlap, since each one uses all cores. Calls,
  reorders and the interpreter are not counted.
- Our share is our images/s over the bound of the same round, with the rates of the two chosen kernels in that round.

Two more figures are printed, which are not the bound. Without the multiplications by padding, which kernels may skip,
the bound is a little higher. And every convolution of the network is timed alone: the sum of their times and of the
other parts is the time of a step with these kernels and no losses between them.
"""

import argparse
import collections
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any, Callable, Dict, List, Tuple

import paired
from step_bound import BYTES, Conv, Part, convolutions, parts, summed

# (name, height and width of the output, kernel, channels in, channels out), stride 1; kernel 0: a product of matrices
SET = [
    ("3x3 64 at 56x56", 56, 3, 64, 64),
    ("3x3 128 at 28x28", 28, 3, 128, 128),
    ("3x3 256 at 14x14", 14, 3, 256, 256),
    ("3x3 512 at 7x7", 7, 3, 512, 512),
    ("3x3 256 at 56x56", 56, 3, 256, 256),
    ("3x3 512 at 28x28", 28, 3, 512, 512),
    ("1x1 128 to 512 at 28x28", 28, 1, 128, 512),
    ("1x1 256 to 1024 at 14x14", 14, 1, 256, 1024),
    ("1x1 1024 to 1024 at 28x28", 28, 1, 1024, 1024),
    ("matrices 4096", 4096, 0, 4096, 4096),
]


def seconds_per_call(call: Callable[[], Any], window_s: float) -> float:
    """Return the mean seconds of the calls that fit in the window, at least two, after one that is not timed."""
    call()
    calls, started = 0, time.perf_counter()
    while calls < 2 or time.perf_counter() - started < window_s:
        call()
        calls += 1
    return (time.perf_counter() - started) / calls


def passes(conv: Conv, batch: int) -> Dict[str, Callable[[], Any]]:
    """Return a call for each pass of a convolution; strided ones get padded images, as in the network."""
    import tensorflow as tf

    spare = 2 * conv.padding if conv.stride == 1 else 0
    shape = [batch, conv.inputs[0] - spare, conv.inputs[1] - spare, conv.inputs[2]]
    images, gradient = _normal(shape, conv.precision), _normal([batch, *conv.outputs], conv.precision)
    kernel = _normal([conv.kernel, conv.kernel, conv.inputs[2], conv.outputs[2]], conv.precision)
    strides = [1, conv.stride, conv.stride, 1]
    raw = {"strides": strides, "padding": "SAME" if spare else "VALID"}
    forward = tf.function(lambda x, w: tf.raw_ops.Conv2D(input=x, filter=w, **raw))
    ways: Dict[str, Callable[[], Any]] = {"forward": lambda: forward(images, kernel)}
    if "input" in conv.passes:
        of_input = tf.function(
            lambda w, y: tf.raw_ops.Conv2DBackpropInput(input_sizes=shape, filter=w, out_backprop=y, **raw)
        )
        ways["input"] = lambda: of_input(kernel, gradient)
    of_kernel = tf.function(
        lambda x, y: tf.raw_ops.Conv2DBackpropFilter(input=x, filter_sizes=kernel.shape, out_backprop=y, **raw)
    )
    ways["kernel"] = lambda: of_kernel(images, gradient)
    return ways


def _normal(shape: List[int], precision: str) -> Any:
    import tensorflow as tf

    return tf.cast(tf.random.normal(shape), precision)


def compute_set(batch: int, window_s: float, precision: str) -> Dict[str, Callable[[], float]]:
    """Return a call for each kernel of `SET` that measures its rate in GFLOP/s."""
    import tensorflow as tf

    calls: Dict[str, Callable[[], float]] = {}

    def measure(call: Callable[[], Any], flops: float) -> Callable[[], float]:
        return lambda: flops / seconds_per_call(call, window_s) / 1e9

    for name, size, kernel, ins, outs in SET:
        if kernel == 0:
            left, right = _normal([size, ins], precision), _normal([ins, outs], precision)
            product = tf.function(tf.matmul)
            calls[name] = measure(lambda p=product, a=left, b=right: p(a, b), 2.0 * size * ins * outs)
        else:
            whole = size + kernel - 1
            conv = Conv((whole, whole, ins), (size, size, outs), kernel, 1, 0, True, precision)
            calls[name] = measure(passes(conv, batch)["forward"], conv.flops(batch))
    return calls


def memory_set(folder: str, largest: int, seconds: float) -> Callable[[], Dict[str, float]]:
    """Compile STREAM; return a call that measures the rate of each of its kernels in GB/s."""
    program = str(pathlib.Path(folder) / "stream")
    source = paired.ROOT / "benchmarks" / "stream.cpp"
    subprocess.run(["g++", "-O3", "-march=native", "-fopenmp", str(source), "-o", program], check=True)

    def measure() -> Dict[str, float]:
        rates = {}
        for label, size in ((f"{largest / 1e6:.0f} MB", largest), ("1 GiB", 2**30)):
            done = subprocess.run([program, str(size), str(seconds)], check=True, capture_output=True, text=True)
            rates.update({f"{line.split()[0]}, {label}": float(line.split()[1]) for line in done.stdout.splitlines()})
        return rates

    return measure


def training_step(arguments: argparse.Namespace) -> Tuple[Callable[[], Any], Any]:
    """Return a call that does the step that `resnet_cpu.benchmark` times, and a model with static shapes."""
    from resnet_cpu import commandline
    from resnet_cpu.cluster import control, placement
    from resnet_cpu.resolve import resolve_batch

    command = ["--dataset=synthetic", f"--batch_size={arguments.batch_size}", f"--image_size={arguments.image_size}"]
    settings = commandline.parse([*command, f"--precision={arguments.precision}"], "benchmark")
    world = control.connect(settings.system.ranks)
    if world.size > 1:
        raise SystemExit("roofline.py needs a single rank: launch/local.sh 1 python benchmarks/roofline.py ...")
    print(f"environment: {placement.apply(settings.system.threads, world.cores)}", flush=True)
    import tensorflow as tf

    from resnet_cpu.bench import steps
    from resnet_cpu.cluster import horovod
    from resnet_cpu.training import state

    tf.get_logger().setLevel("ERROR")  # it warns of repeated tracing; each function here is a different one
    horovod.start(world)
    train_step, batches = steps.synthetic_training(settings, world, resolve_batch(settings, world.size), 10**6)
    size = [arguments.image_size, arguments.image_size, 3]
    shaped = tf.keras.models.clone_model(state.build_model(settings, False), tf.keras.Input(size))
    return lambda: train_step.take(batches, steps.STILL), shaped


def main() -> None:
    parser = paired.parser(__doc__)
    parser.set_defaults(out="benchmarks/results/roofline.csv")
    parser.add_argument("--steps", type=int, default=3, help="timed steps per round")
    parser.add_argument(
        "--window_s", type=float, default=0.5, help="time for each kernel of the compute ceiling, seconds"
    )
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--precision", choices=BYTES, default="float32")
    arguments = parser.parse_args()
    batch, precision = arguments.batch_size, arguments.precision
    paired.refuse_default_file(parser, arguments, "batch_size", "image_size", "precision")
    train, model = training_step(arguments)
    found, convs = parts(model, batch, precision), collections.Counter(convolutions(model, precision))
    largest = BYTES[precision] * batch * max(conv.outputs[0] * conv.outputs[1] * conv.outputs[2] for conv in convs)
    alone = {(conv, way): call for conv in convs for way, call in passes(conv, batch).items()}
    computing = compute_set(batch, arguments.window_s, precision)
    train(), train()  # the first call traces the graph

    def step_rate() -> float:
        started = time.perf_counter()
        for _ in range(arguments.steps):
            train()
        return arguments.steps * batch / (time.perf_counter() - started)

    rows: List[Dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        memory = memory_set(folder, largest, 4 * arguments.window_s)
        groups: Dict[str, Callable[[], Dict[str, float]]] = {
            "ours": lambda: {"ours images/s": step_rate()},
            "compute": lambda: {f"{name} GFLOP/s": measure() for name, measure in computing.items()},
            "memory": lambda: {f"{name} GB/s": rate for name, rate in memory().items()},
            "alone": lambda: {f"{_label(*key)} ms": 1000 * seconds_per_call(call, 0.0) for key, call in alone.items()},
        }
        for number in range(arguments.rounds):
            row: Dict[str, float] = {}
            for group in paired.turn(list(groups), number):
                row.update(groups[group]())
            rows.append(row)
            print(f"round {number + 1}: ours {row['ours images/s']:.3f} images/s", flush=True)
    paired.write(arguments.out, [{name: row[name] for name in rows[0]} for row in rows])
    unpadded = parts(model, batch, precision, padding=False)
    report(rows, found, unpadded, convs, batch, pathlib.Path(arguments.out).with_suffix(".png"))


def _label(conv: Conv, way: str) -> str:
    return f"alone {conv.kernel}x{conv.kernel}/{conv.stride} {conv.inputs} to {conv.outputs} {way}"


def best(rows: List[Dict[str, float]], unit: str) -> Tuple[str, float]:
    """Return (name, median over the rounds) of the fastest kernel with that unit."""
    medians = {name: statistics.median(row[name] for row in rows) for name in rows[0] if name.endswith(unit)}
    name = max(medians, key=lambda key: medians[key])
    return name, medians[name]


def report(
    rows: List[Dict[str, float]],
    found: List[Part],
    unpadded: List[Part],
    convs: Dict[Conv, int],
    batch: int,
    path: pathlib.Path,
) -> None:
    """Print the ceilings, the parts of a step, the bound and our share of it; draw the roofline to `path`."""
    for unit in ("GFLOP/s", " GB/s"):
        for name in rows[0]:
            if name.endswith(unit):
                print(f"  {name}: {statistics.median(row[name] for row in rows):.1f}")
    (compute_name, gflops), (memory_name, gigabytes) = best(rows, "GFLOP/s"), best(rows, " GB/s")
    print(f"ceilings: {gflops:.1f} GFLOP/s ({compute_name}), {gigabytes:.1f} GB/s ({memory_name})")
    measured: Dict[str, float] = collections.defaultdict(float)  # seconds of the convolutions, timed alone
    for conv, count in convs.items():
        for way in conv.passes:
            milliseconds = statistics.median(row[f"{_label(conv, way)} ms"] for row in rows)
            measured[f"convolutions {conv.kernel}x{conv.kernel}, {way}"] += count * milliseconds / 1000
    table = summed(found, gflops * 1e9, gigabytes * 1e9)
    print(f"{'part of a step':34s} {'GFLOP':>8s} {'GB':>7s} {'bound ms':>9s} {'alone ms':>9s}")
    for name, (flops, moved, seconds) in table.items():
        timed = f"{1000 * measured[name]:9.0f}" if name in measured else ""
        print(f"{name:34s} {flops:8.1f} {moved:7.2f} {1000 * seconds:9.0f} {timed}")
    total = sum(seconds for _, _, seconds in table.values())
    print(f"bound: {batch / total:.3f} images/s ({1000 * total:.0f} ms a step)")
    rates = [row["ours images/s"] for row in rows]
    low, high = paired.interval(rates)
    print(f"ours: median {statistics.median(rates):.3f} images/s, {low:.3f} ... {high:.3f}, n = {len(rates)}")
    compared = []
    for row in rows:
        ceilings = 1e9 * row[compute_name], 1e9 * row[memory_name]
        alone = sum(measured.get(name, seconds) for name, (_, _, seconds) in summed(found, *ceilings).items())
        compared.append(
            {
                "ours": row["ours images/s"],
                "the bound": batch / sum(part.seconds(*ceilings) for part in found),
                "the bound without padding": batch / sum(part.seconds(*ceilings) for part in unpadded),
                "convolutions as they are alone": batch / alone,
            }
        )
    for base in list(compared[0])[1:]:
        paired.print_ratio(compared, "ours", base)
    draw(found, rows, convs, batch, gflops, gigabytes, path)


def draw(
    found: List[Part],
    rows: List[Dict[str, float]],
    convs: Dict[Conv, int],
    batch: int,
    gflops: float,
    gigabytes: float,
    path: pathlib.Path,
) -> None:
    """Draw the roofline, the passes of each convolution timed alone, and the whole step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    reach = [0.25, gflops / gigabytes, 1000.0]
    axes.loglog(reach, [min(gflops, x * gigabytes) for x in reach], color="black", label="roofline")
    for way, marker in (("forward", "o"), ("input", "^"), ("kernel", "s")):
        chosen = [conv for conv in convs if way in conv.passes]
        axes.plot(
            [conv.flops(batch) / conv.bytes(batch) for conv in chosen],
            [
                conv.flops(batch) / statistics.median(row[f"{_label(conv, way)} ms"] for row in rows) / 1e6
                for conv in chosen
            ],
            marker,
            markersize=5,
            alpha=0.7,
            label={"forward": "convolution", "input": "gradient of its input", "kernel": "gradient of its kernel"}[way],
        )
    flops = sum(part.flops for part in found)
    rate = statistics.median(row["ours images/s"] for row in rows) / batch * flops / 1e9
    axes.plot(
        [flops / sum(part.bytes for part in found)], [rate], "*", markersize=14, color="crimson", label="our step"
    )
    axes.set(
        xlabel="FLOP/byte",
        ylabel="GFLOP/s",
        title=f"{next(iter(convs)).precision}, {gflops:.0f} GFLOP/s, {gigabytes:.1f} GB/s",
    )
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    print(f"plot: {path}")


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    main()
    sys.stdout.flush()
