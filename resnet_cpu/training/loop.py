"""The training loop: phases in their order, a step at a time, in the open."""

import os
import socket
import sys
import time
from typing import Any, Dict, List, Optional

import numpy as np
import tensorflow as tf

from resnet_cpu.cluster import guard, horovod
from resnet_cpu.cluster import machine
from resnet_cpu.data import batches as pipeline
from resnet_cpu.errors import CheckpointError, NotFinite, StopRequested
from resnet_cpu.recipe import batch as batch_rule
from resnet_cpu.recipe import schedule
from resnet_cpu.recipe.phases import Phase
from resnet_cpu.report import profile
from resnet_cpu.report import run_plots as plots
from resnet_cpu.report import tables as results
from resnet_cpu.run import checkpoint, provenance
from resnet_cpu.run.folder import read_json, read_rows
from resnet_cpu.scaling import steptimes as throughput
from resnet_cpu.training import ensemble, evaluation, state
from resnet_cpu.training.batches import training_batches
from resnet_cpu.training.opening import Job
from resnet_cpu.training.report import Progress
from resnet_cpu.training.state import State, build_model
from resnet_cpu.training.step import Knobs, TrainStep, make_knobs, make_optimizer

TOP1_MARKS = (0.5, 0.6, 0.7, 0.75, 0.759, 0.8, 0.85, 0.88, 0.9)  # whose first crossing is timed


def run(job: Job) -> Dict[str, Any]:
    """Train to the end of the recipe (or --max_steps); return the result, which rank 0 has also written."""
    try:
        with guard.Watchdog(job.settings.system.stall_timeout) as watchdog:
            horovod.start(job.world)
            return _Training(job, watchdog).run()
    finally:
        if job.folder is not None:
            job.folder.close()


