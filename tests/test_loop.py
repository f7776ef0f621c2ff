"""Train whole runs on one rank: every step, every bit, and the cost of a stop or a kill."""

import csv
import io
import json
import os
import threading
import time

import numpy as np
import pytest
import whole_runs as runs
from conftest import TINY_FLAGS

from resnet_cpu import plan
from resnet_cpu.cluster import control
from resnet_cpu.data import order
from resnet_cpu.errors import (
    FlagError,
    NotFinite,
    OutputError,
    StopRequested,
    UserError,
)
from resnet_cpu.model.kernels import library
from resnet_cpu.run import checkpoint
from resnet_cpu.run.folder import read_json, read_rows
from resnet_cpu.training import loop
from resnet_cpu.training import report as reports

pytestmark = pytest.mark.training

ALONE = control.World(1, 0)


def train(tiny_data, run_dir, *more):
    return runs.train(ALONE, tiny_data, str(run_dir), *more)


def test_resume_is_bit_identical(tiny_data, finished, tmp_path):
    runs.check_resume(ALONE, tiny_data, str(tmp_path), whole=finished)


def test_negative_control_another_seed_is_another_run(tiny_data, finished, tmp_path):
    train(tiny_data, tmp_path / "other", "--seed=1")
    assert runs.differing(runs.final_state(str(tmp_path / "other")), runs.final_state(finished))


def test_evaluation_logging_and_checkpoints_do_not_change_training(tiny_data, finished, tmp_path):
    other = str(tmp_path / "run")
    train(tiny_data, other, "--log_every_steps=7", "--checkpoint_every_steps=3", "--eval_batch_size=5")
    assert not runs.differing(runs.final_state(other), runs.final_state(finished))


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


def weights_after(tiny_data, folder, *more):
    train(tiny_data, folder, *runs.SHORT, *runs.SYNTHETIC, *more)
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


def test_accumulated_batches_train_like_ghost_batches_of_their_size(tiny_data, short, tmp_path):
    """12 images as 3 x 4, or at once with statistics over 4: equal up to rounding, and different from 12 at once."""
    summed = weights_after(tiny_data, tmp_path / "summed", "--accumulate_steps=3")
    ghosts = weights_after(tiny_data, tmp_path / "ghosts", "--bn_stats_batch=4")
    for name, array in ghosts.items():
        np.testing.assert_allclose(summed[name], array, rtol=1e-3, atol=1e-4, err_msg=name)
    assert max(np.abs(ghosts[name] - array).max() for name, array in short.items()) > 0.01


def test_a_resumed_run_may_group_its_batch_differently_and_prints_it(tiny_data, tmp_path, capfd):
    run_dir = tmp_path / "run"
    short = [*runs.SHORT, *runs.SYNTHETIC]
    train(tiny_data, run_dir, *short, "--max_steps=1")
    train(tiny_data, run_dir, *short, "--accumulate_steps=3")
    changed = "earlier steps used 1 ranks x 12 images x 1; this attempt uses 1 ranks x 4 images x 3: "
    printed = capfd.readouterr().err
    assert changed in printed and "statistics over 4 images, which trains differently" in printed
    train(tiny_data, tmp_path / "ghosts", *short, "--bn_stats_batch=4", "--max_steps=1")
    train(tiny_data, tmp_path / "ghosts", *short, "--bn_stats_batch=4", "--accumulate_steps=3")
    printed = capfd.readouterr().err
    assert changed in printed and "results will differ in the last bits" in printed


@pytest.mark.parametrize("first, second", [("yes", "no"), ("no", "yes")])
def test_a_run_may_continue_with_other_kernels_and_prints_it(first, second, tiny_data, tmp_path, capfd):
    """Losses stay close to those of a run that does not change, and are not the same."""
    if not library.load().ops:
        pytest.skip("the fused kernels are not built")
    run_dir, constant = str(tmp_path / "run"), str(tmp_path / "constant")
    train(tiny_data, run_dir, f"--fused_kernels={first}", "--max_steps=8")
    train(tiny_data, run_dir, f"--fused_kernels={second}")
    assert "kernels changed since that checkpoint: " in capfd.readouterr().err
    train(tiny_data, constant, f"--fused_kernels={first}")
    mine, whole = ([loss for _, loss, _ in runs.losses(folder)] for folder in (run_dir, constant))
    assert mine[:8] == whole[:8] and mine[8:] != whole[8:]
    assert mine == pytest.approx(whole, rel=0.03)


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


