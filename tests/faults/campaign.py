"""Run a campaign of faults: every attempt must end as docs/reliability.md promises, and every run with the same bits.

    python tests/faults/campaign.py --seed=1 --faults=kill --n=100 --out=campaign.csv

A run of two ranks is attacked again and again, each time at another instant that follows from the seed, until it is
finished; then its state and its losses are compared with those of an undisturbed run, and the next run begins. Each
attempt is a row of --out. Called again, the campaign continues after the last row.
"""

import argparse
import csv
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import shutil
import signal
import sys
import zlib
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import attempts
import damage
import numpy as np
import writing
from conftest import TINY_FLAGS, write_tiny_data

from resnet_cpu import faults
from resnet_cpu.data import shards
from resnet_cpu.errors import CheckpointError
from resnet_cpu.run import checkpoint
from resnet_cpu.run.folder import read_json, read_rows

STALL_S = 30.0  # --stall_timeout of an attempt in which a rank stops
ENDS_S = 60.0  # after which a process that is left counts as left; the table shows how long they take
FIELDS = ("seed", "fault", "number", "asked", "reached", "code", "seconds", "step", "finished", "problems")
# A member in a branch, then a phase that does not start from the end of the one before it.
FLAGS = [
    *TINY_FLAGS,
    "--experiment=collapsed_ensemble",
    "--phase=main:steps=30,lr=0.05,warmup_steps=3,decay_steps=40",
    "--phase=tail:steps=6,lr=0.02,power=2,wd=2e-4,augment=light,branch=1,member=1",
    "--phase=cycle:steps=24,lr=0.04,warmup_steps=2,warmup_lr=0.01,velocity=reset",
    "--phase=collapse:steps=6,lr=0.01,power=2,augment=light,branch=1,member=1",
    "--checkpoint_every_steps=2",
    "--eval_every_epochs=3",
]
# Everything that is written with a manifest: checkpoints, members, predictions of the members.
WRITES = "*:*"
STAGES_OF_A_SAVE = (
    "checkpoints:folder",
    "checkpoints:file",
    "checkpoints:manifest",
    "checkpoints:published",
    "checkpoints:rotation",
)
STAGES_OF_A_MEMBER = tuple(
    f"{kind}:{stage}"
    for kind in ("members", "tail", "collapse")
    for stage in ("folder", "file", "manifest", "published")
)


@dataclasses.dataclass(frozen=True)
class Fault:
    """A kind of fault, how an attempt ends that meets it, and when."""

    kind: str
    code: int
    stages: Sequence[str]
    within: float = ENDS_S
    first: int = 1  # least number of times that the stage is reached
    most: int = 12
    latest: float = 0.0  # seconds after the stage


FAULTS = {
    "kill": Fault("kill", 137, ["step", "step", WRITES, "evaluation"], latest=0.2),
    "term": Fault("term", 143, ["step", WRITES], latest=0.2),
    "exit": Fault("exit", faults.EXIT_CODE, ["step", WRITES], latest=0.2),
    "exception": Fault("exception", 70, ["step", "evaluation", WRITES]),
    "request": Fault("request", 75, ["step"], within=120.0, latest=0.2),  # the step, an evaluation and a save
    "stop": Fault("stop", 76, ["step"], within=STALL_S + 15.0, first=3, latest=0.2),
    "nan": Fault("nan", 77, ["batch"]),
    "slow": Fault("slow", 0, ["step"], within=attempts.LONGEST_S),
    "full": Fault("full", 74, [WRITES]),
    "readonly": Fault("readonly", 74, [WRITES]),
    "save": Fault("kill", 137, STAGES_OF_A_SAVE, most=3),
    "member": Fault("kill", 137, STAGES_OF_A_MEMBER, most=1),
}
IN_TURN = ("save", "member")  # their stages one after the other, those of the others at random
MIXED = ("kill", "full", "nan", "request", "save", "term", "exception", "exit", "stop", "readonly", "slow")
ALL = (*FAULTS, "mixed", "writer", "prepare", "checkpoints")


