"""Start a command with a fault in it, and watch until all of its processes are gone."""

import contextlib
import os
import re
import signal
import subprocess
import tempfile
import threading
import time
import uuid
from typing import List, NamedTuple, Optional, Sequence

from conftest import OUTSIDE, ROOT

from resnet_cpu import faults

TOKEN = "RESNET_CPU_TEST_ATTEMPT"  # in the environment of every process of an attempt
LONGEST_S = 600.0  # for an attempt that meets no fault
_POLL_S = 0.1
_LOOK_AGAIN_S = 0.02


class Ended(NamedTuple):
    """How an attempt ended."""

    code: int
    reached: bool  # whether the fault's stage was reached
    seconds: float  # from the fault, or else from the start, until no process was left
    left: int  # processes that had to be killed, because they were still there after the time allowed
    out: str
    err: str


def run(command: Sequence[str], fault: Optional[str], within: float) -> Ended:
    """Run `command` with RESNET_CPU_FAULT=`fault`; wait `within` seconds after it, then kill the rest."""
    token = uuid.uuid4().hex
    environment = {**OUTSIDE, TOKEN: token, **({faults.VARIABLE: fault} if fault else {})}
    delay = float(fault.partition("@")[2] or 0) if fault else 0.0
    began, lines, happened = time.monotonic(), [], []
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.PIPE, text=True, errors="replace"
        )

        def read() -> None:
            for line in process.stderr:
                lines.append(line)
                if re.match(r"fault: ", line):
                    happened.append(time.monotonic() + delay)

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        left: List[int] = []
        try:
            while process.poll() is None or processes(token):
                if time.monotonic() > (happened[0] + within if happened else began + LONGEST_S):
                    left = processes(token)
                    break
                time.sleep(_POLL_S)
            ended = time.monotonic()
        finally:  # also if the campaign is interrupted
            for pid in processes(token):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        code = process.wait(timeout=30)
        reader.join(timeout=30)
        out.seek(0)
        start = happened[0] if happened else began
        return Ended(code, bool(happened), max(ended - start, 0.0), len(left), out.read(), "".join(lines))


def processes(token: str) -> List[int]:
    """Return the processes of this machine that have `token` in their environment; those that are dead have none.

    A process that is starting a program has no readable environment for a moment: where none is found, look twice.
    """
    found = _look(token)
    if not found:
        time.sleep(_LOOK_AGAIN_S)
        found = _look(token)
    return found


def _look(token: str) -> List[int]:
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/environ", "rb") as file:
                    if token.encode() in file.read():
                        found.append(int(name))
            except OSError:
                continue  # it has just ended, or belongs to another user
    return found
