"""The simulator: closed forms, limits, loops written out, and what the command says of published points and replays."""

import csv
import dataclasses
import io
import itertools
import json
import math
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from conftest import OUTSIDE
from hypothesis import given, settings
from hypothesis import strategies as st

from resnet_cpu import flags, simulate
from resnet_cpu.errors import CheckpointError, DataError, FlagError
from resnet_cpu.model import tensors as layers
from resnet_cpu.recipe.batch import Batch
from resnet_cpu.simulator import exchange as simulator
from resnet_cpu.simulator import network
from resnet_cpu.simulator import published as calibrate
from resnet_cpu.simulator.exchange import Exchange, Node
from resnet_cpu.simulator.network import Network, World

LINK = Network("a", latency_s=3e-6, bandwidth=2e9, memory_latency_s=5e-7, memory_bandwidth=8e9, reduce_s_per_byte=1e-10)
FREE = Network("free", 0.0, math.inf, 0.0, math.inf, 0.0)
TENSORS = layers.gradients("resnet18", width=0.5)
SIZE = 1e6


@pytest.mark.parametrize("nodes", [2, 4, 64])
def test_closed_forms_with_one_rank_a_node(nodes):
    world, alpha, beta, gamma = World(nodes), LINK.latency_s, 1 / LINK.bandwidth, LINK.reduce_s_per_byte
    rounds, part = math.log2(nodes), (nodes - 1) / nodes * SIZE
    assert network.ring(SIZE, world, LINK) == pytest.approx(2 * (nodes - 1) * alpha + 2 * part * beta + part * gamma)
    assert network.recursive_doubling(SIZE, world, LINK) == pytest.approx(rounds * (alpha + SIZE * (beta + gamma)))
    assert network.rabenseifner(SIZE, world, LINK) == pytest.approx(2 * rounds * alpha + 2 * part * beta + part * gamma)
    assert network.hierarchical(SIZE, world, LINK) == network.allreduce(SIZE, world, LINK)


def test_ranks_of_a_node_share_its_interface():
    world, gamma = World(4, 4), SIZE * LINK.reduce_s_per_byte
    inside = LINK.memory_latency_s + SIZE / LINK.memory_bandwidth
    between = LINK.latency_s + 4 * SIZE / LINK.bandwidth
    assert network.recursive_doubling(SIZE, world, LINK) == pytest.approx(2 * inside + 2 * between + 4 * gamma)
    leaders = network.allreduce(SIZE, World(4), LINK)
    assert network.hierarchical(SIZE, world, LINK) == pytest.approx(2 * (2 * inside + gamma) + leaders)
    part = SIZE / 16  # a ring sends one message over the interface at a time
    hop = max(LINK.latency_s + part / LINK.bandwidth, LINK.memory_latency_s + part / LINK.memory_bandwidth)
    assert network.ring(SIZE, world, LINK) == pytest.approx(30 * hop + 15 * part * LINK.reduce_s_per_byte)
    assert network.ring(SIZE, World(1, 2), LINK) == pytest.approx(
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
def test_what_open_mpi_picks(ranks, size, chosen):
    told = dataclasses.replace(LINK, algorithm="openmpi")
    assert network.allreduce(size, World(ranks), told) == chosen(size, World(ranks), LINK)


def test_ranks_past_a_power_of_two_cost_two_or_three_messages_more():
    bytes_s, gamma = 2 * SIZE / LINK.bandwidth, SIZE * LINK.reduce_s_per_byte
    for one, extra in (
        (network.recursive_doubling, 2 * LINK.latency_s + bytes_s + gamma),
        (network.rabenseifner, 3 * LINK.latency_s + bytes_s + gamma / 2),  # halves there, one back, all in the end
    ):
        # Sizes of Rabenseifner's parts depend on the power of two only.
        assert one(SIZE, World(7), LINK) == pytest.approx(one(SIZE, World(4), LINK) + extra)


@given(
    size=st.floats(1, 1e9),
    nodes=st.integers(1, 3000),
    ranks=st.integers(1, 8),
    worse=st.floats(1, 100),
    algorithm=st.sampled_from(["best", "openmpi", *network.ALGORITHMS]),
)
@settings(max_examples=100, deadline=None)
def test_a_worse_network_is_never_faster(size, nodes, ranks, worse, algorithm):
    base, world = dataclasses.replace(LINK, algorithm=algorithm), World(nodes, ranks)
    seconds = network.allreduce(size, world, base)
    assert seconds > 0 or world.ranks == 1
    for field, value in (
        ("latency_s", worse * base.latency_s),
        ("memory_latency_s", worse * base.memory_latency_s),
        ("reduce_s_per_byte", worse * base.reduce_s_per_byte),
        ("bandwidth", base.bandwidth / worse),
        ("memory_bandwidth", base.memory_bandwidth / worse),
    ):
        assert network.allreduce(size, world, dataclasses.replace(base, **{field: value})) >= seconds * (1 - 1e-12)
    if algorithm != "openmpi":  # its choices by size are not always the best
        assert network.allreduce(size * worse, world, base) >= seconds * (1 - 1e-12)


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(0, 100))
@settings(max_examples=100, deadline=None)
def test_fusion_takes_in_order_what_fits(sizes, threshold):
    expected, rest = [], list(sizes)
    while rest:  # one buffer at a time, as FuseResponses writes it
        total, count = rest.pop(0), 1
        while rest and total + rest[0] <= threshold:
            total, count = total + rest.pop(0), count + 1
        expected.append((total, count))
    assert simulator.fused(sizes, threshold) == expected


