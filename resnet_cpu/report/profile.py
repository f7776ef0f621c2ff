"""Where a step's time goes, by kind of operation, from TensorFlow's profiler."""

import collections
import csv
import glob
import os
from typing import Dict, List, Tuple

Row = Tuple[str, float, float]  # operation, calls a step, milliseconds a step over all threads

# What wraps the operations of a step rather than being one.
_WRAPPERS = ("EagerExecute", "EagerKernelExecute", "Run", "Process", "FunctionRun", "ExecutorDoneCallback")


def start(folder: str) -> None:
    """Start to record; one recording at a time."""
    import tensorflow as tf

    tf.profiler.experimental.start(folder)


def stop(folder: str, steps: int) -> List[Row]:
    """End the recording of `steps` steps; return its operations, the longest first.

    The trace stays under `folder`/plugins/profile, where TensorBoard's profile plug-in looks for it.
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
                # Operations are named NAME:KIND; what has no kind is a span of the runtime's own.
                name, separator, kind = plane.event_metadata[event.metadata_id].name.rpartition(":")
                if separator and kind.strip() and kind not in _WRAPPERS and not kind.strip().startswith("__inference"):
                    calls[kind] += 1
                    picoseconds[kind] += event.duration_ps
    rows = [(kind, calls[kind] / steps, picoseconds[kind] / 1e9 / steps) for kind in calls]
    return sorted(rows, key=lambda row: -row[2])


def write(path: str, rows: List[Row]) -> None:
    """Write the rows as CSV with a header."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["operation", "calls_per_step", "ms_per_step"])
        writer.writerows([kind, f"{count:g}", f"{milliseconds:.3f}"] for kind, count, milliseconds in rows)
