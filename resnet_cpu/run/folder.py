"""What a run leaves behind: the run folder with its lock, rows, result, and the progress line. Rank 0 only.

Files are append-only over attempts; nothing here imports TensorFlow but the TensorBoard writer, when it is opened.
"""

import fcntl
import json
import os
import socket
import time
from typing import IO, Any, Dict, Iterator, List, Mapping, Optional

import numpy as np

from resnet_cpu.errors import RunFolderError
from resnet_cpu.run.atomic import write_atomically


class RunFolder:
    """A run folder held by this process until it is closed or dies."""

    def __init__(self, path: str) -> None:
        """Make the folder if it is missing and lock it; raise RunFolderError if it cannot be used."""
        self.path = path
        self._files: Dict[str, IO[bytes]] = {}
        self._board: Any = None
        try:
            os.makedirs(os.path.join(path, "plots"), exist_ok=True)
            # Opened for appending: the text of a live holder must stay for the message below.
            self._lock = open(os.path.join(path, ".lock"), "a+", encoding="utf-8")  # noqa: SIM115  # held
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._lock.truncate(0)
            self._lock.write(f"{socket.gethostname()} pid {os.getpid()}")
            self._lock.flush()
        except BlockingIOError:
            self._lock.seek(0)
            holder = self._lock.read().strip() or "another process"
            raise RunFolderError(
                f"--run_dir={path}: in use by a live job ({holder}); wait for it or choose another"
            ) from None
        except OSError as error:  # also of a file system without locks
            raise RunFolderError(
                f"--run_dir={path}: cannot be written and locked ({error.strerror}); choose another"
            ) from None

    def file(self, *parts: str) -> str:
        """Return the path of a file in the folder."""
        return os.path.join(self.path, *parts)

    def append(self, name: str, row: Mapping[str, Any]) -> None:
        """Append a row to a JSON-lines file; it reaches the file system at once."""
        if name not in self._files:
            self._files[name] = file = open(self.file(name), "a+b")  # noqa: SIM115  # kept open
            if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
                file.write(b"\n")  # a line that a kill cut short must not swallow ours
        self._files[name].write(json_line(row).encode() + b"\n")
        self._files[name].flush()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write values to TensorBoard."""
        import tensorflow as tf

        if self._board is None:
            self._board = tf.summary.create_file_writer(self.file("tensorboard"))
        with self._board.as_default():
            for name, value in values.items():
                tf.summary.scalar(name, value, step)

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Replace a JSON file atomically."""
        write_atomically(self.file(name), (json.dumps(finite(content), indent=1) + "\n").encode())

    def write_text(self, name: str, content: str) -> None:
        """Replace a text file atomically."""
        write_atomically(self.file(name), content.encode())

    def close(self) -> None:
        """Flush everything and give the folder free."""
        for file in self._files.values():
            file.close()
        if self._board is not None:
            self._board.close()
        self._lock.close()


def finite(content: Any) -> Any:
    """Return `content` with what JSON cannot hold (NaN, infinities) as null, numpy numbers as Python's."""
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
    """Return a JSON file's content, or None if there is none that can be read."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError):
        return None


def read_rows(path: str) -> List[Dict[str, Any]]:
    """Return the rows of a JSON-lines file, of each step the last attempt's, in the order of the steps."""
    rows: Dict[int, Dict[str, Any]] = {}
    for row in _parsed_lines(path):
        rows[row["step"]] = row
    return [rows[step] for step in sorted(rows)]


def _parsed_lines(path: str) -> Iterator[Dict[str, Any]]:
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                try:
                    yield json.loads(line)
                except ValueError:
                    continue  # a line that a kill cut short
    except OSError:
        return


class Stopwatch:
    """Seconds since it was made, by a clock that nobody sets."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def seconds(self) -> float:
        return time.monotonic() - self._start
