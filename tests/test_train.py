"""Whole runs on one rank, in this process and as commands."""

import csv
import hashlib
import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from unittest import mock

import numpy as np
import pytest
import whole_runs as runs
from conftest import OUTSIDE, ROOT, TINY_FLAGS, error_lines, last_line, write_tiny_data

from resnet_cpu import commandline, evaluate, plan
from resnet_cpu.cluster import control
from resnet_cpu.data import order
from resnet_cpu.errors import (
    CheckpointError,
    DataError,
    FlagError,
    NotFinite,
    RunFolderError,
    StopRequested,
    UserError,
)
from resnet_cpu.report import run_plots
from resnet_cpu.run import checkpoint
from resnet_cpu.run.folder import RunFolder, read_json, read_rows
from resnet_cpu.training import loop, opening
from resnet_cpu.training import report as reports

ALONE = control.World(1, 0)


def train(tiny_data, run_dir, *more):
    return runs.train(ALONE, tiny_data, str(run_dir), *more)


@pytest.fixture(scope="module")
def finished(tiny_data, tmp_path_factory):
    """The folder of a finished run, not to be changed, which also checks what is drawn when."""
    folder = str(tmp_path_factory.mktemp("finished") / "run")
    original, drawn = run_plots.draw_curves, []

    def draw(*arguments):
        drawn.append(os.path.exists(os.path.join(folder, "result.json")))
        original(*arguments)

    with mock.patch.object(run_plots, "draw_curves", draw):
        runs.train(ALONE, tiny_data, folder, "--eval_every_epochs=1", draw=True)
    assert drawn == [True]  # once, after the clock has stopped: not at each evaluation, while all ranks wait
    return folder


def test_resume_is_bit_identical(tiny_data, finished, tmp_path):
    runs.check_resume(ALONE, tiny_data, str(tmp_path), whole=finished)


def test_negative_control_another_seed_is_another_run(tiny_data, finished, tmp_path):
    train(tiny_data, tmp_path / "other", "--seed=1")
    assert runs.differing(runs.final_state(str(tmp_path / "other")), runs.final_state(finished))


def test_evaluation_logging_and_checkpoints_do_not_change_training(tiny_data, finished, tmp_path):
    other = str(tmp_path / "run")
    train(tiny_data, other, "--log_every_steps=7", "--checkpoint_every_steps=3", "--eval_batch_size=5")
    assert not runs.differing(runs.final_state(other), runs.final_state(finished))


def test_run_folder_holds_the_contract(finished):
    result = json.loads(pathlib.Path(finished, "result.json").read_text())
    assert set(result) >= {
        "experiment",
        "top1",
        "top5",
        "loss",
        "examples",
        "images_per_second",
        "images_per_second_per_core",
        "steps",
        "epochs",
        "ranks",
        "global_batch_size",
        "wall_seconds",
        "seed",
        "complete",
        "seconds_to_top1",
    }
    assert result["examples"] == 21 and result["steps"] == 16 and result["epochs"] == 16 * 12 / 50
    assert result["top1"] * 21 == pytest.approx(round(result["top1"] * 21)) and result["top1"] <= result["top5"] <= 1
    rows = read_rows(os.path.join(finished, "metrics.jsonl"))
    assert [row["step"] for row in rows] == list(range(16))
    assert set(rows[0]) >= {
        "step",
        "phase",
        "epoch",
        "lr",
        "loss",
        "images_per_second",
        "data_wait_s",
        "step_s",
        "attempt",
    }
    assert [row["phase"] for row in rows] == ["main"] * 10 + ["tail"] * 6
    timed = [row for row in rows if row["step_s"] is not None]
    assert len(timed) == 14  # all but the first of each phase
    assert all(row["update_s"] > 0 for row in timed)
    assert all(row["update_s"] + row["data_wait_s"] < row["step_s"] for row in timed)
    evaluations = read_rows(os.path.join(finished, "eval.jsonl"))
    assert [row["step"] + 1 for row in evaluations] == [
        5,
        9,
        13,
        16,
    ]  # 12 of 50 a step: after epochs 1, 2, 3 and at the end
    record = json.loads(pathlib.Path(finished, "run.json").read_text())
    assert record["versions"]["tensorflow"] and record["per_rank"][0]["cores"] and record["seed"] == 0
    assert record["peak_memory_gib_per_rank"][0] > 0.1
    assert os.listdir(os.path.join(finished, "tensorboard"))
    assert pathlib.Path(finished, "plots", "curves.png").read_bytes().startswith(b"\x89PNG")
    assert checkpoint.steps(finished) == [10, 16]


