"""The signature of a run: everything that decides its result. A run is continued only under its own signature.

A setting at its default is left out, so that a new setting never orphans an older run. Signatures that version 0.1
wrote are understood: `normalised` brings them into this form.
"""

import dataclasses
import json
from typing import Any, Dict, List, Mapping, Optional, Tuple

from resnet_cpu.errors import CheckpointError
from resnet_cpu.recipe.phases import Phase
from resnet_cpu.resolve import Resolved
from resnet_cpu.settings import Data, Model, Recipe, Settings

_SHOWN = 6  # differences that a message lists
_OF_DATA = ("classes", "content")  # digests of the data set
Pixels = Optional[Tuple[Tuple[float, ...], Tuple[float, ...]]]  # mean and deviation of the training pixels, RGB


def of(
    settings: Settings,
    resolved: Resolved,
    train_examples: int,
    pixels: Pixels,
    classes: Optional[str] = None,
    content: Optional[str] = None,
) -> Dict[str, Any]:
    """Return the signature of a run, as JSON holds it.

    Args:
        resolved: the recipe in steps.
        train_examples: training examples that are used.
        pixels: measured mean and deviation of the data set's pixels, if they are used to normalise images.
        classes: SHA-256 of the data set's list of classes, None if it has none.
        content: digest of the training shards, `Split.content`, None for synthetic data.
    """
    of_data = {"classes": classes, "content": content}
    found = {
        "model": deciding(settings.model),
        "data": {
            **deciding(settings.data),
            "train_examples": train_examples,
            "pixels": None if pixels is None else {"mean": pixels[0], "std": pixels[1]},
            **{key: value for key, value in of_data.items() if value is not None},
        },
        "recipe": deciding(settings.recipe),
        "global_batch_size": resolved.batch.total,
        "phases": {phase.name: dataclasses.asdict(phase) for phase in resolved.phases},
        "order_of_phases": [phase.name for phase in resolved.phases],
        "init_from": None,  # SHA-256 of the weights that the run starts from, which is known later
    }
    return normalised(found)


def deciding(group: Any) -> Dict[str, Any]:
    """Return the settings of a group that decide the result, without those at their default."""
    fields = [field for field in dataclasses.fields(group) if field.metadata.get("decides")]
    return _without_defaults({field.name: getattr(group, field.name) for field in fields}, type(group))


def normalised(signature: Mapping[str, Any]) -> Dict[str, Any]:
    """Return a signature, also one of version 0.1, with every setting at its default left out."""
    found = json.loads(json.dumps(signature))
    if "recipe" not in found:
        found = _from_version_0_1(found)
    for group, kind in (("model", Model), ("data", Data), ("recipe", Recipe)):
        found[group] = _without_defaults(found[group], kind)
    found["phases"] = {name: _without_defaults(phase, Phase) for name, phase in found["phases"].items()}
    return found


def _without_defaults(values: Mapping[str, Any], kind: type) -> Dict[str, Any]:
    defaults = {field.name: _as_json(field.default) for field in dataclasses.fields(kind)}
    return {name: value for name, value in values.items() if name not in defaults or _as_json(value) != defaults[name]}


def _as_json(value: Any) -> Any:
    return value if value is dataclasses.MISSING else json.loads(json.dumps(value, default=str))


def _from_version_0_1(found: Dict[str, Any]) -> Dict[str, Any]:
    """Return a signature of version 0.1 in today's form; what can no longer be chosen stays, and so differs."""
    data = dict(found["data"])
    name, low, high, *aspect = data.pop("crop", ["inception", 0.08, 1.0])
    data.update(crop=name, crop_area=[low, high])
    # The authors' crop draws on a grid of 0.001, where 1.333 and 1.3333 give the same points.
    same_grid = name == "authors" and aspect[:1] == [0.75] and round((aspect[1] - 0.75) / 0.001) == 583
    if aspect not in ([], [0.75, 1.3333]) and not same_grid:
        data["crop_aspect"] = aspect
    if data.get("order_block") == 1:
        del data["order_block"]
    optimizer, eta = found.get("optimizer", ["sgd", 0.001])
    recipe = {"optimizer": optimizer, **({} if eta == 0.001 else {"lars_eta": eta})}
    for key in ("momentum_correction", "label_smoothing", "wd_on_bn", "seed"):
        recipe[key] = found.get(key, next(field.default for field in dataclasses.fields(Recipe) if field.name == key))
    kept = ("model", "global_batch_size", "order_of_phases")
    return {
        **{key: found[key] for key in kept},
        "phases": {name: _effective(phase) for name, phase in found["phases"].items()},
        "data": data,
        "recipe": recipe,
        "init_from": found.get("init_from"),
    }


def _effective(phase: Dict[str, Any]) -> Dict[str, Any]:
    """Return a phase of version 0.1 without boundaries that had no effect, which are refused today."""
    boundaries = [step for step in phase.get("boundary_steps", []) if step < phase["steps"]]
    if phase.get("decay") == "step" and not boundaries:
        return {**phase, "boundary_steps": [], "decay": "constant", "gamma": Phase.gamma}
    return {**phase, "boundary_steps": boundaries}


def differences(recorded: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> List[str]:
    """Return `name: A recorded, B now` for every leaf in which two nested dictionaries differ.

    A setting that is left out is shown with its default; names of settings begin with their group, as in model.width.
    """
    found = []
    for key in sorted({*recorded, *now}):
        name = f"{prefix}{key}"
        one, other = recorded.get(key), now.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            found += differences(one, other, f"{name}.")
        elif isinstance(one, Mapping) or isinstance(other, Mapping):
            found.append(f"{name}: only {'recorded' if other is None else 'now'}")
        elif one != other:
            one, other = (row[key] if key in row else _default_of(prefix, key) for row in (recorded, now))
            found.append(f"{name}: {one} recorded, {other} now")
    return found


def _default_of(prefix: str, name: str) -> Any:
    """Return the default of a setting of the group or phase that `prefix` names, None if it has none."""
    kind = Phase if prefix.startswith("phases.") else {"model.": Model, "data.": Data, "recipe.": Recipe}.get(prefix)
    return next((field.default for field in dataclasses.fields(kind) if field.name == name), None) if kind else None


def _comparable(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> Tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return two signatures, without the digests of the data that only one has: older runs recorded none."""
    one, other = recorded.get("data"), now.get("data")
    if not isinstance(one, Mapping) or not isinstance(other, Mapping):
        return recorded, now
    alone = {key for key in _OF_DATA if (key in one) != (key in other)}
    one, other = ({key: value for key, value in data.items() if key not in alone} for data in (one, other))
    return {**recorded, "data": one}, {**now, "data": other}


def check(path: str, recorded: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise CheckpointError that lists the differences if the run or checkpoint at `path` has another signature."""
    # The phases follow from other flags, which are therefore listed first.
    found = sorted(differences(*_comparable(recorded, now)), key=lambda text: text.startswith("phases."))
    if not found:
        return
    if all(text.startswith(("data.content:", "data.pixels")) for text in found):
        raise CheckpointError(
            f"{path} belongs to another data set: --data_dir holds other training images, or the same ones in another "
            f"order ({'; '.join(found)}); choose another --run_dir, or the data set that this run began with"
        )
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    data = " and data set" if any(text.startswith("data.content:") for text in found) else ""
    raise CheckpointError(
        f"{path} belongs to another run: {'; '.join(found[:_SHOWN])}{more}; choose another --run_dir or use the "
        f"same flags{data}"
    )
