"""Data parallel runs: the numbers of one process on any number of ranks, and one line of faults."""

import dataclasses
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.kills import lose_ranks
from support.shell import TINY, fails, succeeds
from support.tiny import SETTINGS, Interrupt, experiment, fake_data, run, schedule_of
from torch import nn

from fxlocal.experiments.training import processes
from fxlocal.experiments.training.growth import Footprint, Growth
from fxlocal.experiments.training.processes import LostRankError, naming_rank
from fxlocal.experiments.training.ranks import train_parallel
from fxlocal.experiments.training.settings import Machine
from fxlocal.parallel import ParallelError

RAGGED = dataclasses.replace(SETTINGS, batch_size=15)  # 8 images on one rank, 7 on the other
MOVING = schedule_of("local-static(start=0.25,largest=0.8)")
LONG = dataclasses.replace(RAGGED, epochs=1000)


def plain_net():
    """Without batch norms, which would see a share of the batch."""
    torch.manual_seed(0)
    convs = [nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1) for i in range(3)]
    layers = [layer for conv in convs for layer in (conv, nn.ReLU())]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10))


def run_ranks(model, settings=RAGGED, schedule=MOVING, data=None, **how):
    return train_parallel(experiment(model, schedule, settings, data=data), 2, **how)


def stop(record):
    if len(record.loss) == 2:
        raise Interrupt


def second_rank():
    return sorted(multiprocessing.active_children(), key=lambda process: process.pid)[1]


@pytest.mark.slow  # starts processes
def test_two_ranks_take_the_steps_of_one_process_and_either_goes_on_with_the_others_run(tmp_path):
    alone, together = plain_net(), plain_net()
    expected, found = run(alone, MOVING, RAGGED), run_ranks(together)
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    assert found.boundary == expected.boundary and len(set(found.boundary)) > 2
    assert found.images == expected.images
    torch.testing.assert_close(together.state_dict(), alone.state_dict(), rtol=1e-4, atol=1e-6)
    sizes = [
        sum(p.nbytes for p in layer.parameters()) for layer in alone if list(layer.parameters())
    ]
    for sent, boundary in zip(found.wire_bytes, found.boundary, strict=True):
        gradients, deltas = sum(sizes[boundary:]), sum(sizes[:boundary])
        assert 4 * gradients < sent < 4 * (gradients + deltas + 64)  # in four steps
    path, model = tmp_path / "c.pt", plain_net()
    with pytest.raises(Interrupt):
        run_ranks(plain_net(), checkpoint=path, on_epoch=stop)
    record = run(model, MOVING, RAGGED, checkpoint=path, resume=True)
    assert record.loss == pytest.approx(expected.loss, rel=1e-5)
    with pytest.raises(Interrupt):
        run(plain_net(), MOVING, RAGGED, checkpoint=path, on_epoch=stop)
    record = run_ranks(model, checkpoint=path, resume=True)
    assert record.loss == pytest.approx(expected.loss, rel=1e-5)


@pytest.mark.slow  # compiles
def test_compiled_ranks_take_the_steps_of_one_process():
    settings, schedule = dataclasses.replace(RAGGED, epochs=2), schedule_of("local-static", 2)
    job = experiment(plain_net(), schedule, settings, Machine(compile=True))
    found, expected = train_parallel(job, 2), run(plain_net(), schedule, settings)
    assert found.loss == pytest.approx(expected.loss, rel=1e-4)
    assert found.boundary == expected.boundary and len(set(found.boundary)) == 2


@pytest.mark.slow
def test_ranks_that_are_started_again_go_on_to_the_bit(tmp_path):
    kills = [3, 7]

    def kill(record):
        if kills and len(record.loss) == kills[0]:
            kills.pop(0)
            second_rank().kill()

    settings = dataclasses.replace(RAGGED, epochs=10, grow_batch=True)
    schedule = schedule_of("local-static(start=0.25,largest=0.8)", 10)
    path, one, other = tmp_path / "c.pt", plain_net(), plain_net()
    options = {"checkpoint": path, "max_restarts": 2, "on_epoch": kill}
    record = run_ranks(one, settings, schedule, **options)
    expected = run_ranks(other, settings, schedule)
    assert not kills and record.loss == expected.loss and record.errors == expected.errors
    assert record.batch_size == expected.batch_size and record.batch_size[-1] > 15
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)


@pytest.mark.slow
def test_a_run_that_loses_ranks_at_random_moments_goes_on_to_the_bit(tmp_path):
    killed, (losses, state), (expected, alone) = lose_ranks(2, 20, tmp_path)
    assert len(killed) == 2 and losses == expected and len(losses) == 20
    torch.testing.assert_close(state, alone, rtol=0, atol=0)


def leave(images, generator):
    """Augment; rank 1 is gone in the third epoch."""
    leave.calls = getattr(leave, "calls", 0) + 1
    if os.environ.get("RANK") == "1" and leave.calls > 8:
        os._exit(0)
    return images


def fail(images, generator):
    fail.calls = getattr(fail, "calls", 0) + 1
    if os.environ.get("RANK") == "1" and fail.calls > 8:
        raise RuntimeError("no such disk")
    return images


class Stalling(torch.utils.data.Dataset):
    """Images to judge by, which hang in the third epoch, on the rank that looks at them."""

    def __init__(self, images):
        self.images, self.looks = images, 0

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        self.looks += 1
        if self.looks > 2 * len(self) + 1:
            time.sleep(1000)
        return self.images[index]


FAULTS = {
    "killed": (signal.SIGKILL, None, r"^rank 1 .*ended with SIGKILL$"),
    "ended": (signal.SIGTERM, None, r"^rank 1 .*ended with SIGTERM$"),
    "stalls": (signal.SIGSTOP, None, r"^rank 1 did not answer in time$"),
    "exits": (None, leave, r"^rank 1 .*ended with code 0$"),
    "data": (None, fail, r"^rank 1: RuntimeError: no such disk$"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_rank_that_fails_ends_all_with_one_line(fault, tmp_path, capfd):
    sent, augment, message = FAULTS[fault]
    data = dataclasses.replace(fake_data(), augment=augment) if augment else None

    def hit(record):
        if sent and len(record.loss) == 2:
            os.kill(second_rank().pid, sent)

    path = tmp_path / "c.pt"
    with pytest.raises(ParallelError, match=message):
        run_ranks(plain_net(), LONG, data=data, checkpoint=path, on_epoch=hit, timeout=5.0)
    assert not multiprocessing.active_children()
    assert torch.load(path)["state"]["run"]["loss"][1:]
    assert fault == "data" or "Traceback" not in capfd.readouterr().err


@pytest.mark.slow
def test_a_rank_that_stalls_while_it_evaluates_is_noticed_by_those_that_wait():
    data = fake_data()
    stalling = dataclasses.replace(data, test=Stalling(data.test))
    with pytest.raises(ParallelError, match=r"^rank 0 ended or did not answer within 4 s$"):
        run_ranks(plain_net(), LONG, data=stalling, timeout=4.0)
    assert not multiprocessing.active_children()


def torchrun(folder, *arguments, restarts=1, code=0):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "--max-restarts", str(restarts)]
    command += ["-m", "fxlocal", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == code, done.stderr
    return done


@pytest.mark.slow
@pytest.mark.usefixtures("unrendered")
def test_the_command_starts_ranks_or_is_one_that_torchrun_has_started(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[3])
    job = ("train", *TINY, "--strategy", "local-static(start=0.3)", "--max-restarts", "1")
    said = succeeds(*job, "--nproc", "2", "--out", tmp_path / "here")
    assert re.search(r"\d images/s, [\d.]+ -> [\d.]+ MB sent an epoch; ", said)
    done = torchrun(tmp_path, *job[:-2], "--out", "there")
    assert done.stdout.count("images/s") == 2 + 1  # of epochs and the whole, by the first rank
    assert done.stdout.count("fxlocal ") == 1
    runs = [
        json.loads((tmp_path / n / "results.json").read_text())["runs"] for n in ("here", "there")
    ]
    (here,), (there,) = runs
    assert [k for k in here if here[k] != there[k]] == [
        "train_seconds",
        "compile_seconds",
        "seconds",
    ]
    wrong = torchrun(tmp_path, "train", *TINY, "--batch-size", "1", restarts=0, code=1)
    assert "a batch of 1 images has none for some" in wrong.stderr
    options = ("--strategies", "sgd,freeze", "--seeds", "0", "--out", tmp_path / "table")
    table = succeeds("compare", *TINY, "--nproc", "2", *options)
    assert "MB that each rank sent an epoch, freeze: " in table
    results = json.loads((tmp_path / "table" / "results.json").read_text())
    sgd, freeze = (run["wire_bytes"][-1] for run in results["runs"])
    assert freeze < sgd


# Parts


def ended(tmp_path, rank, exitcode, said=None):
    """A process of a rank as it stands, and the file in which torch has written what it raised."""
    file = tmp_path / f"{rank}.json"
    if said:
        told = {"message": said, "extraInfo": {"timestamp": "1"}}
        file.write_text(json.dumps({"message": told}))
    one = SimpleNamespace(pid=rank, exitcode=exitcode, killed=False)
    one.is_alive = lambda: one.exitcode is None
    one.kill = lambda: setattr(one, "exitcode", -signal.SIGKILL)
    one.join = lambda: None
    return one, str(file)


LOST = "LostRankError: rank 0: RuntimeError: Connection closed by peer"


@pytest.mark.parametrize(
    ("states", "rank", "message"),
    [
        ([(None,), (None,)], None, ""),
        ([(1, LOST), (-9,)], 1, "ended with SIGKILL"),
        ([(1, LOST), (0,)], 1, "ended with code 0"),
        ([(1, LOST), (1, "ZeroDivisionError: x")], 1, "ZeroDivisionError: x"),
        ([(1, LOST), (None,), (1, LOST)], 1, "rank 1 did not answer in time"),
        ([(-6,), (1, "KeyError: x")], 1, "KeyError: x"),
        ([(1, LOST), (1, LOST)], 0, "Connection closed"),
    ],
)
def test_the_rank_to_blame_is_found(states, rank, message, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "GRACE", 0.0)
    made = [ended(tmp_path, r, *state) for r, state in enumerate(states)]
    agent = object.__new__(processes._Agent)
    running = SimpleNamespace(processes=[process for process, _ in made])
    agent._pcontext = SimpleNamespace(_pc=running, error_files=[file for _, file in made])
    agent._worker_group = SimpleNamespace(spec=SimpleNamespace(local_world_size=len(made)))
    agent._num_modules = 0
    failure = agent._find_culprit()
    assert rank == (None if failure is None else failure.local_rank)
    if failure is not None:
        assert message in str(processes._error(rank, failure, 0, len(made)))


def test_a_lost_connection_is_told_from_an_error_of_the_rank(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(ParallelError, match=r"^rank 3: ValueError: x$") as caught, naming_rank():
        raise ValueError("x")
    assert type(caught.value) is ParallelError
    with pytest.raises(LostRankError, match=r"^rank 3: RuntimeError: \[.*gloo/"), naming_rank():
        raise RuntimeError(
            "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Closed\nmore"
        )


def test_a_batch_grows_by_what_the_rank_with_most_images_takes():
    growth = Growth(Footprint((100.0, 50.0), (40.0, 40.0), (0, 0)), 15, 1000, ranks=2)
    assert growth.start_epoch(0) == 15 and growth.predict(0, 15) == 840
    growth.end_epoch(0, 840)
    assert growth.start_epoch(1) == 32  # 16 * 50 + 40
    assert growth.rate_factor("linear") == 32 / 15


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "--nproc", "3"), "--nproc 3: this is one of 2 ranks that torchrun has started"),
        (("compare",), "leave torchrun out, and give --nproc"),
    ],
)
def test_a_rank_of_torchrun_is_told_what_it_cannot_be(arguments, message, monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert message in fails(*arguments, *TINY)
    assert message in (tmp_path / "error.json").read_text()  # which torchrun shows
