"""Accuracy of finished runs, beside published figures: rows of runs.csv and curves.csv, and tables made from them.

A line of experiments/tables.csv matches runs by name (`runs`) and one of their scores (`what`): `last`, `ensemble`,
`best_member`, `best_subset`, `prefix:COUNT`, `last_m:COUNT`, `member:NAME`, `end_of:PHASE`. It may name the runs whose
last model it is compared with, seed by seed (`reference`), and say `yes` under `timed` if the runs of the table were
made side by side, so that their times can be compared.
"""

import dataclasses
import hashlib
import json
import os
import statistics
import sys
from typing import Any, Dict, Iterable, Iterator, List, Mapping, Optional, Sequence, Tuple

from resnet_cpu.errors import DataError, printable
from resnet_cpu.report.intervals import Interval, interval
from resnet_cpu.report.tables import (
    NOT_RUN,
    Column,
    Row,
    Table,
    cell,
    find_published,
    find_runs,
    origin,
    read_results,
    run_folders,
)
from resnet_cpu.run import files, signature
from resnet_cpu.run.folder import read_json, read_record, read_rows

RUNS, CURVES = "runs.csv", "curves.csv"
FAILED = "not_finite"  # under `what`: a run that ended because its loss was not a finite number, without scores
ENSEMBLE = "ensemble.json"
SCORES = ("top1", "top5", "loss", "ece")
RUN_COLUMNS = (
    *("run", "what", "seed", "recipe", *SCORES, "epochs", "steps", "global_batch_size", "ranks", "cores"),
    *("images_per_second", "wall_seconds", "cpu", "tensorflow", "code"),
    *("temperature", "loss_scaled", "ece_scaled", "disagreement"),
)
_NEWER = RUN_COLUMNS[-4:]  # version 0.1 did not write them
CURVE_COLUMNS = ("run", "epoch", "phase", "top1", "loss", "wall_seconds")
TEXTS = ("run", "what", "phase", "recipe", "cpu", "tensorflow", "code")  # columns that are not numbers
_TABLE_COLUMNS = (
    *("what", "published", "unit", "source", "n", "not_finite", *(f"{key}_mean" for key in SCORES), "top1_sd"),
    *("reference", "difference_mean", "difference_low", "difference_high"),
    *("seconds_mean", "seconds_sd", "time_mean", "time_low", "time_high", "flagfile"),
)


def read_runs() -> List[Row]:
    """Return the rows of runs.csv; none if there are no runs yet. Columns that older versions lack are empty."""
    rows = read_results(RUNS, [name for name in RUN_COLUMNS if name not in _NEWER], TEXTS)
    return [{**dict.fromkeys(_NEWER, ""), **row} for row in rows]


def read_curves() -> List[Row]:
    """Return the rows of curves.csv; none if there are no runs yet. Version 0.1 wrote no `wall_seconds`."""
    rows = read_results(CURVES, [name for name in CURVE_COLUMNS if name != "wall_seconds"], TEXTS)
    return [{"wall_seconds": "", **row} for row in rows]


def collect(folder: str) -> Tuple[List[Row], List[Row]]:
    """Return (rows of runs.csv, rows of curves.csv) of every finished run below `folder`; report those skipped.

    Runs of --experiment=scaling are not trained to an end: `efficiency.collect` takes them.
    """
    runs: List[Row] = []
    curves: List[Row] = []
    for name, path in run_folders(folder):
        result, record = read_json(os.path.join(path, files.RESULT)), read_record(path)
        if result and result.get("experiment") == "scaling":
            continue
        failure = None if result and result.get("complete") else read_json(os.path.join(path, files.NOT_FINITE))
        if failure and record:
            if failure.get("experiment") != "scaling":
                runs.append(_row(name, FAILED, {}, failure, record))
            continue
        if not result or not record or not result.get("complete"):
            why = "this run has not finished; run its command again" + (", without --max_steps" if result else "")
            if result and result.get("complete"):
                why = "its run.json is missing or damaged; train it again in another folder"
            print(f"tables: {printable(path)}: skipped, because {why}", file=sys.stderr)
            continue
        evaluations = read_rows(os.path.join(path, files.EVALUATIONS))
        runs += [_row(name, what, scores, result, record) for what, scores in _scores(result, evaluations)]
        for row in evaluations:
            curves.append({key: cell(value) for key, value in {"run": name, **row}.items() if key in CURVE_COLUMNS})
    return [*runs, *_of_several_runs(folder)], curves


