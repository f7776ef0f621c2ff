"""Checkpoints: absent or complete, checked when read, plain arrays (npz and JSON; nothing is ever unpickled).

    checkpoints/step-00001234/  weights.npz  optimizer.npz  manifest.json

They are written to a temporary folder, flushed to the disk and renamed; the manifest holds size and SHA-256 of each
file, and the shape and dtype of each array.
"""

import hashlib
import io
import json
import os
import re
import shutil
import sys
from typing import Any, Callable, Dict, List, Mapping, Optional, Set, Tuple

import numpy as np

from resnet_cpu.errors import CheckpointError, FlagError, NotFinite, OutputError
from resnet_cpu.run.atomic import write_atomically

Arrays = Dict[str, np.ndarray]
MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{8})")


def folder(run_dir: str, step: int) -> str:
    """Return the folder of the checkpoint after `step` steps."""
    return os.path.join(run_dir, "checkpoints", f"step-{step:08d}")


def member_folder(run_dir: str, name: str) -> str:
    """Return the folder of the ensemble member `name`: a checkpoint of weights without velocity."""
    return os.path.join(run_dir, "members", name)


def save(path: str, groups: Mapping[str, Arrays], info: Mapping[str, Any]) -> None:
    """Publish the arrays of `groups` (file name without .npz -> arrays) and `info` as the checkpoint `path`.

    Raises NotFinite, and writes nothing, if a value is no finite number; OutputError if the disk is full.
    """
    for group, arrays in groups.items():
        for name, array in arrays.items():
            if not np.isfinite(array).all():
                raise NotFinite(f"{group} {name} is not finite after step {info.get('step')}; nothing was saved")
    temporary = f"{path}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        os.makedirs(temporary)
        files = {}
        for group, arrays in groups.items():
            files[f"{group}.npz"] = _write_arrays(os.path.join(temporary, f"{group}.npz"), arrays)
        manifest = {**info, "files": files}
        _write(os.path.join(temporary, MANIFEST), (json.dumps(manifest, indent=1) + "\n").encode())
        _sync_folder(temporary)
        shutil.rmtree(path, ignore_errors=True)  # a damaged one of the same step; a good one is never written twice
        os.rename(temporary, path)
        _sync_folder(os.path.dirname(path))
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OutputError(f"{path}: not saved ({error.strerror}); the earlier checkpoints are whole") from None


def _write_arrays(path: str, arrays: Arrays) -> Dict[str, Any]:
    content = _npz(arrays)
    _write(path, content)
    return {
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "arrays": {name: [list(array.shape), str(array.dtype)] for name, array in arrays.items()},
    }


