"""The data plane; the only importer of Horovod. With one rank, every function here is the identity.

Horovod's launcher and elastic mode are never used: their rendezvous server unpickles the messages that it receives
(CVE-2024-10190). Jobs are started by mpirun or srun.
"""

import hashlib
from typing import Any, List, Sequence

import tensorflow as tf

from resnet_cpu.cluster.control import World
from resnet_cpu.errors import FlagError, UserError

_PART = 2 * 2**20  # values of a message by means_by_bfloat16, or a few more: 4 MiB and up
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
            f"{world.size} ranks need Horovod, but it does not load ({error}); run make setup where g++ and MPI are "
            "installed (BUILD_NOTES.md), or use a single rank"
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


def means_by_bfloat16(tensors: Sequence[tf.Tensor]) -> List[tf.Tensor]:
    """Return the means of float32 `tensors` over ranks, rounded to bfloat16 twice: when sent, and as a result.

    Horovod cannot add bfloat16. So each rank receives its share of the values of all ranks, adds them in float32 in
    the order of the ranks, and sends the mean to all of them: half the bytes of an allreduce in float32, and sums that
    do not depend on an algorithm of the MPI. Tensors are taken from the last to the first, in which the backward pass
    yields gradients, and sent in parts of some MiB, while earlier layers are still computed.
    """
    if _core is None:
        return list(tensors)
    means: List[Any] = [None] * len(tensors)
    for number, part in enumerate(_parts([tensor.shape.num_elements() for tensor in tensors])):
        chosen = [tensors[i] for i in part]
        values = _mean_by_bfloat16(_joined(chosen), f"gradients_{number}")
        for i, value in zip(part, _separated(values, chosen)):
            means[i] = value
    return means


def means_in_one_message(tensors: Sequence[tf.Tensor], name: str) -> List[tf.Tensor]:
    """Return the means of `tensors`, all of one type, over ranks."""
    return _separated(mean(_joined(tensors), name), tensors)


def _joined(tensors: Sequence[tf.Tensor]) -> tf.Tensor:
    return tf.concat([tf.reshape(tensor, [-1]) for tensor in tensors], 0)


def _separated(values: tf.Tensor, like: Sequence[tf.Tensor]) -> List[tf.Tensor]:
    """Return the joined `values` in the shapes of `like`."""
    parts = tf.split(values, [tensor.shape.num_elements() for tensor in like])
    return [tf.reshape(part, tensor.shape) for part, tensor in zip(parts, like)]


def _parts(counts: Sequence[int]) -> List[List[int]]:
    """Return the positions of tensors with these numbers of values, from the last on, in parts of _PART or more."""
    parts: List[List[int]] = []
    held = _PART
    for i in reversed(range(len(counts))):
        if held >= _PART:
            parts.append([])
            held = 0
        parts[-1].append(i)
        held += counts[i]
    return parts


def _mean_by_bfloat16(values: tf.Tensor, name: str) -> tf.Tensor:
    size, count = _core.size(), values.shape[0]
    share = 2 * -(-count // (2 * size))  # of each rank; an even number, as two values travel as one int32

    def packed(numbers: tf.Tensor) -> tf.Tensor:
        return tf.bitcast(tf.reshape(tf.cast(numbers, tf.bfloat16), [-1, 2]), tf.int32)

    def unpacked(pairs: tf.Tensor) -> tf.Tensor:
        return tf.cast(tf.bitcast(pairs, tf.bfloat16), values.dtype)

    padded = tf.pad(values, [[0, size * share - count]])
    mine = unpacked(_core.alltoall(packed(padded), name=f"{name}_shares"))
    means = tf.reduce_mean(tf.reshape(mine, [size, share]), 0)
    return tf.reshape(unpacked(_core.allgather(packed(means), name=f"{name}_means")), [-1])[:count]


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
