"""The learning rate of every step against closed forms written independently with numpy."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resnet_cpu.recipe import phases, schedule

IMAGENET = 1_281_167


def resolve(*texts, global_batch_size=256):
    return phases.resolve(
        phases.parse(texts),
        train_examples=IMAGENET,
        global_batch_size=global_batch_size,
        lr_scaling="linear",
        image_size=224,
    )


def rates(resolved):
    return np.array([rate for *_, rate in schedule.walk(resolved)])


def caffe(steps, base, power, horizon, warmup=0, start=0.0, origin=0):
    """The solver's curve: linear warm-up, then base * (1 - (i - origin) / horizon)^power."""
    i = np.arange(steps, dtype=np.float64)
    curve = base * (1 - (i - origin) / horizon) ** power
    if warmup:
        ramp = np.linspace(start, base, warmup, endpoint=False)
        curve[:warmup] = ramp[: min(warmup, steps)]
    return curve


@pytest.mark.parametrize("origin, name", [(446, "warmup_end"), (0, "start")])
def test_recipe_a_main_phase(origin, name):
    """sara-nl/caffe resnet50_448nodes/solver.prototxt: 8,040 iterations, base 4.8, warm-up 446 from 0.1, poly 1."""
    horizon = 8040 - origin
    resolved = resolve(
        f"main:steps=7638,lr=4.8,warmup_steps=446,warmup_lr=0.1,decay_steps={horizon},decay_from={name},wd=5e-5",
        "collapse:steps=402,lr=0.254,power=2",
    )
    expected = [
        caffe(7638, 4.8, 1, horizon, 446, 0.1, origin),
        caffe(402, 0.254, 2, 402),
    ]
    np.testing.assert_allclose(rates(resolved), np.concatenate(expected), rtol=1e-12)


def test_recipe_b_all_phases_and_their_final_rates():
    """sara-nl/caffe resnet50_custom_lr: poly_cyc over a horizon longer than each phase, progress from warm-up's end."""
    resolved = resolve(
        "init:steps=7800,lr=1.6,warmup_steps=1560,warmup_lr=0.1,decay_steps=17160",
        "cyc1:steps=3750,lr=1.02,power=2,decay_steps=7500",
        "cyc2:steps=4750,lr=0.764,power=2,decay_steps=7500,warmup_steps=1000,warmup_lr=0.255",
        "cyc3:steps=4750,lr=0.572,power=2,decay_steps=7500,warmup_steps=1000,warmup_lr=0.19",
        "collapse:steps=1560,lr=0.143,power=2",
    )
    expected = [
        caffe(7800, 1.6, 1, 17160, 1560, 0.1, 1560),
        caffe(3750, 1.02, 2, 7500),
        caffe(4750, 0.764, 2, 7500, 1000, 0.255, 1000),
        caffe(4750, 0.572, 2, 7500, 1000, 0.19, 1000),
        caffe(1560, 0.143, 2, 1560),
    ]
    assert schedule.total_steps(resolved) == 22610
    np.testing.assert_allclose(rates(resolved), np.concatenate(expected), rtol=1e-12)
    after = [schedule.learning_rate(phase, phase.steps) for phase in resolved]
    np.testing.assert_allclose(after[:4], [1.018, 0.255, 0.191, 0.143], atol=5e-4)


def test_recipe_c_steps():
    """Intel's default_resnet50_16nodes: warm-up 3,125 from 0.1 to 0.8, x0.1 at 18,750 / 37,500 / 50,000."""
    resolved = resolve(
        "main:steps=56300,lr=0.8,decay=step,boundary_steps=18750/37500/50000,warmup_steps=3125,warmup_lr=0.1"
    )
    i = np.arange(56300)
    expected = 0.8 * np.power(0.1, np.searchsorted([18750, 37500, 50000], i, side="right"))
    expected[:3125] = np.linspace(0.1, 0.8, 3125, endpoint=False)
    np.testing.assert_allclose(rates(resolved), expected, rtol=1e-12)


