"""Every plot is drawn from rows as they are written, and nothing is left beside it."""

import numpy as np
import pytest

from resnet_cpu.report import run_plots as plots
from resnet_cpu.report import tables as results
from resnet_cpu.scaling import steptimes as throughput

EVALUATIONS = [{"epoch": 1.0, "top1": 0.5, "loss": 1.0}, {"epoch": 2.0, "top1": 0.75, "loss": 0.5}]
METRICS = [{"epoch": 0.5, "loss": 2.0, "lr": 0.1}, {"epoch": 1.5, "loss": 1.0, "lr": 0.05}]
MEMBERS = {"one": {"top1": 0.8}, "two": {"top1": 0.82}}


def row(run, what="last", **more):
    return {"run": run, "what": what, "seed": "0", "top1": "0.5", "epoch": "1", **more}


@pytest.mark.parametrize(
    "draw, arguments",
    [
        (plots.draw_curves, (METRICS, EVALUATIONS)),
        (plots.draw_lr_scaling, (EVALUATIONS, results.read_csv(results.PUBLISHED_CURVES))),
        (plots.draw_ensemble, (MEMBERS, [{"top1": 0.8}, {"top1": 0.83}])),
    ],
)
def test_plots_of_a_run(draw, arguments, tmp_path):
    title = [] if draw is plots.draw_ensemble else ["a title"]
    draw(*arguments, str(tmp_path / "plot.png"), *title)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 1


def test_plots_of_step_times_and_of_ladders(tmp_path):
    times = np.random.default_rng(0).uniform(0.1, 0.2, [3, 10, 4])
    plots.draw_scaling(throughput.per_rank(times, ["a", "a", "b"]), str(tmp_path / "scaling.png"), "a title")
    rungs = [
        throughput.Rung(1, 1, 32, 1, 30.0, None, 1.0, 1.0, None, {}),
        throughput.Rung(2, 1, 64, 1, 57.0, 1.0, 1.9, 0.95, (0.9, 0.96), {}),
    ]
    published = [("64 nodes", 64, 0.945)]
    plots.draw_efficiency({"weak": rungs, "alone": rungs[:1]}, published, str(tmp_path / "efficiency.png"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["efficiency.png", "scaling.png"]


def test_plots_of_all_runs_and_runs_of_somebodys_own_do_not_disturb(tmp_path):
    runs = [
        row("ladder/linear-64/seed-0"),
        row("ladder/linear-256/seed-0"),
        row("ladder/mine"),
        row("ladder/linear-64/seed-1", top1=""),
        row("ensemble/cycles/seed-0", "prefix:1"),
        row("ensemble/cycles/seed-0", "prefix:2"),
        row("ensemble/one_model/seed-0"),
        row("somewhere/else"),
    ]
    plots.draw_results(runs, [row("cycles/poly/seed-0"), row("cycles/poly/seed-0", epoch="2")], str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"ladder.png", "ensemble.png", "cycles.png"}
