"""Scaling efficiency as tables: rungs of ladders that were run, and what others published, kept apart.

experiments/results/scaling_runs.csv    a row a run of --experiment=scaling    (collected from run folders)
experiments/tables.csv                  rows whose `what` is `efficiency`: the runs of a ladder, or a published figure

A ladder is what one row of tables.csv matches. Runs whose folders lie side by side are a batch: made together, on one
machine, and compared only with the base among themselves.
"""

import fnmatch
import hashlib
import os
from typing import Any, Dict, Iterable, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from resnet_cpu.errors import DataError
from resnet_cpu.report import tables as results
from resnet_cpu.report.tables import NOT_RUN, Column, Row
from resnet_cpu.run.folder import read_json
from resnet_cpu.scaling import steptimes as throughput
from resnet_cpu.scaling.steptimes import PARTS, Rung

WHAT = "efficiency"
COLUMNS = (
    *("run", "ranks", "hosts", "cores_per_rank", "images_per_step", "images_per_second", "low", "high"),
    *(f"{part}_s" for part in PARTS),
    *("timed_steps", "block_s", "flags", "cpu", "tensorflow", "code"),
)
# Flags that runs of one ladder may differ in: they decide neither what a step computes nor how long it takes.
_MAY_DIFFER = ("run_dir", "data_dir", "ranks", "seed", "resume", "max_steps")


class Table(NamedTuple):
    """A table and, for its plot, what it was made of."""

    columns: List[Column]  # to be read
    note: str
    rows: List[Row]  # the figures themselves
    ladders: Dict[str, List[Rung]]
    published: List[Tuple[str, int, float]]  # what, nodes, efficiency as a fraction


def collect(folder: str) -> List[Row]:
    """Return the rows of scaling_runs.csv of every run of --experiment=scaling below `folder` that has a result."""
    rows = []
    for name, path in results.run_folders(folder):
        result, record, found = (
            read_json(os.path.join(path, file)) for file in ("result.json", "run.json", "scaling.json")
        )
        if not result or not record or result.get("experiment") != "scaling" or not found:
            continue
        interval = found["interval"] or ("", "")
        values = {
            "run": name,
            "ranks": result["ranks"],
            "hosts": found["hosts"],
            "cores_per_rank": result["images_per_second"]
            and round(result["images_per_second"] / result["images_per_second_per_core"] / result["ranks"], 2),
            "images_per_step": result["global_batch_size"],
            "images_per_second": found["images_per_second"],
            "low": interval[0],
            "high": interval[1],
            **{f"{part}_s": found["split_s"][part] for part in PARTS},
            "timed_steps": found["timed_steps"],
            "block_s": "/".join(f"{value:.6g}" for value in found["block_s"]),
            "flags": _digest_of_flags(os.path.join(path, "resolved.flags")),
            "cpu": "; ".join(sorted({row["cpu"] for row in record["per_rank"]})),
            "tensorflow": record["versions"]["tensorflow"],
            "code": record["code"],
        }
        rows.append({key: results.text(values[key]) for key in COLUMNS})
    return rows


def _digest_of_flags(path: str) -> str:
    """Return a digest of a resolved flagfile but for what runs of a ladder may differ in."""
    try:
        with open(path, encoding="utf-8") as file:
            lines = [line for line in file if line.startswith("--")]
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; it says what the run was, take the run out without it") from None
    kept = [line for line in lines if line.split("=")[0].strip()[2:] not in _MAY_DIFFER]
    return hashlib.sha256("".join(kept).encode()).hexdigest()[:8]


def _run(row: Row) -> throughput.Run:
    return throughput.Run(
        name=row["run"],
        batch=os.path.dirname(row["run"]),
        ranks=int(row["ranks"]),
        hosts=int(row["hosts"]),
        images=int(row["images_per_step"]),
        block_s=tuple(float(value) for value in row["block_s"].split("/")),
        split_s={part: float(row[f"{part}_s"]) for part in PARTS},
        alike={
            "code": row["code"],
            "flags": row["flags"],
            "processor": row["cpu"],
            "cores a rank": row["cores_per_rank"],
            "TensorFlow": row["tensorflow"],
        },
    )


def tables(spec: Iterable[Row], published: Iterable[Row], runs: Iterable[Row]) -> Dict[str, Table]:
    """Return the efficiency tables that `spec` asks for; raise DataError for runs that cannot be compared."""
    by_id, measured = {row["id"]: row for row in published}, list(runs)
    lines: Dict[str, List[Row]] = {}
    for row in spec:
        if row["what"] == WHAT:
            lines.setdefault(row["table"], []).append(row)
    return {name: _table(rows, by_id, measured) for name, rows in lines.items()}


def _table(spec: Sequence[Row], published: Mapping[str, Row], runs: Sequence[Row]) -> Table:
    shown: List[Row] = []
    rows: List[Row] = []
    ladders: Dict[str, List[Rung]] = {}
    points: List[Tuple[str, int, float]] = []
    used: List[Row] = []
    for line in spec:
        if line["published"]:
            told, figures, point = _published(line, published)
            shown.append(told)
            rows.append(figures)
            points += point
            continue
        found = [row for row in runs if line["runs"] and fnmatch.fnmatchcase(row["run"], line["runs"])]
        if not found:
            shown.append({"what": line["label"], "images/s": NOT_RUN, "flagfile": line["flagfile"]})
            rows.append({"what": line["label"], "flagfile": line["flagfile"]})
            continue
        try:
            of_line = [_run(row) for row in found]
            rungs, kind = throughput.ladder(of_line), throughput.kind(of_line)
        except DataError as error:
            raise DataError(f"tables.csv: {line['label']}: {error}") from None
        used += found
        ladders[line["label"]] = rungs
        for rung in rungs:
            shown.append(_rung(line, kind, rung))
            rows.append(_figures(line, kind, rung))
    titles = list(dict.fromkeys(title for title in (*_TITLES, *(key for row in shown for key in row))))
    columns = [(title, [row.get(title, "") for row in shown]) for title in titles]
    return Table([column for column in columns if any(column[1])], _note(used), rows, ladders, points)