def tree(folder):
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(pathlib.Path(folder).rglob("*"))
        if path.is_file()
    }


def test_a_finished_run_changes_nothing_and_prints_its_result(tiny_data, finished, run_command):
    before = tree(finished)
    process = run_command(
        "train", *TINY_FLAGS, f"--data_dir={tiny_data}", f"--run_dir={finished}", "--eval_every_epochs=1"
    )
    assert process.returncode == 0, process.stderr
    assert json.loads(last_line(process.stdout)) == json.loads(pathlib.Path(finished, "result.json").read_text())
    assert tree(finished) == before


def test_evaluate_gives_the_score_of_the_run(finished, run_command, tmp_path):
    process = run_command("evaluate", f"--run_dir={finished}", "--eval_batch_size=4")
    assert process.returncode == 0, process.stderr
    scores, result = (
        json.loads(last_line(process.stdout)),
        json.loads(pathlib.Path(finished, "result.json").read_text()),
    )
    assert [scores[key] for key in ("examples", "top1", "top5")] == [
        result[key] for key in ("examples", "top1", "top5")
    ]
    assert scores["loss"] == pytest.approx(result["loss"], rel=1e-5)
    refused = run_command("evaluate", f"--run_dir={finished}", "--num_classes=12")
    assert refused.returncode == 66 and "num_classes: 10 recorded, 12 now" in error_lines(refused)[0]
    assert run_command("evaluate", f"--run_dir={tmp_path}").returncode == 66


def test_bfloat16_resumes_bit_identically_and_is_scored_in_either_precision(tiny_data, tmp_path, capsys):
    runs.check_resume(ALONE, tiny_data, str(tmp_path), "--precision=bfloat16", stops=(13,))
    losses = {}
    for precision in ("bfloat16", "float32"):
        evaluate.main([f"--run_dir={tmp_path}/whole", f"--precision={precision}"])
        losses[precision] = json.loads(last_line(capsys.readouterr().out))["loss"]
    assert losses["float32"] != losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.05)


def test_other_data_is_scored_with_the_pixel_mean_of_the_training(finished, tmp_path, run_command):
    """The same images under a manifest that claims another mean: the score does not change."""
    result = json.loads(pathlib.Path(finished, "result.json").read_text())
    data_dir = pathlib.Path(tmp_path, "data")
    write_tiny_data(str(data_dir))
    manifest = json.loads((data_dir / "manifest.json").read_text())
    (data_dir / "manifest.json").write_text(json.dumps({**manifest, "pixel_mean": [9.0] * 3}))
    process = run_command("evaluate", f"--run_dir={finished}", f"--data_dir={data_dir}")
    assert json.loads(last_line(process.stdout))["loss"] == pytest.approx(result["loss"], rel=1e-5), process.stderr
    refused = run_command(
        "train", *TINY_FLAGS, f"--data_dir={data_dir}", f"--run_dir={finished}", "--eval_every_epochs=1"
    )
    assert refused.returncode == 66 and "data.pixels.mean" in error_lines(refused)[0]


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


def test_labels_are_learned(tiny_data, tmp_path):
    """The brightness of the tiny images is their label: the loss falls well below that of guessing, ln 10 = 2.3."""
    train(tiny_data, tmp_path / "run", "--phase=main:steps=60,lr=0.1,warmup_steps=3,augment=none")
    assert np.mean([loss for _, loss, _ in runs.losses(str(tmp_path / "run"))[-8:]]) < 1.8


