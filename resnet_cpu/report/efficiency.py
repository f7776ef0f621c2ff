"""Scaling efficiency: rows of scaling_runs.csv, and tables of ladders that were run and of published figures.

A line of experiments/tables.csv whose `what` is `efficiency` is one ladder: all runs that match its pattern. Runs whose
folders lie side by side are one batch: made together on one machine, and compared only with the base of that batch.
"""

import hashlib
import os
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple

from resnet_cpu.errors import DataError
from resnet_cpu.report.tables import (
    NOT_RUN,
    Row,
    Table,
    cell,
    find_published,
    find_runs,
    origin,
    read_results,
    run_folders,
)
from resnet_cpu.run import files
from resnet_cpu.run.folder import read_json, read_record
from resnet_cpu.scaling import ladders, steptimes
from resnet_cpu.scaling.ladders import LadderRun, Rung
from resnet_cpu.scaling.steptimes import PARTS
from resnet_cpu.text import count

SCALING_RUNS = "scaling_runs.csv"
RUN_COLUMNS = (
    *("run", "ranks", "hosts", "cores_per_rank", "images_per_step", "images_per_second", "low", "high"),
    *(f"{part}_s" for part in PARTS),
    *("timed_steps", "block_s", "flags", "cpu", "tensorflow", "code"),
)
TEXTS = ("run", "block_s", "flags", "cpu", "tensorflow", "code")  # columns that are not numbers
# Flags in which runs of one ladder may differ: they change neither the work of a step nor its duration.
_MAY_DIFFER = ("run_dir", "data_dir", "ranks", "seed", "resume", "max_steps")
_SPLIT = f"{' / '.join(PARTS)}, %"
_TITLES = (
    *(
        "what",
        "scaling",
        "ranks",
        "hosts",
        "nodes",
        "images per step",
        "published",
        "images/s",
        "n",
        "images/s per node",
    ),
    *("speed-up", "efficiency, % (95 % interval)", "efficiency, %", _SPLIT, "hardware", "flagfile", "source"),
)
_TABLE_COLUMNS = (
    *("what", "scaling", "ranks", "hosts", "nodes", "images_per_step", "runs", "images_per_second"),
    *("images_per_second_sd", "times_base", "efficiency", "efficiency_low", "efficiency_high"),
    *(f"{part}_share" for part in PARTS),
    *("published", "unit", "source", "flagfile"),
)


def read_runs() -> List[Row]:
    """Return the rows of scaling_runs.csv; none if there are no runs yet."""
    return read_results(SCALING_RUNS, RUN_COLUMNS, TEXTS)


def collect(folder: str) -> List[Row]:
    """Return the row of scaling_runs.csv of every run of --experiment=scaling below `folder` that has a result."""
    rows = []
    for name, path in run_folders(folder):
        result = read_json(os.path.join(path, files.RESULT))
        timing = steptimes.read(path, result.get("ranks", 0)) if result else None
        record = read_record(path)
        if not result or not record or result.get("experiment") != "scaling" or not timing:
            continue
        attempts = {row["attempt"]: row for row in record.get("earlier_attempts", [])}
        timed = attempts.get(timing.get("attempt"), record)  # the attempt that was timed
        rate, per_core = result["images_per_second"], result.get("images_per_second_per_core")
        cores = timing.get("cores") or (rate / per_core if rate else None)  # runs before version 0.2 lack it
        low, high = timing["interval"] or (None, None)
        values = {
            "run": name,
            "ranks": result["ranks"],
            "hosts": timing["hosts"],
            "cores_per_rank": round(cores / result["ranks"], 2) if cores else None,
            "images_per_step": result["global_batch_size"],
            "images_per_second": timing["images_per_second"],
            "low": low,
            "high": high,
            **{f"{part}_s": timing["split_s"][part] for part in PARTS},
            "timed_steps": timing["timed_steps"],
            "block_s": "/".join(map(cell, timing["block_s"])),
            "flags": _digest_of_flags(timing.get("flags") or _flags_of(os.path.join(path, files.FLAGS))),
            "cpu": "; ".join(timed.get("cpus") or sorted({row["cpu"] for row in record["per_rank"]})),
            "tensorflow": timed["versions"]["tensorflow"],
            "code": timed["code"],
        }
        rows.append({key: cell(values[key]) for key in RUN_COLUMNS})
    return rows


def _flags_of(path: str) -> List[str]:
    """Return the lines of a resolved flagfile, without comments."""
    try:
        with open(path, encoding="utf-8") as file:
            return [line.rstrip("\n") for line in file if line.startswith("--")]
    except OSError as error:
        raise DataError(
            f"{path}: {error.strerror}; runs are compared by this file, so restore it or remove the run"
        ) from None


def _digest_of_flags(lines: Sequence[str]) -> str:
    """Return a digest of flags, one a line, without those in which runs of a ladder may differ."""
    kept = [f"{line}\n" for line in lines if line.split("=")[0].strip()[2:] not in _MAY_DIFFER]
    return hashlib.sha256("".join(kept).encode()).hexdigest()[:8]


