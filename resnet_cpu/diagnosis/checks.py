"""Judge facts about this machine: one `Check` each, with the remedy. Nothing is read here."""

import re
from typing import Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from resnet_cpu.cluster import environment as environments
from resnet_cpu.cluster import launchers, machine, precision
from resnet_cpu.diagnosis.facts import Folder, Handshake
from resnet_cpu.errors import FlagError, printable

_YEARS = (2026, 2100)  # of a clock that is right: this version was written in the first
_INSTALL = "source .venv/bin/activate, or make setup"
_REBUILD = "load one MPI module, rm -rf .venv-intel .venv-current (or your VENV) and make setup (BUILD_NOTES.md)"
_MIB = 2**20
_OPEN_FILES = 1024  # shards, libraries and connections to other ranks
_LOCKED_MEMORY = 64 * _MIB  # what the libraries of InfiniBand and Omni-Path register is locked
_CHECKPOINTS = 3 * 205e6  # bytes: ResNet-50's weights and velocity; two are kept while one is written
_TEMPORARY = 100 * _MIB
_IMAGE = 0.11  # MB, mean of ImageNet's JPEG files
_IMAGES_PER_CORE = 10  # images/s that a fast core trains on (docs/benchmarks.md: bfloat16 with AMX)
_CLOCKS_DIFFER = 2.0  # seconds
# Variables that another launcher, or another use of this shell, left behind -> what they do and how to get rid of it.
_LEFT_BEHIND = {
    launchers.EXPECTED_RANKS: "a process that is started by hand would look for that number of ranks; unset it",
    "MPI4PY_RC_THREAD_LEVEL": "MPI may start without the thread support that Horovod needs; unset it",
    "HOROVOD_GLOO_RENDEZVOUS_ADDR": "left by the launcher of Horovod, which is not used here; unset it",
    "HOROVOD_ELASTIC": "left by the launcher of Horovod, which is not used here; unset it",
    "RESNET_CPU_OVERSUBSCRIBE": "more ranks than cores would be started without an error; unset it",
}


class Check(NamedTuple):
    """The outcome of a check."""

    name: str
    state: str  # "ok", "warning" or "problem"
    what: str
    remedy: str = ""

    def line(self) -> str:
        """Return the check as one line for people."""
        return printable(f"{self.state:8} {self.name}: {self.what}" + (f"; {self.remedy}" if self.remedy else ""))


def satisfies(version: str, wanted: str) -> bool:
    """Return whether a version is within a range such as `>=2.15.1,<2.22`, by its numbers alone."""
    for operator, limit in re.findall(r"(>=|<=|==|!=|<|>)\s*([\d.]+)", wanted):
        one, other = (re.findall(r"\d+", re.sub(r"[^\d.].*", "", text)) for text in (version, limit))
        width = max(len(one), len(other))
        mine, theirs = (tuple(map(int, [*numbers, *["0"] * (width - len(numbers))])) for numbers in (one, other))
        held = {
            ">=": mine >= theirs,
            "<=": mine <= theirs,
            "==": mine == theirs,
            "!=": mine != theirs,
            "<": mine < theirs,
            ">": mine > theirs,
        }
        if not held[operator]:
            return False
    return True


def python(version: str, wanted: str) -> Check:
    """Check the interpreter against the range of setup.cfg."""
    if satisfies(version, wanted):
        return Check("python", "ok", version)
    return Check("python", "problem", f"{version} is outside {wanted}", "PYTHON=/path/to/python3 make setup")


