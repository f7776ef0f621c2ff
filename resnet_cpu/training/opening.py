"""Everything that is settled before TensorFlow is loaded: data, recipe, run folder, agreement of all ranks.

User errors that can be found early are found here, in about a second.
"""

import os
import socket
import sys
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from resnet_cpu import commandline
from resnet_cpu.cluster import control
from resnet_cpu.cluster.control import World
from resnet_cpu.cluster.environment import Environment
from resnet_cpu.data import classes, folders
from resnet_cpu.data.datasets import DATASETS, normalization_of
from resnet_cpu.data.folders import ShardedData
from resnet_cpu.errors import CheckpointError, DataError, FlagError, RunFolderError
from resnet_cpu.recipe import schedule
from resnet_cpu.recipe.phases import Phase
from resnet_cpu.resolve import resolve_recipe
from resnet_cpu.run import checkpoint, files, provenance
from resnet_cpu.run import signature as signatures
from resnet_cpu.run.atomic import sha256_of
from resnet_cpu.run.folder import RunFolder, Stopwatch, read_json, read_record, read_rows
from resnet_cpu.settings import Settings
from resnet_cpu.training import agreement
from resnet_cpu.training.job import Job

_NAME_RUN = "name the folder for this run, as in --run_dir=runs/first"


class _Beginning(NamedTuple):
    """Where an attempt begins, as the run folder has it; every field is a JSON value."""

    finished: Optional[Dict[str, Any]] = None  # the result, if there is nothing left to do
    resume_from: Optional[str] = None  # checkpoint folder
    evaluated: bool = False  # whether eval.jsonl has the evaluation of that checkpoint
    init_from: Optional[Dict[str, str]] = None  # path as given, file that it named, its SHA-256
    attempt: int = 0
    earlier_attempts: Sequence[Dict[str, Any]] = ()
    seconds_before: float = 0.0
    seconds_to_top1: Mapping[str, float] = {}
    evaluated_on: Optional[str] = None  # `Split.content` of the evaluation images of the attempt before


def open_job(settings: Settings, world: World, environment: Environment) -> Job:
    """Return the job that the settings describe, on all ranks; hold its run folder on rank 0.

    `environment` is what `placement.apply` returned. Raises the one-line errors of wrong flags, data, run
    folders and checkpoints, on all ranks alike.
    """
    clock = Stopwatch()
    agreement.check_same_everywhere(settings, world)
    with control.same_on_all_ranks():
        name = commandline.required(settings.run.run_dir, "run_dir", _NAME_RUN)
    run_dir = os.path.abspath(name)
    data = open_data(settings, world)
    with control.same_on_all_ranks():
        train_examples, validation_examples = examples(settings, data)
        resolved = resolve_recipe(settings, world.size, train_examples)
    places = world.gather({**provenance.of_rank(environment), "own_cores": world.cores})
    with control.same_on_all_ranks():
        agreement.check_threads(settings, places)
    names = None if data is None else data.classes
    listed, content = None if names is None else classes.digest(names), None if data is None else data.train.content
    signature = signatures.of(
        settings, resolved, train_examples, _pixels(settings, data), classes=listed, content=content
    )
    folder, begin = _hold_folder(settings, world, run_dir, signature, resolved.phases)
    signature["init_from"] = begin.init_from and begin.init_from["sha256"]
    if folder is not None:
        agreement.print_places(places)
        if data is not None and settings.data.eval_split == folders.AUTO and not data.validation.examples:
            print(f"WARNING: {folders.without_evaluation(settings.data.data_dir, data)}", file=sys.stderr, flush=True)
        evaluated_on = None if data is None else data.validation.content
        _report_other_evaluation(settings, begin, evaluated_on)
        about = {"signature": signature, "classes": names, "evaluated_on": evaluated_on}
        _record(folder, settings, world, begin, places, about)
    return Job(
        settings=settings,
        world=world,
        phases=resolved.phases,
        batch=resolved.batch,
        train_examples=train_examples,
        validation_examples=validation_examples,
        data=data,
        signature=signature,
        run_dir=run_dir,
        folder=folder,
        resume_from=begin.resume_from,
        evaluated=begin.evaluated,
        init_from=begin.init_from,
        attempt=begin.attempt,
        finished=begin.finished,
        seconds_before=begin.seconds_before,
        seconds_to_top1=dict(begin.seconds_to_top1),
        clock=clock,
    )


