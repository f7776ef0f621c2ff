"""What a past run says of speed: of the same network only, whatever else it was."""

import dataclasses
import os
from typing import Any, Dict, List, Mapping, Optional

from resnet_cpu.errors import CheckpointError
from resnet_cpu.run import checkpoint
from resnet_cpu.run.folder import read_json
from resnet_cpu.settings import Model

# What of a network a step costs as much with as without, or nearly so.
_NOT_OF_SPEED = ("num_classes", "padding", "conv1_bias", "zero_gamma", "bn_momentum", "bn_epsilon")


def result(run_dir: str, model: Model, pixels: List[int]) -> Dict[str, Any]:
    """Return result.json of a run of `model` on images of these sizes; raise CheckpointError for others."""
    found = read_json(os.path.join(run_dir, "result.json"))
    if not found or not found.get("images_per_second"):
        raise CheckpointError(f"--past_run={run_dir}: no result.json with a speed in it; name a run that has ended")
    signature = _record(run_dir).get("signature", {})
    there, here = signature.get("model", {}), dataclasses.asdict(model)
    seen = sorted({phase["image_size"] for phase in signature.get("phases", {}).values()})
    other = checkpoint.differences(
        {**_of_speed(there), "pixels": seen or pixels}, {**_of_speed(here), "pixels": pixels}
    )
    if other:
        raise CheckpointError(
            f"--past_run={run_dir}: its speed is of another network: {'; '.join(other[:4])}; name a run of this one, "
            "or give --images_per_second"
        )
    return found


def ranks_per_node(run_dir: str) -> Optional[int]:
    """Return how many ranks the run had, which has to be of one host; None where it does not say."""
    hosts = [row.get("host") for row in _record(run_dir).get("per_rank", [])]
    if len(set(hosts)) > 1:
        raise CheckpointError(
            f"--past_run={run_dir}: ran on {len(set(hosts))} hosts, so its steps hold their messages; name one on one "
            "node"
        )
    return len(hosts) or None


def _record(run_dir: str) -> Mapping[str, Any]:
    return read_json(os.path.join(run_dir, "run.json")) or {}


def _of_speed(model: Mapping[str, Any]) -> Dict[str, Any]:
    return {key: value for key, value in model.items() if key not in _NOT_OF_SPEED}
