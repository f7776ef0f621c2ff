"""From run folders to tables: rows of runs, joined with published figures, as Markdown, CSV and LaTeX.

experiments/results/runs.csv     a row for each thing a run has scored     (collected from run folders)
experiments/results/curves.csv   top-1 over epochs of the same runs
report/published_curves.csv      top-1 over epochs of others: stanford-futuredata/dawn-bench-entries
    experiments/published.csv        figures of others, each with its source
experiments/tables.csv           which rows of those make up which table
"""

import csv
import dataclasses
import fnmatch
import hashlib
import io
import json
import os
import re
import statistics
import sys
from typing import Any, Dict, Iterable, Iterator, List, Mapping, Optional, Sequence, Tuple

from resnet_cpu.errors import DataError
from resnet_cpu.run.atomic import write_atomically
from resnet_cpu.run.folder import read_json, read_rows

Row = Dict[str, str]
SCORES = ("top1", "top5", "loss", "ece")
RUN_COLUMNS = (
    *("run", "what", "seed", "recipe", *SCORES, "epochs", "steps", "global_batch_size", "ranks", "cores"),
    *("images_per_second", "wall_seconds", "cpu", "tensorflow", "code"),
)
CURVE_COLUMNS = ("run", "epoch", "phase", "top1", "loss")
PUBLISHED_CURVES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "published_curves.csv")
NOT_RUN = "not run"
Column = Tuple[str, List[str]]  # title, cells


def collect(folder: str) -> Tuple[List[Row], List[Row]]:
    """Return (rows of runs.csv, rows of curves.csv) of every finished run below `folder`; say what is left out.

    Runs of --experiment=scaling are not trained to an end: `efficiency.collect` takes them.
    """
    runs: List[Row] = []
    curves: List[Row] = []
    for name, path in run_folders(folder):
        result, record = (read_json(os.path.join(path, file)) for file in ("result.json", "run.json"))
        if result and result.get("experiment") == "scaling":
            continue
        if not result or not record or not result.get("complete"):
            print(f"tables: {path}: has not finished; left out", file=sys.stderr)
            continue
        evaluations = read_rows(os.path.join(path, "eval.jsonl"))
        runs += [_row(name, what, scores, result, record) for what, scores in _scored(result, evaluations)]
        for row in evaluations:
            curves.append({key: text(value) for key, value in {"run": name, **row}.items() if key in CURVE_COLUMNS})
    return runs, curves


def run_folders(folder: str) -> Iterator[Tuple[str, str]]:
    """Yield (name, path) of every run folder below `folder`, in their order; a name is the path as seen from there."""
    for path, folders, names in os.walk(folder):
        folders.sort()
        if "run.json" in names:
            folders.clear()
            yield os.path.relpath(path, folder), path


def _scored(result: Mapping[str, Any], evaluations: Iterable[Mapping[str, Any]]) -> Iterator[Tuple[str, Mapping]]:
    """Yield (what, its scores) of everything that a run has scored at an end."""
    yield "last", result
    for row in evaluations:
        if row.get("end_of"):
            yield f"end_of:{row['end_of']}", row
    for name, scores in result.get("members", {}).items():
        yield f"member:{name}", scores
    ensemble = result.get("ensemble")
    if ensemble:
        yield "ensemble", ensemble
        yield "best_member", max(result["members"].values(), key=lambda scores: scores["top1"])
        yield "best_subset", ensemble["best_subset"]
        for prefix in ensemble["prefixes"]:
            yield f"prefix:{len(prefix['members'])}", prefix


def _row(name: str, what: str, scores: Mapping, result: Mapping, record: Mapping) -> Row:
    rate, per_core = result.get("images_per_second"), result.get("images_per_second_per_core")
    values = {
        **{key: result.get(key) for key in RUN_COLUMNS},
        **{key: scores.get(key) for key in SCORES},
        **_budget(what, scores, result),
        "run": name,
        "what": what,
        "recipe": _digest(
            {key: value for key, value in record["signature"].items() if key not in ("seed", "init_from")}
        ),
        "cores": round(rate / per_core) if rate and per_core else None,
        "cpu": "; ".join(sorted({row["cpu"] for row in record["per_rank"]})),
        "tensorflow": record["versions"]["tensorflow"],
        "code": record["code"],
    }
    return {key: text(values[key]) for key in RUN_COLUMNS}


