"""Text for people: durations, counts, aligned columns."""

import pytest

from resnet_cpu.text import aligned, count, duration, shown_loss


@pytest.mark.parametrize("seconds, text", [(0.4, "0s"), (59.4, "59s"), (250, "4m10s"), (7500, "2h05m")])
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_counts_of_one_and_of_more():
    assert [count(1, "rank"), count("1", "core"), count(0, "rank"), count(2, "node")] == [
        *("1 rank", "1 core", "0 ranks", "2 nodes"),
    ]


@pytest.mark.parametrize(
    "value, shown",
    [
        (2.44382, "2.4438"),
        (362.03, "362.0300"),
        (2.38569e36, "2.386e+36"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
    ],
)
def test_losses(value, shown):
    assert shown_loss(value) == shown


def test_columns_are_aligned_without_trailing_blanks():
    rows = [["a", "long title"], ["longer", "1"]]
    assert aligned(rows) == ["     a  long title", "longer           1"]
    assert aligned(rows, str.ljust) == ["a       long title", "longer  1"]