# --- data and recipe -------------------------------------------------------------------------------------------------


def open_data(settings: Settings, world: World, own_pixels: bool = True) -> Optional[ShardedData]:
    """Open the data set on every rank, first on rank 0, which reports its errors; return None for synthetic data.

    Each host may have its own copy. A missing or different one is an error that names the host.

    Args:
        own_pixels: whether --normalization=dataset means the pixel mean and deviation of this data set.
    """
    dataset, eval_split = settings.data.dataset, settings.data.eval_split
    if dataset == "synthetic":
        return None
    opened: Optional[ShardedData] = None

    def folder() -> str:
        if settings.data.data_dir:
            return settings.data.data_dir
        raise FlagError(  # perhaps on this host only, whose flagfile may be another one
            f"--data_dir is missing; --dataset={dataset} needs the folder made by python -m resnet_cpu.prepare (or use "
            "--dataset=synthetic)"
        )

    def open_first() -> None:
        nonlocal opened
        path = folder()
        description = folders.describe(path, dataset, eval_split)
        folders.make_indexes(description, path)
        opened = folders.open_data(path, dataset, eval_split)
        _check_data(settings, opened, own_pixels)
        for warning in folders.count_warnings(description, opened):
            print(f"WARNING: {warning}", file=sys.stderr, flush=True)

    def open_copy() -> Tuple[ShardedData, str]:
        data = opened or folders.open_data(folder(), dataset, eval_split)
        return data, folders.digest(data) if world.size > 1 else ""  # a single rank has no other copy to compare with

    world.on_rank0(open_first)
    data, digest = world.on_all(open_copy)
    rows = world.gather([socket.gethostname(), digest])
    for rank, (host, other) in enumerate(rows):
        if other != rows[0][1]:
            raise DataError(
                f"--data_dir={settings.data.data_dir}: the data on host {host} (rank {rank}) differ from those on host "
                f"{rows[0][0]} (rank 0); copy the same data set to every host",
                collective=True,
            )
    return data


def _check_data(settings: Settings, data: ShardedData, own_pixels: bool) -> None:
    if own_pixels and settings.data.normalization == "dataset" and data.pixel_mean is None:
        raise FlagError(
            "--normalization=dataset: this data set has no measured pixel mean and deviation; use authors, torch or tf"
        )
    if data.num_classes > settings.model.num_classes:
        raise DataError(
            f"--data_dir={settings.data.data_dir}: has {data.num_classes} classes, the model only "
            f"{settings.model.num_classes}; set --num_classes={data.num_classes}"
        )


def examples(settings: Settings, data: Optional[ShardedData]) -> Tuple[int, int]:
    """Return the numbers of (training, evaluation) examples to use; raise DataError if there are not enough."""
    wanted = settings.data.train_examples
    if data is None:
        return wanted or DATASETS["synthetic"].train_examples or 0, 0
    if not data.train.examples:
        raise DataError(
            f"--data_dir={settings.data.data_dir}: has no split to train on, only one to evaluate on; name a folder "
            "that has both, or use python -m resnet_cpu.evaluate"
        )
    if wanted is not None and wanted > data.train.examples:
        raise DataError(f"--train_examples={wanted}: {settings.data.data_dir} holds {data.train.examples}; lower it")
    return wanted or data.train.examples, data.validation.examples


def _pixels(settings: Settings, data: Optional[ShardedData]) -> signatures.Pixels:
    """Return the measured pixel mean and deviation, if images are normalised with them."""
    if data is None or not data.pixel_mean or not data.pixel_std:
        return None
    chosen = normalization_of(settings.data.normalization, settings.data.dataset, True)
    return (data.pixel_mean, data.pixel_std) if chosen == "dataset" else None


# --- run folder, on rank 0 -------------------------------------------------------------------------------------------