def packages(
    installed: Mapping[str, Optional[str]],
    required: Mapping[str, str],
    stack: str,
    pinned: Mapping[str, str],
    broken: Mapping[str, str],
) -> Check:
    """Check packages against the ranges of setup.cfg, and against the versions with which their stack was tested.

    `broken` are packages that are installed and do not load: name -> error.
    """
    missing = [name for name in required if installed.get(name) is None]
    wrong = _outside(installed, required)
    if missing:
        return Check("packages", "problem", f"not installed here: {', '.join(missing)}", _INSTALL)
    if broken:
        named = ", ".join(f"{name} ({error})" for name, error in broken.items())
        return Check("packages", "problem", f"installed, but not loading: {named}", "make setup, in a new environment")
    if wrong:
        return Check("packages", "problem", f"outside setup.cfg: {', '.join(wrong)}", "make setup")
    named = ", ".join(f"{name} {installed[name]}" for name in required)
    if not stack:
        return Check("packages", "ok", f"TensorFlow without the Intel extension: {named}")
    other = _outside(installed, pinned)
    if other:
        remedy = f"pip install --no-deps --require-hashes -r requirements/{stack}.txt, then pip check"
        return Check("packages", "warning", f"not what the stack {stack} was tested with: {', '.join(other)}", remedy)
    return Check("packages", "ok", f"the stack {stack}: {named}")


def _outside(installed: Mapping[str, Optional[str]], wanted: Mapping[str, str]) -> List[str]:
    """Return `name version (range)` for each installed package that is outside its range."""
    found = ((name, installed.get(name), limits) for name, limits in wanted.items())
    return [f"{name} {have} ({limits})" for name, have, limits in found if have and not satisfies(have, limits)]


def mpirun(path: Optional[str], version: str, in_batch_job: bool, has_srun: bool, has_horovod: bool) -> Check:
    """Check the launcher of ranks in PATH; `version` is what it prints with --version."""
    if path is None and has_srun:
        what = "not in PATH; srun can start ranks, inside a batch job"
        return Check("mpirun", "warning", what, "load your site's MPI module for ranks on this host")
    if path is None:
        what = "not in PATH; one process trains without it, several ranks do not"
        state = "problem" if has_horovod else "warning"
        return Check("mpirun", state, what, "load your site's MPI module, or run make setup")
    first = (version.strip().splitlines() or ["no version"])[0].replace("mpirun (Open MPI)", "Open MPI")
    try:
        launcher = launchers.recognise(version, in_batch_job, False, has_srun)
    except FlagError as error:
        return Check("mpirun", "problem", f"{path}: {error}")
    return Check("mpirun", "ok", f"{first}, {path} (--mpi={launcher})")


def ranks(outcome: Handshake) -> Check:
    """Check whether two ranks that the package's launcher started have exchanged a vector."""
    stage = outcome.stages.get("mpi")
    if outcome.skipped:
        return Check("ranks", "ok", "not tried (--quick)")
    if outcome.alone:
        return Check("ranks", "warning", "not tried, since mpirun or mpi4py is missing")
    if stage:
        what = f"two ranks added a vector, {stage['seconds']:.1f} s after Python had started; mpi4py uses "
        return Check("ranks", "ok", f"{what}{stage['library']}{_paths(stage['loaded'])}")
    if outcome.code is None:
        remedy = "choose another network with launch --interface=NAME, or see the symptoms in BUILD_NOTES.md"
        return Check("ranks", "problem", f"two ranks did not reach each other in {outcome.limit:g} s", remedy)
    return Check("ranks", "problem", f"two ranks did not start: {outcome.error}", _REBUILD)


def tensorflow(outcome: Handshake) -> Check:
    """Check whether TensorFlow loads."""
    stage = outcome.stages.get("tensorflow", {})
    if "error" in stage:
        return Check("tensorflow", "problem", f"does not load: {stage['error']}", "make setup, in a new environment")
    if stage:
        return Check("tensorflow", "ok", f"{stage['version']} loads in {stage['seconds']:.1f} s")
    return _not_reached("tensorflow", outcome)


