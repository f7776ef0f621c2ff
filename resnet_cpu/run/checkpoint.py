"""Checkpoints: absent or complete, verified when read, plain arrays (npz and JSON; nothing is ever unpickled).

    checkpoints/step-00001234/  weights.npz  optimizer.npz  manifest.json

A checkpoint is written to a temporary folder, flushed to the disk and renamed. The manifest holds the size and SHA-256
of each file, the shape and dtype of each array, and its own SHA-256.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import sys
from typing import Any, Callable, Dict, List, Mapping, Optional, Set, Tuple

import numpy as np

from resnet_cpu import faults
from resnet_cpu.errors import CheckpointError, FlagError, NotFinite, OutputError
from resnet_cpu.run.atomic import write_atomically

Arrays = Dict[str, np.ndarray]
MANIFEST = "manifest.json"
_WEIGHTS = "weights.npz"
_FORMAT = 2  # of the manifest; it had neither this field nor its own SHA-256 before
_NAME = re.compile(r"step-(\d{8})")
_UNFINISHED = ".tmp"  # suffix of folders that are being written; no phase, and so no member, has such a name
_REPLACED = "+old.tmp"  # suffix of a published folder that is being replaced; "+" is not allowed in names of phases


def folder(run_dir: str, step: int) -> str:
    """Return the folder of the checkpoint after `step` steps."""
    return os.path.join(run_dir, "checkpoints", f"step-{step:08d}")


def member_folder(run_dir: str, name: str) -> str:
    """Return the folder of the ensemble member `name`: a checkpoint with weights only."""
    return os.path.join(run_dir, "members", name)


def save(path: str, groups: Mapping[str, Arrays], info: Mapping[str, Any]) -> None:
    """Publish the arrays of `groups` (file name without .npz -> arrays) and `info` as the checkpoint `path`.

    A checkpoint that is already there is replaced; it is removed only after the new one has taken its place. Raises
    NotFinite, and writes nothing, if a value is not finite; OutputError if writing fails.
    """
    for group, arrays in groups.items():
        for name, array in arrays.items():
            if not np.isfinite(array).all():
                raise NotFinite(f"{group} {name} is not finite after step {info.get('step')}; nothing was saved")
    _recover(path)
    kind = os.path.basename(os.path.dirname(path))  # checkpoints, members, or a member's name for its predictions
    temporary = f"{path}{_UNFINISHED}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        os.makedirs(temporary)
        faults.point(f"{kind}:folder")
        files = {}
        for group, arrays in groups.items():
            files[f"{group}.npz"] = _write_arrays(os.path.join(temporary, f"{group}.npz"), arrays)
            faults.point(f"{kind}:file")
        _write(os.path.join(temporary, MANIFEST), _manifest(info, files))
        faults.point(f"{kind}:manifest")
        _sync_folder(temporary)
        if os.path.isdir(path):
            os.rename(path, f"{path}{_REPLACED}")
            faults.point(f"{kind}:aside")
        os.rename(temporary, path)
        faults.point(f"{kind}:published")
        _sync_folder(os.path.dirname(path))
    except OSError as error:
        _recover(path)
        shutil.rmtree(temporary, ignore_errors=True)
        raise OutputError(f"{path}: not saved ({error.strerror}); earlier checkpoints are intact") from None
    shutil.rmtree(f"{path}{_REPLACED}", ignore_errors=True)


def _recover(path: str) -> None:
    """Complete a replacement of the checkpoint `path` that was interrupted: keep the one that is published.

    Between the two renames of `save` only the old one is there, under another name, and gets its name back.
    """
    replaced = f"{path}{_REPLACED}"
    if os.path.isdir(path):
        shutil.rmtree(replaced, ignore_errors=True)
    elif os.path.isdir(replaced):
        os.rename(replaced, path)


def recover(run_dir: str) -> None:
    """Complete replacements of checkpoints and members that a kill interrupted; only for the holder of the folder."""
    for parent in (os.path.join(run_dir, "checkpoints"), os.path.join(run_dir, "members")):
        for name in os.listdir(parent) if os.path.isdir(parent) else ():
            if name.endswith(_REPLACED):
                _recover(os.path.join(parent, name[: -len(_REPLACED)]))


def _manifest(info: Mapping[str, Any], files: Mapping[str, Any]) -> bytes:
    """Return the content of a manifest, with its own SHA-256 at the end: computed with "" in its place."""
    text = json.dumps({"format": _FORMAT, **info, "files": files, "sha256": ""}, indent=1) + "\n"
    start, _, end = text.rpartition('""')
    return f'{start}"{hashlib.sha256(text.encode()).hexdigest()}"{end}'.encode()


def _write_arrays(path: str, arrays: Arrays) -> Dict[str, Any]:
    content = _npz(arrays)
    _write(path, content)
    return {
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "arrays": {name: [list(array.shape), str(array.dtype)] for name, array in arrays.items()},
    }


def _npz(arrays: Arrays) -> memoryview:
    # Names of variables contain slashes, which are folders in a zip archive; it is never extracted.
    buffer = io.BytesIO()
    contents: Dict[str, Any] = dict(arrays)
    np.savez(buffer, **contents)
    return buffer.getbuffer()


def _write(path: str, content: Any) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_manifest(path: str) -> Dict[str, Any]:
    """Return the manifest of the checkpoint `path`; raise CheckpointError if it is missing or damaged."""
    try:
        with open(os.path.join(path, MANIFEST), encoding="utf-8") as file:
            text = file.read()
        manifest = json.loads(text)
        if not isinstance(manifest["files"], dict) or not isinstance(manifest["step"], int):
            raise ValueError("not the manifest of a checkpoint")
        # Neither of the two: written before they were introduced. A damaged name leaves only one of them.
        if "format" in manifest or "sha256" in manifest:
            digest = manifest.pop("sha256", "")
            found = hashlib.sha256(text.replace(digest, "", 1).encode()).hexdigest()
            if manifest.pop("format", None) is None or found != digest:
                raise ValueError("its SHA-256 differs from the one at its end")
        return manifest
    except (FileNotFoundError, NotADirectoryError, PermissionError) as error:  # another error of I/O may pass: 74
        raise CheckpointError(
            f"{path}: not a checkpoint ({error.strerror}); name a folder that contains {MANIFEST}"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}/{MANIFEST}: damaged ({error}); use another checkpoint") from None


def load(path: str, group: str) -> Arrays:
    """Return the arrays of one file of the checkpoint `path`; raise CheckpointError if it is damaged."""
    name = f"{group}.npz"
    expected = read_manifest(path)["files"].get(name)
    if expected is None:
        raise CheckpointError(f"{path}: does not contain {name}; use another checkpoint")
    try:
        with open(os.path.join(path, name), "rb") as file:
            content = file.read()
    except (FileNotFoundError, PermissionError) as error:
        raise CheckpointError(f"{path}/{name}: {error.strerror}; use another checkpoint") from None
    if hashlib.sha256(content).hexdigest() != expected["sha256"]:
        raise CheckpointError(f"{path}/{name}: damaged (SHA-256 differs from the manifest's); use another checkpoint")
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return {key: arrays[key] for key in arrays.files}


def holds_weights(manifest: Mapping[str, Any]) -> bool:
    """Return whether a manifest is that of a checkpoint or member; not of a data set, nor of predictions."""
    files = manifest.get("files")
    return isinstance(files, dict) and _WEIGHTS in files


def weights_digest(manifest: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the weights that a manifest names, see `holds_weights`."""
    return str(manifest["files"][_WEIGHTS]["sha256"])