def _digest(content: Mapping) -> str:
    """Return what two runs of the same recipe, model and data have in common, whatever their seeds."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def _budget(what: str, scores: Mapping, result: Mapping) -> Dict[str, Any]:
    """Return the epochs, steps and seconds that this thing took; None where the run does not tell them apart."""
    if what in ("last", "ensemble"):
        return {key: result.get(key) for key in ("epochs", "steps", "wall_seconds")}
    if what.startswith("end_of:"):
        return {"epochs": scores["epoch"], "steps": scores["step"] + 1, "wall_seconds": scores["wall_seconds"]}
    return {"epochs": None, "steps": None, "wall_seconds": None}


def text(value: Any) -> str:
    """Return a figure as it stands in a CSV file: six digits, nothing for None."""
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def merge(old: List[Row], new: List[Row]) -> List[Row]:
    """Return the rows of both; a run that is in `new` replaces itself in `old`."""
    again = {row["run"] for row in new}
    return sorted([row for row in old if row["run"] not in again] + new, key=lambda row: row["run"])


def read_csv(path: str) -> List[Row]:
    """Return the rows of a CSV file; raise DataError if there is none."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; run from the repository's root, or name the folder") from None


def write_csv(path: str, rows: Sequence[Mapping[str, str]], columns: Sequence[str]) -> None:
    """Write rows as a CSV file, atomically."""
    content = io.StringIO()
    writer = csv.DictWriter(content, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, content.getvalue().encode())


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a table: what is published of it, and the runs that measured it."""

    label: str
    flagfile: str
    published: Optional[Row]
    measured: List[Row]

    def numbers(self, key: str) -> List[float]:
        return [float(row[key]) for row in self.measured if row.get(key)]

    def spread(self, key: str, factor: float, digits: int) -> str:
        """Return `mean ± standard deviation` of a column over the runs; without a deviation for a single one."""
        values = [factor * value for value in self.numbers(key)]
        if not values:
            return ""
        mean = f"{statistics.mean(values):.{digits}f}"
        return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def lines(spec: Iterable[Row], published: Iterable[Row], runs: Iterable[Row]) -> Dict[str, List[Line]]:
    """Join the table definitions with figures; raise DataError for a published id that is nowhere published."""
    by_id = {row["id"]: row for row in published}
    measured = list(runs)
    tables: Dict[str, List[Line]] = {}
    for row in spec:
        if row["what"] == "efficiency":  # report/efficiency.py
            continue
        if row["published"] and row["published"] not in by_id:
            raise DataError(f"tables.csv: {row['label']}: published id {row['published']} is not in published.csv")
        found = [one for one in measured if fnmatch.fnmatchcase(one["run"], row["runs"]) and one["what"] == row["what"]]
        _check_alike(row, found)
        tables.setdefault(row["table"], []).append(
            Line(row["label"], row["flagfile"], by_id.get(row["published"]), found if row["runs"] else [])
        )
    return tables


def _check_alike(row: Row, found: List[Row]) -> None:
    """Raise DataError if a line would take the mean over runs of several recipes, or count a seed twice."""
    recipes, seeds = {one["recipe"] for one in found}, [one["seed"] for one in found]
    if len(recipes) > 1 or len(set(seeds)) < len(seeds):
        what = "have different recipes" if len(recipes) > 1 else "have a seed in common"
        raise DataError(
            f"tables.csv: {row['label']}: the runs {', '.join(one['run'] for one in found)} {what}; keep others in "
            f"folders that do not match {row['runs']}, and take their rows out of runs.csv"
        )


def unplaced(spec: Iterable[Row], runs: Iterable[Row]) -> List[str]:
    """Return the runs that no table holds."""
    patterns = [row["runs"] for row in spec if row["runs"]]
    names = dict.fromkeys(row["run"] for row in runs)
    return [name for name in names if not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def _columns(table: List[Line]) -> List[Column]:
    """Return the columns (title, cells) of a table; those that no line fills are left out."""

    def of_published(line: Line) -> str:
        return line.published["value"] + " " + line.published["unit"] if line.published else ""

    columns = [
        ("what", [line.label for line in table]),
        ("published", [of_published(line) for line in table]),
        ("top-1, %", [line.spread("top1", 100, 2) or NOT_RUN for line in table]),
        ("n", [str(len(line.measured)) for line in table]),
        ("top-5, %", [line.spread("top5", 100, 2) for line in table]),
        ("loss", [line.spread("loss", 1, 4) for line in table]),
        ("ECE, %", [line.spread("ece", 100, 2) for line in table]),
        ("epochs", [line.spread("epochs", 1, 1).split(" ")[0] for line in table]),
        ("flagfile", [line.flagfile for line in table]),
        ("source", [line.published["source"] if line.published else "" for line in table]),
    ]
    if not any(line.measured for line in table):
        columns = [column for column in columns if column[0] not in ("n",)]
    return [(title, cells) for title, cells in columns if any(cells)]


def markdown(table: List[Line]) -> str:
    """Return a table as Markdown, with what it was measured on below."""
    shown = markdown_of(_columns(table))
    measured = [row for line in table for row in line.measured]
    if not measured:
        return shown
    machines = sorted(
        {f"{row['cpu']}, {count(row['ranks'], 'rank')}, {count(row['cores'], 'core')}" for row in measured}
    )
    stacks = sorted({f"TensorFlow {row['tensorflow']}" for row in measured})
    codes = sorted({row["code"] for row in measured})
    return (
        f"{shown}\n\nMean ± standard deviation over n seeds. {'; '.join(machines)}; {', '.join(stacks)}; "
        f"digest of the code: {', '.join(codes)}."
    )


def markdown_of(columns: Sequence[Column]) -> str:
    """Return columns as a Markdown table."""
    rows = [[title for title, _ in columns], ["---"] * len(columns), *zip(*(cells for _, cells in columns))]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def count(number: str, what: str) -> str:
    """Return a number with its noun, as in `2 ranks`."""
    return f"{number} {what}" + ("" if number == "1" else "s")


def table_csv(table: List[Line]) -> Tuple[List[Row], List[str]]:
    """Return (rows, columns) of a table for a CSV file: the figures themselves, not rounded for reading."""
    means_of = [f"{key}_mean" for key in SCORES]
    columns = ["what", "published", "unit", "source", "n", *means_of, "top1_sd", "flagfile"]
    rows = []
    for line in table:
        top1 = line.numbers("top1")
        means = {f"{key}_mean": _mean(line.numbers(key)) for key in SCORES}
        rows.append(
            {
                "what": line.label.replace("**", ""),
                "published": line.published["value"] if line.published else "",
                "unit": line.published["unit"] if line.published else "",
                "source": line.published["source"] if line.published else "",
                "n": str(len(line.measured)),
                **means,
                "top1_sd": text(statistics.stdev(top1)) if len(top1) > 1 else "",
                "flagfile": line.flagfile,
            }
        )
    return rows, columns


def _mean(values: List[float]) -> str:
    return text(statistics.mean(values)) if values else ""


def latex(table: List[Line]) -> str:
    """Return a table as LaTeX, for the package booktabs."""
    return latex_of([column for column in _columns(table) if column[0] not in ("flagfile", "source")])


def latex_of(columns: Sequence[Column]) -> str:
    """Return columns as a LaTeX table, for the package booktabs."""
    rows = [" & ".join(_escaped(cell) for cell in row) + r" \\" for row in zip(*(cells for _, cells in columns))]
    head = " & ".join(_escaped(title) for title, _ in columns) + r" \\"
    aligned = "l" + "r" * (len(columns) - 1)
    body = "\n".join(rows)
    return f"\\begin{{tabular}}{{{aligned}}}\n\\toprule\n{head}\n\\midrule\n{body}\n\\bottomrule\n\\end{{tabular}}\n"


def _escaped(text: str) -> str:
    text = re.sub(r"\*\*(.+?)\*\*", r"\\textbf{\1}", re.sub(r"([%&_#])", r"\\\1", text))
    return text.replace("±", r"$\pm$").replace("≈", r"$\approx$")


def fill(document: str, tables: Mapping[str, str]) -> str:
    """Return `document` with what stands between `<!-- table: NAME -->` and `<!-- end of table -->` written anew."""

    def written(match: "re.Match[str]") -> str:
        name = match.group(1)
        if name not in tables:
            raise DataError(f"<!-- table: {name} -->: no such table in tables.csv; known are {', '.join(tables)}")
        return f"<!-- table: {name} -->\n{tables[name]}\n<!-- end of table -->"

    return re.sub(r"<!-- table: (\S+) -->\n.*?<!-- end of table -->", written, document, flags=re.S)
