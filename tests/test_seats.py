"""Where the ranks of a job sit, and the warnings about it."""

import pytest

from resnet_cpu.cluster import seats


def rows(hosts=2, ranks=2, cores=24, threads=22, **more):
    return [
        {
            "host": f"c{host:03}",
            "cpus": list(range(cores * rank, cores * (rank + 1))),
            "cores": cores,
            "threads": threads,
            **more,
        }
        for host in range(hosts)
        for rank in range(ranks)
    ]


def test_896_equal_seats_take_one_line():
    assert seats.describe(rows(hosts=448)) == [
        "448 hosts x 2 ranks, 24 cores and 22 threads each: rank 0 of a host on CPUs 0-23, rank 1 on CPUs 24-47"
    ]
    assert seats.warnings(rows(hosts=448)) == []


def test_hosts_with_different_seats_have_lines_of_their_own():
    mixed = [*rows(hosts=3), *[{**row, "host": "x"} for row in rows(hosts=1, ranks=1, cores=16, threads=16)]]
    lines = seats.describe(mixed)
    assert lines[0].startswith("3 hosts x 2 ranks, 24 cores and 22 threads each: ")
    assert lines[1] == "host x, 1 rank, 16 cores and 16 threads each: rank 0 on CPUs 0-15"
    many = seats.describe(rows(hosts=1, ranks=16, cores=4, threads=4))[0]
    assert "rank 6 on CPUs 24-27, ..., rank 15 on CPUs 60-63" in many and "rank 7" not in many
    unbound = seats.describe(
        [{"host": "a", "cpus": [0, 1, 2, 3], "cores": 2, "threads": 2} for _ in range(2)],
    )
    assert unbound == ["host a, 2 ranks, 2 cores and 2 threads each: all on CPUs 0-3, unbound"]
    each_other = [{"host": f"h{i}", "cpus": [i], "cores": 1, "threads": 1} for i in range(50)]
    assert len(seats.describe(each_other)) == 5 and "46 more hosts" in seats.describe(each_other)[-1]


@pytest.mark.parametrize(
    "seen, expected",
    [
        (rows(hosts=1, threads=48), ["c000: 2 ranks with 96 threads on 48 cores"]),
        (rows(hosts=3, threads=25), ["c000 and 2 more hosts: 2 ranks with 50 threads on 48 cores"]),
        (
            rows(hosts=1, ranks=2, cores=1, threads=24),
            ["2 of 2 ranks are bound to one CPU and compute with 24 threads"],
        ),
        ([*rows(hosts=2), *[{**row, "host": "x"} for row in rows(hosts=1, ranks=1)]], ["(1 on 1 host, 2 on 2 hosts)"]),
        (rows(hosts=1)[:1] + rows(hosts=1, threads=12)[1:], ["ranks compute with 12 to 22 threads"]),
        (rows(hosts=1, cores=1, threads=1, host_cpus=96), ["ranks may use 2 of 96 CPUs"]),
        ([{"host": "a", "cpus": [0, 1], "cores": 1, "threads": 1}] * 3, ["3 ranks with 3 threads on 2 cores"]),
        (rows(hosts=2, omp=1), ["c000 and 1 more hosts: OMP_NUM_THREADS=1, TF_NUM_INTRAOP_THREADS=22"]),
    ],
)
def test_warnings(seen, expected):
    found = seats.warnings(seen)
    assert len(found) == len(expected), found
    for line, part in zip(found, expected):
        assert part in line


def test_negative_control_healthy_seats_raise_no_warning():
    assert seats.warnings(rows()) == [] and seats.warnings(rows(host_cpus=96, omp=22)) == []
    assert seats.warnings([{"host": "a", "cpus": [0, 1], "cores": 1, "threads": 1}] * 2) == []  # unbound, but enough