def choose(name: str, number: int, generator: np.random.Generator) -> Tuple[Fault, str]:
    """Return the fault of attempt `number`, and the value of RESNET_CPU_FAULT that causes it."""
    if name == "mixed":
        name = MIXED[number % len(MIXED)]
    fault = FAULTS[name]
    stages = fault.stages
    stage = stages[number % len(stages)] if name in IN_TURN else stages[generator.integers(len(stages))]
    most = fault.most * (3 if stage == WRITES else 1)
    most = min(most, 2) if stage == "evaluation" else most
    rank = 0 if ":" in stage else generator.integers(2)
    delay = f"@{generator.uniform(0, fault.latest):.3f}" if fault.latest and stage != WRITES else ""
    return fault, f"{rank}:{stage}:{generator.integers(fault.first, max(most, fault.first) + 1)}:{fault.kind}{delay}"


# --- what is promised ------------------------------------------------------------------------------------------------


def published(run_dir: str) -> Iterator[str]:
    """Yield every folder of a checkpoint, member or predictions that is published in a run folder."""
    for parent in ("checkpoints", "members"):
        folder = os.path.join(run_dir, parent)
        for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
            path = os.path.join(folder, name)
            if not name.endswith(".tmp"):
                yield path
                if os.path.isdir(os.path.join(path, "predictions")):
                    yield os.path.join(path, "predictions")


def unreadable(run_dir: str) -> List[str]:
    """Return what of a run folder is not intact; the next attempt completes a replacement that was interrupted."""
    found = []
    checkpoint.recover(run_dir)
    for path in published(run_dir):
        try:
            for file in checkpoint.read_manifest(path)["files"]:
                checkpoint.load(path, file[: -len(".npz")])
        except CheckpointError as error:
            found.append(str(error))
    for name in ("run.json", "clock.json", "result.json"):
        path = os.path.join(run_dir, name)
        if os.path.exists(path) and read_json(path) is None:
            found.append(f"{path} is not readable")
    return found


def newest_step(run_dir: str) -> int:
    """Return the step of the newest intact checkpoint; 0 without a checkpoint, -1 if all are damaged."""
    try:
        found = checkpoint.newest(run_dir)
    except CheckpointError:
        return -1
    return found[1]["step"] if found else 0


def judge(fault: Optional[Fault], ended: attempts.Ended, run_dir: str, before: int) -> List[str]:
    """Return in what an attempt differs from what is promised; `before`: the step that it began with."""
    found = unreadable(run_dir)
    after, finished = newest_step(run_dir), is_finished(run_dir)
    codes = {0} if fault is None or not ended.reached else {fault.code, 0} if finished else {fault.code}
    if ended.code not in codes:
        found.append(f"exit code {ended.code}, not {sorted(codes)}: {ended.err[-600:]}")
    if ended.code == 0 and not finished:
        found.append("exit code 0, but the run is not finished")
    if ended.left:
        found.append(f"{ended.left} processes left")
    if after < before:
        found.append(f"newest checkpoint after step {after}, was {before}")
    stopped = re.search(r"stopped on request after step (\d+)", ended.err)
    if stopped and int(stopped[1]) != after:
        found.append(f"newest checkpoint after step {after}, but stopped after {stopped[1]}")
    if "Traceback" in ended.err and (fault is None or fault.kind != "exception"):
        found.append(f"traceback: {ended.err[-600:]}")
    return found


def is_finished(run_dir: str) -> bool:
    """Return whether the run has its result."""
    return bool((read_json(os.path.join(run_dir, "result.json")) or {}).get("complete"))


