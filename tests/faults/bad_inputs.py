"""Give the commands what users give them by mistake: each must end with one clear line and the right exit code.

    python tests/faults/bad_inputs.py --out=bad_inputs.csv

A case passes if it ends with the expected exit code and exactly one line of error that holds the expected parts,
without a traceback, and within --limit seconds. Each case is a row of --out: kind, case, code, seconds, message, wrong.
"""

import argparse
import csv
import json
import pathlib
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import raw_images
from conftest import OUTSIDE, ROOT, TINY_FLAGS, error_lines, write_tiny_data

Change = Callable[[pathlib.Path], None]
TRAIN = ["train", *TINY_FLAGS, "--data_dir={data}", "--run_dir={new}"]
EVALUATE = ["evaluate", *TINY_FLAGS, "--data_dir={data}", "--run_dir={run}"]
SYNTHETIC = [
    "train",
    "--dataset=synthetic",
    "--train_examples=64",
    "--num_classes=4",
    "--image_size=16",
    "--run_dir={new}",
]
PHASE = "--phase=main:steps=2,lr=0.1"


class Case(NamedTuple):
    """A mistake of a user, and how the command has to answer."""

    kind: str
    what: str
    command: Sequence[str]  # COMMAND ARGUMENT..., with {data}, {run}, {new}, {raw}, {archives}, {here} filled in
    code: int
    parts: Tuple[str, ...]  # of the line of error
    change: Optional[Change] = None  # of the copies in this case's folder
    environment: Optional[Dict[str, str]] = None
    here: bool = False  # whether it runs in the case's folder, not in the repository


def write(path: str, content: bytes) -> Change:
    """Return a change that replaces a file."""
    return lambda folder: (folder / path).write_bytes(content)


def edit(path: str, function: Callable[[bytes], bytes]) -> Change:
    """Return a change that replaces the content of a file by a function of it."""
    return lambda folder: (folder / path).write_bytes(function((folder / path).read_bytes()))


def remove(*paths: str) -> Change:
    def change(folder: pathlib.Path) -> None:
        for path in paths:
            (folder / path).unlink()

    return change


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def without_last_record(content: bytes) -> bytes:
    """Cut a shard off exactly between two records."""
    ends, at = [0], 0
    while at < len(content):
        at += 16 + struct.unpack_from("<Q", content, at)[0]
        ends.append(at)
    return content[: ends[-2]]


def in_manifest(**changes: object) -> Change:
    """Return a change of keys of the data set's manifest."""

    def change(folder: pathlib.Path) -> None:
        path = folder / "data" / "manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def swap_indexes(folder: pathlib.Path) -> None:
    one, other = sorted((folder / "data").glob("train*.index.npy"))[:2]
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def with_archive(member: str, kind: bytes = tarfile.REGTYPE) -> Change:
    """Return a change that replaces ImageNet's training archive by one with a single odd member."""

    def change(folder: pathlib.Path) -> None:
        with tarfile.open(folder / "archives" / "ILSVRC2012_img_train.tar", "w") as archive:
            info = tarfile.TarInfo(member)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)

    return change


def damage_checkpoints(folder: pathlib.Path) -> None:
    for path in (folder / "run" / "checkpoints").glob("*/weights.npz"):
        path.write_bytes(path.read_bytes()[:100])


def other_images(folder: pathlib.Path) -> None:
    """Prepare the data set again, with as many images, of which some differ."""
    shutil.rmtree(folder / "data")
    write_tiny_data(str(folder / "data"), seed=1)


def bomb(folder: pathlib.Path) -> None:
    """Put an image of 50,000 x 50,000 pixels among the raw ones."""
    header = raw_images.encoded(height=8, width=8)
    place = header.index(b"\xff\xc0") + 5  # height and width of the frame
    (folder / "raw" / "train" / "cat" / "0.jpg").write_bytes(
        header[:place] + struct.pack(">HH", 50000, 50000) + header[place + 4 :]
    )


