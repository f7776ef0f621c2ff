"""From a listing to shards, by several processes; may be killed at any moment and continued to the same bytes.

What a shard holds depends on the listing, the seed and the options only. A folder `.prepare` in the data folder holds
what is finished: the listing, and a row for each shard, written after the shard itself. The manifest comes last.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from resnet_cpu.data import shards
from resnet_cpu.data.images import BadImage
from resnet_cpu.data.progress import REPORT_EVERY_S, Progress
from resnet_cpu.data.sources import conversion, listing, serialization
from resnet_cpu.data.sources.exclusive import preparing
from resnet_cpu.data.sources.listing import Listing, some
from resnet_cpu.errors import DataError, OutputError
from resnet_cpu.run.atomic import write_atomically

MEASURED_IMAGES = 10_000  # training images, at least, whose pixels make up the mean and the deviation
IMAGES_PER_SHARD = 2048  # of sets other than ImageNet
_SHARDS_OF_IMAGENET = {"train": 1024, "validation": 128}  # as written by TF-slim
_WORK = shards.UNFINISHED
_BAD_IMAGES = "bad_images.txt"


@dataclasses.dataclass(frozen=True)
class Task:
    """One shard to be made."""

    split: str
    shard: int
    shards: int
    rows: Tuple[int, ...]  # of the split's table
    measured: int  # the first images of the shard whose pixels are measured

    @property
    def name(self) -> str:
        return shards.shard_name(self.split, self.shard, self.shards)


def tasks_of(images: Listing, seed: int) -> List[Task]:
    """Return the shards to be made of the listing, shuffled by the seed."""
    tasks = []
    for split, table in images.splits.items():
        order = listing.shuffled(table.names, seed, split)
        count = _SHARDS_OF_IMAGENET[split] if images.dataset == "imagenet" else -(-len(order) // IMAGES_PER_SHARD)
        count = min(count, len(order))
        measured = -(-MEASURED_IMAGES // count) if split == "train" else 0
        bounds = np.linspace(0, len(order), count + 1).astype(int)
        for shard, (first, last) in enumerate(zip(bounds[:-1], bounds[1:])):
            tasks.append(Task(split, shard, count, tuple(order[first:last].tolist()), measured))
    return tasks


def prepare(
    images: Listing, folder: str, seed: int, options: conversion.Options, processes: int, leave_out_bad: bool
) -> Dict[str, int]:
    """Write the shards and the manifest to `folder`; return the number of examples of each split.

    Raises DataError for images that cannot be decoded (for all of them, at the end, unless `leave_out_bad`) and for a
    folder with other data; RunFolderError if another process writes to it; OutputError if the disk is full.
    """
    made_of = {"listing": images.identity(), "seed": seed, **dataclasses.asdict(options)}
    with preparing(folder, images.dataset) as manifest:
        if manifest is None:
            manifest = _prepare(images, folder, made_of, options, processes, leave_out_bad)
        elif manifest.get("made_of") == made_of:
            _repair(images, folder, manifest, options, processes)
        else:
            raise DataError(
                f"--data_dir={folder}: contains {images.dataset} already, prepared from other files or with other "
                "flags; choose another folder, or remove this one"
            )
    return {split: sum(row["examples"] for row in rows) for split, rows in manifest["splits"].items()}


def _prepare(
    images: Listing,
    folder: str,
    made_of: Dict[str, Any],
    options: conversion.Options,
    processes: int,
    leave_out_bad: bool,
) -> Dict[str, Any]:
    """Write what is not finished, and then the manifest, which is returned."""
    work = os.path.join(folder, _WORK)
    tasks = tasks_of(images, made_of["seed"])
    _begin(images, tasks, folder, made_of)
    rows = {task.name: row for task in tasks for row in [_finished_row(images, folder, task)] if row is not None}
    left = [task for task in tasks if task.name not in rows]
    if rows:
        print(f"prepare: {len(rows):,} of {len(tasks):,} shards are finished; continuing", file=sys.stderr, flush=True)
    _check_space(folder, images, left, options)
    for name, row in _made(left, folder, options, processes):
        rows[name] = row
    ordered = [rows[task.name] for task in tasks]
    _report_bad(folder, rows, leave_out_bad)
    manifest = _manifest(images, tasks, ordered, made_of)
    shards.write_manifest(folder, manifest)
    shutil.rmtree(work, ignore_errors=True)
    _print_summary(manifest)
    return manifest


def _repair(
    images: Listing, folder: str, manifest: Dict[str, Any], options: conversion.Options, processes: int
) -> None:
    """Make again the shards of a finished set that are missing or have another size than the manifest says."""
    expected = {row["name"]: row for rows in manifest["splits"].values() for row in rows}
    tasks = tasks_of(images, manifest["made_of"]["seed"])
    left = [task for task in tasks if not _is_whole(folder, task, expected[task.name])]
    work = os.path.join(folder, _WORK)
    shutil.rmtree(work, ignore_errors=True)
    if not left:
        print(f"prepare: {folder} is prepared already; prepare verify checks it", file=sys.stderr, flush=True)
        return
    _check_space(folder, images, left, options)
    text = f"{len(left):,} of {len(tasks):,} shards are missing or have another size; they are made again"
    print(f"prepare: {text}", file=sys.stderr, flush=True)
    os.makedirs(work, exist_ok=True)
    images.save(os.path.join(work, "listing.npz"))
    for name, row in _made(left, folder, options, processes):
        if row["sha256"] != expected[name]["sha256"]:
            path = os.path.join(folder, name)
            os.remove(path)  # else it would count as whole if its size is right
            cause = "a raw file has changed, or another version of Pillow or resnet_cpu made this set"
            if row["bad"]:
                cause = f"{len(row['bad'])} images cannot be read any more, the first: {row['bad'][0]}"
            raise DataError(f"{path}: not as before: {cause}; remove the folder, and prepare the whole set again")
    shutil.rmtree(work, ignore_errors=True)


def _is_whole(folder: str, task: Task, row: Dict[str, Any]) -> bool:
    """Return whether a shard and its index are there, the shard in the size of `row`."""
    path = os.path.join(folder, task.name)
    try:
        return os.path.getsize(path) == row["bytes"] and os.path.exists(shards.index_path(path))
    except OSError:
        return False


def _begin(images: Listing, tasks: Sequence[Task], folder: str, made_of: Dict[str, Any]) -> None:
    """Make the work folder, or check that an earlier one was begun with the same files and options.

    Bad images that were reported may have been replaced meanwhile: their shards are not finished then.
    """
    work = os.path.join(folder, _WORK)
    os.makedirs(work, exist_ok=True)
    begun, listed = os.path.join(work, "made_of.json"), os.path.join(work, "listing.npz")
    if os.path.exists(begun):
        with open(begun, encoding="utf-8") as file:
            before = json.load(file)
        changed = [key for key in made_of if before.get(key) != made_of[key]]
        replaced = None
        if changed == ["listing"] and os.path.exists(os.path.join(folder, _BAD_IMAGES)):
            replaced = listing.replaced(listed, images)
        if changed and replaced is None:
            raise DataError(
                f"--data_dir={folder}: was begun from other files or with other flags ({', '.join(changed)}); repeat "
                "the command as it was, or remove the folder"
            )
        for task in tasks:
            if replaced and not replaced[task.split].isdisjoint(task.rows):
                with contextlib.suppress(FileNotFoundError):
                    os.remove(os.path.join(work, f"{task.name}.json"))
    images.save(listed)
    write_atomically(begun, json.dumps(made_of).encode())


def _finished_row(images: Listing, folder: str, task: Task) -> Optional[Dict[str, Any]]:
    """Return the row of a shard that is finished, else None: also if one of its bad images was changed since."""
    path, table = os.path.join(folder, _WORK, f"{task.name}.json"), images.splits[task.split]
    try:
        with open(path, encoding="utf-8") as file:
            row = json.load(file)
        # A copy may keep the time of its content, but not the one at which its file was changed (ctime).
        bad = {images.files[table.files[number]] for number in (row["bad_rows"] if row["bad"] else ())}
        changed = [max(os.stat(file).st_ctime_ns, os.lstat(file).st_ctime_ns) for file in bad]  # or a link to it
        if max(changed, default=0) >= os.stat(path).st_mtime_ns:
            return None
        return row if _is_whole(folder, task, row) else None
    except (OSError, ValueError, KeyError):
        return None


def _check_space(folder: str, images: Listing, left: Sequence[Task], options: conversion.Options) -> None:
    if options.short_side:
        return  # the size is not known beforehand
    need = sum(int(images.splits[task.split].sizes[list(task.rows)].sum()) for task in left)
    paths = [os.path.join(folder, task.name) for task in left]
    free = shutil.disk_usage(folder).free + sum(os.path.getsize(path) for path in paths if os.path.exists(path))
    if need > free:
        raise OutputError(
            f"--data_dir={folder}: {need / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free; make room, choose "
            "another folder, or store smaller images with --short_side=256"
        )


# --- making shards ---------------------------------------------------------------------------------------------------

_images_here: Optional[Listing] = None  # of a process that makes shards


def _start_process(work: str, parent: int) -> None:
    """Load the listing in a new process, which ends when its parent has gone."""
    global _images_here
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent as well, and it ends its processes
    _images_here = listing.load(os.path.join(work, "listing.npz"))

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _make_shard(folder: str, task: Task, options: conversion.Options) -> Dict[str, Any]:
    assert _images_here is not None
    row = make_shard(_images_here, folder, task, options)
    write_atomically(os.path.join(folder, _WORK, f"{task.name}.json"), json.dumps(row).encode())
    return row


def make_shard(images: Listing, folder: str, task: Task, options: conversion.Options) -> Dict[str, Any]:
    """Write one shard with its index; return its row.

    Besides what the manifest has of a shard, it holds `changes` (how often what was converted), `bad` (a line for each
    image that was left out), `bad_rows` (their rows in the table), `moments` (sums over the `measured` images, see
    `conversion.Converted`).
    """
    changes: Dict[str, int] = collections.Counter()
    bad: List[str] = []
    bad_rows: List[int] = []
    moments: List[Tuple[float, ...]] = []

    def payloads() -> Iterator[bytes]:
        for number, row in enumerate(task.rows):
            name = images.splits[task.split].names[row]
            try:
                image = converted(images, task, row, options, number < task.measured)
            except BadImage as error:
                bad.append(f"{task.split}: {os.fsdecode(name)}: {error}")
                bad_rows.append(row)
                continue
            if image.change:
                changes[image.change] += 1
            if image.moments:
                moments.append(image.moments)
            yield _serialized(images, task.split, row, image)

    written = shards.write_shard(os.path.join(folder, task.name), payloads())
    total = [float(value) for value in np.sum(moments, 0)] if moments else []
    found = {"changes": changes, "bad": bad, "bad_rows": bad_rows, "moments": total, "measured": len(moments)}
    return {**written, **found}


def converted(
    images: Listing, task: Task, row: int, options: conversion.Options, measure: bool
) -> conversion.Converted:
    """Return an image of the listing as it goes into the shards; raise BadImage if it cannot be used."""
    table = images.splits[task.split]
    path = images.files[table.files[row]]
    return conversion.convert(
        listing.read_image(path, int(table.offsets[row]), int(table.sizes[row])), options, measure
    )


def _serialized(images: Listing, split: str, row: int, image: conversion.Converted) -> bytes:
    table = images.splits[split]
    return serialization.serialize(
        {
            "image/encoded": image.encoded,
            "image/format": b"JPEG",
            "image/height": image.height,
            "image/width": image.width,
            "image/channels": image.channels,
            "image/class/label": int(table.labels[row]) + images.label_base,
            "image/class/synset": os.fsencode(images.classes[table.labels[row]]),
            "image/filename": bytes(table.names[row]),
        }
    )


def _made(
    tasks: Sequence[Task], folder: str, options: conversion.Options, processes: int
) -> Iterator[Tuple[str, Dict[str, Any]]]:
    """Make the shards in `processes` processes; yield (name, row) of each as it is finished, and report progress."""
    progress = Progress("prepare", "images", sum(len(task.rows) for task in tasks))
    # No fork: it copies a process with threads. Each process has one interpreter and Pillow, about 100 MB.
    context = multiprocessing.get_context("spawn")
    initial = os.path.join(folder, _WORK), os.getpid()
    pool = concurrent.futures.ProcessPoolExecutor(
        min(processes, max(len(tasks), 1)), context, initializer=_start_process, initargs=initial
    )
    waiting = iter(tasks)
    running = {}
    try:
        for task in waiting:
            running[pool.submit(_make_shard, folder, task, options)] = task
            if len(running) < 2 * processes:
                continue
            yield from _finished(running, progress)
        while running:
            yield from _finished(running, progress)
    except BrokenProcessPool:
        raise OutputError(
            "prepare: a process that makes shards was killed, perhaps because memory ran out; use fewer with "
            "--threads, and repeat the command to continue"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _finished(running: Dict[Any, Task], progress: Progress) -> Iterator[Tuple[str, Dict[str, Any]]]:
    done, _ = concurrent.futures.wait(running, REPORT_EVERY_S, concurrent.futures.FIRST_COMPLETED)
    for future in done:
        task = running.pop(future)
        progress.add(len(task.rows))
        yield task.name, future.result()


# --- the end ---------------------------------------------------------------------------------------------------------


def _report_bad(folder: str, rows: Mapping[str, Dict[str, Any]], leave_out: bool) -> None:
    """List the images that were left out; raise DataError unless that is wanted, or if a split has no other image."""
    path = os.path.join(folder, _BAD_IMAGES)
    bad = [line for _, row in sorted(rows.items()) for line in row["bad"]]
    if not bad:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)  # of an earlier attempt
        return
    write_atomically(path, "".join(f"{line}\n" for line in bad).encode(errors="surrogateescape"))
    text = f"{len(bad):,} images cannot be used, listed in {path}: {some(bad, 3)}"
    examples: Dict[str, int] = collections.Counter()
    for name, row in rows.items():
        examples[name.split("-")[0]] += row["examples"]
    empty = [split for split, number in examples.items() if not number]
    if leave_out and not empty:
        print(f"WARNING: {text}; they are left out", file=sys.stderr, flush=True)
        return
    none_left = f"no image of {' and '.join(empty)} can be used, so replace them"
    raise DataError(f"{text}; {none_left if empty else 'replace them, or leave them out with --allow_incomplete'}")


def _manifest(
    images: Listing, tasks: Sequence[Task], rows: Sequence[Dict[str, Any]], made_of: Dict[str, Any]
) -> Dict[str, Any]:
    kept = ("name", "examples", "bytes", "sha256")
    splits: Dict[str, List[Dict[str, Any]]] = {split: [] for split in images.splits}
    changes: Dict[str, int] = collections.Counter()
    for task, row in zip(tasks, rows):
        splits[task.split].append({key: row[key] for key in kept})
        changes.update(row["changes"])
    measured = sum(row["measured"] for row in rows)
    mean = deviation = None
    if measured:
        moments = np.sum([row["moments"] for row in rows if row["moments"]], 0) / measured
        mean = [round(float(value), 4) for value in moments[:3]]
        deviation = [round(float(value), 4) for value in np.sqrt(np.maximum(moments[3:] - moments[:3] ** 2, 1e-6))]
    return {
        "dataset": images.dataset,
        "source": images.source,
        "num_classes": len(images.classes),
        "label_base": images.label_base,
        "pixel_mean": mean,
        "pixel_std": deviation,
        "pixel_statistics_of": measured,
        "changes": dict(sorted(changes.items())),
        "left_out": sum(len(row["bad"]) for row in rows),
        "made_of": made_of,
        "classes": list(images.classes),
        "splits": splits,
    }


def _print_summary(manifest: Dict[str, Any]) -> None:
    for split, rows in manifest["splits"].items():
        print(
            f"prepare: {split}: {sum(row['examples'] for row in rows):,} images in {len(rows):,} shards, "
            f"{sum(row['bytes'] for row in rows) / 1e9:.2f} GB",
            file=sys.stderr,
        )
    changes = ", ".join(f"{count:,} {change}" for change, count in manifest["changes"].items()) or "none"
    print(f"prepare: images converted: {changes}; {len(manifest['classes']):,} classes", file=sys.stderr, flush=True)