def _ladder_run(row: Row) -> LadderRun:
    return LadderRun(
        name=row["run"],
        batch=os.path.dirname(row["run"]),
        ranks=int(row["ranks"]),
        hosts=int(row["hosts"]),
        images=int(row["images_per_step"]),
        block_s=tuple(float(value) for value in row["block_s"].split("/")),
        split_s={part: float(row[f"{part}_s"]) for part in PARTS},
        conditions={
            "code": row["code"],
            "flags": row["flags"],
            "processor": row["cpu"],
            "cores per rank": row["cores_per_rank"],
            "TensorFlow": row["tensorflow"],
        },
    )


def tables(spec: Iterable[Row], published: Sequence[Row], runs: Sequence[Row]) -> Dict[str, Table]:
    """Return the efficiency tables of `spec` (rows of tables.csv) by name.

    Raises DataError for an unknown published figure, and for runs that cannot be compared.
    """
    lines: Dict[str, List[Row]] = {}
    for row in spec:
        if row["what"] == "efficiency":
            lines.setdefault(row["table"], []).append(row)
    return {name: _table(table, published, runs) for name, table in lines.items()}


def _table(lines: Sequence[Row], published: Sequence[Row], runs: Sequence[Row]) -> Table:
    pairs: List[Tuple[Row, Row]] = []  # a row for people, the same row of figures
    used: List[Row] = []
    for line in lines:
        source, measured = find_published(line, published), find_runs(line, runs)
        used += measured
        if source is not None:
            pairs.append(_published(line, source))
        elif measured:
            pairs += _rungs(line, measured)
        else:
            common = {"what": line["label"], "flagfile": line["flagfile"]}
            pairs.append(({**common, "images/s": NOT_RUN}, common))
    columns = [(title, [shown.get(title, "") for shown, _ in pairs]) for title in _TITLES]
    rows = [figures for _, figures in pairs]
    return Table([column for column in columns if any(column[1])], _note(used), rows, _TABLE_COLUMNS)


def _rungs(line: Row, measured: Sequence[Row]) -> List[Tuple[Row, Row]]:
    try:
        runs = [_ladder_run(row) for row in measured]
        rungs, kind = ladders.ladder(runs), ladders.kind(runs)
    except DataError as error:
        raise DataError(f"tables.csv: {line['label']}: {error}") from None
    return [(_shown(line, kind, rung), _figures(line, kind, rung)) for rung in rungs]


def _shown(line: Row, kind: str, rung: Rung) -> Row:
    efficiency = f"{100 * rung.efficiency:.1f}" if rung.interval else "the base"
    if rung.interval:
        efficiency += f" ({100 * rung.interval[0]:.1f} ... {100 * rung.interval[1]:.1f})"
    return {
        "what": line["label"],
        "scaling": kind,
        "ranks": str(rung.ranks),
        "hosts": str(rung.hosts),
        "images per step": f"{rung.images:,}",
        "images/s": f"{rung.rate:.1f}" + (f" ± {rung.rate_sd:.1f}" if rung.rate_sd is not None else ""),
        "n": str(rung.runs),
        "speed-up": f"{rung.speedup:.3f}",
        "efficiency, % (95 % interval)": efficiency,
        _SPLIT: " / ".join(f"{100 * rung.shares[part]:.1f}" for part in PARTS),
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
        "times_base": rung.speedup,
        "efficiency": rung.efficiency,
        "efficiency_low": low,
        "efficiency_high": high,
        **{f"{part}_share": rung.shares[part] for part in PARTS},
        "flagfile": line["flagfile"],
    }
    return {key: cell(value) for key, value in figures.items()}


def _published(line: Row, source: Row) -> Tuple[Row, Row]:
    """Return a published figure as (row for people, row of figures).

    The number of nodes is the number with which its `hardware` begins. An efficiency is derived from a figure in
    `times` one node, and the images/s of a node from one in images/s.
    """
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
        shown["images/s per node"] = f"{float(source['value']) / nodes:.1f}"
    figures = {
        "what": line["label"],
        "nodes": cell(nodes),
        "efficiency": cell(efficiency),
        "published": source["value"],
        "unit": source["unit"],
        "source": source["source"],
        "flagfile": line["flagfile"],
    }
    return shown, figures


def _note(runs: Sequence[Row]) -> str:
    if not runs:
        return ""
    machines = [f"{run['cpu']}, {count(run['cores_per_rank'], 'core')} per rank" for run in runs]
    return (
        "Mean ± standard deviation over n runs. Speed-up and efficiency are relative to the run on the fewest ranks in "
        "the same batch of runs; the interval is a 95 % bootstrap over batches and blocks of steps. docs/scaling.md "
        f"explains the parts of a step. {origin(runs, machines)}"
    )
