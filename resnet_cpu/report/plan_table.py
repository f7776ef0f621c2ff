"""The plan of a flagfile, as `python -m resnet_cpu.plan` prints it: a table, CSV with a row per step, or a plot."""

import math
from typing import Callable, Dict, Iterator, List, Optional, Tuple

from resnet_cpu.data.datasets import facts_of
from resnet_cpu.errors import DataError
from resnet_cpu.recipe import schedule
from resnet_cpu.recipe.phases import Phase
from resnet_cpu.resolve import Resolved, resolve_recipe
from resnet_cpu.run import past_run
from resnet_cpu.settings import Settings
from resnet_cpu.text import aligned, count, duration

CSV_HEADER = "step,phase,step_in_phase,epoch,lr,weight_decay,momentum,augment,image_size"
PLOT = "plan.png"
_SMALL_STATISTICS = 16  # images; batch norm is known to suffer from fewer


def answer(settings: Settings) -> str:
    """Return the text to print: a table, CSV, or the path of the plot that was drawn."""
    ranks, examples = settings.system.ranks or 1, train_examples(settings)
    resolved = resolve_recipe(settings, ranks, examples)
    if settings.prediction.format == "csv":
        return "\n".join(csv_lines(resolved, examples, settings.recipe.momentum_correction))
    if settings.prediction.format == "png":
        _draw(resolved, examples)
        return PLOT
    rate = images_per_second(settings, resolved, ranks)
    return "\n".join([*table_lines(settings, resolved, ranks, examples, rate), *notes(settings, resolved)])


def train_examples(settings: Settings) -> int:
    """Return the number of training examples: of the flag, the data set's known size, or the size of its shards."""
    known = settings.data.train_examples or facts_of(settings.data.dataset, settings.data.data_dir).train_examples
    if known is None and settings.data.data_dir:
        from resnet_cpu.data import folders  # not needed otherwise, and slow to load

        described = folders.describe(settings.data.data_dir, settings.data.dataset)
        known = sum(row["examples"] for row in described["splits"].get("train", []))
    if not known:
        raise DataError(f"--dataset={settings.data.dataset}: unknown size; give --train_examples or --data_dir")
    return known


def images_per_second(settings: Settings, resolved: Resolved, ranks: int) -> Optional[float]:
    """Return the images/s of all ranks together by --speed; None without it.

    For a past run, each of the `ranks` is assumed to be as fast as one of its ranks.
    """
    speed = settings.prediction.speed
    if speed is None:
        return None
    rate = past_run.rate_of(speed)
    if rate is not None:
        return rate
    pixels = sorted({phase.image_size for phase in resolved.phases})
    result = past_run.result(speed, settings.model, pixels)
    return result["images_per_second"] / result["ranks"] * ranks


def csv_lines(resolved: Resolved, examples: int, momentum_correction: bool) -> Iterator[str]:
    """Yield the header, then one line for each executed step; floats are written so that they read back exactly."""
    yield CSV_HEADER
    for step, phase, within, rate in schedule.walk(resolved.phases):
        momentum = schedule.momentum(resolved.phases, phase, within, momentum_correction)
        yield (
            f"{step},{phase.name},{within},{step * resolved.batch.total / examples!r},{rate!r},{phase.wd!r},"
            f"{momentum!r},{phase.augment},{phase.image_size}"
        )


def table_lines(settings: Settings, resolved: Resolved, ranks: int, examples: int, rate: Optional[float]) -> List[str]:
    """Return a row for each phase in the order of execution, then the totals; with times if images/s are given."""
    batch, steps = resolved.batch, schedule.total_steps(resolved.phases)
    images = steps * batch.total
    usual = settings.data.image_size
    columns = _columns(batch.total, examples)
    seconds = phase_seconds(settings, resolved, rate) if rate is not None else {}
    if seconds:
        columns.append(("time", lambda phase: duration(seconds[phase.name])))
    rows = [[title for title, _ in columns], *([cell(phase) for _, cell in columns] for phase in resolved.phases)]
    micro_batches = f" x {batch.accumulate_steps} accumulated" if batch.accumulate_steps > 1 else ""
    lines = [
        *aligned(rows, str.ljust),
        "",
        f"{count(f'{steps:,}', 'step')}, {images / examples:.2f} epochs, {count(f'{images:,}', 'image')}",
        f"global batch {batch.total:,} = {count(ranks, 'rank')} x {batch.per_rank}{micro_batches}; {examples:,} "
        f"training examples = {examples / batch.total:,.2f} steps per epoch",
    ]
    lines += member_lines(resolved, images / examples)
    if rate is not None:
        resized = _is_number(settings) and any(phase.image_size != usual for phase in resolved.phases)
        at = f" at {usual}x{usual} pixels, and of others in proportion to the pixels" if resized else ""
        total = duration(sum(seconds.values()))
        lines.append(f"{total} at {rate:,.1f} images/s of all ranks{at}, evaluations and start not counted")
    return lines


