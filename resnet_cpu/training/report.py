"""The report of a run: rows, progress, TensorBoard, result and plots on rank 0; a silent twin on the other ranks."""

import importlib.util
import sys
import time
from typing import Any, Dict, List, Mapping, Optional, Sequence, Union

import tensorflow as tf

from resnet_cpu.cluster import machine, placement, precision
from resnet_cpu.errors import RunFolderError
from resnet_cpu.model.kernels import library
from resnet_cpu.recipe.schedule import Rates, Span
from resnet_cpu.report import plotting, profile, run_plots, tables
from resnet_cpu.run import files, provenance
from resnet_cpu.run.folder import RunFolder, finite, read_json, read_record, read_rows
from resnet_cpu.scaling import steptimes
from resnet_cpu.text import count, duration, shown_loss
from resnet_cpu.training.evaluation import Score
from resnet_cpu.training.job import Job
from resnet_cpu.training.step import Outcome

TOP1_MARKS = (0.5, 0.6, 0.7, 0.75, 0.759, 0.8, 0.85, 0.88, 0.9)  # accuracies whose first crossing is timed
_HAS_TENSORBOARD = importlib.util.find_spec("tensorboard") is not None
_CLOCK_SHARE = 0.01  # of the time, at most, that writing clock.json after steps may take


class Progress:
    """One line on standard error with the position of the run: rewritten on a terminal, appended elsewhere."""

    def __init__(self, total_steps: int, total_epochs: float, cores: int) -> None:
        self.total_steps, self.total_epochs, self.cores = total_steps, total_epochs, cores
        self._terminal = sys.stderr.isatty()

    def show(self, row: Mapping[str, Any], step_s: float) -> None:
        """Print one row of metrics.jsonl; `step_s`, seconds per step, gives the remaining time."""
        steps = row["step"] + 1
        speed = "first step"  # it traces the graph and is not timed
        if row["images_per_second"] is not None:
            rate = row["images_per_second"]
            speed = (
                f"{rate:.1f} img/s ({rate / self.cores:.1f}/core)  "
                f"data wait {100 * row['data_wait_s'] / row['step_s']:.1f}%  "
                f"left {duration((self.total_steps - steps) * step_s)}"
            )
        line = (
            f"{row['phase']}  step {steps}/{self.total_steps}  "
            f"epoch {self.total_epochs * steps / self.total_steps:.2f}/{self.total_epochs:.2f}  "
            f"loss {shown_loss(row['loss'])}  lr {row['lr']:.5g}  {speed}"
        )
        self._write(line + ("" if self._terminal else "\n"))

    def say(self, text: str) -> None:
        """Print a line of its own."""
        self._write(text + "\n")

    def _write(self, text: str) -> None:
        # In one piece, unlike print() under PYTHONUNBUFFERED=1: other ranks and threads write to the same stream.
        sys.stderr.write(("\r\x1b[K" if self._terminal else "") + text)
        sys.stderr.flush()


class _Window:
    """Times since the last row of metrics.jsonl, seconds."""

    def __init__(self) -> None:
        self.steps, self.data_wait_s, self.update_s, self.step_s = 0, 0.0, 0.0, 0.0

    def add(self, outcome: Outcome) -> None:
        self.steps += 1
        self.data_wait_s += outcome.data_wait_s
        self.update_s += outcome.update_s
        self.step_s += outcome.step_s


