"""The phase table: a run is a list of phases, each given as `NAME:key=value,key=value,...`.

`parse` reads the text, `plan` turns it into steps and learning rates for a batch size and a data set. Both are plain
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


@dataclasses.dataclass(frozen=True)
class Phase:
    """One phase with every default filled in and every length in steps."""

    name: str
    steps: int
    lr: float  # peak
    decay: str
    power: float
    decay_steps: int
    decay_from: str
    boundary_steps: Tuple[int, ...]
    gamma: float
    end_lr: float
    warmup_steps: int
    warmup_lr: float
    wd: float  # coupled L2: added to the gradient as wd * w
    momentum: float
    augment: str
    image_size: int  # pixels
    branch: bool
    parent: Optional[str]  # the phase whose end state this one starts from; None for the first
    velocity: str
    member: bool


@dataclasses.dataclass(frozen=True)
class PhaseText:
    """A phase as it was written: its name and its keys, checked one by one but not yet against each other."""

    name: str
    values: Mapping[str, Any]


def _number(minimum: float, below: float = math.inf, above: Optional[float] = None) -> Callable[[str], float]:
    def convert(text: str) -> float:
        value = float(text)
        if not (minimum <= value < below) or (above is not None and value <= above):
            low = f"above {above:g}" if above is not None else f"at least {minimum:g}"
            raise ValueError(f"must be {low}" + ("" if below == math.inf else f" and below {below:g}"))
        return value

    return convert


def _count(minimum: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        if not re.fullmatch(r"[0-9]+", text) or int(text) < minimum:
            raise ValueError(f"must be a whole number, at least {minimum}")
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
            raise ValueError("must be rising, separated by /, as in 30/60/80")
        return values

    return convert


def _truth(text: str) -> bool:
    if text not in ("0", "1"):
        raise ValueError("must be 0 or 1")
    return text == "1"


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_KEYS: Dict[str, Callable[[str], Any]] = {
    "steps": _count(1),
    "epochs": _number(0, above=0),
    "lr": _number(0),
    "lr_per_256": _number(0),
    "decay": _choice(*DECAYS),
    "power": _number(0, above=0),
    "decay_steps": _count(1),
    "decay_epochs": _number(0, above=0),
    "decay_from": _choice("warmup_end", "start"),
    "boundary_steps": _list_of(_count(1)),
    "boundary_epochs": _list_of(_number(0, above=0)),
    "gamma": _number(0, above=0),
    "end_lr": _number(0),
    "warmup_steps": _count(0),
    "warmup_epochs": _number(0),
    "warmup_lr": _number(0),
    "wd": _number(0),
    "momentum": _number(0, below=1),
    "augment": _choice(*AUGMENTATIONS),
    "image_size": _count(1),
    "branch": _truth,
    "from": str,
    "velocity": _choice("keep", "reset"),
    "member": _truth,
}
# Of each pair one may be given; of the first two, one must be.
_EXCLUSIVE = (
    ("steps", "epochs"),
    ("lr", "lr_per_256"),
    ("decay_steps", "decay_epochs"),
    ("boundary_steps", "boundary_epochs"),
    ("warmup_steps", "warmup_epochs"),
)
# Keys that mean something for these decays only: elsewhere they would silently do nothing.
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
    """Read `--phase` values; a later one of the same name replaces the earlier one at its place."""
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
    values: Dict[str, Any] = {}
    for item in rest.split(","):
        key, equals, value = item.partition("=")
        if not equals:
            raise FlagError(f"--phase={name}: '{item}' is no key=value; separate keys by a comma, without spaces")
        if key not in _KEYS:
            close = difflib.get_close_matches(key.strip(), list(_KEYS), n=2)
            remedy = f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(_KEYS)}"
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
    decay = values.get("decay", "poly")
    for key, decays in _ONLY_FOR.items():
        if key in values and decay not in decays:
            raise FlagError(f"--phase={name}: '{key}' has no meaning for decay={decay}; leave it out")
    if decay == "step" and "boundary_steps" not in values and "boundary_epochs" not in values:
        raise FlagError(
            f"--phase={name}: decay=step without boundaries; add boundary_epochs=30/60/80 or boundary_steps"
        )
    if "warmup_lr" in values and "warmup_steps" not in values and "warmup_epochs" not in values:
        raise FlagError(f"--phase={name}: 'warmup_lr' without a warm-up; add warmup_steps or warmup_epochs")


def plan(
    phases: Sequence[PhaseText], *, train_examples: int, global_batch_size: int, lr_scaling: str, image_size: int
) -> Tuple[Phase, ...]:
    """Fill in every default and turn epochs into steps; raise FlagError where the phases do not fit together."""
    if not phases:
        raise FlagError("no --phase given: a run needs at least one, as in --phase=main:epochs=90,lr_per_256=0.1")
    planned: List[Phase] = []
    for text in phases:
        planned.append(_plan_one(text, planned, train_examples, global_batch_size, lr_scaling, image_size))
    return tuple(planned)


def _plan_one(
    text: PhaseText,
    earlier: Sequence[Phase],
    train_examples: int,
    global_batch_size: int,
    lr_scaling: str,
    image_size: int,
) -> Phase:
    name, given = text.name, dict(text.values)

    def steps_of(key: str) -> Optional[int]:
        if f"{key}epochs" in given:
            return batch_rule.epochs_to_steps(given[f"{key}epochs"], train_examples, global_batch_size)
        return given.get(f"{key}steps")

    steps = steps_of("") or 0
    if steps < 1:
        raise FlagError(
            f"--phase={name}: epochs={given['epochs']:g} is less than one step of {global_batch_size} images "
            f"of {train_examples}; lengthen it or give steps"
        )
    warmup_steps = steps_of("warmup_") or 0
    if warmup_steps > steps:
        raise FlagError(f"--phase={name}: a warm-up of {warmup_steps} steps in a phase of {steps}; shorten the warm-up")
    decay_from = given.get("decay_from", "warmup_end")
    left = steps - (warmup_steps if decay_from == "warmup_end" else 0)
    decay_steps = steps_of("decay_")
    if decay_steps == 0:
        raise FlagError(f"--phase={name}: decay_epochs={given['decay_epochs']:g} is less than one step; lengthen it")
    boundaries = given.get("boundary_steps", ())
    if "boundary_epochs" in given:
        boundaries = tuple(
            batch_rule.epochs_to_steps(epochs, train_examples, global_batch_size) for epochs in given["boundary_epochs"]
        )
    if "lr_per_256" in given:
        lr = batch_rule.scaled_lr(given["lr_per_256"], global_batch_size, lr_scaling)
    else:
        lr = given["lr"]
    branch = bool(given.get("branch", False))
    if branch and not earlier:
        raise FlagError(
            f"--phase={name}: branch=1 on the first phase; there is nothing to branch from yet, leave it out"
        )
    return Phase(
        name=name,
        steps=steps,
        lr=lr,
        decay=given.get("decay", "poly"),
        power=given.get("power", 1.0),
        decay_steps=left if decay_steps is None else decay_steps,
        decay_from=decay_from,
        boundary_steps=boundaries,
        gamma=given.get("gamma", 0.1),
        end_lr=given.get("end_lr", 0.0),
        warmup_steps=warmup_steps,
        warmup_lr=given.get("warmup_lr", 0.0),
        wd=given.get("wd", 1e-4),
        momentum=given.get("momentum", 0.9),
        augment=given.get("augment", "full"),
        image_size=given.get("image_size", image_size),
        branch=branch,
        parent=_parent(name, given.get("from"), earlier),
        velocity=given.get("velocity", "reset" if branch else "keep"),
        member=bool(given.get("member", False)),
    )


def _parent(name: str, wanted: Optional[str], earlier: Sequence[Phase]) -> Optional[str]:
    if wanted is None:
        return next((phase.name for phase in reversed(earlier) if not phase.branch), None)
    if wanted not in [phase.name for phase in earlier]:
        known = ", ".join(phase.name for phase in earlier) or "none: this is the first phase"
        raise FlagError(f"--phase={name}: from={wanted} is no earlier phase; earlier are: {known}")
    return wanted