@given(
    gaps=st.lists(st.integers(0, 40), min_size=1, max_size=20),
    sizes=st.lists(st.integers(1, 30), min_size=20, max_size=20),
    cycle=st.integers(1, 10),
    negotiation=st.integers(0, 12),
    threshold=st.integers(0, 60),
)
@settings(max_examples=150, deadline=None)
def test_exchange_against_the_background_loop_written_out(gaps, sizes, cycle, negotiation, threshold):
    """Every cycle of RunLoopOnce, also those that find nothing, in whole milliseconds."""
    ready, sizes = list(itertools.accumulate(gaps)), sizes[: len(gaps)]
    waiting, clock, end, sent = list(zip(ready, sizes)), 0, 0, []
    while waiting:
        here = [size for moment, size in waiting if moment <= clock]
        waiting = waiting[len(here) :]
        now = clock + negotiation
        for size, _ in simulator.fused(here, threshold):
            now += 2 + size
            sent.append(size)
            end = now
        clock = max(clock + cycle, now)
    exchange = Exchange(cycle_s=cycle, wake_s=0.0, fusion_bytes=threshold)
    cost = lambda size, copied: 2.0 + size
    assert simulator.exchange_end(ready, sizes, ready[-1], cost, exchange, negotiation) == (end, sent)


@given(
    gaps=st.lists(st.floats(0, 1), min_size=1, max_size=20),
    costs=st.lists(st.floats(0, 1), min_size=20, max_size=20),
    more=st.floats(0, 1),
)
@settings(max_examples=100, deadline=None)
def test_slower_messages_never_end_a_step_sooner(gaps, costs, more):
    """Unfused and without cycles; with them a later start can find more to fuse, and be sooner done."""
    ready = list(itertools.accumulate(gaps))
    plain = Exchange(cycle_s=0.0, fusion_bytes=0)
    sizes = list(range(len(gaps)))
    ends = [
        simulator.exchange_end(ready, sizes, ready[-1], lambda size, _, x=x: costs[size] + x, plain, 0.0)[0]
        for x in (0.0, more)
    ]
    assert ready[-1] <= ends[0] <= ends[1] + 1e-9
    assert ends[0] <= ready[-1] + sum(costs[: len(gaps)]) + 1e-9


def test_interference_stretches_what_is_still_to_be_computed():
    plain = Exchange(cycle_s=0.0, fusion_bytes=0)
    # From 1 s on a message of 2 s takes half of the cores: by 3 s one second is computed, the last comes at 4 s.
    end, _ = simulator.exchange_end([1.0, 3.0], [1, 1], 3.0, lambda size, _: 2.0, plain, 0.0, interference=0.5)
    assert end == pytest.approx(6.0)
    assert simulator.exchange_end([1.0, 3.0], [1, 1], 3.0, lambda size, _: 2.0, plain, 0.0)[0] == pytest.approx(5.0)
    # A message past the end of compute has nothing to stretch.
    assert simulator.exchange_end([3.0], [1], 3.0, lambda size, _: 2.0, plain, 0.0, interference=0.5)[0] == 5.0


def test_limits():
    node = Node(image_s=0.01, fixed_s=0.02)
    alone = simulator.step(TENSORS, 32, node, World(1), LINK, Exchange())
    assert alone.total == pytest.approx(32 * 0.01 + 0.02) and alone.messages == 0
    one, many = (simulator.step(TENSORS, 32, node, World(n, 2), FREE, Exchange(cycle_s=0.0)) for n in (1, 1000))
    assert simulator.efficiency(one, many) == pytest.approx(1, abs=1e-12)
    assert simulator.images_per_second(many, 32, World(1000, 2)) == pytest.approx(2000 * 32 / 0.34)
    # Nothing to compute: every message is exposed.
    bare = simulator.step(TENSORS, 0, Node(0.01), World(8), LINK, Exchange(cycle_s=0.0, negotiated=False))
    total = sum(tensor.bytes for tensor in TENSORS)
    assert bare.messages == 1
    assert bare.total == pytest.approx(network.allreduce(total, World(8), LINK) + 2 * total / LINK.memory_bandwidth)


