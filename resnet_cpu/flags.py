"""Every flag: its unit, its default, who takes it; from the command line to frozen settings.

A parser of our own stands in front of absl's: errors become exit code 64 with one line, `--help` shows every flag and
exits 0, and no flag is global, so that tests may parse as often as they like.
"""

import difflib
import math
import os
import re
import sys
from typing import Callable, List, Optional, Sequence, Tuple

from absl import flags

from resnet_cpu import settings
from resnet_cpu.data.datasets import DATASETS, facts_of
from resnet_cpu.errors import FlagError
from resnet_cpu.recipe import batch as batch_rule
from resnet_cpu.recipe import phases

EXPERIMENTS = ("train", "scaling", "lr_scaling", "collapsed_ensemble")
OPTIMIZERS = ("sgd", "lars")
CROPS = ("inception", "authors")
NORMALIZATIONS = ("auto", "dataset", "authors", "torch", "tf")
SOURCES = ("fashion_mnist", "digits", "verify")
MPIS = ("auto", "openmpi", "intel", "mpich", "ibrun", "srun")
BENCHMARKS = ("synthetic", "pipeline", "evaluation", "allreduce")
OF_ONE_COMMAND = {
    "checkpoint": "evaluate",
    "export": "evaluate",
    "ensemble": "evaluate",
    "members": "evaluate",
    "format": "plan simulate",
    "output": "plan simulate",
    "images_per_second": "plan simulate",
    "past_run": "plan simulate",
    "runs": "tables",
    "experiments": "tables",
    "documents": "tables",
    "raw_dir": "prepare",
    "benchmark": "benchmark",
    "warmup_steps": "benchmark",
    "timed_steps": "benchmark",
    "most_bytes": "benchmark",
    "timed_seconds": "benchmark",
    "ranks_per_node": "launch simulate",
    "nodes": "simulate",
    "network": "simulate",
    "validate": "simulate",
    "hosts": "launch",
    "mpi": "launch",
    "interface": "launch",
    "launch_agent": "launch",
    "oversubscribe": "launch",
    "dry_run": "launch",
    "tune": "launch",
}

_BEFORE_FLAGS = {"prepare": f" {'|'.join(SOURCES)}"}
_AFTER_FLAGS = {"launch": " -- COMMAND [ARGUMENT ...]"}

Section = Tuple[str, List[str]]
Values = flags.FlagValues


class _Definer:
    """Collects flags in sections, so that `--help` can show them in an order that makes sense."""

    def __init__(self) -> None:
        self.values = flags.FlagValues()
        self.sections: List[Section] = []

    def section(self, title: str) -> None:
        self.sections.append((title, []))

    def __getattr__(self, kind: str) -> Callable:
        define = getattr(flags, f"DEFINE_{kind}")

        def wrapped(name: str, *arguments: object, **keywords: object) -> None:
            define(name, *arguments, flag_values=self.values, **keywords)
            self.sections[-1][1].append(name)

        return wrapped


