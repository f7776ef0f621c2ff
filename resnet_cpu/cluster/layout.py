"""Where a rank's threads go; to be applied before TensorFlow is imported, since it reads its environment once."""

import os
from typing import Dict, List, Optional

_THREADS = ("TF_NUM_INTRAOP_THREADS", "OMP_NUM_THREADS")


def environment(threads: int) -> Dict[str, str]:
    """Return the environment for a rank of `threads` compute threads."""
    chosen = str(threads)
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


def apply(threads: int, cores: int) -> Dict[str, str]:
    """Set the environment for `threads` (0: as many as the rank has `cores`); return the values in force.

    What the user exported stands, but for the threads where the flag names a number.
    """
    wanted = environment(threads or cores)
    for name, value in wanted.items():
        if threads and name in _THREADS:
            os.environ[name] = value
        os.environ.setdefault(name, value)
    return {name: os.environ[name] for name in wanted}


def doubt_about(precision: str, present: List[str]) -> Optional[str]:
    """Return a warning where `precision` is known not to pay on a processor with these instruction sets."""
    if precision == "bfloat16" and "amx_bf16" not in present:
        return (
            "--precision=bfloat16: this processor has no AMX, where bfloat16 was slower than float32 (BUILD_NOTES.md); "
            "compare the two with python -m resnet_cpu.benchmark"
        )
    return None
