"""The cost of collectives: closed forms, the choices of Open MPI, and that a worse network is never faster."""

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resnet_cpu.simulator import network
from resnet_cpu.simulator.network import Allocation, Network

LINK = Network("a", latency_s=3e-6, bandwidth=2e9, memory_latency_s=5e-7, memory_bandwidth=8e9, reduce_s_per_byte=1e-10)
SIZE = 1e6


@pytest.mark.parametrize("nodes", [2, 4, 64])
def test_closed_forms_with_one_rank_per_node(nodes):
    allocation, alpha, beta, gamma = Allocation(nodes), LINK.latency_s, 1 / LINK.bandwidth, LINK.reduce_s_per_byte
    rounds, part = math.log2(nodes), (nodes - 1) / nodes * SIZE
    assert network.ring(SIZE, allocation, LINK) == pytest.approx(
        2 * (nodes - 1) * alpha + 2 * part * beta + part * gamma
    )
    assert network.recursive_doubling(SIZE, allocation, LINK) == pytest.approx(rounds * (alpha + SIZE * (beta + gamma)))
    assert network.rabenseifner(SIZE, allocation, LINK) == pytest.approx(
        2 * rounds * alpha + 2 * part * beta + part * gamma
    )
    assert network.hierarchical(SIZE, allocation, LINK) == network.allreduce(SIZE, allocation, LINK)


def test_ranks_of_a_node_share_its_interface():
    allocation, gamma = Allocation(4, 4), SIZE * LINK.reduce_s_per_byte
    inside = LINK.memory_latency_s + SIZE / LINK.memory_bandwidth
    between = LINK.latency_s + 4 * SIZE / LINK.bandwidth
    assert network.recursive_doubling(SIZE, allocation, LINK) == pytest.approx(2 * inside + 2 * between + 4 * gamma)
    leaders = network.allreduce(SIZE, Allocation(4), LINK)
    assert network.hierarchical(SIZE, allocation, LINK) == pytest.approx(2 * (2 * inside + gamma) + leaders)
    part = SIZE / 16  # a ring sends one message at a time over the interface
    hop = max(LINK.latency_s + part / LINK.bandwidth, LINK.memory_latency_s + part / LINK.memory_bandwidth)
    assert network.ring(SIZE, allocation, LINK) == pytest.approx(30 * hop + 15 * part * LINK.reduce_s_per_byte)
    assert network.ring(SIZE, Allocation(1, 2), LINK) == pytest.approx(
        2 * (LINK.memory_latency_s + SIZE / 2 / LINK.memory_bandwidth) + SIZE / 2 * LINK.reduce_s_per_byte
    )


@pytest.mark.parametrize(
    "ranks, size, chosen",
    [
        (2, 4095, network.recursive_doubling),
        (3, 65_536, network.ring),
        (3, 262_144, network.rabenseifner),
        (4, 4096, network.recursive_doubling),
        (4, 65_536, network.rabenseifner),
        (3000, 3000, network.ring),
        (5000, 40_000, network.rabenseifner),
    ],
)
def test_choices_of_open_mpi(ranks, size, chosen):
    openmpi = dataclasses.replace(LINK, algorithm="openmpi")
    assert network.allreduce(size, Allocation(ranks), openmpi) == chosen(size, Allocation(ranks), LINK)


def test_ranks_past_a_power_of_two_cost_two_or_three_more_messages():
    bytes_s, gamma = 2 * SIZE / LINK.bandwidth, SIZE * LINK.reduce_s_per_byte
    for cost, extra in (
        (network.recursive_doubling, 2 * LINK.latency_s + bytes_s + gamma),
        (network.rabenseifner, 3 * LINK.latency_s + bytes_s + gamma / 2),  # exchanged halves, one sum, the result
    ):
        # The sizes of Rabenseifner's parts depend only on the power of two.
        assert cost(SIZE, Allocation(7), LINK) == pytest.approx(cost(SIZE, Allocation(4), LINK) + extra)


@given(
    size=st.floats(1, 1e9),
    nodes=st.integers(1, 3000),
    ranks=st.integers(1, 8),
    worse=st.floats(1, 100),
    algorithm=st.sampled_from(["best", "openmpi", *network.ALGORITHMS]),
)
@settings(max_examples=100, deadline=None)
def test_a_worse_network_is_never_faster(size, nodes, ranks, worse, algorithm):
    base, allocation = dataclasses.replace(LINK, algorithm=algorithm), Allocation(nodes, ranks)
    seconds = network.allreduce(size, allocation, base)
    assert seconds > 0 or allocation.ranks == 1
    for field, value in (
        ("latency_s", worse * base.latency_s),
        ("memory_latency_s", worse * base.memory_latency_s),
        ("reduce_s_per_byte", worse * base.reduce_s_per_byte),
        ("bandwidth", base.bandwidth / worse),
        ("memory_bandwidth", base.memory_bandwidth / worse),
    ):
        assert network.allreduce(size, allocation, dataclasses.replace(base, **{field: value})) >= seconds * (1 - 1e-12)
    if algorithm != "openmpi":  # its choice for a size is not always the fastest
        assert network.allreduce(size * worse, allocation, base) >= seconds * (1 - 1e-12)
