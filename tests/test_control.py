"""Rank and number of cores of a process, from what launchers and the kernel report; messages between ranks."""

import os
import sys

import pytest

from resnet_cpu.cluster import control
from resnet_cpu.errors import DataError, FlagError, OutputError

STEP = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2"}


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, (1, 0)),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}, (4, 3)),
        ({"PMI_SIZE": "8", "PMI_RANK": "0"}, (8, 0)),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, (2, 1)),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, (1, 0)),  # a batch script is not a rank
        ({**STEP, "SLURM_PTY_PORT": "40000"}, (1, 0)),  # typed into the shell of srun --pty
        ({**STEP, "SLURM_PTY_PORT": "40000", "SLURM_TASK_PID": "1"}, (1, 0)),
        ({**STEP, "SLURM_PTY_PORT": "40000", "SLURM_TASK_PID": str(os.getpid())}, (4, 2)),  # started by srun itself
        ({**STEP, "SLURM_PTY_PORT": "40000", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, (2, 1)),
        ({**STEP, "SLURM_PTY_PORT": "40000", "PMI_SIZE": "4", "PMI_RANK": "0"}, (1, 0)),  # Slurm's PMI2
        ({**STEP, "SLURM_PTY_PORT": "40000", "PMI_SIZE": "2", "PMI_RANK": "1", "MPI_LOCALNRANKS": "2"}, (2, 1)),
        ({**STEP, "SLURM_PTY_PORT": "40000", "RESNET_CPU_RANKS": "4"}, (4, 2)),  # by launch in that shell, with srun
        (STEP, (4, 2)),
        ({"PMI_SIZE": "", "PMI_RANK": "0"}, (1, 0)),
    ],
)
def test_launchers(environment, expected):
    assert control.announced(environment) == expected


@pytest.mark.parametrize(
    "mask, masks, cores",
    [
        ([0, 1, 2, 3], [[0, 1, 2, 3], [4, 5, 6, 7]], 4),  # bound to disjoint cores
        ([0, 1, 2, 3], [[0, 1, 2, 3]] * 2, 2),  # unbound: shared evenly
        ([0, 1], [[0, 1]] * 3, 1),  # more ranks than cores
    ],
)
def test_share_of_cores(mask, masks, cores, monkeypatch):
    monkeypatch.setattr(control, "physical_cores", lambda logical: len(set(logical)))
    assert control.share_of_cores(mask, masks) == cores


def test_hyper_threads_of_a_core_count_once(monkeypatch, tmp_path):
    import builtins
    import io

    siblings = {0: "0,4", 4: "0,4", 1: "1,5", 5: "1,5"}
    real = builtins.open

    def fake(path, *rest, **more):
        parts = str(path).split("/")
        if "thread_siblings_list" in parts:
            return io.StringIO(siblings[int(parts[-3][3:])])
        return real(path, *rest, **more)

    monkeypatch.setattr(builtins, "open", fake)
    assert control.physical_cores([0, 4, 1, 5]) == 2
    assert control.physical_cores([0, 1]) == 2


def test_a_single_rank_exchanges_messages_with_itself():
    world = control.World(1, 0)
    assert world.on_rank0(lambda: {"a": 1}) == {"a": 1}
    assert world.gather([2]) == [[2]] and world.broadcast("x") == "x"
    with pytest.raises(DataError, match="a bad record") as caught:
        world.on_rank0(lambda: (_ for _ in ()).throw(DataError("a bad record")))
    assert caught.value.collective

    def full():
        raise OSError(28, "No space left on device", "/data/file")

    with pytest.raises(OutputError, match="/data/file: No space left on device"):
        world.on_rank0(full)


def test_on_all_raises_the_first_error_on_all_ranks(monkeypatch):
    world = control.World(1, 0)
    assert world.on_all(lambda: 3) == 3
    with pytest.raises(OutputError, match="^/data: No such") as caught:
        world.on_all(lambda: (_ for _ in ()).throw(FileNotFoundError(2, "No such file", "/data")))
    assert caught.value.collective
    failure = {"code": 65, "message": "torn"}
    rows = [["one", None], ["two", failure], ["three", failure], ["four", failure]]
    monkeypatch.setattr(control.World, "gather", lambda self, message: rows)
    with pytest.raises(DataError, match=r"^rank 1 on two: torn \(and 2 more ranks\)$"):
        control.World(4, 0).on_all(lambda: None)


def test_several_hosts():
    job = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}
    assert control.several_hosts({**job, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"})
    assert not control.several_hosts({**job, "OMPI_COMM_WORLD_LOCAL_SIZE": "4"})
    assert not control.several_hosts({})


def test_another_world_than_expected_is_refused():
    with pytest.raises(FlagError, match="--ranks=3: the launcher started 1"):
        control.connect(3)


def test_errors_that_all_ranks_raise_are_collective():
    with pytest.raises(FlagError) as caught, control.same_on_all_ranks():
        raise FlagError("the same everywhere")
    assert caught.value.collective


@pytest.mark.parametrize("asked, announced, message", [("2", {}, "2 ranks were asked for, this process is one of 1")])
def test_a_world_of_another_size_than_was_asked_for_is_refused(asked, announced, message, monkeypatch):
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"RESNET_CPU_RANKS": asked, **announced}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(FlagError, match=message):
        control.connect(None)
    monkeypatch.setenv("RESNET_CPU_RANKS", "1")
    assert control.connect(None).size == 1


def test_work_on_rank_0_beats_on_all_ranks():
    """So that no watchdog ends the job while the others wait for rank 0; two ranks are in tests/mpi."""
    beats = []
    assert control.World(1, 0).on_rank0_with_beats(lambda beat: [beat(), beat(), 7][-1], lambda: beats.append(1)) == 7
    assert len(beats) == 2


def test_several_ranks_without_horovod_are_refused_with_a_remedy(monkeypatch):
    from resnet_cpu.cluster import horovod

    monkeypatch.setitem(sys.modules, "horovod", None)
    monkeypatch.setitem(sys.modules, "horovod.tensorflow", None)
    with pytest.raises(FlagError, match="2 ranks need Horovod, .* run make setup where g.. and MPI .*single rank"):
        horovod.start(control.World(2, 0))
    horovod.start(control.World(1, 0))  # one rank does not need it
    assert not horovod.active()
