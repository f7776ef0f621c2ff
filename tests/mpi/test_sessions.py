"""Several ranks under the real mpirun: equality, evaluation, resuming, and negative controls."""

import json
import pathlib
import signal
import subprocess
import sys
import time

import equality
import numpy as np
import psutil
import pytest
from conftest import OUTSIDE, ROOT, TINY_FLAGS, last_line, write_tiny_data

from resnet_cpu.run import checkpoint

pytestmark = pytest.mark.mpi
SIZES = (2, 3, 4)


@pytest.fixture(scope="session")
def data_sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mpi_data")
    write_tiny_data(str(folder / "train"))
    for examples in (1, 7, 50, 101):
        write_tiny_data(str(folder / str(examples)), train=10, validation=examples)
    return folder


@pytest.fixture(scope="session")
def sessions(tmp_path_factory, data_sets):
    """Run the worker once for each number of ranks, on first use; return its folder."""
    done = {}

    def session(ranks):
        if ranks not in done:
            out = tmp_path_factory.mktemp(f"ranks{ranks}")
            process = subprocess.run(
                ["launch/local.sh", str(ranks), sys.executable, "tests/mpi/worker.py", str(out), str(data_sets)],
                cwd=ROOT,
                env=OUTSIDE,
                capture_output=True,
                text=True,
                timeout=900,
            )
            (out / "log").write_text(process.stdout + process.stderr)
            done[ranks] = out, process
        out, process = done[ranks]
        assert process.returncode == 0, process.stderr[-4000:]
        return out

    return session


def found(folder: pathlib.Path, case: str):
    return json.loads((folder / f"{case}.json").read_text())


def arrays(folder, case):
    with np.load(folder / f"{case}.npz") as content:
        return {name: content[name] for name in content.files}


