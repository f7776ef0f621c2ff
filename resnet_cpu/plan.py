"""What a flagfile would do, without data, training or TensorFlow: `python -m resnet_cpu.plan --flagfile=F`."""

import sys
from typing import Iterator, List, Tuple

from resnet_cpu import flags
from resnet_cpu.cluster import guard
from resnet_cpu.data.datasets import facts_of
from resnet_cpu.errors import DataError, FlagError
from resnet_cpu.recipe import schedule
from resnet_cpu.recipe.phases import Phase
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
        sys.stdout.write("\n".join(csv_rows(planned.phases, planned.global_batch_size, train_examples)) + "\n")
    elif values.format == "png":
        _draw(planned.phases, planned.global_batch_size / train_examples, values.output)
        print(values.output)
    else:
        print("\n".join(table(planned, ranks, train_examples)))
        if settings.run.max_steps:
            print(f"note: --max_steps={settings.run.max_steps} stops it before; the table is the whole recipe")
        if settings.system.ranks is None:
            print("note: planned for one rank; --ranks=N plans for N")


def _train_examples(settings: Settings) -> int:
    known = settings.data.train_examples or facts_of(settings.data.dataset).train_examples
    if known is None and settings.data.data_dir:
        from resnet_cpu.data import layouts

        rows = layouts.describe(settings.data.data_dir, settings.data.dataset)["splits"].get("train", [])
        known = sum(row["examples"] for row in rows)
    if not known:
        raise DataError(f"the size of {settings.data.dataset} is not known; give --train_examples or --data_dir")
    return known


def csv_rows(planned: Tuple[Phase, ...], global_batch_size: int, train_examples: int) -> Iterator[str]:
    """Yield the header, then one line for each executed step."""
    yield CSV_HEADER
    for step, phase, within, rate in schedule.walk(planned):
        yield (
            f"{step},{phase.name},{within},{step * global_batch_size / train_examples!r},{rate!r},{phase.wd!r},"
            f"{phase.momentum!r},{phase.augment},{phase.image_size}"
        )


def table(planned: Plan, ranks: int, train_examples: int) -> List[str]:
    """Return the lines of the table: a row a phase, then the sums."""
    per_rank, global_batch_size = planned.batch_size, planned.global_batch_size
    rows = [
        (
            "phase",
            "from",
            "steps",
            "epochs",
            "LR first",
            "peak",
            "last",
            "decay",
            "wd",
            "momentum",
            "velocity",
            "augment",
            "image",
        )
    ]
    for phase in planned.phases:
        shape = f"poly^{phase.power:g}" if phase.decay == "poly" else phase.decay
        kind = ("  branch" if phase.branch else "") + ("  member" if phase.member else "")
        rows.append(
            (
                phase.name + kind,
                phase.parent or "-",
                f"{phase.steps:,}",
                f"{phase.steps * global_batch_size / train_examples:.2f}",
                f"{schedule.learning_rate(phase, 0):.4g}",
                f"{phase.lr:.4g}",
                f"{schedule.learning_rate(phase, phase.steps - 1):.4g}",
                shape,
                f"{phase.wd:g}",
                f"{phase.momentum:g}",
                phase.velocity if phase.parent else "-",
                phase.augment,
                str(phase.image_size),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    steps = schedule.total_steps(planned.phases)
    return [
        *lines,
        "",
        f"{steps:,} steps, {steps * global_batch_size / train_examples:.2f} epochs, "
        f"{steps * global_batch_size:,} images",
        f"global batch {global_batch_size:,} = {ranks} ranks x {per_rank}; {train_examples:,} training examples = "
        f"{train_examples / global_batch_size:.2f} steps an epoch",
        *(
            [f"note: batch norm sees {per_rank} images at a time on each rank; 16 and more are usual"]
            if per_rank < 16
            else []
        ),
    ]


def _draw(planned: Tuple[Phase, ...], epochs_per_step: float, path: str) -> None:
    from resnet_cpu.report import plots

    if not plots.available():
        raise FlagError("--format=png: matplotlib is not installed; use --format=table, or pip install matplotlib")
    steps = list(schedule.walk(planned))
    borders = {phase.name: step * epochs_per_step for step, phase, within, _ in steps if within == 0}
    plots.draw_plan([step * epochs_per_step for step, *_ in steps], [row[3] for row in steps], borders, path)


if __name__ == "__main__":
    guard.run(main)
