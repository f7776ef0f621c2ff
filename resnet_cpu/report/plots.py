"""Plots as PNG: of a run folder's rows, and of a planned recipe. matplotlib is optional and loaded when needed."""

import functools
import os
import sys
from typing import Any, Dict, List, Sequence

_TRAIN, _EVAL, _LR = "#4c72b0", "#c44e52", "#55a868"


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


@functools.cache
def available() -> bool:
    """Return whether matplotlib is there; say once if not."""
    try:
        _pyplot()
    except ImportError:
        print("plots: matplotlib is not installed, none are drawn; pip install 'resnet_cpu[plots]'", file=sys.stderr)
        return False
    return True


def draw_curves(
    metrics: Sequence[Dict[str, Any]], evaluations: Sequence[Dict[str, Any]], path: str, title: str
) -> None:
    """Draw loss, top-1 and LR over epochs from rows of metrics.jsonl and eval.jsonl."""
    plt = _pyplot()
    figure, (loss, accuracy, rate) = plt.subplots(3, 1, figsize=(8, 9), sharex=True, constrained_layout=True)
    figure.suptitle(title)
    epochs = [row["epoch"] for row in metrics]
    evaluated = [row["epoch"] for row in evaluations]
    loss.plot(epochs, [row["loss"] for row in metrics], color=_TRAIN, linewidth=1, label="training batch")
    loss.plot(evaluated, [row["loss"] for row in evaluations], "o-", color=_EVAL, label="evaluation")
    loss.set_ylabel("cross-entropy")
    loss.legend()
    accuracy.plot(evaluated, [100 * row["top1"] for row in evaluations], "o-", color=_EVAL)
    if evaluations:
        accuracy.set_title(f"last {100 * evaluations[-1]['top1']:.2f} %", loc="right", fontsize=10)
    accuracy.set_ylabel("top-1, %")
    rate.plot(epochs, [row["lr"] for row in metrics], color=_LR)
    rate.set_ylabel("learning rate")
    rate.set_xlabel("epoch")
    for axes in (loss, accuracy, rate):
        axes.grid(alpha=0.3)
    _save(plt, figure, path)


def draw_plan(epochs: Sequence[float], rates: Sequence[float], borders: Dict[str, float], path: str) -> None:
    """Draw the planned LR over epochs; `borders` names the epoch at which each phase starts."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(9, 4), constrained_layout=True)
    axes.plot(epochs, rates, color=_LR)
    names: List[str] = list(borders)
    for name in names:
        axes.axvline(borders[name], color="grey", linewidth=0.8, linestyle=":")
        axes.text(borders[name], 1.01, name, transform=axes.get_xaxis_transform(), rotation=30, fontsize=8)
    axes.set_xlabel("epoch")
    axes.set_ylabel("learning rate")
    axes.grid(alpha=0.3)
    _save(plt, figure, path)


def _save(plt: Any, figure: Any, path: str) -> None:
    temporary = f"{path}.tmp.png"
    figure.savefig(temporary, dpi=110)
    plt.close(figure)
    os.replace(temporary, path)
