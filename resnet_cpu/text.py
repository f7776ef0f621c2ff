"""Text that people read at a glance: durations, counts, aligned columns."""

from typing import Callable, List, Sequence, Union

HUGE = 1e6  # a number that is written in powers of ten


def duration(seconds: float) -> str:
    """Return a time as 42s, 4m10s or 2h05m."""
    seconds = int(round(seconds))
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


def count(number: Union[int, str], noun: str) -> str:
    """Return a number with its noun, as in `1 rank` or `2 ranks`."""
    return f"{number} {noun}" + ("" if str(number) == "1" else "s")


def shown_loss(value: float) -> str:
    """Return a loss with four decimals, or in powers of ten if it is HUGE, as in a training that fails."""
    return f"{value:.4f}" if abs(value) < HUGE else f"{value:.4g}"


def aligned(rows: Sequence[Sequence[str]], to: Callable[[str, int], str] = str.rjust) -> List[str]:
    """Return rows of cells as lines whose columns are aligned by `to` (`str.rjust` or `str.ljust`)."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(map(to, row, widths)).rstrip() for row in rows]
