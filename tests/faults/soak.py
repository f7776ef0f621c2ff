"""Train for long on a tiny network: memory does not grow, and ranks that share cores keep the same bits.

    python tests/faults/soak.py --epochs=20
    python tests/faults/soak.py --epochs=0 --ranks=4 --minutes=10

Each epoch ends with an evaluation and a checkpoint, before which the hashes of all ranks are compared. The growth of
the resident memory is the slope of a line through its values after each evaluation, from the third epoch on.
"""

import argparse
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from typing import Dict, List, Optional, Sequence

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import attempts
import numpy as np
from conftest import OUTSIDE, ROOT, TINY_FLAGS, write_tiny_data

from resnet_cpu.run.folder import read_rows

WARM_UP = 2  # epochs that are left out: kernels are created, buffers grow to their size
MOST_MIB = 1.0  # growth per epoch


def resident_mib(token: str) -> Optional[Dict[int, float]]:
    """Return the resident memory of each training process of the job, MiB; None while one of them ends."""
    found = {}
    for pid in attempts.processes(token):
        try:
            command = pathlib.Path(f"/proc/{pid}/cmdline").read_text()
            status = pathlib.Path(f"/proc/{pid}/status").read_text()
        except OSError:
            return None
        if "resnet_cpu.train" in command and "mpirun" not in command:
            kib = re.search(r"VmRSS:\s+(\d+)", status)
            if kib is None:
                return None
            found[pid] = int(kib[1]) / 1024
    return found


def slopes(samples: Sequence[Dict[int, float]]) -> List[float]:
    """Return for each process the growth of its memory, MiB per sample, by least squares."""
    pids = set(samples[-1])
    values = [[sample[pid] for sample in samples if pid in sample] for pid in pids]
    return [float(np.polyfit(range(len(row)), row, 1)[0]) for row in values]


def soak(folder: str, ranks: int, epochs: int, seconds: float = 0.0, pause: float = 0.05) -> Dict[str, object]:
    """Train for `epochs` epochs, or until `seconds` have passed and then stop by SIGUSR1; return what was seen."""
    data_dir, run_dir, token = os.path.join(folder, "data"), os.path.join(folder, "run"), f"soak{os.getpid()}{ranks}"
    if not os.path.exists(data_dir):
        write_tiny_data(data_dir, train=240, validation=60)
    command = [
        "launch/local.sh", str(ranks), sys.executable, "-m", "resnet_cpu.train", *TINY_FLAGS,
        f"--phase=main:epochs={epochs or 1000000},lr=0.01", "--phase=tail:steps=1,lr=0.01", "--eval_every_epochs=1",
        "--checkpoint_every_steps=20", "--log_every_steps=20", f"--data_dir={data_dir}", f"--run_dir={run_dir}",
    ]  # fmt: skip
    environment = {**OUTSIDE, attempts.TOKEN: token}
    samples: List[Dict[int, float]] = []
    evaluations, began = 0, time.monotonic()
    with open(os.path.join(folder, "log"), "w+") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        asked = False
        while process.poll() is None:
            found = len(read_rows(os.path.join(run_dir, "eval.jsonl")))
            memory = resident_mib(token) if found > evaluations else None
            if memory:
                evaluations = found
                samples.append(memory)
            if seconds and not asked and time.monotonic() - began > seconds:
                process.send_signal(signal.SIGUSR1)
                asked = True
            time.sleep(pause)
        log.seek(0)
        text = log.read()
    kept = samples[WARM_UP:]
    return {
        "code": process.returncode,
        "ranks": ranks,
        "evaluations": len(read_rows(os.path.join(run_dir, "eval.jsonl"))),
        "sampled": len(kept),
        "mib_per_epoch": [round(slope, 3) for slope in slopes(kept)] if len(kept) > 1 else [],
        "mib": [round(value) for value in kept[-1].values()] if kept else [],
        "seconds": round(time.monotonic() - began),
        "log": text[-2000:],
    }


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Print what was seen; return 1 if memory grows or the job ended otherwise than it should."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=0.0)
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        seen = soak(folder, arguments.ranks, arguments.epochs, 60 * arguments.minutes)
    log = seen.pop("log")
    print(seen)
    right = seen["code"] == (75 if arguments.minutes else 0)
    if not right:
        print(log, file=sys.stderr)
    return int(not right or any(slope > MOST_MIB for slope in seen["mib_per_epoch"]))


if __name__ == "__main__":
    sys.exit(main())
