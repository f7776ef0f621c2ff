"""Step times of a run: the split with known answers, rates with their intervals, and which steps count."""

import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resnet_cpu.cluster.control import World
from resnet_cpu.run.folder import RunFolder
from resnet_cpu.scaling import steptimes
from resnet_cpu.scaling.steptimes import StepTimes
from resnet_cpu.training import modes


def times_of(*ranks, steps=1):
    """Return [ranks, steps, 4] of ranks given as (between, data, compute, update) seconds."""
    return np.repeat(np.array(ranks, float)[:, None], steps, axis=1)


def test_the_split_of_a_step_with_known_answers():
    """The second rank is ready at 4.5 s, the first at 3 s: the first waits 1.5 s, and the rest are messages."""
    parts = steptimes.split(times_of((0.0, 1.0, 2.0, 2.0), (0.5, 1.0, 3.0, 0.5)))
    assert {name: part[:, 0].tolist() for name, part in parts.items()} == {
        "between": [0.0, 0.5],
        "data": [1.0, 1.0],
        "compute": [2.0, 3.0],
        "peers": [1.5, 0.0],
        "messages": [0.5, 0.5],
    }


def test_who_waits_may_change_from_step_to_step_and_one_rank_never_waits():
    times = np.array([[[0, 0, 1, 3], [0, 0, 3, 1]], [[0, 0, 3, 1], [0, 0, 1, 3]]], float)
    assert steptimes.split(times)["peers"].tolist() == [[2, 0], [0, 2]]
    assert steptimes.split(times[:1])["peers"].tolist() == [[0, 0]]


def test_a_rank_waits_no_longer_than_the_time_after_its_last_gradient():
    parts = steptimes.split(times_of((0, 0, 1.0, 0.25), (0, 0, 2.0, 0.25)))  # clocks of real ranks do not show this
    assert parts["peers"].tolist() == [[0.25], [0.0]] and (parts["messages"] >= 0).all()


@given(st.lists(st.lists(st.floats(0, 10), min_size=4, max_size=4), min_size=1, max_size=5))
def test_the_parts_add_up_to_the_step_and_none_is_negative(ranks):
    times = times_of(*ranks, steps=2)
    parts = steptimes.split(times)
    assert all((part >= 0).all() for part in parts.values())
    np.testing.assert_allclose(sum(parts.values()), times.sum(-1), atol=1e-12)
    assert parts["peers"].min(0).max() == 0  # one rank is last


@pytest.fixture(autouse=True)
def one_untimed_step(monkeypatch):
    monkeypatch.setattr(steptimes, "UNTIMED_STEPS", 1)


def filled(steps=6, pause_before=()):
    clock, times = 100.0, StepTimes()
    for step in range(steps):
        if step in pause_before:
            times.pause()
            clock += 50.0
        times.add(step, clock + 0.25, data_s=0.5, update_s=1.0, step_s=4.0)
        clock += 4.25
    return times.kept()


def test_steps_are_counted_from_the_end_of_the_one_before():
    steps, rows = filled()
    assert steps.tolist() == [1, 2, 3, 4, 5]
    np.testing.assert_allclose(rows, [[0.25, 0.5, 2.5, 1.0]] * 5)


def test_untimed_steps_and_those_after_a_pause_do_not_count(monkeypatch):
    steps, rows = filled(pause_before=(3,))
    assert steps.tolist() == [1, 2, 4, 5] and rows.max() < 5  # none holds the 50 s of the pause
    monkeypatch.setattr(steptimes, "UNTIMED_STEPS", 3)
    assert filled()[0].tolist() == [3, 4, 5]
    monkeypatch.setattr(steptimes, "UNTIMED_STEPS", 9)
    assert filled()[0].tolist() == []


def test_memory_is_bounded_and_the_latest_steps_are_kept(monkeypatch):
    monkeypatch.setattr(steptimes, "KEPT", 3)
    assert filled(steps=8)[0].tolist() == [5, 6, 7]