def _define() -> _Definer:
    d = _Definer()
    d.section("what is run")
    d.enum("experiment", "train", EXPERIMENTS, "The mode: what is recorded and reported at the end.")
    d.multi_string(
        "phase",
        [],
        "A phase of the recipe, NAME:key=value,... (repeat for more; the same NAME again replaces it). "
        "Lengths: steps or epochs; peak LR: lr or lr_per_256; the keys are listed in README.md.",
    )
    d.integer("batch_size", None, "Images per rank and step (default 32).", lower_bound=1)
    d.integer("global_batch_size", None, "Images per step over all ranks, instead of --batch_size.", lower_bound=1)
    d.integer(
        "accumulate_steps",
        1,
        "Batches that a rank sums up before an update, so that few ranks train with a large global batch "
        "(0: as many as --global_batch_size needs).",
        lower_bound=0,
    )
    d.enum("lr_scaling", "linear", batch_rule.SCALINGS, "How lr_per_256 grows with the global batch.")
    d.enum("optimizer", "sgd", OPTIMIZERS, "sgd: momentum SGD with coupled weight decay; lars: with a rate per layer.")
    d.float("lars_eta", 0.001, "lars: trust coefficient, of |w| / (|gradient| + wd * |w|).", 1e-9, 1.0)
    d.boolean("momentum_correction", False, "Scale the velocity with the LR whenever the LR changes (Goyal et al.).")
    d.float(
        "label_smoothing",
        0.0,
        "Share of the label spread evenly over all classes in training; losses are told without it.",
        0.0,
        0.99,
    )
    d.boolean("wd_on_bn", False, "Let gamma and beta of batch norm decay as well.")
    d.integer("seed", 0, "Of initial weights, order and augmentation.", lower_bound=0, upper_bound=2**31 - 1)

    d.section("data")
    d.string(
        "dataset",
        "imagenet",
        f"The data set: {', '.join(DATASETS)}, or tfds:NAME for any image-classification set that TFDS has prepared.",
    )
    d.string(
        "data_dir",
        None,
        "Folder of its shards: made by python -m resnet_cpu.prepare, or (imagenet) as TF-slim or TFDS write them, or "
        "(tfds:NAME) a TFDS data_dir; synthetic needs none.",
    )
    d.integer("train_examples", None, "Train on the first so many examples (default: all).", lower_bound=1)
    d.integer("num_classes", None, "Classes (default: the data set's).", lower_bound=2)
    d.integer(
        "image_size", None, "Pixels of the square image that the network sees (default: the data set's).", lower_bound=8
    )
    d.enum("resize", "bilinear", ["bilinear", "bicubic"], "Interpolation.")
    d.enum(
        "normalization",
        "auto",
        NORMALIZATIONS,
        "Mean and scale of pixels 0..255: dataset (mean and deviation of its training pixels, where measured), authors "
        "(BGR, -104/117/123, /128), torch (RGB, mean and deviation of ImageNet), tf (-1..1); auto is dataset if "
        "measured, else authors for imagenet and tf for others.",
    )
    d.enum(
        "crop",
        "inception",
        CROPS,
        "How augment=full draws its window: inception (area uniform, aspect log-uniform) or authors (area A and c "
        "uniform, height sqrt(A)*c, width sqrt(A)/c, swapped half of the time: aspects up to the square of c).",
    )
    d.string("crop_area", "0.08,1", "Least and most share of the image that augment=full shows.")
    d.string("crop_aspect", "0.75,1.3333", "Least and most width / height of it (--crop=authors: of c).")
    d.float("eval_crop", None, "Share of the short side that evaluation sees (default: the data set's).", 0.1, 1.0)
    d.integer("order_block", 1, "Records that stay together in the random order, for slow random reads.", lower_bound=1)
    d.integer("data_threads", 0, "Threads for decoding, per rank (0: as many as the rank has cores).", lower_bound=0)

    d.section("model")
    d.enum("model", "resnet50", list(settings.DEPTHS), "The network.")
    d.float("width", 1.0, "Factor on every channel count.", 0.01, 16.0)
    d.enum("stem", "imagenet", ["imagenet", "small"], "imagenet: 7x7 stride 2 and pool; small: 3x3, for small images.")
    d.enum("stride_in", "3x3", ["3x3", "1x1"], "Where a stage's first bottleneck strides: 3x3 (v1.5) or 1x1 (v1).")
    d.enum(
        "padding",
        "symmetric",
        ["symmetric", "caffe", "same"],
        "Of strided windows: symmetric (PyTorch, Keras), caffe (the authors': pool rounded up) or same (TensorFlow).",
    )
    d.enum(
        "zero_gamma", "last", ["all", "last", "none"], "Residual branches that start at zero: last is of each stage."
    )
    d.float("bn_momentum", 0.9, "Share of batch norm's moving statistics kept each step.", 0.0, 0.9999)
    d.float("bn_epsilon", 1e-5, "Added to the variance in batch norm.", 0.0, 1.0)
    d.integer(
        "bn_stats_batch",
        None,
        "Images whose statistics batch norm takes at a time (default: all that a rank holds).",
        lower_bound=2,
    )
    d.boolean("conv1_bias", False, "Give the first convolution a bias, as the authors' has.")
    d.enum(
        "precision",
        "float32",
        ["float32", "bfloat16"],
        "Of activations and products; weights, updates and batch norm's statistics stay float32. bfloat16 pays on CPUs "
        "with AMX.",
    )

    d.section("run")
    d.string("run_dir", None, "Folder of this run; made if missing. The same command again goes on where it stopped.")
    d.enum("resume", "auto", ["auto", "never", "must"], "auto: go on if there is a checkpoint; never, must: or fail.")
    d.string(
        "init_from",
        None,
        "Start from these weights, not their velocity or step: a checkpoint folder, a run's folder or an .npz file of "
        "--export. A classifier for other classes stays as initialised; anything else has to fit.",
    )
    d.integer("max_steps", None, "Stop after so many steps of the recipe; a later call goes on.", lower_bound=1)
    d.float("eval_every_epochs", 1.0, "Epochs between evaluations (0: at the end only).", lower_bound=0.0)
    d.integer(
        "eval_batch_size",
        None,
        "Images per rank and evaluation batch (default: --batch_size; evaluate: 32).",
        lower_bound=1,
    )
    d.integer(
        "checkpoint_every_steps", 1000, "Steps between checkpoints (0: at the end of a phase only).", lower_bound=0
    )
    d.integer("keep_checkpoints", 2, "Newest checkpoints that are kept.", lower_bound=2)
    d.integer("log_every_steps", 20, "Steps between rows of metrics.jsonl.", lower_bound=1)
    d.integer(
        "untimed_steps",
        10,
        "--experiment=scaling: steps of an attempt that are not timed. The first of a phase never is: it traces.",
        lower_bound=1,
    )
    d.string(
        "profile_steps",
        None,
        "Steps FIRST,LAST (from 0) to profile on rank 0: profile.csv (time by operation) and a trace for TensorBoard.",
    )
    d.string("checkpoint", None, "evaluate: this checkpoint folder instead of the newest of --run_dir.")
    d.string(
        "export",
        None,
        "evaluate: write the weights that were scored, to an .npz file, or to a folder as SavedModel (pixels in, "
        "logits out). With --ensemble: the mean of the members' weights, to an .npz file.",
    )
    d.boolean(
        "ensemble",
        False,
        "evaluate: score the ensemble of the members of --run_dir, or of --members: the mean of their probabilities, "
        "kept beside their weights.",
    )
    d.list(
        "members",
        [],
        "evaluate --ensemble: these members, separated by commas: folders RUN/members/NAME, or runs, which stand for "
        "all of theirs.",
    )

    d.section("machine")
    d.integer("ranks", None, "Ranks that are expected; plan: ranks to plan for (default 1).", lower_bound=1)
    d.integer("threads", 0, "Compute threads per rank (0: as many as the rank has cores).", lower_bound=0)
    d.float("stall_timeout", 600.0, "Seconds without a finished step after which the job is ended.", lower_bound=1.0)

    d.section("of one command")
    d.enum(
        "benchmark",
        "synthetic",
        BENCHMARKS,
        "benchmark: training steps on synthetic images, reading and decoding alone (--data_dir), the forward pass, or "
        "messages between ranks by their size.",
    )
    d.integer("warmup_steps", 3, "benchmark: steps (messages) that are not timed; the first traces.", lower_bound=1)
    d.integer("timed_steps", 20, "benchmark: steps that are timed; allreduce: messages of each size.", lower_bound=2)
    d.integer("most_bytes", 2**28, "--benchmark=allreduce: largest message, bytes.", lower_bound=1024)
    d.float(
        "timed_seconds",
        None,
        "benchmark: end after so many timed seconds, with fewer than --timed_steps (allreduce: of each size, default "
        "10).",
        lower_bound=1e-3,
    )
    d.enum("format", "table", ["table", "csv", "png"], "plan, simulate: what is printed; png goes to --output.")
    d.float(
        "images_per_second",
        None,
        "plan: speed of all ranks together, to tell the time. simulate: of one node that computes by itself.",
        lower_bound=1e-6,
    )
    d.string("past_run", None, "plan, simulate: take the speed, per rank, from this run of the same network.")
    d.string("output", None, "plan, simulate: file of --format=png (default: plan.png, simulate.png).")
    d.integer("nodes", 1536, "simulate: the most nodes of the curve; training is timed on so many.", lower_bound=1)
    d.string(
        "network",
        "omnipath",
        "simulate: omnipath, infiniband_hdr, ena25, ethernet25, ethernet10, ethernet1, or a JSON file of measured "
        "constants (docs/simulate.md).",
    )
    d.string("validate", None, "simulate: fit latency to some rows of this replay's CSV and predict the others.")
    d.string("runs", None, "tables: collect every finished run below this folder first.")
    d.string("experiments", "experiments", "tables: folder of tables.csv, published.csv and results/.")
    d.list("documents", [], "tables: Markdown files whose marked tables are written anew, separated by commas.")
    d.string(
        "ranks_per_node",
        "auto",
        "launch: ranks a host; auto: as the batch job asks, else what --tune found best, else one a NUMA domain. "
        "simulate: a number; auto is 2.",
    )
    d.list("hosts", [], "launch: NAME or NAME:SLOTS, separated by commas (default: the batch job's, or this one).")
    d.enum("mpi", "auto", MPIS, "launch: the launcher; auto: ibrun in a batch job that has it, else that of mpirun.")
    d.string("interface", None, "launch: network interface for TCP, as in eth1 (default: any that leads elsewhere).")
    d.string("launch_agent", None, "launch: what starts commands on other hosts (default: ssh): PROGRAM HOST COMMAND.")
    d.boolean("oversubscribe", False, "launch: let more ranks than cores share them: right for tests, slow.")
    d.boolean("dry_run", False, "launch: only print the line.")
    d.boolean(
        "tune",
        False,
        "launch: time a few layouts of this host, a minute each, with python -m resnet_cpu.benchmark and the flags "
        "after --, and remember the best one for hosts of this type.",
    )
    d.string("raw_dir", None, "prepare: folder of the raw files (fashion_mnist: default is the Debian package's).")
    return d


