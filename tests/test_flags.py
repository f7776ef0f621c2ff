"""Flags: what is refused and how, and that a written flagfile gives the same settings again."""

import dataclasses

import pytest
from conftest import ROOT

from resnet_cpu import flags
from resnet_cpu.errors import FlagError

PHASE = "--phase=main:steps=1,lr=1"


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["--batchsize=3"], ["--batchsize=3: unknown", "--batch_size"]),
        (["--width 0.25"], ["--width 0.25: unknown", "--name=value"]),
        (["--run_dir=a  # mine"], ["--run_dir=a  # mine", "column 0"]),
        (["--width=0.25  # narrow"], ["width", "column 0"]),
        (["--no_such_thing"], ["--no_such_thing", "--help"]),
        (["--batch_size=0"], ["batch_size", "0", "--help"]),
        (["--batch_size=x"], ["batch_size", "x"]),
        (["--model=vgg16"], ["model", "vgg16", "resnet50"]),
        (["--seed=-1"], ["seed", "-1"]),
        (["stray"], ["'stray'", "--name=value"]),
        (["--batch_size=3", "--global_batch_size=8"], ["--batch_size=3", "--global_batch_size=8", "leave one"]),
        (["--dataset=synthetic", "--data_dir=x"], ["--data_dir=x", "synthetic", "leave one"]),
        (["--run_dir=a\nb"], ["run_dir", "newline"]),
        (["--phase=main:steps=1\n,lr=1"], ["phase", "newline"]),
        (["--phase=main:steps=1"], ["main", "lr"]),
        (["--flagfile=/no/such.flags"], ["/no/such.flags"]),
        (["--keep_checkpoints=1"], ["keep_checkpoints", "1"]),
        (["--width=nan"], ["--width=nan", "finite"]),
        (["--eval_every_epochs=inf"], ["--eval_every_epochs=inf", "finite"]),
        (["--crop_area=0.5"], ["--crop_area=0.5", "pair", "--crop_area=0.5,1"]),
        (["--crop_area=0.5,1.5"], ["--crop_area=0.5,1.5", "up to 1"]),
        (["--crop_aspect=2,1"], ["--crop_aspect=2,1", "more than"]),
        (["--profile_steps=-1,2"], ["--profile_steps=-1,2", "from 0"]),
        (["--profile_steps=a,b"], ["--profile_steps=a,b", "first and last"]),
        (["--untimed_steps=3"], ["--untimed_steps=3", "--experiment=train"]),
        (["--export=x"], ["--export=x", "resnet_cpu.evaluate"]),
        (["--format=csv"], ["--format=csv", "resnet_cpu.plan and resnet_cpu.simulate"]),
        (["--network=omnipath"], ["--network=omnipath", "resnet_cpu.simulate"]),
        (["--mpi=srun"], ["--mpi=srun", "resnet_cpu.launch"]),
    ],
)
def test_bad_flags_are_told_in_one_line(arguments, parts):
    with pytest.raises(FlagError) as caught:
        flags.parse(arguments)
    assert all(part in str(caught.value) for part in parts), caught.value
    assert "\n" not in str(caught.value)


def test_defaults_follow_the_data_set():
    small, large = flags.parse(["--dataset=fashion_mnist"]), flags.parse([])
    assert (small.data.image_size, small.data.eval_crop, small.model.num_classes) == (32, 1.0, 10)
    assert (large.data.image_size, large.data.eval_crop, large.model.num_classes) == (224, 0.875, 1000)
    assert flags.parse(["--dataset=fashion_mnist", "--image_size=64"]).data.image_size == 64


def test_flagfiles_nest_later_flags_win_and_an_indented_comment_is_a_leftover(tmp_path):
    (tmp_path / "base.flags").write_text("# a comment\n--seed=1\n--batch_size=4\n")
    (tmp_path / "top.flags").write_text(f"--flagfile={tmp_path}/base.flags\n--seed=2\n")
    parsed = flags.parse([f"--flagfile={tmp_path}/top.flags", "--batch_size=8"])
    assert (parsed.recipe.seed, parsed.recipe.batch_size) == (2, 8)
    (tmp_path / "bad.flags").write_text("--seed=1\n  # indented\n")
    with pytest.raises(FlagError, match="column 0"):
        flags.parse([f"--flagfile={tmp_path}/bad.flags"])


def test_resolved_flags_are_a_fixed_point(tmp_path):
    given = ["--dataset=fashion_mnist", "--data_dir=d", PHASE, "--phase=b:epochs=1,lr_per_256=0.1,wd=0", "--conv1_bias"]
    first = flags.parse([*given, "--nowd_on_bn", "--run_dir=a folder", "--bn_epsilon=1.001e-5"])
    (tmp_path / "resolved.flags").write_text(first.resolved_flags)
    second = flags.parse([f"--flagfile={tmp_path}/resolved.flags"])
    assert second == first
    assert second.resolved_flags == first.resolved_flags


