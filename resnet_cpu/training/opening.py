"""What is settled before TensorFlow is loaded: data opened, recipe planned, run folder held, all ranks agreed.

Every user error that can be found early is found here, in about a second.
"""

import dataclasses
import hashlib
import os
import socket
import sys
from typing import Any, Dict, List, Optional, Tuple

from resnet_cpu.cluster import control
from resnet_cpu.cluster import seats
from resnet_cpu.cluster.control import World
from resnet_cpu.data import folders as layouts
from resnet_cpu.data.datasets import DATASETS
from resnet_cpu.errors import CheckpointError, DataError, FlagError, RunFolderError
from resnet_cpu.recipe import schedule
from resnet_cpu.recipe.batch import Batch
from resnet_cpu.recipe.phases import Phase
from resnet_cpu.run import checkpoint, provenance
from resnet_cpu.run.folder import RunFolder, Stopwatch, read_json
from resnet_cpu.settings import Plan, Settings, plan


@dataclasses.dataclass(frozen=True)
class Job:
    """A run that may start: settings, and what follows from them on this world and this data."""

    settings: Settings
    world: World
    phases: Tuple[Phase, ...]
    batch: Batch
    train_examples: int
    validation_examples: int
    data: Optional[layouts.ShardedData]  # None: synthetic
    signature: Dict[str, Any]  # what a checkpoint must agree with
    run_dir: str
    folder: Optional[RunFolder]  # on rank 0
    resume_from: Optional[str]  # checkpoint folder
    init_from: Optional[Dict[str, str]]  # path as given, file that it named, its SHA-256
    attempt: int
    finished: Optional[Dict[str, Any]]  # the result, where nothing is left to do
    clock: Stopwatch  # runs since this attempt was opened

    @property
    def total_steps(self) -> int:
        return schedule.total_steps(self.phases)


def open_data(settings: Settings, world: World) -> Optional[layouts.ShardedData]:
    """Open the data set on every rank, rank 0 first so that its errors are told once; None for synthetic data.

    Each host may have a copy of its own: one that is missing or another is an error that names the host.
    """
    if settings.data.dataset == "synthetic":
        return None
    folder = settings.data.data_dir
    if not folder:
        raise FlagError(
            f"--data_dir is missing; --dataset={settings.data.dataset} needs the folder made by "
            "python -m resnet_cpu.prepare (or use --dataset=synthetic)",
            collective=True,
        )

    dataset = settings.data.dataset
    opened: Optional[layouts.ShardedData] = None

    def check() -> None:
        nonlocal opened
        layouts.make_indexes(layouts.describe(folder, dataset), folder)
        opened = layouts.open_data(folder, dataset)
        if settings.data.normalization == "dataset" and opened.pixel_mean is None:
            raise FlagError(
                "--normalization=dataset: nobody measured the pixels of this data set; use authors, torch or tf"
            )
        found = opened.num_classes
        if found > settings.model.num_classes:
            raise DataError(
                f"--data_dir={folder}: has {found} classes, the model only {settings.model.num_classes}; "
                f"set --num_classes={found}"
            )

    world.on_rank0(check)

    def open_copy() -> Tuple[layouts.ShardedData, str]:
        data = opened or layouts.open_data(folder, dataset)
        return data, _contents(data) if world.size > 1 else ""  # nobody to compare with

    data, contents = world.on_all(open_copy)
    rows = world.gather([socket.gethostname(), contents])
    for rank, (host, other) in enumerate(rows):
        if other != rows[0][1]:
            raise DataError(
                f"--data_dir={folder}: rank {rank} on {host} finds other data there than rank 0 on {rows[0][0]}; copy "
                "the data set again, the same to all hosts",
                collective=True,
            )
    return data


def _contents(data: layouts.ShardedData) -> str:
    """Return a digest of all that is known of the data without reading a payload: counts, record lengths, pixels."""
    digest = hashlib.sha256(repr((data.num_classes, data.label_base, data.pixel_mean, data.pixel_std)).encode())
    for split in (data.train, data.validation):
        digest.update(split.first.tobytes())
        for path, starts in zip(split.paths, split.starts):
            digest.update(os.path.basename(path).encode() + b"\0" + starts.tobytes())
    return digest.hexdigest()


def examples(settings: Settings, data: Optional[layouts.ShardedData]) -> Tuple[int, int]:
    """Return (training examples, evaluation examples) that are used; raise DataError if more are asked for."""
    wanted = settings.data.train_examples
    if data is None:
        return wanted or DATASETS["synthetic"].train_examples or 0, 0
    if wanted is not None and wanted > data.train.examples:
        raise DataError(f"--train_examples={wanted}: {settings.data.data_dir} holds {data.train.examples}; lower it")
    return wanted or data.train.examples, data.validation.examples


