"""Step times of ranks: the split with known answers, rates with their intervals, ladders and what they refuse."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resnet_cpu.errors import DataError
from resnet_cpu.scaling import steptimes as throughput
from resnet_cpu.scaling.steptimes import PARTS, Run, StepTimes


def times_of(*ranks, steps=1):
    """Return [ranks, steps, 4] of ranks given as (between, data, compute, update) seconds."""
    return np.repeat(np.array(ranks, float)[:, None], steps, axis=1)


def test_the_split_of_a_step_with_known_answers():
    """The second rank is ready at 4.5 s, the first at 3 s: the first waits 1.5 s, and the rest are messages."""
    parts = throughput.split(times_of((0.0, 1.0, 2.0, 2.0), (0.5, 1.0, 3.0, 0.5)))
    assert {name: part[:, 0].tolist() for name, part in parts.items()} == {
        "between": [0.0, 0.5],
        "data": [1.0, 1.0],
        "compute": [2.0, 3.0],
        "peers": [1.5, 0.0],
        "messages": [0.5, 0.5],
    }


def test_who_waits_may_change_from_step_to_step_and_one_rank_never_waits():
    times = np.array([[[0, 0, 1, 3], [0, 0, 3, 1]], [[0, 0, 3, 1], [0, 0, 1, 3]]], float)
    assert throughput.split(times)["peers"].tolist() == [[2, 0], [0, 2]]
    assert throughput.split(times[:1])["peers"].tolist() == [[0, 0]]


def test_a_rank_waits_no_longer_than_it_was_behind_its_last_gradient():
    parts = throughput.split(times_of((0, 0, 1.0, 0.25), (0, 0, 2.0, 0.25)))  # no clocks of real ranks say so
    assert parts["peers"].tolist() == [[0.25], [0.0]] and (parts["messages"] >= 0).all()


@given(st.lists(st.lists(st.floats(0, 10), min_size=4, max_size=4), min_size=1, max_size=5))
def test_the_parts_make_up_the_step_and_none_is_negative(ranks):
    times = times_of(*ranks, steps=2)
    parts = throughput.split(times)
    assert all((part >= 0).all() for part in parts.values())
    np.testing.assert_allclose(sum(parts.values()), times.sum(-1), atol=1e-12)
    assert parts["peers"].min(0).max() == 0  # somebody is last


def filled(untimed=1, steps=6, pause_before=()):
    clock, times = 100.0, StepTimes(untimed)
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


def test_untimed_steps_and_those_after_a_pause_do_not_count():
    assert filled(untimed=3)[0].tolist() == [3, 4, 5]
    steps, rows = filled(pause_before=(3,))
    assert steps.tolist() == [1, 2, 4, 5] and rows.max() < 5  # the 50 s of the pause are in none
    assert filled(untimed=9)[0].tolist() == []


def test_memory_is_bounded_and_the_latest_steps_are_kept(monkeypatch):
    monkeypatch.setattr(throughput, "KEPT", 3)
    assert filled(steps=8)[0].tolist() == [5, 6, 7]


def test_a_summary_names_the_rate_and_the_slowest():
    times = times_of((0, 0, 1, 1), (0, 0, 1.5, 0.5), (0, 0, 1, 1), (0, 0, 1, 1), steps=40)
    found = throughput.summary(times, 64, ["a", "b", "b", "a"])
    assert found["images_per_second"] == 32 and found["images_per_second_per_rank"] == 8
    assert found["interval"] == [32, 32] and found["images_per_second_sd"] == 0  # steps do not differ
    assert found["slowest_rank"] == {"rank": 1, "host": "b", "times_median": 1.5}
    assert found["slowest_host"]["host"] == "b" and found["hosts"] == 2
    assert sum(found["split_s"].values()) == pytest.approx(2) and found["split_s"]["peers"] == 0.375
    told = throughput.lines(found)
    assert "32.0 images/s" in told[0] and "peers 18.8 %" in told[1] and "rank 1 on b, 1.500 times" in told[2]
    ranks = throughput.per_rank(times, ["a", "b", "b", "a"])["ranks"]
    assert [row["last"] for row in ranks] == [0, 1, 0, 0] and ranks[1]["own_work_s"]["median"] == 1.5
    assert all(sum(row["histogram"]) == 40 for row in ranks)


def test_one_rank_and_one_step_are_told_without_what_they_cannot_say():
    found = throughput.summary(times_of((0, 0.5, 1, 0.5)), 8, ["a"])
    assert found["interval"] is None and found["images_per_second_sd"] is None and found["images_per_second"] == 4
    assert len(throughput.lines(found)) == 2 and "interval" not in throughput.lines(found)[0]
    assert sum(throughput.per_rank(times_of((0, 0.5, 1, 0.5)), ["a"])["ranks"][0]["histogram"]) == 1


def test_the_interval_of_a_rate_holds_the_truth_as_often_as_it_says():
    """Steps of 0.1 s ± 20 %: 95 % of intervals should hold the truth; of 20 blocks somewhat fewer do."""
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        low, high = throughput.rate_interval(10, generator.normal(0.1, 0.02, 20))
        hits += low <= 100 <= high
    assert 0.88 <= hits / 200 <= 0.98


# --- ladders -------------------------------------------------------------------------------------------------------


def run_of(ranks, step_s, batch="rep-0", images=None, **more):
    return Run(
        name=f"{batch}/ranks-{ranks}",
        batch=batch,
        ranks=ranks,
        hosts=1,
        images=images or 32 * ranks,
        block_s=tuple(np.broadcast_to(step_s, [4])),
        split_s=dict.fromkeys(PARTS, 0.2),
        alike={"code": "c", "flags": "f", **more},
    )


def test_weak_efficiency_with_known_answers():
    base, two, four = throughput.ladder([run_of(4, 1.25), run_of(1, 1.0), run_of(2, 1.0)])
    assert (base.ranks, base.efficiency, base.interval, base.rate) == (1, 1.0, None, 32.0)
    assert (two.efficiency, two.times, two.rate) == (1.0, 2.0, 64.0)
    assert four.efficiency == pytest.approx(0.8) and four.interval == pytest.approx((0.8, 0.8))
    assert four.shares == dict.fromkeys(PARTS, 0.2) and four.rate_sd is None
    assert throughput.kind([run_of(1, 1.0), run_of(2, 1.0)]) == "weak"


def test_strong_efficiency_over_a_base_of_several_ranks():
    runs = [run_of(2, 1.0, images=64), run_of(8, 0.5, images=64)]
    assert throughput.kind(runs) == "strong"
    rung = throughput.ladder(runs)[1]
    assert (rung.times, rung.efficiency) == (2.0, 0.5)


def test_a_rate_is_compared_with_the_base_of_its_own_batch():
    """The machine is half as fast in the second batch: ratios stand, though rates do not."""
    runs = [run_of(1, 1.0), run_of(2, 1.25), run_of(1, 2.0, "rep-1"), run_of(2, 2.5, "rep-1")]
    rung = throughput.ladder(runs)[1]
    assert rung.efficiency == pytest.approx(0.8) and rung.interval == pytest.approx((0.8, 0.8))
    assert rung.runs == 2 and rung.rate_sd == pytest.approx(np.std([51.2, 25.6], ddof=1))


def test_the_interval_grows_with_the_spread_of_steps_and_of_batches():
    uneven = run_of(2, [0.8, 1.0, 1.2, 1.0])
    low, high = throughput.ladder([run_of(1, 1.0), uneven])[1].interval
    assert 0.8 < low < 0.95 < 1.05 < high < 1.2
    batches = [run_of(1, 1.0), run_of(2, 1.0), run_of(1, 1.0, "b"), run_of(2, 1.25, "b")]
    low, high = throughput.ladder(batches)[1].interval
    assert (low, high) == pytest.approx((0.8, 1.0))


@pytest.mark.parametrize(
    "other, part",
    [
        (run_of(2, 1.0, code="other"), "differ in code (rep-0/ranks-1: c, rep-0/ranks-2: other)"),
        (run_of(2, 1.0, flags="other"), "differ in flags"),
        (run_of(2, 1.0, "rep-9"), "no run on 1 ranks, the base, in its batch rep-9"),
        (run_of(1, 1.0), "a second run on 1 ranks in batch rep-0"),
        (run_of(2, 1.0, images=48), "neither images a rank nor images a step"),
        (dataclasses.replace(run_of(1, 1.0, "rep-1"), hosts=2), "other numbers of hosts"),
    ],
)
def test_unlike_runs_are_refused(other, part):
    with pytest.raises(DataError) as caught:
        throughput.ladder([run_of(1, 1.0), other])
    assert part in str(caught.value) and "\n" not in str(caught.value)
