"""Ladders of runs: efficiencies with known answers, their intervals, and runs that cannot be compared."""

import dataclasses

import numpy as np
import pytest

from resnet_cpu.errors import DataError
from resnet_cpu.scaling import ladders
from resnet_cpu.scaling.ladders import LadderRun
from resnet_cpu.scaling.steptimes import PARTS


def run_of(ranks, step_s, batch="rep-0", images=None, **more):
    return LadderRun(
        name=f"{batch}/ranks-{ranks}",
        batch=batch,
        ranks=ranks,
        hosts=1,
        images=images or 32 * ranks,
        block_s=tuple(np.broadcast_to(step_s, [4])),
        split_s=dict.fromkeys(PARTS, 0.2),
        conditions={"code": "c", "flags": "f", **more},
    )


def test_weak_efficiency_with_known_answers():
    base, two, four = ladders.ladder([run_of(4, 1.25), run_of(1, 1.0), run_of(2, 1.0)])
    assert (base.ranks, base.efficiency, base.interval, base.rate) == (1, 1.0, None, 32.0)
    assert (two.efficiency, two.speedup, two.rate) == (1.0, 2.0, 64.0)
    assert four.efficiency == pytest.approx(0.8) and four.interval == pytest.approx((0.8, 0.8))
    assert four.shares == dict.fromkeys(PARTS, 0.2) and four.rate_sd is None
    assert ladders.kind([run_of(1, 1.0), run_of(2, 1.0)]) == "weak"


def test_strong_efficiency_over_a_base_of_several_ranks():
    runs = [run_of(2, 1.0, images=64), run_of(8, 0.5, images=64)]
    assert ladders.kind(runs) == "strong"
    rung = ladders.ladder(runs)[1]
    assert (rung.speedup, rung.efficiency) == (2.0, 0.5)


def test_a_rate_is_compared_with_the_base_of_its_own_batch():
    """The machine is half as fast in the second batch: the rates change, their ratios do not."""
    runs = [run_of(1, 1.0), run_of(2, 1.25), run_of(1, 2.0, "rep-1"), run_of(2, 2.5, "rep-1")]
    rung = ladders.ladder(runs)[1]
    assert rung.efficiency == pytest.approx(0.8) and rung.interval == pytest.approx((0.8, 0.8))
    assert rung.runs == 2 and rung.rate_sd == pytest.approx(np.std([51.2, 25.6], ddof=1))


def test_the_interval_grows_with_the_spread_of_steps_and_of_batches():
    uneven = run_of(2, [0.8, 1.0, 1.2, 1.0])
    low, high = ladders.ladder([run_of(1, 1.0), uneven])[1].interval
    assert 0.8 < low < 0.95 < 1.05 < high < 1.2
    batches = [run_of(1, 1.0), run_of(2, 1.0), run_of(1, 1.0, "b"), run_of(2, 1.25, "b")]
    low, high = ladders.ladder(batches)[1].interval
    assert (low, high) == pytest.approx((0.8, 1.0))


@pytest.mark.parametrize(
    "other, part",
    [
        (run_of(2, 1.0, code="other"), "differ in code (rep-0/ranks-1: c, rep-0/ranks-2: other)"),
        (run_of(2, 1.0, flags="other"), "differ in flags"),
        (run_of(2, 1.0, "rep-9"), "its batch rep-9 has no run on 1 ranks, the base"),
        (run_of(1, 1.0), "a second run on 1 ranks in batch rep-0"),
        (run_of(2, 1.0, images=48), "neither the same images per rank nor the same global batch"),
        (dataclasses.replace(run_of(1, 1.0, "rep-1"), hosts=2), "different numbers of hosts"),
    ],
)
def test_unlike_runs_are_refused(other, part):
    with pytest.raises(DataError) as caught:
        ladders.ladder([run_of(1, 1.0), other])
    assert part in str(caught.value) and "\n" not in str(caught.value)
