"""The published recipes as flagfiles, against the authors' solver files, whose constants are repeated here.

Expected values are computed with numpy over whole arrays, without any code of the package.
"""

import csv
import io

import numpy as np
import pytest
from conftest import ROOT

from resnet_cpu import plan

IMAGENET = 1_281_167


def csv_of_plan(capsys, name, *more):
    """Return the columns of `plan --format=csv` of a flagfile, floats where they are numbers."""
    plan.main([f"--flagfile={ROOT}/experiments/{name}", "--format=csv", *more])
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    return {
        key: [row[key] for row in rows] if key in ("phase", "augment") else np.array([float(row[key]) for row in rows])
        for key in rows[0]
    }


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)  # paths of nested flagfiles are relative to the current folder


def solver(max_iter, base_lr, power, horizons=None, warmup=0, start_lr=0.0, origin="warmup_end"):
    """Caffe's poly and the authors' poly_cyc: linear warm-up, then base * (1 - progress)^power.

    `horizons`: those of progress counted from the start and from the end of the warm-up; only the latter gives the
    published rates at the ends of phases.
    """
    i = np.arange(max_iter, dtype=np.float64)
    from_start, from_warmup = horizons or (max_iter, max_iter - warmup)
    done = i / from_start if origin == "start" else (i - warmup) / from_warmup
    rate = base_lr * np.maximum(1.0 - done, 0.0) ** power
    ramp = start_lr + (base_lr - start_lr) * i / max(warmup, 1)
    return np.where(i < warmup, ramp, rate)


def phase_of(plan_, name):
    return np.array([phase == name for phase in plan_["phase"]])


@pytest.mark.parametrize("name, origin", [("recipe_a", "warmup_end"), ("recipe_a_as_built", "start")])
def test_recipe_a_at_every_iteration(capsys, name, origin):
    found = csv_of_plan(capsys, f"collapsed_ensemble/{name}.flags", "--ranks=896")
    line, collapse = phase_of(found, "main") | phase_of(found, "tail"), phase_of(found, "collapse")
    assert (line.sum(), phase_of(found, "tail").sum(), collapse.sum()) == (8040, 402, 402)
    expected = solver(8040, 4.8, 1, warmup=446, start_lr=0.1, origin=origin)
    np.testing.assert_allclose(found["lr"][line], expected, rtol=1e-12)
    np.testing.assert_allclose(found["lr"][collapse], solver(402, 0.254, 2), rtol=1e-12)
    assert set(found["weight_decay"][line]) == {5e-5} and set(found["weight_decay"][collapse]) == {1e-4}
    assert set(np.array(found["augment"])[line]) == {"full"} and set(np.array(found["augment"])[collapse]) == {"light"}
    assert set(found["momentum"]) == {0.9} and set(found["image_size"]) == {224}
    # The collapse starts at the rate of the published curve, if progress is counted from the end of the warm-up.
    collapse_rate = solver(8040, 4.8, 1, warmup=446, start_lr=0.1)[7638]
    assert collapse_rate == pytest.approx(0.254, abs=5e-4)


B = [  # name, max_iter, base_lr, power, (lr_iter, horizon from the warm-up's end), warm-up, start_lr, weight decay
    ("init", 7800, 1.6, 1, (18720, 18720 - 1560), 1560, 0.1, 5e-5),
    ("cyc1", 3750, 1.02, 2, (7500, 7500), 0, 0, 5e-5),
    ("cyc2", 4750, 0.764, 2, (7500, 7500), 1000, 0.255, 5e-5),
    ("cyc3", 4750, 0.572, 2, (7500, 7500), 1000, 0.19, 5e-5),
    ("collapse", 1560, 0.143, 2, None, 0, 0, 2e-4),
]


@pytest.mark.parametrize("name, origin", [("recipe_b", "warmup_end"), ("recipe_b_as_built", "start")])
def test_recipe_b_at_every_iteration(capsys, name, origin):
    found = csv_of_plan(capsys, f"collapsed_ensemble/{name}.flags", "--ranks=128")
    assert len(found["lr"]) == 7800 + 3750 + 4750 + 4750 + 1560 == 22610
    rates = [solver(steps, lr, power, over, warm, low, origin) for _, steps, lr, power, over, warm, low, _ in B]
    np.testing.assert_allclose(found["lr"], np.concatenate(rates), rtol=1e-12)
    np.testing.assert_allclose(found["weight_decay"], np.concatenate([np.full(row[1], row[7]) for row in B]))
    assert found["phase"] == [row[0] for row in B for _ in range(row[1])]
    assert found["epoch"][-1] == pytest.approx(22609 * 4096 / IMAGENET)


