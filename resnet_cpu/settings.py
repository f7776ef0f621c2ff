"""What a run is made of, as frozen dataclasses: `flags.py` fills them, everything below reads them."""

import dataclasses
import sys
from typing import Dict, Optional, Tuple

from resnet_cpu.errors import FlagError
from resnet_cpu.recipe import batch as batch_rule
from resnet_cpu.recipe import phases
from resnet_cpu.recipe.phases import Phase, PhaseText

#: name -> (blocks of each stage, whether blocks are bottlenecks)
DEPTHS: Dict[str, Tuple[Tuple[int, ...], bool]] = {
    "resnet18": ((2, 2, 2, 2), False),
    "resnet34": ((3, 4, 6, 3), False),
    "resnet50": ((3, 4, 6, 3), True),
    "resnet101": ((3, 4, 23, 3), True),
    "resnet152": ((3, 8, 36, 3), True),
}


@dataclasses.dataclass(frozen=True)
class Model:
    """The network (see `resnet_cpu.model.resnet.resnet`)."""

    model: str
    width: float
    stem: str
    stride_in: str
    padding: str
    zero_gamma: str
    bn_momentum: float
    bn_epsilon: float
    bn_stats_batch: Optional[int]  # images; None: all that a rank holds
    conv1_bias: bool
    precision: str
    num_classes: int


@dataclasses.dataclass(frozen=True)
class Data:
    """Where the images come from and what is done to them."""

    dataset: str
    data_dir: Optional[str]
    train_examples: Optional[int]  # None: all there are
    image_size: int  # pixels
    resize: str
    normalization: str
    eval_crop: float  # share of the short side
    crop: str
    crop_area: Tuple[float, float]  # share of the image, least and most
    crop_aspect: Tuple[float, float]
    order_block: int  # records
    data_threads: int  # 0: as many as the rank has cores


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How it is trained; the phases are still texts, since steps depend on the ranks and the data."""

    phases: Tuple[PhaseText, ...]
    batch_size: Optional[int]  # images per rank
    global_batch_size: Optional[int]  # images
    accumulate_steps: int  # micro-batches a rank and step; 0: as many as the global batch needs
    lr_scaling: str
    optimizer: str
    lars_eta: float
    momentum_correction: bool
    label_smoothing: float
    wd_on_bn: bool
    seed: int


@dataclasses.dataclass(frozen=True)
class Run:
    """What is recorded, where and how often."""

    experiment: str
    run_dir: Optional[str]
    resume: str
    init_from: Optional[str]
    max_steps: Optional[int]
    eval_every_epochs: float
    eval_batch_size: Optional[int]
    checkpoint_every_steps: int
    keep_checkpoints: int
    log_every_steps: int
    untimed_steps: int  # of an attempt, in mode scaling
    profile_steps: Optional[Tuple[int, int]]  # first and last, counted from 0


@dataclasses.dataclass(frozen=True)
class System:
    """How the job sits on the machine."""

    ranks: Optional[int]  # expected; None: whatever the launcher started
    threads: int  # per rank; 0: as many as the rank has cores
    stall_timeout: float  # seconds


@dataclasses.dataclass(frozen=True)
class Settings:
    """All of it, and the flagfile text that gives it again."""

    model: Model
    data: Data
    recipe: Recipe
    run: Run
    system: System
    resolved_flags: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the recipe comes to on so many ranks and examples."""

    phases: Tuple[Phase, ...]
    batch: batch_rule.Batch


def depths_of(model: str) -> Tuple[Tuple[int, ...], bool]:
    """Return (blocks of each stage, whether blocks are bottlenecks); raise FlagError for an unknown network."""
    if model not in DEPTHS:
        raise FlagError(f"--model={model}: unknown; use one of {', '.join(DEPTHS)}")
    return DEPTHS[model]


def plan(settings: Settings, ranks: int, train_examples: int) -> Plan:
    """Return the recipe in steps; raise FlagError for what does not fit together."""
    recipe = settings.recipe
    batch = batch_rule.resolve_batch(recipe.batch_size, recipe.global_batch_size, ranks, recipe.accumulate_steps)
    batch_rule.check_statistics(settings.model.bn_stats_batch, batch)
    planned = phases.plan(
        recipe.phases,
        train_examples=train_examples,
        global_batch_size=batch.total,
        lr_scaling=recipe.lr_scaling,
        image_size=settings.data.image_size,
    )
    _check_mode(settings, planned)
    return Plan(planned, batch)


def _check_mode(settings: Settings, planned: Tuple[Phase, ...]) -> None:
    """Raise FlagError for what the mode needs and the recipe has not."""
    mode, members = settings.run.experiment, [phase.name for phase in planned if phase.member]
    if mode == "collapsed_ensemble" and len(members) < 2:
        raise FlagError(
            f"--experiment={mode}: needs two members at least, the recipe has {len(members)}; mark phases with member=1"
        )
    steps = min(sum(phase.steps for phase in planned), settings.run.max_steps or sys.maxsize)
    if mode == "scaling" and steps < settings.run.untimed_steps + 2:
        raise FlagError(
            f"--experiment={mode}: times the steps after the first --untimed_steps={settings.run.untimed_steps}, but "
            f"there are only {steps} in all; lower it, or train longer"
        )
    if mode == "lr_scaling" and not settings.run.eval_every_epochs:
        raise FlagError(f"--experiment={mode}: records top-1 over epochs; set --eval_every_epochs above 0")