def test_parts_of_a_step_add_up_and_say_what_it_is():
    node = Node(image_s=0.001, jitter=0.05, input_images_per_s=1000.0)
    slow = dataclasses.replace(LINK, bandwidth=2e8)
    found = simulator.step(TENSORS, 8, node, World(16, 2), slow, Exchange(cycle_s=0.05))
    parts = (found.compute, found.jitter, found.allreduce, found.coordinator, found.input)
    assert min(parts) >= 0 and found.total == pytest.approx(sum(parts))
    starved = dataclasses.replace(node, input_images_per_s=4.0)
    starved_step = simulator.step(TENSORS, 8, starved, World(16, 2), slow, Exchange(cycle_s=0.05))
    assert starved_step.total == pytest.approx(2.0) and starved_step.input == pytest.approx(2.0 - found.total)
    assert found.jitter == pytest.approx(0.008 * (simulator.slowest(0.05, 32) - 1))
    fed = simulator.step(TENSORS, 8, dataclasses.replace(node, input_images_per_s=None), World(16, 2), slow, Exchange())
    assert fed.input == 0 and fed.allreduce > 0.05


def test_postponed_kernels_hide_less():
    node, slow = Node(image_s=0.05), dataclasses.replace(LINK, bandwidth=2e8)
    exposed = [
        simulator.step(layers.gradients(inter_op_threads=threads), 32, node, World(8), slow, Exchange()).allreduce
        for threads in (1, 2)
    ]
    assert exposed[0] > 5 * exposed[1]


def test_negotiation_grows_with_ranks_slowly_with_the_cache():
    cached, plain = Exchange(), Exchange(cached=False)
    few, many = World(8), World(1024)
    assert simulator.coordination(World(1), LINK, cached, 161) == 0
    assert simulator.coordination(few, LINK, Exchange(negotiated=False), 161) == 0
    bits = 3 * LINK.latency_s + 3 * 24 * (1 / LINK.bandwidth + LINK.reduce_s_per_byte)  # 164 bits: three words
    assert simulator.coordination(few, LINK, cached, 161) == pytest.approx(bits)
    assert simulator.coordination(many, LINK, cached, 161) == pytest.approx(bits * 10 / 3)
    assert simulator.coordination(many, LINK, plain, 161) == pytest.approx(40 * LINK.latency_s + 1023 * plain.request_s)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_slowest_of_measured_times_is_the_mean_over_all_draws(count):
    times = (1.0, 1.5, 1.1, 4.0)
    draws = [max(draw) for draw in itertools.product(times, repeat=count)]
    assert simulator.slowest(times, count) == pytest.approx(np.mean(draws) / np.mean(times))


def test_slowest_of_a_lognormal():
    assert simulator.slowest(0.1, 1) == simulator.slowest(0.0, 1000) == 1
    for deviation in (0.02, 0.3):  # of two: 2 Phi(s / sqrt 2)
        assert simulator.slowest(deviation, 2) == pytest.approx(1 + math.erf(deviation / 2), rel=1e-4)
    generator = np.random.Generator(np.random.Philox(3))
    draws = np.exp(0.1 * generator.standard_normal([4000, 500]) - 0.005).max(1)
    assert abs(simulator.slowest(0.1, 500) - draws.mean()) < 4 * draws.std() / math.sqrt(4000)
    ladder = [simulator.slowest(0.05, count) for count in (1, 2, 10, 100, 3000, 100_000)]
    assert ladder == sorted(set(ladder))


def test_jitter_of_measured_steps():
    generator = np.random.Generator(np.random.Philox(1))
    assert simulator.fit_jitter(np.exp(0.04 * generator.standard_normal(20_000))) == pytest.approx(0.04, rel=0.03)
    for times in ([1.0], [1.0, 0.0]):
        with pytest.raises(FlagError, match="jitter needs two"):
            simulator.fit_jitter(times)


def test_fit_finds_the_minimum_and_refuses_too_few_points():
    x = np.array([1.0, 2.0, 3.0, 5.0])
    found = calibrate.fit(lambda p: p[0] * x + p[1] - (2.5 * x + 0.3), [1.0, 1.0])
    assert found == pytest.approx([2.5, 0.3], rel=1e-5)
    noisy = np.array([2.0, 3.9, 6.2, 10.1])
    slope, level = np.polyfit(x, noisy + 1, 1)
    assert calibrate.fit(lambda p: p[0] * x + p[1] - noisy - 1, [1.0, 1.0]) == pytest.approx([slope, level], rel=1e-4)
    with pytest.raises(DataError, match="2 constants cannot be fitted to 1 points"):
        calibrate.fit(lambda p: p[:1], [1.0, 1.0])


