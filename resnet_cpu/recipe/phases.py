"""The phase table: a run is a list of phases, each given as `NAME:key=value,key=value,...`.

`parse` reads the text, `resolve` turns it into steps and learning rates for a batch size and a data set. Both are plain
Python, so that a recipe can be read, checked and costed on a login node.
"""

import dataclasses
import difflib
import math
import re
from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple

from resnet_cpu.errors import FlagError
from resnet_cpu.recipe import batch as batch_rule

DECAYS = ("poly", "step", "cosine", "constant")
AUGMENTATIONS = ("full", "light", "none")
MOST_STEPS = 99_999_999  # of a run: the names of checkpoints have eight digits
LEAST_IMAGE, LARGEST_IMAGE = 8, 4096  # pixels of a side
# Larger numbers are mistakes. Powers of gamma stay finite.
_MOST, _MOST_BOUNDARIES = 10**6, 100
_HUGE = 1e38  # about the largest float32


@dataclasses.dataclass(frozen=True)
class Phase:
    """One phase with every length in steps. The defaults of the phase keys stand here and nowhere else."""

    name: str
    steps: int
    lr: float  # peak
    decay_steps: int  # horizon of the decays that have one
    image_size: int  # pixels
    decay: str = "poly"
    power: float = 1.0
    decay_from: str = "warmup_end"
    boundary_steps: Tuple[int, ...] = ()
    gamma: float = 0.1
    end_lr: float = 0.0
    warmup_steps: int = 0
    warmup_lr: float = 0.0
    wd: float = 1e-4  # coupled L2: added to the gradient as wd * w
    momentum: float = 0.9
    augment: str = "full"
    branch: bool = False
    parent: Optional[str] = None  # the phase whose end state this one starts from; None for the first
    velocity: str = "keep"
    member: bool = False


@dataclasses.dataclass(frozen=True)
class PhaseText:
    """A phase as written: its name and the values of its keys, before lengths are converted to steps."""

    name: str
    values: Mapping[str, Any]


