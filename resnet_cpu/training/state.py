"""Everything that training changes, by the names it is saved under: weights, statistics, the optimizer's slots."""

import dataclasses
import os
import sys
from typing import Dict, List, Optional, Tuple

import tensorflow as tf

from resnet_cpu.cluster import control, horovod
from resnet_cpu.cluster.control import World
from resnet_cpu.cluster.machine import narrow_layers_problem, precision_problem
from resnet_cpu.cluster.placement import has_intel_openmp
from resnet_cpu.errors import CheckpointError, FlagError
from resnet_cpu.model import resnet
from resnet_cpu.run import checkpoint, provenance, signature
from resnet_cpu.settings import Settings

_ISA_LIMIT = "ONEDNN_MAX_CPU_ISA"  # the newest instruction set whose kernels oneDNN chooses


def build_model(settings: Settings, fused_kernels: bool = False) -> tf.keras.Model:
    """Return the network of the settings, initialised from their seed; raise FlagError if it cannot be trained here.

    `fused_kernels`: for training with the operations of `resnet_cpu.model.kernels`, whose library must load. Such a
    network cannot be exported as a SavedModel, which would need the library.
    """
    instruction_sets = provenance.instruction_sets()
    problem = narrow_layers_problem(max(1, round(64 * settings.model.width)), instruction_sets)
    if problem is not None and _ISA_LIMIT not in os.environ:
        os.environ[_ISA_LIMIT] = "SSE41"  # oneDNN reads it at its first use, which is in the first step
        if control.announced()[1] == 0:
            print(f"warning: --width={settings.model.width:g}: {problem}", file=sys.stderr, flush=True)
    problem = precision_problem(settings.model.precision, instruction_sets, has_intel_openmp())
    if problem is not None:
        raise FlagError(f"--precision={settings.model.precision}: {problem}; use float32")
    options = dataclasses.asdict(settings.model)
    name, num_classes, seed = options.pop("model"), options.pop("num_classes"), settings.recipe.seed
    return resnet.resnet(name, num_classes, seed=seed, fused_kernels=fused_kernels, **options)


def slots(model: tf.keras.Model, optimizer: tf.keras.optimizers.Optimizer) -> Dict[str, tf.Variable]:
    """Return the optimizer's variables by the names they are saved under: a velocity has the name of its weight.

    The one place that knows which slots an optimizer has; name further ones WEIGHT/SLOT.
    """
    return dict(zip([variable.name for variable in model.trainable_variables], optimizer.velocities))


class State:
    """Weights, batch norm's statistics, optimizer slots and the number of steps done."""

    def __init__(self, model: tf.keras.Model, optimizer: tf.keras.optimizers.Optimizer) -> None:
        self.model = model
        self.step = 0
        self.saved_step: Optional[int] = None  # of the newest checkpoint of this attempt, or that it started from
        self._slots = slots(model, optimizer)
        self._checked_step: Optional[int] = None

    @property
    def variables(self) -> List[tf.Variable]:
        """Return every variable that has to be the same on all ranks."""
        return [*self.model.variables, *self._slots.values()]

    def arrays(self) -> Dict[str, checkpoint.Arrays]:
        """Return the groups of arrays of a checkpoint."""
        return {
            "weights": {variable.name: variable.numpy() for variable in self.model.variables},
            "optimizer": {name: variable.numpy() for name, variable in self._slots.items()},
        }

    def restore(self, path: str) -> None:
        """Set weights, statistics and slots from the checkpoint `path`."""
        load_weights(self.model, path)
        assign(path, self._slots, checkpoint.load(path, "optimizer"))

    def reset_slots(self) -> None:
        """Set the optimizer's slots to zero, as at the start of training."""
        for variable in self._slots.values():
            variable.assign(tf.zeros_like(variable))

    def check_replicas(self, world: World, when: str) -> None:
        """Raise UserError unless all ranks hold the same bits; hashes the state once per step."""
        if self._checked_step != self.step:
            horovod.check_replicas(world, self.variables, when)
            self._checked_step = self.step


def load_weights(model: tf.keras.Model, path: str) -> None:
    """Set weights and statistics of `model` from the checkpoint `path`; raise CheckpointError if they do not fit."""
    assign(path, {variable.name: variable for variable in model.variables}, checkpoint.load(path, "weights"))


def assign(path: str, variables: Dict[str, tf.Variable], arrays: checkpoint.Arrays) -> None:
    """Set each variable from the array of its name; raise CheckpointError that lists what does not fit."""
    saved = {name: f"{array.shape} {array.dtype}" for name, array in arrays.items()}
    expected = {name: f"{tuple(variable.shape)} {variable.dtype.name}" for name, variable in variables.items()}
    signature.check(path, saved, expected)
    for name, variable in variables.items():
        variable.assign(arrays[name])


def take_over(model: tf.keras.Model, path: str) -> Tuple[int, List[str], List[str]]:
    """Set weights and statistics of `model` by name from the weights at `path`, as `--init_from` does.

    A classifier of another shape, as for another data set, keeps its initial values. Raises CheckpointError if
    anything else does not fit.

    Returns:
        The number of arrays taken, a description of each that kept its initial values, and a line per array.
    """
    arrays = checkpoint.read_weights(path)
    taken: Dict[str, tf.Variable] = {}
    initial: List[str] = []
    unfit: List[str] = []
    lines: List[str] = []
    for variable in model.variables:
        name, shape = variable.name, tuple(variable.shape)
        saved = arrays[name].shape if name in arrays else None
        if saved == shape:
            taken[name] = variable
            lines.append(f"taken   {name} {shape}")
            continue
        difference = f"{name} ({shape} in this network, {'missing' if saved is None else saved} in the file)"
        lines.append(f"initial {difference}")
        (initial if _of_classifier(name) else unfit).append(difference)
    names = {variable.name for variable in model.variables}
    unfit += [f"{name} (only in the file)" for name in arrays if name not in names and not _of_classifier(name)]
    if unfit:
        more = f" and {len(unfit) - 4} more" if len(unfit) > 4 else ""
        raise CheckpointError(
            f"--init_from={path}: belongs to another network: {'; '.join(unfit[:4])}{more}; set the flags of the "
            "model to those of that network"
        )
    for name, variable in taken.items():
        variable.assign(arrays[name])
    return len(taken), initial, lines


def _of_classifier(name: str) -> bool:
    return name.startswith("logits/")
