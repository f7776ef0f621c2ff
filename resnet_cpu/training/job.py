"""A run that may start, and what falls due after each of its steps. No TensorFlow; built by `opening.open_job`."""

import dataclasses
from typing import Any, Dict, List, Optional, Tuple

from resnet_cpu.cluster.control import World
from resnet_cpu.data.folders import ShardedData
from resnet_cpu.recipe import schedule
from resnet_cpu.recipe.batch import Batch, intervals
from resnet_cpu.recipe.phases import Phase
from resnet_cpu.run.folder import RunFolder, Stopwatch
from resnet_cpu.settings import Settings


@dataclasses.dataclass(frozen=True)
class Job:
    """The settings of a run and what follows from them on these ranks and this data: the same on all ranks.

    Only `world`, `folder` and `clock` belong to one rank.
    """

    settings: Settings
    world: World
    phases: Tuple[Phase, ...]
    batch: Batch
    train_examples: int
    validation_examples: int
    data: Optional[ShardedData]  # None: synthetic
    signature: Dict[str, Any]
    run_dir: str
    folder: Optional[RunFolder]  # held by rank 0, None on the others
    resume_from: Optional[str]  # checkpoint folder
    evaluated: bool  # whether eval.jsonl has the evaluation of that checkpoint
    init_from: Optional[Dict[str, str]]  # path as given, file that it named, its SHA-256
    attempt: int
    finished: Optional[Dict[str, Any]]  # the result, if there is nothing left to do
    seconds_before: float  # spent by earlier attempts
    seconds_to_top1: Dict[str, float]  # accuracies that earlier attempts reached
    clock: Stopwatch  # started when this attempt was opened

    @property
    def total_steps(self) -> int:
        """Return the number of steps of the recipe."""
        return schedule.total_steps(self.phases)

    @property
    def last_step(self) -> int:
        """Return the number of steps after which this attempt ends: that of the recipe, or --max_steps."""
        return min(self.total_steps, self.settings.run.max_steps or self.total_steps)

    @property
    def grouping(self) -> List[int]:
        """Return how the images of a step are grouped: [ranks, images at a time, micro-batches]."""
        return [self.world.size, self.batch.per_rank, self.batch.accumulate_steps]

    def epoch(self, step: int) -> float:
        """Return the epochs that `step` steps make up."""
        return step * self.batch.total / self.train_examples

    def wall_seconds(self) -> float:
        """Return the seconds of all attempts so far, with starting, evaluation and what a killed one did at its end."""
        return self.seconds_before + self.clock.seconds()

    def phase_at(self, step: int) -> str:
        """Return the name of the phase that the last of `step` steps belongs to."""
        return next(name for name, end in schedule.end_steps(self.phases).items() if step <= end)

    def member_due(self, step: int) -> Optional[str]:
        """Return the name of the ensemble's member that is complete after `step` steps, if any."""
        return next((phase.name for phase in self._ending_at(step) if phase.member), None)

    def checkpoint_due(self, step: int) -> bool:
        """Return whether a checkpoint is saved after `step` steps."""
        every = self.settings.run.checkpoint_every_steps
        return step == self.last_step or bool(self._ending_at(step)) or bool(every and step % every == 0)

    def skipped_records(self) -> Dict[str, str]:
        """Return why each training example was skipped that this rank has skipped, by its number."""
        bad = self.data.train.bad if self.data is not None else {}
        return {str(example): str(error) for example, error in bad.items()}

    @property
    def evaluates(self) -> bool:
        """Return whether there is anything to evaluate on: not with synthetic data, nor without such a split."""
        return self.data is not None and self.validation_examples != 0

    def evaluation_due(self, step: int) -> bool:
        """Return whether the network is evaluated after `step` steps."""
        every, total = self.settings.run.eval_every_epochs, self.batch.total
        before, after = (intervals(n * total, self.train_examples, every) for n in (step - 1, step))
        passed = after > before
        return self.evaluates and (passed or step == self.last_step or self.evaluated_phase(step) is not None)

    def evaluated_phase(self, step: int) -> Optional[str]:
        """Return the phase that ends after `step` steps, if its end is a result."""
        results = schedule.results(self.phases)
        return next((phase.name for phase in self._ending_at(step) if phase.name in results), None)

    def _ending_at(self, step: int) -> List[Phase]:
        ends = schedule.end_steps(self.phases)
        return [phase for phase in self.phases if ends[phase.name] == step]