def test_a_summary_names_the_rate_and_the_slowest():
    times = times_of((0, 0, 1, 1), (0, 0, 1.5, 0.5), (0, 0, 1, 1), (0, 0, 1, 1), steps=40)
    found = steptimes.summary(times, 64, ["a", "b", "b", "a"])
    assert found["images_per_second"] == 32 and found["images_per_second_per_rank"] == 8
    assert found["interval"] == [32, 32] and found["images_per_second_sd"] == 0  # steps do not differ
    assert found["slowest_rank"] == {"rank": 1, "host": "b", "times_median": 1.5}
    assert found["slowest_host"]["host"] == "b" and found["hosts"] == 2
    assert sum(found["split_s"].values()) == pytest.approx(2) and found["split_s"]["peers"] == 0.375
    rate, shares, slowest = steptimes.lines(found)
    assert "32.0 images/s" in rate and "peers 18.8 %" in shares and "rank 1 on b, 1.500 times" in slowest
    ranks = steptimes.per_rank(times, ["a", "b", "b", "a"])["ranks"]
    assert [row["last"] for row in ranks] == [0, 1, 0, 0] and ranks[1]["own_work_s"]["median"] == 1.5
    assert all(sum(row["histogram"]) == 40 for row in ranks)


def test_one_rank_and_one_step_are_reported_without_interval_or_slowest_rank():
    found = steptimes.summary(times_of((0, 0.5, 1, 0.5)), 8, ["a"])
    assert found["interval"] is None and found["images_per_second_sd"] is None and found["images_per_second"] == 4
    assert len(steptimes.lines(found)) == 2 and "interval" not in steptimes.lines(found)[0]
    assert sum(steptimes.per_rank(times_of((0, 0.5, 1, 0.5)), ["a"])["ranks"][0]["histogram"]) == 1


def test_the_interval_of_a_rate_has_its_nominal_coverage():
    """Steps of 0.1 s ± 20 %: 95 % of the intervals should hold the true rate; with 20 blocks a few less do."""
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        low, high = steptimes.rate_interval(10, generator.normal(0.1, 0.02, 20))
        hits += low <= 100 <= high
    assert 0.88 <= hits / 200 <= 0.98


def scaling_job(folder, ranks):
    """Return what `modes` uses of a job in --experiment=scaling, on rank 0 of `ranks` ranks that do the same."""

    class Same(World):
        def gather(self, message):
            return [message] * self.size

        def collect(self, rows):
            return np.repeat(rows, self.size, axis=0)

        def on_rank0(self, work):
            return work()

    run = types.SimpleNamespace(experiment="scaling")
    settings = types.SimpleNamespace(run=run, resolved_flags="# A comment.\n--seed=0\n")
    batch = types.SimpleNamespace(total=8)
    return types.SimpleNamespace(
        settings=settings, world=Same(ranks, 0), batch=batch, folder=folder, run_dir=folder.path, attempt=1
    )


def test_an_attempt_that_timed_fewer_steps_does_not_replace_the_measurement(tmp_path, capsys):
    """Fault: the steps before an interruption were forgotten; what was measured on other ranks was reported."""

    def measured(ranks, steps):
        job, step_times = scaling_job(folder, ranks), steptimes.StepTimes()
        for step in range(steps):
            step_times.add(step, float(step), 0.1, 0.1, 1.0)
        modes.record(job, step_times)
        found = modes.additions(job).get("scaling")
        return found and (found["ranks"], found["timed_steps"])

    folder = RunFolder(str(tmp_path / "run"))
    try:
        assert measured(2, 1) is None and "no step was timed" in capsys.readouterr().err
        assert measured(2, 21) == (2, 20)
        written = steptimes.read(folder.path, 2)
        assert written["flags"] == ["--seed=0"] and written["cores"] == 2 * World(2, 0).cores
        assert measured(2, 1) == measured(2, 15) == (2, 20)
        assert measured(2, 31) == (2, 30) and not capsys.readouterr().err
        assert measured(4, 1) is None and "no step was timed" in capsys.readouterr().err
        assert measured(4, 6) == (4, 5)
    finally:
        folder.close()