def _of_several_runs(folder: str) -> Iterator[Row]:
    """Yield the rows of ensembles of several runs: a folder of runs with the output of `evaluate --ensemble`.

    Their cost is that of all runs in the folder. The folder's `ensemble.json` is that output.
    """
    for path, folders, names in os.walk(folder):
        folders.sort()
        if ENSEMBLE not in names:
            continue
        scores = read_json(os.path.join(path, ENSEMBLE))
        below = [os.path.join(path, name) for name in folders if os.path.exists(os.path.join(path, name, files.RECORD))]
        results = [found for found in (read_json(os.path.join(run, files.RESULT)) for run in below) if found]
        records = [found for found in map(read_record, below) if found]
        finished = [result for result in results if result.get("complete")]
        if not scores or not below or len(finished) < len(below) or len(records) < len(below):
            where = printable(os.path.join(path, ENSEMBLE))
            problem = "it is not readable, or a run beside it has not finished"
            print(f"tables: {where}: skipped, because {problem}", file=sys.stderr)
            continue
        whole = {**results[0], **{key: sum(row[key] for row in results) for key in ("epochs", "steps", "wall_seconds")}}
        for what, found in _scores({**whole, **scores}, []):
            if what != "last":
                yield _row(os.path.relpath(path, folder), what, found, whole, records[0])


def _scores(result: Mapping[str, Any], evaluations: Iterable[Mapping[str, Any]]) -> Iterator[Tuple[str, Mapping]]:
    """Yield (what, scores) of a run's last model, of the ends of phases, and of members and ensembles."""
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
        for last in ensemble.get("last_m", []):
            yield f"last_m:{len(last['members'])}", last


def _row(name: str, what: str, scores: Mapping, result: Mapping, record: Mapping) -> Row:
    rate, per_core = result.get("images_per_second"), result.get("images_per_second_per_core")
    pairs = scores.get("disagreement", {}).values()
    values = {
        **{key: result.get(key) for key in RUN_COLUMNS},
        **{key: scores.get(key) for key in (*SCORES, "temperature", "loss_scaled", "ece_scaled")},
        "disagreement": statistics.mean(pairs) if pairs else None,
        **_cost(what, scores, result),
        "run": name,
        "what": what,
        "recipe": recipe_digest(record["signature"]),
        "cores": round(rate / per_core) if rate and per_core else result.get("cores"),
        "cpu": "; ".join(sorted({row["cpu"] for row in record["per_rank"]})),
        "tensorflow": record["versions"]["tensorflow"],
        "code": record["code"],
    }
    return {key: cell(values[key]) for key in RUN_COLUMNS}


def recipe_digest(recorded: Mapping[str, Any]) -> str:
    """Return a digest of a run's signature: equal for runs of one recipe, model and kind of data, whatever the seed."""
    shared = signature.normalised(recorded)
    shared["recipe"].pop("seed", None)
    shared["data"].pop("content", None)  # so that runs that did not record it can share a table
    shared.pop("init_from", None)
    return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:8]


def _cost(what: str, scores: Mapping, result: Mapping) -> Dict[str, Any]:
    """Return the epochs, steps and seconds behind a score; None where the run did not record them."""
    if what in ("last", "ensemble", FAILED):
        return {key: result.get(key) for key in ("epochs", "steps", "wall_seconds")}
    if what.startswith("end_of:"):
        return {"epochs": scores["epoch"], "steps": scores["step"] + 1, "wall_seconds": scores["wall_seconds"]}
    return {"epochs": None, "steps": None, "wall_seconds": None}


