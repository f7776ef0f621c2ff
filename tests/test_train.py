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

import numpy as np
import pytest
import whole_runs as runs
from conftest import OUTSIDE, ROOT, TINY_FLAGS, last_line, told, write_tiny_data

from resnet_cpu import evaluate, plan
from resnet_cpu.cluster import control
from resnet_cpu.data import order
from resnet_cpu.errors import CheckpointError, DataError, FlagError, NotFinite, RunFolderError, UserError
from resnet_cpu.run import checkpoint
from resnet_cpu.run.folder import RunFolder, read_rows
from resnet_cpu.training import batches, loop

ALONE = control.World(1, 0)


def train(tiny_data, run_dir, *more):
    return runs.train(ALONE, tiny_data, str(run_dir), *more)


@pytest.fixture(scope="module")
def finished(tiny_data, tmp_path_factory):
    """The folder of a finished run, not to be changed."""
    folder = str(tmp_path_factory.mktemp("finished") / "run")
    runs.train(ALONE, tiny_data, folder, "--eval_every_epochs=1", draw=True)
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


def test_a_finished_run_does_nothing_and_says_its_result(tiny_data, finished, run_command):
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
    assert refused.returncode == 66 and "num_classes 10 there, 12 here" in told(refused)[0]
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
    assert refused.returncode == 66 and "data.pixels.mean" in told(refused)[0]


def test_flags_of_a_run_that_never_did_a_step_bind_nobody(tiny_data, tmp_path, monkeypatch):
    def fail(self):
        raise CheckpointError("before the first step")

    with monkeypatch.context() as patch:
        patch.setattr(loop._Training, "run", fail)
        with pytest.raises(CheckpointError, match="before the first step"):
            train(tiny_data, tmp_path / "run", *runs.SYNTHETIC)
    assert train(tiny_data, tmp_path / "run", *runs.SYNTHETIC, "--seed=7")["complete"]
    with pytest.raises(CheckpointError, match="seed 7 there, 8 here"):
        train(tiny_data, tmp_path / "run", *runs.SYNTHETIC, "--seed=8")


def test_labels_are_learned(tiny_data, tmp_path):
    """The tiny images' brightness is their label: the loss falls well under that of guessing, ln 10 = 2.3."""
    train(tiny_data, tmp_path / "run", "--phase=main:steps=60,lr=0.1,warmup_steps=3,augment=none")
    assert np.mean([loss for _, loss, _ in runs.losses(str(tmp_path / "run"))[-8:]]) < 1.8


def test_every_step_runs_with_the_rate_decay_and_momentum_that_plan_shows(tiny_data, tmp_path, monkeypatch, capsys):
    recipe = [
        "--phase=main:steps=5,lr=0.05,warmup_steps=3,wd=3e-4",
        "--phase=tail:epochs=1,lr=0.01,momentum=0.5,augment=light,image_size=24",
    ]
    seen, views = [], []
    original_batches = batches.pipeline.training_batches

    class Spied(loop.TrainStep):
        def __call__(self, images, labels, rate, stop):
            report = super().__call__(images, labels, rate, stop)
            knobs = self._knobs
            in_force = [float(knob) for knob in (knobs.learning_rate, knobs.weight_decay, knobs.momentum)]
            seen.append([*in_force, images.shape[1]])
            return report

    def spy_on_batches(data, view, augment, share, **rest):
        views.append((augment, view.image_size, share.first_step, share.last_step))
        return original_batches(data, view, augment, share, **rest)

    monkeypatch.setattr(loop, "TrainStep", Spied)
    monkeypatch.setattr(batches.pipeline, "training_batches", spy_on_batches)
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
    more = ["--experiment=scaling", "--untimed_steps=1", "--phase=tail:steps=3,lr=0.01", "--eval_every_epochs=0"]
    scaling = train(tiny_data, tmp_path / "scaling", *SHORT, *more)["scaling"]
    with np.load(tmp_path / "scaling" / "step_times.npz") as times:
        assert times["steps"].tolist() == [1, 2, 4, 5]  # neither the first of a phase, which traces, nor untimed ones
        assert times["seconds"].shape == (1, 4, 4) and (times["seconds"] >= 0).all()
        step_s = times["seconds"].sum(-1).mean()
    assert scaling["images_per_second"] == scaling["images_per_second_per_rank"] == pytest.approx(12 / step_s)
    assert (scaling["timed_steps"], scaling["split_s"]["peers"]) == (4, 0)
    assert sum(scaling["split_s"].values()) == pytest.approx(step_s)


