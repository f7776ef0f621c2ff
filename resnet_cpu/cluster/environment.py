"""Keep what other programs left in the environment and the home folder from changing a run unnoticed.

TensorFlow, Keras, oneDNN, the Intel extension and Horovod read variables and files that were often meant for another
program: `ITEX_AUTO_MIXED_PRECISION=1` trains in bfloat16 whatever --precision says, a `~/.keras/keras.json` of an old
project chooses another epsilon. `settle` gives such variables this package's values, before TensorFlow is imported, and
returns what it found for run.json. RESNET_CPU_KEEP names variables that are meant for this package, and are kept.
"""

import os
import re
import sys
from importlib import metadata
from typing import Dict, List, Mapping, MutableMapping, NamedTuple, Optional

from resnet_cpu.errors import FlagError

#: Names, separated by commas, of variables to keep although they change what is computed.
KEEP = "RESNET_CPU_KEEP"

_LEGACY = "TF_USE_LEGACY_KERAS"
_KERAS_2 = (2, 16)  # from this TensorFlow on, tf.keras is Keras 3, unless TF_USE_LEGACY_KERAS chooses tf_keras
# They pin threads. See placement.variables.
_PINNING = r"(KMP|GOMP_CPU|HOROVOD_THREAD)_AFFINITY|OMP_(PROC_BIND|PLACES)|KMP_(HW_SUBSET|PLACE_THREADS)"
# Matched as a whole. Numbers of threads, and what only reports, are not among them.
_REMOVED = re.compile(
    r"ITEX_(?!CPP_MIN_LOG_LEVEL|VERBOSE|OMP_THREADPOOL).*"  # precision, graph rewriting, layouts
    r"|(ONEDNN|DNNL)_(DEFAULT_FPMATH_MODE|MAX_CPU_ISA|CPU_ISA_HINTS)"  # products rounded to bfloat16; other kernels
    r"|TF_(SET_)?(ONEDNN|MKL)_.*|TF_DISABLE_MKL|TF_ENABLE_MKL.*|TF_.*AUTO_MIXED_PRECISION.*|TF_DETERMINISTIC_OPS"
    r"|(TF_)?XLA_FLAGS"  # clustering
    r"|HOROVOD_(CONTROLLER|CPU_OPERATIONS)"  # left over from an installation with Gloo: a segmentation fault here
    rf"|{_PINNING}"
)
# Recorded with their values. Messages between launcher and ranks, which may hold keys, are not among them.
_RECORDED = re.compile(
    r"(TF|ITEX|ONEDNN|DNNL|KMP|OMP|GOMP|HOROVOD|MKL|OPENBLAS|MALLOC|TCMALLOC|UCX|FI|MV2)_[A-Z0-9_]+|XLA_FLAGS"
    r"|OMPI_MCA_(btl|coll|mpi|mtl|osc|pml)(_[a-z0-9_]+)?|I_MPI_(ADJUST|FABRICS|OFI|PIN)[A-Z0-9_]*|MPIR_CVAR_[A-Z0-9_]+"
    r"|KERAS_(BACKEND|HOME)|CUDA_VISIBLE_DEVICES|GLIBC_TUNABLES|LD_PRELOAD|PYTHONPATH|RESNET_CPU_KEEP"
)
#: Numbers of compute threads, which --threads replaces.
THREADS = ("TF_NUM_INTRAOP_THREADS", "OMP_NUM_THREADS")
NUMBERS_OF_THREADS = (*THREADS, "TF_NUM_INTEROP_THREADS", "OMP_THREAD_LIMIT")
_BY_LEVEL = ("OMP_NUM_THREADS",)  # a list is allowed: a number for each level of nested parallel regions
_MOST_THREADS = 65536
# Other programs use some of these prefixes, too: Terraform has TF_VAR_DB_PASSWORD.
_SECRET = re.compile("TOKEN|SECRET|PASSW|CREDENTIAL|KEY|AUTH", re.IGNORECASE)
#: The file of the user's own parameters of Open MPI.
MPI_PARAMETERS = "~/.openmpi/mca-params.conf"


class Environment(NamedTuple):
    """The variables and files that decide what this process computes."""

    variables: Dict[str, str]  # those in force that affect speed or results
    ignored: Dict[str, str]  # exported values that were replaced or removed
    mpi_parameters: Dict[str, str]  # of the user's file, which Open MPI reads; they choose algorithms of allreduce


def decided() -> Dict[str, str]:
    """Return the variables that this package sets whatever was exported."""
    variables = {
        # Keras' settings in the home folder choose epsilon, precision and layout. This is not a folder.
        "KERAS_HOME": os.devnull,
        "TF2_BEHAVIOR": "1",
        "TF_ENABLE_ONEDNN_OPTS": "1",
    }
    if keras_is_separate():
        variables[_LEGACY] = "1"
    return variables