def horovod(
    version: Optional[str], built_for: str, libraries: Sequence[str], tensorflow: Optional[str], outcome: Handshake
) -> Check:
    """Check how Horovod was built, and whether two ranks averaged a vector with it.

    `built_for` is the TensorFlow it was compiled for, `libraries` are the MPI libraries that it names.
    """
    if version is None:
        return Check(
            "horovod", "warning", "not installed; one process trains without it, several ranks do not", _INSTALL
        )
    about = f"{version} for TensorFlow {built_for or 'unknown'}, with {', '.join(libraries) or 'no MPI'}"
    if not libraries:
        return Check("horovod", "problem", f"{about}: built without MPI", _REBUILD)
    if tensorflow and built_for and built_for != tensorflow:
        return Check("horovod", "problem", f"{about}, but TensorFlow {tensorflow} is installed", "make setup")
    stage = outcome.stages.get("horovod", {})
    if "error" in stage:
        return Check("horovod", "problem", f"{about}, does not work: {stage['error']}", _REBUILD)
    if not stage:
        missed = _not_reached("horovod", outcome)
        return missed._replace(what=f"{about}: {missed.what}")
    if len(stage["loaded"]) > 1:
        what = f"{about}: mpi4py and Horovod have loaded two MPIs: {', '.join(stage['loaded'])}"
        return Check("horovod", "problem", what, _REBUILD)
    return Check("horovod", "ok", f"{about}: two ranks added a vector{_paths(stage['loaded'])}")


def _not_reached(name: str, outcome: Handshake) -> Check:
    """Return the check of a stage that the handshake did not finish, and that reported no error."""
    if outcome.skipped:
        return Check(name, "ok", "not tried (--quick)")
    if not outcome.alone and "mpi" not in outcome.stages:
        return Check(name, "warning", "not tried, since two ranks did not start")
    if outcome.code is None:
        remedy = "if the environment is on a shared file system, put it on a local disk; or wait for other work to end"
        return Check(name, "warning", f"not loaded within {outcome.limit:g} s", remedy)
    if outcome.code:
        return Check(name, "problem", f"the process ended with {outcome.code}: {outcome.error}", _REBUILD)
    return Check(name, "warning", "not tried, since TensorFlow, mpirun or mpi4py is missing")


def _paths(paths: Sequence[str]) -> str:
    return f" ({', '.join(paths)})" if paths else ""


def processor(
    model: str, instruction_sets: Sequence[str], intel_extension: bool, bfloat16_speed: Optional[float]
) -> Check:
    """Check the instruction sets, and report what they and `bfloat16_speed` (`precision.known`) mean."""
    about = f"{model or 'unknown'}: {', '.join(instruction_sets) or 'none of AVX2, AVX-512 and AMX'}"
    refused = machine.precision_problem("bfloat16", instruction_sets, intel_extension)
    if refused:
        remedy = "use float32, the default, and layers of 8 channels or more; or the stack current (docs/stacks.md)"
        return Check("processor", "warning", f"{about}; --precision=bfloat16 is refused: {refused}", remedy)
    if not instruction_sets:
        return Check("processor", "warning", about, "training is slow here, and was not tried on such a processor")
    chosen, reason = precision.advice(instruction_sets, bfloat16_speed)
    return Check("processor", "ok", f"{about}; precision: {chosen} ({reason})")


def cores(online: int, allowed: Sequence[int], physical: int, quota: Optional[float]) -> Check:
    """Check the CPUs that this process may use, and the limits of its control group."""
    about = f"{physical} core{'s' * (physical != 1)}, CPUs {machine.spans(allowed)} of {online}"
    if quota is not None and quota < physical:
        remedy = "launch starts only as many threads; for more, raise the limit of the container or batch job"
        return Check("cores", "warning", f"{about}; the cgroup grants the time of {quota:g} CPUs", remedy)
    if 2 * len(allowed) < online:
        remedy = "correct if the host is shared; else ask for the whole node (--exclusive, --cpus-per-task)"
        return Check("cores", "warning", f"{about}: this shell is bound to a part of the host", remedy)
    return Check("cores", "ok", about)


def threads(exported: Mapping[str, str], refused: str, proposed: int) -> Check:
    """Check the exported numbers of threads against those that the launcher would choose."""
    if refused:
        return Check("threads", "problem", refused)
    other = [name for name, value in exported.items() if _overrides(name, int(_first(value)), proposed)]
    named = ", ".join(f"{name}={exported[name]}" for name in other or exported)
    if other:
        what = f"{named} in your environment overrides the {proposed} per rank that launch would choose"
        remedy = f"unset {' '.join(other)}"
        if "OMP_THREAD_LIMIT" not in other:  # which --threads leaves as it is
            remedy += ", or give --threads"
        return Check("threads", "warning", what, remedy)
    return Check("threads", "ok", named or f"none exported; launch would choose {proposed} per rank")


