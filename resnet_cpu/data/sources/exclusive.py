"""One process at a time prepares a data folder, and never over another set."""

import contextlib
import os
import re
from typing import Any, Dict, Iterator, Optional

from resnet_cpu.data import shards
from resnet_cpu.errors import DataError, RunFolderError
from resnet_cpu.run import lock

_LOCK = ".prepare.lock"
# Shards and indexes that are being written, and nothing else that may be in the folder.
_TEMPORARY = re.compile(r"(train|validation)-\d{5}-of-\d{5}(\.index\.npy)?\.tmp\d+")


@contextlib.contextmanager
def preparing(folder: str, dataset: str) -> Iterator[Optional[Dict[str, Any]]]:
    """Make the folder and hold its lock; yield the manifest of `dataset` that is there already, or None.

    Raises DataError if the folder contains another data set, RunFolderError if another process is writing to it.
    """
    os.makedirs(folder, exist_ok=True)
    try:
        held = lock.FolderLock(folder, _LOCK)
    except lock.InUse as holder:
        raise RunFolderError(
            f"--data_dir={folder}: another process is preparing this folder ({holder}); start prepare once, not on "
            "several ranks"
        ) from None
    try:
        manifest = shards.read_manifest(folder) if os.path.exists(os.path.join(folder, shards.MANIFEST)) else None
        if manifest is not None and manifest.get("dataset") != dataset:
            raise DataError(
                f"--data_dir={folder}: contains {manifest.get('dataset')} already; choose another folder for {dataset}"
            )
        for name in os.listdir(folder):
            if _TEMPORARY.fullmatch(name):  # of a process that was killed
                os.remove(os.path.join(folder, name))
        yield manifest
    finally:
        held.release()