@dataclasses.dataclass(frozen=True)
class _Line:
    """One line of a table: the published figure, if any, and the runs that measured it or ended without a score."""

    label: str
    flagfile: str
    published: Optional[Row]
    measured: List[Row]
    failed: List[Row]
    reference: str  # the label of what these runs are compared with, seed by seed
    compared: List[Row]
    timed: bool

    def numbers(self, key: str) -> List[float]:
        return [float(row[key]) for row in self.measured if row.get(key)]

    def spread(self, key: str, factor: float, digits: int) -> str:
        """Return `mean ± standard deviation` of a column over the runs; the mean alone for a single run."""
        values = [factor * value for value in self.numbers(key)]
        return interval(values).spread(digits) if values else ""

    def difference(self) -> Optional[Interval]:
        """Return top-1 minus that of the reference, in points, over the seeds that both have; None without any."""
        values = [100 * (mine - theirs) for mine, theirs in self._pairs("top1")]
        return interval(values) if values else None

    def seconds(self) -> Optional[Interval]:
        """Return the seconds of whole runs, if this line is timed."""
        values = self.numbers("wall_seconds") if self.timed else []
        return interval(values) if values else None

    def time_ratio(self) -> Optional[Interval]:
        """Return the time of whole runs relative to the reference, over the seeds that both have, if it is timed."""
        values = [mine / theirs for mine, theirs in self._pairs("wall_seconds")] if self.timed else []
        return interval(values) if values else None

    def _pairs(self, key: str) -> List[Tuple[float, float]]:
        others = {row["seed"]: float(row[key]) for row in self.compared if row[key]}
        return [(float(row[key]), others[row["seed"]]) for row in self.measured if row[key] and row["seed"] in others]

    def of_published(self, *keys: str) -> str:
        """Return columns of the published figure, separated by blanks."""
        return " ".join(self.published[key] for key in keys) if self.published else ""


def tables(spec: Iterable[Row], published: Sequence[Row], runs: Sequence[Row]) -> Dict[str, Table]:
    """Return the accuracy tables of `spec` (rows of tables.csv) by name.

    Raises DataError for an unknown published figure, and for runs that cannot be averaged.
    """
    lines: Dict[str, List[_Line]] = {}
    spec = list(spec)
    labels = {row["runs"]: row["label"].replace("**", "") for row in spec if row["what"] == "last"}
    for row in spec:
        if row["what"] != "efficiency":  # report/efficiency.py
            lines.setdefault(row["table"], []).append(_line(row, labels, published, runs))
    return {
        name: Table(_columns(table), _note(table), [_figures(line) for line in table], _TABLE_COLUMNS)
        for name, table in lines.items()
    }


def _line(row: Row, labels: Mapping[str, str], published: Sequence[Row], runs: Sequence[Row]) -> _Line:
    measured = [run for run in find_runs(row, runs) if run["what"] == row["what"]]
    failed = [run for run in find_runs(row, runs) if run["what"] == FAILED]
    _check_alike(row, [*measured, *failed])
    found = {run["what"] for run in find_runs(row, runs)}
    if found and not measured and not failed:
        print(
            f"tables: tables.csv: {row['label']}: the runs {row['runs']} have no score {row['what']!r}, only "
            f"{', '.join(sorted(found))}; correct the column `what`",
            file=sys.stderr,
        )
    pattern = row.get("reference", "")
    compared = [run for run in find_runs({**row, "runs": pattern}, runs) if run["what"] == "last"]
    reference = f'"{labels.get(pattern, pattern)}"'
    timed = row.get("timed") == "yes"
    figure = find_published(row, published)
    return _Line(row["label"], row["flagfile"], figure, measured, failed, reference, compared, timed)


