"""All studies of experiments/: collect their runs, and make their tables, pictures and documents."""

import os
from typing import Dict, List, NamedTuple

from resnet_cpu.errors import DataError
from resnet_cpu.report import (
    accuracy,
    accuracy_plots,
    border,
    border_prediction,
    efficiency,
    gains,
    plotting,
    scaling_plots,
)
from resnet_cpu.report import tables as report
from resnet_cpu.run import files


def collect(folder: str) -> None:
    """Add the finished runs below `folder` to the CSV files of experiments/results; without any, raise DataError."""
    if os.path.exists(os.path.join(folder, files.RECORD)):
        raise DataError(f"--runs={folder}: is itself a run; name the folder above it, so that the run has a name")
    (runs, curves), scaling_runs = accuracy.collect(folder), efficiency.collect(folder)
    if not runs and not scaling_runs:
        raise DataError(f"--runs={folder}: contains no finished run; name a folder with run folders below it")
    report.update_results(accuracy.RUNS, accuracy.read_runs(), runs, accuracy.RUN_COLUMNS)
    report.update_results(accuracy.CURVES, accuracy.read_curves(), curves, accuracy.CURVE_COLUMNS)
    report.update_results(efficiency.SCALING_RUNS, efficiency.read_runs(), scaling_runs, efficiency.RUN_COLUMNS)


class Results(NamedTuple):
    """The rows of the CSV files of experiments/, and the tables that are made from them."""

    spec: List[report.Row]
    published: List[report.Row]
    runs: List[report.Row]
    curves: List[report.Row]
    scaling_runs: List[report.Row]
    tables: Dict[str, report.Table]


def read() -> Results:
    """Read the CSV files and make all tables; raise DataError if a file or a published figure is missing."""
    spec = report.read_csv(os.path.join(report.EXPERIMENTS, "tables.csv"), report.SPEC_COLUMNS)
    published = report.read_csv(os.path.join(report.EXPERIMENTS, "published.csv"), report.PUBLISHED_COLUMNS)
    runs, curves, scaling_runs = accuracy.read_runs(), accuracy.read_curves(), efficiency.read_runs()
    made = {
        **accuracy.tables(spec, published, runs),
        **efficiency.tables(spec, published, scaling_runs),
        **border.tables(runs, *border_prediction.read()),
    }
    made.update(gains.tables(runs, made["border"].rows if "border" in made else []))
    return Results(spec, published, runs, curves, scaling_runs, made)


def write(results: Results) -> None:
    """Write all tables and pictures, and bring the documents up to date; report runs that no table has."""
    report.write(results.tables)
    if plotting.available():
        rows = {name: table.rows for name, table in results.tables.items()}
        ensembles = rows.get("border", [])
        accuracy_plots.draw(results.runs, results.curves, ensembles, results.published, report.RESULTS)
        scaling_plots.draw_tables(rows, report.RESULTS)
    report.warn_of_unused(accuracy.RUNS, [row for row in results.runs if not border.holds(row)], results.spec)
    report.warn_of_unused(efficiency.SCALING_RUNS, results.scaling_runs, results.spec)
