"""Saves checkpoints in the background, as training does but without it, until it is killed or has saved them all.

    python tests/faults/writing.py RUN_DIR COUNT [WRONG]

After step s it begins to save checkpoint s, and every third time also replaces a member. It prints `durable s` as soon
as the checkpoint is said to be. WRONG names a mistake, for the negative controls of the campaign.
"""

import os
import shutil
import sys

import numpy as np

from resnet_cpu import faults
from resnet_cpu.run import checkpoint
from resnet_cpu.run.writer import Writer

KEEP = 2


def arrays_of(step):
    """Return the groups of arrays of a checkpoint: they follow from its step."""
    generator = np.random.Generator(np.random.Philox(step))
    return {group: {"a:0": generator.normal(size=[20, 50])} for group in ("weights", "optimizer")}


def save_before_the_manifest(path, groups, info):
    """Publish the folder before its manifest is in it."""
    os.makedirs(path)
    files = {}
    for group, arrays in groups.items():
        files[f"{group}.npz"] = checkpoint._write_arrays(os.path.join(path, f"{group}.npz"), arrays)
        faults.point("checkpoints:file")
    checkpoint._write(os.path.join(path, checkpoint.MANIFEST), checkpoint._manifest(info, files))


def save_after_removing(path, groups, info):
    """Remove the checkpoints before instead of after the new one is in place."""
    shutil.rmtree(os.path.dirname(path), ignore_errors=True)
    checkpoint.save(path, groups, info)


WRONG = {"before_manifest": save_before_the_manifest, "after_removing": save_after_removing}


def main(run_dir, count, wrong=""):
    save = WRONG.get(wrong, checkpoint.save)
    checkpoint.recover(run_dir)
    found = checkpoint.newest(run_dir)
    first = found[1]["step"] + 1 if found else 1
    with Writer() as writer:
        for step in range(first, int(count) + 1):
            groups = arrays_of(step)

            def publish(step=step, groups=groups):
                info = {"step": step, "signature": {}}
                save(checkpoint.folder(run_dir, step), groups, info)
                checkpoint.prune(run_dir, KEEP)
                if step % 3 == 0:
                    checkpoint.save(checkpoint.member_folder(run_dir, "one"), {"weights": groups["weights"]}, info)

            writer.start(publish)
            if wrong != "early":
                writer.finish()
            print(f"durable {step}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
