"""The settings of single commands: see `settings.py`, which holds those of a run and brings all of them together."""

import dataclasses
from typing import Dict, Optional, Tuple

from resnet_cpu.fields import parse_count_or_auto, setting

#: Flags of earlier versions -> what to do instead.
REMOVED: Dict[str, str] = {
    "lars_eta": "the trust coefficient is always 0.001; remove the flag",
    "crop_area": "write it into --crop, as in --crop=inception:0.25,1 or --crop=authors:0.25,1",
    "crop_aspect": "the range is always 3/4..4/3; remove the flag",
    "order_block": "records are always read one by one; remove the flag",
    "untimed_steps": "the first 10 steps are never timed; remove the flag",
    "timed_seconds": "give a number of steps with --timed_steps",
    "most_bytes": "messages of up to 256 MiB are timed; remove the flag",
    "output": "--format=png writes plan.png or simulate.png to the current folder",
    "images_per_second": "write --speed=IMAGES_PER_SECOND",
    "past_run": "write --speed=RUN_FOLDER",
    "documents": "marked tables of README.md and of pages in docs/ are always updated; remove the flag",
    "experiments": "the folder experiments/ is always used; run from the root of the project",
    "validate": "run python benchmarks/replay_fit.py FILE",
    "launch_agent": "set the environment variable RESNET_CPU_LAUNCH_AGENT",
    "oversubscribe": "use launch/local.sh, or set RESNET_CPU_OVERSUBSCRIBE=1",
}

SOURCES = ("imagenet", "folder", "tiny_imagenet", "fashion_mnist", "digits", "verify")  # of resnet_cpu.prepare


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """evaluate: what is scored"""

    checkpoint: Optional[str] = setting(None, "Checkpoint to score, instead of the newest of --run_dir.", path=True)
    export: Optional[str] = setting(
        None,
        "Write the scored weights to an .npz file, or to a folder as a SavedModel (pixels in, logits out). With "
        "--ensemble: the mean of the members' weights, to an .npz file.",
        path=True,
    )
    ensemble: bool = setting(
        False,
        "Score the ensemble of the members of --run_dir, or of --members: the mean of their probabilities. "
        "Predictions are kept beside the members' weights.",
    )
    members: Tuple[str, ...] = setting(
        (),
        "With --ensemble: members to combine, separated by commas: folders RUN/members/NAME, or run folders, which "
        "stand for all of their members.",
        path=True,
    )


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """benchmark: what is timed"""

    benchmark: str = setting(
        "synthetic",
        "synthetic: training steps on synthetic images; pipeline: reading and decoding of --data_dir; evaluation: the "
        "forward pass; allreduce: messages between ranks by size.",
        choices=("synthetic", "pipeline", "evaluation", "allreduce"),
    )
    warmup_steps: int = setting(
        3, "Steps (allreduce: messages) that are not timed; the first traces.", low=1, high=10**6
    )
    timed_steps: int = setting(
        20, "Steps that are timed (allreduce: at most this many messages of each size).", low=2, high=10**6
    )


@dataclasses.dataclass(frozen=True)
class Prediction:
    """output: what is printed, and at which speed"""

    format: str = setting(
        "table",
        "Output format; png draws to COMMAND.png (plan.png, simulate.png) in the current folder.",
        choices=("table", "csv", "png"),
    )
    speed: Optional[str] = setting(
        None,
        "Speed to assume: a number of images/s (plan: of all ranks together, for images of image_size; simulate: "
        "of a single node without communication), or the folder of a past run of the same network.",
        path=True,
    )


@dataclasses.dataclass(frozen=True)
class Simulate:
    """simulate: the cluster"""

    nodes: int = setting(1536, "Largest number of nodes; the time to train is estimated for it.", low=1, high=10**6)
    network: str = setting(
        "omnipath",
        "omnipath, infiniband_hdr, ena25, ethernet25, ethernet10, ethernet1, or a JSON file of measured constants "
        "(docs/simulate.md).",
        path=True,
    )


@dataclasses.dataclass(frozen=True)
class Launch:
    """launch: hosts and ranks"""

    ranks_per_node: Optional[int] = setting(
        None,
        "Ranks per host. auto: as the batch job asks, else the number that --tune found best, else one per NUMA "
        "domain (simulate: 2).",
        parse=parse_count_or_auto,
        shown="auto",
        also=("simulate",),
    )
    hosts: Tuple[str, ...] = setting(
        (), "NAME or NAME:SLOTS, separated by commas (default: the hosts of the batch job, or this one)."
    )
    mpi: str = setting(
        "auto",
        "The launcher. auto: ibrun in a batch job that has it, else that of mpirun in PATH, else srun in a batch job.",
        choices=("auto", "openmpi", "intel", "mpich", "ibrun", "srun"),
    )
    interface: Optional[str] = setting(None, "Network interface for TCP, such as eth1 (default: the launcher chooses).")
    dry_run: bool = setting(
        False,
        "launch: print the command line and do not start it. prepare: print what would be written and how long it "
        "would take.",
        also=("prepare",),
    )
    tune: bool = setting(
        False,
        "Time several numbers of ranks on this host, about a minute and a half each, with python -m "
        "resnet_cpu.benchmark and the flags after --, and remember the best one for hosts of this type.",
    )


@dataclasses.dataclass(frozen=True)
class Prepare:
    """prepare: the raw data"""

    source: Optional[str] = None  # the one argument that is not a flag
    raw_dir: Optional[str] = setting(
        None, "Folder of the raw files (fashion_mnist: default is that of the Debian package).", path=True
    )
    short_side: Optional[int] = setting(
        None, "Make larger images this small, pixels of the short side, as 256 (default: keep their sizes).", low=8
    )
    jpeg_quality: int = setting(
        95, "JPEG quality of images that are made smaller or converted; all others keep their bytes.", low=1, high=100
    )
    validation_share: Optional[float] = setting(
        None, "Share of the images for validation, for a tree of folders without one, by a hash.", low=0.001, high=0.9
    )
    allow_incomplete: bool = setting(
        False, "Prepare a set that is not whole, without the images that cannot be decoded."
    )


@dataclasses.dataclass(frozen=True)
class Tables:
    """tables: the runs"""

    runs: Optional[str] = setting(None, "Collect every finished run below this folder first.", path=True)


@dataclasses.dataclass(frozen=True)
class Doctor:
    """doctor: what is checked"""

    quick: bool = setting(False, "Start no ranks, and do not load TensorFlow: one second instead of ten to twenty.")
    json: bool = setting(False, "Print all checks as one JSON document, the last line on standard output.")