_COMMENT = "a comment is a line of its own that starts with # in column 0"


def help_text() -> str:
    """Return what `--help` prints: every flag with its default."""
    definer = _define()
    command = os.path.splitext(os.path.basename(sys.argv[0]))[0]
    lines = [
        f"usage: python -m resnet_cpu.{command}{_BEFORE_FLAGS.get(command, '')} [--flagfile=FILE] [--flag=value ...]"
        + _AFTER_FLAGS.get(command, ""),
        "Later flags win, so overrides go after --flagfile. Switches are --name and --noname.",
    ]
    for title, names in definer.sections:
        lines += ["", f"{title}:"]
        for name in names:
            choices, default, text = _described(definer.values[name])
            shown = f"--{name}" + (f"={'|'.join(choices)}" if choices else "")
            lines.append(f"  {shown}{f' [{default}]' if default else ''}\n      {text}")
    return "\n".join(lines)


def reference() -> str:
    """Return docs/flags.md: every flag with its default, as a Markdown table a section."""
    definer = _define()
    lines = [
        "# Flags",
        "",
        "Made from the code by `make docs`; `python -m resnet_cpu.train --help` shows the same. Flags go on the",
        "command line or into a flagfile (`--flagfile=F`, one a line, comments from column 0 on); the later one wins,",
        "switches are `--name` and `--noname`. Flags of one command are refused by the others.",
    ]
    for title, names in definer.sections:
        lines += ["", f"## {title[0].upper()}{title[1:]}", "", "| flag | default | meaning |", "|---|---|---|"]
        for name in names:
            choices, default, text = _described(definer.values[name])
            if choices:
                text = f"`{'`, `'.join(choices)}`. {text}"
            text = text.replace("|", "\\|")
            lines.append(f"| `--{name}` | {f'`{default}`' if default else ''} | {text} |")
    return "\n".join(lines) + "\n"


