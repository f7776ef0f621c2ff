"""The learning rate as a pure function of the step: fed to the optimizer, logged and plotted, never stored."""

import math
from typing import Iterator, Sequence, Tuple

from resnet_cpu.recipe.phases import Phase


def learning_rate(phase: Phase, step: int) -> float:
    """Return the LR that is applied in step `step` (from 0) of `phase`.

    Warm-up and poly are Caffe's, as in the authors' solver: lr(i) = (i*lr + (W-i)*warmup_lr)/W for i < W, then
    end_lr + (lr - end_lr) * (1 - progress)^power, progress counted from the end of the warm-up or from the start.
    """
    warmup = phase.warmup_steps
    if step < warmup:
        return (step * phase.lr + (warmup - step) * phase.warmup_lr) / warmup
    if phase.decay == "constant":
        return phase.lr
    if phase.decay == "step":
        return phase.lr * phase.gamma ** sum(step >= boundary for boundary in phase.boundary_steps)
    since = step - (warmup if phase.decay_from == "warmup_end" else 0)
    progress = min(since / phase.decay_steps, 1.0)
    if phase.decay == "poly":
        left = (1.0 - progress) ** phase.power
    else:
        left = 0.5 * (1.0 + math.cos(math.pi * progress))
    return phase.end_lr + (phase.lr - phase.end_lr) * left


def total_steps(phases: Sequence[Phase]) -> int:
    """Return the steps that are executed in all, branches included."""
    return sum(phase.steps for phase in phases)


def walk(phases: Sequence[Phase]) -> Iterator[Tuple[int, Phase, int, float]]:
    """Yield (step, phase, step in the phase, LR) of every executed step."""
    step = 0
    for phase in phases:
        for within in range(phase.steps):
            yield step, phase, within, learning_rate(phase, within)
            step += 1
