"""experiments/reproduce.sh: which runs it starts, with a stand-in for Python that records its arguments."""

import functools
import os
import shutil
import subprocess

import pytest
from conftest import OUTSIDE, ROOT

STAND_IN = """#!/usr/bin/env bash
echo "$*" >>"$CALLS"
taskset -cp $$ >>"$CALLS.cores"
if [[ $* == *evaluate*seed-1* ]]; then exit 74; fi
export=$(sed -n 's/.*--export=//p' <<<"$*")
if [[ -n $export && -e $export ]]; then exit 64; fi
if [[ -n $export ]]; then touch "$export"; fi
if [[ $* == *train*lars-5/* ]]; then exit 75; fi
if [[ $* == *train*linear-0.8/* ]]; then exit 77; fi
"""


@pytest.fixture
def reproduce(tmp_path):
    """Call the script with flags of the shell; return (what it printed, the calls of Python)."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "python").write_text(STAND_IN)
    (folder / "python").chmod(0o755)
    calls = tmp_path / "calls"

    def call(script=ROOT / "experiments" / "reproduce.sh", **variables):
        calls.write_text("")
        path = f"{folder}:{OUTSIDE['PATH']}"
        environment = {**OUTSIDE, "PATH": path, "CALLS": str(calls), "RUNS": str(tmp_path / "runs"), **variables}
        done = subprocess.run([script], env=environment, capture_output=True, text=True, check=False)
        call.status = done.returncode
        return done.stdout + done.stderr, calls.read_text().splitlines()

    call.runs = tmp_path / "runs"
    return call


def finish(run):
    os.makedirs(run, exist_ok=True)
    (run / "result.json").write_text('{"complete": true}')


def test_averaged_weights_of_finished_ensembles_of_the_border_experiment(reproduce):
    for seed in (0, 1):
        finish(reproduce.runs / "border" / "wide-10000" / "late_36" / f"seed-{seed}")
    printed, calls = reproduce(ONLY="border/wide-10000/average")
    exports, (training,) = [call for call in calls if "evaluate" in call], [call for call in calls if "train " in call]
    assert len(exports) == 2 and f"--run_dir={reproduce.runs}/border/wide-10000/late_36/seed-0" in exports[0]
    base = "experiments/collapsed_ensemble/border/base.flags"
    assert f"--flagfile={base} --train_examples=10000 --seed=0 --width=0.25" in training
    mean = reproduce.runs / "border" / "wide-10000" / "average_late_36" / "seed-0.npz"
    assert f"--init_from={mean} --phase=statistics:" in training
    assert "ended with an error" in printed and "seed-1.npz" in printed  # reported, and the others continued
    assert reproduce.status == 1


def test_ladders_that_max_steps_has_ended_are_not_run_again(reproduce):
    rung = reproduce.runs / "scaling" / "weak" / "rep-0" / "ranks-1"
    only = "scaling/weak/rep-0/ranks-1$"
    rung.mkdir(parents=True)
    (rung / "result.json").write_text('{"complete": false}')
    assert any("small_weak.flags" in call for call in reproduce(ONLY=only)[1])
    (rung / "scaling.json").write_text("{}")
    assert not any("small_weak.flags" in call for call in reproduce(ONLY=only)[1])


def test_the_folder_of_the_runs_may_have_a_blank_in_its_name(reproduce, tmp_path):
    runs = tmp_path / "my runs"
    finish(runs / "border" / "wide-10000" / "late_36" / "seed-0")
    _, calls = reproduce(ONLY="border/wide-10000/average", RUNS=str(runs))
    assert f"--init_from={runs}/border/wide-10000/average_late_36/seed-0.npz --phase=" in calls[1]
    assert (runs / "border" / "wide-10000" / "average_late_36" / "seed-0" / "out").exists()


@pytest.mark.skipif(max(os.sched_getaffinity(0)) == 0, reason="has one core, the first of the machine")
@pytest.mark.parametrize("with_lscpu", [True, False])
def test_runs_are_bound_to_cores_that_the_script_may_use(with_data, tmp_path, with_lscpu):
    mine = os.sched_getaffinity(0)
    if not with_lscpu:
        (tmp_path / "bin" / "lscpu").write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / "bin" / "lscpu").chmod(0o755)
    try:
        os.sched_setaffinity(0, {max(mine)})
        with_data(ONLY="search_cifar/lars")
    finally:
        os.sched_setaffinity(0, mine)
    used = (tmp_path / "calls.cores").read_text().splitlines()
    assert len(used) == 3 and all(line.endswith(f": {max(mine)}") for line in used)


def test_only_and_missing_also_choose_the_averages(reproduce):
    finish(reproduce.runs / "border" / "wide-10000" / "late_36" / "seed-0")
    assert reproduce(ONLY="border/tiny-10000/average")[1] == []
    finish(reproduce.runs / "ensemble" / "cycles" / "seed-0")
    assert reproduce(ONLY="ensemble/average", MISSING="1")[1] == []  # runs.csv has it
    assert len(reproduce(ONLY="ensemble/average")[1]) == 2


def test_a_mean_is_made_again_when_its_members_were_trained_again(reproduce):
    run = reproduce.runs / "border" / "tiny-5000" / "published" / "seed-0"
    finish(run)
    mean = reproduce.runs / "border" / "tiny-5000" / "average_published" / "seed-0.npz"
    mean.parent.mkdir(parents=True)
    mean.touch()
    os.utime(mean, (1, 1))
    finish(mean.with_suffix(""))  # the run that started from the old mean
    calls = reproduce(ONLY="border/tiny-5000/average")[1]
    assert "evaluate" in calls[0] and "average_published/seed-0 " in f"{calls[1]} " and reproduce.status == 0
    os.utime(run / "result.json", (1, 1))
    assert not any("evaluate" in call for call in reproduce(ONLY="border/tiny-5000/average")[1])


@pytest.fixture
def with_data(reproduce, tmp_path):
    """Call the script of a copy that has manifests of both data sets."""
    place = tmp_path / "checkout"
    shutil.copytree(ROOT / "experiments", place / "experiments")
    for name in ("cifar10", "half_tiny_imagenet"):
        (place / "data" / name).mkdir(parents=True)
        (place / "data" / name / "manifest.json").touch()
    decays = place / "experiments" / "collapsed_ensemble" / "border" / "decays.csv"
    decays.write_text(
        "setting,arm,decay\ntuned-5000,half,4e-3\nagain-5000,half,4e-3\ntuned-5000,one,2e-3\nwide-10000,half,1e-3\n"
        "heavier-10000,half,2e-3\nheavier-10000,one,4e-3\n"
    )
    return functools.partial(reproduce, script=place / "experiments" / "reproduce.sh")


def call_of(calls, run):
    """Return the only call that makes a run of this name."""
    (call,) = [call for call in calls if run in call]
    return call


def test_the_search_of_rates_changes_nothing_else(with_data):
    _, calls = with_data(ONLY="search_cifar/")
    assert len(calls) == 9
    lars = call_of(calls, "search_cifar/lars-10/")
    assert "--global_batch_size=4096 --seed=9 --phase=main:epochs=10,lr=10,power=2,end_lr=1e-4,warmup_epochs=2," in lars
    linear = call_of(calls, "search_cifar/linear-0.8/")
    assert "--global_batch_size=256 --seed=9 --phase=main:epochs=10,lr_per_256=0.8,warmup_epochs=2 " in linear


def test_a_search_of_the_weight_decay_has_the_same_budget_for_each_side(with_data):
    _, calls = with_data(ONLY="search_border/")
    assert len(calls) == 38
    one = call_of(calls, "search_border/tiny-5000/half-8e-3/")
    assert "--phase=main:steps=3900,lr=0.2,warmup_steps=390,wd=0.008,member=1 " in one
    late = call_of(calls, "search_border/tiny-5000/late_36-4e-3/")
    assert "--phase=trunk:steps=2730,lr=0.2,end_lr=0.036,warmup_steps=195,wd=0.004 " in late
    assert "--phase=two:steps=117,lr=0.036,power=2,wd=0.008,augment=light,branch=1,member=1 " in late
    whole = call_of(calls, "search_border/whole-cifar-5000/late_36-4e-3/")
    assert "--train_examples=5000 --seed=9 --data_dir=data/cifar10 --num_classes=10 --phase=trunk:steps=5460," in whole


def test_each_run_is_reported_with_its_number_and_how_it_ended(with_data):
    printed, _ = with_data(ONLY="search_cifar/lars", JOBS="1")
    lines = [line.split(" ", 1)[1].strip() for line in printed.splitlines() if " of 3" in line]
    assert lines[0] == "done   search_cifar/lars-2.5/seed-9 (1 of 3, about 0 min left)"
    assert lines[1].startswith("ended with 75: search_cifar/lars-5/seed-9 (2 of 3, about 0 min left; see ")
    assert lines[2] == "done   search_cifar/lars-10/seed-9 (3 of 3)"


def test_it_ends_with_an_error_if_a_run_did(with_data, reproduce):
    with_data(ONLY="search_cifar/lars")
    assert reproduce.status == 1
    with_data(ONLY="search_cifar/unscaled")  # negative control
    assert reproduce.status == 0


def test_a_loss_that_is_not_finite_is_a_result_and_is_not_repeated(with_data, reproduce):
    printed, calls = with_data(ONLY="search_cifar/linear")
    assert reproduce.status == 0 and len(calls) == 3
    assert "ended with a loss that is not finite: search_cifar/linear-0.8/seed-9" in printed
    (reproduce.runs / "search_cifar" / "linear-0.8" / "seed-9" / "not_finite.json").touch()
    printed, calls = with_data(ONLY="search_cifar/linear")
    assert len(calls) == 2 and "search_cifar/linear-0.8/seed-9: left out, because its loss was not finite" in printed


def test_a_combination_that_fails_is_an_error(reproduce):
    for seed in (0, 1):
        for number in range(3):
            finish(reproduce.runs / "border" / "tiny-10000" / "independent" / f"seed-{seed}" / str(number))
    printed, calls = reproduce(ONLY="nothing")
    assert len(calls) == 2 and "seed-1/ensemble.json" in printed and reproduce.status == 1
    assert (reproduce.runs / "border" / "tiny-10000" / "independent" / "seed-0" / "ensemble.json").exists()


@pytest.mark.parametrize(
    "variables, part",
    [
        ({"SEEDS": "x"}, "SEEDS=x: give numbers"),
        ({"SEEDS": "0,1"}, "SEEDS=0,1: give numbers"),
        ({"SEEDS": "0 1 0"}, "SEEDS=0 1 0: names a seed twice"),
        ({"JOBS": "0"}, "JOBS=0: give a number"),
        ({"ONLY": "("}, "ONLY=(: not a regular expression"),
    ],
)
def test_wrong_variables_are_refused_in_one_line(reproduce, variables, part):
    printed, calls = reproduce(**variables)
    assert reproduce.status == 64 and calls == []
    assert part in printed and len(printed.splitlines()) == 1


def test_only_names_the_beginning_of_runs_or_what_follows_a_slash(with_data):
    assert len(with_data(ONLY="border/tiny-5000/half", SEEDS="0")[1]) == 1  # and not search_border/tiny-5000/half-...
    assert len(with_data(ONLY="tiny-5000/half", SEEDS="0")[1]) == 4  # the search as well
    assert len(with_data(ONLY="border/tiny-5000/(half|one)", SEEDS="0")[1]) == 3  # half, one and one_collapse
    assert with_data(ONLY="tiny", SEEDS="0", MISSING="1")[1] != [] and with_data(ONLY="iny-5000")[1] == []


def test_settings_with_a_weight_decay_of_their_own(with_data):
    printed, (tuned,) = with_data(ONLY="border/tuned-5000/half", SEEDS="0")
    assert "--train_examples=5000 --seed=0 --phase=main:steps=3900,lr=0.2,warmup_steps=390,wd=0.004,member=1 " in tuned
    assert "border/tuned-5000/one_collapse/seed-0: left out, because" in printed and "no weight decay for it" in printed
    printed, calls = with_data(ONLY="border/cifar-50000/half", SEEDS="0")  # the search comes first
    assert "border/cifar-50000/half/seed-0: left out, because" in printed and calls == []
    _, calls = with_data(ONLY="border/again-5000/half", SEEDS="0 1")  # the repetition has seeds of its own
    assert call_of(calls, "again-5000/half/seed-3 ").count("--seed=3 --phase=main:steps=3900") == 1 and len(calls) == 2
    assert with_data(ONLY="border/tuned-5000/one/", SEEDS="0")[1] == []  # its own weight decay: a run of tiny-5000
    (heavier,) = with_data(ONLY="border/heavier-10000/(half|one)", SEEDS="0")[1]  # half: a run of wide-10000
    assert "/heavier-10000/one/seed-0 " in heavier and "--width=0.25 --phase=main:steps=7800,lr=0.2," in heavier
    assert "wd=0.004," in heavier
    (wide,) = with_data(ONLY="border/wide-10000/half", SEEDS="0")[1]
    assert "--width=0.25 --phase=main:steps=3900,lr=0.2,warmup_steps=390,wd=0.001,member=1 " in wide
