"""The data plane; the only importer of Horovod. With one rank, every function here is the identity.

Horovod's launcher and elastic mode are never used: their rendezvous server unpickles the messages that it receives
(CVE-2024-10190). Jobs are started by mpirun or srun.
"""

import hashlib
from typing import Any, Sequence

import tensorflow as tf

from resnet_cpu.cluster.control import World
from resnet_cpu.errors import FlagError, UserError

_core: Any = None  # horovod.tensorflow, once started


def start(world: World) -> None:
    """Initialise Horovod for `world`; do nothing for a single rank."""
    global _core
    if world.size == 1:
        return
    try:
        import horovod.tensorflow as core
    except ImportError as error:
        raise FlagError(
            f"{world.size} ranks need Horovod, but it does not load ({error}); see BUILD_NOTES.md"
        ) from None
    if not core.mpi_built():
        raise FlagError("this Horovod was built without MPI; build it as described in BUILD_NOTES.md")
    core.init()
    if (core.size(), core.rank()) != (world.size, world.rank):
        raise UserError(f"Horovod is rank {core.rank()} of {core.size()}, MPI is {world.rank} of {world.size}")
    _core = core


def active() -> bool:
    """Return whether there are other ranks."""
    return _core is not None


def distributed(optimizer: tf.keras.optimizers.Optimizer) -> tf.keras.optimizers.Optimizer:
    """Return `optimizer` with a `minimize(loss, variables, tape)` that averages gradients over ranks."""
    if _core is None:
        return optimizer
    import horovod.tensorflow.keras as keras

    return keras.DistributedOptimizer(optimizer)


def broadcast(variables: Sequence[tf.Variable]) -> None:
    """Overwrite `variables` with those of rank 0."""
    if _core is not None:
        _core.broadcast_variables(variables, root_rank=0)


def mean(tensor: tf.Tensor, name: str) -> tf.Tensor:
    """Return the mean of `tensor` over ranks."""
    return tensor if _core is None else _core.allreduce(tensor, op=_core.Average, name=name)


def total(tensor: tf.Tensor, name: str) -> tf.Tensor:
    """Return the sum of `tensor` over ranks (exact for integers)."""
    return tensor if _core is None else _core.allreduce(tensor, op=_core.Sum, name=name)


def check_replicas(world: World, variables: Sequence[tf.Variable], when: str) -> None:
    """Raise UserError unless `variables` hold the same bits on all ranks; it names the first one that differs."""
    if world.size == 1:
        return
    digests = [hashlib.sha256(variable.numpy().tobytes()).hexdigest() for variable in variables]
    combined = world.gather(hashlib.sha256("".join(digests).encode()).hexdigest())
    if len(set(combined)) == 1:
        return
    for variable, row in zip(variables, zip(*world.gather(digests))):
        if len(set(row)) > 1:
            raise UserError(f"replicas differ {when}: {variable.name} is not the same on all ranks", collective=True)
    raise UserError(f"replicas differ {when}", collective=True)
