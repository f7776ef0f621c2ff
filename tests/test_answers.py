"""The table, the CSV and the plot of a prediction."""

import csv
import dataclasses

import pytest

from resnet_cpu import commandline
from resnet_cpu.report import scaling_plots
from resnet_cpu.simulator import answers, cluster, published


def answer(*arguments):
    return answers.answer(commandline.parse(list(arguments), "simulate"))


def test_csv_of_the_curve():
    found = list(
        csv.DictReader(
            answer("--nodes=6", "--batch_size=16", "--ranks_per_node=3", "--speed=90", "--format=csv").splitlines()
        )
    )
    assert [row["nodes"] for row in found] == ["1", "2", "4", "6"]
    for row in found:
        parts = [float(row[f"{part}_s"]) for part in ("compute", "jitter", "allreduce", "coordinator", "input")]
        assert float(row["step_s"]) == pytest.approx(sum(parts))
        assert float(row["images_per_second"]) == pytest.approx(int(row["ranks"]) * 16 / float(row["step_s"]))
        assert int(row["global_batch_size"]) == 16 * int(row["ranks"]) == 48 * int(row["nodes"])
        assert float(row["compute_s"]) == pytest.approx(3 * 16 / 90)
    assert float(found[0]["efficiency"]) == 1
    assert float(found[3]["efficiency"]) == pytest.approx(float(found[0]["step_s"]) / float(found[3]["step_s"]))


def test_the_table_answers_every_question():
    text = answer("--phase=main:epochs=90,lr=1", "--nodes=64", "--network=ethernet1", "--batch_size=32")
    assert "below 90 % at" in text and "allreduce" in text
    assert "the recipe on 64 nodes:" in text and "node-hours" in text
    assert (
        "local batch: on 64 nodes, relative to one node with as many images per rank | for a global batch of 4,096"
        in text
    )
    assert "assumed" in text and "published points" in text
    assert "efficiency on 64 nodes: " in text and "% if gradients came layer by layer" in text
    text = answer("--nodes=2", "--batch_size=32")
    assert "above 90 % up to 2 nodes" in text and "give a --flagfile" in text


def test_a_step_of_more_images_than_the_data_set_has_only_leaves_the_time_to_train_open():
    printed = answer("--nodes=1536", "--train_examples=50000", "--phase=a:epochs=9,lr=1")
    assert "time to train: a step on 1,536 nodes has more than the 50,000 images of the data set" in printed


def test_the_table_names_the_nodes_that_it_leaves_out_and_why(capsys):
    """Fault: the reason was always that the batch is not divisible; this one is."""
    strong = ["--global_batch_size=1024", "--batch_size=32"]
    lines = answer("--nodes=24", "--accumulate_steps=0", *strong).splitlines()
    first = lines.index("24 nodes are not possible; the answers are for 16, the largest number that is")
    assert lines[first + 1].startswith("left out: 24; at 24: --global_batch_size=1024: not divisible by 48 ranks")
    text = answer("--nodes=32", *strong)
    assert "left out: 1, 2, 4, 8, 32; at 32: --batch_size=32 (per rank) contradicts --global_batch_size=1024" in text
    assert capsys.readouterr().err == ""
    answer("--nodes=24", "--format=csv", "--accumulate_steps=0", *strong)
    assert capsys.readouterr().err.splitlines() == lines[first : first + 2]
    answer("--nodes=16", "--format=csv", "--accumulate_steps=0", *strong)
    assert capsys.readouterr().err == ""


def test_efficiency_is_relative_to_the_first_point_that_is_possible(tmp_path, monkeypatch):
    """Fault: the first of the points was called one node, which was never computed."""
    monkeypatch.chdir(tmp_path)
    strong = ["--nodes=64", "--global_batch_size=4096", "--batch_size=32"]
    text = answer(*strong)
    assert "(strong scaling); efficiency relative to 64 nodes" in text and "compared with 64 nodes" in text
    drawn = {}
    monkeypatch.setattr(scaling_plots, "draw_prediction", lambda *given: drawn.update(given=given))
    answer(*strong, "--format=png")
    assert drawn["given"][1] == [] and drawn["given"][-1] == "64 nodes"  # published points are relative to one node
    assert "compared with one node" in answer("--nodes=2") and "; efficiency relative to" not in answer("--nodes=2")


def test_causes_compare_as_many_images_as_one_node_computes():
    """A time of each micro-batch is paid as often on one node; a time of each step, the update, is not."""
    settings = commandline.parse(
        ["--global_batch_size=1024", "--accumulate_steps=0", "--batch_size=32", "--network=ethernet10"], "simulate"
    )
    simulated = cluster.from_settings(settings)
    update = "the update and other costs of a step"
    assert update not in answers.cause_line(simulated, cluster.curve(simulated, 24)[0])
    updating = simulated._replace(node=dataclasses.replace(simulated.node, fixed_s=0.2))
    assert update in answers.cause_line(updating, cluster.curve(updating, 16)[0])


def test_what_is_not_known_or_not_considered_is_stated():
    """Faults: an epoch of an unknown number of images took 0 s; --max_steps was passed over in silence."""
    lines = answer("--dataset=folder", "--num_classes=10", "--nodes=1", "--max_steps=9").splitlines()
    row = next(line.split() for line in lines if line.split()[:2] == ["32", "64"])
    assert row[-3:] == ["1", "-", "-"]
    assert "note: --max_steps=9 stops the run earlier; the whole recipe is shown" in lines


def test_one_of_something_is_singular():
    flags = ["--nodes=1", "--ranks_per_node=1", "--batch_size=1", "--speed=50", "--phase=main:steps=90,lr=1"]
    text = answer(*flags)
    assert "resnet50, 1 rank per node, 1 image per rank" in text and "local batch: on one node" in text
    assert "the recipe on one node: " in text and "above 90 % up to one node" in text


def test_printed_errors_are_those_of_the_model():
    lines = answers.published_lines()
    for name in ("two_constants", "three_constants"):
        for point in published.best_fit(name).comparisons:
            kind = "fitted to" if point.fitted else "held out"
            mine = [line.split() for line in lines if line.split()[:1] == [point.name]]
            assert any(f"{100 * point.error:+.1f}" in words and kind in " ".join(words) for words in mine), point
    assert any("104K cores" in line and "26." in line for line in lines)


def test_the_plot_shows_the_curve_and_the_points(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    drawn = {}
    real = scaling_plots.draw_prediction
    monkeypatch.setattr(scaling_plots, "draw_prediction", lambda *given: drawn.update(given=given) or real(*given))
    assert answer("--nodes=64", "--batch_size=32", "--format=png") == "simulate.png"
    assert (tmp_path / "simulate.png").stat().st_size > 10_000
    curves, points, *_ = drawn["given"]
    assert [(point["nodes"], point["fitted"]) for point in points] == [(32, True), (64, False), (8, False), (2, False)]
    assert all(nodes[-1] == 64 and shares[0] == 1 for nodes, shares in curves.values())
