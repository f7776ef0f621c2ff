"""All studies of experiments/: collect their runs, and make their tables, pictures and documents."""

import os
from typing import Dict

from resnet_cpu.errors import DataError
from resnet_cpu.report import accuracy, accuracy_plots, border, border_prediction, efficiency, plotting, scaling_plots
from resnet_cpu.report import tables as report


def collect(folder: str) -> None:
    """Add the finished runs below `folder` to the CSV files of experiments/results; without any, raise DataError."""
    (runs, curves), scaling_runs = accuracy.collect(folder), efficiency.collect(folder)
    if not runs and not scaling_runs:
        raise DataError(f"--runs={folder}: contains no finished run; name a folder with run folders below it")
    report.update_results(accuracy.RUNS, runs, accuracy.RUN_COLUMNS)
    report.update_results(accuracy.CURVES, curves, accuracy.CURVE_COLUMNS)
    report.update_results(efficiency.SCALING_RUNS, scaling_runs, efficiency.RUN_COLUMNS)


def make() -> Dict[str, report.Table]:
    """Write all tables and pictures from the CSV files, bring the documents up to date, and return the tables.

    Runs that no table has are reported on standard error.
    """
    spec, published = (
        report.read_csv(os.path.join(report.EXPERIMENTS, f"{name}.csv")) for name in ("tables", "published")
    )
    runs, curves, scaling_runs = map(report.read_results, (accuracy.RUNS, accuracy.CURVES, efficiency.SCALING_RUNS))
    made = {
        **accuracy.tables(spec, published, runs),
        **efficiency.tables(spec, published, scaling_runs),
        **border.tables(runs, border_prediction.read()),
    }
    report.write(made)
    if plotting.available():
        rows = {name: table.rows for name, table in made.items()}
        accuracy_plots.draw(runs, curves, rows.get("border", []), published, report.RESULTS)
        scaling_plots.draw_tables(rows, report.RESULTS)
    report.warn_of_unused(accuracy.RUNS, [row for row in runs if not border.holds(row)], spec)
    report.warn_of_unused(efficiency.SCALING_RUNS, scaling_runs, spec)
    return made
