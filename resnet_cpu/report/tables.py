"""Tables of experiments: from CSV files of runs and published figures to Markdown, CSV, LaTeX and documents.

experiments/tables.csv                which runs and which published figures make up which table
experiments/published.csv             figures published by others, each with its source
experiments/results/runs.csv          scores of our runs, and curves.csv: top-1 over their epochs (report/accuracy.py)
experiments/results/scaling_runs.csv  step times of our scaling runs (report/efficiency.py)
experiments/results/TABLE.csv, .tex   the tables that are made from these
"""

import csv
import fnmatch
import io
import math
import os
import re
import sys
from typing import Any, Container, Dict, Iterable, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from resnet_cpu.errors import DataError
from resnet_cpu.run import files
from resnet_cpu.run.atomic import write_atomically
from resnet_cpu.text import count

Row = Dict[str, str]
Column = Tuple[str, List[str]]  # title, cells

# All relative to the current folder: the root of the repository, or of a copy with other experiments.
EXPERIMENTS = "experiments"
RESULTS = os.path.join(EXPERIMENTS, "results")
DOCUMENTS = ("README.md", *(f"docs/{name}.md" for name in ("results", "ensemble", "scaling", "benchmarks", "simulate")))
# Top-1 over epochs of Intel's entries, from stanford-futuredata/dawn-bench-entries.
PUBLISHED_CURVES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "published_curves.csv")
NOT_RUN = "not run"
SPEC_COLUMNS = ("table", "label", "runs", "what", "flagfile", "published")  # of tables.csv; `accuracy` has further ones
PUBLISHED_COLUMNS = ("id", "what", "value", "unit", "global_batch_size", "hardware", "source")  # of published.csv
_WHOLE = frozenset(  # columns of whole numbers
    (
        "seed",
        "steps",
        "global_batch_size",
        "ranks",
        "cores",
        "hosts",
        "cores_per_rank",
        "images_per_step",
        "timed_steps",
    )
)
_ONLY_IN_MARKDOWN = ("flagfile", "source")  # too long for a printed page


class Table(NamedTuple):
    """A table: the columns that people read, and the same figures unrounded for its CSV file."""

    columns: List[Column]
    note: str  # below the Markdown table; may be empty
    rows: List[Row]
    csv_columns: Sequence[str]


def run_folders(folder: str) -> Iterator[Tuple[str, str]]:
    """Yield (name, path) of every run folder below `folder`, sorted; the name is the path relative to `folder`."""
    for path, folders, names in os.walk(folder):
        folders.sort()
        if files.RECORD in names:
            folders.clear()
            yield os.path.relpath(path, folder), path


def cell(value: Any) -> str:
    """Return a value as it is written to a CSV file: floats with six digits, None as an empty string."""
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def read_csv(path: str, columns: Sequence[str] = (), texts: Optional[Container[str]] = None) -> List[Row]:
    """Return the rows of a CSV file with at least these columns; raise DataError if it cannot be read or is damaged.

    With `texts`, all cells of other columns must be empty or numbers.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, strict=True)
            names = reader.fieldnames or ()
            rows = [_checked(path, reader.line_num, row, texts) for row in reader]
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; run this command in the repository's root folder") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not a CSV file in UTF-8 ({error}); restore it from the repository") from None
    missing = [name for name in columns if name not in names]
    if missing:
        raise DataError(f"{path}: has no column {missing[0]}; restore it from the repository")
    return rows


def _checked(path: str, line: int, row: Row, texts: Optional[Container[str]]) -> Row:
    if None in row or None in row.values():
        raise DataError(f"{path}: line {line}: not as many cells as columns; restore it from the repository")
    numbers = [] if texts is None else [name for name in row if name not in texts and row[name]]
    for name in numbers:
        value, whole = row[name], name in _WHOLE
        if not (value.isdigit() if whole else _is_finite(value)):
            kind = "a whole number" if whole else "a number"
            raise DataError(f"{path}: line {line}: {name} is {value!r}, not {kind}; correct it")
    return row


def _is_finite(value: str) -> bool:
    try:
        return math.isfinite(float(value))
    except ValueError:
        return False


def read_if_there(path: str, columns: Sequence[str] = (), texts: Optional[Container[str]] = None) -> List[Row]:
    """Return the rows of a CSV file, see `read_csv`; none if the file does not exist yet."""
    return read_csv(path, columns, texts) if os.path.exists(path) else []


def read_results(name: str, columns: Sequence[str] = (), texts: Optional[Container[str]] = None) -> List[Row]:
    """Return the rows of a CSV file in `RESULTS`, see `read_if_there`."""
    return read_if_there(os.path.join(RESULTS, name), columns, texts)


def write_csv(path: str, rows: Sequence[Mapping[str, str]], columns: Sequence[str]) -> None:
    """Write rows as a CSV file, atomically."""
    content = io.StringIO()
    writer = csv.DictWriter(content, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, content.getvalue().encode())


def update_results(name: str, old: Iterable[Row], rows: Sequence[Row], columns: Sequence[str]) -> None:
    """Add the rows of runs to the `old` ones of a CSV file in `RESULTS`; they replace those of equal names."""
    replaced = {row["run"] for row in rows}
    kept = [row for row in old if row["run"] not in replaced]
    write_csv(os.path.join(RESULTS, name), sorted([*kept, *rows], key=lambda row: row["run"]), columns)


def find_published(line: Row, published: Iterable[Row]) -> Optional[Row]:
    """Return the published figure that a line of tables.csv names, if it does; raise DataError for an unknown one."""
    if not line["published"]:
        return None
    for row in published:
        if row["id"] == line["published"]:
            return row
    raise DataError(f"tables.csv: {line['label']}: published id {line['published']} is not in published.csv")


def find_runs(line: Row, runs: Iterable[Row]) -> List[Row]:
    """Return the rows of the runs whose names match the pattern in a line of tables.csv."""
    return [row for row in runs if line["runs"] and fnmatch.fnmatchcase(row["run"], line["runs"])]


def by_seed(runs: Iterable[Row], table: str) -> Dict[str, Dict[str, List[Row]]]:
    """Return the rows of runs TABLE/ARM/seed-N of one table, by arm and seed; other runs are the user's own."""
    found: Dict[str, Dict[str, List[Row]]] = {}
    for row in runs:
        parts = row["run"].split("/")
        if len(parts) == 3 and parts[0] == table and parts[2].startswith("seed-"):
            found.setdefault(parts[1], {}).setdefault(parts[2], []).append(row)
    return found


