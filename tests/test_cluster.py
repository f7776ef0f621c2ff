"""The simulated cluster: constants and past runs, the curve, accumulated batches, and the time to train."""

import json

import numpy as np
import pytest

from resnet_cpu import commandline
from resnet_cpu.errors import CheckpointError, FlagError
from resnet_cpu.model import tensors
from resnet_cpu.recipe.batch import Batch
from resnet_cpu.run import signature
from resnet_cpu.simulator import cluster, exchange, published
from resnet_cpu.simulator.exchange import Exchange, Node


def cluster_of(*arguments):
    return cluster.from_settings(commandline.parse(list(arguments), "simulate"))


def test_time_to_train_counts_steps_evaluations_and_checkpoints():
    simulated = cluster_of(
        "--phase=a:steps=100,lr=1", "--phase=b:steps=10,lr=1,image_size=112", "--eval_every_epochs=0.001"
    )
    found = cluster.training_seconds(simulated, 8, 1_281_167)
    full, small = (cluster.step_of(simulated, 8, Batch(32, 1, 512), size) for size in (224, 112))
    assert found["training"] == pytest.approx(100 * full.total + 10 * small.total)
    work = [sum(t.backward_work for t in tensors.gradients(image_size=size)) for size in (224, 112)]
    node = simulated.node
    assert (small.compute - node.batch_s) / (full.compute - node.batch_s) == pytest.approx(work[1] / work[0])
    rounds = -(-50_000 // (16 * 32))
    evaluations = 110 * 512 * 1000 // 1_281_167 + 1  # at the end, too
    assert found["evaluation"] == pytest.approx(evaluations * rounds * 32 * node.image_s / 3)
    weights = 4 * 25_557_032
    assert found["checkpoints"] == pytest.approx(2 * 2 * weights / cluster.DISK_BANDWIDTH)  # at the ends of the phases


def test_without_a_split_to_evaluate_on_no_evaluation_is_counted():
    """Fault: --eval_split=none had no effect on the time."""
    flags = ["--phase=a:steps=100,lr=1", "--eval_split=none"]
    assert cluster.training_seconds(cluster_of(*flags), 8, 1_281_167)["evaluation"] == 0


@pytest.mark.parametrize("image_size", [224, 112])
def test_accumulated_batches_are_computed_without_messages(image_size):
    flags = [f"--phase=a:steps=10,lr=1,image_size={image_size}", "--batch_size=32", "--network=ethernet1"]
    once, more = (cluster_of(*flags, f"--accumulate_steps={count}") for count in (1, 3))
    gained = [cluster.training_seconds(simulated, 4, 10**6)["training"] for simulated in (once, more)]
    work = [sum(t.backward_work for t in tensors.gradients(image_size=size)) for size in (image_size, 224)]
    image_s = once.node.image_s * exchange.slowest(once.node.jitter, 8) * work[0] / work[1]
    assert gained[1] - gained[0] == pytest.approx(
        10 * 2 * (32 * image_s + once.node.batch_s), abs=10 * Exchange().period_s
    )  # the thread checks once a cycle


def test_strong_scaling_keeps_its_batch_and_skips_node_counts_that_do_not_divide_it():
    simulated = cluster_of(
        "--global_batch_size=1024", "--accumulate_steps=0", "--batch_size=32", "--network=ethernet10"
    )
    rows, refused = cluster.curve(simulated, 24)
    assert [(row.nodes, row.batch) for row in rows] == [
        (nodes, Batch(32, 16 // nodes, 1024)) for nodes in (1, 2, 4, 8, 16)
    ]
    assert list(refused) == [24]
    node = simulated.node
    assert rows[0].step.compute == pytest.approx(16 * (32 * node.image_s + node.batch_s)) and node.batch_s > 0
    shares = [cluster.efficiency(rows[0], row) for row in rows]
    assert shares[0] == 1 and shares == sorted(shares, reverse=True) and shares[-1] < 0.9
    with pytest.raises(FlagError, match="--global_batch_size=1000: "):
        cluster.curve(cluster_of("--global_batch_size=1000", "--accumulate_steps=0", "--batch_size=8"), 1)


def test_strong_scaling_tries_the_numbers_of_nodes_that_divide_its_batch():
    """Fault: only powers of two and --nodes were tried, so that recipe A was answered for 64 nodes, or skipped 224."""
    simulated = cluster_of("--global_batch_size=14336", "--accumulate_steps=0", "--batch_size=16")
    points, refused = cluster.curve(simulated, 1536)
    assert [point.nodes for point in points] == [1, 2, 4, 7, 8, 14, 16, 28, 32, 56, 64, 112, 224, 448]
    assert list(refused) == [128, 256, 512, 1024, 1536]
    assert cluster.first_below(simulated, points, 0.91).nodes == 224
    many = cluster_of("--global_batch_size=72072000", "--accumulate_steps=0", "--batch_size=1")
    assert len(cluster.curve(many, 10_000)[0]) < 2 * 14  # at most two for each power of two


def test_first_below_is_found_between_two_points():
    simulated = cluster_of("--network=ethernet10", "--batch_size=32")
    points, _ = cluster.curve(simulated, 1024)
    found = cluster.first_below(simulated, points, 0.9)
    before = cluster.point(simulated, found.nodes - found.nodes // 40 - 1)
    assert cluster.efficiency(points[0], found) < 0.9 <= cluster.efficiency(points[0], before)
    assert cluster.first_below(simulated, points[:1], 0.9) is None


def test_a_past_run_gives_speed_and_jitter(tmp_path):
    (tmp_path / "result.json").write_text('{"images_per_second": 40.0, "ranks": 4}')
    times = [1.0, 1.02, 0.97, 1.05, 0.99]
    rows = [{"step": 9, "step_s": 7.0}, *({"step": 13 + 4 * i, "step_s": time} for i, time in enumerate(times))]
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    model = signature.deciding(commandline.parse(["--model=resnet18"]).model)
    (tmp_path / "run.json").write_text(json.dumps({"signature": {"model": model}}))
    with pytest.raises(CheckpointError, match="another network .*model.* resnet18"):
        cluster_of(f"--speed={tmp_path}")
    equally_fast = ["--model=resnet18", "--padding=caffe", "--bn_momentum=0.95"]
    node = cluster_of(f"--speed={tmp_path}", *equally_fast).node
    assert node.image_s == 0.1
    assert node.jitter == pytest.approx(2 * np.log(times).std(ddof=1))  # rows of four steps
    # Fault: steps of an earlier attempt, on other ranks, counted as jitter.
    earlier = [{"step": step, "step_s": 4.0, "attempt": 1} for step in range(5)]
    attempts = [*earlier, *({**row, "attempt": 2} for row in rows)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(row) for row in attempts) + "\n")
    assert cluster_of(f"--speed={tmp_path}", *equally_fast).node.jitter == node.jitter
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(row) for row in attempts[:-4]) + "\n")
    with pytest.raises(CheckpointError, match="the last attempt has fewer than 4 rows"):
        cluster_of(f"--speed={tmp_path}", "--model=resnet18")
    phases = {"main": {"image_size": 64}}
    (tmp_path / "run.json").write_text(json.dumps({"signature": {"model": model, "phases": phases}}))
    with pytest.raises(CheckpointError, match=r"another network .*pixels.*\[64\].*\[224\]"):
        cluster_of(f"--speed={tmp_path}", "--model=resnet18")


def test_a_scaling_run_gives_the_work_of_its_ranks_without_waiting(tmp_path):
    (tmp_path / "result.json").write_text('{"images_per_second": 40.0, "ranks": 2, "global_batch_size": 64}')
    model = signature.deciding(commandline.parse([]).model)
    (tmp_path / "run.json").write_text(json.dumps({"signature": {"model": model}}))
    seconds = np.zeros([2, 4, 4])
    seconds[..., 2] = [[1.0, 1.2, 0.8, 1.0], [2.0, 2.0, 2.0, 2.0]]
    seconds[..., 3] = 5.0  # messages and peers
    np.savez(tmp_path / "step_times.npz", seconds=seconds)
    node = cluster_of(f"--speed={tmp_path}").node
    assert node.image_s == pytest.approx(1.5 / 32) and node.fixed_s == 0
    assert sorted(node.jitter) == pytest.approx([0.8, 1, 1, 1, 1, 1, 1, 1.2])
    np.savez(tmp_path / "step_times.npz", seconds=seconds[:1])
    with pytest.raises(CheckpointError, match="fewer than 4 rows in metrics.jsonl"):  # of an attempt on other ranks
        cluster_of(f"--speed={tmp_path}")
    (tmp_path / "result.json").write_text('{"images_per_second": 40.0, "ranks": 1, "global_batch_size": 64}')
    assert cluster_of(f"--speed={tmp_path}").node.fixed_s == 5.0
    record = {"signature": {"model": model}, "per_rank": [{"host": host} for host in "aaaa"]}
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert cluster_of(f"--speed={tmp_path}").ranks_per_node == 4
    with pytest.raises(FlagError, match="had 4 ranks on a node"):
        cluster_of(f"--speed={tmp_path}", "--ranks_per_node=2")
    (tmp_path / "run.json").write_text(json.dumps({**record, "per_rank": ["a"]}))
    with pytest.raises(CheckpointError, match="run.json does not list the ranks"):
        cluster_of(f"--speed={tmp_path}")
    (tmp_path / "run.json").write_text(json.dumps({**record, "per_rank": [{"host": "a"}, {"host": "b"}]}))
    with pytest.raises(CheckpointError, match="2 hosts"):
        cluster_of(f"--speed={tmp_path}")
    (tmp_path / "run.json").write_text(json.dumps(record))
    constants = {"latency_s": 1e-5, "bandwidth": 1e9, "jitter": 0.1}
    (tmp_path / "network.json").write_text(json.dumps(constants))
    with pytest.raises(FlagError, match="--speed=.* also gives jitter"):
        cluster_of(f"--speed={tmp_path}", f"--network={tmp_path}/network.json")
    assert cluster_of("--speed=9", f"--network={tmp_path}/network.json").node.jitter == 0.1
    (tmp_path / "step_times.npz").write_bytes(b"no zip")
    with pytest.raises(CheckpointError, match="step_times.npz: cannot be read"):
        cluster_of(f"--speed={tmp_path}")


@pytest.mark.parametrize(
    "constants, message",
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
        ([1], "not a JSON object"),
    ],
)
def test_bad_constants(tmp_path, constants, message):
    (tmp_path / "network.json").write_text(json.dumps(constants))
    with pytest.raises(FlagError, match=message) as caught:
        cluster_of(f"--network={tmp_path}/network.json")
    assert "\n" not in str(caught.value)