class Report:
    """Everything that rank 0 writes and prints about a run. `Silent` has the same methods."""

    def __init__(self, job: Job, folder: RunFolder, cores: int) -> None:
        """Report `job` to `folder`; `cores` is the number of cores of all ranks."""
        self._job, self._folder, self._cores = job, folder, cores
        self._progress = Progress(job.last_step, job.epoch(job.last_step), cores)
        self._profiler = profile.Recorder(job.run_dir, job.settings.run.profile_steps)
        self._evaluations = {row["step"]: row for row in read_rows(folder.file(files.EVALUATIONS))}
        self._seconds_to_top1 = dict(job.seconds_to_top1)
        self._window = _Window()
        self._timed_steps, self._timed_s, self._next_clock = 0, 0.0, 0.0
        self._step = 0  # the latest one that was begun
        self._board: Any = None

    def say(self, text: str) -> None:
        """Print a line on standard error."""
        self._progress.say(text)

    def announce(self, parameters: int, kernels: Sequence[str], step: int, saved: Optional[Mapping[str, Any]]) -> None:
        """Print what is trained, with the number of trainable parameters, and where a resumed run continues.

        `kernels` says for each rank what computes batch norm; `saved` is the manifest of the checkpoint to resume from.
        """
        job = self._job
        self._write_clock()
        accumulated = f" x {job.batch.accumulate_steps} accumulated" if job.batch.accumulate_steps > 1 else ""
        self.say(
            f"{job.settings.model.model}: {parameters:,} trainable parameters, {job.settings.data.dataset}: "
            f"{job.train_examples:,} training and {job.validation_examples:,} evaluation images; "
            f"{job.world.size} ranks x {job.batch.per_rank} images{accumulated}; {job.total_steps} steps = "
            f"{job.epoch(job.total_steps):.2f} epochs; results in {job.run_dir}"
        )
        if job.settings.model.precision == "bfloat16":
            self._warn_of_slow_precision()
        self._announce_kernels(kernels)
        if not _HAS_TENSORBOARD:
            self.say("TensorBoard is not installed: nothing is written for it (pip install tensorboard)")
        if job.last_step < job.total_steps:
            then = ", save a checkpoint and evaluate" if job.evaluates else " and save a checkpoint"
            self.say(f"will stop after step {job.last_step} (--max_steps){then}")
        if saved is None:
            return
        self._step = step - 1
        self.say(f"resumed after step {step} from {job.resume_from} (attempt {job.attempt})")
        if saved["layout"] != job.grouping:
            before, now = (f"{n} ranks x {size} images x {k}" for n, size, k in (saved["layout"], job.grouping))
            effect = "sums in another order, so results will differ in the last bits"
            if saved["layout"][1] != job.batch.per_rank and job.settings.model.bn_stats_batch is None:
                effect = f"batch norm now takes statistics over {job.batch.per_rank} images, which trains differently"
            self.say(f"earlier steps used {before}; this attempt uses {now}: the same global batch, but {effect}")
        versions = provenance.versions()
        changed = {
            name: (old, versions.get(name)) for name, old in saved["versions"].items() if versions.get(name) != old
        }
        if changed:
            pairs = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in changed.items())
            self.say(f"packages changed since that checkpoint: {pairs}; results will differ in the last bits")
        before = saved.get("kernels", "TensorFlow's operations")  # version 0.1 had no others
        if library.changed(before, kernels[0]):
            text = f"kernels changed since that checkpoint: {before} -> {kernels[0]}"
            self.say(f"{text}; results will differ in the last bits")

    def _warn_of_slow_precision(self) -> None:
        host = machine.read()
        warning = precision.warning(host.instruction_sets, precision.known(host, placement.has_intel_openmp()))
        if warning is not None:
            self.say(warning)

    def _announce_kernels(self, kernels: Sequence[str]) -> None:
        """Print and record what computes batch norm, and with SGD the update of the weights, on each rank."""
        fused = "batch norm and update of the weights" if self._job.settings.recipe.optimizer == "sgd" else "batch norm"
        self._add_to_record({"kernels": list(kernels)})
        for text in dict.fromkeys(kernels):
            ranks = [rank for rank, other in enumerate(kernels) if other == text]
            where = "" if len(ranks) == len(kernels) else f" on rank{'s' * (len(ranks) > 1)} {machine.spans(ranks)}"
            self.say(f"{fused}{where}: {text}")

    def before(self, step: int) -> None:
        """Start the profiler if `step` is the first to profile."""
        self._step = step
        self._profiler.before(step)

    def step(self, step: int, span: Span, rates: Rates, outcome: Outcome) -> None:
        """Record a step; append a row to metrics.jsonl every --log_every_steps and at the end of a span."""
        job, last_of_span = self._job, step == span.steps[-1]
        self._profiler.after(step, last_of_phase=last_of_span)
        if step > span.steps[0]:  # the first step of a span traces the graph and is never timed
            self._window.add(outcome)
            self._timed_steps, self._timed_s = self._timed_steps + 1, self._timed_s + outcome.step_s
        if time.monotonic() >= self._next_clock:
            self._write_clock()
        if (step + 1) % job.settings.run.log_every_steps and not last_of_span:
            return
        window, self._window = self._window, _Window()
        row = {
            "step": step,
            "phase": span.phase.name,
            "epoch": job.epoch(step),
            "lr": rates.lr,
            "loss": outcome.loss,
            "images_per_second": window.steps * job.batch.total / window.step_s if window.steps else None,
            "data_wait_s": window.data_wait_s / window.steps if window.steps else None,
            "update_s": window.update_s / window.steps if window.steps else None,
            "step_s": window.step_s / window.steps if window.steps else None,
            "attempt": job.attempt,
        }
        self._folder.append(files.METRICS, row)
        self._scalars(step, {"loss": outcome.loss, "lr": rates.lr})
        self._progress.show(row, self._timed_s / max(self._timed_steps, 1))

    def evaluation(self, step: int, score: Score, seconds: float) -> None:
        """Append the score after `step` steps, which took `seconds`, to eval.jsonl."""
        job, wall_seconds, end_of = self._job, self._job.wall_seconds(), self._job.evaluated_phase(step)
        for mark in TOP1_MARKS:
            if score.top1 >= mark:
                self._seconds_to_top1.setdefault(str(mark), round(wall_seconds, 3))
        row = {
            "step": step - 1,
            "epoch": job.epoch(step),
            "phase": job.phase_at(step),
            "end_of": end_of,
            "top1": score.top1,
            "top5": score.top5,
            "loss": score.loss,
            "examples": score.examples,
            "images_per_second": score.examples / seconds,
            "wall_seconds": wall_seconds,
            "attempt": job.attempt,
        }
        self._evaluations[row["step"]] = row
        self._folder.append(files.EVALUATIONS, row)
        self._scalars(step, {"evaluation/top1": score.top1, "evaluation/loss": score.loss})
        self._write_clock()
        self.say(
            f"evaluation after step {step}{f' (end of {end_of})' if end_of else ''}: top-1 {100 * score.top1:.2f} %, "
            f"top-5 {100 * score.top5:.2f} %, loss {shown_loss(score.loss)} on {score.examples} images, "
            f"{row['images_per_second']:.0f} img/s"
        )

    def times(self) -> Dict[str, Any]:
        """Return the times of the run so far, as a checkpoint and clock.json hold them."""
        return {"wall_seconds": self._job.wall_seconds(), "seconds_to_top1": dict(self._seconds_to_top1)}

    def _add_to_record(self, facts: Mapping[str, Any]) -> None:
        """Add facts to run.json, unless it was damaged or removed meanwhile: a part of a record would pass for one."""
        record = read_record(self._folder.path)
        if record is not None:
            self._folder.write_json(files.RECORD, {**record, **facts})

    def saved(self, ranks: List[Dict[str, Any]]) -> None:
        """Record each rank's peak memory, GiB, and the bad records that it has skipped, when a checkpoint is saved."""
        peaks = [rank["peak_memory_gib"] for rank in ranks]
        self._add_to_record({"peak_memory_gib_per_rank": peaks})
        skipped = {
            example: {"rank": rank, "attempt": self._job.attempt, "reason": reason}
            for rank, facts in enumerate(ranks)
            for example, reason in facts["bad_records"].items()
        }
        if skipped:
            before = read_json(self._folder.file("bad_records.json")) or {}
            self._folder.write_json("bad_records.json", {**skipped, **before})
        self._write_clock()

    def result(self, step: int, additions: Mapping[str, Any]) -> Dict[str, Any]:
        """Write result.json of a run that ended after `step` steps, with `additions` at its end; return it."""
        job, score = self._job, self._evaluations.get(step - 1, {})
        rate = self._timed_steps * job.batch.total / self._timed_s if self._timed_steps else None
        if rate is None:  # this attempt only finished the run: the speed of the steps that earlier ones logged
            rows = read_rows(self._folder.file(files.METRICS))
            speeds = [row["images_per_second"] for row in rows if row["images_per_second"]]
            rate = len(speeds) / sum(1 / speed for speed in speeds) if speeds else None
        result = finite(
            {
                "experiment": job.settings.run.experiment,
                "top1": score.get("top1"),
                "top5": score.get("top5"),
                "loss": score.get("loss"),
                "examples": score.get("examples", 0),
                "images_per_second": rate,
                "images_per_second_per_core": rate / self._cores if rate else None,
                **self._extent(step),
                "complete": step >= job.total_steps,
                **additions,
            }
        )
        self._folder.write_json(files.RESULT, result)
        return result

    def not_finite(self, message: str) -> None:
        """Record a run that ended because its loss or weights were not finite, in its last step."""
        facts = {"message": message, "experiment": self._job.settings.run.experiment, "cores": self._cores}
        try:
            self._folder.write_json(files.NOT_FINITE, {**facts, **self._extent(self._step + 1)})
        except (OSError, RunFolderError) as error:  # must not replace the error that all ranks end with
            print(f"WARNING: {files.NOT_FINITE} could not be written ({error})", file=sys.stderr, flush=True)

    def _extent(self, steps: int) -> Dict[str, Any]:
        job = self._job
        return {
            "steps": steps,
            "epochs": job.epoch(steps),
            "ranks": job.world.size,
            "global_batch_size": job.batch.total,
            **self.times(),
            "seed": job.settings.recipe.seed,
        }

    def finish(self, result: Mapping[str, Any]) -> None:
        """Draw the plots of a finished run and print where its result is."""
        self._write_clock()
        self.draw(result)
        if self._profiler.steps is not None and not self._profiler.done:
            self.say("profile: nothing recorded, because this attempt did not run the steps of --profile_steps")
        for line in steptimes.lines(result["scaling"]) if "scaling" in result else ():
            self.say(line)
        skipped = read_json(self._folder.file("bad_records.json"))
        if skipped:
            number = count(len(skipped), "bad training image")
            self.say(f"{number} skipped in this run, listed in {self._job.run_dir}/bad_records.json")
        if result["complete"]:
            curves = f", curves in {self._job.run_dir}/plots" if plotting.available() else ""
            self.say(f"done: result in {self._job.run_dir}/result.json{curves}")
        else:
            self.say(f"stopped after step {result['steps']} (--max_steps); run again without --max_steps to continue")

    def draw(self, result: Optional[Mapping[str, Any]] = None) -> None:
        """Draw the plots of the rows so far and of `result`; a plot that fails is reported and never ends a run."""
        if not plotting.available():
            return
        try:
            _draw(self._job, self._folder, result or {})
        except Exception as error:
            print(f"plots: not drawn ({type(error).__name__}: {error})", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Flush and close all files and release the run folder."""
        if self._board is not None:
            self._board.close()
        self._folder.close()

    def _scalars(self, step: int, values: Mapping[str, float]) -> None:
        if not _HAS_TENSORBOARD:  # a package of its own since TensorFlow 2.21
            return
        if self._board is None:
            self._board = tf.summary.create_file_writer(self._folder.file("tensorboard"))
        with self._board.as_default():
            for name, value in values.items():
                tf.summary.scalar(name, value, step)

    def _write_clock(self) -> None:
        # Written to the disk each time, which takes long on some file systems: the next row that writes is due when
        # this write makes up no more than _CLOCK_SHARE of the time.
        started = time.monotonic()
        self._folder.write_json(files.CLOCK, self.times())
        self._next_clock = started + (time.monotonic() - started) / _CLOCK_SHARE


class Silent:
    """The report of the other ranks: the methods of `Report`, which do nothing."""

    def say(self, text: str) -> None:
        """Do nothing."""

    def announce(self, parameters: int, kernels: Sequence[str], step: int, saved: Optional[Mapping[str, Any]]) -> None:
        """Do nothing."""

    def before(self, step: int) -> None:
        """Do nothing."""

    def step(self, step: int, span: Span, rates: Rates, outcome: Outcome) -> None:
        """Do nothing."""

    def evaluation(self, step: int, score: Score, seconds: float) -> None:
        """Do nothing."""

    def times(self) -> Dict[str, Any]:
        """Return nothing."""
        return {}

    def saved(self, ranks: List[Dict[str, Any]]) -> None:
        """Do nothing."""

    def result(self, step: int, additions: Mapping[str, Any]) -> Dict[str, Any]:
        """Return nothing."""
        return {}

    def not_finite(self, message: str) -> None:
        """Do nothing."""

    def finish(self, result: Mapping[str, Any]) -> None:
        """Do nothing."""

    def draw(self, result: Optional[Mapping[str, Any]] = None) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


AnyReport = Union[Report, Silent]


def open_report(job: Job) -> AnyReport:
    """Return this rank's report of a run; all ranks call it."""
    cores = sum(job.world.gather(job.world.cores))
    return Silent() if job.folder is None else Report(job, job.folder, cores)


def _draw(job: Job, folder: RunFolder, result: Mapping[str, Any]) -> None:
    metrics, evaluations = read_rows(folder.file(files.METRICS)), read_rows(folder.file(files.EVALUATIONS))
    title = f"{job.settings.model.model} on {job.settings.data.dataset}, {job.world.size} ranks"
    run_plots.draw_curves(metrics, evaluations, folder.file("plots", "curves.png"), title)
    if "lr_scaling" in result and evaluations:
        # Accuracies on another data set cannot be compared with the published ones.
        published = tables.read_csv(tables.PUBLISHED_CURVES) if job.settings.data.dataset == "imagenet" else []
        rule = result["lr_scaling"]
        title += f", batch {job.batch.total:,}, {rule['optimizer']}, LR {rule['peak_lr']:.4g} ({rule['rule']})"
        run_plots.draw_lr_scaling(evaluations, published, folder.file("plots", "lr_scaling.png"), title)
    if "scaling" in result:
        timing = steptimes.read(job.run_dir, job.world.size)
        run_plots.draw_scaling(timing or {}, folder.file("plots", "scaling.png"), title)
    if "ensemble" in result:
        path = folder.file("plots", "ensemble.png")
        run_plots.draw_ensemble(result["members"], result["ensemble"]["prefixes"], path)