def _hold_folder(
    settings: Settings, world: World, run_dir: str, signature: Dict[str, Any], phases: Sequence[Phase]
) -> Tuple[Optional[RunFolder], _Beginning]:
    """Lock the run folder on rank 0; return it (None on other ranks and for a finished run) and where to begin."""
    folder: Optional[RunFolder] = None

    def hold() -> Dict[str, Any]:
        nonlocal folder
        # A complete result is final. Without a lock, the folder of a finished run may be read-only.
        if (read_json(os.path.join(run_dir, files.RESULT)) or {}).get("complete"):
            begin = _read_beginning(settings, run_dir, signature)
            if begin.finished is not None:
                return begin._asdict()
        if settings.run.resume == "must" and not os.path.isdir(run_dir):
            raise CheckpointError(f"--resume=must: no checkpoint in {run_dir}, which does not exist; correct --run_dir")
        held = RunFolder(run_dir)
        try:
            checkpoint.recover(run_dir)
            begin = _read_beginning(settings, run_dir, signature)
            if begin.finished is None:
                _check_kept(run_dir, begin.resume_from, phases)
                _report_lost(run_dir, begin.resume_from)
                folder = held
                # How an earlier attempt ended must not outlive the end of this one; nor its time, if it does not count.
                for name in (files.RESULT, files.NOT_FINITE, *([] if begin.seconds_before else [files.CLOCK])):
                    if os.path.exists(held.file(name)):
                        os.remove(held.file(name))
        finally:
            if folder is None:
                held.close()
        return begin._asdict()

    begin = _Beginning(**world.on_rank0(hold))
    return folder, begin


def _read_beginning(settings: Settings, run_dir: str, signature: Dict[str, Any]) -> _Beginning:
    """Return where an attempt in `run_dir` begins; raise the errors of a folder that does not fit the settings."""
    record = read_record(run_dir)
    result = read_json(os.path.join(run_dir, files.RESULT))
    saved = checkpoint.steps(run_dir)
    # The flags of a run that has recorded nothing do not bind later attempts: they may have been the mistake.
    recorded = any(os.path.exists(os.path.join(run_dir, name)) for name in (files.METRICS, files.EVALUATIONS))
    begun = bool(saved) or recorded
    failed = os.path.exists(os.path.join(run_dir, files.NOT_FINITE))
    if settings.run.resume == "never" and (begun or failed or result is not None):
        raise RunFolderError(f"--run_dir={run_dir}: holds a run already; choose another, or resume it: --resume=auto")
    init_from = _init_from(settings, record if begun else None)
    expected = {**signature, "init_from": init_from and init_from["sha256"]}
    if record is not None and begun:
        signatures.check(run_dir, signatures.normalised(record["signature"]), expected)
    finished = result is not None and bool(result.get("complete"))
    if finished and record is not None:
        return _Beginning(finished=result)
    if settings.run.resume == "must" and not saved:
        raise CheckpointError(
            f"--resume=must: no checkpoint in {run_dir}; use --resume=auto to start from the beginning"
        )
    newest = checkpoint.newest(run_dir)
    path, manifest = newest if newest is not None else (None, {})
    if path is not None:
        signatures.check(path, signatures.normalised(manifest["signature"]), expected)
    if finished:  # its run.json is missing or damaged
        return _Beginning(finished=result)
    step, wanted = manifest.get("step", 0), settings.run.max_steps
    if wanted and step > wanted:
        raise FlagError(f"--max_steps={wanted}: {run_dir} is at step {step} already; raise it or remove it")
    if result is not None and wanted == step == result.get("steps"):
        return _Beginning(finished=result)
    return _Beginning(
        resume_from=path,
        evaluated=_was_evaluated(run_dir, manifest),
        init_from=init_from,
        attempt=(record or {}).get("attempt", 0) + 1,
        earlier_attempts=[*record.get("earlier_attempts", []), _summary_of(record)] if record else [],
        evaluated_on=record.get("evaluated_on") if record and begun else None,
        **_earlier_times(run_dir if begun or _is_of(record, expected) else None, manifest),
    )


def _check_kept(run_dir: str, resume_from: Optional[str], phases: Sequence[Phase]) -> None:
    """Raise CheckpointError if members or end states are gone that the run has passed already and still needs."""
    if resume_from is None:
        return
    step, ends = checkpoint.read_manifest(resume_from)["step"], schedule.end_steps(phases)
    kept = [checkpoint.member_folder(run_dir, one.name) for one in phases if one.member and ends[one.name] <= step]
    kept += [checkpoint.folder(run_dir, end) for end in sorted(schedule.still_needed(phases, step)) if end < step]
    for path in kept:
        try:
            checkpoint.verify(path)
        except CheckpointError:
            raise CheckpointError(
                f"--run_dir={run_dir}: cannot be continued after step {step} without {path}, which is missing or "
                "damaged; copy it back, or train again in another --run_dir"
            ) from None