def _overrides(name: str, number: int, proposed: int) -> bool:
    """Return whether an exported number of threads takes the place of `proposed` threads per rank."""
    if name == "OMP_THREAD_LIMIT":
        return number < proposed
    return name != "TF_NUM_INTEROP_THREADS" and number != proposed


def _first(numbers: str) -> str:
    return numbers.split(",")[0].strip()


def memory(total: int, per_rank: float) -> Check:
    """Check whether a rank of ResNet-50 at 224x224 and batch 32 fits into the machine or its control group."""
    if not total:
        return Check("memory", "warning", "unknown; the kernel does not report it")
    about = f"{total / 2**30:.1f} GiB, of the machine or its cgroup"
    if total < per_rank:
        remedy = "choose a smaller --batch_size with --accumulate_steps, or raise the limit"
        return Check("memory", "warning", f"{about}; ResNet-50 takes {per_rank / 2**30:.1f} GiB at batch 32", remedy)
    return Check("memory", "ok", about)


def shared_memory(path: str, size: Optional[Tuple[int, int]], refused: str) -> Check:
    """Check the file system of MPI's messages on one host; `size` are its total and free bytes."""
    if size is None:
        return Check("shared_memory", "warning", f"{path} is missing", "mount it: MPI uses it between ranks of a host")
    if refused:
        return Check("shared_memory", "problem", refused)
    return Check("shared_memory", "ok", f"{path}: {size[1] / _MIB:,.0f} of {size[0] / _MIB:,.0f} MiB free")


def placement(ranks: int, threads: int, reason: str, allocator: Optional[str]) -> Check:
    """Report how many ranks the launcher would start on this host, and whether it finds a fast allocator."""
    about = (
        f"launch would start {ranks} rank{'s' * (ranks != 1)} of {threads} thread{'s' * (threads != 1)} each: {reason}"
    )
    if allocator is None:
        remedy = "install libtcmalloc-minimal4 (gperftools): it makes training a few percent faster"
        return Check("placement", "warning", f"{about}; tcmalloc was not found", remedy)
    return Check("placement", "ok", f"{about}; allocator {allocator}")


def limits(open_files: Optional[int], memory: Optional[int], locked: Optional[int], has_fabric: bool) -> Check:
    """Check the limits of `ulimit`; None means unlimited."""
    found, remedies = [], []
    for value, least, name, unit, flag in (
        (open_files, _OPEN_FILES, "open files", 1, "-n 4096"),
        (memory, None, "KiB of address space", 1024, "-v unlimited"),
        (locked, _LOCKED_MEMORY if has_fabric else 0, "KiB of locked memory", 1024, "-l unlimited"),
    ):
        if value is not None and (least is None or value < least):
            found.append(f"{value // unit} {name}")
            remedies.append(f"ulimit {flag}")
    if found:
        return Check("limits", "warning", f"only {', '.join(found)}", " and ".join(remedies))
    return Check("limits", "ok", f"{'unlimited' if open_files is None else open_files} open files")


def environment(environ: Mapping[str, str], announced: int) -> Check:
    """Check the exported variables; `announced` is the number of ranks that a launcher reports in them."""
    left = [f"{name}={environ[name]}: {what}" for name, what in _LEFT_BEHIND.items() if environ.get(name)]
    try:
        environments.settle(dict(environ))
    except FlagError as error:
        return Check("environment", "problem", str(error))
    if environ.get(launchers.EXPECTED_RANKS) or environ.get("MPI4PY_RC_THREAD_LEVEL"):
        return Check("environment", "problem", "; ".join(left))
    if announced > 1:
        left.append(f"this shell is one of {announced} ranks that a launcher started; use a plain shell")
    found = [*left, *(line[len("warning: ") :] for line in environments.remarks(environ) if line.startswith("warning"))]
    if found:
        return Check("environment", "warning", "; ".join(found))
    return Check("environment", "ok", "no exported variable changes what is computed")