def test_cosine_runs_from_peak_to_end_lr():
    resolved = resolve("main:steps=1000,lr=0.5,decay=cosine,end_lr=0.01,warmup_steps=100")
    i = np.arange(900)
    expected = np.concatenate(
        [np.linspace(0, 0.5, 100, endpoint=False), 0.01 + 0.49 * (1 + np.cos(np.pi * i / 900)) / 2]
    )
    np.testing.assert_allclose(rates(resolved), expected, rtol=1e-12, atol=1e-15)


def test_poly_floor_and_a_horizon_shorter_than_the_phase():
    resolved = resolve("main:steps=30,lr=1,power=2,end_lr=0.1,decay_steps=10")
    i = np.minimum(np.arange(30) / 10, 1)
    np.testing.assert_allclose(rates(resolved), 0.1 + 0.9 * (1 - i) ** 2, rtol=1e-12)


def test_constant():
    assert set(rates(resolve("main:steps=5,lr=0.3,decay=constant"))) == {0.3}


@settings(max_examples=60, deadline=None)
@given(
    steps=st.integers(1, 400),
    warmup_share=st.floats(0, 1),
    lr=st.floats(1e-6, 50),
    low=st.floats(0, 1),
    power=st.floats(0.1, 5),
    decay=st.sampled_from(["poly", "cosine"]),
    origin=st.sampled_from(["warmup_end", "start"]),
)
def test_every_step_against_an_interpolated_warmup_and_a_closed_decay(
    steps, warmup_share, lr, low, power, decay, origin
):
    warmup = int(steps * warmup_share)
    text = f"p:steps={steps},lr={lr!r},decay={decay},warmup_steps={warmup},warmup_lr={low!r},decay_from={origin}"
    resolved = resolve(text + (f",power={power!r}" if decay == "poly" else ""))
    first = warmup if origin == "warmup_end" else 0
    i = np.arange(steps, dtype=np.float64)
    progress = (i - first) / max(steps - first, 1)
    curve = (1 - np.clip(progress, 0, 1)) ** power if decay == "poly" else np.cos(np.pi * progress / 2) ** 2
    expected = np.where(i < warmup, np.interp(i, [0, max(warmup, 1)], [low, lr]), lr * curve)
    np.testing.assert_allclose(rates(resolved), expected, rtol=1e-9, atol=1e-12 * lr)


def test_walk_yields_every_step_of_every_phase():
    resolved = resolve("a:steps=3,lr=1", "b:steps=2,lr=1")
    assert [(t, phase.name, within) for t, phase, within, _ in schedule.walk(resolved)] == [
        (0, "a", 0),
        (1, "a", 1),
        (2, "a", 2),
        (3, "b", 0),
        (4, "b", 1),
    ]


def test_spans_cover_the_steps_once_and_name_the_phase():
    tree = resolve("a:steps=4,lr=0.4,wd=1e-3", "side:steps=2,lr=0.1,branch=1", "b:steps=3,lr=0.2")
    for first, last in ((0, 9), (2, 8), (4, 6), (5, 5), (3, 5)):
        found = list(schedule.spans(tree, first, last))
        assert [step for span in found for step in span.steps] == list(range(first, last))
        for span in found:
            assert 0 <= span.steps[0] - span.phase_first < span.phase.steps
    assert [span.phase.name for span in schedule.spans(tree, 2, 7)] == ["a", "side", "b"]
    assert schedule.rates(tree, tree[0], 0, False) == (0.4, 0.9, 1e-3)


def test_every_decay_of_the_grammar_has_its_own_curve():
    assert set(schedule._DECAYS) == set(phases.DECAYS), "schedule.py needs a function in _DECAYS for each of DECAYS"


def test_an_unknown_decay_is_an_error_and_not_a_cosine():
    """On the old code every decay but poly, step and constant followed the cosine."""
    (phase,) = resolve("main:steps=10,lr=1")
    unknown = dataclasses.replace(phase, decay="no_such_decay")
    assert schedule.learning_rate(dataclasses.replace(unknown, warmup_steps=3), 2) > 0  # the warm-up does not need it
    with pytest.raises(KeyError, match="no_such_decay"):
        schedule.learning_rate(unknown, 5)