def test_every_step_runs_with_the_rate_decay_and_momentum_that_plan_shows(tiny_data, tmp_path, monkeypatch, capsys):
    recipe = [
        "--phase=main:steps=5,lr=0.05,warmup_steps=3,wd=3e-4",
        "--phase=tail:epochs=1,lr=0.01,momentum=0.5,augment=light,image_size=24",
    ]
    seen, views = [], []
    original_batches = loop.training_batches

    class Spied(loop.TrainStep):
        def update(self, images, *arguments):
            found = super().update(images, *arguments)
            in_force = (self.optimizer.learning_rate, self.optimizer.decay, self.optimizer.momentum)
            seen.append([*map(float, in_force), images.shape[1]])
            return found

    def spy_on_batches(*arguments, **more):
        views.append(tuple(more[key] for key in ("augment", "image_size", "first_step", "last_step")))
        return original_batches(*arguments, **more)

    monkeypatch.setattr(loop, "TrainStep", Spied)
    monkeypatch.setattr(loop, "training_batches", spy_on_batches)
    train(tiny_data, tmp_path / "run", *recipe)
    plan.main([*TINY_FLAGS, *recipe, "--train_examples=50", "--format=csv"])
    planned = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    keys = ("lr", "weight_decay", "momentum", "image_size")
    np.testing.assert_allclose(seen, [[float(row[key]) for key in keys] for row in planned], rtol=1e-6)
    assert views == [("full", 16, 0, 5), ("light", 24, 5, 9)]
    rows = read_rows(str(tmp_path / "run" / "metrics.jsonl"))
    assert [(str(r["step"]), r["phase"], repr(r["lr"]), repr(r["epoch"])) for r in rows] == [
        (p["step"], p["phase"], p["lr"], p["epoch"]) for p in planned
    ]


SHORT = ["--phase=main:steps=3,lr_per_256=2,warmup_steps=2,warmup_lr=0.01", "--phase=tail:steps=1,lr=0.01"]


def weights_after(tiny_data, folder, *more):
    train(tiny_data, folder, *SHORT, *runs.SYNTHETIC, *more)
    return {name: array for name, array in runs.final_state(str(folder)).items() if name.startswith("weights/")}


@pytest.fixture(scope="module")
def short(tiny_data, tmp_path_factory):
    return weights_after(tiny_data, tmp_path_factory.mktemp("short") / "run")


@pytest.mark.parametrize(
    "more",
    [
        ["--optimizer=lars"],
        ["--momentum_correction"],
        ["--label_smoothing=0.3"],
        ["--lr_scaling=sqrt"],
    ],
)
def test_flags_of_the_recipe_reach_the_weights(tiny_data, short, tmp_path, more):
    assert runs.differing(weights_after(tiny_data, tmp_path / "run", *more), short)


def test_modes_record_what_they_are_for(tiny_data, tmp_path):
    more = [*SHORT, "--eval_every_epochs=1", "--experiment=lr_scaling"]
    found = train(tiny_data, tmp_path / "lr", *more, "--lr_scaling=sqrt", "--optimizer=lars")["lr_scaling"]
    peak = 2 * (12 / 256) ** 0.5
    assert found["peak_lr"] == pytest.approx(peak) and found["peak_lr_per_256"] == pytest.approx(peak * 256 / 12)
    assert (found["rule"], found["optimizer"], found["warmup_epochs"]) == ("sqrt", "lars", 2 * 12 / 50)
    more = ["--experiment=scaling", "--phase=main:steps=13,lr=0.05", "--phase=tail:steps=3,lr=0.01"]
    scaling = train(tiny_data, tmp_path / "scaling", *more)["scaling"]
    with np.load(tmp_path / "scaling" / "step_times.npz") as times:
        # Neither the first steps, nor the first one of a phase.
        assert times["steps"].tolist() == [10, 11, 12, 14, 15]
        assert times["seconds"].shape == (1, 5, 4) and (times["seconds"] >= 0).all()
        step_s = times["seconds"].sum(-1).mean()
    assert scaling["images_per_second"] == scaling["images_per_second_per_rank"] == pytest.approx(12 / step_s)
    assert (scaling["timed_steps"], scaling["split_s"]["peers"]) == (5, 0)
    assert sum(scaling["split_s"].values()) == pytest.approx(step_s)


def test_a_scaling_run_that_is_too_short_to_be_timed_is_refused(tiny_data, tmp_path):
    with pytest.raises(FlagError, match="the run has only 4"):
        train(tiny_data, tmp_path / "run", *SHORT, "--experiment=scaling")


