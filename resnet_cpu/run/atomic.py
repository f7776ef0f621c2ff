"""Whole files: written so that they are absent, old or complete, never half-written; and their SHA-256."""

import contextlib
import hashlib
import os
from typing import BinaryIO, Iterator, Union

_BLOCK = 2**20  # bytes that are hashed at a time


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
    """Name the file at `path` in an OSError that names none, as those of writing to an open file."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = path
        raise


@contextlib.contextmanager
def open_atomically(path: str) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` to write to, and at the end flush it to the disk and rename it.

    Afterwards the file at `path` is absent, old or complete, also after a power loss. Raises OSError on failure.
    """
    temporary = f"{path}.tmp{os.getpid()}"
    try:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)  # of a killed process with the same number; or a link that another user put there
        with naming(path), open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise


def write_atomically(path: str, content: Union[bytes, memoryview]) -> None:
    """Write `content` to the file at `path`, see `open_atomically`."""
    with open_atomically(path) as file:
        file.write(content)


def sha256_of(path: str) -> str:
    """Return the SHA-256 of the file at `path` in hexadecimal digits; raise OSError if it cannot be read."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
