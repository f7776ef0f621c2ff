"""Every plot is drawn from rows as they are written, and no temporary file is left beside it."""

import numpy as np
import pytest

from resnet_cpu.report import accuracy_plots, plotting, run_plots, scaling_plots, tables
from resnet_cpu.scaling import steptimes

EVALUATIONS = [{"epoch": 1.0, "top1": 0.5, "loss": 1.0}, {"epoch": 2.0, "top1": 0.75, "loss": 0.5}]
METRICS = [{"epoch": 0.5, "loss": 2.0, "lr": 0.1}, {"epoch": 1.5, "loss": 1.0, "lr": 0.05}]
MEMBERS = {"one": {"top1": 0.8}, "two": {"top1": 0.82}}


def row(run, what="last", **more):
    return {"run": run, "what": what, "seed": "0", "top1": "0.5", "epoch": "1", **more}


@pytest.mark.parametrize(
    "draw, arguments",
    [
        (run_plots.draw_curves, (METRICS, EVALUATIONS)),
        (run_plots.draw_lr_scaling, (EVALUATIONS, tables.read_csv(tables.PUBLISHED_CURVES))),
        (run_plots.draw_ensemble, (MEMBERS, [{"top1": 0.8}, {"top1": 0.83}])),
    ],
)
def test_plots_of_a_run(draw, arguments, tmp_path):
    title = [] if draw is run_plots.draw_ensemble else ["a title"]
    draw(*arguments, str(tmp_path / "plot.png"), *title)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 1


def rung(ranks, rate, sd, efficiency, low="", high=""):
    figures = {"ranks": ranks, "images_per_second": rate, "images_per_second_sd": sd, "efficiency": efficiency}
    return {"what": "weak", "nodes": "", **figures, "efficiency_low": low, "efficiency_high": high}


LADDER = [rung("1", "30.0", "", "1"), rung("2", "57.0", "1.0", "0.95", "0.9", "0.96")]
PUBLISHED = {"what": "64 nodes", "nodes": "64", "efficiency": "0.945"}


def test_plots_of_step_times_and_of_ladders(tmp_path):
    times = np.random.default_rng(0).uniform(0.1, 0.2, [3, 10, 4])
    run_plots.draw_scaling(steptimes.per_rank(times, ["a", "a", "b"]), str(tmp_path / "scaling.png"), "a title")
    alone = {**LADDER[0], "what": "alone"}
    scaling_plots.draw_efficiency([*LADDER, alone, {"what": "not run"}], [PUBLISHED], str(tmp_path / "efficiency.png"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["efficiency.png", "scaling.png"]


def test_the_plan_is_drawn_with_the_start_of_each_phase(tmp_path):
    run_plots.draw_plan([0.0, 0.5, 1.0], [0.1, 0.2, 0.1], {"main": 0.0, "tail": 1.0}, str(tmp_path / "plan.png"))
    assert [path.name for path in tmp_path.iterdir()] == ["plan.png"]


def test_plots_of_predictions(tmp_path):
    points = [{"nodes": 64, "share": 0.9, "label": "a point", "fitted": fitted} for fitted in (True, False)]
    scaling_plots.draw_prediction(
        {"a network": ([1, 2], [1.0, 0.9])}, points, str(tmp_path / "one.png"), "a title", "one node"
    )
    points = [{"measured": 1.0, "predicted": 1.1, "fitted": fitted} for fitted in (True, False)]
    scaling_plots.draw_validation(points, str(tmp_path / "two.png"), "a title")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.png", "two.png"]


def test_plots_of_all_experiments_ignore_other_runs_and_tables(tmp_path):
    runs = [
        row("ladder/linear-64/seed-0", steps="100"),
        row("ladder/linear-256/seed-0", steps="25"),
        row("ladder_cifar/linear-256/seed-0", steps="50"),
        row("ladder_cifar/linear-1024/seed-0", steps="12"),
        row("ladder_cifar_20/linear-256/seed-0", steps="100"),
        row("ladder/mine"),
        row("ensemble/cycles/mine"),
        row("ensemble_full/cycles/seed-0"),
        row("image_size/growing/seed-1"),
        row("ladder/linear-64/seed-1", top1=""),
        row("ladder/linear-256/seed-1", "not_finite", top1=""),
        row("ensemble/cycles/seed-0", "prefix:1"),
        row("ensemble/cycles/seed-0", "prefix:2"),
        row("ensemble/cycles/seed-1", "prefix:2"),
        row("ensemble/one_model/seed-0"),
        row("somewhere/else"),
    ]
    curves = [row("cycles/poly/seed-0"), row("cycles/poly/seed-0", epoch="2")]
    curves += [row("image_size/growing/seed-0", wall_seconds=seconds) for seconds in ("60.5", "121", "")]
    published = [{"id": "haiku_256", "global_batch_size": "256", "value": "76.7"}, {"id": "a_main", "value": "75.6"}]
    published.append({"id": "haiku_none", "global_batch_size": "", "value": "1"})
    accuracy_plots.draw(runs, curves, [], published, str(tmp_path))
    made = {"scaling": LADDER, "published": [PUBLISHED], "recipes": [{"what": "a score", "n": "1"}]}
    scaling_plots.draw_tables(made, str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{n}.png"
        for n in (
            *("ladder", "ladder_cifar", "ladder_cifar_20", "ladder_steps"),
            *("ensemble", "cycles", "scaling", "image_size"),
        )
    }


def test_a_seed_whose_loss_was_not_finite_is_a_cross():
    rules = {"linear": {64: [row("ladder/linear-64/seed-0", steps="100")]}}
    for failed in ({"linear": {256: [row("ladder/linear-256/seed-0", "not_finite", top1="")]}}, {}):
        figure, axes = plotting.pyplot().subplots()
        accuracy_plots._ladder(axes, rules, failed, {})
        crosses = [list(line.get_xydata()[0]) for line in axes.lines if line.get_marker() == "x"]
        assert crosses == ([[256, 0]] if failed else [])
        assert ("loss not finite" in axes.get_ylabel()) == bool(failed)
        plotting.pyplot().close(figure)


def test_the_plot_of_the_border_takes_rows_with_and_without_interval_and_prediction(tmp_path):
    figures = {"setting": "tiny", "images": "10000", "difference": "0.5"}
    rows = [
        {**figures, "arm": "late_36", "n": "3", "low": "-0.1", "high": "1.1", "predicted": "0.7"},
        {**figures, "arm": "published", "n": "1", "low": "", "high": "", "predicted": ""},
        {**figures, "arm": "published", "n": "1", "low": "", "high": "", "predicted": "", "setting": "tuned"},
    ]
    accuracy_plots.draw([], [], rows, [], str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["border.png"]
