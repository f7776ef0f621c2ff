"""Damage a checkpoint in every file of it: cut it off, or flip one bit. No TensorFlow."""

import contextlib
import io
import os
from typing import Iterator, Optional, Tuple

import numpy as np

from resnet_cpu.errors import CheckpointError
from resnet_cpu.run import checkpoint

FILES = ("weights.npz", "optimizer.npz", checkpoint.MANIFEST)


def make(run_dir: str) -> str:
    """Save two checkpoints as a run does; return the folder of the newer one."""
    generator = np.random.Generator(np.random.Philox(1))
    for step in (1, 2):
        path = checkpoint.folder(run_dir, step)
        groups = {
            group: {f"conv{n}/kernel:0": generator.normal(size=[3, 3, 8]).astype(np.float32) for n in range(3)}
            for group in ("weights", "optimizer")
        }
        info = {
            "step": step,
            "signature": {"model": {"width": 0.25}, "phases": {"main": {"steps": 30, "lr": 0.05}}},
            "layout": [2, 6, 1],
            "attempt": 1,
            "wall_seconds": 12.345678,
            "seconds_to_top1": {"0.5": 3.25},
            "versions": {"numpy": np.__version__, "tensorflow": None},
        }
        checkpoint.save(path, groups, info)
    return path


def cases(run_dir: str, count: int, seed: int) -> Iterator[Tuple[str, Optional[str]]]:
    """Yield `count` times a description of the damage, and what was wrong with the reaction to it, if anything.

    Half of the cases cut a file off at a random length, half flip a random bit; the files take turns.
    """
    path = make(run_dir)
    generator = np.random.default_rng([seed, count])
    for number in range(count):
        name = FILES[number % len(FILES)]
        file = os.path.join(path, name)
        with open(file, "rb") as opened:
            whole = opened.read()
        place = int(generator.integers(len(whole)))
        if number // len(FILES) % 2:
            bit = int(generator.integers(8))
            content = whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :]
            case = f"{name}: bit {bit} of byte {place} flipped"
        else:
            content, case = whole[:place], f"{name}: cut off at {place} of {len(whole)} bytes"
        with open(file, "wb") as opened:
            opened.write(content)
        yield case, reaction(run_dir, file)
        with open(file, "wb") as opened:
            opened.write(whole)
    assert checkpoint.newest(run_dir)[1]["step"] == 2  # undamaged again


def reaction(run_dir: str, file: str) -> Optional[str]:
    """Return None if the newest checkpoint is passed over as damaged in `file` and the one before it used."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            found = checkpoint.newest(run_dir)
    except CheckpointError as error:
        return f"no checkpoint is used: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if found is None or found[1]["step"] != 1:
        return "accepted"
    if f"PASSED OVER: {file}: damaged (" not in printed.getvalue():
        return f"does not name the file as damaged: {printed.getvalue()}"
    return None