def test_a_scaling_run_that_is_too_short_to_be_timed_is_refused(tiny_data, tmp_path):
    with pytest.raises(FlagError, match="only 4 in all"):
        train(tiny_data, tmp_path / "run", *SHORT, "--experiment=scaling", "--untimed_steps=3")


def test_accumulated_batches_train_like_ghost_batches_of_their_size(tiny_data, short, tmp_path):
    """12 images as 3 x 4, or at once with statistics of 4: the same up to rounding, and not what 12 at once give."""
    summed = weights_after(tiny_data, tmp_path / "summed", "--accumulate_steps=3")
    ghosts = weights_after(tiny_data, tmp_path / "ghosts", "--bn_stats_batch=4")
    for name, array in ghosts.items():
        np.testing.assert_allclose(summed[name], array, rtol=1e-3, atol=1e-4, err_msg=name)
    assert max(np.abs(ghosts[name] - array).max() for name, array in short.items()) > 0.01


def test_a_resumed_run_may_cut_its_batch_up_otherwise_and_says_so(tiny_data, tmp_path, capfd):
    run_dir = tmp_path / "run"
    train(tiny_data, run_dir, *SHORT, *runs.SYNTHETIC, "--max_steps=2")
    train(tiny_data, run_dir, *SHORT, *runs.SYNTHETIC, "--accumulate_steps=3")
    assert "ran on 1 ranks x 12 images x 1, these on 1 ranks x 4 images x 3" in capfd.readouterr().err


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
        ("--num_classes=12", "model.num_classes 10 there, 12 here"),
        ("--width=0.125", "model.width 0.0625 there, 0.125 here"),
        ("--model=resnet34", "model.model resnet18 there, resnet34 here"),
        ("--global_batch_size=10", "global_batch_size 12 there, 10 here"),
        ("--seed=7", "seed 0 there, 7 here"),
        ("--phase=more:steps=1,lr=1", "phases.more only here"),
        ("--phase=main:steps=12,lr=0.05,warmup_steps=3", "phases.main.steps 10 there, 12 here"),
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
        (["--experiment=collapsed_ensemble"], FlagError, "needs two members at least, the recipe has 0"),
        (["--experiment=lr_scaling"], FlagError, "eval_every_epochs"),
        (["--bn_stats_batch=5"], FlagError, "does not divide the 12 images"),
        (["--accumulate_steps=5"], FlagError, "not divisible by 1 ranks x 5 accumulated batches"),
        (["--global_batch_size=51"], DataError, "50 training examples are fewer than one global batch of 51"),
        (["--train_examples=51"], DataError, "holds 50"),
        (["--num_classes=9"], DataError, "10 classes"),
        (["--dataset=fashion_mnist"], DataError, "holds digits"),
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


def test_early_errors_come_without_loading_tensorflow(tiny_data, tmp_path):
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


# --- as commands: exit codes and what a user sees ------------------------------------------------------------------


def command(tiny_data, run_dir, *more):
    return [*TINY_FLAGS, f"--data_dir={tiny_data}", f"--run_dir={run_dir}", *more]


@pytest.mark.parametrize(
    "flags, code, part",
    [
        (["--learning_rate=1"], 64, "--learning_rate=1: unknown flag"),
        (["left over"], 64, "'left over' is no flag"),
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
    assert len(told(process)) == 1 and part in told(process)[0]
    assert "Traceback" not in process.stderr and process.stdout == ""


def test_a_folder_in_use_is_73(tiny_data, tmp_path, run_command):
    holder = RunFolder(str(tmp_path / "run"))
    process = run_command("train", *command(tiny_data, tmp_path / "run"))
    holder.close()
    assert process.returncode == 73 and f"pid {os.getpid()}" in told(process)[0]


def test_a_damaged_shard_is_65_and_names_the_record(tmp_path, run_command):
    folder = str(tmp_path / "data")
    write_tiny_data(folder)
    shard = sorted(pathlib.Path(folder).glob("train-*-of-?????"))[1]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 4
    shard.write_bytes(content)
    process = run_command("train", *command(folder, tmp_path / "run"))
    assert process.returncode == 65, process.stderr
    assert len(told(process)) == 1 and f"{shard}: record " in told(process)[0] and "Traceback" not in process.stderr
    assert run_command("prepare", "verify", f"--data_dir={folder}").returncode == 65


@pytest.mark.parametrize("signum", [signal.SIGUSR1, signal.SIGINT])
def test_a_signal_stops_cleanly_with_75_and_the_rest_is_bit_identical(tiny_data, tmp_path, signum, run_command):
    """Stopped at whatever step it has come to; then the same command goes on, for 20 steps. On two threads."""
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
