"""Estimate what prepare would write and how long it would take."""

import sys
import time
from typing import Dict

import numpy as np

from resnet_cpu.data.images import BadImage
from resnet_cpu.data.sources import conversion, writing
from resnet_cpu.data.sources.listing import Listing
from resnet_cpu.text import duration

_TIMED_IMAGES = 64


def dry_run(images: Listing, folder: str, seed: int, options: conversion.Options, processes: int) -> Dict[str, int]:
    """Print what would be written, and how long it would take by a sample; return the images of each split."""
    tasks = writing.tasks_of(images, seed)
    sample = [(task, row) for task in tasks for row in task.rows[:1]][:: max(len(tasks) // _TIMED_IMAGES, 1)]
    sizes, bad, started = [], 0, time.perf_counter()
    for task, row in sample:
        try:
            sizes.append(len(writing.converted(images, task, row, options, False).encoded))
        except BadImage:
            bad += 1
    rate = len(sample) / (time.perf_counter() - started) * processes
    total = sum(len(task.rows) for task in tasks)
    for split, table in images.splits.items():
        count = sum(task.split == split for task in tasks)
        print(f"prepare: {split}: {len(table.names):,} images would become {count:,} shards", file=sys.stderr)
    print(
        f"prepare: {len(images.classes):,} classes; about {np.mean(sizes or [0]) * total / 1e9:.2f} GB in {folder}; "
        f"about {duration(total / rate)} in {processes} processes, by a sample of {len(sample)} images ({bad} of them "
        "bad), if the file systems are fast enough; nothing was written",
        file=sys.stderr,
        flush=True,
    )
    return {split: len(table.names) for split, table in images.splits.items()}
