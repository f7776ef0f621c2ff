"""Draws tables and plots of runs beside published figures: `python -m resnet_cpu.tables [--runs=FOLDER]`."""

import os
import sys
from typing import Dict, List

from resnet_cpu import flags
from resnet_cpu.cluster import guard
from resnet_cpu.errors import DataError
from resnet_cpu.report import efficiency
from resnet_cpu.report import run_plots as plots
from resnet_cpu.report import tables as results
from resnet_cpu.run.atomic import write_atomically


def main(argv: List[str]) -> None:
    """Collect the runs of --runs, if given; then write every table, and the documents that hold them, anew."""
    values, _ = flags.parse_values(argv, "tables")
    folder = values.experiments
    runs_csv, curves_csv, scaling_csv = (
        os.path.join(folder, "results", name) for name in ("runs.csv", "curves.csv", "scaling_runs.csv")
    )
    if values.runs:
        runs, curves = results.collect(values.runs)
        scaling = efficiency.collect(values.runs)
        if not runs and not scaling:
            raise DataError(f"--runs={values.runs}: no finished run in it; name the folder that the runs lie in")
        for path, rows, columns in (
            (runs_csv, runs, results.RUN_COLUMNS),
            (curves_csv, curves, results.CURVE_COLUMNS),
            (scaling_csv, scaling, efficiency.COLUMNS),
        ):
            old = results.read_csv(path) if os.path.exists(path) else []
            results.write_csv(path, results.merge(old, rows), columns)
    spec, measured = results.read_csv(os.path.join(folder, "tables.csv")), results.read_csv(runs_csv)
    published = results.read_csv(os.path.join(folder, "published.csv"))
    tables = results.lines(spec, published, measured)
    rungs = results.read_csv(scaling_csv) if os.path.exists(scaling_csv) else []
    ladders = efficiency.tables(spec, published, rungs)
    texts: Dict[str, str] = {name: results.markdown(table) for name, table in tables.items()}
    for name, table in tables.items():
        base = os.path.join(folder, "results", name)
        results.write_csv(f"{base}.csv", *results.table_csv(table))
        write_atomically(f"{base}.tex", results.latex(table).encode())
    for name, ladder in ladders.items():
        base = os.path.join(folder, "results", name)
        texts[name] = efficiency.markdown(ladder)
        results.write_csv(f"{base}.csv", *efficiency.table_csv(ladder))
        write_atomically(f"{base}.tex", efficiency.latex(ladder).encode())
    for document in values.documents:
        with open(document, encoding="utf-8") as file:
            before = file.read()
        write_atomically(document, results.fill(before, texts).encode())
    if plots.available():
        plots.draw_results(results.read_csv(runs_csv), results.read_csv(curves_csv), os.path.join(folder, "results"))
        points = [point for ladder in ladders.values() for point in ladder.published]
        for name, ladder in ladders.items():
            if ladder.ladders:
                plots.draw_efficiency(ladder.ladders, points, os.path.join(folder, "results", f"{name}.png"))
    print("\n\n".join(f"{name}\n\n{text}" for name, text in texts.items()))
    print(f"tables: {', '.join(texts)} in {folder}/results", file=sys.stderr)
    for path, rows in ((runs_csv, measured), (scaling_csv, rungs)):
        unplaced = results.unplaced(spec, rows)
        if unplaced:
            print(
                f"tables: {len(unplaced)} runs are in {path} but in no table: {', '.join(unplaced[:6])}; the column "
                f"`runs` of {folder}/tables.csv says which folders make up which line",
                file=sys.stderr,
            )


if __name__ == "__main__":
    guard.run(main)
