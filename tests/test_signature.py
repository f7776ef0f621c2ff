"""The signature: everything that decides a result is in it, defaults are not, and version 0.1 is understood."""

import dataclasses

import pytest
from test_commandline import CHANGES, of_a_run

from resnet_cpu import commandline
from resnet_cpu.errors import CheckpointError
from resnet_cpu.resolve import resolve_recipe
from resnet_cpu.run import signature
from resnet_cpu.settings import Recipe

# What decides the bits of a trained model has to be in its signature; the rest must not bind a resumed run.
NOT_DECIDING = {
    "data_dir",  # data may be moved
    "batch_size",  # only how the global batch is divided, which each checkpoint records
    "accumulate_steps",
    "data_threads",
    "bad_records",  # good data are not affected
    "max_bad",
}
RECIPE = ["--phase=m:steps=2,lr_per_256=1", "--global_batch_size=20"]


def signature_of(*more, pixels=None):
    settings = commandline.parse([*RECIPE, *more])
    examples = settings.data.train_examples or 100
    return signature.of(settings, resolve_recipe(settings, 1, examples), examples, pixels)


def test_another_content_of_the_data_is_another_run_unless_one_of_them_recorded_none():
    settings = commandline.parse(RECIPE)
    old, one, other = (
        signature.of(settings, resolve_recipe(settings, 1, 100), 100, None, content=content)
        for content in (None, "0a", "0b")
    )
    for recorded, now in ((one, one), (old, one), (one, old)):
        signature.check("runs/mine", recorded, now)
    with pytest.raises(CheckpointError, match=r"runs/mine belongs to another data set: .* \(data.content: 0a rec"):
        signature.check("runs/mine", one, other)
    flags = {**other, "recipe": {**other["recipe"], "seed": 7}}
    with pytest.raises(CheckpointError, match="belongs to another run: .*use the same flags and data set"):
        signature.check("runs/mine", one, flags)


@pytest.mark.parametrize("name", [flag.name for flag in of_a_run() if flag.group in ("recipe", "data", "model")])
def test_every_setting_of_recipe_data_and_model_is_in_the_signature(name):
    value = {"batch_size": "20", "train_examples": "99"}.get(name, CHANGES[name])
    assert (signature_of(f"--{name}={value}") != signature_of()) == (name not in NOT_DECIDING)


def test_a_setting_at_its_default_is_absent():
    found = signature_of()
    assert "label_smoothing" not in found["recipe"] and "width" not in found["model"] and "crop" not in found["data"]
    assert signature_of("--label_smoothing=0", "--width=1", "--crop=inception:0.08,1") == found


def test_a_new_setting_does_not_orphan_an_older_run(monkeypatch):
    """Held against version 0.1, whose signatures listed every field."""
    recorded = signature_of("--label_smoothing=0.1")

    @dataclasses.dataclass(frozen=True)
    class Newer(Recipe):
        fancy: bool = dataclasses.field(default=False, metadata={"decides": True})

    monkeypatch.setattr(signature, "Recipe", Newer)
    settings = commandline.parse([*RECIPE, "--label_smoothing=0.1"])
    values = {field.name: getattr(settings.recipe, field.name) for field in dataclasses.fields(Recipe)}
    newer = dataclasses.replace(settings, recipe=Newer(**values))
    now = signature.of(newer, resolve_recipe(settings, 1, 100), 100, None)
    signature.check("run", signature.normalised(recorded), now)
    chosen = dataclasses.replace(settings, recipe=Newer(**values, fancy=True))
    with pytest.raises(CheckpointError, match="fancy"):  # negative control
        signature.check("run", recorded, signature.of(chosen, resolve_recipe(settings, 1, 100), 100, None))


def of_version_0_1(**data):
    """Return what version 0.1 recorded for the flags of RECIPE, with --crop=inception:0.25,1 and --seed=3."""
    return {
        "model": {
            **{"model": "resnet50", "width": 1.0, "stem": "imagenet", "stride_in": "3x3", "padding": "symmetric"},
            **{"zero_gamma": "last", "bn_momentum": 0.9, "bn_epsilon": 1e-05, "bn_stats_batch": None},
            **{"conv1_bias": False, "precision": "float32", "num_classes": 1000},
        },
        "data": {
            **{"dataset": "imagenet", "train_examples": 100, "resize": "bilinear", "normalization": "auto"},
            **{"pixels": None, "eval_crop": 0.875, "crop": ["inception", 0.25, 1.0, 0.75, 1.3333], "order_block": 1},
            **data,
        },
        "global_batch_size": 20,
        "optimizer": ["sgd", 0.001],
        "momentum_correction": False,
        "label_smoothing": 0.0,
        "wd_on_bn": False,
        "seed": 3,
        "phases": {
            "m": {
                **{"name": "m", "steps": 2, "lr": 0.078125, "decay": "poly", "power": 1.0, "decay_steps": 2},
                **{"decay_from": "warmup_end", "boundary_steps": [], "gamma": 0.1, "end_lr": 0.0, "warmup_steps": 0},
                **{"warmup_lr": 0.0, "wd": 0.0001, "momentum": 0.9, "augment": "full", "image_size": 224},
                **{"branch": False, "parent": None, "velocity": "keep", "member": False},
            }
        },
        "order_of_phases": ["m"],
        "init_from": None,
    }


def test_a_run_of_version_0_1_can_be_continued():
    now = signature_of("--crop=inception:0.25,1", "--seed=3")
    signature.check("run", signature.normalised(of_version_0_1()), now)
    with pytest.raises(CheckpointError, match="seed"):  # negative control
        signature.check("run", signature.normalised(of_version_0_1()), signature_of("--crop=inception:0.25,1"))


@pytest.mark.parametrize("data", [{"order_block": 8}, {"crop": ["inception", 0.25, 1.0, 0.5, 2.0]}])
def test_what_can_no_longer_be_chosen_is_a_difference(data):
    with pytest.raises(CheckpointError, match="order_block: 8|crop_aspect"):
        signature.check(
            "run", signature.normalised(of_version_0_1(**data)), signature_of("--crop=inception:0.25,1", "--seed=3")
        )


def test_the_message_lists_the_differences_flags_first():
    with pytest.raises(CheckpointError) as caught:
        signature.check("the/run", signature_of("--seed=1"), signature_of("--seed=2", "--phase=m:steps=3,lr=1"))
    text = str(caught.value)
    assert "the/run" in text and "recipe.seed: 1 recorded, 2 now" in text
    assert text.index("recipe.seed") < text.index("phases.m")


def test_boundaries_without_effect_do_not_keep_a_run_of_version_0_1_from_being_continued():
    recorded = of_version_0_1(crop=["inception", 0.08, 1.0, 0.75, 1.3333])
    recorded["seed"] = 0
    for boundaries, now in (([1, 60], "decay=step,boundary_steps=1"), ([20, 60], "decay=constant")):
        recorded["phases"]["m"].update(decay="step", boundary_steps=boundaries)
        found = signature_of(f"--phase=m:steps=2,lr_per_256=1,{now}")
        signature.check("run", signature.normalised(recorded), found)
