"""How a job ends: exit codes, signals, and no rank left behind.

An exception on one rank does not end an MPI job by itself: the rank waits in MPI_Finalize and its peers in the next
collective. So every entry point runs inside `run`, which tells the error once and takes the whole job down.
"""

import contextlib
import faulthandler
import os
import signal
import socket
import sys
import threading
import time
import traceback
from types import FrameType
from typing import Any, Callable, List, NoReturn, Optional

from resnet_cpu.cluster import control
from resnet_cpu.errors import OutputError, PeerLost, UserError

_PEER_GRACE_S = 3.0  # what a rank that only heard of a failure waits for the rank that knows more
# Within it mpirun notices that a host is gone (cluster/launchers.py sets how) and ends the job. If it is told to abort
# before, it waits a quarter of an hour for that host's answer.
LOST_HOST_S = 30.0
_FIRST_STEP_GRACE_S = 300.0  # for tracing the graph and creating kernels, on top of the stall timeout
_CONNECT_S = (10.0, 120.0)  # what the ranks are given to find each other, at least and at most
_START_S = 600.0  # what MPI is given to come up
_stop_signal: Optional[int] = None


def run(main: Callable[[List[str]], Optional[int]]) -> NoReturn:
    """Run an entry point to the end of the process, with the exit codes of `resnet_cpu.errors`."""
    faulthandler.enable()
    try:
        code = main(sys.argv[1:]) or 0
        sys.stdout.flush()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if code:
            _end(code, collective=False)
    except BrokenPipeError:  # `plan | head`: who reads has enough
        os._exit(0 if _mpi() is None else 1)
    except KeyboardInterrupt:
        _tell("interrupted")
        _end(130, collective=False)
    except UserError as error:
        _wait_for_rank0_to_tell_the_same()
        if not error.collective or _rank() == 0:
            _tell(str(error))
        _end(error.exit_code, error.collective)
    except OSError as error:
        if _rank() != 0:
            _wait_for_rank0_to_tell_the_same()
        _tell(control.told_of_file(error))
        _end(OutputError.exit_code, collective=False)
    except BaseException as error:
        if _heard_of_a_peer(error):
            time.sleep(_PEER_GRACE_S)  # the rank that failed first aborts the job within this time
            _tell(f"a peer was lost: {str(error).splitlines()[0][:200]}; run the same command again to go on")
            _end(PeerLost.exit_code, collective=False)
        traceback.print_exc(file=sys.stderr)
        _tell("internal error: the traceback is above")
        _end(UserError.exit_code, collective=False)
    sys.exit(code)


def _rank() -> int:
    return control.announced()[1]


def _tell(message: str) -> None:
    size, rank = control.announced()
    host = f" on {socket.gethostname()}" if control.several_hosts() else ""
    where = f" rank {rank}{host}" if size > 1 and rank else ""
    printable = "".join(
        c if c.isprintable() else repr(c)[1:-1] for c in message
    )  # no control characters of a file name
    start = "\n" if sys.stderr.isatty() else ""  # after a progress line that is rewritten in place
    print(f"{start}resnet_cpu{where}: {printable}", file=sys.stderr, flush=True)


def _mpi() -> Any:
    """Return mpi4py's MPI while it is up, else None."""
    module = sys.modules.get("mpi4py.MPI")
    return module if module is not None and module.Is_initialized() and not module.Is_finalized() else None


def _wait_for_rank0_to_tell_the_same() -> None:
    """Before MPI is up all ranks trip over the same flags: rank 0 says so and ends the job."""
    if _mpi() is None and _rank() != 0:
        time.sleep(_PEER_GRACE_S)


def _heard_of_a_peer(error: BaseException) -> bool:
    return type(error).__name__ == "HorovodInternalError" or "Horovod has been shut down" in str(error)


def _end(code: int, collective: bool) -> NoReturn:
    """Leave with `code`: together where all ranks know, else taking the others down."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a full disk must not hide the code
            stream.flush()
    mpi = _mpi()
    if mpi is None:
        os._exit(code)
    if collective:
        mpi.COMM_WORLD.Barrier()  # mpirun kills the others at the first non-zero exit: rank 0 must be done writing
        os._exit(code)
    abort(code)


def abort(code: int) -> NoReturn:
    """End the whole job at once, from any thread."""
    mpi = _mpi()
    if mpi is not None:
        mpi.COMM_WORLD.Abort(code)
    os._exit(code)


def connect(expected: Optional[int], patience: float) -> control.World:
    """Return `control.connect`'s world; end the job if the ranks do not reach each other within `patience` seconds.

    Through a network interface that leads nowhere the first message waits for ever, and no watchdog runs yet. However
    patient the caller, ten seconds are not too much and two minutes are enough.
    """
    answered = threading.Event()
    patience = min(max(patience, _CONNECT_S[0]), _CONNECT_S[1])
    threading.Thread(target=_await_answer, args=[answered, patience], daemon=True).start()
    try:
        return control.connect(expected)
    finally:
        answered.set()


def _await_answer(answered: threading.Event, patience: float) -> None:
    # Counted from when MPI is up on all ranks, which may take long where Python is read from a busy file system.
    began = time.monotonic()
    while not hasattr(sys.modules.get("mpi4py.MPI"), "Is_finalized") or _mpi() is None:
        if answered.wait(0.2):
            return
        if time.monotonic() - began > _START_S:
            break
    if answered.wait(patience):
        return
    if _rank() != 0:
        time.sleep(_PEER_GRACE_S)  # rank 0 tells it, and ends the job
    _tell(
        f"the ranks did not reach each other in {patience:g} s, perhaps by a network interface that leads nowhere; "
        "name the right one: python -m resnet_cpu.launch --interface=NAME"
    )
    abort(PeerLost.exit_code)


def catch_stop_signals() -> None:
    """Let USR1 (and Ctrl-C, the first time) ask for a clean stop instead of ending the process."""

    def note(signum: int, frame: Optional[FrameType]) -> None:
        global _stop_signal
        _stop_signal = signum
        if signum == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGUSR1, note)
    signal.signal(signal.SIGINT, note)


def stop_requested() -> bool:
    """Return whether this rank was asked to stop; whether the job stops is for all ranks to agree."""
    return _stop_signal is not None


class Watchdog:
    """Ends the job when no step was finished for too long: nothing else notices a rank that hangs.

    On several hosts 30 s later, since what hangs may be a host that the launcher is about to miss.
    """

    def __init__(self, timeout: float) -> None:
        """`timeout` in seconds; the first `beat` may take five minutes longer."""
        self.timeout = timeout
        self._last = time.monotonic() + _FIRST_STEP_GRACE_S
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def beat(self) -> None:
        """Note that something was finished."""
        self._last = time.monotonic()

    def _watch(self) -> None:
        while not self._stopped.wait(min(1.0, self.timeout / 4)):
            if time.monotonic() - self._last > self.timeout:
                faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
                _tell(f"no step finished for {self.timeout:g} s; where the threads are is above. Run the command again")
                if control.several_hosts() and self._stopped.wait(LOST_HOST_S):
                    return
                abort(PeerLost.exit_code)
