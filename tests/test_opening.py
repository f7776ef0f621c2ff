"""Check all that is settled before training: the run folder, its lock and signature, and early errors."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import whole_runs as runs
from conftest import ROOT, TINY_FLAGS, write_tiny_data

from resnet_cpu import commandline
from resnet_cpu.cluster import control
from resnet_cpu.cluster.environment import Environment
from resnet_cpu.errors import (
    CheckpointError,
    DataError,
    FlagError,
    NotFinite,
    RunFolderError,
)
from resnet_cpu.run.folder import RunFolder, read_rows
from resnet_cpu.training import loop, opening

pytestmark = pytest.mark.training

ALONE = control.World(1, 0)


def train(tiny_data, run_dir, *more):
    return runs.train(ALONE, tiny_data, str(run_dir), *more)


def command(tiny_data, run_dir, *more):
    return [*TINY_FLAGS, f"--data_dir={tiny_data}", f"--run_dir={run_dir}", *more]


def test_the_flags_of_a_run_without_a_step_do_not_bind_the_next_attempt(tiny_data, tmp_path, monkeypatch):
    def fail(*arguments):
        raise CheckpointError("before the first step")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train", fail)
        with pytest.raises(CheckpointError, match="before the first step"):
            train(tiny_data, tmp_path / "run", *runs.SYNTHETIC)
    assert train(tiny_data, tmp_path / "run", *runs.SYNTHETIC, "--seed=7")["complete"]
    with pytest.raises(CheckpointError, match="seed: 7 recorded, 8 now"):
        train(tiny_data, tmp_path / "run", *runs.SYNTHETIC, "--seed=8")


def test_a_run_that_was_stopped_is_not_stopped_again_earlier(tiny_data, tmp_path):
    first = train(tiny_data, tmp_path / "run", "--max_steps=6")
    assert train(tiny_data, tmp_path / "run", "--max_steps=6") == json.loads(
        (tmp_path / "run" / "result.json").read_text()
    )
    assert first["steps"] == 6 and len(read_rows(str(tmp_path / "run" / "eval.jsonl"))) == 1
    with pytest.raises(FlagError, match="--max_steps=3: .* is at step 6 already"):
        train(tiny_data, tmp_path / "run", "--max_steps=3")
    with pytest.raises(NotFinite):
        train(tiny_data, tmp_path / "bad", "--max_steps=6", "--phase=main:steps=10,lr=1e30,decay=constant")
    assert not (tmp_path / "bad" / "result.json").exists()


def test_a_run_is_not_continued_on_other_data_of_the_same_size(tiny_data, tmp_path):
    """As after `prepare` of other raw images, or with another seed."""
    train(tiny_data, tmp_path / "run", "--max_steps=3")
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    assert train(str(data), tmp_path / "run", "--max_steps=4")["steps"] == 4  # a copy elsewhere is the same
    shutil.rmtree(data)
    write_tiny_data(str(data), seed=1)
    with pytest.raises(CheckpointError, match="belongs to another data set: --data_dir holds other training images"):
        train(str(data), tmp_path / "run")


def test_a_run_that_continues_with_other_evaluation_images_warns(tiny_data, tmp_path, capfd):
    train(tiny_data, tmp_path / "run", "--max_steps=3")
    data, other = tmp_path / "data", tmp_path / "other"
    shutil.copytree(tiny_data, data)
    train(str(data), tmp_path / "run", "--max_steps=4")
    assert "evaluated on other images" not in capfd.readouterr().err  # negative control
    write_tiny_data(str(other), seed=1)
    for path in other.glob("validation-*"):
        shutil.copy(path, data)
    manifest, replaced = (json.loads((folder / "manifest.json").read_text()) for folder in (data, other))
    manifest["splits"]["validation"] = replaced["splits"]["validation"]
    (data / "manifest.json").write_text(json.dumps(manifest))
    train(str(data), tmp_path / "run", "--max_steps=5")
    assert f"evaluated on other images than those of {data} now" in capfd.readouterr().err


def test_a_run_without_a_member_that_it_has_passed_is_not_continued(tiny_data, tmp_path):
    phases = ["--phase=main:steps=3,lr=0.05", "--phase=tail:steps=2,lr=0.02,branch=1,member=1"]
    phases += ["--phase=cycle:steps=3,lr=0.04", "--phase=collapse:steps=2,lr=0.01,branch=1,member=1"]
    flags = [*phases, "--experiment=collapsed_ensemble", "--checkpoint_every_steps=1"]
    train(tiny_data, tmp_path / "run", *flags, "--max_steps=6")
    weights = tmp_path / "run" / "members" / "tail" / "weights.npz"
    content = weights.read_bytes()
    for damage in (weights.unlink, lambda: weights.write_bytes(content[:-1])):
        damage()
        with pytest.raises(CheckpointError, match="after step 6 without .*members/tail, which is missing or damaged"):
            train(tiny_data, tmp_path / "run", *flags)
        weights.write_bytes(content)
    # A run that stops before `cycle` needs the end of `main`, with its velocity.
    train(tiny_data, tmp_path / "other", *flags, "--max_steps=4")
    (tmp_path / "other" / "checkpoints" / "step-00000003" / "optimizer.npz").unlink()
    with pytest.raises(CheckpointError, match="after step 4 without .*step-00000003, which is missing or damaged"):
        train(tiny_data, tmp_path / "other", *flags)
    assert set(train(tiny_data, tmp_path / "run", *flags)["members"]) == {"tail", "collapse"}


def test_a_run_whose_checkpoints_are_gone_says_that_it_starts_again(tiny_data, tmp_path, capfd):
    train(tiny_data, tmp_path / "run", *runs.SYNTHETIC, "--max_steps=2")
    assert "has no checkpoint" not in capfd.readouterr().err
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert train(tiny_data, tmp_path / "run", *runs.SYNTHETIC)["complete"]
    assert "has trained 2 steps, but has no checkpoint; training starts again" in capfd.readouterr().err


def test_a_loss_that_is_not_finite_is_recorded_until_the_run_is_started_again(tiny_data, tmp_path, monkeypatch):
    flags = ["--max_steps=9", "--phase=main:steps=10,lr=1e30,decay=constant"]
    record = tmp_path / "run" / "not_finite.json"
    with pytest.raises(NotFinite) as caught:
        train(tiny_data, tmp_path / "run", *flags)
    found = json.loads(record.read_text())
    assert found["message"] == str(caught.value) and f"in step {found['steps'] - 1} " in found["message"]
    with pytest.raises(RunFolderError, match="holds a run already"):
        train(tiny_data, tmp_path / "run", *flags, "--resume=never")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train", lambda *arguments: pytest.fail(f"started with {record.exists()}"))
        with pytest.raises(pytest.fail.Exception, match="started with False"):
            train(tiny_data, tmp_path / "run", *flags)
    original = RunFolder.write_json

    def full(folder, name, content):
        if name == record.name:
            raise OSError(28, "No space left on device")
        original(folder, name, content)

    monkeypatch.setattr(RunFolder, "write_json", full)
    with pytest.raises(NotFinite):  # the same error as on the other ranks
        train(tiny_data, tmp_path / "run", *flags)
    assert not record.exists()


def test_resume_choices(tiny_data, tmp_path):
    with pytest.raises(CheckpointError, match="--resume=must"):
        train(tiny_data, tmp_path / "new", "--resume=must")
    train(tiny_data, tmp_path / "run", *runs.SYNTHETIC, "--max_steps=2")
    with pytest.raises(RunFolderError, match="holds a run already"):
        train(tiny_data, tmp_path / "run", *runs.SYNTHETIC, "--resume=never")
    (tmp_path / "failed").mkdir()  # what an attempt leaves that fails before its first step
    (tmp_path / "failed" / "run.json").write_bytes((tmp_path / "run" / "run.json").read_bytes())
    assert train(tiny_data, tmp_path / "failed", *runs.SYNTHETIC, "--resume=never")["complete"]


@pytest.mark.parametrize(
    "flag, part",
    [
        ("--num_classes=12", "model.num_classes: 10 recorded, 12 now"),
        ("--width=0.25", "model.width: 0.125 recorded, 0.25 now"),
        ("--model=resnet34", "model.model: resnet18 recorded, resnet34 now"),
        ("--global_batch_size=10", "global_batch_size: 12 recorded, 10 now"),
        ("--seed=7", "seed: 0 recorded, 7 now"),
        ("--phase=more:steps=1,lr=1", "phases.more: only now"),
        ("--phase=main:steps=12,lr=0.05,warmup_steps=3", "phases.main.steps: 10 recorded, 12 now"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_with_the_difference(tiny_data, finished, tmp_path, flag, part):
    with pytest.raises(CheckpointError) as caught:
        runs.train(ALONE, tiny_data, finished, flag)
    assert part in str(caught.value)
    # and where only the checkpoints are left of the run
    shutil.copytree(os.path.join(finished, "checkpoints"), tmp_path / "run" / "checkpoints")
    with pytest.raises(CheckpointError) as caught:
        train(tiny_data, tmp_path / "run", flag)
    assert part in str(caught.value)


@pytest.mark.parametrize(
    "flags, error, part",
    [
        (["--phase=main:steps=1,lr=1,branch=1"], FlagError, "branch=1"),
        (["--experiment=collapsed_ensemble"], FlagError, "needs at least two members, the recipe has 0"),
        (["--experiment=lr_scaling"], FlagError, "eval_every_epochs"),
        (["--bn_stats_batch=5"], FlagError, "does not divide the 12 images"),
        (["--accumulate_steps=5"], FlagError, "not divisible by 1 ranks x 5 accumulated batches"),
        (["--global_batch_size=51"], DataError, "50 training examples are fewer than one global batch of 51"),
        ([*runs.SYNTHETIC, "--train_examples=70000", "--global_batch_size=70000"], FlagError, "65,536"),
        (["--train_examples=51"], DataError, "holds 50"),
        (["--num_classes=9"], DataError, "10 classes"),
        (["--dataset=fashion_mnist"], DataError, "contains digits"),
        (["--data_dir=/no/such/folder"], DataError, "/no/such/folder"),
        (["--data_dir="], FlagError, "--data_dir is missing"),
        (["--run_dir="], FlagError, "--run_dir is missing"),
    ],
)
def test_what_cannot_run_is_refused_and_nothing_is_saved(tiny_data, tmp_path, flags, error, part):
    with pytest.raises(error) as caught:
        train(tiny_data, tmp_path / "run", *flags)
    assert part in str(caught.value) and "\n" not in str(caught.value)
    assert not os.path.exists(tmp_path / "run" / "checkpoints")


def test_early_errors_do_not_load_tensorflow(tiny_data, tmp_path):
    code = """