def find_weights(path: str) -> str:
    """Return the file of weights at `path`: an .npz file, or that of a checkpoint folder or a run's newest checkpoint.

    Raises CheckpointError if no weights are found.
    """
    if os.path.isfile(path):
        return path
    if steps(path):
        found = newest(path)
        path = found[0] if found else path
    weights = os.path.join(path, _WEIGHTS)
    if not os.path.isfile(weights):
        raise CheckpointError(
            f"{path}: no weights found; name a run folder, a checkpoint folder, or an .npz file of --export"
        )
    return weights


def read_weights(path: str) -> Arrays:
    """Return weights and batch norm's statistics by name; for `path` see `find_weights`. Nothing is unpickled."""
    weights = find_weights(path)
    parent = os.path.dirname(weights)
    if os.path.basename(weights) == _WEIGHTS and os.path.exists(os.path.join(parent, MANIFEST)):
        return load(parent, "weights")
    try:
        with np.load(weights, allow_pickle=False) as arrays:
            found = {key: arrays[key] for key in arrays.files}
    except Exception as error:  # a damaged zip archive raises exceptions of many kinds
        raise CheckpointError(f"{weights}: unreadable as .npz ({error}); export the weights again") from None
    for name, array in found.items():
        if array.dtype.kind not in "fiu" or not np.isfinite(array).all():
            problem = "not finite" if array.dtype.kind in "fiu" else f"of type {array.dtype}, not real numbers"
            raise CheckpointError(f"{weights}: {name} is {problem}; export the weights again")
    return found


