"""Collect facts about this machine: packages, MPI, two ranks, and folders. `checks` judges them.

Nothing here needs a package besides Python's own, so that a missing one can be reported.
"""

import configparser
import contextlib
import dataclasses
import fcntl
import importlib
import importlib.util
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from typing import IO, Any, Dict, Iterator, List, Mapping, Optional, Set, Tuple

from resnet_cpu.cluster import allocation, start
from resnet_cpu.cluster.environment import keras_is_separate, version
from resnet_cpu.run.atomic import write_atomically
from resnet_cpu.run.rights import others_may_write, refused

_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
_EXTENSION = "intel-extension-for-tensorflow"
_FIRST = ("absl.flags", "numpy")  # modules without which no command starts
_BLOCK = 2**20
_READ_BYTES, _READ_S = 256 * _BLOCK, 2.0  # at most, in the test of reading
_LARGEST_OF = 10000  # files of a data folder that are looked at
_OF_A_LAUNCHER = ("PMI_", "PMIX_", "OMPI_COMM_WORLD_", "RESNET_CPU_RANKS")  # of one that has started this shell
_VERSION_S = 5.0  # for mpirun to print its version
_END_S = 3.0  # time for mpirun to end its ranks


@dataclasses.dataclass(frozen=True)
class Handshake:
    """The outcome of two ranks, or of one process if ranks cannot be started, that did `diagnosis.handshake`."""

    code: Optional[int]  # None: not ended in time
    stages: Dict[str, Dict[str, Any]]  # those that were finished
    error: str = ""  # the last line of the program's errors
    limit: float = 0.0  # seconds
    alone: bool = False
    skipped: bool = False


@dataclasses.dataclass(frozen=True)
class Folder:
    """A folder, or the nearest one above it that exists, and its file system."""

    path: str
    kind: str = "unknown"  # as the kernel names it
    free: int = 0  # bytes for this user
    files: Optional[int] = None  # that can still be created, None: unknown
    error: str = ""
    without_locks: str = ""  # why `flock` does not work, empty if it does
    others: str = ""  # who else can write to it, empty for none
    ahead: Optional[float] = None  # seconds by which its time stamps are ahead of the clock
    rate: Optional[float] = None  # MB/s of reading


def requirements() -> Tuple[str, Dict[str, Dict[str, str]]]:
    """Return the range of Python, and for each extra (the empty one: always) the ranges of packages.

    They are read from setup.cfg in a checkout, from the installed package elsewhere.
    """
    setup = configparser.ConfigParser()
    setup.read(os.path.join(_ROOT, "setup.cfg"), encoding="utf-8")
    if setup.has_option("options", "install_requires"):
        texts = {"": setup["options"]["install_requires"], **setup["options.extras_require"]}
        lines = {extra: [line for line in text.splitlines() if line.strip()] for extra, text in texts.items()}
        python = setup["options"]["python_requires"]
    else:
        lines = {"": []}
        for line in metadata.requires("resnet_cpu") or []:
            text, _, marker = line.partition(";")
            extra = re.search(r"extra == ['\"](\w+)['\"]", marker)
            lines.setdefault(extra[1] if extra else "", []).append(text)
        python = metadata.metadata("resnet_cpu")["Requires-Python"]
    return python, {extra: dict(map(_requirement, given)) for extra, given in lines.items()}


def _requirement(line: str) -> Tuple[str, str]:
    match = re.match(r"\s*([A-Za-z0-9._-]+)(?:\[[^]]*\])?\s*(.*?)\s*$", line)
    return (match[1], match[2]) if match else (line, "")


def stack() -> str:
    """Return the name of the installed stack: intel, current, or empty for TensorFlow 2.15 without the extension."""
    return "intel" if version(_EXTENSION) else "current" if keras_is_separate() else ""


def broken() -> Dict[str, str]:
    """Return the packages that every command needs and that do not load: name -> error."""
    found = {}
    for module in _FIRST:
        try:
            importlib.import_module(module)
        except Exception as error:  # a damaged package raises anything
            found[module.split(".")[0]] = f"{type(error).__name__}: {_first_line(str(error))}"
    return found


def mpirun() -> Tuple[Optional[str], str]:
    """Return the path of mpirun in PATH, None without it, and what it prints with --version.

    Raises FlagError if it cannot be run.
    """
    path = shutil.which("mpirun")
    if path is None:
        return None, ""
    return path, start.version_of(path, _VERSION_S)


def horovod_build() -> Tuple[Optional[str], str, List[str]]:
    """Return Horovod's version (None: not installed), the TensorFlow it was built for, and its MPI libraries."""
    have = version("horovod")
    spec = importlib.util.find_spec("horovod") if have else None
    if spec is None or spec.origin is None:
        return have, "", []
    folder = os.path.dirname(spec.origin)
    try:
        with open(os.path.join(folder, "metadata.json"), encoding="utf-8") as file:
            built_for = str(json.load(file).get("tensorflow", ""))
    except (OSError, ValueError, AttributeError):
        built_for = ""
    libraries: Set[str] = set()
    for name in os.listdir(os.path.join(folder, "tensorflow")):
        if name.startswith("mpi_lib"):
            with open(os.path.join(folder, "tensorflow", name), "rb") as file:
                names = re.findall(rb"\0(lib(?:mpi|mpich)\.so[.\d]*)(?=\0)", file.read())
            libraries.update(name.decode() for name in names)
    return have, built_for, sorted(libraries)


