"""What a flagfile would do, without data, training or TensorFlow: `python -m resnet_cpu.plan --flagfile=F`."""

import sys
from typing import Callable, Iterator, List, Optional, Tuple

from resnet_cpu import flags
from resnet_cpu.cluster import guard
from resnet_cpu.data.datasets import facts_of
from resnet_cpu.errors import DataError, FlagError
from resnet_cpu.recipe import schedule
from resnet_cpu.recipe.phases import Phase
from resnet_cpu.report.text import duration
from resnet_cpu.run import past_run as past_runs
from resnet_cpu.settings import Plan, Settings, plan

CSV_HEADER = "step,phase,step_in_phase,epoch,lr,weight_decay,momentum,augment,image_size"


def main(argv: List[str]) -> None:
    """Print the plan as a table or csv, or draw it."""
    values, _ = flags.parse_values(argv, "plan")
    settings = flags.make_settings(values)
    ranks = settings.system.ranks or 1
    train_examples = _train_examples(settings)
    planned = plan(settings, ranks, train_examples)
    if values.format == "csv":
        rows = csv_rows(planned, train_examples, settings.recipe.momentum_correction)
        sys.stdout.write("\n".join(rows) + "\n")
    elif values.format == "png":
        output = values.output or "plan.png"
        _draw(planned.phases, planned.batch.total / train_examples, output)
        print(output)
    else:
        speed = _speed(settings, planned, values.images_per_second, values.past_run, ranks)
        print("\n".join([*table(planned, ranks, train_examples, speed), *notes(settings, planned)]))


def _speed(
    settings: Settings, planned: Plan, images_per_second: Optional[float], past_run: Optional[str], ranks: int
) -> Optional[float]:
    """Return the images/s that all ranks are taken to reach together, if anything is known of it."""
    if past_run is None:
        return images_per_second
    if images_per_second is not None:
        raise FlagError(f"--past_run={past_run}: contradicts --images_per_second; leave one of the two out")
    there = past_runs.result(past_run, settings.model, sorted({phase.image_size for phase in planned.phases}))
    return there["images_per_second"] / there["ranks"] * ranks


def _train_examples(settings: Settings) -> int:
    known = settings.data.train_examples or facts_of(settings.data.dataset).train_examples
    if known is None and settings.data.data_dir:
        from resnet_cpu.data import folders as layouts

        rows = layouts.describe(settings.data.data_dir, settings.data.dataset)["splits"].get("train", [])
        known = sum(row["examples"] for row in rows)
    if not known:
        raise DataError(f"the size of {settings.data.dataset} is not known; give --train_examples or --data_dir")
    return known


def csv_rows(planned: Plan, train_examples: int, momentum_correction: bool) -> Iterator[str]:
    """Yield the header, then one line for each executed step."""
    yield CSV_HEADER
    for step, phase, within, rate in schedule.walk(planned.phases):
        momentum = schedule.momentum(planned.phases, phase, within, momentum_correction)
        yield (
            f"{step},{phase.name},{within},{step * planned.batch.total / train_examples!r},{rate!r},{phase.wd!r},"
            f"{momentum!r},{phase.augment},{phase.image_size}"
        )


def table(planned: Plan, ranks: int, train_examples: int, images_per_second: Optional[float]) -> List[str]:
    """Return the lines of the table: a row a phase in the order of execution, then the sums."""
    batch = planned.batch
    columns: List[Tuple[str, Callable[[Phase], str]]] = [
        ("phase", lambda phase: phase.name),
        ("from", lambda phase: phase.parent or "-"),
        ("kind", lambda phase: " ".join(_kinds(phase)) or "-"),
        ("steps", lambda phase: f"{phase.steps:,}"),
        ("images", lambda phase: f"{phase.steps * batch.total:,}"),
        ("epochs", lambda phase: f"{phase.steps * batch.total / train_examples:.2f}"),
        ("LR first", lambda phase: f"{schedule.learning_rate(phase, 0):.4g}"),
        ("peak", lambda phase: f"{phase.lr:.4g}"),
        ("last", lambda phase: f"{schedule.learning_rate(phase, phase.steps - 1):.4g}"),
        ("decay", lambda phase: f"poly^{phase.power:g}" if phase.decay == "poly" else phase.decay),
        ("wd", lambda phase: f"{phase.wd:g}"),
        ("momentum", lambda phase: f"{phase.momentum:g}"),
        ("velocity", lambda phase: phase.velocity if phase.parent else "-"),
        ("augment", lambda phase: phase.augment),
        ("image", lambda phase: str(phase.image_size)),
    ]
    if images_per_second is not None:
        rate = images_per_second
        columns.append(("time", lambda phase: duration(phase.steps * batch.total / rate)))
    rows = [[title for title, _ in columns], *([cell(phase) for _, cell in columns] for phase in planned.phases)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(columns))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    steps = schedule.total_steps(planned.phases)
    images = steps * batch.total
    micro = f" x {batch.accumulate_steps} accumulated" if batch.accumulate_steps > 1 else ""
    lines += [
        "",
        f"{steps:,} steps, {images / train_examples:.2f} epochs, {images:,} images",
        f"global batch {batch.total:,} = {ranks} ranks x {batch.per_rank}{micro}; {train_examples:,} training examples "
        f"= {train_examples / batch.total:.2f} steps an epoch",
    ]
    if images_per_second is not None:
        lines.append(
            f"{duration(images / images_per_second)} at {images_per_second:,.1f} images/s of all ranks, evaluations "
            "and start not counted"
        )
    return lines


def _kinds(phase: Phase) -> List[str]:
    return [kind for kind, is_it in (("branch", phase.branch), ("member", phase.member)) if is_it]


def notes(settings: Settings, planned: Plan) -> List[str]:
    """Return what a reader of the table should know besides."""
    found = []
    seen = settings.model.bn_stats_batch or planned.batch.per_rank
    if seen < 16:
        found.append(f"batch norm sees {seen} images at a time on each rank; 16 and more are usual")
    if settings.run.max_steps:
        found.append(f"--max_steps={settings.run.max_steps} stops it before; the table is the whole recipe")
    if settings.system.ranks is None:
        found.append("planned for one rank; --ranks=N plans for N")
    return [f"note: {text}" for text in found]


def _draw(planned: Tuple[Phase, ...], epochs_per_step: float, path: str) -> None:
    from resnet_cpu.report import run_plots as plots

    if not plots.available():
        raise FlagError("--format=png: matplotlib is not installed; use --format=table, or pip install matplotlib")
    steps = list(schedule.walk(planned))
    borders = {phase.name: step * epochs_per_step for step, phase, within, _ in steps if within == 0}
    plots.draw_plan([step * epochs_per_step for step, *_ in steps], [row[3] for row in steps], borders, path)


if __name__ == "__main__":
    guard.run(main)
