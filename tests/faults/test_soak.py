"""A short soak: memory from epoch to epoch. The long one, with its stricter limit, is tests/faults/soak.py."""

import pytest
import soak

pytestmark = pytest.mark.training
MOST_MIB = 5.0  # per epoch; over so few epochs the line is less certain than in the long soak


def test_memory_hardly_grows_from_epoch_to_epoch(tmp_path):
    seen = soak.soak(str(tmp_path), ranks=1, epochs=8)
    assert seen["code"] == 0, seen["log"]
    assert seen["evaluations"] == 9 and seen["sampled"] >= 4  # 8 epochs, and the end of the last phase
    assert all(slope < MOST_MIB for slope in seen["mib_per_epoch"])


def test_negative_control_growth_is_seen_for_each_process():
    samples = [{1: 600.0 + 7 * epoch, 2: 600.0 + epoch % 2} for epoch in range(8)]
    growing, steady = sorted(soak.slopes(samples), reverse=True)
    assert growing == pytest.approx(7.0) and growing > MOST_MIB > steady