def _check_alike(line: Row, runs: List[Row]) -> None:
    """Raise DataError if a line would average runs of several recipes, or count a seed twice."""
    recipes, seeds = {run["recipe"] for run in runs}, [run["seed"] for run in runs]
    if len(recipes) > 1 or len(set(seeds)) < len(seeds):
        problem = "have different recipes" if len(recipes) > 1 else "have a seed in common"
        raise DataError(
            f"tables.csv: {line['label']}: the runs {', '.join(run['run'] for run in runs)} {problem}; move the others "
            f"to folders that do not match {line['runs']}, and remove their rows from {RUNS}"
        )


def _columns(table: List[_Line]) -> List[Column]:
    """Return the columns of a table; those without a single cell are left out."""
    columns = [
        ("what", [line.label for line in table]),
        ("published", [line.of_published("value", "unit") for line in table]),
        ("top-1, %", [line.spread("top1", 100, 2) or ("not finite" if line.failed else NOT_RUN) for line in table]),
        ("difference (95 % interval)", [_bounded(line.difference()) for line in table]),
        ("time, s", [_spread(line.seconds()) for line in table]),
        ("relative time (95 % interval)", [_bounded(line.time_ratio(), "") for line in table]),
        (
            "n",
            [str(len(line.measured)) for line in table] if any(line.measured or line.failed for line in table) else [],
        ),
        ("not finite", [str(len(line.failed) or "") for line in table]),
        ("top-5, %", [line.spread("top5", 100, 2) for line in table]),
        ("loss", [line.spread("loss", 1, 4) for line in table]),
        ("ECE, %", [line.spread("ece", 100, 2) for line in table]),
        ("epochs", [line.spread("epochs", 1, 1).split(" ")[0] for line in table]),
        ("flagfile", [line.flagfile for line in table]),
        ("source", [line.of_published("source") for line in table]),
    ]
    return [(title, cells) for title, cells in columns if any(cells)]


def _bounded(value: Optional[Interval], sign: str = "+") -> str:
    return value.bounded(2, sign) if value else ""


def _spread(seconds: Optional[Interval]) -> str:
    return seconds.spread(0) if seconds else ""


def _note(table: List[_Line]) -> str:
    runs = [run for line in table for run in (*line.measured, *line.failed)]
    if not runs:
        return ""
    failed = "Not finite: runs that ended with code 77, because the loss was not a finite number; in no mean. "
    shown = failed if any(line.failed for line in table) else ""
    compared = list(dict.fromkeys(line.reference for line in table if line.difference()))
    reference = f"Difference: top-1 minus that of {' or of '.join(compared)} for equal seeds, in points. "
    time = (
        "Time is that of the whole run, with start and evaluations. " if any(line.seconds() for line in table) else ""
    )
    return f"Mean ± standard deviation over n seeds. {reference if compared else ''}{time}{shown}{origin(runs)}"


def _figures(line: _Line) -> Row:
    """Return the row of the table's CSV file: means that are not rounded for reading."""
    means = {key: line.numbers(key) for key in SCORES}
    difference, seconds, ratio = line.difference(), line.seconds(), line.time_ratio()
    return {
        "what": line.label.replace("**", ""),
        "published": line.of_published("value"),
        "unit": line.of_published("unit"),
        "source": line.of_published("source"),
        "n": str(len(line.measured)),
        "not_finite": str(len(line.failed)),
        **{f"{key}_mean": cell(statistics.mean(values)) if values else "" for key, values in means.items()},
        "top1_sd": cell(statistics.stdev(means["top1"])) if len(means["top1"]) > 1 else "",
        "reference": line.reference if difference else "",
        **{f"difference_{key}": cell(difference and getattr(difference, key)) for key in ("mean", "low", "high")},
        **{f"seconds_{key}": cell(seconds and getattr(seconds, key)) for key in ("mean", "sd")},
        **{f"time_{key}": cell(ratio and getattr(ratio, key)) for key in ("mean", "low", "high")},
        "flagfile": line.flagfile,
    }