def shake_hands(limit: float, alone: bool) -> Handshake:
    """Start two ranks on this host with the package's launcher, or one process if `alone`; end them after `limit` s."""
    command = [sys.executable, "-m", "resnet_cpu.diagnosis.handshake"]
    if not alone:
        command = [*command, "--on_two_ranks"]
    outside = {**outside_jobs(os.environ), "RESNET_CPU_OVERSUBSCRIBE": "1"}  # a host may have a single core
    # Files, not pipes: one that a rank left open would never end.
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=outside, start_new_session=True
        )
        code: Optional[int] = None
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if process.poll() is None:
                _end(process)
        printed, errors = (_content(file) for file in (out, err))
    stages = {}
    for line in printed.splitlines():
        if line.startswith('{"stage"'):
            stage = json.loads(line)
            stages[stage.pop("stage")] = stage
    return Handshake(code, stages, _cause(errors), limit, alone)


def outside_jobs(environ: Mapping[str, str]) -> Dict[str, str]:
    """Return `environ` without the variables of batch jobs and launchers: the two ranks run on this host."""
    return {name: value for name, value in allocation.without(environ).items() if not name.startswith(_OF_A_LAUNCHER)}


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a process and what it has started in its session: mpirun ends its ranks when it is asked to end."""
    for signum, patience in ((signal.SIGTERM, _END_S), (signal.SIGKILL, 0.0)):
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signum)
            process.wait(patience)


def _content(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def _cause(errors: str) -> str:
    """Return the line of a program's errors that gives the reason: one of this package, else the last."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    ours = [line for line in lines if line.startswith("resnet_cpu")]
    return (ours or lines or ["no message"])[0 if ours else -1]


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[0]


def file_system(path: str, mounts: str = "/proc/self/mountinfo") -> str:
    """Return the kind of the file system that holds `path`, as the kernel names it."""
    best, kind = -1, "unknown"
    path = os.path.realpath(path)
    try:
        with open(mounts, encoding="utf-8", errors="replace") as file:
            for line in file:
                words, _, about = line.partition(" - ")
                point = re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), words.split()[4])
                inside = path == point or path.startswith(point.rstrip("/") + "/")
                if inside and len(point) >= best:  # of several at one place the last one is seen
                    best, kind = len(point), about.split()[0]
    except (OSError, IndexError):
        pass
    return kind


def nearest(path: str) -> str:
    """Return `path`, or the nearest folder above it that exists."""
    path = os.path.abspath(path)
    while not os.path.isdir(path) and os.path.dirname(path) != path:
        path = os.path.dirname(path)
    return path


def written_folder(path: str) -> Folder:
    """Return the facts of a folder that is written to, after writing, flushing, renaming and locking a file there.

    What was written is removed. If the folder does not exist, the nearest one above it is tried.
    """
    folder = nearest(path)
    found = _about(folder)
    try:
        work = tempfile.mkdtemp(prefix=".doctor-", dir=folder)
    except OSError as error:
        return dataclasses.replace(found, error=f"cannot be written ({error.strerror})")
    try:
        name = os.path.join(work, "file")
        began = time.time()
        write_atomically(name, b"x" * 4096)
        ended = time.time()
        stamp = os.stat(name).st_mtime
        ahead = stamp - ended if stamp > ended else min(0.0, stamp - began)
        with open(name, "rb+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                without_locks = ""
            except OSError as error:
                without_locks = error.strerror or str(error)
    except OSError as error:
        return dataclasses.replace(found, error=f"a file could not be written and renamed ({error.strerror})")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    others = others_may_write(folder) if folder == os.path.abspath(path) else ""
    return dataclasses.replace(found, ahead=ahead, without_locks=without_locks, others=others)


def run_folder(path: str) -> Folder:
    """Return the facts of a folder for a run, see `written_folder`; without trying it if `train` would refuse it."""
    why = refused(path)
    return dataclasses.replace(_about(nearest(path)), path=path, error=why) if why else written_folder(path)


def read_folder(path: str) -> Folder:
    """Return the facts of a folder that is read from, with the rate at which its largest files are read."""
    found = _about(path)
    try:
        if not os.path.isdir(path):
            raise FileNotFoundError(2, "no such folder")
        sizes = sorted(_files(path), reverse=True)
        if not sizes:
            return dataclasses.replace(found, error="holds no file")
        return dataclasses.replace(found, rate=_rate([name for _, name in sizes]))
    except OSError as error:
        return dataclasses.replace(found, error=f"cannot be read ({error.strerror})")


def _about(path: str) -> Folder:
    try:
        room = os.statvfs(path)
    except OSError:
        return Folder(path, file_system(path))
    files = room.f_favail if room.f_files else None  # some file systems do not count them
    return Folder(path, file_system(path), room.f_bavail * room.f_frsize, files)


def _files(path: str) -> Iterator[Tuple[int, str]]:
    """Yield size and name of the first files below a folder."""
    count = 0
    for folder, _, names in os.walk(path, onerror=_raise):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # a link that leads nowhere, or a file that was removed since
                about = os.stat(os.path.join(folder, name))
                if stat.S_ISREG(about.st_mode):
                    yield about.st_size, os.path.join(folder, name)
            count += 1
            if count == _LARGEST_OF:
                return


def _raise(error: OSError) -> None:
    raise error


def _rate(names: List[str]) -> Optional[float]:
    """Return the MB/s at which files are read, in this order, for two seconds or 256 MiB; None below one MiB.

    Pages that the kernel holds are dropped first, as far as it does so.
    """
    done, began = 0, time.monotonic()
    for name in names:
        with open(name, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while True:
                count = len(file.read(_BLOCK))
                done += count
                if time.monotonic() - began > _READ_S or done >= _READ_BYTES:
                    return done / 1e6 / max(1e-9, time.monotonic() - began)
                if count == 0:
                    break
    return done / 1e6 / max(1e-9, time.monotonic() - began) if done >= _BLOCK else None