def _number(minimum: float, below: float, above: Optional[float] = None) -> Callable[[str], float]:
    def convert(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise ValueError("must be a finite number")
        if not (minimum <= value < below) or (above is not None and value <= above):
            low = f"above {above:g}" if above is not None else f"at least {minimum:g}"
            raise ValueError(f"must be {low} and below {f'{below:,.0f}' if below <= _MOST else f'{below:g}'}")
        return value

    return convert


def _count(minimum: int, most: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,20}", text) or not minimum <= int(text) <= most:
            raise ValueError(f"must be a whole number from {minimum} to {most:,}")
        return int(text)

    return convert


def _choice(*allowed: str) -> Callable[[str], str]:
    def convert(text: str) -> str:
        if text not in allowed:
            raise ValueError(f"must be one of {', '.join(allowed)}")
        return text

    return convert


def _list_of(convert_one: Callable[[str], float]) -> Callable[[str], Tuple[float, ...]]:
    def convert(text: str) -> Tuple[float, ...]:
        values = tuple(convert_one(part) for part in text.split("/"))
        if list(values) != sorted(set(values)):
            raise ValueError("must be ascending, separated by /, as in 30/60/80")
        if len(values) > _MOST_BOUNDARIES:
            raise ValueError(f"must be at most {_MOST_BOUNDARIES} numbers")
        return values

    return convert


def _truth(text: str) -> bool:
    if text not in ("0", "1"):
        raise ValueError("must be 0 or 1")
    return text == "1"


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_UNFINISHED = ".tmp"  # suffix of folders that are being written (run/checkpoint.py); members are saved under their name
_KEYS: Dict[str, Callable[[str], Any]] = {
    "steps": _count(1, MOST_STEPS),
    "epochs": _number(0, above=0, below=_MOST),
    "lr": _number(0, below=_HUGE),
    "lr_per_256": _number(0, below=_HUGE),
    "decay": _choice(*DECAYS),
    "power": _number(0, above=0, below=_MOST),
    "decay_steps": _count(1, MOST_STEPS),
    "decay_epochs": _number(0, above=0, below=_MOST),
    "decay_from": _choice("warmup_end", "start"),
    "boundary_steps": _list_of(_count(1, MOST_STEPS)),
    "boundary_epochs": _list_of(_number(0, above=0, below=_MOST)),
    "gamma": _number(0, above=0, below=1000),
    "end_lr": _number(0, below=_HUGE),
    "warmup_steps": _count(0, MOST_STEPS),
    "warmup_epochs": _number(0, below=_MOST),
    "warmup_lr": _number(0, below=_HUGE),
    "wd": _number(0, below=_HUGE),
    "momentum": _number(0, below=1),
    "augment": _choice(*AUGMENTATIONS),
    "image_size": _count(LEAST_IMAGE, LARGEST_IMAGE),
    "branch": _truth,
    "from": str,
    "velocity": _choice("keep", "reset"),
    "member": _truth,
}
# At most one key of each pair may be given; of the first two pairs, exactly one.
_EXCLUSIVE = (
    ("steps", "epochs"),
    ("lr", "lr_per_256"),
    ("decay_steps", "decay_epochs"),
    ("boundary_steps", "boundary_epochs"),
    ("warmup_steps", "warmup_epochs"),
)
# Keys that have a meaning for these decays only; with any other they would silently have no effect.
_ONLY_FOR = {
    "power": ("poly",),
    "decay_steps": ("poly", "cosine"),
    "decay_epochs": ("poly", "cosine"),
    "decay_from": ("poly", "cosine"),
    "end_lr": ("poly", "cosine"),
    "boundary_steps": ("step",),
    "boundary_epochs": ("step",),
    "gamma": ("step",),
}


def parse(texts: Iterable[str]) -> List[PhaseText]:
    """Parse the values of `--phase`; a later phase replaces an earlier one of the same name at its position.

    Raises FlagError with the phase, the key and the remedy.
    """
    phases: Dict[str, PhaseText] = {}
    for text in texts:
        phase = _parse_one(text)
        phases[phase.name] = phase
    return list(phases.values())


def _parse_one(text: str) -> PhaseText:
    if "\n" in text or "\r" in text:
        raise FlagError(f"--phase={text!r}: a newline in the value; write the whole phase on one line")
    name, colon, rest = text.partition(":")
    if not colon or not _NAME.fullmatch(name):
        raise FlagError(
            f"--phase={text}: must be NAME:key=value,key=value,... with a NAME of letters, digits, '.', '_' and '-'"
        )
    if name.endswith(_UNFINISHED):
        raise FlagError(
            f"--phase={name}: the name ends in {_UNFINISHED}, which marks unfinished folders; choose another name"
        )
    values: Dict[str, Any] = {}
    for item in rest.split(","):
        key, equals, value = item.partition("=")
        if not equals:
            raise FlagError(f"--phase={name}: '{item}' is not key=value; separate keys by a comma, without spaces")
        if key not in _KEYS:
            close = difflib.get_close_matches(key.strip(), list(_KEYS), n=2)
            remedy = f"did you mean {' or '.join(close)}?" if close else "docs/phases.md lists the keys"
            if key != key.strip():
                remedy = "write no spaces between keys"
            raise FlagError(f"--phase={name}: unknown key '{key}'; {remedy}")
        if key in values:
            raise FlagError(f"--phase={name}: key '{key}' given twice; keep one")
        try:
            values[key] = _KEYS[key](value)
        except ValueError as error:
            reason = str(error) if str(error).startswith("must") else "must be a number"
            raise FlagError(f"--phase={name}: {key}={value}: {reason}") from None
    _check_together(name, values)
    return PhaseText(name, values)


def _check_together(name: str, values: Mapping[str, Any]) -> None:
    for i, (one, other) in enumerate(_EXCLUSIVE):
        if one in values and other in values:
            raise FlagError(f"--phase={name}: both '{one}' and '{other}' given; keep one of them")
        if i < 2 and one not in values and other not in values:
            raise FlagError(f"--phase={name}: neither '{one}' nor '{other}' given; add one of them")
    decay = values.get("decay", Phase.decay)
    for key, decays in _ONLY_FOR.items():
        if key in values and decay not in decays:
            raise FlagError(
                f"--phase={name}: '{key}' has no meaning for decay={decay}, only for {' and '.join(decays)}; remove it"
            )
    if decay == "step" and "boundary_steps" not in values and "boundary_epochs" not in values:
        raise FlagError(
            f"--phase={name}: decay=step without boundaries; add boundary_epochs=30/60/80 or boundary_steps"
        )
    if "warmup_lr" in values and "warmup_steps" not in values and "warmup_epochs" not in values:
        raise FlagError(f"--phase={name}: 'warmup_lr' without a warm-up; add warmup_steps or warmup_epochs")


def resolve(
    phases: Sequence[PhaseText], *, train_examples: int, global_batch_size: int, lr_scaling: str, image_size: int
) -> Tuple[Phase, ...]:
    """Return the phases with defaults filled in, lengths in steps and peak learning rates scaled.

    Raises FlagError where the phases do not fit together.
    """
    if not phases:
        raise FlagError("--phase is missing: a run needs at least one, as in --phase=main:epochs=90,lr_per_256=0.1")
    resolved: List[Phase] = []
    for text in phases:
        name, given = text.name, text.values
        branch = given.get("branch", False)
        if branch and not resolved:
            raise FlagError(
                f"--phase={name}: branch=1 on the first phase, but there is no earlier phase to branch from; remove it"
            )
        values: Dict[str, Any] = {
            "image_size": image_size,
            "velocity": "reset" if branch else Phase.velocity,
            **{field.name: given[field.name] for field in dataclasses.fields(Phase) if field.name in given},
            **_lengths(text, train_examples, global_batch_size),
        }
        if "lr_per_256" in given:
            values["lr"] = batch_rule.scaled_lr(given["lr_per_256"], global_batch_size, lr_scaling)
        resolved.append(Phase(name=name, parent=_parent(name, given.get("from"), resolved), **values))
        if sum(phase.steps for phase in resolved) > MOST_STEPS:
            raise FlagError(f"--phase={name}: ends after more than {MOST_STEPS:,} steps of the run; shorten it")
    return tuple(resolved)


def _lengths(text: PhaseText, train_examples: int, global_batch_size: int) -> Dict[str, Any]:
    """Return every length of a phase in steps, checked against the others."""
    name, given = text.name, text.values

    def to_steps(epochs: float) -> int:
        return batch_rule.epochs_to_steps(epochs, train_examples, global_batch_size)

    def steps_of(key: str) -> Optional[int]:
        return to_steps(given[f"{key}epochs"]) if f"{key}epochs" in given else given.get(f"{key}steps")

    steps = steps_of("") or 0
    if steps < 1:
        raise FlagError(
            f"--phase={name}: epochs={given['epochs']:g} is less than one step of {global_batch_size} images "
            f"of {train_examples}; lengthen it or give steps"
        )
    warmup_steps = steps_of("warmup_") or 0
    if warmup_steps > steps:
        raise FlagError(f"--phase={name}: a warm-up of {warmup_steps} steps in a phase of {steps}; shorten the warm-up")
    decay_steps = steps_of("decay_")
    if decay_steps == 0:
        raise FlagError(f"--phase={name}: decay_epochs={given['decay_epochs']:g} is less than one step; lengthen it")
    if decay_steps is None:
        after_warmup = given.get("decay_from", Phase.decay_from) == "warmup_end"
        decay_steps = steps - (warmup_steps if after_warmup else 0)
    boundaries = given.get("boundary_steps", ())
    if "boundary_epochs" in given:
        boundaries = tuple(to_steps(epochs) for epochs in given["boundary_epochs"])
    _check_boundaries(text, boundaries, steps, warmup_steps)
    return {
        "steps": steps,
        "warmup_steps": warmup_steps,
        "decay_steps": decay_steps,
        "boundary_steps": boundaries,
    }


def _check_boundaries(text: PhaseText, boundaries: Sequence[int], steps: int, warmup_steps: int) -> None:
    """Raise FlagError for a boundary of step decay that no step of the phase would notice, or that has no step alone.

    The LR drops at the step of the boundary, so it must lie in 1 ... steps - 1.
    """
    key = "boundary_epochs" if "boundary_epochs" in text.values else "boundary_steps"
    shown = "/".join(f"{value:g}" for value in text.values.get(key, ()))
    for boundary in boundaries:
        if boundary < 1:
            raise FlagError(
                f"--phase={text.name}: {key}={shown}: a boundary at step 0 lowers the learning rate from the start; "
                "remove it or lower lr"
            )
        if boundary >= steps:
            raise FlagError(
                f"--phase={text.name}: {key}={shown}: a boundary at step {boundary} has no effect in a phase of "
                f"{steps} steps; remove it or lengthen the phase"
            )
    if boundaries and warmup_steps >= steps:
        raise FlagError(
            f"--phase={text.name}: {key}={shown}: boundaries have no effect in a phase that consists of its warm-up; "
            "shorten the warm-up"
        )
    if len(set(boundaries)) < len(boundaries):
        raise FlagError(
            f"--phase={text.name}: {key}={shown}: two boundaries fall on the same step; remove one or lower gamma"
        )


def _parent(name: str, wanted: Optional[str], earlier: Sequence[Phase]) -> Optional[str]:
    if wanted is None:
        return next((phase.name for phase in reversed(earlier) if not phase.branch), None)
    if wanted not in [phase.name for phase in earlier]:
        known = ", ".join(phase.name for phase in earlier) or "none, since this is the first phase"
        raise FlagError(f"--phase={name}: from={wanted} is not an earlier phase; earlier phases: {known}")
    return wanted
