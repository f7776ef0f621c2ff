"""How a job ends: exit codes, signals, and no rank left behind.

An exception on one rank does not end an MPI job by itself: the rank waits in MPI_Finalize and its peers in the next
collective. Every entry point therefore runs inside `run`, which prints the error once and ends the whole job.
"""

import contextlib
import faulthandler
import os
import signal
import socket
import stat
import sys
import threading
import time
import traceback
from types import FrameType
from typing import Any, Callable, List, NoReturn, Optional

from resnet_cpu.cluster import control, streams
from resnet_cpu.errors import OutputError, PeerLost, UserError, printable

_PEER_GRACE_S = 3.0  # how long a rank that learned of a failure from others waits for the rank that knows the cause
# Within this time mpirun notices that a host is gone (cluster/launchers.py configures it) and ends the job. If it is
# asked to abort earlier, it waits a quarter of an hour for that host's answer.
LOST_HOST_S = 30.0
_FIRST_STEP_GRACE_S = 300.0  # for tracing the graph and creating kernels, on top of the stall timeout
_SUSPENDED_S = 2.0  # a poll of the watchdog that comes later than this means that the process did not run meanwhile
_CONNECT_S = (10.0, 120.0)  # least and greatest time that the ranks are given to reach each other
_START_S = 600.0  # time that MPI is given to start on all ranks
_TOGETHER_S = 300.0  # how long a rank waits for the others at the end of an error that all ranks should have raised
_stop_signal: Optional[int] = None


def run(main: Callable[[List[str]], Optional[int]], reader_may_leave: bool = False) -> NoReturn:
    """Run an entry point to the end of the process, with the exit codes of `resnet_cpu.errors`.

    With `reader_may_leave`, for entry points that only print, the end of a pipe's reader (`plan | head`) is code 0.
    """
    streams.open_closed()
    faulthandler.enable()
    os.umask(os.umask(stat.S_IWOTH) | stat.S_IWOTH)  # what this process and the libraries in it write is not for others
    try:
        code = main(sys.argv[1:]) or 0
        sys.stdout.flush()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if code:
            _exit(code, collective=False)
    except BrokenPipeError:
        if reader_may_leave and _mpi() is None:
            os._exit(0)
        _print_error("the reader of standard output or standard error has left; run the same command again")
        _exit(OutputError.exit_code, collective=False)
    except KeyboardInterrupt:
        _print_error("interrupted")
        _exit(130, collective=False)
    except UserError as error:
        _let_rank0_report_before_mpi()
        printed = not error.collective or _rank() == 0
        if printed:
            _print_error(str(error))
        _exit(error.exit_code, error.collective, None if printed else str(error))
    except OSError as error:
        if _rank() != 0:
            _let_rank0_report_before_mpi()
        _print_error(control.describe_os_error(error))
        _exit(OutputError.exit_code, collective=False)
    except BaseException as error:
        if _comes_from_a_lost_peer(error):
            time.sleep(_PEER_GRACE_S)  # the rank that failed first aborts the job within this time
            _print_error(f"a peer was lost: {str(error).splitlines()[0][:200]}; run the same command again to resume")
            _exit(PeerLost.exit_code, collective=False)
        traceback.print_exc(file=sys.stderr)
        _print_error("internal error: the traceback is above")
        _exit(UserError.exit_code, collective=False)
    sys.exit(code)


def _rank() -> int:
    return control.announced()[1]


def _print_error(message: str) -> None:
    """Print one line on standard error that names the rank, and the host if there are several."""
    size, rank = control.announced()
    host = f" on {socket.gethostname()}" if control.several_hosts() else ""
    where = f" rank {rank}{host}" if size > 1 and rank else ""
    start = "\n" if sys.stderr.isatty() else ""  # after a progress line that is rewritten in place
    with contextlib.suppress(OSError):  # a log on a full disk must not hide the exit code
        print(f"{start}resnet_cpu{where}: {printable(message)}", file=sys.stderr, flush=True)


def _mpi() -> Any:
    """Return mpi4py's MPI while it is initialised, else None."""
    module = sys.modules.get("mpi4py.MPI")
    return module if module is not None and module.Is_initialized() and not module.Is_finalized() else None


def _let_rank0_report_before_mpi() -> None:
    """Wait on the other ranks for rank 0, which has the same error: before MPI starts, all parse the same flags."""
    if _mpi() is None and _rank() != 0:
        time.sleep(_PEER_GRACE_S)


def _comes_from_a_lost_peer(error: BaseException) -> bool:
    return type(error).__name__ == "HorovodInternalError" or "Horovod has been shut down" in str(error)


