"""Measure what a checkpoint costs training: written in the background, and waited for.

    launch/local.sh 2 python benchmarks/saving.py --rounds 7 --out benchmarks/results/saving.csv

ResNet-50 on synthetic images. Each side saves once and then does --steps steps; the sides take turns with steps that
save nothing. The stall is the time before the next step can begin; the cost is the time that the save adds in total,
with the steps that are slower while it is written. Run it on an idle machine.
"""

import contextlib
import shutil
import statistics
import tempfile
import time
from typing import Dict

import paired

from resnet_cpu import commandline
from resnet_cpu.cluster import guard, placement

SIDES = ("no_save", "background", "waited_for")


def main(argv: list) -> None:
    parser = paired.parser(__doc__)
    parser.add_argument("--steps", type=int, default=6, help="steps after each save")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch_size", type=int, default=32, help="per rank")
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where to save, on the disk to measure")
    arguments = parser.parse_args(argv)
    world = guard.connect(None, 60.0)
    run_dir = world.broadcast(tempfile.mkdtemp(dir=arguments.folder) if world.rank == 0 else None)
    flags = [
        "--dataset=synthetic", "--train_examples=100000", f"--model={arguments.model}",
        f"--image_size={arguments.image_size}", f"--batch_size={arguments.batch_size}",
        "--phase=main:steps=1000000,lr=0.0001", "--checkpoint_every_steps=0", f"--run_dir={run_dir}/run",
    ]  # fmt: skip
    settings = commandline.parse(flags, "train")
    environment = placement.apply(settings.system.threads, world.cores)
    try:
        rows = measure(settings, world, environment, arguments.rounds, arguments.steps)
    finally:
        world.barrier()
        if world.rank == 0:
            shutil.rmtree(run_dir)
    if world.rank == 0:
        report(rows, arguments)


def measure(settings, world, environment, rounds: int, steps: int) -> list:
    """Return a row per round: seconds per step without a save, and stall and cost of each way of saving."""
    from resnet_cpu.cluster import horovod
    from resnet_cpu.data.batches import training_batches
    from resnet_cpu.model.kernels import library
    from resnet_cpu.recipe import schedule
    from resnet_cpu.run.writer import Writer
    from resnet_cpu.training import loop, opening
    from resnet_cpu.training.report import open_report
    from resnet_cpu.training.state import State, build_model
    from resnet_cpu.training.step import TrainStep

    job = opening.open_job(settings, world, environment)
    report = open_report(job)
    with contextlib.closing(report), guard.Watchdog(600.0), Writer() as writer:
        horovod.start(world)
        fused, kernels = library.agree(settings, world)
        model = build_model(settings, fused)
        train_step = TrainStep(model, settings.recipe, job.batch.accumulate_steps, fused)
        state = State(model, train_step.optimizer)
        horovod.broadcast(state.variables)
        batches = training_batches(
            settings, world, None, examples=job.train_examples, batch=job.batch, first_step=0,
            last_step=job.last_step, augment="full", image_size=settings.data.image_size,
        )  # fmt: skip
        rates = schedule.rates(job.phases, job.phases[0], 0, False)

        def turn(side: str) -> Dict[str, float]:
            world.barrier()
            began = time.perf_counter()
            if side != "no_save":
                loop.save(job, state, report, writer, kernels, wait=side == "waited_for")
            stall = time.perf_counter() - began
            for _ in range(steps):
                train_step.take(batches, rates)
                state.step += 1
            world.on_rank0(writer.finish)
            return {"stall": stall, "total": time.perf_counter() - began}

        for side in (*SIDES, "no_save"):  # traces the step, allocates the copies
            turn(side)
        rows = []
        for number in range(rounds):
            found = {side: turn(side) for side in paired.turn(list(SIDES), number)}
            row = {"step_s": found["no_save"]["total"] / steps}
            for side in SIDES[1:]:
                row[f"{side}_stall_s"] = found[side]["stall"]
                row[f"{side}_cost_s"] = found[side]["total"] - found["no_save"]["total"]
            rows.append(row)
            if world.rank == 0:
                print(f"round {number + 1}: " + ", ".join(f"{k} {v:.3f}" for k, v in row.items()), flush=True)
    return rows


def report(rows: list, arguments) -> None:
    """Print medians with their 95 % intervals, in seconds and in steps, and write the rounds."""
    for name in rows[0]:
        values = [row[name] for row in rows]
        low, high = paired.interval(values)
        of_a_step = statistics.median(row[name] / row["step_s"] for row in rows)
        print(
            f"{name}: median {statistics.median(values):.3f} ({low:.3f} ... {high:.3f}) = {of_a_step:.3f} steps, "
            f"n = {len(rows)}"
        )
    paired.write(arguments.out, rows)


if __name__ == "__main__":
    guard.run(main)
