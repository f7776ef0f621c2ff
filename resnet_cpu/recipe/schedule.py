"""The learning rate as a pure function of the step: fed to the optimizer, logged and plotted, never stored."""

import math
from typing import Dict, Iterator, Sequence, Set, Tuple

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


def momentum(phases: Sequence[Phase], phase: Phase, step: int, corrected: bool) -> float:
    """Return the momentum that is applied in step `step` (from 0) of `phase`.

    The LR lies inside the velocity, so after a change of the LR what is on its way has the old one. Corrected, it is
    scaled to the new one: momentum * LR / LR of the step before (Goyal et al., arXiv 1706.02677, section 3).
    """
    before = _rate_before(phases, phase, step) if corrected else 0.0
    return phase.momentum * learning_rate(phase, step) / before if before else phase.momentum


def _rate_before(phases: Sequence[Phase], phase: Phase, step: int) -> float:
    """Return the LR of the step that left the velocity; 0 where there is none."""
    if step > 0:
        return learning_rate(phase, step - 1)
    if phase.parent is None or phase.velocity == "reset":
        return 0.0
    parent = next(other for other in phases if other.name == phase.parent)
    return learning_rate(parent, parent.steps - 1)


def end_steps(phases: Sequence[Phase]) -> Dict[str, int]:
    """Return the executed steps, over all phases, after which each phase ends."""
    ends, step = {}, 0
    for phase in phases:
        step += phase.steps
        ends[phase.name] = step
    return ends


def still_needed(phases: Sequence[Phase], step: int) -> Set[int]:
    """Return the steps of the end states from which a phase starts at `step` or later."""
    ends = end_steps(phases)
    return {ends[phase.parent] for phase in phases if phase.parent and ends[phase.name] - phase.steps >= step}


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
