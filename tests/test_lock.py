"""The lock of a folder, with `flock` and on file systems without it."""

import errno
import fcntl
import json
import os
import subprocess
import sys
import time

import pytest
from conftest import OUTSIDE, ROOT

from resnet_cpu.errors import RunFolderError
from resnet_cpu.run import lock
from resnet_cpu.run.folder import RunFolder


@pytest.fixture(params=[errno.ENOSYS, errno.ENOLCK])
def without_flock(monkeypatch, request):
    """A file system without `flock`, as Lustre mounted without it or NFS without a lock daemon; short times."""

    def refuse(file, operation):
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(lock, "HEARTBEAT_S", 0.1)
    monkeypatch.setattr(lock, "STALE_S", 1.0)
    monkeypatch.setattr(lock, "_POLL_S", 0.02)


def leave_behind(folder, **content):
    path = os.path.join(folder, ".lock.heartbeat")
    with open(path, "w") as file:
        json.dump({"host": "elsewhere", "pid": 1, "started": 1.0, "heartbeat": 1.0, **content}, file)
    return path


def dead_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_second_process_is_refused(tmp_path):
    held = lock.FolderLock(str(tmp_path))
    with pytest.raises(lock.InUse, match=f"pid {os.getpid()}"):
        lock.FolderLock(str(tmp_path))
    held.release()
    lock.FolderLock(str(tmp_path)).release()


def test_a_file_system_without_flock_is_usable_and_reported_once(tmp_path, without_flock, capfd):
    """No run could start at all on such a file system."""
    folder = RunFolder(str(tmp_path))
    for step in range(3):
        folder.append("metrics.jsonl", {"step": step})
    folder.close()
    written = capfd.readouterr().err
    assert written.count("without file locks") == 1 and ".lock.heartbeat" in written
    assert not os.path.exists(tmp_path / ".lock.heartbeat")


def test_without_flock_a_second_live_job_is_refused(tmp_path, without_flock):
    folder = RunFolder(str(tmp_path))
    with pytest.raises(RunFolderError, match=f"in use by a live job .*pid {os.getpid()}"):
        RunFolder(str(tmp_path))
    folder.append("metrics.jsonl", {"step": 0})  # the holder is not disturbed
    folder.close()
    RunFolder(str(tmp_path)).close()


def test_negative_control_with_flock_there_is_no_heartbeat(tmp_path, capfd):
    folder = RunFolder(str(tmp_path))
    assert os.listdir(tmp_path) == ["plots", ".lock"] or set(os.listdir(tmp_path)) == {"plots", ".lock"}
    folder.close()
    assert capfd.readouterr().err == ""


def test_the_lock_of_a_dead_process_of_this_host_is_taken_over_at_once(tmp_path, without_flock, capfd):
    leave_behind(str(tmp_path), **lock._place(), pid=dead_process())
    started = time.monotonic()
    RunFolder(str(tmp_path)).close()
    assert time.monotonic() - started < lock.STALE_S
    assert "taken over from" in capfd.readouterr().err


def test_a_lock_without_heartbeats_is_taken_over_whatever_its_clock_says(tmp_path, without_flock, capfd):
    leave_behind(str(tmp_path), heartbeat=time.time() + 1e6)
    RunFolder(str(tmp_path)).close()
    assert "taken over from elsewhere pid 1: no heartbeat for 1 s" in capfd.readouterr().err


def test_an_unreadable_lock_file_is_taken_over_after_the_same_time(tmp_path, without_flock):
    (tmp_path / ".lock.heartbeat").write_text("")
    RunFolder(str(tmp_path)).close()


def test_a_job_that_was_suspended_notices_that_another_took_its_place(tmp_path, without_flock):
    folder = RunFolder(str(tmp_path))
    folder.append("metrics.jsonl", {"step": 0})
    leave_behind(str(tmp_path))
    time.sleep(5 * lock.HEARTBEAT_S)
    with pytest.raises(RunFolderError, match="taken over by elsewhere pid 1"):
        folder.append("metrics.jsonl", {"step": 1})
    folder.close()
    assert json.loads((tmp_path / ".lock.heartbeat").read_text())["host"] == "elsewhere"  # that of the other stays


HOLD = """
import fcntl, os, sys, time
from resnet_cpu.run import lock
def refuse(file, operation):
    raise OSError(38, "Function not implemented")
fcntl.flock = refuse
lock.HEARTBEAT_S, lock.STALE_S, lock._POLL_S = 0.1, 2.0, 0.02
held = lock.FolderLock(sys.argv[1])
print("held", flush=True)
time.sleep(5)
held.release()
"""


def test_of_several_processes_that_find_a_stale_lock_one_takes_it_over(tmp_path):
    leave_behind(str(tmp_path))
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    processes = [
        subprocess.Popen(command, cwd=ROOT, env=OUTSIDE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    ends = [process.communicate(timeout=60) for process in processes]
    assert sum("held" in out for out, _ in ends) == 1, ends
    assert sum("InUse" in error for _, error in ends) == 2, ends


def test_a_lock_file_that_cannot_be_read_for_a_moment_does_not_end_its_holder(without_flock, tmp_path, monkeypatch):
    """On a file server that fails over, a read of the lock file fails now and then."""
    folder = RunFolder(str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(lock, "_read", lambda path: {})
        time.sleep(3 * lock.HEARTBEAT_S)
        folder.check()
        patch.setattr(lock, "_read", lambda path: {"host": "other", "pid": 1, "started": 2.0})
        time.sleep(10 * lock.HEARTBEAT_S)
        with pytest.raises(RunFolderError, match="other pid 1"):  # negative control
            folder.check()
    folder.close()


def test_a_pid_counts_only_on_the_same_boot_and_in_the_same_container():
    pid = dead_process()
    assert lock._is_dead({**lock._place(), "pid": pid})
    assert not lock._is_dead({**lock._place(), "namespace": "pid:[1]", "pid": pid})
