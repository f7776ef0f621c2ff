"""The learning rate as a pure function of the step: fed to the optimizer, logged and plotted, never stored."""

import math
from typing import Callable, Dict, Iterator, NamedTuple, Optional, Sequence, Set, Tuple

from resnet_cpu.recipe.phases import Phase


class Rates(NamedTuple):
    """The numbers that the recipe sets in each step."""

    lr: float
    momentum: float
    wd: float  # coupled L2: added to the gradient as wd * w


class Span(NamedTuple):
    """Consecutive steps of one phase that a run executes."""

    phase: Phase
    phase_first: int  # executed steps before the phase
    steps: range


def budgets(phases: Sequence[Phase]) -> Dict[str, float]:
    """Return for each member the share of all steps of the recipe that its weights were trained in.

    Other branches, and what follows its own phase, have no part in a member. One model trained in all steps has 1.
    """
    behind: Dict[Optional[str], int] = {None: 0}  # steps from the start to the end of a phase, in its own line
    for phase in phases:
        behind[phase.name] = behind[phase.parent] + phase.steps
    return {phase.name: behind[phase.name] / total_steps(phases) for phase in phases if phase.member}


def learning_rate(phase: Phase, step: int) -> float:
    """Return the LR that is applied in step `step` (from 0) of `phase`.

    Warm-up and poly are Caffe's, as in the authors' solver: lr(i) = (i*lr + (W-i)*warmup_lr)/W for i < W, then
    end_lr + (lr - end_lr) * (1 - progress)^power, progress counted from the end of the warm-up or from the start.
    """
    warmup = phase.warmup_steps
    if step < warmup:
        return (step * phase.lr + (warmup - step) * phase.warmup_lr) / warmup
    return _DECAYS[phase.decay](phase, step)


def _constant(phase: Phase, step: int) -> float:
    return phase.lr


def _step_decay(phase: Phase, step: int) -> float:
    return phase.lr * phase.gamma ** sum(step >= boundary for boundary in phase.boundary_steps)


def _poly(phase: Phase, step: int) -> float:
    left = (1.0 - _progress(phase, step)) ** phase.power
    return phase.end_lr + (phase.lr - phase.end_lr) * left


def _cosine(phase: Phase, step: int) -> float:
    left = 0.5 * (1.0 + math.cos(math.pi * _progress(phase, step)))
    return phase.end_lr + (phase.lr - phase.end_lr) * left


def _progress(phase: Phase, step: int) -> float:
    """Return the share of the decay horizon that lies behind `step`, at most 1."""
    since = step - (phase.warmup_steps if phase.decay_from == "warmup_end" else 0)
    return min(since / phase.decay_steps, 1.0)


# One entry for each of phases.DECAYS; a decay without one is a KeyError, not another curve.
_DECAYS: Dict[str, Callable[[Phase, int], float]] = {
    "poly": _poly,
    "step": _step_decay,
    "cosine": _cosine,
    "constant": _constant,
}


def momentum(phases: Sequence[Phase], phase: Phase, step: int, corrected: bool) -> float:
    """Return the momentum that is applied in step `step` (from 0) of `phase`.

    The LR is part of the velocity, so after a change of the LR the velocity still carries the old one. With
    `corrected` it is scaled to the new one: momentum * LR / LR of the step before (Goyal et al., arXiv 1706.02677,
    section 3).
    """
    before = _rate_before(phases, phase, step) if corrected else 0.0
    return phase.momentum * learning_rate(phase, step) / before if before else phase.momentum


def _rate_before(phases: Sequence[Phase], phase: Phase, step: int) -> float:
    """Return the LR that the velocity was last updated with; 0 if the velocity is zero."""
    if step > 0:
        return learning_rate(phase, step - 1)
    if phase.parent is None or phase.velocity == "reset":
        return 0.0
    parent = next(other for other in phases if other.name == phase.parent)
    return learning_rate(parent, parent.steps - 1)


def rates(phases: Sequence[Phase], phase: Phase, step: int, corrected: bool) -> Rates:
    """Return the rates of step `step` (from 0) of `phase`; `corrected` as in `momentum`."""
    return Rates(learning_rate(phase, step), momentum(phases, phase, step, corrected), phase.wd)


def spans(phases: Sequence[Phase], first: int, last: int) -> Iterator[Span]:
    """Yield the spans that make up the steps first ... last - 1 of a run, one per phase, in order."""
    for phase, end in zip(phases, end_steps(phases).values()):
        steps = range(max(first, end - phase.steps), min(last, end))
        if steps:
            yield Span(phase, end - phase.steps, steps)


def end_steps(phases: Sequence[Phase]) -> Dict[str, int]:
    """Return, for each phase, the number of executed steps over all phases after which it ends."""
    ends, step = {}, 0
    for phase in phases:
        step += phase.steps
        ends[phase.name] = step
    return ends


def results(phases: Sequence[Phase]) -> Set[str]:
    """Return the names of the phases whose end is a result: a member, or a start for no other phase."""
    parents = {phase.parent for phase in phases}
    return {phase.name for phase in phases if phase.member or phase.name not in parents}


def still_needed(phases: Sequence[Phase], step: int) -> Set[int]:
    """Return the steps of the end states from which a phase still has to start, for a run that is at `step`."""
    ends = end_steps(phases)
    return {ends[phase.parent] for phase in phases if phase.parent and ends[phase.name] - phase.steps >= step}


def total_steps(phases: Sequence[Phase]) -> int:
    """Return the number of executed steps of all phases, branches included."""
    return sum(phase.steps for phase in phases)


def walk(phases: Sequence[Phase]) -> Iterator[Tuple[int, Phase, int, float]]:
    """Yield (step, phase, step in the phase, LR) of every executed step."""
    step = 0
    for phase in phases:
        for within in range(phase.steps):
            yield step, phase, within, learning_rate(phase, within)
            step += 1