class _Training:
    """The parts of one run, and the few numbers that its report needs."""

    def __init__(self, job: Job, watchdog: guard.Watchdog) -> None:
        self.job, self.watchdog = job, watchdog
        self.run_settings = job.settings.run
        self.cores = sum(job.world.gather(job.world.cores))
        self.model = build_model(job.settings)
        self.knobs: Knobs = make_knobs()
        recipe = job.settings.recipe
        self.state = State(self.model, make_optimizer(self.model, self.knobs, recipe))
        self.train_step = TrainStep(
            self.model, self.state.optimizer, self.knobs, job.batch.accumulate_steps, recipe.label_smoothing
        )
        self.evaluate_step = evaluation.make_evaluate_step(self.model)
        self.timed_steps, self.timed_s = 0, 0.0
        self.step_times = throughput.StepTimes()
        self.recorder = profile.Recorder(job.run_dir, job.settings.run.profile_steps if job.folder else None)
        self.seconds_to_top1: Dict[str, float] = {}
        self.score: Optional[evaluation.Score] = None
        self.layout = [job.world.size, job.batch.per_rank, job.batch.accumulate_steps]
        self.layout_before = self.layout
        self.ends = schedule.end_steps(job.phases)
        self.seconds_before = self._restore()
        self.saved_step = self.state.step if job.resume_from else None
        self.last = min(job.total_steps, self.run_settings.max_steps or job.total_steps)
        self.progress = Progress(self.last, self._epoch(self.last), self.cores) if job.folder else None

    # --- start -------------------------------------------------------------------------------------------------

    def _restore(self) -> float:
        """Start from the agreed checkpoint, if any; make all ranks equal and see that they are. Return its seconds."""
        job, elapsed = self.job, 0.0
        if job.resume_from is None and job.init_from is not None:
            job.world.on_rank0(self._take_over_weights)
        if job.resume_from is not None:

            def restore() -> Dict[str, Any]:
                self.state.restore(job.resume_from or "")
                return checkpoint.read_manifest(job.resume_from or "")

            manifest = job.world.on_rank0(restore)
            self.state.step = manifest["step"]
            self.seconds_to_top1 = manifest["seconds_to_top1"]
            self.layout_before = manifest["layout"]
            elapsed = manifest["wall_seconds"]
        if job.data is not None:
            data, classes = job.data, job.settings.model.num_classes
            job.world.on_rank0(lambda: pipeline.check_label_base(data, classes))
        horovod.broadcast(self.state.variables)
        horovod.check_replicas(job.world, self.state.variables, f"before step {self.state.step}")
        return elapsed

    def _take_over_weights(self) -> None:
        """Start from the weights of `--init_from`; leave a report of every name, and tell it in short."""
        job = self.job
        assert job.init_from is not None and job.folder is not None
        if checkpoint.digest(job.init_from["file"]) != job.init_from["sha256"]:
            raise CheckpointError(
                f"--init_from={job.init_from['path']}: {job.init_from['file']} is not what this run began with; choose "
                "another --run_dir"
            )
        taken, left, lines = state.take_over(self.model, job.init_from["file"])
        job.folder.write_text("init_from.txt", "\n".join(lines) + "\n")
        print(
            f"--init_from={job.init_from['path']}: {taken} arrays taken"
            + (f", {', '.join(left)} left as initialised" if left else "")
            + f"; name by name in {job.folder.file('init_from.txt')}",
            file=sys.stderr,
            flush=True,
        )

    def _announce(self) -> None:
        job = self.job
        if self.progress is None:
            return
        trainable = sum(int(np.prod(variable.shape)) for variable in self.model.trainable_variables)
        self.progress.say(
            f"{job.settings.model.model}: {trainable:,} trainable parameters, {job.settings.data.dataset}: "
            f"{job.train_examples:,} training and {job.validation_examples:,} evaluation images; "
            f"{job.world.size} ranks x {job.batch.per_rank} images"
            + (f" x {job.batch.accumulate_steps} accumulated" if job.batch.accumulate_steps > 1 else "")
            + f"; {job.total_steps} steps = {self._epoch(job.total_steps):.2f} epochs; results in {job.run_dir}"
        )
        doubt = machine.precision_warning(job.settings.model.precision, provenance.instruction_sets())
        if doubt is not None:
            self.progress.say(doubt)
        if self.last < job.total_steps:
            self.progress.say(f"stops after step {self.last} (--max_steps), evaluates and saves")
        if self.state.step:
            self.progress.say(f"resumed after step {self.state.step} from {job.resume_from} (attempt {job.attempt})")
            if self.layout_before != self.layout:
                before, here = (
                    f"{ranks} ranks x {size} images x {count}"
                    for ranks, size, count in (self.layout_before, self.layout)
                )
                self.progress.say(
                    f"the steps before ran on {before}, these on {here}: the same images a step, but in other groups "
                    "for sums and batch norm, so the result is not bit-identical"
                )

    # --- the loop ----------------------------------------------------------------------------------------------

    def run(self) -> Dict[str, Any]:
        self._announce()
        job = self.job
        before: Optional[Phase] = None
        for phase in job.phases:
            first_of_phase = self.ends[phase.name] - phase.steps
            begin, end = max(self.state.step, first_of_phase), min(self.ends[phase.name], self.last)
            if begin < end:
                if begin == first_of_phase:
                    self._enter(phase, before)
                self._run_phase(phase, first_of_phase, begin, end)
            before = phase
        if self.score is None:
            self._evaluate(self._leaf_ending_at(self.state.step))
        self._save()
        result = self._result(complete=self.state.step >= job.total_steps)
        if job.folder is not None:
            job.folder.write_json("result.json", result)
            self._draw(result)
            if self.progress is not None:
                self._say_result(result)
        return result

    def _enter(self, phase: Phase, before: Optional[Phase]) -> None:
        """Start a phase from the end of its parent, which need not be the phase that ran before it."""
        job = self.job
        if before is not None and phase.parent is not None and phase.parent != before.name:
            path = checkpoint.folder(job.run_dir, self.ends[phase.parent])
            job.world.on_rank0(lambda: self.state.restore(path))
            horovod.broadcast(self.state.variables)
            if self.progress is not None:
                self.progress.say(f"{phase.name} starts from the end of {phase.parent}")
        if phase.velocity == "reset":
            self.state.reset_velocity()

    def _run_phase(self, phase: Phase, first_of_phase: int, begin: int, end: int) -> None:
        self.knobs.weight_decay.assign(phase.wd)
        job = self.job
        batches = training_batches(
            job.settings,
            job.world,
            job.data,
            examples=job.train_examples,
            batch=job.batch,
            first_step=begin,
            last_step=end,
            augment=phase.augment,
            image_size=phase.image_size,
        )
        window = _Window()
        self.step_times.pause()
        for step in range(begin, end):
            self.recorder.before(step)
            rate = schedule.learning_rate(phase, step - first_of_phase)
            self.knobs.momentum.assign(
                schedule.momentum(job.phases, phase, step - first_of_phase, job.settings.recipe.momentum_correction)
            )
            started = time.perf_counter()
            stop = tf.constant(float(guard.stop_requested()))
            (loss, stopping, update_s), waited = self.train_step.take(
                batches, tf.constant(rate), stop, self.watchdog.beat
            )
            taken = time.perf_counter() - started
            self.recorder.after(step, last_of_phase=step + 1 == end)
            self.state.step = step + 1
            self.watchdog.beat()
            if not np.isfinite(loss):
                last = (
                    "no checkpoint yet" if self.saved_step is None else f"last checkpoint after step {self.saved_step}"
                )
                raise NotFinite(
                    f"loss is {loss} in step {step} (phase {phase.name}, LR {rate:g}), {last}; start again in another "
                    "--run_dir with a lower LR or a longer warm-up",
                    collective=True,
                )
            self.step_times.add(step, started, waited, update_s, taken)
            if step > begin:  # the first step of a phase traces the graph and is never timed
                window.add(waited, update_s, taken)
                self.timed_steps, self.timed_s = self.timed_steps + 1, self.timed_s + taken
            if (step + 1) % self.run_settings.log_every_steps == 0 or step + 1 == end:
                self._log(step, phase, rate, loss, window)
                window = _Window()
            self._after_step(step, phase)
            if stopping > 0 and self.state.step < job.total_steps:
                self._save()
                raise StopRequested(
                    f"stopped on request after step {self.state.step}, checkpoint written; run the same command again "
                    "to go on",
                    collective=True,
                )

    def _after_step(self, step: int, phase: Phase) -> None:
        """Evaluate and save where the agreed steps fall; keep a member as soon as its phase ends."""
        self.score = None
        every = self.run_settings.eval_every_epochs
        last_of_all = step + 1 == self.job.total_steps
        end_of_phase = step + 1 == self.ends[phase.name]
        if end_of_phase and phase.member:
            self._keep_member(phase.name)
        elif self._leaf_ending_at(step + 1) and not last_of_all:
            self._evaluate(phase.name)
        elif every and (self._epoch(step + 1) // every > self._epoch(step) // every) and not last_of_all:
            self._evaluate()
        every_steps = self.run_settings.checkpoint_every_steps
        due = end_of_phase or (every_steps and (step + 1) % every_steps == 0)
        if due and not last_of_all:  # that one is saved with its score
            self._save()

    def _leaf_ending_at(self, step: int) -> Optional[str]:
        """Return the phase that ends after `step` steps, if no later phase goes on from its end."""
        parents = {phase.parent for phase in self.job.phases}
        return next((name for name, end in self.ends.items() if end == step and name not in parents), None)

    def _keep_member(self, name: str) -> None:
        """Publish weights and predictions of an ensemble's member, before the checkpoint that lies behind them.

        So whatever is cut off in between is done again, and comes out the same.
        """
        job = self.job
        path = checkpoint.member_folder(job.run_dir, name)
        weights = {"weights": self.state.arrays()["weights"]}
        info = {"step": self.state.step, "signature": job.signature, "phase": name}
        horovod.check_replicas(job.world, self.state.variables, f"at the end of {name}")
        job.world.on_rank0(lambda: checkpoint.save(path, weights, info))
        predictions = self._evaluate(name)
        if job.data is not None:
            job.world.on_rank0(lambda: ensemble.save(path, predictions, job.settings))

    def _wall_seconds(self) -> float:
        """Return the seconds of this attempt, loading and evaluation included, and of those it goes on from."""
        return self.seconds_before + self.job.clock.seconds()

    def _epoch(self, step: int) -> float:
        return step * self.job.batch.total / self.job.train_examples

    # --- evaluation and saving ---------------------------------------------------------------------------------

    def _evaluate(self, end_of: Optional[str] = None) -> Optional[ensemble.Predictions]:
        """Evaluate on all ranks, record it; synthetic data has nothing to evaluate.

        `end_of` names the phase that has just ended. Returns what was said of each example, of a member on rank 0.
        """
        job = self.job
        if job.data is None:
            return None
        self.step_times.pause()
        started = time.perf_counter()
        everything = self.evaluate_step, job.settings, job.world, job.data, job.batch.per_rank, self.watchdog.beat
        predictions: Optional[ensemble.Predictions] = None
        if any(phase.member for phase in job.phases if phase.name == end_of):
            score, predictions = evaluation.predict(*everything)
        else:
            score = evaluation.evaluate(*everything)
        self.score = score
        horovod.check_replicas(job.world, self.state.variables, f"after step {self.state.step}")
        wall = self._wall_seconds()
        for mark in TOP1_MARKS:
            if score.top1 >= mark:
                self.seconds_to_top1.setdefault(str(mark), round(wall, 3))
        if job.folder is None or self.progress is None:
            return None
        seconds = time.perf_counter() - started
        row = {
            "step": self.state.step - 1,
            "epoch": self._epoch(self.state.step),
            "phase": self._phase_at(self.state.step),
            "end_of": end_of,
            "top1": score.top1,
            "top5": score.top5,
            "loss": score.loss,
            "examples": score.examples,
            "images_per_second": score.examples / seconds,
            "wall_seconds": wall,
            "attempt": job.attempt,
        }
        job.folder.append("eval.jsonl", row)
        job.folder.scalars(self.state.step, {"evaluation/top1": score.top1, "evaluation/loss": score.loss})
        self.progress.say(
            f"evaluation after step {self.state.step}{f' (end of {end_of})' if end_of else ''}: "
            f"top-1 {100 * score.top1:.2f} %, top-5 {100 * score.top5:.2f} %, "
            f"loss {score.loss:.4f} on {score.examples} images, {row['images_per_second']:.0f} img/s"
        )
        self._draw()
        return predictions

    def _phase_at(self, step: int) -> str:
        """Return the phase whose steps end at, or hold, `step` executed ones."""
        return next(name for name, end in self.ends.items() if step <= end)

    def _save(self) -> None:
        """Publish a checkpoint from rank 0; every rank learns whether it succeeded."""
        job, step = self.job, self.state.step
        if step == self.saved_step:
            return  # nothing was trained since; what is whole is never written again
        self.step_times.pause()

        def save() -> None:
            info = {
                "step": step,
                "signature": job.signature,
                "layout": self.layout,
                "wall_seconds": self._wall_seconds(),
                "seconds_to_top1": self.seconds_to_top1,
                "versions": provenance.versions(),
            }
            checkpoint.save(checkpoint.folder(job.run_dir, step), self.state.arrays(), info)
            keep = self.run_settings.keep_checkpoints
            checkpoint.prune(job.run_dir, keep, lambda oldest: schedule.still_needed(job.phases, oldest))

        horovod.check_replicas(job.world, self.state.variables, f"after step {step}")
        job.world.on_rank0(save)
        self.saved_step = step
        self._record_memory()
        self.watchdog.beat()

    # --- report ------------------------------------------------------------------------------------------------

    def _log(self, step: int, phase: Phase, rate: float, loss: float, window: "_Window") -> None:
        job = self.job
        if job.folder is None or self.progress is None:
            return
        row = {
            "step": step,
            "phase": phase.name,
            "epoch": self._epoch(step),
            "lr": rate,
            "loss": loss,
            "images_per_second": window.steps * job.batch.total / window.taken if window.steps else None,
            "data_wait_s": window.waited / window.steps if window.steps else None,
            "update_s": window.updating / window.steps if window.steps else None,
            "step_s": window.taken / window.steps if window.steps else None,
            "attempt": job.attempt,
        }
        job.folder.append("metrics.jsonl", row)
        job.folder.scalars(step, {"loss": loss, "lr": rate})
        self.progress.show(row, self.timed_s / max(self.timed_steps, 1))

    def _result(self, complete: bool) -> Dict[str, Any]:
        job, score = self.job, self.score
        rate = self.timed_steps * job.batch.total / self.timed_s if self.timed_steps else None
        if rate is None:  # a run that was only finished here: what its earlier attempts wrote still stands
            earlier = read_json(os.path.join(job.run_dir, "result.json")) or {}
            rate = earlier.get("images_per_second")
        return {
            "experiment": self.run_settings.experiment,
            "top1": score.top1 if score else None,
            "top5": score.top5 if score else None,
            "loss": score.loss if score else None,
            "examples": score.examples if score else 0,
            "images_per_second": rate,
            "images_per_second_per_core": rate / self.cores if rate else None,
            "steps": self.state.step,
            "epochs": self._epoch(self.state.step),
            "ranks": job.world.size,
            "global_batch_size": job.batch.total,
            "wall_seconds": self._wall_seconds(),
            "seconds_to_top1": self.seconds_to_top1,
            "seed": job.settings.recipe.seed,
            "complete": complete,
            **self._of_mode(),
            **self._members(),
        }

    def _of_mode(self) -> Dict[str, Any]:
        """Return what the experiment's mode records besides; in mode scaling all ranks call it."""
        job = self.job
        mode = self.run_settings.experiment
        if mode == "lr_scaling":
            first = job.phases[0]
            scaled = "lr_per_256" in job.settings.recipe.phases[0].values
            return {
                mode: {
                    "rule": job.settings.recipe.lr_scaling if scaled else "absolute",
                    "optimizer": job.settings.recipe.optimizer,
                    "peak_lr": first.lr,
                    "peak_lr_per_256": first.lr * batch_rule.REFERENCE_BATCH / job.batch.total,
                    "warmup_epochs": self._epoch(first.warmup_steps),
                    "weight_decay": first.wd,
                }
            }
        return self._scaling() if mode == "scaling" else {}

    def _scaling(self) -> Dict[str, Any]:
        """Gather the step times of all ranks; return what they say, which is also left as scaling.json and .npz."""
        world, folder = self.job.world, self.job.folder
        steps, mine = self.step_times.kept()
        if not len(steps):  # so it is on all ranks
            return {}
        hosts, everyone = world.gather(socket.gethostname()), world.collect(mine[None])

        def report() -> Dict[str, Any]:
            assert everyone is not None and folder is not None
            found = throughput.summary(everyone, self.job.batch.total, hosts)
            np.savez(folder.file("step_times.npz"), steps=steps, seconds=everyone, hosts=np.array(hosts))
            folder.write_json("scaling.json", {**found, **throughput.per_rank(everyone, hosts)})
            return {key: value for key, value in found.items() if key != "block_s"}

        return {"scaling": world.on_rank0(report)}

    def _members(self) -> Dict[str, Any]:
        """Return the scores of the members that are done, and of their ensemble; all ranks call it."""
        job = self.job
        done = [phase.name for phase in job.phases if phase.member and self.ends[phase.name] <= self.state.step]
        if job.data is None or not done:
            return {}
        paths = dict(zip(done, job.world.on_rank0(lambda: ensemble.find(job.run_dir, done))))

        def without() -> List[str]:
            return [path for path in paths.values() if not ensemble.is_kept(path, job.settings)]

        # Somebody may have removed predictions, or scored a member on another view of the images meanwhile.
        for again in job.world.on_rank0(without):
            evaluation.evaluate_member(again, job.settings, job.world, job.data, self.watchdog.beat)

        def report() -> Dict[str, Any]:
            return ensemble.report({name: ensemble.load(path) for name, path in paths.items()}, self.watchdog.beat)

        return job.world.on_rank0(report)

    def _say_result(self, result: Dict[str, Any]) -> None:
        assert self.progress is not None
        if self.recorder.steps is not None and not self.recorder.done:
            self.progress.say("profile: none of --profile_steps was done to its end in this attempt; nothing recorded")
        for line in throughput.lines(result["scaling"]) if "scaling" in result else ():
            self.progress.say(line)
        if result["complete"]:
            curves = f", curves in {self.job.run_dir}/plots" if plots.available() else ""
            self.progress.say(f"done: result in {self.job.run_dir}/result.json{curves}")
        else:
            self.progress.say(f"stopped after step {result['steps']} (--max_steps); a later call goes on from here")

    def _draw(self, result: Optional[Dict[str, Any]] = None) -> None:
        """Draw the curves, and what there is in the result; a plot that fails is told, and never ends a run."""
        folder = self.job.folder
        if folder is None or not plots.available():
            return
        try:
            metrics, evaluations = read_rows(folder.file("metrics.jsonl")), read_rows(folder.file("eval.jsonl"))
            title = f"{self.job.settings.model.model} on {self.job.settings.data.dataset}, {self.job.world.size} ranks"
            plots.draw_curves(metrics, evaluations, folder.file("plots", "curves.png"), title)
            if self.run_settings.experiment == "lr_scaling" and evaluations:
                of_imagenet = (
                    self.job.settings.data.dataset == "imagenet"
                )  # accuracies of another set compare to nothing
                published = results.read_csv(results.PUBLISHED_CURVES) if of_imagenet else []
                rule = self._of_mode()["lr_scaling"]
                title += (
                    f", batch {self.job.batch.total:,}, {rule['optimizer']}, LR {rule['peak_lr']:.4g} ({rule['rule']})"
                )
                plots.draw_lr_scaling(evaluations, published, folder.file("plots", "lr_scaling.png"), title)
            if result is not None and "scaling" in result:
                path = folder.file("plots", "scaling.png")
                plots.draw_scaling(read_json(folder.file("scaling.json")) or {}, path, title)
            if result is not None and "ensemble" in result:
                path = folder.file("plots", "ensemble.png")
                plots.draw_ensemble(result["members"], result["ensemble"]["prefixes"], path)
        except Exception as error:
            print(f"plots: not drawn ({type(error).__name__}: {error})", file=sys.stderr, flush=True)

    def _record_memory(self) -> None:
        peaks = self.job.world.gather(provenance.peak_memory_gib())
        if self.job.folder is not None:
            record = read_json(self.job.folder.file("run.json")) or {}
            self.job.folder.write_json("run.json", {**record, "peak_memory_gib_per_rank": peaks})


class _Window:
    """Times since the last row of metrics.jsonl, seconds."""

    def __init__(self) -> None:
        self.steps, self.waited, self.updating, self.taken = 0, 0.0, 0.0, 0.0

    def add(self, waited: float, updating: float, taken: float) -> None:
        self.steps += 1
        self.waited += waited
        self.updating += updating
        self.taken += taken
