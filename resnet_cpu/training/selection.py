"""Select the checkpoint, or the members of an ensemble, that `evaluate` scores, as they were trained. No TensorFlow."""

import dataclasses
import os
import sys
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from resnet_cpu import commandline
from resnet_cpu.cluster.control import World
from resnet_cpu.data import classes
from resnet_cpu.data.folders import ShardedData
from resnet_cpu.errors import CheckpointError, DataError, FlagError
from resnet_cpu.run import checkpoint, files
from resnet_cpu.run import signature as signatures
from resnet_cpu.run.folder import read_json
from resnet_cpu.settings import Settings
from resnet_cpu.training import agreement, ensemble
from resnet_cpu.training.opening import open_data


class Member(NamedTuple):
    """A member of an ensemble: its folder, and the settings of its run with the flags of the command line over them."""

    path: str
    settings: Settings


def run_to_evaluate(asked: Settings) -> str:
    """Return the run folder that the flags of `evaluate` name; raise FlagError if they name none or two."""
    run_dir, path = asked.run.run_dir, asked.evaluate.checkpoint
    if asked.evaluate.members:
        raise FlagError(f"--members={','.join(asked.evaluate.members)}: needs --ensemble; add it")
    run_dir = run_dir or (path and os.path.dirname(os.path.dirname(os.path.abspath(path))))
    return commandline.required(run_dir, "run_dir", "name the folder of the run to evaluate")


def settings_of(run_dir: str, argv: Sequence[str]) -> Settings:
    """Return the settings that a run recorded with the flags of the command line over them."""
    settings = commandline.parse(argv, "evaluate", recorded=run_dir)
    if settings.data.dataset == "synthetic":
        raise FlagError(
            "--dataset=synthetic: has no evaluation set; evaluate on real images with --dataset and --data_dir"
        )
    return settings


def find_checkpoint(settings: Settings, world: World, path: Optional[str]) -> Tuple[str, int, ShardedData]:
    """Return folder and step of the checkpoint `path`, or of the run's newest, and the data to score it on.

    Raises CheckpointError if it holds another model than that of the settings.
    """
    agreement.check_same_everywhere(settings, world)
    data = _open_data(settings, world)

    def find() -> List[Any]:
        if path:
            found = (os.path.abspath(path), checkpoint.read_manifest(path))
            if not checkpoint.holds_weights(found[1]):
                raise CheckpointError(f"--checkpoint={path}: holds no weights; name a checkpoint or a member")
        else:
            newest = checkpoint.newest(settings.run.run_dir or "")
            if newest is None:
                raise CheckpointError(f"--run_dir={settings.run.run_dir}: has no checkpoint yet; train first")
            found = newest
        signature = signatures.normalised(found[1]["signature"])
        check_model(settings, found[0], signature)
        check_classes(settings.run.run_dir or "", found[0], signature, data)
        return [found[0], found[1]["step"], signature]

    folder, step, signature = world.on_rank0(find)
    return folder, step, with_pixels_of(signature, settings, data)


def check_model(settings: Settings, path: str, signature: Mapping[str, Any]) -> None:
    """Raise CheckpointError if the checkpoint at `path` with this signature holds another model than the settings."""
    # Weights are float32 in either precision, so a run may be scored in the other one.
    recorded, now = (
        {"model": {**model, "precision": None}} for model in (signature["model"], signatures.deciding(settings.model))
    )
    signatures.check(path, recorded, now)


def check_classes(run_dir: str, path: str, signature: Mapping[str, Any], data: ShardedData) -> None:
    """Raise DataError if the checkpoint at `path` was trained on other classes than those of `data`.

    Nothing is refused where the run (of an earlier version) or the data set names no classes.
    """
    trained = signature["data"].get("classes")
    if trained is None or data.classes is None or trained == classes.digest(data.classes):
        return
    names = (read_json(os.path.join(run_dir, files.RECORD)) or {}).get("classes")
    raise DataError(
        f"{path} was trained on other classes: {classes.first_difference(names, data.classes)}; evaluate on a data set "
        "with the same classes in the same order"
    )