def test_help_shows_every_flag():
    text = flags.help_text()
    values, _ = flags.parse_values([])
    for name in values:
        assert f"--{name}" in text


@pytest.mark.parametrize("argument", ["--help", "-h", "--helpfull"])
def test_help_exits_0(argument, capsys):
    with pytest.raises(SystemExit) as caught:
        flags.parse([argument])
    assert caught.value.code == 0
    assert "--batch_size" in capsys.readouterr().out


# A value for every flag that differs from its default and changes the settings.
def test_the_reference_is_that_of_the_code():
    """`make docs` writes it."""
    written = (ROOT / "docs" / "flags.md").read_text()
    assert written == flags.reference()
    for name in flags.parse_values([])[0]:
        assert f"| `--{name}` |" in written, name


CHANGES = {
    "experiment": "scaling",
    "accumulate_steps": "2",
    "optimizer": "lars",
    "lars_eta": "0.01",
    "momentum_correction": "true",
    "label_smoothing": "0.1",
    "bn_stats_batch": "4",
    "phase": "x:steps=2,lr=1",
    "batch_size": "5",
    "global_batch_size": "10",
    "lr_scaling": "sqrt",
    "wd_on_bn": "true",
    "seed": "4",
    "dataset": "digits",
    "data_dir": "d",
    "train_examples": "9",
    "num_classes": "3",
    "image_size": "64",
    "resize": "bicubic",
    "normalization": "tf",
    "crop": "authors",
    "crop_area": "0.2,0.9",
    "crop_aspect": "0.5,2",
    "precision": "bfloat16",
    "init_from": "runs/other",
    "profile_steps": "5,7",
    "eval_crop": "0.5",
    "order_block": "2",
    "data_threads": "3",
    "model": "resnet18",
    "width": "2",
    "stem": "small",
    "stride_in": "1x1",
    "padding": "same",
    "zero_gamma": "none",
    "bn_momentum": "0.5",
    "bn_epsilon": "0.1",
    "conv1_bias": "true",
    "run_dir": "r",
    "resume": "must",
    "max_steps": "3",
    "eval_every_epochs": "2",
    "eval_batch_size": "7",
    "untimed_steps": "5",
    "checkpoint_every_steps": "3",
    "keep_checkpoints": "5",
    "log_every_steps": "2",
    "ranks": "2",
    "threads": "2",
    "stall_timeout": "9",
}


def test_every_flag_changes_the_settings():
    values, _ = flags.parse_values([])
    ours = {name for name in values if name not in flags.OF_ONE_COMMAND}
    assert ours == set(CHANGES)
    for name, value in CHANGES.items():
        needed = {"lars_eta": ["--optimizer=lars"], "untimed_steps": ["--experiment=scaling"]}.get(name, [])
        before, after = flags.parse(needed), flags.parse([*needed, f"--{name}={value}"])
        assert dataclasses.replace(after, resolved_flags="") != dataclasses.replace(before, resolved_flags=""), name


# What decides the bits of a trained model has to be in its signature; the rest must not bind a resumed run.
NOT_IN_THE_SIGNATURE = {
    "experiment",
    "data_dir",  # data may be moved
    "batch_size",  # only how the global batch is cut up, which is recorded as the layout of each checkpoint
    "accumulate_steps",
    "data_threads",
}


def test_every_flag_of_recipe_data_and_model_is_in_the_signature_of_a_checkpoint():
    from resnet_cpu.settings import plan
    from resnet_cpu.training import opening as job

    def signature(*more):
        recipe = ["--phase=m:steps=2,lr_per_256=1", "--global_batch_size=20", "--optimizer=lars"]
        settings = flags.parse([*recipe, *more])
        return job._signature(settings, plan(settings, 1, 100), settings.data.train_examples or 100, None)

    sections = dict(flags._define().sections)
    deciding = [name for title in ("what is run", "data", "model") for name in sections[title]]
    assert set(deciding) >= NOT_IN_THE_SIGNATURE
    for name in deciding:
        value = {
            "experiment": "lr_scaling",
            "optimizer": "sgd",
            "wd_on_bn": "true",
            "batch_size": "20",
            "eval_crop": "0.5",
        }.get(name, CHANGES.get(name))
        more = [f"--{name}={value}", *(["--optimizer=sgd"] if name == "wd_on_bn" else [])]
        base = signature(*more[1:])
        assert (signature(*more) != base) == (name not in NOT_IN_THE_SIGNATURE), name