def test_negative_control_without_the_padding_mask_evaluation_is_refused(tiny_data, tmp_path, monkeypatch):
    """21 examples in batches of 12: a weight of one on the padding counts 24."""
    original = order.evaluation_batch

    def unmasked(*arguments):
        ids, weights = original(*arguments)
        return ids, np.ones_like(weights)

    monkeypatch.setattr(order, "evaluation_batch", unmasked)
    with pytest.raises(UserError, match="counted 24 examples of 21"):
        train(tiny_data, tmp_path / "run", "--max_steps=1")


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
            train(tiny_data, run_dir, runs.EVERY_EPOCH)
    assert checkpoint.steps(run_dir) == [5] and not read_rows(f"{run_dir}/eval.jsonl")
    assert train(tiny_data, run_dir, runs.EVERY_EPOCH)["complete"]
    assert scores(run_dir) == scores(finished)
    assert runs.losses(run_dir) == runs.losses(finished)


def spy_on_steps(monkeypatch, see):
    """Call `see` with the number of each step of an attempt (from 0) before it is taken."""
    original, numbers = loop.TrainStep.take, iter(range(10**6))

    def take(self, *arguments):
        see(next(numbers))
        return original(self, *arguments)

    monkeypatch.setattr(loop.TrainStep, "take", take)


def test_training_continues_while_a_checkpoint_is_written(tiny_data, finished, tmp_path, monkeypatch):
    """The first save does not end before three more steps are done; it holds the state of its own step, bit by bit."""
    train(tiny_data, tmp_path / "part", "--max_steps=4")
    run_dir, original, copied = str(tmp_path / "run"), checkpoint.save, loop.State.arrays
    later, writing = threading.Event(), []

    def save(path, *more):
        writing.append(path)
        assert later.wait(120)
        original(path, *more)
        writing.remove(path)

    def arrays(self):
        assert not writing  # memory for one copy is enough
        return copied(self)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save)
        patch.setattr(loop.State, "arrays", arrays)
        spy_on_steps(patch, lambda number: later.set() if number == 7 else None)
        train(tiny_data, run_dir, "--checkpoint_every_steps=4", "--keep_checkpoints=9")
    assert checkpoint.steps(run_dir) == [4, 8, 10, 12, 16]
    assert not runs.differing(runs.state_after(run_dir, 4), runs.final_state(str(tmp_path / "part")))
    assert not runs.differing(runs.final_state(run_dir), runs.final_state(finished))


def test_a_failed_save_ends_the_run_after_the_next_step(tiny_data, tmp_path, monkeypatch):
    """A full disk is not noticed only at the end of a phase."""
    run_dir, threads, later = str(tmp_path / "run"), [], threading.Event()

    def save(*arguments):
        threads.append(threading.current_thread())
        assert later.wait(120)
        raise OutputError("not saved (No space left on device)")

    def see(number):
        if number == 4:  # the first step after the save, which fails during this step
            later.set()
            while not threads:
                time.sleep(0.01)
            threads[0].join()

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save)
        spy_on_steps(patch, see)
        with pytest.raises(OutputError, match="No space left on device"):
            train(tiny_data, run_dir, "--checkpoint_every_steps=4")
    assert len(runs.losses(run_dir)) == 6 and not checkpoint.steps(run_dir)
    assert train(tiny_data, run_dir)["complete"]


def test_a_stop_is_announced_only_once_its_checkpoint_is_published(tiny_data, tmp_path, monkeypatch):
    run_dir, original, found = str(tmp_path / "run"), checkpoint.save, []

    class Spied(StopRequested):
        def __init__(self, *arguments, **more):
            found.append(checkpoint.steps(run_dir))
            super().__init__(*arguments, **more)

    def save(*arguments):
        time.sleep(0.5)
        original(*arguments)

    monkeypatch.setattr(checkpoint, "save", save)
    monkeypatch.setattr(loop, "StopRequested", Spied)
    monkeypatch.setattr(loop.guard, "stop_requested", lambda: True)
    with pytest.raises(StopRequested, match="after step 1, checkpoint written"):
        train(tiny_data, run_dir)
    assert found == [[1]]