def _described(flag: flags.Flag) -> Tuple[List[str], str, str]:
    """Return (choices, default, help) of a flag."""
    choices = list(getattr(flag.parser, "enum_values", None) or [])
    default = "" if flag.default in (None, []) else str(flag.default_as_str).strip("'")
    text = flag.help[flag.help.index(">: ") + 3 :] if choices else flag.help.split(";\n")[0]
    return choices, default, text


def parse_values(
    argv: Sequence[str], command: str = "train", positional: int = 0
) -> Tuple[flags.FlagValues, List[str]]:
    """Return (absl flag values, positional arguments) of a command line without the program's name.

    `--help` prints every flag and exits 0. Raises FlagError for anything else that is not as it should be.
    """
    if any(argument in ("-h", "--help", "--helpfull", "-help", "-helpfull") for argument in argv):
        print(help_text())
        sys.exit(0)
    values = _define().values
    try:
        rest = values(["resnet_cpu", *argv])[1:]
    except flags.UnrecognizedFlagError as error:
        close = difflib.get_close_matches(error.flagname, list(values), n=3)
        remedy = f"did you mean {' or '.join('--' + name for name in close)}?" if close else "--help lists them all"
        # absl hands on the whole argument as the value.
        shown = error.flagvalue if str(error.flagvalue).startswith("-") else f"--{error.flagname}"
        if " " in error.flagname:
            remedy = "write flags as --name=value"
        raise FlagError(f"{shown}: unknown flag; {remedy}") from None
    except flags.Error as error:
        told = " ".join(str(error).removeprefix("ERROR:: ").split())
        remedy = _COMMENT if " #" in told else "--help shows what is allowed"
        if "Unable to open flagfile" in told:
            remedy = "name a file that is there, as seen from the current folder"
        raise FlagError(f"{told}; {remedy}") from None
    if len(rest) > positional:
        raise FlagError(
            f"'{rest[positional]}' is no flag; write flags as --name=value, and in flagfiles comments from column 0 on"
        )
    for name, owner in OF_ONE_COMMAND.items():
        owners = owner.split()
        if values[name].present and command not in owners:
            raise FlagError(
                f"--{name}={values[name].value}: belongs to python -m resnet_cpu.{' and resnet_cpu.'.join(owners)}; "
                "leave it out here"
            )
    for name in values:
        for value in values[name].value if isinstance(values[name].value, list) else [values[name].value]:
            if isinstance(value, str) and ("\n" in value or "\r" in value):
                raise FlagError(f"--{name}={value!r}: a newline in the value; write it on one line")
            if isinstance(value, str) and " #" in value:
                raise FlagError(f"--{name}={value}: {_COMMENT}")
            if isinstance(value, float) and not math.isfinite(value):
                raise FlagError(f"--{name}={value}: is no finite number; --help shows what is allowed")
    return values, rest


