"""Write the tables and plots of experiments/, also into documents: `python -m resnet_cpu.tables [--runs=FOLDER]`."""

import os
import sys
from typing import List

from resnet_cpu import commandline
from resnet_cpu.cluster import guard
from resnet_cpu.errors import DataError
from resnet_cpu.report import accuracy, border, border_prediction, efficiency, plotting, study_plots, tables


def main(argv: List[str]) -> None:
    """Collect the runs of --runs, if given; then write all tables and plots, and update the documents."""
    folder = commandline.parse(argv, "tables").tables.runs
    spec, published = (
        tables.read_csv(os.path.join(tables.EXPERIMENTS, f"{name}.csv")) for name in ("tables", "published")
    )
    if folder:
        (runs, curves), scaling_runs = accuracy.collect(folder), efficiency.collect(folder)
        if not runs and not scaling_runs:
            raise DataError(f"--runs={folder}: contains no finished run; name a folder with run folders below it")
        tables.update_results(accuracy.RUNS, runs, accuracy.RUN_COLUMNS)
        tables.update_results(accuracy.CURVES, curves, accuracy.CURVE_COLUMNS)
        tables.update_results(efficiency.SCALING_RUNS, scaling_runs, efficiency.RUN_COLUMNS)
    runs, curves, scaling_runs = map(tables.read_results, (accuracy.RUNS, accuracy.CURVES, efficiency.SCALING_RUNS))
    made = {
        **accuracy.tables(spec, published, runs),
        **efficiency.tables(spec, published, scaling_runs),
        **border.tables(runs, border_prediction.read()),
    }
    tables.write(made)
    if plotting.available():
        study_plots.draw_results(runs, curves, {name: table.rows for name, table in made.items()}, tables.RESULTS)
    print("\n\n".join(f"{name}\n\n{tables.markdown(table)}" for name, table in made.items()))
    print(f"tables: wrote {', '.join(made)} to {tables.RESULTS}", file=sys.stderr)
    tables.warn_of_unused(accuracy.RUNS, [row for row in runs if not border.holds(row)], spec)
    tables.warn_of_unused(efficiency.SCALING_RUNS, scaling_runs, spec)


if __name__ == "__main__":
    guard.run(main)
