"""How a dataclass field becomes a flag: what `settings.py` declares its fields with."""

import dataclasses
from typing import Any, Callable, Dict, Mapping, Optional, Sequence, Tuple

from absl import flags

from resnet_cpu.recipe import phases
from resnet_cpu.recipe.phases import PhaseText


def setting(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] = (),
    low: Optional[float] = None,
    high: Optional[float] = None,
    decides: bool = False,
    also: Sequence[str] = (),
    path: bool = False,
    flag: Optional[str] = None,
    parse: Optional[Callable[[str], Any]] = None,
    shown: Optional[str] = None,
) -> Any:
    """Return a dataclass field that is a flag as well.

    Args:
        default: the value where the flag is not given; None may be replaced by what is known of the data set.
        help: one or two sentences for `--help`, with the unit.
        choices: the texts that are allowed.
        low, high: the least and the greatest number that are allowed.
        decides: whether the result of a training run depends on it; such fields make up the signature of a run.
        also: commands that take the flag besides those of its group.
        path: whether `~` and `$VAR` are expanded.
        flag: name of the flag, where it is not that of the field.
        parse: function from the text (or the list of texts) to the value; raises ValueError with the remedy.
        shown: the default as text, for a field with `parse`.
    """
    about = {
        "help": help,
        "choices": tuple(choices),
        "low": low,
        "high": high,
        "decides": decides,
        "also": tuple(also),
        "path": path,
        "flag": flag,
        "parse": parse,
        "shown": shown,
    }
    return dataclasses.field(default=default, metadata=about)


class _OrEmpty(flags.ArgumentParser):
    """Parse an empty text as None, and any other as the class beside this one does."""

    def parse(self, argument: Any) -> Any:
        return None if argument == "" else super().parse(argument)


class _IntegerOrEmpty(_OrEmpty, flags.IntegerParser):
    pass


class _FloatOrEmpty(_OrEmpty, flags.FloatParser):
    pass


def parser_of(kind: type, low: Optional[float], high: Optional[float]) -> flags.ArgumentParser:
    """Return a parser of numbers of this `kind` between `low` and `high`, to which an empty text means None."""
    return _IntegerOrEmpty(low, high) if kind is int else _FloatOrEmpty(low, high)  # type: ignore[arg-type]


def allowed(name: str, kind: Any, about: Mapping[str, Any]) -> str:
    """Return, as the remedy of a message, what values a flag takes; empty for texts without choices."""
    if kind is bool:
        return f"write --{name} or --no{name}"
    if about["choices"]:
        return f"must be one of {', '.join(about['choices'])}"
    if kind not in (int, float):
        return ""
    low, high = (None if bound is None else str(bound).removesuffix(".0") for bound in (about["low"], about["high"]))
    number = "a whole number" if kind is int else "a finite number"
    return f"must be {number}{'' if low is None else f' from {low}'}{'' if high is None else f' to {high}'}"


def _pair(text: str, kind: Callable[[str], Any]) -> Tuple[Any, Any]:
    low, high = (kind(part) for part in text.split(","))
    if not low <= high:
        raise ValueError
    return low, high


def parse_crop(text: str) -> Dict[str, Any]:
    """Return `crop` and `crop_area` of NAME or NAME:LEAST,MOST; raise ValueError for anything else."""
    name, colon, area = text.partition(":")
    remedy = "write inception or authors, with the range of areas behind a colon if wanted, as in inception:0.25,1"
    if name not in ("inception", "authors"):
        raise ValueError(remedy)
    if not colon:
        return {"crop": name, "crop_area": (0.08, 1.0)}
    try:
        low, high = _pair(area, float)
    except ValueError:
        raise ValueError(remedy) from None
    if not 0 < low <= high <= 1:
        raise ValueError(f"areas are shares of the image, above 0 and up to 1; {remedy}")
    return {"crop": name, "crop_area": (low, high)}


def parse_steps(text: str) -> Optional[Tuple[int, int]]:
    """Return the pair FIRST,LAST, None for an empty text; raise ValueError for anything else."""
    if not text:
        return None
    try:
        first, last = _pair(text, int)
        if first >= 0:
            return first, last
    except ValueError:
        pass
    raise ValueError("write the first and the last step, counted from 0, as in 10,12") from None


def parse_count_or_auto(text: str) -> Optional[int]:
    """Return the number, None for `auto`; raise ValueError for anything else."""
    if text == "auto":
        return None
    if not text.isdigit() or int(text) < 1:
        raise ValueError("must be a whole number above 0, or auto")
    return int(text)


def parse_phases(texts: Sequence[str]) -> Tuple[PhaseText, ...]:
    """Return the phases of `--phase`, see `recipe.phases.parse`."""
    return tuple(phases.parse(texts))