def fingerprint(run_dir: str) -> Dict[str, str]:
    """Return digests of all that a finished run has computed: state, members, losses and scores."""
    state, members = hashlib.sha256(), hashlib.sha256()
    newest = checkpoint.newest(run_dir)
    for path in [newest[0]] if newest else []:
        _add(state, path)
    for path in published(run_dir):
        if "/members/" in path:
            _add(members, path)
    metrics, evaluations = (read_rows(os.path.join(run_dir, name)) for name in ("metrics.jsonl", "eval.jsonl"))
    rows = [[row["step"], row["loss"], row["lr"]] for row in metrics]
    scores = [[row["step"], row["top1"], row["top5"], row["loss"]] for row in evaluations]
    return {
        "state": state.hexdigest(),
        "members": members.hexdigest(),
        "losses": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
        "scores": hashlib.sha256(json.dumps(scores).encode()).hexdigest(),
    }


def _add(digest: Any, path: str) -> None:
    manifest = checkpoint.read_manifest(path)
    digest.update(f"{os.path.basename(path)} {manifest['step']}".encode())
    for file in sorted(manifest["files"]):
        for name, array in sorted(checkpoint.load(path, file[: -len(".npz")]).items()):
            digest.update(f"{file} {name} {array.dtype} {array.shape}".encode() + array.tobytes())


# --- campaigns -------------------------------------------------------------------------------------------------------


class Table:
    """The rows of --out: each is written as soon as its attempt has ended."""

    def __init__(self, path: str, seed: int) -> None:
        self.path, self.seed = path, seed
        self.rows: List[Dict[str, str]] = []
        if os.path.exists(path):
            with open(path, newline="", encoding="utf-8") as file:
                self.rows = list(csv.DictReader(file))

    def of(self, fault: str) -> List[Dict[str, str]]:
        """Return the rows of a fault under this seed."""
        return [row for row in self.rows if (row["seed"], row["fault"]) == (str(self.seed), fault)]

    def add(self, fault: str, **values: Any) -> None:
        """Append a row and print its problems."""
        row = {"seed": self.seed, "fault": fault, "number": len(self.of(fault)), **values}
        row = {field: str(row.get(field, "")) for field in FIELDS}
        new = not os.path.exists(self.path)
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, FIELDS)
            if new:
                writer.writeheader()
            writer.writerow(row)
        self.rows.append(row)
        print(" ".join(f"{key}={value}" for key, value in row.items() if value), file=sys.stderr, flush=True)

    def summary(self) -> str:
        """Return a table of what was found, one line per fault."""
        lines = [
            "| fault | n | exit codes | gone after, s: median, slowest | finished | with the same bits | problems |",
            "|---|---|---|---|---|---|---|",
        ]
        for name in [name for name in ALL if self.of(name)]:
            rows = self.of(name)
            met = [row for row in rows if row["reached"] == "True"]
            seconds = sorted(float(row["seconds"]) for row in met if row["seconds"])
            codes = ", ".join(sorted({row["code"] for row in met if row["code"]}, key=int))
            times = f"{seconds[len(seconds) // 2]:.1f}, {seconds[-1]:.1f}" if seconds else ""
            ends = [row["finished"] for row in rows if row["finished"]]
            wrong = sum(bool(row["problems"]) for row in rows)
            lines.append(
                f"| {name} | {len(met)} | {codes} | {times} | {len(ends)} | {ends.count('same bits')} | {wrong} |"
            )
        return "\n".join(lines)


def command(run_dir: str, data_dir: str, fault: Optional[Fault] = None) -> List[str]:
    """Return the command of an attempt that meets `fault`."""
    stall = [f"--stall_timeout={STALL_S:g}"] if fault is not None and fault.kind == "stop" else []
    flags = [*FLAGS, *stall, f"--data_dir={data_dir}", f"--run_dir={run_dir}"]
    train = [sys.executable, "-m", "resnet_cpu.train", *flags]
    return ["launch/local.sh", "2", *train]


