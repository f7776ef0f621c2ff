"""The background writer: one thing at a time, in order, and no error is lost."""

import gc
import threading
import weakref

import numpy as np
import pytest

from resnet_cpu.errors import OutputError
from resnet_cpu.run.writer import Writer

WAIT_S = 60


def fail():
    raise OutputError("the disk is full")


def test_work_runs_beside_the_caller():
    began, released = threading.Event(), threading.Event()
    done = []

    def work():
        began.set()
        assert released.wait(WAIT_S)
        done.append(threading.current_thread().name)

    with Writer() as writer:
        writer.start(work)
        assert began.wait(WAIT_S) and not done
        released.set()
        writer.finish()
        assert done == ["writer"]


def test_one_piece_of_work_waits_for_the_one_before():
    running, most, order = [], [], []

    def work(number):
        running.append(number)
        most.append(len(running))
        order.append(number)
        running.remove(number)

    with Writer() as writer:
        for number in range(50):
            writer.start(lambda number=number: work(number))
    assert order == list(range(50)) and max(most) == 1


def test_an_error_is_raised_once_by_the_next_start_or_finish():
    never = []
    with Writer() as writer:
        for raise_it in (writer.finish, lambda: writer.start(lambda: never.append(1))):
            writer.start(fail)
            with pytest.raises(OutputError, match="the disk is full"):
                raise_it()
            writer.finish()
    assert not never


def test_failed_is_set_until_the_error_is_raised():
    with Writer() as writer:
        writer.start(fail)
        writer._thread.join()
        assert writer.failed
        with pytest.raises(OutputError):
            writer.finish()
        assert not writer.failed


def test_the_end_waits_for_the_work_and_does_not_hide_what_ended_the_run():
    done = []
    with pytest.raises(KeyError), Writer() as writer:
        writer.start(lambda: done.append(1))
        raise KeyError
    assert done == [1]


def test_what_was_written_is_not_kept():
    array = np.zeros(10)
    alive = weakref.ref(array)
    with Writer() as writer:
        writer.start(lambda array=array: array.sum())
        writer.finish()
        del array
        gc.collect()
        assert alive() is None