def test_accumulated_batches_train_like_ghost_batches_of_their_size(tiny_data, short, tmp_path):
    """12 images as 3 x 4, or at once with statistics over 4: equal up to rounding, and different from 12 at once."""
    summed = weights_after(tiny_data, tmp_path / "summed", "--accumulate_steps=3")
    ghosts = weights_after(tiny_data, tmp_path / "ghosts", "--bn_stats_batch=4")
    for name, array in ghosts.items():
        np.testing.assert_allclose(summed[name], array, rtol=1e-3, atol=1e-4, err_msg=name)
    assert max(np.abs(ghosts[name] - array).max() for name, array in short.items()) > 0.01


def test_a_resumed_run_may_group_its_batch_differently_and_prints_it(tiny_data, tmp_path, capfd):
    run_dir = tmp_path / "run"
    train(tiny_data, run_dir, *SHORT, *runs.SYNTHETIC, "--max_steps=2")
    train(tiny_data, run_dir, *SHORT, *runs.SYNTHETIC, "--accumulate_steps=3")
    assert (
        "earlier steps used 1 ranks x 12 images x 1; this attempt uses 1 ranks x 4 images x 3" in capfd.readouterr().err
    )


def test_loss_that_is_not_finite_stops_and_keeps_the_good_checkpoint(tiny_data, tmp_path):
    run_dir = str(tmp_path / "run")
    with pytest.raises(NotFinite, match="step 1[0-5] .phase tail") as caught:
        train(tiny_data, run_dir, "--phase=tail:steps=6,lr=1e30,decay=constant")
    assert caught.value.exit_code == 77
    path, manifest = checkpoint.newest(run_dir)
    assert manifest["step"] == 10 and all(
        np.isfinite(array).all() for array in checkpoint.load(path, "weights").values()
    )
    assert not os.path.exists(os.path.join(run_dir, "result.json"))


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


def test_resume_choices(tiny_data, tmp_path):
    with pytest.raises(CheckpointError, match="--resume=must"):
        train(tiny_data, tmp_path / "new", "--resume=must")
    train(tiny_data, tmp_path / "run", *runs.SYNTHETIC, "--max_steps=2")
    with pytest.raises(RunFolderError, match="holds a run already"):
        train(tiny_data, tmp_path / "run", *runs.SYNTHETIC, "--resume=never")