def with_pixels_of(signature: Mapping[str, Any], settings: Settings, data: ShardedData) -> ShardedData:
    """Return `data` with the pixel mean and deviation that the network was trained with, whatever set `data` is."""
    if settings.data.normalization not in ("auto", "dataset"):
        return data
    pixels = signature["data"].get("pixels")
    if not pixels and settings.data.normalization == "dataset":
        raise FlagError(
            "--normalization=dataset: the network was trained without a measured pixel mean and deviation; remove "
            "the flag",
            collective=True,
        )
    mean, deviation = (tuple(pixels[key]) if pixels else None for key in ("mean", "std"))
    return dataclasses.replace(data, pixel_mean=mean, pixel_std=deviation)


def check_ensemble_flags(asked: Settings) -> List[str]:
    """Return the runs and members that the flags of `evaluate --ensemble` name; raise FlagError for contradictions."""
    flags, run_dir = asked.evaluate, asked.run.run_dir
    if flags.checkpoint:
        raise FlagError(f"--checkpoint={flags.checkpoint}: contradicts --ensemble; name members with --members")
    if flags.members and run_dir:
        raise FlagError(f"--run_dir={run_dir}: contradicts --members; add the run to --members, or remove one of them")
    if flags.export and not flags.export.endswith(".npz"):
        raise FlagError(f"--export={flags.export}: the mean of the members' weights is written to an .npz file")
    return list(flags.members) or [commandline.required(run_dir, "run_dir", "name the run, or --members")]


def choose_members(named: Sequence[str], asked: Settings, argv: Sequence[str], world: World) -> Dict[str, Member]:
    """Return the members that `named` stands for, by name; raise CheckpointError for missing or different ones."""
    agreement.check_same_everywhere(asked, world)

    def find() -> Dict[str, str]:
        if asked.evaluate.export is not None:
            checkpoint.check_export(asked.evaluate.export)
        found = ensemble.members_of(named)
        for path in found.values():
            check_model(settings_of(ensemble.run_of(path), argv), path, _signature_of(path))
        return found

    found = world.on_rank0(find)
    return {name: Member(path, settings_of(ensemble.run_of(path), argv)) for name, path in found.items()}


def members_without_predictions(members: Mapping[str, Member], asked: Settings, world: World) -> List[Member]:
    """Return the members that have no saved predictions of their weights on the data to evaluate."""
    same_folder = "data_dir" in asked.given

    def find() -> List[str]:
        found = [m.path for m in members.values() if not ensemble.has_predictions(m.path, m.settings, same_folder)]
        for path in found:
            print(
                f"{path}: has no predictions of its weights on this data yet; making them", file=sys.stderr, flush=True
            )
        return found

    missing = world.on_rank0(find)
    return [member for member in members.values() if member.path in missing]


def open_data_of(members: Sequence[Member], world: World) -> List[ShardedData]:
    """Return the evaluation data of each member, with the pixel mean and deviation that it was trained with.

    A data set that several members share is opened once: the shards of ImageNet alone take most of the open files that
    a process may have.
    """
    opened: Dict[Tuple[Any, ...], ShardedData] = {}
    return [_open_data_of(member, world, opened) for member in members]


def _open_data_of(member: Member, world: World, opened: Dict[Tuple[Any, ...], ShardedData]) -> ShardedData:
    settings = member.settings
    of_data = (settings.data.dataset, settings.data.data_dir, settings.data.eval_split)
    key = (*of_data, settings.model.num_classes)  # the last one is checked on opening
    if key not in opened:
        opened[key] = _open_data(settings, world)
    data = opened[key]

    def find() -> Dict[str, Any]:
        signature = _signature_of(member.path)
        check_classes(ensemble.run_of(member.path), member.path, signature, data)
        return signature

    return with_pixels_of(world.on_rank0(find), settings, data)


def _open_data(settings: Settings, world: World) -> ShardedData:
    try:
        data = open_data(settings, world, own_pixels=False)
    except DataError as error:
        if f"--data_dir={settings.data.data_dir}: the folder does not exist" in str(error):  # such as a staged copy
            error.args = (f"{error}; or name the data of the run with --data_dir, if they have moved",)
        raise
    assert data is not None  # settings_of refuses synthetic data
    if not data.validation.examples:
        names = [*(["train"] if data.train.examples else []), *data.others]
        raise DataError(
            f"--data_dir={settings.data.data_dir}: no split to evaluate on (--eval_split={settings.data.eval_split}); "
            f"name one, as in --eval_split={names[-1]}",
            collective=True,
        )
    return data


def _signature_of(path: str) -> Dict[str, Any]:
    return signatures.normalised(checkpoint.read_manifest(path)["signature"])
