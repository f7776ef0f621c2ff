"""Build the library of this folder's operations into the environment, or take it from the cache:

    python -m resnet_cpu.model.kernels.build

Without g++, or if it fails, training uses TensorFlow's own operations.
"""

import concurrent.futures
import contextlib
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from typing import List

from resnet_cpu.model.kernels import library

# Products and sums are contracted only where the sources say so: all instruction sets then give the same bits.
_COMMON = ["-O3", "-fPIC", "-ffp-contract=off", "-fno-math-errno"]
_AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]
_LOOPS = {"Avx2": ["-mavx2", "-mfma"], "Avx512": _AVX512, "Avx512Bf16": [*_AVX512, "-mavx512bf16"]}


def main() -> None:
    """Build the library unless one is there that loads; say on standard error what was done."""
    path = library.file()
    if _loads(path):
        return
    cached = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "resnet_cpu" / path.name
    try:
        if _loads(cached):
            _publish(cached, path)
        else:
            _make(path, cached)
    except OSError as error:
        reason = f"{error.filename or path}: {error.strerror or error}"
        _say(f"the fused kernels could not be stored ({reason}); training uses TensorFlow's own operations")


def _loads(path: pathlib.Path) -> bool:
    """Return whether TensorFlow loads the library: that of a shared cache may need newer system libraries."""
    if not os.path.exists(path):
        return False
    code = "import sys, tensorflow as tf; tf.load_op_library(sys.argv[1])"
    return subprocess.run([sys.executable, "-c", code, path], capture_output=True).returncode == 0


def _make(path: pathlib.Path, cached: pathlib.Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        _say("no g++: the fused kernels are not built, training uses TensorFlow's own operations")
        return
    started = time.monotonic()
    try:
        _build(compiler, path)
    except subprocess.CalledProcessError as error:
        where, log = error.stderr.strip().splitlines()[-1:], path.with_suffix(".log")
        with contextlib.suppress(OSError):
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_text(f"{' '.join(error.cmd)}\n{error.stderr}", encoding="utf-8")
            where = [str(log)]
        _say(f"the fused kernels did not build ({' '.join(where)}); training uses TensorFlow's own operations")
        return
    _say(f"fused kernels built in {time.monotonic() - started:.0f} s")
    with contextlib.suppress(OSError):  # the cache only saves time
        _publish(path, cached)


def _build(compiler: str, target: pathlib.Path) -> None:
    """Compile and link the library; raise CalledProcessError with the compiler's messages."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow as tf

    def run(arguments: List[str]) -> None:
        subprocess.run([compiler, *arguments], check=True, capture_output=True, text=True)

    def compiles(flags: List[str]) -> bool:
        return not subprocess.run([compiler, *flags, "-E", "-x", "c++", os.devnull], capture_output=True).returncode

    loops, ops = str(library.FOLDER / "loops.cc"), str(library.FOLDER / "ops.cc")
    known = {isa: flags for isa, flags in _LOOPS.items() if compiles(flags)}  # g++ before 10 has no -mavx512bf16
    present = [f"-DHAS_{isa.upper()}" for isa in known]
    with tempfile.TemporaryDirectory() as work:
        jobs = [
            [*_COMMON, "-std=c++17", *flags, f"-DISA={isa}", "-c", loops, "-o", f"{work}/{isa}.o"]
            for isa, flags in known.items()
        ]
        jobs.append([*_COMMON, *tf.sysconfig.get_compile_flags(), *present, "-c", ops, "-o", f"{work}/ops.o"])
        with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            list(pool.map(run, jobs))
        objects = [job[-1] for job in jobs]
        run(["-shared", "-o", f"{work}/kernels.so", *objects, *tf.sysconfig.get_link_flags()])
        _publish(pathlib.Path(work) / "kernels.so", target)


def _publish(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copy a file so that others see all of it or nothing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f"{target.name}.{os.getpid()}")
    shutil.copyfile(source, unfinished)
    os.replace(unfinished, target)


def _say(text: str) -> None:
    print(f"[kernels] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