def test_published_rows_carry_their_source():
    for row in calibrate.published_rows().values():
        assert row["source"] and row["kind"] in ("read", "derived") and float(row["value"]) > 0
    rows = calibrate.published_rows()
    epochs = calibrate.IMAGENET_EPOCHS * calibrate.IMAGENET_EXAMPLES
    assert float(rows["recipe_a"]["value"]) == pytest.approx(epochs / 3600 / 448, abs=0.05)
    assert float(rows["knl_2048"]["value"]) == pytest.approx(epochs / 1200 / 2048, abs=0.05)
    hours = 6.163689
    assert float(rows["c5_dawnbench"]["value"]) == pytest.approx(81 * 1_281_167 / hours / 3600 / 64, abs=0.01)


def test_published_points_fitted_and_held_out():
    """What is fitted to is met; what is held out is not looked at by the fit, whatever it says."""
    for with_fixed, expected in ((False, 2), (True, 3)):
        found = calibrate.published(with_fixed)
        fitted = [point for point in found.points if point.fitted]
        assert len(fitted) == expected
        assert max(abs(point.error) for point in fitted) < 1e-4
    held = {point.name: abs(point.error) for point in found.points if not point.fitted}
    assert held["c5_64"] < 0.05 and held["recipe_a"] < 0.10
    assert abs(calibrate.many_cores(calibrate.published(False).node).minutes.error) < 0.25


def test_the_fit_does_not_look_at_what_is_held_out(monkeypatch):
    published = calibrate.published.__wrapped__  # not what was kept of an earlier call
    before = published().node
    rows = calibrate.published_rows()
    rows["recipe_a"]["value"], rows["c5_64"]["value"] = "1", "1"
    monkeypatch.setattr(calibrate, "published_rows", lambda: rows)
    assert published().node == before
    rows["recipe_b"]["value"] = "90"
    assert published().node != before


def test_printed_errors_are_those_of_the_model():
    lines = simulate.published_lines()
    for with_fixed in (False, True):
        for point in calibrate.published(with_fixed).points:
            kind = "fitted to" if point.fitted else "held out"
            mine = [line.split() for line in lines if line.split()[:1] == [point.name]]
            assert any(f"{100 * point.error:+.1f}" in words and kind in " ".join(words) for words in mine), point
    assert any("104K cores" in line and "26." in line for line in lines)


REPLAY = "round,hosts,ranks,mbit,model,width,image_size,compute_s,forward_share,bytes,tensors,fusion_bytes,cycle_ms"
TRUE = Network("replay", 2e-4, 100e9 / 8, 2e-4, reduce_s_per_byte=3e-9)


def write_replay(path, noise=0.0):
    """Write what a box of two and of four hosts would measure if it were as the model says."""
    generator, lines = np.random.Generator(np.random.Philox(5)), [f"{REPLAY},step,step_s,lateness_s"]
    kinds = [("resnet18", 0.5, 0.0), ("resnet18", 1.0, 0.0), ("resnet50", 0.5, 0.5), ("message", 1.0, 0.0)]
    for hosts, mbit, (model, width, compute_s) in itertools.product((2, 4), (500, 1000, 2500, 10000), kinds):
        size = 4096 if model == "message" else sum(t.bytes for t in layers.gradients(model, width, image_size=96))
        fusion = 0 if model == "message" else 2**24
        setting = calibrate.Setting(hosts, hosts, mbit, model, width, 96, compute_s, 0.333333, size, fusion, 1.0)
        for number in range(3):
            seconds = calibrate.replayed(setting, TRUE) * (1 + noise * generator.standard_normal())
            cells = [1, hosts, hosts, mbit, model, width, 96, compute_s, 0.333333, size, 1, fusion, 1.0, number]
            lines.append(",".join(str(cell) for cell in [*cells, seconds, 0.0]))
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_constants_of_a_replay_are_found_again_and_the_rest_is_held_out(tmp_path, capsys):
    found = calibrate.validate(calibrate.read_replay(write_replay(tmp_path / "replay.csv")))
    for hosts in (2, 4):
        assert found.networks[hosts].latency_s == pytest.approx(TRUE.latency_s, rel=1e-3)
        assert found.networks[hosts].reduce_s_per_byte == pytest.approx(TRUE.reduce_s_per_byte, rel=1e-3)
    assert len(found.rows) == 32
    fitted = {(setting.model, setting.mbit) for setting, point in found.rows if point.fitted}
    assert fitted == {("resnet18", 500), ("resnet18", 10000), ("message", 500), ("message", 10000)}
    assert all(setting.width == 0.5 for setting, point in found.rows if point.fitted and setting.model == "resnet18")
    assert max(found.errors()["models, held out"]) < 0.01
    noisy = write_replay(tmp_path / "noisy.csv", noise=0.02)
    simulate.main([f"--validate={noisy}", f"--output={tmp_path}/plot.png"])
    printed = capsys.readouterr().out.splitlines()
    errors = calibrate.validate(calibrate.read_replay(noisy)).errors()["models, held out"]
    assert 0 < max(errors) < 0.1
    assert sum(line.startswith("models, held out, ") and " of 10 within 5 %" in line for line in printed) == 2
    assert f"models, held out: {len(errors)} settings" in "\n".join(printed)
    assert f"median error {100 * np.median(errors):.1f} %, largest {100 * max(errors):.1f} %" in "\n".join(printed)
    assert (tmp_path / "plot.png").stat().st_size > 5000
    # The constants that it prints and a bandwidth are a network that the command takes.
    constants = json.loads(printed[-1])["2"]
    assert "bandwidth" not in constants  # the links' is not the network's to be predicted
    (tmp_path / "network.json").write_text(json.dumps({**constants, "bandwidth": 1.25e9}))
    simulate.main([f"--network={tmp_path}/network.json", "--nodes=4", "--format=csv"])
    assert "4,8," in capsys.readouterr().out


