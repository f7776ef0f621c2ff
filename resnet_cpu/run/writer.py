"""Writing in the background: training continues while a thread writes what it was given a copy of."""

import threading
from typing import Any, Callable, Optional


class Writer:
    """One thread that writes for this process: one thing at a time, so that memory for a single copy is enough.

    An error of the thread is raised by the next `start` or `finish`; until then `failed` is set.
    """

    def __init__(self) -> None:
        self._thread: Optional[threading.Thread] = None
        self._error: Optional[BaseException] = None

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: Any) -> None:
        self._wait()  # whatever ends the run: what was begun is completed before the run folder is released

    @property
    def failed(self) -> bool:
        """Return whether an error is waiting to be raised."""
        return self._error is not None

    def start(self, work: Callable[[], None]) -> None:
        """Call `work` in the thread, after the work before it; raise the error of the latter instead, if it failed."""
        self.finish()
        self._thread = threading.Thread(target=self._run, args=[work], name="writer", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait until everything is written; raise the error of the thread."""
        self._wait()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._error = error