def check_export(path: str) -> None:
    """Raise FlagError if `path` exists already or its folder does not."""
    if not path:
        raise FlagError("--export=: the value is empty; name a file.npz or a folder")
    if os.path.lexists(path):
        raise FlagError(f"--export={path}: already exists; choose another name or remove it")
    parent = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(parent):
        raise FlagError(f"--export={path}: the folder {parent} does not exist; create it first")


def write_weights(path: str, arrays: Arrays) -> None:
    """Write arrays as an .npz file, atomically."""
    write_atomically(path, _npz(arrays))


def verify(path: str) -> None:
    """Raise CheckpointError if a file of the checkpoint `path` is missing or damaged; reads all of them."""
    for name in read_manifest(path)["files"]:
        load(path, name[: -len(".npz")])


def steps(run_dir: str) -> List[int]:
    """Return the steps of all published checkpoints, in ascending order."""
    try:
        names = os.listdir(os.path.join(run_dir, "checkpoints"))
    except OSError:
        return []
    return sorted(int(match.group(1)) for match in map(_NAME.fullmatch, names) if match)


def newest(run_dir: str) -> Optional[Tuple[str, Dict[str, Any]]]:
    """Return (path, manifest) of the newest intact checkpoint, None if there are no checkpoints at all.

    Every file is verified; damaged checkpoints are skipped with a message. Raises CheckpointError if all are damaged.
    """
    damaged = None
    for step in reversed(steps(run_dir)):
        path = folder(run_dir, step)
        try:
            verify(path)
        except CheckpointError as error:
            print(f"checkpoint: PASSED OVER: {error}", file=sys.stderr, flush=True)
            damaged = error
            continue
        return path, read_manifest(path)
    if damaged is not None:
        raise CheckpointError(f"{run_dir}: all checkpoints are damaged; the oldest: {damaged}")
    return None


def prune(run_dir: str, keep: int, needed_from: Callable[[int], Set[int]] = lambda step: set()) -> None:
    """Remove all checkpoints but the newest `keep` and those still needed, and folders left behind by killed jobs.

    `needed_from(step)` returns the steps whose checkpoints a run needs that resumes at `step`, which may be any of
    those kept. Checkpoints with a missing or truncated file do not count among the kept.
    """
    recover(run_dir)
    parent = os.path.join(run_dir, "checkpoints")
    published = steps(run_dir)
    kept = [step for step in published if _looks_whole(folder(run_dir, step))][-keep:]
    if kept:
        needed = needed_from(kept[0])
        for step in published:
            if step < kept[0] and step not in needed:
                _remove(folder(run_dir, step))
    if os.path.isdir(parent):
        for name in os.listdir(parent):
            if name.endswith(_UNFINISHED):
                shutil.rmtree(os.path.join(parent, name), ignore_errors=True)


def _remove(path: str) -> None:
    """Remove a published folder; renamed first, so that a kill leaves no part of it under its name."""
    aside = f"{path}{_UNFINISHED}"
    with contextlib.suppress(OSError):  # what cannot be removed now is removed after the next save
        os.rename(path, aside)
    faults.point("checkpoints:rotation")
    shutil.rmtree(aside, ignore_errors=True)


def _looks_whole(path: str) -> bool:
    """Return whether the manifest is readable and every file has its size; the files themselves are not read."""
    try:
        files = read_manifest(path)["files"]
        return all(os.path.getsize(os.path.join(path, name)) == about["bytes"] for name, about in files.items())
    except (CheckpointError, OSError, KeyError, TypeError):
        return False