def mpi_parameters(found: Mapping[str, str]) -> Check:
    """Report the parameters in the user's file of Open MPI that affect messages."""
    path = environments.MPI_PARAMETERS
    if not found:
        return Check("mpi_parameters", "ok", f"{path} sets none that affects messages")
    named = ", ".join(f"{name}={value}" for name, value in found.items())
    remedy = "remove them unless you mean them"
    return Check("mpi_parameters", "warning", f"Open MPI obeys {path}: {named}; results may depend on it", remedy)


def clock(year: int, offsets: Mapping[str, float]) -> Check:
    """Check the clock, and by how many seconds the time stamps of file systems are ahead of it: path -> seconds."""
    if not _YEARS[0] <= year < _YEARS[1]:
        return Check("clock", "problem", f"the year is {year}", "set the clock, as with NTP")
    apart = [f"{path} by {offset:+.0f} s" for path, offset in offsets.items() if abs(offset) > _CLOCKS_DIFFER]
    if apart:
        remedy = "synchronise them with NTP; until then the times in logs of several hosts cannot be compared"
        return Check("clock", "warning", f"the time stamps of files differ from it: {', '.join(apart)}", remedy)
    return Check("clock", "ok", f"{year}, and the time stamps of files agree")


def tmp(folder: Folder) -> Check:
    """Check the folder of temporary files, in which MPI keeps its sessions."""
    return _written("tmp", folder, _TEMPORARY, "set TMPDIR to a local folder that you can write to")


def run_dir(folder: Folder) -> Check:
    """Check the folder of a run: whether it can be written, flushed, renamed in and locked, and its free space."""
    found = _written("run_dir", folder, _CHECKPOINTS, "choose another folder")
    if found.state != "problem" and folder.others:
        remedy = "chmod o-w, or choose a folder of your own (SECURITY.md)"
        return Check("run_dir", "warning", f"{_about(folder)}: {folder.others}", remedy)
    if found.state != "problem" and folder.kind in ("tmpfs", "ramfs"):
        return Check("run_dir", "warning", f"{_about(folder)}: in memory, lost at a restart", "choose a disk")
    return found


def _written(name: str, folder: Folder, needed: float, remedy: str) -> Check:
    if folder.error:
        return Check(name, "problem", f"{_about(folder)}: {folder.error}", remedy)
    if folder.free < needed or folder.files == 0:
        what = f"{_about(folder)}: room for {needed / 1e6:,.0f} MB and new files is needed"
        return Check(name, "problem", what, remedy)
    if folder.without_locks:
        what = f"{_about(folder)}: no file locks ({folder.without_locks})"
        return Check(name, "warning", what, "a lock file with a heartbeat is used; mount it with flock if you can")
    return Check(name, "ok", f"{_about(folder)}; written, flushed, renamed and locked")


def data_dir(folder: Folder, cores: int) -> Check:
    """Check the folder of the shards: whether it is read as fast as `cores` cores can train."""
    if folder.error:
        return Check(
            "data_dir", "problem", f"{_about(folder)}: {folder.error}", "correct --data_dir or its permissions"
        )
    if folder.rate is None:
        return Check("data_dir", "ok", f"{_about(folder)}; too small to time reading")
    about = f"{_about(folder)}; read at {folder.rate:,.0f} MB/s, {folder.rate / _IMAGE:,.0f} images of 110 kB a second"
    if folder.rate < _IMAGE * _IMAGES_PER_CORE * cores:
        remedy = "copy the shards to a local disk (launch/stage.sh)"
        return Check("data_dir", "warning", f"{about}: less than {cores} fast cores may train on", remedy)
    return Check("data_dir", "ok", about)


def _about(folder: Folder) -> str:
    if folder.error and not folder.free:  # it does not exist, or its error says that the disk is full
        return folder.path
    return f"{folder.path} on {folder.kind}, {folder.free / 1e9:,.1f} GB free"


def summary(found: Sequence[Check]) -> Dict[str, object]:
    """Return all checks and the numbers of problems and warnings, as JSON has them."""
    states = [check.state for check in found]
    return {
        "checks": [check._asdict() for check in found],
        "problems": states.count("problem"),
        "warnings": states.count("warning"),
    }
