"""All that training changes, and how it gets into variables: the network, its weights, the velocity, the step."""

import dataclasses
from typing import Dict, List, Tuple

import tensorflow as tf

from resnet_cpu.errors import CheckpointError
from resnet_cpu.model import resnet
from resnet_cpu.run import checkpoint
from resnet_cpu.settings import Settings


def build_model(settings: Settings) -> tf.keras.Model:
    """Return the network of the settings, initialised from their seed."""
    options = dataclasses.asdict(settings.model)
    return resnet.resnet(options.pop("model"), options.pop("num_classes"), seed=settings.recipe.seed, **options)


class State:
    """All that training changes: weights, statistics, velocity and the step, with names to save them under."""

    def __init__(self, model: tf.keras.Model, optimizer: tf.keras.optimizers.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer
        self.step = 0
        self.velocity = dict(zip([variable.name for variable in model.trainable_variables], optimizer.velocities))

    @property
    def variables(self) -> List[tf.Variable]:
        return [*self.model.variables, *self.velocity.values()]

    def arrays(self) -> Dict[str, checkpoint.Arrays]:
        """Return the groups of arrays of a checkpoint."""
        return {
            "weights": {variable.name: variable.numpy() for variable in self.model.variables},
            "optimizer": {name: variable.numpy() for name, variable in self.velocity.items()},
        }

    def restore(self, path: str) -> None:
        """Take over weights, statistics and velocity of a checkpoint."""
        load_weights(self.model, path)
        assign(path, self.velocity, checkpoint.load(path, "optimizer"))

    def reset_velocity(self) -> None:
        for variable in self.velocity.values():
            variable.assign(tf.zeros_like(variable))


def load_weights(model: tf.keras.Model, path: str) -> None:
    """Set weights and statistics of `model` from the checkpoint `path`; raise CheckpointError if they do not fit."""
    assign(path, {variable.name: variable for variable in model.variables}, checkpoint.load(path, "weights"))


def assign(path: str, variables: Dict[str, tf.Variable], arrays: checkpoint.Arrays) -> None:
    """Set every variable from the array of its name; raise CheckpointError that tells what does not fit."""
    there = {name: f"{array.shape} {array.dtype}" for name, array in arrays.items()}
    here = {name: f"{tuple(variable.shape)} {variable.dtype.name}" for name, variable in variables.items()}
    checkpoint.check_signature(path, there, here)
    for name, variable in variables.items():
        variable.assign(arrays[name])


def take_over(model: tf.keras.Model, path: str) -> Tuple[int, List[str], List[str]]:
    """Set weights and statistics of `model` from those at `path`, by name; nothing else is taken.

    Returns (arrays taken, names left as initialised, a report of every name). A classifier of another shape, as for
    another data set, is left; CheckpointError if anything else does not fit.
    """
    arrays = checkpoint.read_weights(path)
    taken: Dict[str, tf.Variable] = {}
    left: List[str] = []
    unfit: List[str] = []
    lines: List[str] = []
    for variable in model.variables:
        name, here = variable.name, tuple(variable.shape)
        there = arrays[name].shape if name in arrays else None
        if there == here:
            taken[name] = variable
            lines.append(f"taken   {name} {here}")
            continue
        found = "not there" if there is None else f"{there} there"
        lines.append(f"left    {name} {here} here, {found}")
        (left if _of_classifier(name) else unfit).append(f"{name} ({here} here, {found})")
    names = {variable.name for variable in model.variables}
    unfit += [f"{name} (not here)" for name in arrays if name not in names and not _of_classifier(name)]
    if unfit:
        more = f" and {len(unfit) - 4} more" if len(unfit) > 4 else ""
        raise CheckpointError(
            f"--init_from={path}: belongs to another network: {'; '.join(unfit[:4])}{more}; set the model's flags as "
            "there"
        )
    for name, variable in taken.items():
        variable.assign(arrays[name])
    return len(taken), left, lines


def _of_classifier(name: str) -> bool:
    return name.startswith("logits/")
