"""Files that are never half-written."""

import os

import pytest

from resnet_cpu.cluster import control
from resnet_cpu.run import atomic


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path):
    path = str(tmp_path / "file")
    for content in (b"old", b"new"):
        atomic.write_atomically(path, content)
        with open(path, "rb") as file:
            assert file.read() == content
    assert os.listdir(tmp_path) == ["file"]


def test_a_file_that_was_not_written_to_its_end_is_removed(tmp_path):
    (tmp_path / f"file.tmp{os.getpid()}").symlink_to(tmp_path / "victim")  # as another user might put there
    with pytest.raises(KeyboardInterrupt), atomic.open_atomically(str(tmp_path / "file")) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failure_leaves_the_old_file_and_no_temporary_one(tmp_path, monkeypatch, call):
    path = str(tmp_path / "file")
    atomic.write_atomically(path, b"old")

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space left") as caught:
        atomic.write_atomically(path, b"new")
    assert call == "replace" or caught.value.filename == path
    assert os.listdir(tmp_path) == ["file"]
    with open(path, "rb") as file:
        assert file.read() == b"old"


def test_the_content_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    calls = []
    real_sync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (calls.append("fsync"), real_sync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), real_replace(a, b)))
    atomic.write_atomically(str(tmp_path / "file"), b"content")
    assert calls == ["fsync", "replace"]


def test_an_error_of_writing_names_the_file():
    with pytest.raises(OSError) as caught, atomic.naming("runs/mine/eval.jsonl"), open("/dev/full", "wb") as full:
        full.write(b"x")
        full.flush()
    assert "runs/mine/eval.jsonl" in control.describe_os_error(caught.value)
    with pytest.raises(FileNotFoundError) as caught, atomic.naming("other"):
        os.stat("/no/such/file")
    assert caught.value.filename == "/no/such/file"  # negative control: it names its own
