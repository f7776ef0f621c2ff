"""Which precision is faster on this host: a convolution timed in both, once for hosts of a type, and remembered.

The instruction sets alone do not decide it: without AMX, bfloat16 was 1.8 times as fast as float32 on an AMD EPYC with
avx512_bf16, and slower on an Intel Xeon that has the same.
"""

import contextlib
import os
import subprocess
import sys
from typing import Optional, Sequence, Tuple

from resnet_cpu.cluster import allocation, remembered
from resnet_cpu.cluster.machine import Machine

_UNITS = ("amx_bf16", "avx512_bf16")  # instruction sets with products of bfloat16
_LIMIT_S = 120.0  # of the measurement, most of which loads TensorFlow
_WORTHWHILE = 1.1


def has_units(instruction_sets: Sequence[str]) -> bool:
    """Return whether a processor with these instruction sets multiplies numbers in bfloat16."""
    return any(name in instruction_sets for name in _UNITS)


def known(host: Machine, intel_extension: bool, path: Optional[str] = None) -> Optional[float]:
    """Return the speed of bfloat16 relative to float32 as measured on hosts of this type; None: not measured."""
    found = remembered.read(path or remembered.file("precisions")).get(_key(host, intel_extension))
    return float(found) if isinstance(found, (int, float)) and found >= 0 else None


def measure(host: Machine, intel_extension: bool, path: Optional[str] = None) -> Optional[float]:
    """Time a convolution in both precisions on this host and remember the ratio; None if it could not be timed.

    0 means that bfloat16 cannot be computed. Takes about ten seconds.
    """
    command = [sys.executable, "-m", "resnet_cpu.bench.convolution"]
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, timeout=_LIMIT_S,
            env=allocation.without(os.environ),
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    # The process may abort in bfloat16, after float32.
    rates = dict(line.split() for line in done.stdout.splitlines() if len(line.split()) == 2)
    if "float32" not in rates:
        return None
    ratio = round(float(rates.get("bfloat16", 0.0)) / float(rates["float32"]), 2)
    with contextlib.suppress(OSError):  # a home folder that cannot be written: it is timed again next time
        remembered.add(path or remembered.file("precisions"), _key(host, intel_extension), ratio)
    return ratio


def find_out(host: Machine, intel_extension: bool) -> Optional[float]:
    """Return what is known for hosts of this type; if nothing is and the processor may be faster, measure it."""
    found = known(host, intel_extension)
    return measure(host, intel_extension) if found is None and has_units(host.instruction_sets) else found


def advice(instruction_sets: Sequence[str], speedup: Optional[float]) -> Tuple[str, str]:
    """Return what to use and why; `speedup` is what `known` or `measure` returned."""
    if speedup is None:
        if "amx_bf16" in instruction_sets:
            return "float32, or --precision=bfloat16", "with AMX twice the rate at 224x224, see docs/tuning.md"
        if not has_units(instruction_sets):
            return "float32", "the processor has no products of bfloat16"
        return "float32", "bfloat16 may be faster: launch and doctor measure that on the host"
    if speedup >= _WORTHWHILE:
        return "float32, or --precision=bfloat16", f"a convolution in bfloat16 is {speedup:g} times as fast here"
    if not speedup:
        return "float32", "bfloat16 cannot be computed here"
    return "float32", f"a convolution in bfloat16 has {speedup:g} times the speed of one in float32 here"


def warning(instruction_sets: Sequence[str], speedup: Optional[float]) -> Optional[str]:
    """Return a warning for a run in bfloat16 where float32 is faster, else None."""
    chosen, reason = advice(instruction_sets, speedup)
    if chosen != "float32" or (speedup is None and has_units(instruction_sets)):
        return None
    return f"--precision=bfloat16: {reason}; use float32"


def _key(host: Machine, intel_extension: bool) -> str:
    packages = "with the Intel extension" if intel_extension else "TensorFlow's own kernels"
    return f"{remembered.host_type(host)}; {packages}"
