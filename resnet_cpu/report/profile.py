"""The time of a training step by operation, from TensorFlow's profiler."""

import collections
import csv
import glob
import os
import sys
from typing import Dict, List, Optional, Tuple

Row = Tuple[str, float, float]  # operation, calls per step, milliseconds per step summed over all threads


def start(folder: str) -> None:
    """Start recording to `folder`; only one recording is possible at a time."""
    import tensorflow as tf

    tf.profiler.experimental.start(folder)


def stop(folder: str, steps: int) -> List[Row]:
    """End the recording of `steps` steps; return its operations, the most expensive first.

    The trace is kept in `folder`/plugins/profile, where the profile plug-in of TensorBoard looks for it.
    """
    import tensorflow as tf
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    tf.profiler.experimental.stop()
    newest = max(glob.glob(os.path.join(glob.escape(folder), "plugins", "profile", "*", "*.xplane.pb")))
    space = xplane_pb2.XSpace()
    with open(newest, "rb") as file:
        space.ParseFromString(file.read())
    calls: Dict[str, int] = collections.Counter()
    picoseconds: Dict[str, int] = collections.Counter()
    for plane in space.planes:
        for line in plane.lines:
            for event in line.events:
                # Operations are named NAME:KIND. Spans of the runtime, which contain them, are named CLASS::METHOD or
                # TEXT: NAME.
                name, _, kind = plane.event_metadata[event.metadata_id].name.rpartition(":")
                if name and not name.endswith(":") and kind == kind.strip() != "":
                    calls[kind] += 1
                    picoseconds[kind] += event.duration_ps
    rows = [(kind, calls[kind] / steps, picoseconds[kind] / 1e9 / steps) for kind in calls]
    return sorted(rows, key=lambda row: -row[2])


def write(path: str, rows: List[Row]) -> None:
    """Write the rows as a CSV file."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["operation", "calls_per_step", "ms_per_step"])
        writer.writerows([kind, f"{count:g}", f"{milliseconds:.3f}"] for kind, count, milliseconds in rows)


class Recorder:
    """Records the requested steps, once and within one phase, since the next phase has another graph."""

    def __init__(self, run_dir: str, steps: Optional[Tuple[int, int]]) -> None:
        """Record `steps`: the first and the last, counted from 0; None records nothing."""
        self.run_dir, self.steps = run_dir, steps
        self.done = False
        self._first: Optional[int] = None

    def before(self, step: int) -> None:
        """Start recording if `step`, which comes next, is the first of the requested steps that this attempt runs."""
        if self.steps is None or self._first is not None or not self.steps[0] <= step <= self.steps[1]:
            return
        try:
            start(os.path.join(self.run_dir, "tensorboard"))
            self._first = step
        except Exception as error:  # a failing profiler must not end a run
            _say(f"not started ({type(error).__name__}: {error})")

    def after(self, step: int, last_of_phase: bool) -> None:
        """End the recording after its last step; write profile.csv and print the most expensive operations."""
        if self.steps is None or self._first is None or self.done or (step < self.steps[1] and not last_of_phase):
            return
        self.done = True
        path = os.path.join(self.run_dir, "profile.csv")
        try:
            rows = stop(os.path.join(self.run_dir, "tensorboard"), step + 1 - self._first)
            write(path, rows)
        except Exception as error:
            _say(f"not written ({type(error).__name__}: {error})")
            return
        longest = ", ".join(f"{kind} {milliseconds:.1f} ms" for kind, _, milliseconds in rows[:5])
        _say(f"steps {self._first} to {step}, the longest operations of a step: {longest}; all in {path}")


def _say(text: str) -> None:
    print(f"profile: {text}", file=sys.stderr, flush=True)