def open_job(settings: Settings, world: World, threads: Dict[str, str]) -> Job:
    """Settle everything, collectively; raise the one-line errors of bad flags, data, folders and checkpoints."""
    clock = Stopwatch()
    if not settings.run.run_dir:
        raise FlagError(
            "--run_dir is missing; name the folder for this run, as in --run_dir=runs/first", collective=True
        )
    _check_same_everywhere(settings, world)
    data = open_data(settings, world)
    with control.everyone_alike():
        train_examples, validation_examples = examples(settings, data)
        planned = plan(settings, world.size, train_examples)
        if train_examples < planned.batch.total:
            raise DataError(
                f"{train_examples} training examples are fewer than one global batch of {planned.batch.total}; "
                "lower --batch_size or use fewer ranks"
            )
    signature = _signature(settings, planned, train_examples, data)
    run_dir = os.path.abspath(settings.run.run_dir)
    folder: Optional[RunFolder] = None

    def hold() -> Dict[str, Any]:
        nonlocal folder
        record = read_json(os.path.join(run_dir, "run.json"))
        result = read_json(os.path.join(run_dir, "result.json"))
        saved = checkpoint.steps(run_dir)
        if settings.run.resume == "never" and (record is not None or saved):
            raise RunFolderError(f"--run_dir={run_dir}: holds a run already; choose another, or --resume=auto to go on")
        # A run that never finished a step binds nobody: its flags may have been what was wrong.
        begun = saved or os.path.exists(os.path.join(run_dir, "metrics.jsonl"))
        init_from = _init_from(settings, record if begun else None)
        signature["init_from"] = init_from and init_from["sha256"]
        if record is not None and begun:
            checkpoint.check_signature(run_dir, record["signature"], signature)
        if result is not None and result.get("complete"):
            return {"finished": result}
        if settings.run.resume == "must" and not saved:
            raise CheckpointError(f"--resume=must: no checkpoint in {run_dir}; use --resume=auto to start afresh")
        folder = RunFolder(run_dir)
        try:
            resume_from, step = _resume_from(settings, run_dir, signature)
            wanted = settings.run.max_steps
            if wanted and step > wanted:
                raise FlagError(f"--max_steps={wanted}: {run_dir} is at step {step} already; raise it or leave it out")
            if result is not None and wanted == step == result.get("steps"):
                folder.close()
                return {"finished": result}
            if result is not None:  # of an earlier stop: it would outlive this attempt's
                os.remove(os.path.join(run_dir, "result.json"))
        except BaseException:
            folder.close()
            raise
        attempt = (record or {}).get("attempt", 0) + 1
        return {
            "finished": None,
            "resume_from": resume_from,
            "init_from": init_from,
            "attempt": attempt,
            "earlier_attempts": [*record.get("earlier_attempts", []), _in_short(record)] if record else [],
        }

    agreed = world.on_rank0(hold)
    rows = world.gather({**provenance.of_rank(threads), "own_cores": world.cores})
    if folder is not None and agreed["finished"] is None:
        _tell_places(world, rows)
        folder.write_text("resolved.flags", settings.resolved_flags)
        folder.write_json(
            "run.json",
            {
                **provenance.of_job(),
                "attempt": agreed["attempt"],
                "seed": settings.recipe.seed,
                "ranks": world.size,
                "per_rank": rows,
                "init_from": agreed["init_from"],
                "earlier_attempts": agreed["earlier_attempts"],
                "signature": signature,
            },
        )
    return Job(
        settings=settings,
        world=world,
        phases=planned.phases,
        batch=planned.batch,
        train_examples=train_examples,
        validation_examples=validation_examples,
        data=data,
        signature=signature,
        run_dir=run_dir,
        folder=folder if agreed["finished"] is None else None,
        resume_from=agreed.get("resume_from"),
        init_from=agreed.get("init_from"),
        attempt=agreed.get("attempt", 0),
        finished=agreed["finished"],
        clock=clock,
    )


def _tell_places(world: World, rows: List[Dict[str, Any]]) -> None:
    """Say on standard error where every rank sits, and what looks wrong about it."""
    places = [
        {
            "host": row["host"],
            "cpus": row["cores"],
            "cores": row["own_cores"],
            "threads": int(row["environment"]["TF_NUM_INTRAOP_THREADS"]),
            **({"omp": int(omp)} if omp.isdigit() else {}),
            "host_cpus": row["host_cores"],
        }
        for row in rows
        for omp in [row["environment"].get("OMP_NUM_THREADS", "").split(",")[0].strip()]  # a list: by nesting
    ]
    for line in [*seats.describe(places), *(f"warning: {problem}" for problem in seats.warnings(places))]:
        print(line, file=sys.stderr, flush=True)


def _init_from(settings: Settings, record: Optional[Dict[str, Any]]) -> Optional[Dict[str, str]]:
    """Return path and digest of the weights to start from; those of a run that is gone on with need not be there."""
    path = settings.run.init_from
    if path is None:
        return None
    recorded = (record or {}).get("init_from")
    if recorded and recorded["path"] == path:
        return recorded
    file = checkpoint.find_weights(path)
    return {"path": path, "file": file, "sha256": checkpoint.digest(file)}


