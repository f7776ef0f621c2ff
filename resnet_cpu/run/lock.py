"""A lock on a folder: `flock` where the file system has it, otherwise a lock file with a heartbeat.

The lock file holds host, process id and the time of the last heartbeat, and is rewritten every HEARTBEAT_S seconds. A
file that is not rewritten for STALE_S seconds was left behind by a job that died, and is taken over.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
from typing import IO, Any, Dict, Optional

from resnet_cpu.errors import RunFolderError
from resnet_cpu.run.atomic import write_atomically

HEARTBEAT_S = 15.0
STALE_S = 120.0  # several heartbeats, so that a slow file server does not make a live job look dead
_POLL_S = 0.5
# What `flock` reports where it is not available: Lustre mounted without flock, NFS without a lock daemon, and others.
_UNAVAILABLE = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


class InUse(Exception):
    """Another live process holds the lock; the text names it."""


class FolderLock:
    """A lock on `folder`, held until `release` or the end of the process."""

    def __init__(self, folder: str, name: str = ".lock") -> None:
        """Acquire the lock; raise InUse if another process holds it, OSError if the folder cannot be written."""
        path = os.path.join(folder, name)
        self._heartbeat: Optional[_HeartbeatFile] = None
        # Opened for appending: the text of a live holder must stay, since the message of others quotes it.
        self._file: IO[str] = open(path, "a+", encoding="utf-8")  # noqa: SIM115  # open while the lock is held
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._file.truncate(0)
            self._file.write(f"{socket.gethostname()} pid {os.getpid()}")
            self._file.flush()
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            raise InUse(holder) from None
        except OSError as error:
            self._file.close()
            if error.errno not in _UNAVAILABLE:
                raise
            self._heartbeat = _HeartbeatFile(f"{path}.heartbeat", error.strerror or str(error))

    def check(self) -> None:
        """Raise RunFolderError if another process has taken over the lock while this one was suspended."""
        if self._heartbeat is not None:
            self._heartbeat.check()

    def release(self) -> None:
        """Release the lock."""
        self._file.close()
        if self._heartbeat is not None:
            self._heartbeat.remove()


class _HeartbeatFile:
    """A file that is created exclusively and rewritten by a thread while this process lives."""

    def __init__(self, path: str, reason: str) -> None:
        self._path = path
        self._me = {**_place(), "pid": os.getpid(), "started": time.time()}
        self._mutex = threading.Lock()
        self._stopped = threading.Event()
        self._taken_by: Optional[str] = None
        print(
            f"WARNING: {os.path.dirname(path)} is on a file system without file locks ({reason}); using the lock file "
            f"{path} with a heartbeat every {HEARTBEAT_S:g} s instead",
            file=sys.stderr,
            flush=True,
        )
        while not self._create():
            self._remove_stale()
        self._last = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="run folder heartbeat", daemon=True)
        self._thread.start()

    def _content(self) -> bytes:
        return json.dumps({**self._me, "heartbeat": time.time()}).encode()

    def _create(self) -> bool:
        """Create the file; return False if there is one already."""
        try:
            descriptor = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with open(descriptor, "wb") as file:
            file.write(self._content())
            file.flush()
            os.fsync(file.fileno())
        return True

    def _remove_stale(self) -> None:
        """Wait until the file turns out to be stale, and remove it; raise InUse if its holder is alive.

        Only what this process observes counts, so that clocks of hosts need not agree.
        """
        seen = _read(self._path)
        if seen is None:
            return  # released meanwhile
        holder = _holder(seen)
        if _is_dead(seen):
            reason = "that process no longer exists"
        else:
            print(f"{self._path}: held by {holder}; waiting up to {STALE_S:g} s for a heartbeat", file=sys.stderr)
            reason = f"no heartbeat for {STALE_S:g} s"
            deadline = time.monotonic() + STALE_S
            while time.monotonic() < deadline:
                time.sleep(_POLL_S)
                now = _read(self._path)
                if now is None:
                    return  # released
                if now != seen:
                    raise InUse(_holder(now))
        # Renamed first, so that of several processes that see the same stale file only one removes it.
        aside = f"{self._path}.stale{os.getpid()}"
        found = _read(self._path)
        if found is not None and found != seen:
            raise InUse(_holder(found))
        try:
            os.rename(self._path, aside)
        except FileNotFoundError:
            return
        found = _read(aside)
        if found != seen:  # another process was faster, and this is its file: put it back
            if os.path.exists(self._path):
                os.remove(aside)
            else:
                os.rename(aside, self._path)
            raise InUse(_holder(found))
        os.remove(aside)
        print(f"{self._path}: taken over from {holder}: {reason}", file=sys.stderr, flush=True)

    def _run(self) -> None:
        while not self._stopped.wait(HEARTBEAT_S):
            with contextlib.suppress(OSError):  # the next heartbeat tries again
                self._beat()

    def _beat(self) -> None:
        with self._mutex:
            if self._stopped.is_set() or self._taken_by is not None:
                return
            found = _read(self._path)
            if found is None:  # perhaps moved aside for a moment by a process that found out that this one lives
                time.sleep(_POLL_S)
                found = _read(self._path)
            if found == {}:
                return  # a failed read does not mean another holder; the next heartbeat tries again
            if found is None or any(found.get(key) != value for key, value in self._me.items()):
                self._taken_by = _holder(found)
                return
            write_atomically(self._path, self._content())
            self._last = time.monotonic()

    def check(self) -> None:
        if time.monotonic() - self._last > STALE_S / 2:  # suspended, or the thread was not scheduled
            self._beat()
        if self._taken_by is not None:
            raise RunFolderError(
                f"{self._path}: taken over by {self._taken_by} while this job was suspended; this job ends"
            )

    def remove(self) -> None:
        """Stop the heartbeat and remove the file, if it is still that of this process."""
        self._stopped.set()
        with self._mutex, contextlib.suppress(OSError):
            found = _read(self._path)
            if found is not None and all(found.get(key) == value for key, value in self._me.items()):
                os.remove(self._path)


def _read(path: str) -> Optional[Dict[str, Any]]:
    """Return the content of a lock file, {} if it is not readable as such, None if it does not exist."""
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
        return found if isinstance(found, dict) else {}
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}


def _holder(found: Optional[Dict[str, Any]]) -> str:
    return f"{found['host']} pid {found['pid']}" if found and "host" in found and "pid" in found else "another process"


def _place() -> Dict[str, str]:
    """Return what identifies the set of processes in which a pid has a meaning: host, boot and pid namespace."""
    place = {"host": socket.gethostname()}
    with contextlib.suppress(OSError):
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            place["boot"] = file.read().strip()
        place["namespace"] = os.readlink("/proc/self/ns/pid")
    return place


def _is_dead(found: Optional[Dict[str, Any]]) -> bool:
    """Return whether the process that wrote a lock file ran where this one runs, and no longer exists."""
    if not found or not isinstance(found.get("pid"), int):
        return False
    if any(found.get(key) != value for key, value in _place().items()):
        return False
    try:
        os.kill(found["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False