@pytest.mark.parametrize(
    "flag, part",
    [
        ("--num_classes=12", "model.num_classes: 10 recorded, 12 now"),
        ("--width=0.125", "model.width: 0.0625 recorded, 0.125 now"),
        ("--model=resnet34", "model.model: resnet18 recorded, resnet34 now"),
        ("--global_batch_size=10", "global_batch_size: 12 recorded, 10 now"),
        ("--seed=7", "seed: default recorded, 7 now"),
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


def test_negative_control_without_the_padding_mask_evaluation_is_refused(tiny_data, tmp_path, monkeypatch):
    """21 examples in batches of 12: a weight of one on the padding counts 24."""
    original = order.evaluation_batch

    def unmasked(*arguments):
        ids, weights = original(*arguments)
        return ids, np.ones_like(weights)

    monkeypatch.setattr(order, "evaluation_batch", unmasked)
    with pytest.raises(UserError, match="counted 24 examples of 21"):
        train(tiny_data, tmp_path / "run", "--max_steps=1")


# --- what is done after a step, and in which order ------------------------------------------------------------------


EVERY_EPOCH = "--eval_every_epochs=1"  # after steps 5, 9, 13 and 16


class Killed(Exception):
    """Stands for a kill: nothing in the package handles it."""


def scores(run_dir):
    """Return (step, phase, top-1, loss) of every evaluation, and the scores of the result."""
    rows = read_rows(os.path.join(run_dir, "eval.jsonl"))
    result = read_json(os.path.join(run_dir, "result.json"))
    found = [(row["step"], row["end_of"], row["top1"], row["loss"]) for row in rows]
    return found, [result[key] for key in ("top1", "top5", "loss", "examples", "steps", "complete")]


def kill_in_step(monkeypatch, number, sleep=0.0):
    """Make the step with this number fail, after `sleep` seconds, until monkeypatch is undone."""
    original = loop.TrainStep.take
    done = iter(range(10**6))

    def take(self, *arguments):
        if next(done) == number:
            time.sleep(sleep)
            raise Killed
        return original(self, *arguments)

    monkeypatch.setattr(loop.TrainStep, "take", take)


def test_a_stop_saves_before_the_evaluation_that_is_due_and_the_next_attempt_evaluates(
    tiny_data, finished, tmp_path, monkeypatch
):
    """Evaluating first may take longer than the batch system's grace period, and then cost the steps since a save."""
    run_dir, steps = str(tmp_path / "run"), iter(range(9))
    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", lambda *arguments: pytest.fail("evaluated before the stop"))
        patch.setattr(loop.guard, "stop_requested", lambda: next(steps) == 4)
        with pytest.raises(StopRequested, match="stopped on request after step 5"):
            train(tiny_data, run_dir, EVERY_EPOCH)
    assert checkpoint.steps(run_dir) == [5] and not read_rows(f"{run_dir}/eval.jsonl")
    assert train(tiny_data, run_dir, EVERY_EPOCH)["complete"]
    assert scores(run_dir) == scores(finished)
    assert runs.losses(run_dir) == runs.losses(finished)


def test_a_run_killed_in_its_last_evaluation_has_its_checkpoint_and_is_finished_without_a_step(
    tiny_data, finished, tmp_path, monkeypatch
):
    run_dir, evaluate_once = str(tmp_path / "run"), loop.evaluate
    monkeypatch.setattr(loop, "check_label_base", lambda *arguments: labels.append("checked"))
    labels = []

    def evaluate(job, state, *more):
        if state.step == 16 and job.attempt == 1:
            raise Killed
        evaluate_once(job, state, *more)

    monkeypatch.setattr(loop, "evaluate", evaluate)
    with pytest.raises(Killed):
        train(tiny_data, run_dir, EVERY_EPOCH)
    assert checkpoint.steps(run_dir) == [10, 16] and labels == ["checked"]
    kill_in_step(monkeypatch, 0)
    result = train(tiny_data, run_dir, EVERY_EPOCH)
    assert scores(run_dir) == scores(finished)
    assert result["images_per_second"] > 0  # from the rows of the first attempt
    assert labels == ["checked"]  # random reads of a resumed run would let all ranks wait


def test_time_counts_what_a_killed_attempt_did_after_its_last_checkpoint(tiny_data, tmp_path, monkeypatch):
    run_dir = str(tmp_path / "run")
    monkeypatch.setattr(reports, "TOP1_MARKS", (0.0,))  # reached by the first evaluation, after step 5
    spent = 0.0
    for attempt in (1, 2):  # killed with no checkpoint at all, then two steps after one
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_in_step(patch, 7, sleep=0.5)
            started = time.monotonic()
            train(tiny_data, run_dir, EVERY_EPOCH, *(["--checkpoint_every_steps=5"] if attempt == 2 else []))
        spent += time.monotonic() - started - 0.5  # the step that never ended is not counted
        first = read_json(f"{run_dir}/clock.json")["seconds_to_top1"]["0.0"]
        marks = locals().get("marks", first)
        assert first == marks  # neither lost nor improved by the kill
    started = time.monotonic()
    result = train(tiny_data, run_dir, EVERY_EPOCH)
    assert result["wall_seconds"] == pytest.approx(spent + time.monotonic() - started, abs=0.4)
    assert result["seconds_to_top1"] == {"0.0": marks}
    walls = [row["wall_seconds"] for row in read_rows(f"{run_dir}/eval.jsonl")]
    assert walls == sorted(walls) and walls[-1] < result["wall_seconds"]


def test_a_run_without_a_clock_continues_from_the_checkpoints_time(tiny_data, tmp_path):
    run_dir = str(tmp_path / "run")
    train(tiny_data, run_dir, *runs.SYNTHETIC, *SHORT, "--max_steps=2")
    os.remove(f"{run_dir}/clock.json")
    path, manifest = checkpoint.newest(run_dir)
    info = {key: value for key, value in manifest.items() if key not in ("files", "attempt")}
    groups = {group: checkpoint.load(path, group) for group in ("weights", "optimizer")}
    checkpoint.save(path, groups, {**info, "wall_seconds": 1000.0, "seconds_to_top1": {"0.5": 900.0}})
    result = train(tiny_data, run_dir, *runs.SYNTHETIC, *SHORT)
    assert 1000 < result["wall_seconds"] < 1100 and result["seconds_to_top1"] == {"0.5": 900.0}


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
    kill_in_step(monkeypatch, 0)
    assert train(tiny_data, run_dir, EVERY_EPOCH) == json.loads(complete)
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
        return opening.open_job(settings, Twin(2, 0), threads)

    with pytest.raises(FlagError, match=r"rank 0 on .*: 2; rank 1 on elsewhere: 3. .*--threads=2") as caught:
        open_job("--optimizer=lars")
    assert caught.value.collective and not (tmp_path / "run").exists()
    open_job("--optimizer=sgd").folder.close()  # negative control


# --- as commands: exit codes and what a user sees ------------------------------------------------------------------


def command(tiny_data, run_dir, *more):
    return [*TINY_FLAGS, f"--data_dir={tiny_data}", f"--run_dir={run_dir}", *more]


@pytest.mark.parametrize(
    "flags, code, part",
    [
        (["--learning_rate=1"], 64, "--learning_rate=1: unknown flag"),
        (["left over"], 64, "'left over' is not a flag"),
        (["--batch_size=5"], 64, "contradicts --global_batch_size=12"),
        (["--ranks=2"], 64, "--ranks=2: the launcher started 1"),
        (["--data_dir=/no/such"], 65, "/no/such"),
        (["--resume=must"], 66, "no checkpoint"),
        (["--checkpoint=x"], 64, "belongs to python -m resnet_cpu.evaluate"),
        (["--run_dir=/proc/no/run"], 73, "--run_dir=/proc/no/run"),
    ],
)
def test_exit_codes(tiny_data, tmp_path, run_command, flags, code, part):
    process = run_command("train", *command(tiny_data, tmp_path / "run", *flags))
    assert process.returncode == code, process.stderr
    assert len(error_lines(process)) == 1 and part in error_lines(process)[0]
    assert "Traceback" not in process.stderr and process.stdout == ""


def test_a_folder_in_use_is_73(tiny_data, tmp_path, run_command):
    holder = RunFolder(str(tmp_path / "run"))
    process = run_command("train", *command(tiny_data, tmp_path / "run"))
    holder.close()
    assert process.returncode == 73 and f"pid {os.getpid()}" in error_lines(process)[0]


def test_a_damaged_shard_is_65_and_names_the_record(tmp_path, run_command):
    folder = str(tmp_path / "data")
    write_tiny_data(folder)
    shard = sorted(pathlib.Path(folder).glob("train-*-of-?????"))[1]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 4
    shard.write_bytes(content)
    process = run_command("train", *command(folder, tmp_path / "run"))
    assert process.returncode == 65, process.stderr
    assert (
        len(error_lines(process)) == 1
        and f"{shard}: record " in error_lines(process)[0]
        and "Traceback" not in process.stderr
    )
    assert run_command("prepare", "verify", f"--data_dir={folder}").returncode == 65


@pytest.mark.parametrize("signum", [signal.SIGUSR1, signal.SIGINT])
def test_a_signal_stops_cleanly_with_75_and_the_rest_is_bit_identical(tiny_data, tmp_path, signum, run_command):
    """Stopped at an arbitrary step; then the same command continues for 20 steps. On two threads."""
    run_dir, whole = tmp_path / "run", tmp_path / "whole"
    long = ["--phase=main:steps=400,lr=0.05,warmup_steps=3", "--threads=2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "resnet_cpu.train", *command(tiny_data, run_dir, *long)],
        cwd=ROOT,
        env=OUTSIDE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.exists() and metrics.read_text().count("\n") > 5) and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signum)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 75 and out == "", err
    steps = checkpoint.steps(str(run_dir))
    assert len(steps) == 1 and f"stopped on request after step {steps[0]}" in err
    assert read_rows(str(metrics))[-1]["step"] == steps[0] - 1
    if signum == signal.SIGUSR1:
        long.append(f"--max_steps={steps[0] + 20}")
        for folder in (run_dir, whole):
            assert run_command("train", *command(tiny_data, folder, *long)).returncode == 0
        assert not runs.differing(runs.final_state(str(run_dir)), runs.final_state(str(whole)))
        assert runs.losses(str(run_dir)) == runs.losses(str(whole))
