"""Faults on purpose, for tests: RESNET_CPU_FAULT=RANK:STAGE[:N]:KIND[@SECONDS].

Rank RANK fails when it reaches a stage whose name matches the pattern STAGE for the Nth time (default: the first).
With @SECONDS it fails that long afterwards, wherever it is by then. `tests/faults/campaign.py` uses this; without the
variable, `point` does nothing.
"""

import errno
import fnmatch
import os
import re
import signal
import sys
import threading
import time
from typing import Any, Optional

from resnet_cpu.errors import FlagError

VARIABLE = "RESNET_CPU_FAULT"
SIGNALS = {
    "kill": signal.SIGKILL,
    "term": signal.SIGTERM,
    "stop": signal.SIGSTOP,  # as a host that swaps or a file server that does not answer
    "request": signal.SIGUSR1,
}
ERRORS = {"full": errno.ENOSPC, "readonly": errno.EROFS}
KINDS = (*SIGNALS, *ERRORS, "exception", "exit", "nan", "slow")
EXIT_CODE = 5
SLOW_S = 0.2  # by which the stage is delayed, the Nth time and from then on


class _Fault:
    """The fault that the environment asks for."""

    def __init__(self, text: str) -> None:
        self._text = text
        found = re.fullmatch(r"(\d+):(.+?)(?::(\d+))?:([a-z]+)(?:@(\d+\.?\d*))?", text)
        if found is None or found[4] not in KINDS or (found[5] and found[4] not in (*SIGNALS, "exit")):
            raise FlagError(
                f"{VARIABLE}={text}: not RANK:STAGE[:N]:KIND[@SECONDS], with KIND one of {', '.join(KINDS)}; this "
                "variable is for tests only, unset it"
            )
        self._rank, self._stage, self._number, self._kind = int(found[1]), found[2], int(found[3] or 1), found[4]
        self._delay = float(found[5] or 0)
        self._seen = 0
        self._mutex = threading.Lock()

    def reach(self, stage: str, value: Any) -> Any:
        from resnet_cpu.cluster import control

        if control.announced()[1] != self._rank or not fnmatch.fnmatchcase(stage, self._stage):
            return value
        with self._mutex:  # stages of a save are reached in another thread than those of a step
            self._seen += 1
            seen = self._seen
        if seen == self._number or (self._kind == "slow" and seen > self._number):
            if seen == self._number:
                # The first line feed ends what another thread or rank has begun to write.
                os.write(2, f"\nfault: {self._text} at {stage}\n".encode())
            return self._happen(stage, value)
        return value

    def _happen(self, stage: str, value: Any) -> Any:
        if self._delay:
            timer = threading.Timer(self._delay, self._end)
            timer.daemon = True
            timer.start()
        elif self._kind in ERRORS:
            raise OSError(ERRORS[self._kind], os.strerror(ERRORS[self._kind]), stage)
        elif self._kind == "exception":
            raise RuntimeError(f"{VARIABLE} at {stage}")
        elif self._kind == "nan":
            return value * float("nan")
        elif self._kind == "slow":
            time.sleep(SLOW_S)
        else:
            self._end()
        return value

    def _end(self) -> None:
        if self._kind == "exit":
            sys.stderr.flush()
            os._exit(EXIT_CODE)
        os.kill(os.getpid(), SIGNALS[self._kind])


_asked = os.environ.get(VARIABLE)
_fault: Optional[_Fault] = None


def point(stage: str, value: Any = None) -> Any:
    """Mark that this rank has reached `stage`; return `value`, times NaN if that is the fault asked for."""
    global _fault
    if not _asked:
        return value
    if _fault is None:
        _fault = _Fault(_asked)
    return _fault.reach(stage, value)