def test_a_replay_goes_at_the_speed_that_links_were_shaped_to_less_headers():
    size, free = 10**8, dataclasses.replace(FREE, bandwidth=1.0)
    setting = calibrate.Setting(2, 2, 1000, "message", 1.0, 224, 0.0, 1 / 3, size, 0, 0.0)
    assert calibrate.replayed(setting, free) == pytest.approx(size * 8 / 1e9 * 1514 / 1448)
    # Rabenseifner on three hosts, which Open MPI takes, against a ring.
    three = dataclasses.replace(setting, hosts=3, ranks=3)
    ring = dataclasses.replace(three, allreduce="ring")
    assert calibrate.replayed(three, free) / calibrate.replayed(ring, free) == pytest.approx(3 / (4 / 3))
    model = dataclasses.replace(setting, model="resnet18", compute_s=1.0, fusion_bytes=2**20, cycle_ms=1.0)
    late = dataclasses.replace(model, inter_op_threads=1)
    assert 1 < calibrate.replayed(model, free) < calibrate.replayed(late, free)


def test_gradients_that_a_replay_released_late_are_predicted_late(tmp_path):
    path = pathlib.Path(write_replay(tmp_path / "replay.csv"))
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line[: line.rindex(",")] + ",0.5" if ",500," in line else line for line in lines))
    measured = calibrate.read_replay(str(path))
    setting = next(one for one in measured if one.mbit == 500 and one.model == "resnet50")
    assert measured[setting].late_s == 0.5
    later = calibrate.replayed(setting, TRUE, measured[setting].late_s)
    slower = dataclasses.replace(setting, compute_s=setting.compute_s + 0.5)
    assert later == calibrate.replayed(slower, TRUE) > calibrate.replayed(setting, TRUE)


def test_a_replay_knows_of_the_shapers_burst_and_of_horovods_cycle():
    free = dataclasses.replace(FREE, bandwidth=1.0)
    setting = calibrate.Setting(2, 2, 1000, "message", 1.0, 224, 0.0, 1 / 3, 4096, 0, 0.0)
    assert calibrate.replayed(setting, free) == 0  # a few bytes never wait for the link
    horovod = dataclasses.replace(setting, model="horovod_message", fusion_bytes=2**27, cycle_ms=1.0)
    assert calibrate.replayed(horovod, free) == pytest.approx(1.05e-3)
    # Longer than a cycle: the wait for the next look, less what the link saves up in it.
    link = calibrate.PAYLOAD * 1e9 / 8
    alone = 10**7 / link + 24 / link
    for mbit, saved in ((1000, 1.05e-3), (10000, calibrate.BURST / link / 10)):
        long = dataclasses.replace(horovod, bytes=10**7, mbit=mbit)
        assert calibrate.replayed(long, free) == pytest.approx(alone * 1000 / mbit + 1.05e-3 - saved, rel=1e-3)


def test_bad_replays(tmp_path):
    good = (tmp_path / "good.csv", write_replay(tmp_path / "good.csv"))[0].read_text().splitlines()
    for text, told in (
        ("", "no row"),
        ("a,b\n1,2\n", "no column 'hosts'"),
        ("\n".join([good[0], "x" + good[1]]), "no row"),
        ("\n".join([good[0], good[1].replace("1,2,2,", "1,two,2,", 1)]), "line 2 is no row"),
        ("\n".join([good[0], good[1].replace("1,2,2,", "1,2,3,", 1)]), "line 2 has times or ranks"),
        ("\n".join([good[0], *(line for line in good[1:] if ",message," in line)]), "only of messages"),
        ("\n".join([good[0], *(line for line in good if ",500,resnet18,0.5" in line)]), "1 points"),
        ("\n".join([f"{good[0]},allreduce", good[1] + ",star"]), "allreduce star is not known"),
    ):
        (tmp_path / "bad.csv").write_text(text)
        if told == "no row":
            told = "no row|no column|is no row|cannot be"
        with pytest.raises(DataError, match=told):
            calibrate.validate(calibrate.read_replay(str(tmp_path / "bad.csv")))


