"""Files that are either absent, old or complete, whatever is interrupted."""

import contextlib
import os
from typing import Union


def write_atomically(path: str, content: Union[bytes, memoryview]) -> None:
    """Write `content` to a temporary file beside `path`, flush it to the disk and rename it; raise OSError on failure.

    The file is either absent, old or complete, also after a power loss.
    """
    temporary = f"{path}.tmp{os.getpid()}"
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise
