"""What a run is made of, as frozen dataclasses: `flags.py` fills them, everything below reads them."""

import dataclasses
from typing import Optional, Tuple

from resnet_cpu.recipe.phases import PhaseText


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
    conv1_bias: bool
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
    order_block: int  # records
    data_threads: int  # 0: as many as the rank has cores


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How it is trained; the phases are still texts, since steps depend on the ranks and the data."""

    phases: Tuple[PhaseText, ...]
    batch_size: Optional[int]  # images per rank
    global_batch_size: Optional[int]  # images
    lr_scaling: str
    wd_on_bn: bool
    seed: int


@dataclasses.dataclass(frozen=True)
class Run:
    """What is recorded, where and how often."""

    experiment: str
    run_dir: Optional[str]
    resume: str
    max_steps: Optional[int]
    eval_every_epochs: float
    eval_batch_size: Optional[int]
    checkpoint_every_steps: int
    keep_checkpoints: int
    log_every_steps: int


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
