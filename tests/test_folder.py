"""The run folder: rows, and values that JSON does not have."""

import json
import math
import os
import sys
import types

import numpy as np
import pytest

from resnet_cpu.errors import RunFolderError
from resnet_cpu.run import folder as runlog
from resnet_cpu.training import report


def test_rows_are_appended_over_attempts_and_the_last_one_of_a_step_counts(tmp_path):
    for attempt, steps in [(1, [0, 1, 2]), (2, [2, 3])]:
        folder = runlog.RunFolder(str(tmp_path))
        for step in steps:
            folder.append("metrics.jsonl", {"step": step, "attempt": attempt})
        folder.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "att')  # a kill in the middle of a line
    folder = runlog.RunFolder(str(tmp_path))
    folder.append("metrics.jsonl", {"step": 5, "attempt": 3})  # the row of the next attempt begins a new line
    folder.close()
    rows = runlog.read_rows(str(tmp_path / "metrics.jsonl"))
    assert [(row["step"], row["attempt"]) for row in rows] == [(0, 1), (1, 1), (2, 2), (3, 2), (5, 3)]


def test_a_folder_in_use_is_refused_and_its_holder_named(tmp_path):
    holder = runlog.RunFolder(str(tmp_path))
    with pytest.raises(RunFolderError, match=f"pid {os.getpid()}"):
        runlog.RunFolder(str(tmp_path))
    holder.close()
    runlog.RunFolder(str(tmp_path)).close()


def test_a_folder_that_cannot_be_created_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="file is not a folder"):
        runlog.RunFolder(str(tmp_path / "file" / "run"))
    with pytest.raises(RunFolderError, match="cannot be written"):
        runlog.RunFolder("/proc/run")


def test_values_that_json_does_not_have_become_null():
    content = {"a": math.nan, "b": [math.inf, np.float32(1.5), np.int64(3)], "c": {"d": -math.inf}}
    assert json.loads(json.dumps(runlog.finite(content), allow_nan=False)) == {
        "a": None,
        "b": [None, 1.5, 3],
        "c": {"d": None},
    }


def test_progress_is_one_plain_line_without_a_terminal(capsys):
    row = {
        "step": 9,
        "phase": "main",
        "loss": 1.25,
        "lr": 0.1,
        "images_per_second": 80.0,
        "data_wait_s": 0.01,
        "step_s": 0.1,
    }
    report.Progress(20, 1.0, 2).show(row, 0.1)
    assert capsys.readouterr().err == (
        "main  step 10/20  epoch 0.50/1.00  loss 1.2500  lr 0.1  80.0 img/s (40.0/core)  data wait 10.0%  left 1s\n"
    )


def test_progress_is_written_in_one_piece(monkeypatch):
    """Under PYTHONUNBUFFERED=1, print() writes the line feed separately, and lines of other ranks get in between."""
    written = []
    monkeypatch.setattr(sys, "stderr", types.SimpleNamespace(isatty=lambda: False, write=written.append, flush=bool))
    report.Progress(20, 1.0, 2).say("evaluation")
    assert written == ["evaluation\n"]


def test_progress_of_the_first_step_has_no_speed(capsys):
    row = {
        "step": 0,
        "phase": "main",
        "loss": 1.0,
        "lr": 0.1,
        "images_per_second": None,
        "data_wait_s": None,
        "step_s": None,
    }
    report.Progress(20, 1.0, 2).show(row, 0.0)
    assert "first step" in capsys.readouterr().err


@pytest.mark.parametrize("line", [b"\xff\n", b"{}\n", b"5\n", b'{"step": "1"}\n', b"[" * 100_000 + b"\n"])
def test_damaged_lines_are_left_out(tmp_path, line):
    path = tmp_path / "eval.jsonl"
    path.write_bytes(b'{"step": 1, "top1": 0.5}\n' + line + b'{"step": 2, "top1": 0.6}\n')
    assert [row["top1"] for row in runlog.read_rows(str(path))] == [0.5, 0.6]


@pytest.mark.parametrize("content", [b"", b"5", b"[]", b'"x"', b"\xff", b"{"])
def test_a_json_file_that_holds_no_object_counts_as_unreadable(tmp_path, content):
    (tmp_path / "run.json").write_bytes(content)
    assert runlog.read_json(str(tmp_path / "run.json")) is None
    (tmp_path / "run.json").write_text("{}")
    assert runlog.read_json(str(tmp_path / "run.json")) == {}
    assert runlog.read_record(str(tmp_path)) is None  # it has no signature
    (tmp_path / "run.json").write_text('{"signature": {}}')
    assert runlog.read_record(str(tmp_path)) == {"signature": {}}


def test_a_data_set_and_the_root_cannot_be_run_folders(tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    for path, what in ((tmp_path, "a data set"), ("/", "the root"), ("/tmp/..", "the root")):
        with pytest.raises(RunFolderError, match=what):
            runlog.RunFolder(str(path))
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]