def _exit(code: int, collective: bool, unprinted: Optional[str] = None) -> NoReturn:
    """Exit with `code`: together if all ranks raised the error, else ending the other ranks as well.

    A rank whose peers have not raised it, and wait for this rank elsewhere, ends them after five minutes: until then,
    rank 0 may be drawing plots. `unprinted` is the error, if only another rank was to print it.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a full disk must not hide the code
            stream.flush()
    mpi = _mpi()
    if mpi is None:
        os._exit(code)
    if collective:
        threading.Thread(target=_end_alone, args=[code, unprinted], daemon=True).start()
        mpi.COMM_WORLD.Barrier()  # mpirun kills the others at the first non-zero exit: let rank 0 finish writing
        os._exit(code)
    abort(code)


def _end_alone(code: int, unprinted: Optional[str]) -> None:
    time.sleep(_TOGETHER_S)
    if unprinted is not None:
        _print_error(unprinted)
    abort(code)


def abort(code: int) -> NoReturn:
    """End the whole job at once, from any thread."""
    mpi = _mpi()
    if mpi is not None:
        mpi.COMM_WORLD.Abort(code)
    os._exit(code)


def connect(expected: Optional[int], patience: float) -> control.World:
    """Return the world of `control.connect`; end the job if the ranks do not reach each other in time.

    Without this, the first message through a network interface that leads nowhere waits for ever: no watchdog runs
    yet. `patience` is in seconds, limited to between ten seconds and two minutes.
    """
    answered = threading.Event()
    patience = min(max(patience, _CONNECT_S[0]), _CONNECT_S[1])
    threading.Thread(target=_await_answer, args=[answered, patience], daemon=True).start()
    try:
        return control.connect(expected)
    finally:
        answered.set()


def _await_answer(answered: threading.Event, patience: float) -> None:
    # Counted from the moment MPI runs on all ranks, which may take long if Python is read from a busy file system.
    began = time.monotonic()
    while not hasattr(sys.modules.get("mpi4py.MPI"), "Is_finalized") or _mpi() is None:
        if answered.wait(0.2):
            return
        if time.monotonic() - began > _START_S:
            break
    if answered.wait(patience):
        return
    if _rank() != 0:
        time.sleep(_PEER_GRACE_S)  # rank 0 reports it and ends the job
    _print_error(
        f"the ranks did not reach each other in {patience:g} s, perhaps because of a network interface that leads "
        "nowhere; choose another one with python -m resnet_cpu.launch --interface=NAME"
    )
    abort(PeerLost.exit_code)


def catch_stop_signals() -> None:
    """Make USR1, and the first Ctrl-C, request a clean stop instead of ending the process; rank 0 confirms it."""
    confirms = control.announced()[1] == 0

    def note(signum: int, frame: Optional[FrameType]) -> None:
        global _stop_signal
        if _stop_signal is None and confirms:  # os.write: a print may be what the signal has interrupted
            name = signal.Signals(signum).name
            with contextlib.suppress(OSError):  # standard error may be closed
                os.write(2, f"{name} received: stopping after the next step, once a checkpoint is written\n".encode())
        _stop_signal = signum
        if signum == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGUSR1, note)
    signal.signal(signal.SIGINT, note)


def stop_requested() -> bool:
    """Return whether this rank was asked to stop; whether the job stops is agreed by all ranks in the next step."""
    return _stop_signal is not None


class Watchdog:
    """Ends the job when no step has finished for too long: nothing else notices a rank that hangs.

    On several hosts it waits 30 s longer, since the cause may be a lost host that the launcher is about to notice.
    Time in which this process did not run, because the job was suspended or the machine paused, does not count.
    """

    def __init__(self, timeout: float) -> None:
        """Start with the first beat due in `timeout` seconds plus five minutes, the later ones in `timeout`."""
        self.timeout = timeout
        self._suspended = 0.0  # seconds in which the process did not run
        self.expect_first_step()
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
        self._last = self._running_time()

    def expect_first_step(self) -> None:
        """Allow five minutes more until the next beat: the graph is traced and kernels are created."""
        self._last = self._running_time() + _FIRST_STEP_GRACE_S

    def _running_time(self) -> float:
        return time.monotonic() - self._suspended

    def _watch(self) -> None:
        interval = min(1.0, self.timeout / 4)
        polled = time.monotonic()
        while not self._stopped.wait(interval):
            late = time.monotonic() - polled - interval
            if late > _SUSPENDED_S:
                self._suspended += late
            polled = time.monotonic()
            if self._running_time() - self._last > self.timeout:
                faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
                _print_error(
                    f"no step finished for {self.timeout:g} s; the stack of each thread is above. Run the same command "
                    "again to resume"
                )
                if control.several_hosts() and self._stopped.wait(LOST_HOST_S):
                    return
                abort(PeerLost.exit_code)