def undisturbed(work: str) -> Tuple[str, Dict[str, str]]:
    """Return the folder of the data and the fingerprint of the run that meets no fault, made once per work folder."""
    data_dir, run_dir = os.path.join(work, "data"), os.path.join(work, "undisturbed")
    if not os.path.exists(os.path.join(data_dir, "manifest.json")):
        write_tiny_data(data_dir)
    if not is_finished(run_dir):
        ended = attempts.run(command(run_dir, data_dir), None, 0.0)
        assert ended.code == 0, ended.err
    return data_dir, fingerprint(run_dir)


def attack(name: str, wanted: int, table: Table, work: str) -> None:
    """Cause `wanted` faults in runs of training, and finish the last of them."""
    data_dir, expected = undisturbed(work)
    run_dir = os.path.join(work, name)
    if is_finished(run_dir) and table.of(name) and table.of(name)[-1]["finished"]:
        shutil.rmtree(run_dir)  # killed before it could do so
    while True:
        met = sum(row["reached"] == "True" for row in table.of(name))
        if met >= wanted and not os.path.isdir(run_dir):
            return
        number = len(table.of(name))
        generator = np.random.default_rng([table.seed, zlib.crc32(name.encode()), number])
        fault, asked = choose(name, number, generator) if met < wanted else (None, None)
        before = newest_step(run_dir)
        ended = attempts.run(command(run_dir, data_dir, fault), asked, fault.within if fault else 0.0)
        found, finished = judge(fault, ended, run_dir, before), ""
        if is_finished(run_dir):
            different = [key for key, value in fingerprint(run_dir).items() if value != expected[key]]
            finished = f"other {', '.join(different)}" if different else "same bits"
            found += different
        table.add(
            name,
            asked=asked or "",
            reached=ended.reached,
            code=ended.code,
            seconds=f"{ended.seconds:.1f}",
            step=newest_step(run_dir),
            finished=finished,
            problems="; ".join(found),
        )
        if finished or found:
            keep = os.path.join(work, f"{name}-{number}")  # to look at
            if found:
                os.rename(run_dir, keep)
                pathlib.Path(keep, "log").write_text(ended.err)
            else:
                shutil.rmtree(run_dir)


def attack_writer(wanted: int, table: Table, work: str, wrong: str = "", name: str = "writer") -> None:
    """Kill a process that only saves, `wanted` times, each at a random stage of what it writes."""
    run_dir = os.path.join(work, f"{name}{wrong}")
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "writing.py")
    while len(table.of(name)) < wanted:
        generator = np.random.default_rng([table.seed, zlib.crc32(name.encode()), len(table.of(name))])
        before = newest_step(run_dir)
        fault = f"0:{WRITES}:{generator.integers(1, 61)}:kill"
        ended = attempts.run([sys.executable, script, run_dir, str(before + 20), wrong], fault, ENDS_S)
        found = unreadable(run_dir)
        durable = max([before, *map(int, re.findall(r"^durable (\d+)$", ended.out, re.MULTILINE))])
        after = newest_step(run_dir)
        if after < durable:
            found.append(f"newest checkpoint after step {after}, but {durable} was durable")
        for step in checkpoint.steps(run_dir) if not found else ():
            for group, arrays in writing.arrays_of(step).items():
                loaded = checkpoint.load(checkpoint.folder(run_dir, step), group)
                if any(loaded[key].tobytes() != array.tobytes() for key, array in arrays.items()):
                    found.append(f"checkpoint {step} holds the state of another step")
        if ended.code != -9 or not ended.reached or ended.left:
            found.append(f"exit code {ended.code}, {ended.left} processes left: {ended.err[-600:]}")
        table.add(
            name,
            asked=fault,
            reached=ended.reached,
            code=ended.code,
            seconds=f"{ended.seconds:.1f}",
            step=after,
            problems="; ".join(found),
        )
        if found:
            shutil.rmtree(run_dir)