def test_each_phase_of_recipe_b_starts_at_the_rate_at_which_the_last_one_ended(capsys):
    """1.018 before 1.02, 0.255 before 0.255, 0.191 before 0.19, 0.143 before 0.143, from the end of the warm-up."""
    last = [solver(row[1] + 1, *row[2:7])[-1] for row in B[:4]]
    assert [round(rate, 3) for rate in last] == [1.018, 0.255, 0.191, 0.143]
    found = csv_of_plan(capsys, "collapsed_ensemble/recipe_b.flags")
    ends = np.cumsum([row[1] for row in B])
    np.testing.assert_allclose(found["lr"][ends[:4] - 1], last, rtol=2e-3)
    as_built = [solver(row[1] + 1, *row[2:7], origin="start")[-1] for row in B[:4]]
    assert [round(rate, 3) for rate in as_built] == [0.933, 0.255, 0.103, 0.077]


@pytest.mark.parametrize(
    "nodes, batch, steps, lr, boundaries, warmup",
    [
        (8, 1024, 112600, 0.4, (37440, 74880, 99840), 0),
        (16, 2048, 56300, 0.8, (18750, 37500, 50000), 3125),
        (64, 8192, 14075, 3.2, (4680, 9360, 12480), 780),
    ],
)
def test_recipe_c_at_every_iteration(capsys, nodes, batch, steps, lr, boundaries, warmup):
    found = csv_of_plan(capsys, f"lr_scaling/intel_{nodes}_nodes.flags", f"--ranks={nodes}")
    i = np.arange(steps)
    expected = lr * 0.1 ** np.add.reduce([i >= boundary for boundary in boundaries])
    expected[:warmup] = np.linspace(0.1, lr, warmup, endpoint=False)
    np.testing.assert_allclose(found["lr"], expected, rtol=1e-12)
    assert found["epoch"][1] == batch / IMAGENET and set(found["weight_decay"]) == {1e-4}


def test_the_4096_entry_of_dawnbench_at_every_iteration(capsys):
    found = csv_of_plan(capsys, "lr_scaling/dawnbench_4096.flags", "--ranks=128")
    i = np.arange(28150)
    expected = 1.6 * 0.1 ** np.searchsorted([9384, 18767, 25022], i, side="right")
    expected[:936] = np.linspace(0.1, 1.6, 936, endpoint=False)
    np.testing.assert_allclose(found["lr"], expected, rtol=1e-12)


@pytest.mark.parametrize("name, members, epochs", [("ce_of_b", 3, 82.26), ("ce_120", 5, 119.98)])
def test_ensembles_collapse_from_the_last_rate_of_each_cycle(capsys, name, members, epochs):
    found = csv_of_plan(capsys, f"collapsed_ensemble/{name}.flags")
    assert len(found["lr"]) * 4096 / IMAGENET == pytest.approx(epochs, abs=0.01)
    names, first = np.unique(found["phase"], return_index=True)
    begins = dict(zip(names, first))
    collapses = ["one", "two", "three", "four", "five"][:members]
    for number, collapse in enumerate(collapses, 1):
        assert found["lr"][begins[collapse]] == pytest.approx(found["lr"][begins[collapse] - 1], rel=0.02)
        assert found["weight_decay"][begins[collapse]] == 2e-4 and found["augment"][begins[collapse]] == "light"
        assert found["phase"][begins[collapse] - 1] == f"cyc{number}"


@pytest.mark.parametrize(
    "batch, peak, warmup",
    [
        (1632, 7.4, 2),
        (3264, 10.5, 2),
        (4096, 10, 5),
        (8192, 17, 5),
        (13056, 12.8, 9),
        (32768, 21.2, 16),
        (49152, 19.405, 24),
        (58880, 23.246, 29),
        (65536, 24.699, 31),
    ],
)
def test_lars_points_decay_to_the_final_rate_within_the_epochs_of_the_reference(capsys, batch, peak, warmup):
    found = csv_of_plan(capsys, f"lr_scaling/mlperf_lars_{batch}.flags", "--ranks=1")
    text = (ROOT / "experiments" / "published.csv").read_text()
    row = next(line for line in text.splitlines() if line.startswith(f"mlperf_{batch},"))
    most = float(row.split(",")[2].split("-")[1])
    assert most - 0.5 <= found["epoch"][-1] <= most + 4
    assert 1e-4 <= found["lr"][-1] < 1e-3
    assert found["lr"].max() == peak and found["epoch"][np.argmax(found["lr"])] == pytest.approx(warmup, abs=0.03)


def test_negative_control_another_constant_gives_another_curve(capsys):
    other = "--phase=cyc2:steps=4750,lr=0.765,power=2,decay_steps=7500,warmup_steps=1000,warmup_lr=0.255,wd=5e-5"
    found = csv_of_plan(capsys, "collapsed_ensemble/recipe_b.flags", other)
    rates = np.concatenate([solver(*row[1:7]) for row in B])
    assert np.abs(found["lr"] / np.maximum(rates, 1e-12) - 1)[:-1].max() > 1e-3
