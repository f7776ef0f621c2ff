"""Files that are absent, old or complete, but never half-written."""

import contextlib
import os
from typing import Iterator, Union


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
    """Name the file at `path` in an OSError that names none, as those of writing to an open file."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = path
        raise


def write_atomically(path: str, content: Union[bytes, memoryview]) -> None:
    """Write `content` to a temporary file beside `path`, flush it to the disk and rename it; raise OSError on failure.

    Afterwards the file at `path` is absent, old or complete, also after a power loss.
    """
    temporary = f"{path}.tmp{os.getpid()}"
    try:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)  # of a killed process with the same number; or a link that another user put there
        with naming(path), open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise
