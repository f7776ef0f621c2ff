"""The phase grammar: what it accepts, what it refuses, and its error messages."""

import pytest
from conftest import ROOT

from resnet_cpu.errors import FlagError
from resnet_cpu.recipe import phases

IMAGENET = 1_281_167


def resolve(*texts, train_examples=IMAGENET, global_batch_size=256, lr_scaling="linear", image_size=224):
    return phases.resolve(
        phases.parse(texts),
        train_examples=train_examples,
        global_batch_size=global_batch_size,
        lr_scaling=lr_scaling,
        image_size=image_size,
    )


def test_defaults():
    (phase,) = resolve("main:steps=100,lr=0.1,warmup_steps=10")
    assert (phase.decay, phase.power, phase.decay_from, phase.decay_steps) == ("poly", 1.0, "warmup_end", 90)
    assert (phase.wd, phase.momentum, phase.augment, phase.image_size) == (1e-4, 0.9, "full", 224)
    assert (phase.warmup_lr, phase.end_lr, phase.gamma) == (0.0, 0.0, 0.1)
    assert (phase.branch, phase.member, phase.parent, phase.velocity) == (False, False, None, "keep")


def test_decay_from_start_includes_the_warmup():
    (phase,) = resolve("main:steps=100,lr=0.1,warmup_steps=10,decay_from=start")
    assert phase.decay_steps == 100


@pytest.mark.parametrize("epochs, batch, steps", [("90", 1024, 112603), ("0.5", 256, 2502), ("1", 1_281_167, 1)])
def test_epochs_become_the_nearest_number_of_steps(epochs, batch, steps):
    (phase,) = resolve(f"main:epochs={epochs},lr=0.1", global_batch_size=batch)
    assert phase.steps == steps == round(float(epochs) * IMAGENET / batch)


@pytest.mark.parametrize("rule, lr", [("linear", 1.6), ("sqrt", 0.4), ("none", 0.1)])
def test_lr_per_256_is_scaled_once(rule, lr):
    (phase,) = resolve("main:steps=9,lr_per_256=0.1", global_batch_size=4096, lr_scaling=rule)
    assert phase.lr == pytest.approx(lr)


def test_absolute_lr_is_not_scaled():
    (phase,) = resolve("main:steps=9,lr=0.1", global_batch_size=4096)
    assert phase.lr == 0.1


def test_a_later_phase_of_the_same_name_replaces_the_earlier_in_its_place():
    resolved = resolve("a:steps=1,lr=1", "b:steps=2,lr=1", "a:steps=7,lr=2")
    assert [(phase.name, phase.steps) for phase in resolved] == [("a", 7), ("b", 2)]


def test_parents_and_velocity_of_a_tree():
    resolved = resolve(
        "main:steps=5,lr=1",
        "side:steps=2,lr=1,branch=1,member=1",
        "more:steps=5,lr=1",
        "late:steps=2,lr=1,from=main,branch=1",
        "kept:steps=2,lr=1,branch=1,velocity=keep",
    )
    assert [phase.parent for phase in resolved] == [None, "main", "main", "main", "more"]
    assert [phase.velocity for phase in resolved] == ["keep", "reset", "keep", "reset", "keep"]


def test_boundaries_in_epochs():
    (phase,) = resolve("main:epochs=90,lr=0.1,decay=step,boundary_epochs=30/60/80", global_batch_size=1024)
    assert phase.boundary_steps == tuple(round(e * IMAGENET / 1024) for e in (30, 60, 80))


def test_negative_control_boundaries_on_the_first_and_the_last_step_are_accepted():
    (phase,) = resolve("a:steps=9,lr=1,decay=step,boundary_steps=1/8")
    assert phase.boundary_steps == (1, 8)


@pytest.mark.parametrize(
    "text, parts",
    [
        ("main:steps=1,lr=1,colour=red", ["main", "colour", "docs/phases.md"]),
        ("main:steps=1,epochs=1,lr=1", ["main", "steps", "epochs", "keep one"]),
        ("main:lr=1", ["main", "steps", "epochs", "add one"]),
        ("main:steps=1", ["main", "lr", "lr_per_256", "add one"]),
        ("main:steps=1,lr=1,lr_per_256=1", ["main", "lr", "keep one"]),
        ("main:steps=0,lr=1", ["main", "steps=0", "from 1 to 99,999,999"]),
        ("main:steps=1.5,lr=1", ["main", "steps=1.5", "whole number"]),
        ("main:steps=1,lr=nan", ["main", "lr=nan", "finite number"]),
        ("main:steps=1,lr=inf", ["main", "lr=inf", "finite number"]),
        ("main:steps=1,lr_per_256=1e308", ["main", "lr_per_256=1e308", "below 1e+38"]),
        (
            "main:steps=999,lr=1,decay=step,boundary_steps=" + "/".join(map(str, range(1, 103))),
            ["main", "at most 100 numbers"],
        ),
        ("main:steps=1,lr=1e400", ["main", "lr=1e400", "finite number"]),
        ("main:epochs=1e300,lr=1", ["main", "epochs=1e300", "below 1,000,000"]),
        ("main:steps=100000000,lr=1", ["main", "steps=100000000", "to 99,999,999"]),
        (f"main:steps={'9' * 5000},lr=1", ["main", "to 99,999,999"]),
        ("main:steps=9,lr=1,decay=step,boundary_steps=3,gamma=1e308", ["main", "gamma=1e308", "below 1,000"]),
        ("main:steps=1,lr=1,image_size=4", ["main", "image_size=4", "from 8 to 4,096"]),
        ("main:steps=1,lr=1,image_size=1000000000", ["main", "from 8 to 4,096"]),
        ("main:steps=1,lr=-1", ["main", "lr=-1", "at least 0"]),
        ("main:steps=1,lr=x", ["main", "lr=x", "number"]),
        ("main:steps=1,lr=1,momentum=1", ["main", "momentum=1", "below 1"]),
        ("main:steps=1,lr=1,decay=linear", ["main", "decay=linear", "poly"]),
        ("main:steps=1,lr=1,decay=step", ["main", "boundaries", "boundary_epochs"]),
        ("main:steps=9,lr=1,decay=step,boundary_steps=5/3", ["main", "boundary_steps=5/3", "ascending"]),
        ("main:steps=1,lr=1,decay=cosine,power=2", ["main", "power", "cosine"]),
        ("main:steps=1,lr=1,gamma=0.1", ["main", "gamma", "poly"]),
        ("main:steps=1,lr=1,warmup_lr=1", ["main", "warmup_lr", "warmup_steps"]),
        ("main:steps=1,lr=1,branch=yes", ["main", "branch=yes", "0 or 1"]),
        ("main:steps=1,lr=1,augment=heavy", ["main", "augment=heavy", "light"]),
        ("main:steps=1,steps=2,lr=1", ["main", "steps", "twice"]),
        ("main:steps=1, lr=1", ["main", "' lr'", "no spaces"]),
        ("main:epoch=1,lr=1", ["main", "'epoch'", "did you mean epochs"]),
        ("main:steps=1,lr", ["main", "'lr'", "key=value"]),
        ("main:steps=1,lr=1\n", ["newline", "one line"]),
        ("main", ["NAME:key=value"]),
        ("../x:steps=1,lr=1", ["NAME"]),
        (":steps=1,lr=1", ["NAME"]),
        ("one.tmp:steps=1,lr=1,member=1", ["one.tmp", ".tmp", "another name"]),  # publishing `one` deleted it
    ],
)
def test_a_bad_phase_is_reported_with_its_name_key_and_remedy(text, parts):
    with pytest.raises(FlagError) as caught:
        phases.parse([text])
    assert all(part in str(caught.value) for part in parts)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "texts, parts",
    [
        (["a:steps=1,lr=1,from=b", "b:steps=1,lr=1"], ["a", "from=b", "earlier"]),
        (["a:steps=1,lr=1", "b:steps=1,lr=1,from=c"], ["b", "from=c", "a"]),
        (["a:steps=1,lr=1,from=a"], ["a", "from=a"]),
        (["a:steps=5,lr=1,warmup_steps=6"], ["a", "warm-up", "6", "5"]),
        (["a:epochs=0.00001,lr=1"], ["a", "less than one step"]),
        (["a:steps=99999999,lr=1", "b:steps=1,lr=1"], ["b", "more than 99,999,999 steps", "shorten"]),
        (["a:epochs=999999,lr=1"], ["a", "more than 99,999,999 steps", "shorten"]),
        ([], ["--phase"]),
        # Boundaries that could have no effect, or not the intended one; all of them were accepted silently.
        (
            ["a:steps=9,lr=1,decay=step,boundary_steps=3/9"],
            ["a", "boundary_steps=3/9", "step 9 has no effect", "remove"],
        ),
        (
            ["a:steps=9,lr=1,decay=step,boundary_steps=3,warmup_steps=9"],
            ["a", "boundary_steps=3", "consists of its warm-up", "shorten"],
        ),
        (
            ["a:epochs=20,lr=1,decay=step,boundary_epochs=30/60/80"],
            ["a", "boundary_epochs=30/60/80", "has no effect in a phase of 100091 steps", "lengthen"],
        ),
        (
            ["a:epochs=1,lr=1,decay=step,boundary_epochs=0.00001/0.00002"],
            ["a", "boundary_epochs=1e-05/2e-05", "step 0", "lower lr"],
        ),
        (
            ["a:epochs=1,lr=1,decay=step,boundary_epochs=0.5/0.50001"],
            ["a", "boundary_epochs", "same step", "remove one"],
        ),
    ],
)
def test_phases_that_do_not_fit_together(texts, parts):
    with pytest.raises(FlagError) as caught:
        resolve(*texts)
    assert all(part in str(caught.value) for part in parts)


# For every key a recipe in which it matters: (key, recipe without the change, recipe with it).
TREE = ["a:steps=6,lr=0.4", "b:steps=3,lr=0.1,branch=1"]
BASE = "steps=8,lr=0.4,warmup_steps=2"
KEYS = {
    "steps": (["m:steps=8,lr=0.4"], ["m:steps=9,lr=0.4"]),
    "epochs": (["m:epochs=1,lr=0.4"], ["m:epochs=2,lr=0.4"]),
    "lr": (["m:steps=8,lr=0.4"], ["m:steps=8,lr=0.5"]),
    "lr_per_256": (["m:steps=8,lr_per_256=0.4"], ["m:steps=8,lr_per_256=0.5"]),
    "decay": ([f"m:{BASE}"], [f"m:{BASE},decay=cosine"]),
    "power": ([f"m:{BASE}"], [f"m:{BASE},power=2"]),
    "decay_steps": ([f"m:{BASE}"], [f"m:{BASE},decay_steps=20"]),
    "decay_epochs": ([f"m:{BASE}"], [f"m:{BASE},decay_epochs=2"]),
    "decay_from": ([f"m:{BASE}"], [f"m:{BASE},decay_from=start"]),
    "boundary_steps": ([f"m:{BASE},decay=step,boundary_steps=4"], [f"m:{BASE},decay=step,boundary_steps=5"]),
    "boundary_epochs": ([f"m:{BASE},decay=step,boundary_epochs=0.4"], [f"m:{BASE},decay=step,boundary_epochs=0.6"]),
    "gamma": ([f"m:{BASE},decay=step,boundary_steps=4"], [f"m:{BASE},decay=step,boundary_steps=4,gamma=0.5"]),
    "end_lr": ([f"m:{BASE}"], [f"m:{BASE},end_lr=0.01"]),
    "warmup_steps": (["m:steps=8,lr=0.4"], ["m:steps=8,lr=0.4,warmup_steps=2"]),
    "warmup_epochs": (["m:steps=8,lr=0.4"], ["m:steps=8,lr=0.4,warmup_epochs=0.2"]),
    "warmup_lr": ([f"m:{BASE}"], [f"m:{BASE},warmup_lr=0.1"]),
    "wd": ([f"m:{BASE}"], [f"m:{BASE},wd=1"]),
    "momentum": ([f"m:{BASE}"], [f"m:{BASE},momentum=0.5"]),
    "augment": ([f"m:{BASE}"], [f"m:{BASE},augment=none"]),
    "image_size": ([f"m:{BASE}"], [f"m:{BASE},image_size=96"]),
    "branch": ([*TREE, "c:steps=1,lr=1"], [TREE[0], "b:steps=3,lr=0.1", "c:steps=1,lr=1"]),
    "from": ([*TREE, "c:steps=1,lr=1"], [*TREE, "c:steps=1,lr=1,from=b"]),
    "velocity": (TREE, [TREE[0], f"{TREE[1]},velocity=keep"]),
    "member": (TREE, [TREE[0], f"{TREE[1]},member=1"]),
}


def test_every_key_has_an_example():
    assert set(KEYS) == set(phases._KEYS)


@pytest.mark.parametrize("key", KEYS)
def test_every_key_changes_what_plan_shows(key, capsys):
    """A key that is not in the csv is in the table; tests/test_tree.py checks its effect on the weights."""
    from resnet_cpu import plan as command

    shown = []
    for recipe in KEYS[key]:
        shown.append([])
        for form in ("csv", "table"):
            flags = [f"--phase={text}" for text in recipe]
            command.main([*flags, "--train_examples=2560", "--batch_size=256", f"--format={form}"])
            shown[-1].append(capsys.readouterr().out)
    (csv_without, table_without), (csv_with, table_with) = shown
    assert table_without != table_with or csv_without != csv_with
    assert (csv_without != csv_with) == (key not in ("branch", "from", "velocity", "member"))


def test_the_page_on_phases_lists_every_key_and_every_decay():
    page = (ROOT / "docs" / "phases.md").read_text()
    for key in phases._KEYS:
        assert f"`{key}`" in page or f"`{key}=" in page, key
    for decay in phases.DECAYS:
        assert f"| `{decay}` |" in page, decay  # its formula