def phase_seconds(settings: Settings, resolved: Resolved, rate: float) -> Dict[str, float]:
    """Return the seconds of each phase by its name; the time of an image is taken to be proportional to its pixels.

    `rate`, in images/s, is that of images of --image_size if --speed gives a number, and of all phases together if it
    is that of a past run.
    """
    images = {phase.name: phase.steps * resolved.batch.total for phase in resolved.phases}
    usual = settings.data.image_size
    work = {phase.name: images[phase.name] * (phase.image_size / usual) ** 2 for phase in resolved.phases}
    unit = 1.0 if _is_number(settings) else sum(images.values()) / sum(work.values())
    return {name: value * unit / rate for name, value in work.items()}


def _is_number(settings: Settings) -> bool:
    speed = settings.prediction.speed
    return speed is not None and past_run.rate_of(speed) is not None


def member_lines(resolved: Resolved, epochs: float) -> List[str]:
    """Return where each member of a recipe of `epochs` ends in its budget, behind one model of the whole budget."""
    shares = schedule.budgets(resolved.phases)
    behind = {name: -math.log2(share) for name, share in shares.items()}
    lines = [
        f"member {name}: {share * epochs:.2f} epochs of training, {100 * share:.1f} % of the budget, "
        f"{behind[name]:.2f} doublings behind one model with all of it"
        for name, share in shares.items()
    ]
    if len(lines) < 2:
        return []
    mean = sum(behind.values()) / len(behind)
    return [*lines, f"members on average: {mean:.2f} doublings behind (docs/ensemble.md, when it pays)"]


def _columns(global_batch: int, examples: int) -> List[Tuple[str, Callable[[Phase], str]]]:
    """Return (title, function from a phase to its cell) of every column but the time."""
    return [
        ("phase", lambda phase: phase.name),
        ("from", lambda phase: phase.parent or "-"),
        ("kind", lambda phase: " ".join(kind for kind in ("branch", "member") if getattr(phase, kind)) or "-"),
        ("steps", lambda phase: f"{phase.steps:,}"),
        ("images", lambda phase: f"{phase.steps * global_batch:,}"),
        ("epochs", lambda phase: f"{phase.steps * global_batch / examples:.2f}"),
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


def notes(settings: Settings, resolved: Resolved) -> List[str]:
    """Return the notes that belong below the table."""
    lines = []
    seen = settings.model.bn_stats_batch or resolved.batch.per_rank
    if seen < _SMALL_STATISTICS:
        lines.append(
            f"note: batch norm uses statistics of {seen} images per rank; at least {_SMALL_STATISTICS} are usual"
        )
    lines += max_steps_note(settings)
    if settings.system.ranks is None:
        lines.append("note: planned for 1 rank; use --ranks=N to plan for N ranks")
    return lines


def max_steps_note(settings: Settings) -> List[str]:
    """Return the line that states that --max_steps is not considered, if it is set."""
    most = settings.run.max_steps
    return [f"note: --max_steps={most} stops the run earlier; the whole recipe is shown"] if most else []


def _draw(resolved: Resolved, examples: int) -> None:
    """Draw the learning rate to PLOT; raise FlagError without matplotlib."""
    from resnet_cpu.report import plotting, run_plots

    plotting.require()
    epochs_per_step = resolved.batch.total / examples
    steps = list(schedule.walk(resolved.phases))
    starts = {phase.name: step * epochs_per_step for step, phase, within, _ in steps if within == 0}
    run_plots.draw_plan([step * epochs_per_step for step, *_ in steps], [row[3] for row in steps], starts, PLOT)