import sys
from resnet_cpu import train
from resnet_cpu.errors import DataError
try:
    train.main(sys.argv[1:])
except DataError:
    assert 'tensorflow' not in sys.modules
    print('refused')
"""
    arguments = command(tiny_data, tmp_path / "run", "--global_batch_size=51")
    process = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert process.stdout == "refused\n", process.stderr


@pytest.mark.parametrize("content", ["{", "{}", "5"])
def test_a_finished_run_with_a_damaged_record_is_compared_with_its_checkpoint(tiny_data, finished, tmp_path, content):
    """Fault: it counted as the result of any other recipe."""
    run_dir = str(tmp_path / "run")
    shutil.copytree(finished, run_dir)
    pathlib.Path(run_dir, "run.json").write_text(content)
    assert train(tiny_data, run_dir, "--eval_every_epochs=1")["complete"]
    with pytest.raises(CheckpointError, match="seed: 0 recorded, 7 now"):
        train(tiny_data, run_dir, "--eval_every_epochs=1", "--seed=7")


def test_the_lock_is_taken_before_the_folder_is_read(tiny_data, finished, tmp_path, monkeypatch):
    """A job that starts while another one ends waits for the lock, and must see the folder that the other one left."""
    run_dir = str(tmp_path / "run")
    shutil.copytree(finished, run_dir)
    result = pathlib.Path(run_dir, "result.json")
    complete = result.read_bytes()
    result.unlink()

    class Held(RunFolder):
        def __init__(self, path):
            result.write_bytes(complete)  # the other job ends
            super().__init__(path)

    monkeypatch.setattr(opening, "RunFolder", Held)
    monkeypatch.setattr(loop, "train", lambda *arguments: pytest.fail("trained again"))
    assert train(tiny_data, run_dir, runs.EVERY_EPOCH) == json.loads(complete)
    RunFolder(run_dir).close()  # released


class Twin(control.World):
    """Two ranks in one process: the other one repeats the messages of this one, except for its threads."""

    def broadcast(self, message):
        return message

    def gather(self, message):
        other = message
        if isinstance(message, dict) and "environment" in message:
            threads = {name: "3" for name in ("TF_NUM_INTRAOP_THREADS", "OMP_NUM_THREADS")}
            other = {**message, "host": "elsewhere", "environment": {**message["environment"], **threads}}
        return [message, other]


def test_lars_on_unequal_threads_is_refused(tiny_data, tmp_path):
    """Norms of layers differ in their last bits with the threads, so the ranks would drift apart."""

    def open_job(*more):
        settings = commandline.parse([*TINY_FLAGS, f"--data_dir={tiny_data}", f"--run_dir={tmp_path}/run", *more])
        threads = {"TF_NUM_INTRAOP_THREADS": "2", "OMP_NUM_THREADS": "2"}
        return opening.open_job(settings, Twin(2, 0), Environment(threads, {}, {}))

    with pytest.raises(FlagError, match=r"rank 0 on .*: 2; rank 1 on elsewhere: 3. .*--threads=2") as caught:
        open_job("--optimizer=lars")
    assert caught.value.collective and not (tmp_path / "run").exists()
    open_job("--optimizer=sgd").folder.close()  # negative control


class Rank1(control.World):
    """Rank 1 of two; rank 0 has no error, and was also given the `more` flags."""

    more = ()

    def broadcast(self, message):
        return {"result": None}

    def gather(self, message):
        if isinstance(message, dict) and "flags" in message:
            return [{**message, "host": "first", "flags": f"{message['flags']}{self.more}"}, message]
        if isinstance(message, list) and str(message[0]).startswith("--"):
            return [[*message, *self.more], message]
        return [["first", None], message]


def test_a_flag_that_one_host_lacks_is_an_error_of_all_ranks(tmp_path, monkeypatch):
    """Fault: that rank alone took it for an error of all, and waited for the others, which waited for it."""
    settings = commandline.parse([*TINY_FLAGS, "--data_dir="])
    with pytest.raises(FlagError, match=r"^rank 1 on .*: --data_dir is missing") as caught:
        opening.open_data(settings, Rank1(2, 1))
    assert caught.value.collective
    monkeypatch.setattr(Rank1, "more", ("--run_dir=runs/first",))
    settings = commandline.parse([*TINY_FLAGS, f"--data_dir={tmp_path}", "--run_dir="])
    with pytest.raises(FlagError, match="rank 0 on first: none instead of --run_dir=runs/first; give") as caught:
        opening.open_job(settings, Rank1(2, 1), Environment({}, {}, {}))
    assert caught.value.collective


def test_a_scaling_run_that_is_too_short_to_be_timed_is_refused(tiny_data, tmp_path):
    with pytest.raises(FlagError, match="the run has only 4"):
        train(tiny_data, tmp_path / "run", *runs.SHORT, "--experiment=scaling")