def rows_of(capsys, *arguments):
    simulate.main([*arguments, "--format=csv"])
    return list(csv.DictReader(io.StringIO(capsys.readouterr().out)))


def test_csv_of_the_curve(capsys):
    found = rows_of(capsys, "--nodes=6", "--batch_size=16", "--ranks_per_node=3", "--images_per_second=90")
    assert [row["nodes"] for row in found] == ["1", "2", "4", "6"]
    for row in found:
        parts = [float(row[f"{part}_s"]) for part in ("compute", "jitter", "allreduce", "coordinator", "input")]
        assert float(row["step_s"]) == pytest.approx(sum(parts))
        assert float(row["images_per_second"]) == pytest.approx(int(row["ranks"]) * 16 / float(row["step_s"]))
        assert int(row["global_batch_size"]) == 16 * int(row["ranks"]) == 48 * int(row["nodes"])
        assert float(row["compute_s"]) == pytest.approx(3 * 16 / 90)
    assert float(found[0]["efficiency"]) == 1
    assert float(found[3]["efficiency"]) == pytest.approx(float(found[0]["step_s"]) / float(found[3]["step_s"]))


def test_table_answers_every_question(capsys):
    phase = "--phase=main:epochs=90,lr=1"
    simulate.main([phase, "--nodes=64", "--network=ethernet1", "--batch_size=32"])
    text = capsys.readouterr().out
    assert "below 90 % at" in text and "allreduce" in text
    cluster = cluster_of("--network=ethernet10", "--batch_size=32")
    rows, _ = simulate.curve(cluster, 1024)
    found = simulate._first_below(cluster, rows)
    nodes = found.nodes - found.nodes // 40 - 1
    batch = simulate._batch(cluster.settings, nodes * cluster.ranks_per_node)
    before = simulate.Rung(nodes, batch, simulate._step(cluster, nodes, batch))
    assert simulate.efficiency(rows[0], found) < 0.9 <= simulate.efficiency(rows[0], before)
    assert simulate._first_below(cluster, rows[:1]) is None
    assert "the recipe on 64 nodes:" in text and "node-hours" in text
    assert "local batch: on 64 nodes | for a global batch of 4,096" in text
    assert "assumed" in text and "published points" in text
    assert "if gradients came layer by layer" in text
    simulate.main(["--nodes=2", "--batch_size=32"])
    text = capsys.readouterr().out
    assert "above 90 % up to 2 nodes" in text and "give a --flagfile" in text


def cluster_of(*arguments):
    values, _ = flags.parse_values(list(arguments), "simulate")
    return simulate._cluster(flags.make_settings(values), values)