def _report_lost(run_dir: str, resume_from: Optional[str]) -> None:
    """Warn of a run that starts again although it has trained before: without a checkpoint its steps are lost."""
    rows = read_rows(os.path.join(run_dir, files.METRICS))
    if resume_from is None and rows:
        print(
            f"WARNING: --run_dir={run_dir}: has trained {rows[-1]['step'] + 1} steps, but has no checkpoint; training "
            "starts again",
            file=sys.stderr,
            flush=True,
        )


def _report_other_evaluation(settings: Settings, begin: _Beginning, now: Optional[str]) -> None:
    """Warn of a run that is continued with other evaluation images: its weights are the same, its scores are not."""
    if begin.evaluated_on not in (None, now):
        print(
            f"WARNING: --run_dir={settings.run.run_dir}: its last attempt was evaluated on other images than those of "
            f"{settings.data.data_dir} now; scores from before and after cannot be compared",
            file=sys.stderr,
            flush=True,
        )


def _init_from(settings: Settings, record: Optional[Dict[str, Any]]) -> Optional[Dict[str, str]]:
    """Return path, file and SHA-256 of the weights to start from; a run that has begun does not need the file again."""
    path = settings.run.init_from
    if path is None:
        return None
    recorded = (record or {}).get("init_from")
    if recorded and recorded["path"] == path:
        return recorded
    file = checkpoint.find_weights(path)
    return {"path": path, "file": file, "sha256": sha256_of(file)}


def _was_evaluated(run_dir: str, manifest: Mapping[str, Any]) -> bool:
    """Return whether eval.jsonl has a row of the attempt that saved the checkpoint, or of a later one, at its step."""
    rows = read_rows(os.path.join(run_dir, files.EVALUATIONS))
    step, attempt = manifest.get("step", 0), manifest.get("attempt", 0)  # version 0.1 evaluated first, then saved
    return any(row["step"] == step - 1 and row["attempt"] >= attempt for row in rows)


def _is_of(record: Optional[Dict[str, Any]], signature: Dict[str, Any]) -> bool:
    """Return whether the last attempt trained what `signature` describes, even if it was killed in its first steps."""
    return record is not None and not signatures.differences(signatures.normalised(record["signature"]), signature)


def _earlier_times(run_dir: Optional[str], manifest: Mapping[str, Any]) -> Dict[str, Any]:
    """Return the seconds that earlier attempts took and in which they first reached each accuracy.

    clock.json counts to the last row of a killed attempt, the checkpoint only to its step. Version 0.1 wrote none.
    """
    clock = read_json(os.path.join(run_dir, files.CLOCK)) if run_dir else None
    found = [times for times in (manifest, clock) if times and "seconds_to_top1" in times]
    marks: Dict[str, float] = {}
    for times in found:
        for mark, seconds in times["seconds_to_top1"].items():
            marks[mark] = min(seconds, marks.get(mark, seconds))
    return {"seconds_before": max([times["wall_seconds"] for times in found], default=0.0), "seconds_to_top1": marks}


def _summary_of(record: Dict[str, Any]) -> Dict[str, Any]:
    """Return the part of an attempt's run.json that decides whether it can be compared with another attempt."""
    return {
        **{key: record[key] for key in ("attempt", "ranks", "versions", "code")},
        "evaluated_on": record.get("evaluated_on"),
        "cpus": sorted({row["cpu"] for row in record["per_rank"]}),
        "environment": record["per_rank"][0]["environment"],
    }


def _record(
    folder: RunFolder,
    settings: Settings,
    world: World,
    begin: _Beginning,
    places: List[Dict[str, Any]],
    data: Mapping[str, Any],
) -> None:
    folder.write_text(files.FLAGS, settings.resolved_flags)
    record = {
        **provenance.of_job(),
        "attempt": begin.attempt,
        "seed": settings.recipe.seed,
        "ranks": world.size,
        "per_rank": places,
        "init_from": begin.init_from,
        "earlier_attempts": begin.earlier_attempts,
        **data,
    }
    folder.write_json(files.RECORD, record)
