"""Every setting, exactly once: a field with its default, bounds, help, the commands that take it, and what it decides.

`commandline.py` derives flags, `--help` and docs/flags.md from the fields, `run/signature.py` what two runs must have
in common. A new setting is one field here, or in `command_settings.py` if a single command takes it, and its use.
`fields.setting` explains the arguments.
"""

import dataclasses
from typing import Dict, FrozenSet, Optional, Tuple

from resnet_cpu.command_settings import Benchmark, Doctor, Evaluate, Launch, Prediction, Prepare, Simulate, Tables
from resnet_cpu.errors import FlagError
from resnet_cpu.fields import parse_crop, parse_phases, parse_steps, setting
from resnet_cpu.recipe.batch import MOST_PER_RANK, SCALINGS
from resnet_cpu.recipe.phases import LARGEST_IMAGE, LEAST_IMAGE, PhaseText

#: Commands that take the settings of a run.
OF_A_RUN = ("train", "evaluate", "benchmark", "plan", "simulate")

_THREADS = 2**12  # more are a mistake

#: name -> (blocks of each stage, whether blocks are bottlenecks)
DEPTHS: Dict[str, Tuple[Tuple[int, ...], bool]] = {
    "resnet18": ((2, 2, 2, 2), False),
    "resnet34": ((3, 4, 6, 3), False),
    "resnet50": ((3, 4, 6, 3), True),
    "resnet101": ((3, 4, 23, 3), True),
    "resnet152": ((3, 8, 36, 3), True),
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """recipe: what is trained when, and at which rate"""

    phases: Tuple[PhaseText, ...] = setting(
        (),
        "A phase of the recipe, NAME:key=value,... Repeat the flag for more phases; a later one of the same NAME "
        "replaces the earlier one in place. Required keys: a length (steps or epochs) and a peak learning rate (lr or "
        "lr_per_256). docs/phases.md lists all keys.",
        flag="phase",
        parse=parse_phases,
    )
    batch_size: Optional[int] = setting(None, "Images per rank and step (default 32).", low=1, high=MOST_PER_RANK)
    global_batch_size: Optional[int] = setting(
        None, "Images per step over all ranks, instead of --batch_size.", low=1, high=10**8
    )
    accumulate_steps: int = setting(
        1,
        "Micro-batches per rank whose gradients are averaged before each update, to train with a large global batch on "
        "few ranks. 0: as many as --global_batch_size needs; 1 without it.",
        low=0,
        high=10**6,
    )
    lr_scaling: str = setting("linear", "How lr_per_256 grows with the global batch.", choices=SCALINGS)
    optimizer: str = setting(
        "sgd",
        "sgd: momentum SGD with weight decay in the gradient; lars: the same with a learning rate per layer.",
        choices=("sgd", "lars"),
        decides=True,
    )
    momentum_correction: bool = setting(
        False, "Rescale the velocity when the learning rate changes (Goyal et al., 1706.02677).", decides=True
    )
    nesterov: bool = setting(False, "Use Nesterov momentum.", decides=True)
    exchange: str = setting(
        "float32",
        "Type in which gradients are sent between ranks. bfloat16 halves the messages; sums are float32 "
        "(docs/scaling.md).",
        choices=("float32", "bfloat16"),
        decides=True,
    )
    label_smoothing: float = setting(
        0.0,
        "Share of the label spread evenly over all classes in training. Logged losses exclude it.",
        low=0.0,
        high=0.99,
        decides=True,
    )
    wd_on_bn: bool = setting(False, "Apply weight decay to gamma and beta of batch norm as well.", decides=True)
    seed: int = setting(
        0,
        "Seed of initial weights, order and augmentation. prepare: of the order of the images in the shards.",
        low=0,
        high=2**31 - 1,
        decides=True,
        also=("prepare",),
    )


@dataclasses.dataclass(frozen=True)
class Data:
    """data: where the images come from and how they are viewed"""

    dataset: str = setting(
        "imagenet",
        "imagenet, tiny_imagenet, folder (any tree of image folders), fashion_mnist, digits, synthetic, or tfds:NAME "
        "for an image-classification set prepared by TFDS.",
        decides=True,
        also=("prepare",),
    )
    data_dir: Optional[str] = setting(
        None,
        "Folder of the shards, as python -m resnet_cpu.prepare, TF-slim (imagenet) or TFDS write them. Not needed for "
        "synthetic data.",
        also=("prepare", "doctor"),
        path=True,
    )
    eval_split: str = setting(
        "auto",
        "Split to evaluate on. auto: validation, else test; none: train without evaluation; or the name of any split "
        "of the data set.",
        decides=True,
    )
    train_examples: Optional[int] = setting(
        None, "Training examples to use, counted from the first (default: all).", low=1, high=10**9, decides=True
    )
    image_size: int = setting(
        None,
        "Side of the square input image, pixels (default: that of the data set).",
        low=LEAST_IMAGE,
        high=LARGEST_IMAGE,
    )
    resize: str = setting("bilinear", "Interpolation of images.", choices=("bilinear", "bicubic"), decides=True)
    normalization: str = setting(
        "auto",
        "Mean and scale applied to pixels 0..255. dataset: measured mean and deviation of the training pixels; "
        "authors: BGR, -104/117/123, /128; torch: RGB, mean and deviation of ImageNet; tf: -1..1. auto: authors for "
        "imagenet, else dataset if measured, else tf.",
        choices=("auto", "dataset", "authors", "torch", "tf"),
        decides=True,
    )
    crop: str = setting(
        "inception",
        "Random crop of augment=full, NAME or NAME:LEAST,MOST with the range of its area as shares of the image "
        "(default 0.08,1). inception: area uniform, aspect ratio log-uniform in 3/4..4/3; authors: as in the authors' "
        "Caffe, aspect ratios up to the square of 4/3.",
        decides=True,
        parse=parse_crop,
        shown="inception",
    )
    crop_area: Tuple[float, float] = dataclasses.field(default=(0.08, 1.0), metadata={"decides": True})  # of --crop
    eval_crop: float = setting(
        None, "Share of the short side used in evaluation (default: the data set's).", low=0.1, high=1.0, decides=True
    )
    bad_records: str = setting(
        "stop",
        "What to do about a training image that is damaged or cannot be decoded. stop: end the run; skip: train on the "
        "next one of the shards instead, and record it. A bad image in evaluation always ends the run.",
        choices=("stop", "skip"),
    )
    max_bad: int = setting(100, "With --bad_records=skip: end the run when a rank has skipped more than this.", low=1)
    data_threads: int = setting(
        0, "Threads for decoding per rank (0: as many as the rank has cores).", low=0, high=_THREADS
    )


@dataclasses.dataclass(frozen=True)
class Model:
    """model: the network"""

    model: str = setting("resnet50", "The network.", choices=tuple(DEPTHS), decides=True)
    width: float = setting(1.0, "Factor on the channels of every layer.", low=0.01, high=16.0, decides=True)
    stem: str = setting(
        "imagenet",
        "imagenet: 7x7 convolution of stride 2 and max pooling; small: 3x3 convolution, for small images.",
        choices=("imagenet", "small"),
        decides=True,
    )
    stride_in: str = setting(
        "3x3",
        "Convolution of a stage's first bottleneck that has stride 2: 3x3 (v1.5) or 1x1 (v1).",
        choices=("3x3", "1x1"),
        decides=True,
    )
    padding: str = setting(
        "symmetric",
        "Padding of strided windows: symmetric (PyTorch, Keras), caffe (the authors': pooling rounded up) or same "
        "(TensorFlow).",
        choices=("symmetric", "caffe", "same"),
        decides=True,
    )
    zero_gamma: str = setting(
        "last",
        "Blocks whose last gamma starts at zero: all, the last of each stage, or none.",
        choices=("all", "last", "none"),
        decides=True,
    )
    bn_momentum: float = setting(
        0.9, "Share of batch norm's moving statistics kept in each step.", low=0.0, high=0.9999, decides=True
    )
    bn_epsilon: float = setting(1e-5, "Added to the variance in batch norm.", low=0.0, high=1.0, decides=True)
    bn_stats_batch: Optional[int] = setting(
        None, "Images per computation of batch norm's statistics (default: all of a rank).", low=2, decides=True
    )
    conv1_bias: bool = setting(False, "Give the first convolution a bias, as in the authors' network.", decides=True)
    precision: str = setting(
        "float32",
        "Type of activations and products; weights, updates and batch norm's statistics stay float32. launch and "
        "doctor say whether bfloat16 is faster on a processor.",
        choices=("float32", "bfloat16"),
        decides=True,
    )
    num_classes: int = setting(None, "Number of classes (default: the data set's).", low=2, high=10**6, decides=True)


@dataclasses.dataclass(frozen=True)
class Run:
    """run: what is recorded, where and how often"""

    experiment: str = setting(
        "train",
        "The mode: which flags are required, and what is recorded at the end.",
        choices=("train", "scaling", "lr_scaling", "collapsed_ensemble"),
    )
    run_dir: Optional[str] = setting(
        None, "Folder of the run; the same command again continues where the run stopped.", also=("doctor",), path=True
    )
    resume: str = setting(
        "auto",
        "auto: resume if there is a checkpoint; never: fail if the folder holds a run; must: fail without checkpoint.",
        choices=("auto", "never", "must"),
    )
    init_from: Optional[str] = setting(
        None,
        "Start from these weights, without their velocity and step: a checkpoint folder, a run folder or an .npz file "
        "of --export. A classifier for other classes keeps its initial values; all other weights must fit.",
        path=True,
    )
    max_steps: Optional[int] = setting(None, "Stop after this step; run again without the flag to continue.", low=1)
    eval_every_epochs: float = setting(
        1.0,
        "Epochs between evaluations (0: only at the end of the run, of members, and of phases without a successor).",
        low=0.0,
    )
    eval_batch_size: Optional[int] = setting(
        None, "Images per rank and evaluation batch (default: --batch_size; evaluate: 32).", low=1, high=MOST_PER_RANK
    )
    checkpoint_every_steps: int = setting(1000, "Steps between checkpoints (0: only at the end of a phase).", low=0)
    keep_checkpoints: int = setting(2, "Number of newest checkpoints to keep.", low=2)
    log_every_steps: int = setting(20, "Steps between rows of metrics.jsonl.", low=1)
    profile_steps: Optional[Tuple[int, int]] = setting(
        None,
        "Steps FIRST,LAST (from 0) to profile on rank 0: profile.csv by operation, and a trace for TensorBoard.",
        parse=parse_steps,
    )


@dataclasses.dataclass(frozen=True)
class System:
    """machine: ranks, threads and timeouts"""

    ranks: Optional[int] = setting(
        None,
        "Ranks that are expected; an error if the launcher started another number. plan: ranks to plan for (default "
        "1). launch: ranks to start.",
        low=1,
        also=("launch",),
    )
    threads: int = setting(
        0,
        "Compute threads per rank (0: as many as the rank has cores). prepare: processes.",
        low=0,
        high=_THREADS,
        also=("launch", "prepare"),
    )
    fused_kernels: str = setting(
        "auto",
        "Train with this package's own kernels (docs/kernels.md). auto: where they can be used; yes: an error if they "
        "cannot; no: TensorFlow's operations.",
        choices=("auto", "yes", "no"),
    )
    stall_timeout: float = setting(
        600.0, "End the job if no step has finished for this many seconds.", low=1.0, high=1e6
    )


#: name in Settings -> (dataclass, commands that take its flags)
GROUPS: Dict[str, Tuple[type, Tuple[str, ...]]] = {
    "recipe": (Recipe, OF_A_RUN),
    "data": (Data, OF_A_RUN),
    "model": (Model, OF_A_RUN),
    "run": (Run, OF_A_RUN),
    "system": (System, OF_A_RUN),
    "evaluate": (Evaluate, ("evaluate",)),
    "benchmark": (Benchmark, ("benchmark",)),
    "prediction": (Prediction, ("plan", "simulate")),
    "simulate": (Simulate, ("simulate",)),
    "launch": (Launch, ("launch",)),
    "prepare": (Prepare, ("prepare",)),
    "tables": (Tables, ("tables",)),
    "doctor": (Doctor, ("doctor",)),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings by group, the names of the flags that were given, and the flagfile text that gives them again."""

    recipe: Recipe
    data: Data
    model: Model
    run: Run
    system: System
    evaluate: Evaluate
    benchmark: Benchmark
    prediction: Prediction
    simulate: Simulate
    launch: Launch
    prepare: Prepare
    tables: Tables
    doctor: Doctor
    given: FrozenSet[str] = dataclasses.field(default=frozenset(), compare=False)
    resolved_flags: str = ""


def depths_of(model: str) -> Tuple[Tuple[int, ...], bool]:
    """Return (blocks of each stage, whether blocks are bottlenecks); raise FlagError for an unknown network."""
    if model not in DEPTHS:
        raise FlagError(f"--model={model}: unknown; use one of {', '.join(DEPTHS)}")
    return DEPTHS[model]


def check(settings: Settings) -> None:
    """Raise FlagError for settings of a run that contradict each other."""
    data, recipe = settings.data, settings.recipe
    if data.dataset == "synthetic" and data.data_dir:
        raise FlagError(f"--data_dir={data.data_dir}: contradicts --dataset=synthetic; remove one of them")
    if recipe.batch_size and recipe.global_batch_size and recipe.global_batch_size % recipe.batch_size:
        raise FlagError(
            f"--batch_size={recipe.batch_size} (per rank) contradicts --global_batch_size={recipe.global_batch_size}, "
            "which is not a multiple of it; remove or change one of them"
        )
    if recipe.optimizer == "lars" and recipe.wd_on_bn:
        raise FlagError("--wd_on_bn: contradicts --optimizer=lars, which never decays gamma and beta; remove it")