def attack_prepare(wanted: int, table: Table, work: str) -> None:
    """Kill `wanted` times a `prepare`, and repeat it until the data set is there, equal to an undisturbed one."""
    from test_prepare import write_idx  # loads TensorFlow

    raw_dir, whole, data_dir = (os.path.join(work, name) for name in ("raw", "prepared", "prepare"))
    prepare = [sys.executable, "-m", "resnet_cpu.prepare", "fashion_mnist"]
    if not os.path.isdir(whole):
        shutil.rmtree(raw_dir, ignore_errors=True)
        write_idx(pathlib.Path(raw_dir))
        ended = attempts.run([*prepare, f"--raw_dir={raw_dir}", f"--data_dir={whole}"], None, 0.0)
        assert ended.code == 0, ended.err
    while sum(row["reached"] == "True" for row in table.of("prepare")) < wanted or os.path.isdir(data_dir):
        number = len(table.of("prepare"))
        generator = np.random.default_rng([table.seed, zlib.crc32(b"prepare"), number])
        met = sum(row["reached"] == "True" for row in table.of("prepare"))
        asked = f"0:prepare:*:{generator.integers(1, 5)}:kill" if met < wanted else None
        ended = attempts.run([*prepare, f"--raw_dir={raw_dir}", f"--data_dir={data_dir}"], asked, ENDS_S)
        found = [] if ended.code == (-9 if ended.reached else 0) else [f"exit code {ended.code}: {ended.err[-600:]}"]
        complete = os.path.exists(os.path.join(data_dir, shards.MANIFEST))
        if complete == ended.reached:
            found.append("a manifest before the end" if complete else "no manifest")
        if complete:
            for name in sorted(os.listdir(whole)):
                with open(os.path.join(whole, name), "rb") as one, open(os.path.join(data_dir, name), "rb") as other:
                    found += [] if name == ".prepare.lock" or one.read() == other.read() else [f"{name} differs"]
            shutil.rmtree(data_dir)
        table.add(
            "prepare",
            asked=asked or "",
            reached=ended.reached,
            code=ended.code,
            seconds=f"{ended.seconds:.1f}",
            finished="same bits" if complete and not found else "",
            problems="; ".join(found),
        )


def attack_checkpoints(wanted: int, table: Table, work: str) -> None:
    """Damage `wanted` times a file of a checkpoint; it must be passed over, with a message that names the file."""
    if not table.of("checkpoints"):
        folder = os.path.join(work, "checkpoints")
        shutil.rmtree(folder, ignore_errors=True)
        for case, found in damage.cases(folder, wanted, table.seed):
            table.add("checkpoints", asked=case, reached=True, problems=found or "")


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the campaigns that were asked for; print the table and return 1 if anything was not as promised."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--faults", default="mixed", help=f"separated by commas, of {', '.join(ALL)}")
    parser.add_argument("--n", type=int, default=11, help="faults of each kind")
    parser.add_argument("--out", required=True, help="CSV file with a row per attempt")
    parser.add_argument("--work", help="folder for data and runs (default: beside --out)")
    arguments = parser.parse_args(argv)
    names = arguments.faults.split(",")
    unknown = sorted(set(names) - set(ALL))
    if unknown:
        parser.error(f"--faults={unknown[0]}: use {', '.join(ALL)}")
    work = os.path.abspath(arguments.work or f"{arguments.out}.work")
    os.makedirs(work, exist_ok=True)
    table = Table(arguments.out, arguments.seed)
    for name in names:
        if name == "writer":
            attack_writer(arguments.n, table, work)
        elif name == "prepare":
            attack_prepare(arguments.n, table, work)
        elif name == "checkpoints":
            attack_checkpoints(arguments.n, table, work)
        else:
            attack(name, arguments.n, table, work)
    print(table.summary())
    return int(any(row["problems"] for row in table.rows))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the attempt in progress as well
    sys.exit(main())