def parse(argv: Sequence[str]) -> settings.Settings:
    """Return the settings of a command line without the program's name; raise FlagError with a one-line remedy."""
    return make_settings(parse_values(argv)[0])


def make_settings(v: flags.FlagValues) -> settings.Settings:
    """Check flags against each other, fill in what depends on the data set, and freeze them."""
    if v.dataset not in DATASETS and not re.fullmatch(r"tfds:[A-Za-z0-9_]+(/[A-Za-z0-9_.-]+)*", v.dataset):
        raise FlagError(f"--dataset={v.dataset}: unknown; use one of {', '.join(DATASETS)} or tfds:NAME")
    facts = facts_of(v.dataset)
    num_classes = v.num_classes or facts.num_classes
    if not num_classes:
        raise FlagError(f"--num_classes is missing; --dataset={v.dataset} does not fix the number of classes")
    if v.dataset == "synthetic" and v.data_dir:
        raise FlagError(f"--data_dir={v.data_dir}: contradicts --dataset=synthetic; leave one of them out")
    if v.batch_size and v.global_batch_size and v.global_batch_size % v.batch_size:
        raise FlagError(
            f"--batch_size={v.batch_size} (per rank) contradicts --global_batch_size={v.global_batch_size}, which is "
            "no multiple of it; leave one of the two out or give another"
        )
    if v.optimizer == "lars" and v.wd_on_bn:
        raise FlagError("--wd_on_bn: contradicts --optimizer=lars, whose skip list holds gamma and beta; leave it out")
    if v.experiment != "scaling" and v.untimed_steps != v["untimed_steps"].default:
        raise FlagError(
            f"--untimed_steps={v.untimed_steps}: has no meaning for --experiment={v.experiment}; leave it out"
        )
    if v.optimizer != "lars" and v.lars_eta != v["lars_eta"].default:
        raise FlagError(f"--lars_eta={v.lars_eta}: has no meaning for --optimizer={v.optimizer}; leave it out")
    return settings.Settings(
        model=settings.Model(
            model=v.model,
            width=v.width,
            stem=v.stem,
            stride_in=v.stride_in,
            padding=v.padding,
            zero_gamma=v.zero_gamma,
            bn_momentum=v.bn_momentum,
            bn_epsilon=v.bn_epsilon,
            bn_stats_batch=v.bn_stats_batch,
            conv1_bias=v.conv1_bias,
            precision=v.precision,
            num_classes=num_classes,
        ),
        data=settings.Data(
            dataset=v.dataset,
            data_dir=v.data_dir or None,
            train_examples=v.train_examples,
            image_size=v.image_size or facts.image_size,
            resize=v.resize,
            normalization=v.normalization,
            eval_crop=v.eval_crop or facts.eval_crop,
            crop=v.crop,
            crop_area=_bounds("crop_area", v.crop_area, 1.0),
            crop_aspect=_bounds("crop_aspect", v.crop_aspect, 10.0),
            order_block=v.order_block,
            data_threads=v.data_threads,
        ),
        recipe=settings.Recipe(
            phases=tuple(phases.parse(v.phase)),
            batch_size=v.batch_size,
            global_batch_size=v.global_batch_size,
            accumulate_steps=v.accumulate_steps,
            lr_scaling=v.lr_scaling,
            optimizer=v.optimizer,
            lars_eta=v.lars_eta,
            momentum_correction=v.momentum_correction,
            label_smoothing=v.label_smoothing,
            wd_on_bn=v.wd_on_bn,
            seed=v.seed,
        ),
        run=settings.Run(
            experiment=v.experiment,
            run_dir=v.run_dir,
            resume=v.resume,
            init_from=v.init_from or None,
            max_steps=v.max_steps,
            eval_every_epochs=v.eval_every_epochs,
            eval_batch_size=v.eval_batch_size,
            checkpoint_every_steps=v.checkpoint_every_steps,
            keep_checkpoints=v.keep_checkpoints,
            log_every_steps=v.log_every_steps,
            untimed_steps=v.untimed_steps,
            profile_steps=_steps("profile_steps", v.profile_steps),
        ),
        system=settings.System(ranks=v.ranks, threads=v.threads, stall_timeout=v.stall_timeout),
        resolved_flags=resolved(v),
    )