def test_the_first_step_has_its_grace_also_after_an_evaluation_that_is_made_up_for(tiny_data, tmp_path, monkeypatch):
    """Found by a campaign on a busy machine: tracing the step after such an evaluation counted as a stall."""
    run_dir, happened = str(tmp_path / "run"), []

    def spy(owner, name):
        original = getattr(owner, name)

        def call(*arguments, **more):
            happened.append(name)
            return original(*arguments, **more)

        monkeypatch.setattr(owner, name, call)

    train(tiny_data, run_dir, "--max_steps=5")
    os.remove(f"{run_dir}/eval.jsonl")
    for owner, name in [(loop, "evaluate"), (loop.guard.Watchdog, "expect_first_step"), (loop.TrainStep, "take")]:
        spy(owner, name)
    train(tiny_data, run_dir, runs.EVERY_EPOCH, "--max_steps=6")
    assert happened[:4] == ["expect_first_step", "evaluate", "expect_first_step", "take"]


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
        train(tiny_data, run_dir, runs.EVERY_EPOCH)
    assert checkpoint.steps(run_dir) == [10, 16] and labels == ["checked"]
    kill_in_step(monkeypatch, 0)
    result = train(tiny_data, run_dir, runs.EVERY_EPOCH)
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
            train(tiny_data, run_dir, runs.EVERY_EPOCH, *(["--checkpoint_every_steps=5"] if attempt == 2 else []))
        spent += time.monotonic() - started - 0.5  # the step that never ended is not counted
        first = read_json(f"{run_dir}/clock.json")["seconds_to_top1"]["0.0"]
        marks = locals().get("marks", first)
        assert first == marks  # neither lost nor improved by the kill
    started = time.monotonic()
    result = train(tiny_data, run_dir, runs.EVERY_EPOCH)
    # The clock starts after the start of an attempt, later on a busy machine; a lost attempt would be about a third.
    outside = spent + time.monotonic() - started
    assert 0.85 * outside < result["wall_seconds"] <= outside
    assert result["seconds_to_top1"] == {"0.0": marks}
    walls = [row["wall_seconds"] for row in read_rows(f"{run_dir}/eval.jsonl")]
    assert walls == sorted(walls) and walls[-1] < result["wall_seconds"]


def test_time_of_an_attempt_that_recorded_no_step_counts_unless_it_trained_something_else(
    tiny_data, tmp_path, monkeypatch
):
    """Steps may take minutes, and rows are written every twenty of them."""
    flags = [*runs.SYNTHETIC, *runs.SHORT, "--log_every_steps=100"]
    for name, more, least in (("same", [], 1000), ("other", ["--seed=7"], 0)):
        run_dir = str(tmp_path / name)
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_in_step(patch, 1)
            train(tiny_data, run_dir, *flags)
        assert not os.path.exists(f"{run_dir}/metrics.jsonl")
        clock = read_json(f"{run_dir}/clock.json")
        with open(f"{run_dir}/clock.json", "w") as file:
            json.dump({**clock, "wall_seconds": 1000.0}, file)
        if more:  # an attempt that ends before its first step has no time yet, but must not keep that of another run
            with monkeypatch.context() as patch, pytest.raises(FlagError):
                patch.setattr(library, "load", lambda: library.Kernels(None, "", "a reason"))
                train(tiny_data, run_dir, *flags, *more, "--fused_kernels=yes")
        assert least < train(tiny_data, run_dir, *flags, *more)["wall_seconds"] < least + 100


def test_a_run_without_a_clock_continues_from_the_checkpoints_time(tiny_data, tmp_path):
    run_dir = str(tmp_path / "run")
    train(tiny_data, run_dir, *runs.SYNTHETIC, *runs.SHORT, "--max_steps=2")
    os.remove(f"{run_dir}/clock.json")
    path, manifest = checkpoint.newest(run_dir)
    info = {key: value for key, value in manifest.items() if key not in ("files", "attempt")}
    groups = {group: checkpoint.load(path, group) for group in ("weights", "optimizer")}
    checkpoint.save(path, groups, {**info, "wall_seconds": 1000.0, "seconds_to_top1": {"0.5": 900.0}})
    result = train(tiny_data, run_dir, *runs.SYNTHETIC, *runs.SHORT)
    assert 1000 < result["wall_seconds"] < 1100 and result["seconds_to_top1"] == {"0.5": 900.0}
