"""Check the folder of a finished run, and the commands train and evaluate as users call them."""

import hashlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import whole_runs as runs
from conftest import OUTSIDE, ROOT, TINY_FLAGS, error_lines, last_line, write_tiny_data

from resnet_cpu import evaluate
from resnet_cpu.cluster import control
from resnet_cpu.run import checkpoint
from resnet_cpu.run.folder import RunFolder, read_rows

pytestmark = pytest.mark.training

ALONE = control.World(1, 0)
SHORT = ["--phase=main:steps=3,lr_per_256=2,warmup_steps=2,warmup_lr=0.01", "--phase=tail:steps=1,lr=0.01"]


def train(tiny_data, run_dir, *more):
    return runs.train(ALONE, tiny_data, str(run_dir), *more)


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
    assert refused.returncode == 66 and "model.num_classes: 10 recorded, 12 now" in error_lines(refused)[0]
    assert run_command("evaluate", f"--run_dir={tmp_path}").returncode == 66


@pytest.mark.skipif(runs.PRECISION != "bfloat16", reason="bfloat16 is refused on this processor: no AVX-512")
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


def test_modes_record_what_they_are_for(tiny_data, tmp_path):
    more = [*SHORT, "--eval_every_epochs=1", "--experiment=lr_scaling"]
    found = train(tiny_data, tmp_path / "lr", *more, "--lr_scaling=sqrt", "--optimizer=lars")["lr_scaling"]
    peak = 2 * (12 / 256) ** 0.5
    assert found["peak_lr"] == pytest.approx(peak) and found["peak_lr_per_256"] == pytest.approx(peak * 256 / 12)
    assert (found["rule"], found["optimizer"], found["warmup_epochs"]) == ("sqrt", "lars", 2 * 12 / 50)
    more = ["--experiment=scaling", "--phase=main:steps=13,lr=0.05", "--phase=tail:steps=3,lr=0.01"]
    scaling = train(tiny_data, tmp_path / "scaling", *more)["scaling"]
    written = json.loads((tmp_path / "scaling" / "scaling.json").read_text())
    assert "--experiment=scaling" in written["flags"] and written["cores"] >= 1 and "flags" not in scaling
    with np.load(tmp_path / "scaling" / "step_times.npz") as times:
        # Neither the first steps, nor the first one of a phase.
        assert times["steps"].tolist() == [10, 11, 12, 14, 15]
        assert times["seconds"].shape == (1, 5, 4) and (times["seconds"] >= 0).all()
        step_s = times["seconds"].sum(-1).mean()
    assert scaling["images_per_second"] == scaling["images_per_second_per_rank"] == pytest.approx(12 / step_s)
    assert (scaling["timed_steps"], scaling["split_s"]["peers"]) == (5, 0)
    assert sum(scaling["split_s"].values()) == pytest.approx(step_s)


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


def test_a_network_of_few_channels_repeats_its_losses_on_any_processor(run_command, tmp_path):
    """Without AVX-512, oneDNN's kernels corrupted memory: runs hung, crashed or gave other losses each time."""
    flags = ["--dataset=synthetic", "--train_examples=32", "--num_classes=10", "--image_size=16", "--model=resnet18"]
    flags += ["--width=0.05", "--stem=small", "--batch_size=8", "--phase=main:steps=20,lr=0.01", "--log_every_steps=1"]
    losses = []
    for name in "ab":
        process = run_command("train", *flags, f"--run_dir={tmp_path / name}", timeout=120)
        assert process.returncode == 0, process.stderr
        losses.append([row["loss"] for row in map(json.loads, (tmp_path / name / "metrics.jsonl").open())])
    assert len(losses[0]) == 20 and losses[0] == losses[1]
