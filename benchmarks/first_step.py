"""Measure where the time goes from the start of a process until a step of ResNet-50 takes as long as any other.

    launch/local.sh 1 python benchmarks/first_step.py --rounds 5 --batch_size 8

Each round is a process of its own. `flags and placement`: from the start of Python; `TensorFlow`: its import, with that
of the Intel extension; `network`: the layers and the initial weights; `trace`: the graph of a training step; `first
step`: TensorFlow's optimisation of the graph, the creation of kernels and the step itself; then the second and the
third step. Data are synthetic.
"""

import json
import statistics
import sys
import time

import paired

STAGES = ("flags and placement", "TensorFlow", "network", "trace", "first step", "second step", "third step")


def main() -> None:
    parser = paired.parser(__doc__)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--started", type=float, help="used by this program for its own processes")
    arguments = parser.parse_args()
    flags = [f"--{name}={getattr(arguments, name)}" for name in ("batch_size", "image_size", "precision")]
    if arguments.started is not None:
        print(json.dumps(stages(["--dataset=synthetic", *flags], arguments.started)))
        return
    rows = []
    for number in range(arguments.rounds):
        command = [sys.executable, __file__, *flags, f"--started={time.time()}"]
        rows.append(json.loads(paired.last_line(paired.start(command, **paired.with_allocator()))))
        rows[-1]["until the end of the first step"] = sum(rows[-1][name] for name in STAGES[:5])
        print(f"round {number + 1}: {rows[-1]['until the end of the first step']:.1f} s", flush=True)
    for name in rows[0]:
        values = [row[name] for row in rows]
        low, high = paired.interval(values)
        print(f"{name}: median {statistics.median(values):.2f} s, {low:.2f} ... {high:.2f}, n = {len(values)}")
    paired.write(arguments.out, rows)


def stages(command: list, started: float) -> paired.Row:
    """Return the seconds of each of STAGES in this process; it was started at `started`, seconds since the epoch."""
    marks = [started]

    def mark() -> None:
        marks.append(time.time())

    from resnet_cpu import commandline
    from resnet_cpu.cluster import control, placement
    from resnet_cpu.resolve import resolve_batch

    settings = commandline.parse(command, "benchmark")
    world = control.connect(1)
    placement.apply(settings.system.threads, world.cores)
    mark()
    import tensorflow as tf

    mark()
    from resnet_cpu.bench import steps

    batch, size = resolve_batch(settings, 1), settings.data.image_size
    train_step, batches = steps.synthetic_training(settings, world, batch, 10**6)
    mark()
    images, labels = tf.TensorSpec([batch.per_rank, size, size, 3]), tf.TensorSpec([batch.per_rank], tf.int64)
    train_step.update.get_concrete_function(images, labels, tf.TensorSpec([3]), tf.TensorSpec([]))
    mark()
    for _ in range(3):
        train_step.take(batches, steps.STILL)
        mark()
    assert train_step.update.experimental_get_tracing_count() == 1, "the first step traced another graph"
    return {name: later - earlier for name, earlier, later in zip(STAGES, marks, marks[1:])}


if __name__ == "__main__":
    main()
