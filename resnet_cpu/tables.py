"""Write the tables and plots of experiments/, also into documents: `python -m resnet_cpu.tables [--runs=FOLDER]`."""

import sys
from typing import List

from resnet_cpu import commandline
from resnet_cpu.cluster import guard
from resnet_cpu.report import studies
from resnet_cpu.report.tables import RESULTS, markdown


def main(argv: List[str]) -> None:
    """Collect the runs of --runs, if given; then write all tables and plots, and update the documents."""
    folder = commandline.parse(argv, "tables").tables.runs
    if folder:
        studies.collect(folder)
    results = studies.read()
    studies.write(results)
    print("\n\n".join(f"{name}\n\n{markdown(table)}" for name, table in results.tables.items()))
    print(f"tables: wrote {', '.join(results.tables)} to {RESULTS}", file=sys.stderr)


if __name__ == "__main__":
    guard.run(main, reader_may_leave=True)