def test_constants_of_a_file_are_used(tmp_path):
    constants = {"latency_s": 5e-6, "bandwidth": 1e9, "cycle_s": 0.005, "jitter": [1, 1.1, 1.3], "interference": 0.1}
    (tmp_path / "network.json").write_text(json.dumps({**constants, "inter_op_threads": 2, "algorithm": "ring"}))
    simulated = cluster_of(f"--network={tmp_path}/network.json")
    network, node = simulated.network, simulated.node
    assert (network.latency_s, network.bandwidth, network.algorithm) == (5e-6, 1e9, "ring")
    assert (simulated.exchange.cycle_s, node.jitter, node.interference) == (0.005, (1, 1.1, 1.3), 0.1)
    assert simulated.inter_op_threads == 2


def test_a_file_with_the_speed_of_a_rank_needs_no_other(tmp_path):
    """Fault: constants of the fit were added to those of the file, and another network than that of the fit refused."""
    path, fitted = tmp_path / "network.json", published.best_fit().node
    path.write_text(json.dumps({"latency_s": 5e-6, "bandwidth": 1e9, "image_s": 0.03}))
    simulated = cluster_of(f"--network={path}", "--model=resnet18", "--image_size=64", "--ranks_per_node=4")
    assert simulated.node == Node(image_s=0.03, jitter=fitted.jitter)
    assert simulated.sources[0] == f"node: image_s of {path}; jitter fitted to published points, see below"


@pytest.mark.parametrize(
    "flags, constants, source",
    [
        (
            [],
            {"batch_s": 0.1},
            "node: Intel Caffe's on 2x Xeon 8160, fitted to published points, see below; batch_s of {}",
        ),
        (["--speed=9"], {"fixed_s": 1, "jitter": 0.1}, "node: speed as given; fixed_s, jitter of {}"),
        ([], {"image_s": 1, "jitter": 0.1}, "node: image_s, jitter of {}"),
    ],
)
def test_the_source_of_every_part_of_a_node_is_named(tmp_path, flags, constants, source):
    path = tmp_path / "network.json"
    path.write_text(json.dumps({"latency_s": 5e-6, "bandwidth": 1e9, **constants}))
    simulated = cluster_of(f"--network={path}", *flags)
    assert simulated.sources[0] == source.format(path)
    assert {key: getattr(simulated.node, key) for key in constants} == constants