def _pair(flag: str, text: str, kind: Callable, remedy: str) -> Tuple:
    try:
        low, high = (kind(part) for part in text.split(","))
    except ValueError:
        raise FlagError(f"--{flag}={text}: is no pair of numbers; write {remedy}") from None
    if not low <= high:
        raise FlagError(f"--{flag}={text}: the first is more than the second; write {remedy}")
    return low, high


def _bounds(flag: str, text: str, most: float) -> Tuple[float, float]:
    remedy = f"two numbers above 0 and up to {most:g}, as in --{flag}=0.5,1"
    low, high = _pair(flag, text, float, remedy)
    if not 0 < low <= high <= most:
        raise FlagError(f"--{flag}={text}: out of range; write {remedy}")
    return low, high


def _steps(flag: str, text: Optional[str]) -> Optional[Tuple[int, int]]:
    if not text:
        return None
    remedy = f"first and last step, counted from 0, as in --{flag}=10,12"
    first, last = _pair(flag, text, int, remedy)
    if first < 0:
        raise FlagError(f"--{flag}={text}: out of range; write {remedy}")
    return first, last


def resolved(values: flags.FlagValues) -> str:
    """Return a flagfile that gives these values again, one flag a line, in the order of `--help`."""
    lines: List[str] = []
    for title, names in _define().sections:
        chosen = [values[name] for name in names if name not in OF_ONE_COMMAND]
        given = [flag.serialize() for flag in chosen if flag.value is not None and flag.value != []]
        lines += [f"# {title}", *given] if given else []
    return "\n".join(lines) + "\n"


def ranks_per_node(values: flags.FlagValues) -> Optional[int]:
    """Return the number of --ranks_per_node, None for auto."""
    text = values.ranks_per_node
    if text == "auto":
        return None
    if not text.isdigit() or int(text) < 1:
        raise FlagError(f"--ranks_per_node={text}: must be a number above 0, or auto")
    return int(text)


def required(value: Optional[str], flag: str, remedy: str) -> str:
    """Return the value of a flag that this command cannot do without."""
    if not value:
        raise FlagError(f"--{flag} is missing; {remedy}")
    return value
