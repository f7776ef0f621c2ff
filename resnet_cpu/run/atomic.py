"""Files that are absent, old or complete, but never half-written."""

import contextlib
import os
from typing import Union


def write_atomically(path: str, content: Union[bytes, memoryview]) -> None:
    """Write `content` to a temporary file beside `path`, flush it to the disk and rename it; raise OSError on failure.

    Afterwards the file at `path` is absent, old or complete, also after a power loss.
    """
    temporary = f"{path}.tmp{os.getpid()}"
    try:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)  # of a killed process with the same number; or a link that another user put there
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise
