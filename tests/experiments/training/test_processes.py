"""Ranks that are started as torchrun does: what they return, and one line when one fails."""

import os
import signal
import time

import pytest
import torch
from support import killing
from torch import distributed
from torch.distributed.elastic.multiprocessing.api import MultiprocessContext

from fxlocal.experiments.training.processes import join_group, launch, times_restarted
from fxlocal.experiments.training.settings import Machine, SettingsError
from fxlocal.parallel import ParallelError


def add_up(rank, payload, pipe):
    """Return the sum over ranks of the length of what they are told, which may be to fail."""
    join_group(Machine())
    total = torch.tensor([len(payload)])
    distributed.all_reduce(total)
    if rank == 0:
        pipe.send(("total", int(total)))
    if payload == b"once" and times_restarted() == 0:
        raise ZeroDivisionError("on purpose")
    if payload == b"own":
        raise ZeroDivisionError("on purpose")
    if payload == b"user's":
        raise SettingsError("no: such thing")
    if payload == b"exits":
        os._exit(3)
    return rank, int(total)


@pytest.mark.slow  # starts processes
def test_results_come_by_rank_also_of_those_that_were_started_again():
    told = []
    events = {"total": told.append}
    assert launch(add_up, [b"a", b"bc"], 2, events) == [(0, 3), (1, 3)]
    assert launch(add_up, [b"a", b"once"], 2, events, max_restarts=1) == [(0, 5), (1, 5)]
    assert told == [3, 5, 5]


@pytest.mark.slow
def test_an_error_of_a_rank_is_one_line_with_its_traceback_as_the_cause():
    events = {"total": lambda total: None}
    with pytest.raises(ParallelError, match=r"^ZeroDivisionError: on purpose$") as error:
        launch(add_up, [b"a", b"own"], 2, events)
    assert ", in add_up" in str(error.value.__cause__)
    with pytest.raises(SettingsError, match=r"^no: such thing$"):
        launch(add_up, [b"a", b"user's"], 2, events)
    ended = r"^rank 3 \(module 1, replica 1\) ended or did not answer: it ended with code 3$"
    with pytest.raises(ParallelError, match=ended):
        launch(add_up, [b"a", b"a", b"a", b"exits"], 2, events)


@pytest.mark.slow
def test_a_rank_that_is_killed_as_all_are_done_does_not_keep_the_run_waiting(monkeypatch):
    def done(context):
        """Kill one that waits for the run's word that all are done, before it is given."""
        if is_done(context):
            time.sleep(0.5)  # until it waits
            context._pc.processes[1].kill()
            context._pc.processes[1].join()
        return is_done(context)

    is_done = MultiprocessContext._is_done
    monkeypatch.setattr(MultiprocessContext, "_is_done", done)
    with pytest.raises(ParallelError, match=r"^rank 1 .* did not answer: it ended with SIGKILL$"):
        launch(add_up, [b"a", b"a"], 0, {"total": lambda total: None})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "number"),
    [
        (3, signal.SIGTERM),  # the run, a tracker, and what the ranks will be forked from
        (5, signal.SIGTERM),
        (5, signal.SIGKILL),
    ],
)
def test_ranks_end_with_the_run_that_started_them(processes, number, tmp_path):
    run = killing.begin(
        [*killing.KINDS["ranks"], "--epochs", "999", "--out", str(tmp_path / "run")], tmp_path
    )
    while len(killing.left_over(tmp_path)) < processes:
        assert run.poll() is None, tmp_path.with_suffix(".log").read_text()
        time.sleep(0.01)
    os.kill(run.pid, number)
    assert run.wait(120) in (-number, 128 + number)
    rest, seconds = killing.await_none(tmp_path, 5.0)
    assert not rest, f"{rest} go on {seconds:.1f} s later"