def warn_of_unused(name: str, runs: Sequence[Row], spec: Sequence[Row]) -> None:
    """Report on standard error which runs of a CSV file in `RESULTS` are not in any table."""
    used = {row["run"] for line in spec for row in find_runs(line, runs)}
    unused = [run for run in dict.fromkeys(row["run"] for row in runs) if run not in used]
    if unused:
        more = ", ..." if len(unused) > 6 else ""
        print(
            f"tables: no table has these runs of {RESULTS}/{name}: {', '.join(unused[:6])}{more}; add a line to "
            f"{EXPERIMENTS}/tables.csv, whose column `runs` holds a name or a pattern of names",
            file=sys.stderr,
        )


def origin(runs: Sequence[Row], machines: Optional[Iterable[str]] = None) -> str:
    """Return the end of a note: machines, TensorFlow versions and digests of the code that the figures come from.

    Without `machines`, they are those in the rows of runs.csv.
    """
    if machines is None:
        machines = [f"{run['cpu']}, {count(run['ranks'], 'rank')}, {count(run['cores'], 'core')}" for run in runs]
    stacks = sorted({f"TensorFlow {row['tensorflow']}" for row in runs})
    codes = sorted({row["code"] for row in runs})
    return f"{'; '.join(sorted(set(machines)))}; {', '.join(stacks)}; digest of the code: {', '.join(codes)}."


def markdown(table: Table) -> str:
    """Return a table as Markdown, with its note below."""
    titles = [title for title, _ in table.columns]
    rows = [titles, ["---"] * len(titles), *zip(*(cells for _, cells in table.columns))]
    lines = ["| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in rows]
    return "\n".join([*lines, "", table.note] if table.note else lines)


def latex(table: Table) -> str:
    """Return a table as LaTeX, for the package booktabs."""
    columns = [column for column in table.columns if column[0] not in _ONLY_IN_MARKDOWN]
    rows = [[title for title, _ in columns], *zip(*(cells for _, cells in columns))]
    head, *body = (" & ".join(map(_escaped, row)) + r" \\" for row in rows)
    alignment = "l" + "r" * (len(columns) - 1)
    lines = [f"\\begin{{tabular}}{{{alignment}}}", r"\toprule", head, r"\midrule", *body, r"\bottomrule"]
    return "\n".join([*lines, r"\end{tabular}", ""])


def _escaped(text: str) -> str:
    text = re.sub(r"\*\*(.+?)\*\*", r"\\textbf{\1}", re.sub(r"([%&_#])", r"\\\1", text))
    return text.replace("±", r"$\pm$").replace("≈", r"$\approx$")


def write(tables: Mapping[str, Table]) -> None:
    """Write every table as CSV and LaTeX into `RESULTS`, and into the documents that have a marked place for it."""
    changed: Dict[str, str] = {}
    for document in filter(os.path.exists, DOCUMENTS):  # an unknown table ends the command before anything is written
        with open(document, encoding="utf-8") as file:
            old = file.read()
        new = fill(old, tables)
        if new != old:
            changed[document] = new
    for name, table in tables.items():
        write_csv(os.path.join(RESULTS, f"{name}.csv"), table.rows, table.csv_columns)
        write_atomically(os.path.join(RESULTS, f"{name}.tex"), latex(table).encode())
    for document, new in changed.items():
        write_atomically(document, new.encode())


def fill(document: str, tables: Mapping[str, Table]) -> str:
    """Return `document` with the tables between `<!-- table: NAME -->` and `<!-- end of table -->` brought up to date.

    Raises DataError for a name without a table.
    """

    def marked(match: "re.Match[str]") -> str:
        name = match.group(1)
        if name not in tables:
            raise DataError(
                f"<!-- table: {name} -->: table not found, or without runs; existing tables: {', '.join(tables)}"
            )
        return f"<!-- table: {name} -->\n{markdown(tables[name])}\n<!-- end of table -->"

    return re.sub(r"<!-- table: (\S+) -->\n.*?<!-- end of table -->", marked, document, flags=re.S)
