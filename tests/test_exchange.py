"""A training step as events: the background thread of Horovod, limits, parts of a step, and the slowest rank."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resnet_cpu.model import tensors
from resnet_cpu.simulator import exchange, network
from resnet_cpu.simulator.exchange import Exchange, Node
from resnet_cpu.simulator.network import Allocation, Network

LINK = Network("a", latency_s=3e-6, bandwidth=2e9, memory_latency_s=5e-7, memory_bandwidth=8e9, reduce_s_per_byte=1e-10)
FREE = Network("free", 0.0, math.inf, 0.0, math.inf, 0.0)
GRADIENTS = tensors.gradients("resnet18", width=0.5)


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(0, 100))
@settings(max_examples=100, deadline=None)
def test_fusion_takes_tensors_in_order_as_long_as_they_fit(sizes, threshold):
    expected, rest = [], list(sizes)
    while rest:  # one buffer at a time, as in FuseResponses
        total, count = rest.pop(0), 1
        while rest and total + rest[0] <= threshold:
            total, count = total + rest.pop(0), count + 1
        expected.append((total, count))
    assert exchange.fuse(sizes, threshold) == expected


@given(
    gaps=st.lists(st.integers(0, 40), min_size=1, max_size=20),
    sizes=st.lists(st.integers(1, 30), min_size=20, max_size=20),
    cycle=st.integers(1, 10),
    negotiation=st.integers(0, 12),
    threshold=st.integers(0, 60),
)
@settings(max_examples=150, deadline=None)
def test_exchange_equals_the_background_loop_step_by_step(gaps, sizes, cycle, negotiation, threshold):
    """Run every cycle of RunLoopOnce, also those without ready tensors, in whole milliseconds."""
    ready, sizes = list(itertools.accumulate(gaps)), sizes[: len(gaps)]
    waiting, clock, end, sent = list(zip(ready, sizes)), 0, 0, []
    while waiting:
        found = [size for moment, size in waiting if moment <= clock]
        waiting = waiting[len(found) :]
        now = clock + negotiation
        for size, _ in exchange.fuse(found, threshold):
            now += 2 + size
            sent.append(size)
            end = now
        clock = max(clock + cycle, now)
    horovod = Exchange(cycle_s=cycle, wake_s=0.0, fusion_bytes=threshold)
    cost = lambda size, copied: 2.0 + size
    assert exchange.exchange_end(ready, sizes, ready[-1], cost, horovod, negotiation) == (end, sent)


@given(
    gaps=st.lists(st.floats(0, 1), min_size=1, max_size=20),
    costs=st.lists(st.floats(0, 1), min_size=20, max_size=20),
    more=st.floats(0, 1),
)
@settings(max_examples=100, deadline=None)
def test_slower_messages_never_end_a_step_sooner(gaps, costs, more):
    """Without fusion and cycles; with them a later start can find more to fuse and end sooner."""
    ready = list(itertools.accumulate(gaps))
    plain = Exchange(cycle_s=0.0, fusion_bytes=0)
    sizes = list(range(len(gaps)))
    ends = [
        exchange.exchange_end(ready, sizes, ready[-1], lambda size, _, x=x: costs[size] + x, plain, 0.0)[0]
        for x in (0.0, more)
    ]
    assert ready[-1] <= ends[0] <= ends[1] + 1e-9
    assert ends[0] <= ready[-1] + sum(costs[: len(gaps)]) + 1e-9


def test_interference_stretches_the_remaining_compute():
    plain = Exchange(cycle_s=0.0, fusion_bytes=0)
    # From 1 s a message of 2 s takes half of the cores: at 3 s one second is computed, the last tensor is ready at 4 s.
    end, _ = exchange.exchange_end([1.0, 3.0], [1, 1], 3.0, lambda size, _: 2.0, plain, 0.0, interference=0.5)
    assert end == pytest.approx(6.0)
    assert exchange.exchange_end([1.0, 3.0], [1, 1], 3.0, lambda size, _: 2.0, plain, 0.0)[0] == pytest.approx(5.0)
    # A message after the end of compute does not stretch it.
    assert exchange.exchange_end([3.0], [1], 3.0, lambda size, _: 2.0, plain, 0.0, interference=0.5)[0] == 5.0


def test_limits():
    node = Node(image_s=0.01, fixed_s=0.02)
    alone = exchange.step(GRADIENTS, 32, node, Allocation(1), LINK, Exchange())
    assert alone.total == pytest.approx(32 * 0.01 + 0.02) and alone.messages == 0
    one, many = (exchange.step(GRADIENTS, 32, node, Allocation(n, 2), FREE, Exchange(cycle_s=0.0)) for n in (1, 1000))
    assert one.total / many.total == pytest.approx(1, abs=1e-12)
    assert many.total == pytest.approx(0.34)
    # Without compute every message is exposed.
    bare = exchange.step(GRADIENTS, 0, Node(0.01), Allocation(8), LINK, Exchange(cycle_s=0.0, negotiated=False))
    total = sum(tensor.bytes for tensor in GRADIENTS)
    assert bare.messages == 1
    assert bare.total == pytest.approx(
        network.allreduce(total, Allocation(8), LINK) + 2 * total / LINK.memory_bandwidth
    )


def test_parts_of_a_step_add_up():
    node = Node(image_s=0.001, jitter=0.05, input_images_per_s=1000.0)
    slow = dataclasses.replace(LINK, bandwidth=2e8)
    found = exchange.step(GRADIENTS, 8, node, Allocation(16, 2), slow, Exchange(cycle_s=0.05))
    parts = (found.compute, found.jitter, found.allreduce, found.coordinator, found.input)
    assert min(parts) >= 0 and found.total == pytest.approx(sum(parts))
    starved = dataclasses.replace(node, input_images_per_s=4.0)
    starved_step = exchange.step(GRADIENTS, 8, starved, Allocation(16, 2), slow, Exchange(cycle_s=0.05))
    assert starved_step.total == pytest.approx(2.0) and starved_step.input == pytest.approx(2.0 - found.total)
    assert found.jitter == pytest.approx(0.008 * (exchange.slowest(0.05, 32) - 1))
    fed = exchange.step(
        GRADIENTS, 8, dataclasses.replace(node, input_images_per_s=None), Allocation(16, 2), slow, Exchange()
    )
    assert fed.input == 0 and fed.allreduce > 0.05


def test_postponed_kernels_hide_less():
    node, slow = Node(image_s=0.05), dataclasses.replace(LINK, bandwidth=2e8)
    exposed = [
        exchange.step(tensors.gradients(inter_op_threads=threads), 32, node, Allocation(8), slow, Exchange()).allreduce
        for threads in (1, 2)
    ]
    assert exposed[0] > 5 * exposed[1]


def test_negotiation_grows_slowly_with_ranks_if_cached():
    cached, plain = Exchange(), Exchange(cached=False)
    few, many = Allocation(8), Allocation(1024)
    assert exchange.negotiation(Allocation(1), LINK, cached, 161) == 0
    assert exchange.negotiation(few, LINK, Exchange(negotiated=False), 161) == 0
    bits = 3 * LINK.latency_s + 3 * 24 * (1 / LINK.bandwidth + LINK.reduce_s_per_byte)  # 164 bits: three words
    assert exchange.negotiation(few, LINK, cached, 161) == pytest.approx(bits)
    assert exchange.negotiation(many, LINK, cached, 161) == pytest.approx(bits * 10 / 3)
    assert exchange.negotiation(many, LINK, plain, 161) == pytest.approx(40 * LINK.latency_s + 1023 * plain.request_s)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_slowest_of_measured_times_is_the_mean_over_all_draws(count):
    times = (1.0, 1.5, 1.1, 4.0)
    draws = [max(draw) for draw in itertools.product(times, repeat=count)]
    assert exchange.slowest(times, count) == pytest.approx(np.mean(draws) / np.mean(times))


def test_slowest_of_a_lognormal():
    assert exchange.slowest(0.1, 1) == exchange.slowest(0.0, 1000) == 1
    for deviation in (0.02, 0.3):  # of two: 2 Phi(s / sqrt 2)
        assert exchange.slowest(deviation, 2) == pytest.approx(1 + math.erf(deviation / 2), rel=1e-4)
    generator = np.random.Generator(np.random.Philox(3))
    draws = np.exp(0.1 * generator.standard_normal([4000, 500]) - 0.005).max(1)
    assert abs(exchange.slowest(0.1, 500) - draws.mean()) < 4 * draws.std() / math.sqrt(4000)
    ladder = [exchange.slowest(0.05, count) for count in (1, 2, 10, 100, 3000, 100_000)]
    assert ladder == sorted(set(ladder))


def test_jitter_of_measured_steps():
    generator = np.random.Generator(np.random.Philox(1))
    assert exchange.fit_jitter(np.exp(0.04 * generator.standard_normal(20_000))) == pytest.approx(0.04, rel=0.03)
