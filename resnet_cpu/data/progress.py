"""Progress of long work on data: how much is done, the rate and the time left, every ten seconds."""

import sys
import time

from resnet_cpu.text import duration

REPORT_EVERY_S = 10.0


class Progress:
    """Counts what is done and prints a line on standard error now and then."""

    def __init__(self, command: str, things: str, total: int) -> None:
        """Begin `total` things, such as images, of a command."""
        self._command, self._things, self._total, self._done = command, things, total, 0
        self._started = self._reported = time.monotonic()

    def add(self, count: int) -> None:
        """Count more that are done; print a line if the last one was ten seconds ago."""
        self._done += count
        now = time.monotonic()
        if now - self._reported < REPORT_EVERY_S:
            return
        self._reported = now
        rate = self._done / (now - self._started)
        digits = 0 if rate >= 10 else 1
        print(
            f"{self._command}: {self._done:,} of {self._total:,} {self._things}, {rate:,.{digits}f} a second, "
            f"{duration((self._total - self._done) / rate)} left",
            file=sys.stderr,
            flush=True,
        )
