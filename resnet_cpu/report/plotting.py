"""Shared parts of all plots: matplotlib, which is optional and loaded only when needed, colours, atomic files."""

import functools
import io
import sys
from typing import Any

from resnet_cpu.errors import FlagError
from resnet_cpu.run.atomic import write_atomically

TRAINING, EVALUATION, RATE = "#4c72b0", "#c44e52", "#55a868"


def pyplot() -> Any:
    """Return matplotlib's pyplot, which draws to files only."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


@functools.cache
def available() -> bool:
    """Return whether matplotlib is installed; report it once if not."""
    try:
        pyplot()
    except ImportError:
        print("plots: not drawn, because matplotlib is not installed; pip install 'resnet_cpu[plots]'", file=sys.stderr)
        return False
    return True


def require() -> None:
    """Raise FlagError if matplotlib, which draws the answer that was asked for, is not installed."""
    try:
        pyplot()
    except ImportError:
        raise FlagError(
            "--format=png: matplotlib is not installed; use --format=table, or pip install 'resnet_cpu[plots]'"
        ) from None


def save(figure: Any, path: str) -> None:
    """Write a figure as PNG, atomically, and free it."""
    content = io.BytesIO()
    figure.savefig(content, dpi=110, format="png")
    pyplot().close(figure)
    write_atomically(path, content.getbuffer())


def mark_phase(axes: Any, epoch: float, name: str) -> None:
    """Draw the epoch at which a phase starts as a dotted line with its name above."""
    axes.axvline(epoch, color="grey", linewidth=0.8, linestyle=":")
    axes.text(epoch, 1.01, name, transform=axes.get_xaxis_transform(), rotation=30, fontsize=8)