def _in_short(record: Dict[str, Any]) -> Dict[str, Any]:
    """Return what of an attempt's run.json tells whether its bits can be compared with those of another."""
    return {
        **{key: record[key] for key in ("attempt", "ranks", "versions", "code")},
        "cpus": sorted({row["cpu"] for row in record["per_rank"]}),
        "environment": record["per_rank"][0]["environment"],
    }


def _resume_from(settings: Settings, run_dir: str, signature: Dict[str, Any]) -> Tuple[Optional[str], int]:
    """Return (checkpoint folder to go on from, its step); (None, 0) to start afresh."""
    newest = checkpoint.newest(run_dir)
    if newest is None:
        return None, 0
    path, manifest = newest
    checkpoint.check_signature(path, manifest["signature"], signature)
    return path, manifest["step"]


def find_checkpoint(
    settings: Settings, world: World, data: layouts.ShardedData, path: Optional[str]
) -> Tuple[str, int, layouts.ShardedData]:
    """Return (folder, step) of the checkpoint `path`, or of the run's newest; it must hold the model of the flags.

    Returns `data` as well, with the pixel mean and deviation that the network was trained with, whatever set it is.
    """

    def find() -> List[Any]:
        if path:
            found = (os.path.abspath(path), checkpoint.read_manifest(path))
        else:
            newest = checkpoint.newest(settings.run.run_dir or "")
            if newest is None:
                raise CheckpointError(f"--run_dir={settings.run.run_dir}: no checkpoint in it yet; train first")
            found = newest
        signature = found[1]["signature"]
        check_model(settings, found[0], signature)
        return [found[0], found[1]["step"], signature]

    folder, step, signature = world.on_rank0(find)
    return folder, step, as_trained(settings, data, signature)


def check_model(settings: Settings, path: str, signature: Dict[str, Any]) -> None:
    """Raise CheckpointError if the checkpoint at `path` holds another model than the flags describe."""
    # Weights are float32 in either precision, so a run may be scored in the other.
    model = {**dataclasses.asdict(settings.model), "precision": signature["model"].get("precision")}
    checkpoint.check_signature(path, signature["model"], model)


def as_trained(settings: Settings, data: layouts.ShardedData, signature: Dict[str, Any]) -> layouts.ShardedData:
    """Return `data` with the pixel mean and deviation that the network was trained with, whatever set it is."""
    if settings.data.normalization not in ("auto", "dataset"):
        return data
    pixels = signature["data"].get("pixels")
    mean, deviation = (tuple(pixels[key]) if pixels else None for key in ("mean", "std"))
    return dataclasses.replace(data, pixel_mean=mean, pixel_std=deviation)


def _signature(
    settings: Settings, planned: Plan, train_examples: int, opened: Optional[layouts.ShardedData]
) -> Dict[str, Any]:
    """Return all that decides what is computed; two runs of equal signature train the same model."""
    data, recipe = settings.data, settings.recipe
    pixels = None
    if opened is not None and opened.pixel_mean and opened.pixel_std and data.normalization in ("auto", "dataset"):
        pixels = {"mean": list(opened.pixel_mean), "std": list(opened.pixel_std)}
    return {
        "model": dataclasses.asdict(settings.model),
        "data": {
            "dataset": data.dataset,
            "train_examples": train_examples,
            "resize": data.resize,
            "normalization": data.normalization,
            "pixels": pixels,
            "eval_crop": data.eval_crop,
            "crop": [data.crop, *data.crop_area, *data.crop_aspect],
            "order_block": data.order_block,
        },
        "global_batch_size": planned.batch.total,
        "optimizer": [recipe.optimizer, recipe.lars_eta],
        "momentum_correction": recipe.momentum_correction,
        "label_smoothing": recipe.label_smoothing,
        "wd_on_bn": recipe.wd_on_bn,
        "seed": recipe.seed,
        "phases": {
            phase.name: {**dataclasses.asdict(phase), "boundary_steps": list(phase.boundary_steps)}
            for phase in planned.phases
        },
        "order_of_phases": [phase.name for phase in planned.phases],
    }


def _check_same_everywhere(settings: Settings, world: World) -> None:
    facts = {
        "flags": hashlib.sha256(settings.resolved_flags.encode()).hexdigest()[:12],
        "Python": sys.version.split()[0],
        "code": provenance.code_digest(),
        **provenance.versions(),
    }
    rows = world.gather({"host": socket.gethostname(), **facts})
    for rank, row in enumerate(rows):
        for key in facts:
            if row[key] != rows[0][key]:
                raise FlagError(
                    f"rank {rank} on {row['host']} runs with other {key} ({row[key]}) than rank 0 on {rows[0]['host']} "
                    f"({rows[0][key]}); start all ranks alike, from one environment",
                    collective=True,
                )
