"""The data plane; the only importer of Horovod. With one rank everything here is the identity.

Horovod's launcher and elastic mode are never used: their rendezvous server unpickles what it is sent
(CVE-2024-10190). Jobs start through mpirun or srun.
"""

import hashlib
from typing import Any, Sequence

import tensorflow as tf

from resnet_cpu.cluster.control import World
from resnet_cpu.errors import FlagError, UserError

_core: Any = None  # horovod.tensorflow, once started


def start(world: World) -> None:
    """Initialise Horovod for `world`; a single rank needs none."""
    global _core
    if world.size == 1:
        return
    try:
        import horovod.tensorflow as core
    except ImportError as error:
        raise FlagError(f"{world.size} ranks need Horovod, which does not load ({error}); see BUILD_NOTES.md") from None
    if not core.mpi_built():
        raise FlagError("this Horovod was built without MPI; build it as BUILD_NOTES.md says")
    core.init()
    if (core.size(), core.rank()) != (world.size, world.rank):
        raise UserError(f"Horovod is rank {core.rank()} of {core.size()}, MPI is {world.rank} of {world.size}")
    _core = core


def active() -> bool:
    """Return whether there are peers."""
    return _core is not None


def distributed(optimizer: tf.keras.optimizers.Optimizer) -> tf.keras.optimizers.Optimizer:
    """Return `optimizer` with gradients averaged over ranks in `minimize(loss, variables, tape)`, and only there."""
    if _core is None:
        return optimizer
    import horovod.tensorflow.keras as keras

    return keras.DistributedOptimizer(optimizer)


def broadcast(variables: Sequence[tf.Variable]) -> None:
    """Overwrite `variables` with rank 0's."""
    if _core is not None:
        _core.broadcast_variables(variables, root_rank=0)


def mean(tensor: tf.Tensor, name: str) -> tf.Tensor:
    """Return the mean of `tensor` over ranks."""
    return tensor if _core is None else _core.allreduce(tensor, op=_core.Average, name=name)


def total(tensor: tf.Tensor, name: str) -> tf.Tensor:
    """Return the sum of `tensor` over ranks (exact for integers)."""
    return tensor if _core is None else _core.allreduce(tensor, op=_core.Sum, name=name)


def check_replicas(world: World, variables: Sequence[tf.Variable], when: str) -> None:
    """Raise unless every rank holds the same bits; the error names the first variable that differs."""
    if world.size == 1:
        return
    digests = [hashlib.sha256(variable.numpy().tobytes()).hexdigest() for variable in variables]
    everyone = world.gather(hashlib.sha256("".join(digests).encode()).hexdigest())
    if len(set(everyone)) == 1:
        return
    for variable, row in zip(variables, zip(*world.gather(digests))):
        if len(set(row)) > 1:
            raise UserError(f"replicas differ {when}: {variable.name} is not the same on all ranks", collective=True)
    raise UserError(f"replicas differ {when}", collective=True)