def test_time_to_train_counts_steps_evaluations_and_checkpoints():
    cluster = cluster_of(
        "--phase=a:steps=100,lr=1", "--phase=b:steps=10,lr=1,image_size=112", "--eval_every_epochs=0.001"
    )
    found = simulate.training_seconds(cluster, 8, 1_281_167)
    full, small = (simulate._step(cluster, 8, Batch(32, 1, 512), size) for size in (224, 112))
    assert found["training"] == pytest.approx(100 * full.total + 10 * small.total)
    work = [sum(t.backward_work for t in layers.gradients(image_size=size)) for size in (224, 112)]
    node = cluster.node
    assert (small.compute - node.batch_s) / (full.compute - node.batch_s) == pytest.approx(work[1] / work[0])
    rounds = -(-50_000 // (16 * 32))
    evaluations = 110 * 512 / 1_281_167 / 0.001
    assert found["evaluation"] == pytest.approx(evaluations * rounds * 32 * node.image_s / 3)
    weights = 4 * 25_557_032
    assert found["checkpoints"] == pytest.approx(110 / 1000 * 2 * weights / simulator.DISK_BANDWIDTH)


@pytest.mark.parametrize("image_size", [224, 112])
def test_accumulated_batches_are_computed_without_messages(image_size):
    flags_of = [f"--phase=a:steps=10,lr=1,image_size={image_size}", "--batch_size=32", "--network=ethernet1"]
    once, more = (cluster_of(*flags_of, f"--accumulate_steps={count}") for count in (1, 3))
    gained = [simulate.training_seconds(cluster, 4, 10**6)["training"] for cluster in (once, more)]
    work = [sum(t.backward_work for t in layers.gradients(image_size=size)) for size in (image_size, 224)]
    image_s = once.node.image_s * simulator.slowest(once.node.jitter, 8) * work[0] / work[1]
    assert gained[1] - gained[0] == pytest.approx(
        10 * 2 * (32 * image_s + once.node.batch_s), abs=10 * Exchange().period_s
    )  # the thread looks once a cycle


def test_a_strong_ladder_keeps_its_batch_and_leaves_out_what_cannot_be_cut():
    cluster = cluster_of("--global_batch_size=1024", "--accumulate_steps=0", "--batch_size=32", "--network=ethernet10")
    rows, told = simulate.curve(cluster, 24)
    assert [(row.nodes, row.batch) for row in rows] == [
        (nodes, Batch(32, 16 // nodes, 1024)) for nodes in (1, 2, 4, 8, 16)
    ]
    assert told == ["left out, since the global batch cannot be cut for them: 24"]
    node = cluster.node
    assert rows[0].step.compute == pytest.approx(16 * (32 * node.image_s + node.batch_s)) and node.batch_s > 0
    shares = [simulate.efficiency(rows[0], row) for row in rows]
    assert shares[0] == 1 and shares == sorted(shares, reverse=True) and shares[-1] < 0.9
    assert "whatever its batch" not in simulate._why(cluster, rows)[0]
    updating = cluster._replace(node=dataclasses.replace(node, fixed_s=0.2))  # once a step, however many micro-batches
    assert "whatever its batch" in simulate._why(updating, simulate.curve(updating, 16)[0])[0]
    with pytest.raises(FlagError, match="cannot be made of"):
        simulate.curve(cluster_of("--global_batch_size=1000", "--accumulate_steps=0", "--batch_size=8"), 1)


def test_a_past_run_gives_speed_and_jitter(tmp_path):
    (tmp_path / "result.json").write_text('{"images_per_second": 40.0, "ranks": 4}')
    times = [1.0, 1.02, 0.97, 1.05, 0.99]
    rows = [{"step": 9, "step_s": 7.0}, *({"step": 13 + 4 * i, "step_s": time} for i, time in enumerate(times))]
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    model = dataclasses.asdict(flags.parse(["--model=resnet18"]).model)
    (tmp_path / "run.json").write_text(json.dumps({"signature": {"model": model}}))
    with pytest.raises(CheckpointError, match="another network: model resnet18 there, resnet50 here"):
        cluster_of(f"--past_run={tmp_path}")
    alike = ["--model=resnet18", "--padding=caffe", "--bn_momentum=0.95"]  # which cost no time
    node = cluster_of(f"--past_run={tmp_path}", *alike).node
    assert node.image_s == 0.1
    assert node.jitter == pytest.approx(2 * np.log(times).std(ddof=1))  # rows of four steps
    (tmp_path / "metrics.jsonl").write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(CheckpointError, match="too few rows"):
        cluster_of(f"--past_run={tmp_path}", "--model=resnet18")
    phases = {"main": {"image_size": 64}}
    (tmp_path / "run.json").write_text(json.dumps({"signature": {"model": model, "phases": phases}}))
    with pytest.raises(CheckpointError, match=r"another network: pixels \[64\] there, \[224\] here"):
        cluster_of(f"--past_run={tmp_path}", "--model=resnet18")


def test_a_scaling_run_gives_what_its_ranks_did_by_themselves(tmp_path):
    (tmp_path / "result.json").write_text('{"images_per_second": 40.0, "ranks": 2, "global_batch_size": 64}')
    model = dataclasses.asdict(flags.parse([]).model)
    (tmp_path / "run.json").write_text(json.dumps({"signature": {"model": model}}))
    seconds = np.zeros([2, 4, 4])
    seconds[..., 2] = [[1.0, 1.2, 0.8, 1.0], [2.0, 2.0, 2.0, 2.0]]
    seconds[..., 3] = 5.0  # messages and peers, which are the network's
    np.savez(tmp_path / "step_times.npz", seconds=seconds)
    node = cluster_of(f"--past_run={tmp_path}").node
    assert node.image_s == pytest.approx(1.5 / 32) and node.fixed_s == 0
    assert sorted(node.jitter) == pytest.approx([0.8, 1, 1, 1, 1, 1, 1, 1.2])
    np.savez(tmp_path / "step_times.npz", seconds=seconds[:1])
    assert cluster_of(f"--past_run={tmp_path}").node.fixed_s == 5.0
    record = {"signature": {"model": model}, "per_rank": [{"host": host} for host in "aaaa"]}
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert cluster_of(f"--past_run={tmp_path}").ranks_per_node == 4
    with pytest.raises(FlagError, match="had 4 on a node"):
        cluster_of(f"--past_run={tmp_path}", "--ranks_per_node=2")
    (tmp_path / "run.json").write_text(json.dumps({**record, "per_rank": [{"host": "a"}, {"host": "b"}]}))
    with pytest.raises(CheckpointError, match="ran on 2 hosts"):
        cluster_of(f"--past_run={tmp_path}")
    (tmp_path / "run.json").write_text(json.dumps(record))
    constants = {"latency_s": 1e-5, "bandwidth": 1e9, "jitter": 0.1}
    (tmp_path / "network.json").write_text(json.dumps(constants))
    with pytest.raises(FlagError, match="jitter is told by --past_run, too"):
        cluster_of(f"--past_run={tmp_path}", f"--network={tmp_path}/network.json")
    assert cluster_of("--images_per_second=9", f"--network={tmp_path}/network.json").node.jitter == 0.1
    (tmp_path / "step_times.npz").write_bytes(b"no zip")
    with pytest.raises(CheckpointError, match="step_times.npz: cannot be read"):
        cluster_of(f"--past_run={tmp_path}")


@pytest.mark.parametrize(
    "constants, told",
    [
        ({"latency": 1}, "unknown key 'latency'"),
        ({"latency_s": 1e-6}, "'bandwidth' is missing"),
        ({"latency_s": "x", "bandwidth": 1e9}, "latency_s='x' must be a number"),
        ({"latency_s": -1, "bandwidth": 1e9}, "latency_s=-1"),
        ({"latency_s": 0, "bandwidth": 0}, "bandwidth=0"),
        ({"latency_s": 0, "bandwidth": 1e9, "algorithm": "star"}, "algorithm=star"),
        ({"latency_s": 0, "bandwidth": 1e9, "interference": 1}, "interference=1"),
        ({"latency_s": 0, "bandwidth": 1e9, "image_s": 0}, "image_s=0"),
        ({"latency_s": 0, "bandwidth": 1e9, "jitter": []}, "jitter"),
        ([1], "no JSON object"),
    ],
)
def test_bad_constants(tmp_path, constants, told):
    (tmp_path / "network.json").write_text(json.dumps(constants))
    with pytest.raises(FlagError, match=told) as caught:
        cluster_of(f"--network={tmp_path}/network.json")
    assert "\n" not in str(caught.value)


def test_constants_of_a_file_are_used(tmp_path):
    constants = {"latency_s": 5e-6, "bandwidth": 1e9, "cycle_s": 0.005, "jitter": [1, 1.1, 1.3], "interference": 0.1}
    (tmp_path / "network.json").write_text(json.dumps({**constants, "inter_op_threads": 2, "algorithm": "ring"}))
    cluster = cluster_of(f"--network={tmp_path}/network.json")
    assert (cluster.network.latency_s, cluster.network.bandwidth, cluster.network.algorithm) == (5e-6, 1e9, "ring")
    assert (cluster.exchange.cycle_s, cluster.node.jitter, cluster.node.interference) == (0.005, (1, 1.1, 1.3), 0.1)
    assert cluster.inter_op_threads == 2


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--network=carrier_pigeon"], "neither a file nor one of omnipath"),
        (["--ranks_per_node=two"], "--ranks_per_node=two"),
        (["--ranks=3"], "--ranks=3: contradicts 1536 nodes of 2"),
        (["--model=resnet101"], "its speed is not known"),
        (["--image_size=32"], "its speed is not known"),
        (["--past_run=a", "--images_per_second=3"], "contradicts"),
        (["--nodes=7", "--global_batch_size=15"], "not divisible by 14 ranks"),
        (["--validate=x.csv", "--raw_dir=y"], "resnet_cpu.prepare"),
    ],
)
def test_bad_flags(arguments, told):
    with pytest.raises(FlagError, match=told):
        simulate.main(arguments)


def test_plot_shows_the_curve_and_the_points(tmp_path, monkeypatch, capsys):
    drawn = {}
    from resnet_cpu.report import run_plots as plots

    real = plots.draw_prediction
    monkeypatch.setattr(plots, "draw_prediction", lambda *given: drawn.update(given=given) or real(*given))
    simulate.main(["--nodes=64", "--batch_size=32", "--format=png", f"--output={tmp_path}/x.png"])
    assert capsys.readouterr().out == f"{tmp_path}/x.png\n"
    assert (tmp_path / "x.png").stat().st_size > 10_000
    curves, points, *_ = drawn["given"]
    assert [(point["nodes"], point["fitted"]) for point in points] == [(32, True), (64, False)]
    assert all(nodes[-1] == 64 and shares[0] == 1 for nodes, shares in curves.values())


def test_the_command_needs_no_tensorflow():
    program = (
        "import sys; from resnet_cpu import simulate; simulate.main(['--nodes=4']); print('tensorflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=OUTSIDE, check=True)
    assert done.stdout.splitlines()[-1] == "False"
