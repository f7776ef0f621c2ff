"""Check what falls due after each step, and the silent twin of the report. Nothing is trained."""

import dataclasses
import inspect

import pytest
from conftest import TINY_FLAGS

from resnet_cpu import commandline
from resnet_cpu.cluster.control import World
from resnet_cpu.resolve import resolve_recipe
from resnet_cpu.run.folder import Stopwatch
from resnet_cpu.simulator import cluster
from resnet_cpu.training.job import Job
from resnet_cpu.training.report import Report, Silent

TREE = [
    "--phase=main:steps=10,lr=1",
    "--phase=one:steps=4,lr=1,branch=1,member=1,from=main",
    "--phase=tail:steps=6,lr=1",
]


def job(*more, data=True):
    settings = commandline.parse([*TINY_FLAGS, "--global_batch_size=10", *TREE, *more])
    resolved = resolve_recipe(settings, 1, 40)
    fields = dict.fromkeys(("validation_examples", "signature", "folder", "resume_from", "init_from", "finished"))
    return Job(
        settings=settings,
        world=World(1, 0),
        phases=resolved.phases,
        batch=resolved.batch,
        train_examples=40,
        data="a data set" if data else None,
        run_dir="",
        evaluated=False,
        attempt=1,
        seconds_before=0.0,
        seconds_to_top1={},
        clock=Stopwatch(),
        **fields,
    )


def due(what):
    return [step for step in range(1, 21) if what(step)]


def test_phases_end_with_checkpoints_and_members_and_branches_with_evaluations():
    found = job()
    assert (found.total_steps, found.last_step) == (20, 20)
    assert due(found.checkpoint_due) == [10, 16, 20]  # phases keep the order in which they are named: main, tail, one
    assert due(found.evaluation_due) == [16, 20]
    assert [found.member_due(step) for step in (10, 16, 20)] == [None, None, "one"]
    assert [found.evaluated_phase(step) for step in (10, 16, 20)] == [None, "tail", "one"]
    assert [found.phase_at(step) for step in (10, 11, 16, 20)] == ["main", "tail", "tail", "one"]


@pytest.mark.parametrize(
    "flags, checkpoints, evaluations",
    [
        (["--checkpoint_every_steps=8"], [8, 10, 16, 20], [16, 20]),
        (["--eval_every_epochs=1.5"], [10, 16, 20], [6, 12, 16, 18, 20]),
        (["--max_steps=7"], [7, 10, 16, 20], [7, 16, 20]),
    ],
)
def test_flags_add_checkpoints_and_evaluations(flags, checkpoints, evaluations):
    found = job(*flags)
    assert due(found.checkpoint_due) == checkpoints and due(found.evaluation_due) == evaluations


def test_parts_of_an_epoch_are_counted_exactly():
    """Fault: as floats, 0.3 epochs hold two tenths, so that the evaluation was a step late."""
    found = dataclasses.replace(job("--eval_every_epochs=0.1"), train_examples=100)
    assert due(found.evaluation_due) == list(range(1, 21))


@pytest.mark.parametrize("every_epochs", [0, 0.01, 0.2, 0.25, 0.3, 1, 1.25, 1.5, 3, 10])
@pytest.mark.parametrize("every_steps", [0, 1, 3, 8, 10, 20, 30])
def test_simulate_counts_what_falls_due(every_epochs, every_steps):
    """Fault: neither evaluations nor checkpoints at the ends of phases were counted beside those at intervals."""
    found = job(f"--eval_every_epochs={every_epochs}", f"--checkpoint_every_steps={every_steps}")
    resolved = resolve_recipe(found.settings, 1, found.train_examples)
    evaluations, checkpoints = len(due(found.evaluation_due)), len(due(found.checkpoint_due))
    assert cluster.due(found.settings, resolved, found.train_examples) == (evaluations, checkpoints)


def test_synthetic_data_is_never_evaluated():
    assert due(job("--eval_every_epochs=1", data=False).evaluation_due) == []


def test_the_silent_report_has_the_methods_of_the_report():
    def methods(kind):
        return {
            name: inspect.signature(method)
            for name, method in inspect.getmembers(kind, inspect.isfunction)
            if not name.startswith("_")
        }

    assert methods(Silent) == methods(Report)