def keras_is_separate() -> bool:
    """Return whether Keras 2, which Horovod needs, is the package tf_keras for the installed TensorFlow."""
    found = re.match(r"(\d+)\.(\d+)", version("tensorflow") or "")
    return found is not None and (int(found[1]), int(found[2])) >= _KERAS_2


def version(package: str) -> Optional[str]:
    """Return the version of an installed package, None without it; TensorFlow has two names."""
    for name in (package, "tensorflow-cpu") if package == "tensorflow" else (package,):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
    return None


def not_obeyed(environ: Mapping[str, str] = os.environ) -> Dict[str, str]:
    """Return the exported variables that are not obeyed: name -> value."""
    kept, ours = _kept(environ), decided()
    return {
        name: value
        for name, value in sorted(environ.items())
        if name not in kept
        and (value != ours[name] if name in ours else name == _LEGACY or bool(_REMOVED.fullmatch(name)))
    }


def remarks(environ: Mapping[str, str] = os.environ) -> List[str]:
    """Return lines for people about variables that are not obeyed and files that are."""
    ignored, parameters, lines = not_obeyed(environ), mpi_parameters(), []
    if ignored:
        named = ", ".join(f"{name}={value}" for name, value in ignored.items())
        lines.append(
            f"warning: not obeyed, since it would change what is computed or pin threads: {named}, set in your "
            f"environment; unset it, or keep it with {KEEP}={','.join(ignored)}"
        )
    if parameters:
        named = ", ".join(f"{name}={value}" for name, value in parameters.items())
        lines.append(f"Open MPI obeys {MPI_PARAMETERS}: {named}; results may depend on it")
    return lines


def check_threads(environ: MutableMapping[str, str] = os.environ) -> None:
    """Raise FlagError unless the exported numbers of threads are whole numbers from 1 on.

    Empty variables are removed, as after `export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK` in a job without
    --cpus-per-task; so are spaces.
    """
    for name in NUMBERS_OF_THREADS:
        exported = environ.get(name, "").strip()
        if not exported:
            environ.pop(name, None)
            continue
        parts = exported.split(",") if name in _BY_LEVEL else [exported]
        numbers = [int(part) if re.fullmatch(r"\s*[0-9]{1,9}\s*", part) else 0 for part in parts]
        if all(1 <= number <= _MOST_THREADS for number in numbers):
            environ[name] = ",".join(map(str, numbers))
        else:
            several = ", or one for each level of nesting" if name in _BY_LEVEL else ""
            raise FlagError(
                f"{name}={exported}: must be a whole number from 1 to {_MOST_THREADS}{several}; correct it, or unset it"
            )


def settle(environ: MutableMapping[str, str] = os.environ) -> Environment:
    """Give the variables that decide what is computed their values; return what is in force and what was not obeyed.

    To be called before TensorFlow is imported. Raises FlagError if RESNET_CPU_KEEP names something else, and if Python
    was started without docstrings, which TensorFlow reads.
    """
    if sys.flags.optimize > 1:
        raise FlagError("PYTHONOPTIMIZE=2, or python -OO: TensorFlow does not load without docstrings; unset it")
    kept = _kept(environ)
    for name in kept:
        if name == _LEGACY or (name not in decided() and not _REMOVED.fullmatch(name)):
            raise FlagError(f"{KEEP}: {name} is not among the variables that can be kept; remove it from the list")
    ignored = not_obeyed(environ)
    for name in ignored:
        del environ[name]
    for name, value in decided().items():
        environ.setdefault(name, value)
    variables = {name: value for name, value in sorted(environ.items()) if value and _is_recorded(name)}
    return Environment(variables, ignored, mpi_parameters())


def kept_arithmetic(environ: Mapping[str, str] = os.environ) -> Dict[str, str]:
    """Return the variables that are kept although they change what is computed; those that pin threads do not."""
    return {name: value for name, value in sorted(_kept(environ).items()) if not re.fullmatch(_PINNING, name)}


def _kept(environ: Mapping[str, str]) -> Dict[str, str]:
    names = [name.strip() for name in environ.get(KEEP, "").split(",")]
    return {name: environ[name] for name in names if name in environ}


def mpi_parameters(path: str = MPI_PARAMETERS) -> Dict[str, str]:
    """Return the parameters of Open MPI that the user's file sets and that affect messages between ranks."""
    try:
        with open(os.path.expanduser(path), encoding="utf-8", errors="replace") as text:
            pairs = [line.split("=", 1) for line in text if "=" in line and not line.lstrip().startswith("#")]
    except OSError:
        return {}
    found = {name.strip(): value.strip() for name, value in pairs}
    return {name: value for name, value in found.items() if _is_recorded(f"OMPI_MCA_{name}")}


def _is_recorded(name: str) -> bool:
    return bool(_RECORDED.fullmatch(name)) and not _SECRET.search(name)
