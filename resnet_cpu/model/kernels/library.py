"""The compiled operations of this folder: the file they are in, and whether this process can use them.

The library belongs to these sources and to one version of TensorFlow; both are in the name of its file, so that a
library of others is never loaded. `build.py` makes it.
"""

import ctypes
import functools
import hashlib
import importlib.util
import os
import pathlib
import platform
import sys
from typing import Any, List, NamedTuple, Tuple

from resnet_cpu.cluster.control import World
from resnet_cpu.cluster.environment import version
from resnet_cpu.errors import FlagError
from resnet_cpu.settings import Settings

FOLDER = pathlib.Path(__file__).parent
SOURCES = ("blocks.h", "loops.h", "loops.cc", "ops.cc", "build.py")
BUILD = "python -m resnet_cpu.model.kernels.build"
# The widest instruction set to use: avx512_bf16, avx512 or avx2. For tests and comparisons.
ISA_LIMIT = "RESNET_CPU_KERNELS_ISA"


class Kernels(NamedTuple):
    """The operations, or why they cannot be used."""

    ops: Any  # module of tf.load_op_library; None if the operations cannot be used
    isa: str  # instruction set that they use
    problem: str  # why they cannot be used, and what helps


class Choice(NamedTuple):
    """Whether the operations are used, and a description of that for people."""

    used: bool
    text: str


def choose(settings: Settings) -> Choice:
    """Return whether a run with these settings uses the operations; raise FlagError where it cannot and has to."""
    import tensorflow as tf

    wanted, weights = settings.system.fused_kernels, tf.keras.backend.floatx()
    if wanted == "no":
        return Choice(False, "TensorFlow's operations (--fused_kernels=no)")
    kernels = load()
    problem = f"weights are {weights}, not float32" if weights != "float32" else kernels.problem
    if problem and wanted == "yes":
        raise FlagError(f"--fused_kernels=yes: {problem}")
    return Choice(False, f"TensorFlow's operations: {problem}") if problem else Choice(True, f"fused, {kernels.isa}")


def agree(settings: Settings, world: World) -> Tuple[bool, List[str]]:
    """Return whether the ranks use the operations, which all do or none, and a description for each rank.

    Ranks that compute the update with other operations drift apart in the last bits. Raises FlagError, which names the
    first rank that cannot use them and has to, on all ranks.
    """
    choices = [Choice(*row) for row in world.gather(world.on_all(lambda: choose(settings)))]
    without = [rank for rank, choice in enumerate(choices) if not choice.used]
    if 0 < len(without) < len(choices):
        text = f"{choices[without[0]].text} (on rank {without[0]}; either all ranks use the fused kernels or none does)"
        choices = [Choice(False, text)] * len(choices)
    return choices[0].used, [choice.text for choice in choices]


def changed(before: str, now: str) -> bool:
    """Return whether one of two descriptions is of the fused kernels and the other is not.

    The bits of the kernels do not depend on the instruction set, except for denormals that are converted to bfloat16.
    """
    return before.startswith("fused") != now.startswith("fused")


def file() -> pathlib.Path:
    """Return the path of the library in this environment, whether it exists or not."""
    return pathlib.Path(sys.prefix) / "lib" / "resnet_cpu" / f"kernels-{key()}.so"


@functools.cache
def key() -> str:
    """Return a digest of everything that the library is built from."""
    digest = hashlib.sha256(f"{_tensorflow()} {platform.machine()}".encode())
    for name in SOURCES:
        digest.update((FOLDER / name).read_bytes())
    return digest.hexdigest()[:16]


def _tensorflow() -> str:
    """Return what identifies the installed TensorFlow: its version or, of one without metadata, its place and time."""
    found = version("tensorflow")
    if found is not None:
        return found
    spec = importlib.util.find_spec("tensorflow")
    return f"{spec.origin} {os.stat(spec.origin).st_mtime_ns}" if spec and spec.origin else "none"


@functools.cache
def load() -> Kernels:
    """Load the library and register the gradients of its operations; TensorFlow must have been set up before."""
    path = file()
    if not path.exists():
        return Kernels(None, "", f"{path} does not exist; build it with {BUILD}, which needs g++")
    import tensorflow as tf

    try:
        ops = tf.load_op_library(str(path))
        isa = _isa(path)
    except (tf.errors.OpError, OSError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0]
        return Kernels(None, "", f"{path} does not load ({reason}); {BUILD} rebuilds it")
    if not isa:
        limit = f" that {ISA_LIMIT}={os.environ[ISA_LIMIT]} allows" if os.environ.get(ISA_LIMIT) else ""
        return Kernels(None, "", f"this processor has none of the instruction sets{limit}: AVX2 with FMA or AVX-512")
    tf.RegisterGradient("ResnetCpuBatchNorm")(_batch_norm_gradient)
    return Kernels(ops, isa, "")


def _isa(path: pathlib.Path) -> str:
    function = ctypes.CDLL(str(path)).resnet_cpu_kernels_isa
    function.restype = ctypes.c_char_p
    return function().decode()


def _batch_norm_gradient(op: Any, *gradients: Any) -> List[Any]:
    """Return the gradients of x, gamma, beta and the side input, given those of the copies of y.

    Those of mean and variance are ignored: the moving statistics are not trained.
    """
    copies, sides, relu = op.get_attr("copies"), op.get_attr("sides"), op.get_attr("relu")
    images, gamma, beta = op.inputs[:3]
    mean, variance = op.outputs[copies:]
    found = load().ops.resnet_cpu_batch_norm_grad(
        dy=gradients[:copies],
        x=images,
        gamma=gamma,
        beta=beta,
        mean=mean,
        variance=variance,
        y=[op.outputs[0]] if sides and relu else [],  # without a side input, the mask is computed again
        sides=sides,
        relu=relu,
        groups=op.get_attr("groups"),
        epsilon=op.get_attr("epsilon"),
    )
    return [found.dx, found.dgamma, found.dbeta, *found.dside]