def _npz(arrays: Arrays) -> memoryview:
    # Names of variables hold slashes, which are folders to a zip: fine inside the archive, never extracted.
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
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
    """Return the manifest of the checkpoint `path`, or raise CheckpointError."""
    try:
        with open(os.path.join(path, MANIFEST), encoding="utf-8") as file:
            manifest = json.load(file)
        if not isinstance(manifest["files"], dict) or not isinstance(manifest["step"], int):
            raise ValueError("not a checkpoint's")
        return manifest
    except OSError as error:
        raise CheckpointError(
            f"{path}: no checkpoint ({error.strerror}); name a folder that holds {MANIFEST}"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: unreadable {MANIFEST} ({error}); use another checkpoint") from None


def load(path: str, group: str) -> Arrays:
    """Return the arrays of one file of the checkpoint `path`; raise CheckpointError if a bit differs."""
    name = f"{group}.npz"
    expected = read_manifest(path)["files"].get(name)
    if expected is None:
        raise CheckpointError(f"{path}: holds no {name}; use another checkpoint")
    try:
        with open(os.path.join(path, name), "rb") as file:
            content = file.read()
    except OSError as error:
        raise CheckpointError(f"{path}/{name}: {error.strerror}; use another checkpoint") from None
    if hashlib.sha256(content).hexdigest() != expected["sha256"]:
        raise CheckpointError(f"{path}/{name}: damaged (SHA-256 differs from the manifest's); use another checkpoint")
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return {key: arrays[key] for key in arrays.files}


def find_weights(path: str) -> str:
    """Return the file of weights that `path` names: an .npz file, a checkpoint's folder or a run's (its newest)."""
    if os.path.isfile(path):
        return path
    if steps(path):
        found = newest(path)
        path = found[0] if found else path
    weights = os.path.join(path, "weights.npz")
    if not os.path.isfile(weights):
        raise CheckpointError(f"{path}: no weights; name a run's folder, a checkpoint's, or an .npz file of --export")
    return weights


def read_weights(path: str) -> Arrays:
    """Return the weights and statistics that `path` names, see `find_weights`; nothing is unpickled."""
    weights = find_weights(path)
    folder_of_it = os.path.dirname(weights)
    if os.path.basename(weights) == "weights.npz" and os.path.exists(os.path.join(folder_of_it, MANIFEST)):
        return load(folder_of_it, "weights")
    try:
        with np.load(weights, allow_pickle=False) as arrays:
            return {key: arrays[key] for key in arrays.files}
    except Exception as error:  # a damaged zip raises many kinds
        raise CheckpointError(f"{weights}: unreadable as .npz ({error}); export the weights again") from None


def check_export(path: str) -> None:
    """Raise FlagError if something lies at `path` already, or its folder does not exist."""
    if not path:
        raise FlagError("--export=: is empty; name a file.npz or a folder")
    if os.path.lexists(path):
        raise FlagError(f"--export={path}: is there already; choose another name or remove it")
    parent = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(parent):
        raise FlagError(f"--export={path}: no folder {parent}; make it first")


def write_weights(path: str, arrays: Arrays) -> None:
    """Write arrays as an .npz file that is either absent, old or complete."""
    write_atomically(path, _npz(arrays))


def digest(path: str) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def _verify(path: str) -> None:
    for name in read_manifest(path)["files"]:
        load(path, name[: -len(".npz")])


def steps(run_dir: str) -> List[int]:
    """Return the steps of all published checkpoints, rising."""
    try:
        names = os.listdir(os.path.join(run_dir, "checkpoints"))
    except OSError:
        return []
    return sorted(int(match.group(1)) for match in map(_NAME.fullmatch, names) if match)


def newest(run_dir: str) -> Optional[Tuple[str, Dict[str, Any]]]:
    """Return (path, manifest) of the newest checkpoint whose every file is whole; say loudly which are passed over."""
    damaged = None
    for step in reversed(steps(run_dir)):
        path = folder(run_dir, step)
        try:
            _verify(path)
        except CheckpointError as error:
            print(f"checkpoint: PASSED OVER: {error}", file=sys.stderr, flush=True)
            damaged = error
            continue
        return path, read_manifest(path)
    if damaged is not None:
        raise CheckpointError(f"no whole checkpoint left in {run_dir}; the last one: {damaged}")
    return None


def prune(run_dir: str, keep: int, needed_from: Callable[[int], Set[int]] = lambda step: set()) -> None:
    """Remove all but the newest `keep` checkpoints and those that are still needed, and what a killed job left behind.

    `needed_from(step)` names the steps whose checkpoints a run needs that goes on from `step`: from any of those kept.
    """
    parent = os.path.join(run_dir, "checkpoints")
    there = steps(run_dir)
    needed = needed_from(there[-keep:][0]) if there else set()
    for step in there[:-keep]:
        if step not in needed:
            shutil.rmtree(folder(run_dir, step), ignore_errors=True)
    if os.path.isdir(parent):
        for name in os.listdir(parent):
            if name.endswith(".tmp"):
                shutil.rmtree(os.path.join(parent, name), ignore_errors=True)


def differences(there: Mapping[str, Any], here: Mapping[str, Any], prefix: str = "") -> List[str]:
    """Return `name: A there, B here` for every leaf in which two nested dictionaries differ."""
    found = []
    for key in sorted({*there, *here}):
        name = f"{prefix}{key}"
        one, other = there.get(key), here.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            found += differences(one, other, f"{name}.")
        elif isinstance(one, Mapping) or isinstance(other, Mapping):
            found.append(f"{name} only {'there' if other is None else 'here'}")
        elif one != other:
            found.append(f"{name} {one} there, {other} here")
    return found


def check_signature(path: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raise CheckpointError that tells the differences, if a checkpoint or run belongs to another recipe or model."""
    # What a phase comes to follows from other flags: those first.
    found = sorted(differences(there, here), key=lambda text: text.startswith("phases."))
    if found:
        more = f" and {len(found) - 6} more" if len(found) > 6 else ""
        raise CheckpointError(
            f"{path} belongs to another run: {'; '.join(found[:6])}{more}; choose another --run_dir or the same flags"
        )
