"""Where a rank's threads go; to be applied before TensorFlow is imported, since it reads its environment once."""

import os
from typing import Dict

from resnet_cpu.cluster import control


def cores_of_rank() -> int:
    """Return the cores that this rank may count as its own.

    A launcher that binds ranks leaves each an affinity mask of its own; where several ranks share the whole machine,
    they share it evenly.
    """
    mask = len(os.sched_getaffinity(0))
    _, _, local_size, _ = control.announced()
    if local_size > 1 and mask == os.cpu_count():
        return max(1, mask // local_size)
    return mask


def environment(threads: int) -> Dict[str, str]:
    """Return the environment for a rank of `threads` compute threads (0: as many as it has cores)."""
    chosen = str(threads or cores_of_rank())
    return {
        "TF_NUM_INTRAOP_THREADS": chosen,
        # The network is a chain: a second operation hardly ever has anything to do, and would fight for the cores.
        "TF_NUM_INTEROP_THREADS": "1",
        "OMP_NUM_THREADS": chosen,
        # Intel's OpenMP (loaded by the Intel extension) spins 200 ms after each region by default: that takes the core
        # from data threads and from Horovod's.
        "KMP_BLOCKTIME": "1",
        "TF_ENABLE_ONEDNN_OPTS": "1",
        # No GPU is looked for, and TensorFlow does not report on every start that it finds no CUDA.
        "CUDA_VISIBLE_DEVICES": "-1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "ITEX_CPP_MIN_LOG_LEVEL": "3",
    }


def apply(threads: int) -> Dict[str, str]:
    """Set what is not set yet: whatever the user exported stands. Return the values in force."""
    wanted = environment(threads)
    for name, value in wanted.items():
        if name == "TF_NUM_INTRAOP_THREADS" and threads:
            os.environ[name] = value
        os.environ.setdefault(name, value)
    return {name: os.environ[name] for name in wanted}