@pytest.mark.parametrize("ranks", SIZES)
def test_sums_and_means_are_exact(sessions, ranks):
    assert found(sessions(ranks), "allreduce") == {"mean": (ranks - 1) / 2, "total": ranks * (ranks - 1) // 2}


@pytest.mark.parametrize("ranks", (2, 3))
def test_control_plane(sessions, ranks):
    assert found(sessions(ranks), "control_plane")["ok"]


def relative_norms(one, other):
    return {name: np.linalg.norm(one[name] - other[name]) / (np.linalg.norm(other[name]) or 1) for name in other}


@pytest.fixture(scope="module")
def alone():
    """The arrays that one rank computes from the whole batches."""
    return {case: equality.train(case, slice(None)) for case in equality.CASES}


@pytest.mark.parametrize("ranks", SIZES)
def test_ranks_equal_one_rank_with_the_whole_batch_float64(sessions, alone, ranks):
    together = arrays(sessions(ranks), "equality_float64")
    for name, expected in alone["float64"].items():
        np.testing.assert_allclose(together[name], expected, rtol=1e-12, atol=1e-14, err_msg=name)


@pytest.mark.parametrize("ranks", SIZES)
def test_ranks_equal_one_rank_with_the_whole_batch_float32(sessions, alone, ranks):
    norms = relative_norms(arrays(sessions(ranks), "equality_float32"), alone["float32"])
    assert max(norms.values()) < 1e-6, norms


@pytest.mark.parametrize("ranks", SIZES)
def test_means_by_bfloat16_are_those_of_rounded_values(sessions, ranks):
    assert found(sessions(ranks), "exchange") == {"wrong": [0, 0, 0, 0], "parts": [[3, 2, 1], [0]]}


@pytest.mark.parametrize("ranks", SIZES)
def test_gradients_sent_as_bfloat16_lose_no_more_than_its_digits(sessions, alone, ranks):
    """Velocities and weights after five steps, beside those of one rank, which sends nothing."""
    norms = relative_norms(arrays(sessions(ranks), "equality_bfloat16_exchange"), alone["float32"])
    assert 1e-5 < max(norms.values()) < 2**-7, norms


def test_one_rank_computes_the_same_with_either_exchange(alone):
    assert max(relative_norms(alone["bfloat16_exchange"], alone["float32"]).values()) == 0


@pytest.mark.parametrize("case", ["batch_norm", "fused"])
@pytest.mark.parametrize("ranks", (1, *SIZES))
def test_batch_norm_equals_ghost_batches(sessions, alone, ranks, case):
    """Also with the fused kernels, the update of all weights among them."""
    together = alone[case] if ranks == 1 else arrays(sessions(ranks), f"equality_{case}")
    norms = relative_norms(together, equality.ghost_batches(ranks))
    assert max(norms.values()) < 1e-5, norms


def test_negative_control_batch_norm_is_not_that_of_the_whole_batch(sessions, alone):
    norms = relative_norms(arrays(sessions(2), "equality_batch_norm"), alone["batch_norm"])
    assert max(norms.values()) > 1e-3


def test_negative_control_without_averaging_ranks_diverge_and_are_detected(sessions, alone):
    apart = arrays(sessions(2), "equality_without_averaging")
    whole = {name.split(" ", 1)[1]: array for name, array in alone["float64"].items() if "velocity" not in name}
    assert max(relative_norms({k: apart[k] for k in whole}, whole).values()) > 1e-6
    assert "replicas differ in the test" in found(sessions(2), "without_averaging")["error"]


def test_broadcast_makes_ranks_equal_and_its_absence_is_detected(sessions):
    seen = found(sessions(2), "broadcast")
    assert "replicas differ" in seen["before"] and seen["after"] is None
    run = found(sessions(2), "run_without_broadcast")
    assert "replicas differ before step 0" in run["error"] and run["rows"] == []


def test_evaluation_is_exact_for_any_ranks_and_batches(sessions, data_sets):
    results = {ranks: found(sessions(ranks), "evaluation") for ranks in (2, 3)}
    results[1] = one_rank_evaluation(data_sets)
    for examples in (1, 7, 50, 101):
        rows = [results[ranks][f"{examples}/{batch}"] for ranks in (1, 2, 3) for batch in (1, 8, 64)]
        assert all(row[:3] == rows[0][:3] for row in rows), (examples, rows)
        assert rows[0][0] == examples and rows[0][1] <= rows[0][2] <= examples
        np.testing.assert_allclose([row[3] for row in rows], rows[0][3], rtol=1e-6)


@pytest.mark.parametrize("examples", (1, 7, 50, 101))
def test_predictions_hold_every_example_once_whatever_the_ranks(sessions, examples):
    two, three = (arrays(sessions(ranks), f"predictions_{examples}") for ranks in (2, 3))
    for found_here in (two, three):
        assert found_here["ids"].tolist() == list(range(examples)) and len(found_here["probabilities"]) == examples
    assert (two["labels"] == three["labels"]).all()
    np.testing.assert_allclose(two["probabilities"], three["probabilities"], rtol=1e-4, atol=1e-6)


def one_rank_evaluation(data_sets):
    import whole_runs as runs

    from resnet_cpu import commandline
    from resnet_cpu.cluster.control import World
    from resnet_cpu.data import folders
    from resnet_cpu.training import evaluation
    from resnet_cpu.training.state import build_model

    settings = commandline.parse([*runs.TINY_FLAGS, "--seed=3"])
    step = evaluation.make_evaluate_step(build_model(settings))
    found_here = {}
    for examples in (1, 7, 50, 101):
        data = folders.open_data(str(data_sets / str(examples)), "digits")
        for batch in (1, 8, 64):
            score = evaluation.evaluate(step, settings, World(1, 0), data, batch)
            found_here[f"{examples}/{batch}"] = [score.examples, score.correct1, score.correct5, score.loss]
    return found_here


def test_resume_on_two_ranks_is_bit_identical(sessions):
    assert found(sessions(2), "resume")["ok"]


def test_an_ensemble_that_was_cut_off_has_the_same_members_on_two_ranks(sessions):
    assert found(sessions(2), "tree")["ok"]


def test_usr1_stops_both_ranks_at_one_step_and_the_rest_is_bit_identical(sessions, data_sets, tmp_path):
    """The signal is sent to mpirun, as a batch system does; then the same command continues, in a new process."""
    import whole_runs as runs

    whole = str(sessions(2) / "long")
    stopped = str(tmp_path / "stopped")
    flags = [*TINY_FLAGS, *runs.LONG, f"--data_dir={data_sets}/train", f"--run_dir={stopped}", "--threads=1"]
    command = ["launch/local.sh", "2", sys.executable, "-m", "resnet_cpu.train", *flags]
    process = subprocess.Popen(
        command, cwd=ROOT, env=OUTSIDE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "stopped" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.exists() and metrics.read_text().count("\n") > 5) and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 75 and out == "", err
    (step,) = checkpoint.steps(stopped)
    assert f"stopped on request after step {step}" in err and step > 5
    last = next(saved for saved in checkpoint.steps(whole) if saved >= step + 10)  # bits that are equal then stay equal
    again = subprocess.run(
        [*command, f"--max_steps={last}"], cwd=ROOT, env=OUTSIDE, capture_output=True, text=True, timeout=600
    )
    assert again.returncode == 0, again.stderr
    result = json.loads(last_line(again.stdout))
    assert result["ranks"] == 2
    assert not runs.differing(runs.state_after(stopped, last), runs.state_after(whole, last))
    assert runs.losses(stopped) == runs.losses(whole)[:last]
    evaluate = ["-m", "resnet_cpu.evaluate", f"--run_dir={stopped}", "--eval_batch_size=4"]
    scored = subprocess.run(
        ["launch/local.sh", "2", sys.executable, *evaluate],
        cwd=ROOT, env=OUTSIDE, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert scored.returncode == 0, scored.stderr
    scores = json.loads(last_line(scored.stdout))
    assert [scores[key] for key in ("examples", "top1", "top5")] == [21, result["top1"], result["top5"]]


def test_a_killed_rank_costs_an_ensemble_nothing_but_time(sessions, data_sets, tmp_path):
    """SIGKILL for one rank in a branch, then the same command again: the same members, bit for bit."""
    import whole_runs as runs

    run_dir = tmp_path / "run"
    flags = [*TINY_FLAGS, *runs.TREE, f"--data_dir={data_sets}/train", f"--run_dir={run_dir}", "--threads=1"]
    command = ["launch/local.sh", "2", sys.executable, "-m", "resnet_cpu.train", *flags]
    process = subprocess.Popen(
        command, cwd=ROOT, env=OUTSIDE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    metrics = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.exists() and '"tail"' in metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.005)
    ranks = [
        child for child in psutil.Process(process.pid).children(recursive=True) if "resnet_cpu.train" in child.cmdline()
    ]
    ranks[-1].kill()
    process.communicate(timeout=300)
    assert process.returncode == 137 and not (run_dir / "result.json").exists()
    again = subprocess.run(command, cwd=ROOT, env=OUTSIDE, capture_output=True, text=True, timeout=600)
    assert again.returncode == 0, again.stderr
    whole = sessions(2) / "tree" / "whole"
    assert not runs.differing(runs.members(str(run_dir)), runs.members(str(whole)))
    assert json.loads(again.stdout)["ensemble"] == json.loads((whole / "result.json").read_text())["ensemble"]


def test_two_ranks_run_like_one_up_to_rounding_of_batch_norm(sessions, data_sets, tmp_path):
    """The same global batch on one rank has the same examples: LR and steps agree exactly, losses roughly."""
    import whole_runs as runs

    from resnet_cpu.cluster.control import World

    folder = sessions(2)
    assert found(folder, "run_state")["batch"] == [6, 12]
    runs.train(World(1, 0), str(data_sets / "train"), str(tmp_path / "run"))
    two, one = runs.losses(str(folder / "run")), runs.losses(str(tmp_path / "run"))
    assert [(step, rate) for step, _, rate in two] == [(step, rate) for step, _, rate in one]
    assert two[0][1] == pytest.approx(one[0][1], rel=0.05)  # first step: batch norm over 6 images each, not 12


def test_rank_0_loads_weights_profiles_and_exports_while_the_others_wait(sessions):
    folder = sessions(2)
    case = found(folder, "what_rank_0_does_alone")
    assert case["result"]["complete"] and case["step"] == 11
    assert case["scores"]["examples"] == 21 and case["scores"]["top1"] == pytest.approx(case["result"]["top1"], abs=0.1)
    assert (folder / "alone" / "init_from.txt").read_text().startswith("taken   conv1_conv/kernel:0")
    assert (folder / "alone" / "profile.csv").read_text().startswith("operation,calls_per_step,ms_per_step")
    with np.load(folder / "alone.npz") as exported:
        assert "logits/kernel:0" in exported.files
    assert "already exists" in case["refused"][0] and case["refused"][1]


def test_all_ranks_open_the_same_job_and_rank_0_holds_the_folder(sessions):
    case = found(sessions(2), "opening")
    assert case["held"] == [True, False] and case["signatures"][0] == case["signatures"][1]
    assert len(case["signatures"][1]["init_from"]) == 64


def test_a_delayed_rank_is_named_and_the_other_waits_for_it(sessions):
    """Rank 1 sleeps 100 ms before each step, which counts as its own work; rank 0 waits for it."""
    folder = sessions(2)
    case = found(folder, "scaling")
    assert (
        case["slowest_rank"]["rank"] == 1 and case["timed_steps"] == 16 - 10 - 1
    )  # the first ten, and the first of the second phase
    ranks = json.loads((folder / "scaling" / "scaling.json").read_text())["ranks"]
    assert ranks[1]["split_s"]["between"] > 0.1 > ranks[0]["split_s"]["between"]
    assert ranks[0]["split_s"]["peers"] > 0.05 and ranks[1]["last"] > 0.9
    with np.load(folder / "scaling" / "step_times.npz") as times:
        assert times["seconds"].shape == (2, 5, 4) and len(times["hosts"]) == 2
        # Clocks are not compared, but ranks leave an allreduce together: their steps take the same time.
        ends = np.delete(times["seconds"].sum(-1), np.flatnonzero(np.diff(times["steps"]) > 1) + 1, axis=1)
        assert ends[0].sum() == pytest.approx(ends[1].sum(), rel=0.1)


def test_messages_are_timed_by_both_libraries(sessions):
    folder = sessions(2)
    case = found(folder, "messages")
    assert case["rate"] > 0 and f"{case['gradients']:,} bytes" in case["lines"][-1]
    lines = (folder / "messages" / "allreduce.csv").read_text().splitlines()
    rows = [dict(zip(lines[0].split(","), line.split(","))) for line in lines[1:]]
    assert [(row["library"], int(row["bytes"])) for row in rows] == [
        (library, size) for library in ("mpi4py", "horovod") for size in (1024, 4096, case["gradients"])
    ]
    for row in rows:
        assert 3 <= int(row["calls"]) <= 5 and float(row["latency_s"]) > 0
        assert (
            row["algorithm_bandwidth_bytes_per_s"] == row["bus_bandwidth_bytes_per_s"]
        )  # for two ranks: 2 (2 - 1) / 2 = 1
