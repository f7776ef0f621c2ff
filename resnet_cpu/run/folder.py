"""The run folder: its lock, rows and JSON files. Only rank 0 opens one.

Rows are appended over all attempts of a run.
"""

import json
import os
import sys
import time
from typing import IO, Any, Dict, Iterator, List, Mapping, Optional

import numpy as np

from resnet_cpu.errors import RunFolderError
from resnet_cpu.run import files, lock
from resnet_cpu.run.atomic import naming, write_atomically
from resnet_cpu.run.rights import others_may_write, refused


class RunFolder:
    """A run folder that this process has locked until it is closed or the process ends."""

    def __init__(self, path: str) -> None:
        """Create the folder if it is missing and lock it; raise RunFolderError if it cannot be used."""
        self.path = path
        self._files: Dict[str, IO[bytes]] = {}
        why = refused(path)
        if why:
            raise RunFolderError(f"--run_dir={path}: {why}; choose another folder")
        try:
            os.makedirs(os.path.join(path, "plots"), exist_ok=True)
            self._lock = lock.FolderLock(path)
        except lock.InUse as holder:
            raise RunFolderError(
                f"--run_dir={path}: in use by a live job ({holder}); wait for it or choose another folder"
            ) from None
        except OSError as error:
            raise RunFolderError(
                f"--run_dir={path}: cannot be written and locked ({error.strerror}); choose another folder"
            ) from None
        others = others_may_write(path)
        if others:
            print(
                f"warning: --run_dir={path}: {others}, and could replace its checkpoints; chmod o-w, or choose a "
                "folder of your own",
                file=sys.stderr,
                flush=True,
            )

    def file(self, *parts: str) -> str:
        """Return the path of a file in the folder."""
        return os.path.join(self.path, *parts)

    def check(self) -> None:
        """Raise RunFolderError if another process has taken over the folder while this one was suspended."""
        self._lock.check()

    def append(self, name: str, row: Mapping[str, Any]) -> None:
        """Append a row to a JSON-lines file and flush it."""
        self.check()
        if name not in self._files:
            self._files[name] = file = open(self.file(name), "a+b")  # noqa: SIM115  # kept open
            if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
                file.write(b"\n")  # the last line was cut short by a kill: begin a new one
        with naming(self.file(name)):
            self._files[name].write(json_line(row).encode() + b"\n")
            self._files[name].flush()

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Replace a JSON file atomically."""
        self.check()
        write_atomically(self.file(name), (json.dumps(finite(content), indent=1) + "\n").encode())

    def write_text(self, name: str, content: str) -> None:
        """Replace a text file atomically."""
        self.check()
        write_atomically(self.file(name), content.encode())

    def close(self) -> None:
        """Flush and close all files and release the folder."""
        try:
            for name, file in self._files.items():
                with naming(self.file(name)):
                    file.close()
        finally:
            self._lock.release()


def finite(content: Any) -> Any:
    """Return `content` with NaN and infinities, which JSON does not have, as None, and numpy numbers as Python's."""
    if isinstance(content, Mapping):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [finite(value) for value in content]
    if isinstance(content, np.generic):
        content = content.item()
    if isinstance(content, float) and not np.isfinite(content):
        return None
    return content


def json_line(content: Any) -> str:
    """Return `content` as one line of strict JSON."""
    return json.dumps(finite(content), allow_nan=False)


def read_json(path: str) -> Optional[Dict[str, Any]]:
    """Return the object in a JSON file, or None if it is missing or unreadable or holds something else."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def read_record(run_dir: str) -> Optional[Dict[str, Any]]:
    """Return run.json of a run folder, or None if it is missing or damaged: a record has a signature."""
    record = read_json(os.path.join(run_dir, files.RECORD))
    return record if record is not None and isinstance(record.get("signature"), dict) else None


def read_rows(path: str) -> List[Dict[str, Any]]:
    """Return the rows of a JSON-lines file in the order of their steps; for each step that of the last attempt.

    Damaged lines are left out.
    """
    rows: Dict[int, Dict[str, Any]] = {}
    for row in _parsed_lines(path):
        rows[row["step"]] = row
    return [rows[step] for step in sorted(rows)]


def _parsed_lines(path: str) -> Iterator[Dict[str, Any]]:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    continue  # cut short by a kill
                if isinstance(row, dict) and isinstance(row.get("step"), int):
                    yield row
    except OSError:
        return


class Stopwatch:
    """Seconds since its creation, by a clock that is never set."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def seconds(self) -> float:
        return time.monotonic() - self._start