def one_class(folder: pathlib.Path) -> None:
    for name in ("dog", "eel"):
        for split in ("train", "validation"):
            shutil.rmtree(folder / "raw" / split / name)


TRAIN_SHARD, EVAL_SHARD = "data/train-00000-of-00003", "data/validation-00000-of-00002"
ARCHIVES = ["prepare", "imagenet", "--raw_dir={archives}", "--data_dir={new}"]
FOLDER = ["prepare", "folder", "--raw_dir={raw}", "--data_dir={new}"]

FLAGS = [
    ("an unknown flag", [*SYNTHETIC, PHASE, "--bach_size=3"], ("bach_size",)),
    ("a word for a number", [*SYNTHETIC, PHASE, "--batch_size=many"], ("--batch_size=many",)),
    ("a batch of none", [*SYNTHETIC, PHASE, "--batch_size=0"], ("--batch_size=0",)),
    ("no phase", SYNTHETIC, ("--phase",)),
    ("a phase without a rate", [*SYNTHETIC, "--phase=main:steps=2"], ("main", "lr")),
    ("a phase with two lengths", [*SYNTHETIC, "--phase=main:steps=2,epochs=1,lr=0.1"], ("steps", "epochs")),
    ("an unknown key of a phase", [*SYNTHETIC, "--phase=main:steps=2,lr=0.1,speed=3"], ("speed",)),
    ("a phase from nowhere", [*SYNTHETIC, PHASE, "--phase=b:steps=1,lr=0.1,from=x"], ("from=x",)),
    ("a batch that cannot be divided", [*SYNTHETIC, PHASE, "--global_batch_size=7", "--batch_size=2"], ("7",)),
    ("an unknown choice", [*SYNTHETIC, PHASE, "--optimizer=adam"], ("--optimizer=adam", "sgd")),
    ("a crop outside of the image", [*SYNTHETIC, PHASE, "--crop=inception:0.5,2"], ("--crop",)),
    ("no width", [*SYNTHETIC, PHASE, "--width=0"], ("--width=0",)),
    ("a batch that fits in no memory", [*SYNTHETIC, PHASE, "--eval_batch_size=999999999"], ("eval_batch_size",)),
    ("more threads than there are", [*SYNTHETIC, PHASE, "--threads=99999999"], ("threads",)),
    ("a million million classes", [*SYNTHETIC, PHASE, "--num_classes=1000000000000"], ("num_classes",)),
    ("a rate that is not a number", [*SYNTHETIC, "--phase=main:steps=2,lr=nan"], ("lr=nan", "finite")),
    (
        "a factor beyond all numbers",
        ["plan", "--dataset=synthetic", "--phase=a:steps=9,lr=1,decay=step,boundary_steps=1/2/3,gamma=1e308"],
        ("gamma",),
    ),
    ("a speed near zero", ["plan", "--dataset=synthetic", PHASE, "--speed=1e-320"], ("--speed=1e-320",)),
    ("flags that may be unknown", [*SYNTHETIC, PHASE, "--undefok=sed", "--sed=3"], ("--undefok=sed",)),
    ("steps in the wrong order", [*SYNTHETIC, PHASE, "--profile_steps=5,3"], ("--profile_steps",)),
    ("a variable that is not set", [*SYNTHETIC, PHASE, "--run_dir=$NOT_SET/x"], ("NOT_SET",)),
    ("no flagfile", ["train", "--flagfile=none.flags"], ("none.flags",)),
    ("members that are missing", [*SYNTHETIC, PHASE, "--experiment=collapsed_ensemble"], ("member",)),
    ("an unknown data set", ["plan", PHASE, "--dataset=imgnet"], ("imgnet",)),
    ("an unknown format", ["plan", PHASE, "--format=xml"], ("--format=xml",)),
    ("an unknown network", ["simulate", PHASE, "--network=pigeon"], ("pigeon",)),
    ("no speed", ["simulate", PHASE, "--speed=0"], ("--speed=0",)),
    ("ranks on no host", ["launch", "--hosts=", "--", "true"], ("--hosts",)),
    ("no command", ["launch"], ("command",)),
]
DATA = [
    ("no folder", [*TRAIN, "--data_dir={here}/none"], None, ("none",)),
    ("an empty folder", [*TRAIN, "--data_dir={here}/empty"], lambda folder: (folder / "empty").mkdir(), ("empty",)),
    ("a file for a folder", [*TRAIN, "--data_dir={data}/manifest.json"], None, ("manifest.json",)),
    ("a shard cut between two records", TRAIN, edit(TRAIN_SHARD, without_last_record), ("train-00000",)),
    ("a shard cut inside a record", TRAIN, edit(TRAIN_SHARD, lambda c: c[: len(c) // 2]), ("train-00000",)),
    ("a flipped bit in a training shard", TRAIN, edit(TRAIN_SHARD, flip), ("train-00000",)),
    ("a flipped bit in an evaluation shard", EVALUATE, edit(EVAL_SHARD, flip), ("validation-00000",)),
    ("a missing shard", TRAIN, remove(TRAIN_SHARD), ("train-00000",)),
    ("an empty shard", TRAIN, write(TRAIN_SHARD, b""), ("train-00000",)),
    ("indexes of each other's shards", TRAIN, swap_indexes, ("index",)),
    ("a manifest that is not JSON", TRAIN, write("data/manifest.json", b"{"), ("manifest.json",)),
    ("a pointer of Git LFS for a shard", TRAIN,
     write(TRAIN_SHARD, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"), ("train-00000",)),
    ("a compressed shard", TRAIN, write(TRAIN_SHARD, b"\x1f\x8b\x08\x00" + bytes(400)), ("train-00000",)),
    ("a web page for a shard", TRAIN, write(TRAIN_SHARD, b"<!DOCTYPE html>" + b" " * 400), ("train-00000",)),
    ("no manifest", TRAIN, remove("data/manifest.json"), ("data",)),
    ("fewer classes than labels", [*TRAIN, "--num_classes=5"], None, ("5",)),
    ("another data set's shards", [*TRAIN, "--dataset=fashion_mnist"], None, ("fashion_mnist",)),
    ("an unknown split", [*TRAIN, "--eval_split=night"], None, ("night",)),
    ("more examples than there are", [*TRAIN, "--train_examples=5000"], None, ("5000",)),
    ("classes of another set", TRAIN, in_manifest(classes=["a", "b"]), ("classes",)),
]  # fmt: skip
PREPARE = [
    ("no raw folder", [*FOLDER[:2], "--raw_dir={here}/none", "--data_dir={new}"], None, 65, ("none",)),
    ("shards among the raw files", [*FOLDER[:3], "--data_dir={raw}"], None, 64, ("--raw_dir",)),
    ("a raw folder without classes", [*FOLDER[:2], "--raw_dir={data}", "--data_dir={new}"], None, 65, ("data",)),
    ("a single class", FOLDER, one_class, 65, ("class",)),
    ("a file that is not an image", FOLDER, write("raw/train/cat/0.jpg", b"<html>" * 99), 65, ("0.jpg",)),
    ("a truncated image", FOLDER, edit("raw/train/cat/0.jpg", lambda c: c[: len(c) // 2]), 65, ("0.jpg",)),
    ("an empty image", FOLDER, write("raw/train/cat/0.jpg", b""), 65, ("0.jpg",)),
    ("an image of 50,000 x 50,000", FOLDER, bomb, 65, ("0.jpg", "50000")),
    ("ImageNet that is not whole", ARCHIVES, None, 65, ("1,281,167",)),
    ("no archives", [*ARCHIVES[:2], "--raw_dir={raw}", "--data_dir={new}"], None, 65, ("raw",)),
    ("an archive cut off", ARCHIVES,
     edit("archives/ILSVRC2012_img_train.tar", lambda c: c[: len(c) // 2 + 100]), 65, ("img_train.tar",)),
    ("an archive with an absolute path", ARCHIVES, with_archive("/etc/cron.d/x.tar"), 65, ("/etc/cron.d/x.tar",)),
    ("an archive with ..", ARCHIVES, with_archive("../../x.tar"), 65, ("../../x.tar",)),
    ("an archive with a link", ARCHIVES, with_archive("n10000000.tar", tarfile.SYMTYPE), 65, ("n10000000.tar",)),
    ("a wrong number of labels", ARCHIVES,
     write("archives/imagenet_2012_validation_synset_labels.txt", b"n10000000\n"), 65,
     ("1 labels", "number 20")),
    ("an output folder that holds other files", FOLDER,
     lambda folder: shutil.copytree(folder / "data", folder / "new"), 65, ("new",)),
    ("verify of no data set", ["prepare", "verify", "--data_dir={raw}"], None, 65, ("raw",)),
    ("verify of a damaged data set", ["prepare", "verify", "--data_dir={data}"], edit(TRAIN_SHARD, flip), 65,
     ("train-00000",)),
]  # fmt: skip
CHECKPOINTS = [
    ("damaged checkpoints only", [*TRAIN[:-1], "--run_dir={run}", "--phase=tail:steps=9,lr=0.01"], damage_checkpoints,
     66, ("run",)),
    ("a run of another recipe", [*TRAIN[:-1], "--run_dir={run}", "--seed=4"], None, 66, ("seed",)),
    ("a run of another network", [*TRAIN[:-1], "--run_dir={run}", "--width=0.25"], None, 66, ("width",)),
    ("nothing to resume", [*TRAIN, "--resume=must"], None, 66, ("new",)),
    ("a run that must not exist", [*TRAIN[:-1], "--run_dir={run}", "--resume=never"], None, 73, ("run",)),
    ("weights from nowhere", [*TRAIN, "--init_from={here}/none.npz"], None, 66, ("none.npz",)),
    ("weights of another network", [*TRAIN, "--init_from={run}", "--width=0.25"], None, 66, ("(3, 3, 3, 16)", "flags")),
    ("a file without weights", [*TRAIN, "--init_from={data}/manifest.json"], None, 66, ("manifest.json",)),
    ("no run to evaluate", [*EVALUATE[:-1], "--run_dir={new}"], None, 66, ("new",)),
    ("an ensemble without members", ["evaluate", "--ensemble", "--run_dir={run}"], None, 66, ("member",)),
    ("a data set as a member", ["evaluate", "--ensemble", "--members={data}"], None, 66, ("data", "neither a member")),
    ("other images than before", [*TRAIN[:-1], "--run_dir={run}"], other_images, 66, ("another data set",)),
    ("a member that does not exist", ["evaluate", "--ensemble", "--members={run}/members/x"], None, 66, ("x",)),
]  # fmt: skip
PLACES = [
    ("a file for the run folder", [*SYNTHETIC, PHASE, "--run_dir={data}/manifest.json"], None, {}, 73,
     ("manifest.json",)),
    ("a run folder that cannot be made", [*SYNTHETIC, PHASE, "--run_dir=/proc/x"], None, {}, 73, ("/proc/x",)),
    ("tables outside of the repository", ["tables"], None, {}, 65, ("experiments",)),
    ("tables of a single run", ["tables", "--runs={run}"], None, {}, 65, ("run", "is itself a run")),
    ("tables of a folder without runs", ["tables", "--runs={raw}"], None, {}, 65, ("raw",)),
    ("a word for a number of threads", [*SYNTHETIC, PHASE], None, {"OMP_NUM_THREADS": "many"}, 64,
     ("OMP_NUM_THREADS",)),
    ("Python without docstrings", [*SYNTHETIC, PHASE], None, {"PYTHONOPTIMIZE": "2"}, 64, ("PYTHONOPTIMIZE",)),
    ("an unknown fault", [*SYNTHETIC, PHASE], None, {"RESNET_CPU_FAULT": "soon"}, 64, ("RESNET_CPU_FAULT",)),
    ("four tasks and one process", [*SYNTHETIC, PHASE], None,
     {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4"},
     64, ("4",)),
]  # fmt: skip
CASES = [
    *(Case("flags", what, command, 64, parts) for what, command, parts in FLAGS),
    *(Case("data", what, command, 65, parts, change) for what, command, change, parts in DATA),
    *(Case("images, archives", what, command, code, parts, change) for what, command, change, code, parts in PREPARE),
    *(Case("checkpoints", what, command, code, parts, change) for what, command, change, code, parts in CHECKPOINTS),
    *(
        Case(
            "folders, environments",
            what,
            command,
            code,
            parts,
            change,
            variables,
            command[0] == "tables" and not command[1:],
        )
        for what, command, change, variables, code, parts in PLACES
    ),
]


def originals(folder: pathlib.Path) -> pathlib.Path:
    """Make what the cases damage: a data set, a finished run on it, a tree of images, ImageNet's archives."""
    write_tiny_data(str(folder / "data"))
    raw_images.folders(folder / "raw")
    raw_images.imagenet(folder / "archives", odd=False)
    train = [
        sys.executable,
        "-m",
        "resnet_cpu.train",
        *TINY_FLAGS,
        f"--data_dir={folder}/data",
        f"--run_dir={folder}/run",
    ]
    subprocess.run(train, cwd=ROOT, env=OUTSIDE, check=True, capture_output=True)
    return folder


def run(case: Case, made: pathlib.Path, limit: float) -> Tuple[Dict[str, str], List[str]]:
    """Return the row of a case, and what was wrong with the answer."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        shutil.copytree(made, folder, dirs_exist_ok=True)
        if case.change:
            case.change(folder)
        places = {key: folder / key for key in ("data", "run", "new", "raw", "archives")}
        command, *arguments = [argument.format(here=folder, **places) for argument in case.command]
        environment = {**OUTSIDE, **(case.environment or {})}
        began = time.monotonic()
        ended = subprocess.run(
            [sys.executable, "-m", f"resnet_cpu.{command}", *arguments],
            cwd=folder if case.here else ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        seconds = time.monotonic() - began
    lines = error_lines(ended)
    message = lines[-1].replace(name, "") if lines else ended.stderr.strip()[-200:]
    wrong = []
    if ended.returncode != case.code:
        wrong.append(f"exit code {ended.returncode}, not {case.code}")
    if len(lines) != 1:
        wrong.append(f"{len(lines)} lines of error")
    if "Traceback" in ended.stderr:
        wrong.append("a traceback")
    wrong += [f"no {part!r} in the message" for part in case.parts if part not in message]
    if seconds > limit:
        wrong.append(f"took {seconds:.1f} s")
    row = {"kind": case.kind, "case": case.what, "code": str(ended.returncode), "seconds": f"{seconds:.1f}"}
    return {**row, "message": message, "wrong": "; ".join(wrong)}, wrong


def main() -> int:
    """Run all cases; print those that were answered wrongly, and return 1 if there are any."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", help="CSV file with a row for each case")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds within which a command has to answer")
    parser.add_argument("--only", default="", help="part of the names of the cases to run")
    arguments = parser.parse_args()
    rows, failed = [], 0
    with tempfile.TemporaryDirectory() as name:
        made = originals(pathlib.Path(name))
        for case in [case for case in CASES if arguments.only in case.what]:
            row, wrong = run(case, made, arguments.limit)
            rows.append(row)
            failed += bool(wrong)
            print(
                f"{'BAD ' if wrong else 'ok  '} {row['seconds']:>5} s  {row['code']:>3}  {case.what}: {row['message']}",
                flush=True,
            )
            for text in wrong:
                print(f"         {text}", flush=True)
    if arguments.out:
        with open(arguments.out, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["kind", "case", "code", "seconds", "message", "wrong"])
            writer.writeheader()
            writer.writerows(rows)
    slowest = max((float(row["seconds"]) for row in rows), default=0.0)
    print(f"{len(rows)} cases, {failed} answered wrongly; slowest {slowest:.1f} s")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
