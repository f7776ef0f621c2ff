"""The speed of a past run, as `plan` and `simulate` take it from --speed=RUN: only of a run of the same network."""

import math
import os
from typing import Any, Dict, List, Optional

from resnet_cpu.errors import CheckpointError, FlagError
from resnet_cpu.run import files, signature
from resnet_cpu.run.folder import read_json, read_record
from resnet_cpu.settings import Model

# Settings of the network that hardly change the duration of a step.
_SAME_SPEED = ("num_classes", "padding", "conv1_bias", "zero_gamma", "bn_momentum", "bn_epsilon")


def rate_of(speed: str) -> Optional[float]:
    """Return the images/s that --speed gives as a number; None if it names a run folder.

    Raises FlagError for a number that is not a speed.
    """
    try:
        rate = float(speed)
    except ValueError:
        if os.sep not in speed and not os.path.exists(speed):
            raise FlagError(f"--speed={speed}: neither a number, as in 6303.5, nor an existing run folder") from None
        return None
    if not 1e-3 <= rate <= 1e12:
        raise FlagError(f"--speed={speed}: must be above 0 (0.001 to 1e12); give images/s, or a run's folder")
    return rate


def result(run_dir: str, model: Model, pixels: List[int]) -> Dict[str, Any]:
    """Return result.json of a run that trained `model` on images of the sizes `pixels`.

    Raises CheckpointError if the run folder does not say how fast it was, or if it trained another network.
    """
    found = read_json(os.path.join(run_dir, files.RESULT))
    if not found or not (positive(found.get("images_per_second")) and positive(found.get("ranks"))):
        raise CheckpointError(
            f"--speed={run_dir}: no result.json with a speed in it; name the folder of a finished run"
        )
    try:
        # Data and recipe may differ: a step takes as long whatever the images show.
        recorded = signature.normalised({"data": {}, "recipe": {}, "phases": {}, **_record(run_dir)["signature"]})
        seen = sorted({phase["image_size"] for phase in recorded["phases"].values()})
        other = signature.differences(
            {"model": _of_speed(recorded["model"]), "pixels": seen or pixels},
            {"model": _of_speed(signature.deciding(model)), "pixels": pixels},
        )
    except (KeyError, TypeError, AttributeError):
        raise CheckpointError(
            f"--speed={run_dir}: run.json does not describe the network; name the folder of a run"
        ) from None
    if other:
        raise CheckpointError(
            f"--speed={run_dir}: this run trained another network ({'; '.join(other[:4])}); name a run of the same "
            "network, or give images/s"
        )
    return found


def ranks_per_node(run_dir: str) -> Optional[int]:
    """Return the number of ranks of a run on one node; None if the run folder does not say.

    Raises CheckpointError for a run on several hosts.
    """
    try:
        hosts = [row.get("host") for row in _record(run_dir).get("per_rank", [])]
    except (TypeError, AttributeError):
        raise CheckpointError(
            f"--speed={run_dir}: run.json does not list the ranks; name the folder of a run"
        ) from None
    if len(set(hosts)) > 1:
        raise CheckpointError(
            f"--speed={run_dir}: this run used {len(set(hosts))} hosts, so its step times include communication; name "
            "a run on one host"
        )
    return len(hosts) or None


def positive(value: Any) -> bool:
    """Return whether a value from a JSON file is a number above 0 that is not infinite."""
    return isinstance(value, (int, float)) and 0 < value < math.inf


def _record(run_dir: str) -> Dict[str, Any]:
    return read_record(run_dir) or {}


def _of_speed(model: Dict[str, Any]) -> Dict[str, Any]:
    return {key: value for key, value in model.items() if key not in _SAME_SPEED}