_TITLES = (
    *("what", "scaling", "ranks", "hosts", "nodes", "images a step", "published", "images/s", "n", "images/s a node"),
    *("times the base", "efficiency, % (95 % interval)", "efficiency, %", f"{' / '.join(PARTS)}, %"),
)
CSV_COLUMNS = (
    *("what", "scaling", "ranks", "hosts", "nodes", "images_per_step", "runs", "images_per_second"),
    *("images_per_second_sd", "times_base", "efficiency", "efficiency_low", "efficiency_high"),
    *(f"{part}_share" for part in PARTS),
    *("published", "unit", "source", "flagfile"),
)


def _rung(line: Row, kind: str, rung: Rung) -> Row:
    efficiency = f"{100 * rung.efficiency:.1f}" if rung.interval else "the base"
    if rung.interval:
        efficiency += f" ({100 * rung.interval[0]:.1f} ... {100 * rung.interval[1]:.1f})"
    return {
        "what": line["label"],
        "scaling": kind,
        "ranks": str(rung.ranks),
        "hosts": str(rung.hosts),
        "images a step": f"{rung.images:,}",
        "images/s": f"{rung.rate:.1f}" + (f" ± {rung.rate_sd:.1f}" if rung.rate_sd is not None else ""),
        "n": str(rung.runs),
        "times the base": f"{rung.times:.3f}",
        "efficiency, % (95 % interval)": efficiency,
        f"{' / '.join(PARTS)}, %": " / ".join(f"{100 * rung.shares[part]:.1f}" for part in PARTS),
        "flagfile": line["flagfile"],
    }


def _figures(line: Row, kind: str, rung: Rung) -> Row:
    low, high = rung.interval or (None, None)
    figures: Dict[str, Any] = {
        "what": line["label"],
        "scaling": kind,
        "ranks": rung.ranks,
        "hosts": rung.hosts,
        "images_per_step": rung.images,
        "runs": rung.runs,
        "images_per_second": rung.rate,
        "images_per_second_sd": rung.rate_sd,
        "times_base": rung.times,
        "efficiency": rung.efficiency,
        "efficiency_low": low,
        "efficiency_high": high,
        **{f"{part}_share": rung.shares[part] for part in PARTS},
        "flagfile": line["flagfile"],
    }
    return {key: results.text(value) for key, value in figures.items()}


def _published(line: Row, published: Mapping[str, Row]) -> Tuple[Row, Row, List[Tuple[str, int, float]]]:
    """Return a published figure as (row to be read, row of figures, point of the plot, if it has an efficiency).

    The nodes are the number that its `hardware` begins with; an efficiency is derived where a figure is in `times` one
    node, and images/s a node where it is in images/s.
    """
    if line["published"] not in published:
        raise DataError(f"tables.csv: {line['label']}: published id {line['published']} is not in published.csv")
    source = published[line["published"]]
    first = source["hardware"].split(" ")[0]
    nodes: Optional[int] = int(first) if first.isdigit() else None
    shown = {
        "what": line["label"],
        "nodes": f"{nodes:,}" if nodes else "",
        "published": f"{source['value']} {source['unit']}",
        "hardware": source["hardware"],
        "source": source["source"],
    }
    efficiency = None
    if nodes and source["unit"] == "times":
        efficiency = float(source["value"]) / nodes
        shown["efficiency, %"] = f"{100 * efficiency:.1f} (derived)"
    elif nodes and source["unit"] == "images/s":
        shown["images/s a node"] = f"{float(source['value']) / nodes:.1f}"
    figures = {
        "what": line["label"],
        "nodes": results.text(nodes),
        "efficiency": results.text(efficiency),
        "published": source["value"],
        "unit": source["unit"],
        "source": source["source"],
        "flagfile": line["flagfile"],
    }
    return shown, figures, [(line["label"], nodes, efficiency)] if nodes and efficiency else []


def _note(runs: Sequence[Row]) -> str:
    if not runs:
        return ""
    cores = sorted({f"{row['cpu']}, {results.count(row['cores_per_rank'], 'core')} a rank" for row in runs})
    stacks = sorted({f"TensorFlow {row['tensorflow']}" for row in runs})
    codes = sorted({row["code"] for row in runs})
    return (
        "Mean ± standard deviation over n runs. Efficiency: against the fewest ranks in the same batch of runs, with "
        "the 95 % bootstrap interval over batches and blocks of steps. Last: what a step consists of "
        f"(docs/scaling.md). {'; '.join(cores)}; {', '.join(stacks)}; digest of the code: {', '.join(codes)}."
    )


def markdown(table: Table) -> str:
    """Return a table as Markdown, with what it was measured on below."""
    return results.markdown_of(table.columns) + (f"\n\n{table.note}" if table.note else "")


def latex(table: Table) -> str:
    """Return a table as LaTeX, for the package booktabs."""
    return results.latex_of([column for column in table.columns if column[0] not in ("flagfile", "source")])


def table_csv(table: Table) -> Tuple[List[Row], Sequence[str]]:
    """Return (rows, columns) of a table for a CSV file."""
    return table.rows, CSV_COLUMNS
